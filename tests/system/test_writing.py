"""Files and folders get their names once they are complete; a kill at any moment of a replacement loses nothing."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lorasmith.errors import RunError
from lorasmith.system import writing
from lorasmith.system.writing import discard, recover, write_file, write_folder

# The process ends at the call number N of the function NAME of os, as by a kill: no handler runs.
KILLED = """
import os, sys
from pathlib import Path
from lorasmith.system import writing

name, left, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
real = getattr(os, name)
def counted(*args, **more):
    global left
    left -= 1
    if left < 0:
        os._exit(9)
    return real(*args, **more)
setattr(os, name, counted)

def fill(place):
    (place / "a").write_text("new")
    (place / "b").write_text("new")
writing.write_folder(folder, fill)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def filled(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    for name in ("a", "b"):
        (folder / name).write_text(text)
    return folder


def texts(folder: Path) -> set[str]:
    return {path.read_text() for path in folder.iterdir()}


def fill(place: Path) -> None:
    (place / "a").write_text("new")


def killed(name: str, call: int, folder: Path) -> bool:
    done = subprocess.run([sys.executable, "-c", KILLED, name, str(call), str(folder)], check=False)
    assert done.returncode in (0, 9)
    return done.returncode == 9


@pytest.mark.parametrize("name", ["rename", "rmdir", "unlink", "fsync"])
def test_a_kill_at_any_call_leaves_the_old_or_the_new_one_whole(tmp_path, name):
    calls = 0
    while True:
        place = tmp_path / f"{name}-{calls}"
        folder = filled(place / "folder", "old")
        was_killed = killed(name, calls, folder)
        recover(place, lambda name: name == "folder")
        assert names(place) == ["folder"]
        assert names(folder) == ["a", "b"]
        assert texts(folder) in ({"old"}, {"new"})
        if not was_killed:
            assert texts(folder) == {"new"}
            break
        calls += 1
    assert calls >= {"rename": 2, "rmdir": 1, "unlink": 2, "fsync": 4}[name]


def test_a_rename_that_fails_gives_the_old_one_its_name_back(tmp_path, monkeypatch):
    folder, rename, calls = filled(tmp_path / "folder", "old"), Path.rename, []

    def second_fails(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(RunError, match="folder: cannot be written: Input/output error"):
        write_folder(folder, fill)
    assert (names(tmp_path), texts(folder)) == (["folder"], {"old"})


def test_a_file_and_the_folder_around_it_are_on_disk_before_the_name_is(tmp_path, monkeypatch):
    """In this order: the content, the name, the folder that holds the name."""
    done: list[str] = []
    monkeypatch.setattr(writing, "sync", lambda path: done.append(f"sync {path.name[:4]}"))
    replace: Callable[[Path, Path], Path] = Path.replace
    monkeypatch.setattr(Path, "replace", lambda a, b: (done.append("name"), replace(a, b))[1])
    (tmp_path / "here").mkdir()
    write_file(tmp_path / "here" / "page", "text")
    assert done == ["sync .pag", "name", "sync here"]
    assert names(tmp_path / "here") == ["page"]


def test_every_file_of_a_folder_is_on_disk_before_its_name_is(tmp_path, monkeypatch):
    seen: list[int] = []
    fsync: Callable[[int], None] = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (seen.append(os.fstat(handle).st_ino), fsync(handle))[1])
    write_folder(tmp_path / "folder", fill)
    wanted = [tmp_path / "folder" / "a", tmp_path / "folder", tmp_path]
    assert [path.stat().st_ino for path in wanted] == seen


def test_a_file_system_that_cannot_write_a_folder_through_is_no_fault(tmp_path, monkeypatch):
    def refused(_handle: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refused)
    write_file(tmp_path / "page", "text")
    assert (tmp_path / "page").read_text() == "text"


def test_a_link_is_neither_followed_nor_removed(tmp_path):
    mine = filled(tmp_path / "elsewhere", "mine")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "folder").symlink_to(mine)
    (tmp_path / "here" / ".other.lorasmith-old").symlink_to(mine)
    (tmp_path / "here" / ".other.lorasmith-new-abcd1234").symlink_to(mine)
    with pytest.raises(RunError, match="folder: cannot be written: Not a directory"):
        write_folder(tmp_path / "here" / "folder", fill)
    recover(tmp_path / "here", lambda _name: True)
    assert texts(mine) == {"mine"}
    assert len(names(tmp_path / "here")) == 3


def test_recover_touches_only_what_it_is_asked_about(tmp_path):
    for name in (
        ".mine.lorasmith-old",
        ".other.lorasmith-new-abc",
        ".git",
        ".mine.lorasmith-new",
        "mine.lorasmith-old",
    ):
        filled(tmp_path / name, name)
    recover(tmp_path, lambda name: name == "mine")
    assert names(tmp_path) == [".git", ".mine.lorasmith-new", ".other.lorasmith-new-abc", "mine", "mine.lorasmith-old"]


def test_a_discarded_folder_never_has_its_name_and_is_half_gone(tmp_path, monkeypatch):
    folder = filled(tmp_path / "folder", "old")
    remove: Callable[[Path], None] = shutil.rmtree
    monkeypatch.setattr(
        shutil, "rmtree", lambda path, **more: (folder.exists() and pytest.fail("named"), remove(path))[1]
    )
    discard(folder)
    assert names(tmp_path) == []
