"""The cache: one writer at a time, complete entries only, and old ones that make room."""

import os
import shutil
import stat
from pathlib import Path

import pytest

from lorasmith.errors import ModelError
from lorasmith.report import Report
from lorasmith.system import cache
from lorasmith.system.cache import cache_folder, exclusive_access, new_cache_folder, require_space, write_cached
from tests.support.tiny import Watch


@pytest.mark.parametrize(
    ("variable", "wanted"),
    [
        ("/var/cache", "/var/cache/lorasmith"),
        ("not/absolute", "/home/me/.cache/lorasmith"),
        (None, "/home/me/.cache/lorasmith"),
    ],
)
def test_the_folder_follows_the_xdg_rule(monkeypatch, variable, wanted):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if variable is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", variable)
    assert cache_folder() == Path(wanted)


def test_the_first_writer_removes_what_a_killed_one_left(tmp_path):
    leftover = tmp_path / ".model.lorasmith-new-abcd1234"
    leftover.mkdir()
    with exclusive_access(tmp_path / "model", Report()):
        assert not leftover.exists()


def test_a_second_writer_says_that_it_waits(tmp_path, monkeypatch):
    answers, watch = [False, True], Watch()
    monkeypatch.setattr(cache, "flock", lambda _handle, wait=False: answers.pop(0))
    with exclusive_access(tmp_path / "model", watch):
        pass
    assert watch.said == [f"Another process is creating {tmp_path / 'model'}; waiting for it to finish."]


def test_without_locks_no_leftover_is_removed(tmp_path, monkeypatch):
    """It may belong to a process that is still writing."""
    monkeypatch.setattr(cache, "flock", lambda _handle, wait=False: None)
    other = tmp_path / ".model.lorasmith-new-abcd1234"
    other.mkdir()
    with exclusive_access(tmp_path / "model", Report()):
        assert other.exists()


def test_a_folder_appears_complete_or_not_at_all(tmp_path):
    target = tmp_path / "models" / "one"

    def fail() -> None:
        with new_cache_folder(target) as folder:
            (folder / "half").touch()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not list((tmp_path / "models").iterdir())
    with new_cache_folder(target) as folder:
        (folder / "whole").touch()
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["whole"]


def test_the_first_result_stays(tmp_path):
    for text in ("first", "second"):
        with new_cache_folder(tmp_path / "model") as folder:
            (folder / "weights").write_text(text)
    assert (tmp_path / "model" / "weights").read_text() == "first"


def test_the_oldest_files_of_the_same_kind_make_room(tmp_path):
    folder = tmp_path / "measured"
    folder.mkdir()
    (folder / "notes.txt").touch()
    for number in range(4):
        place = folder / f"{number}.json"
        write_cached(place, 2, lambda staging: staging.write_text("{}"))
        os.utime(place, (number, number))
    assert sorted(path.name for path in folder.iterdir()) == ["2.json", "3.json", "notes.txt"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "3.json").stat().st_mode) == 0o600


def test_a_cache_that_cannot_be_written_is_no_error_for_what_only_saves_time(tmp_path):
    (tmp_path / "file").touch()
    write_cached(tmp_path / "file" / "one.json", 2, lambda staging: staging.write_text("{}"))


def test_a_cache_that_cannot_be_written_is_one_for_what_is_needed(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match=r"Not a directory|File exists"), new_cache_folder(tmp_path / "file" / "model"):
        pass


def test_too_little_space_is_said_with_both_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10, 5, 3_000_000))
    require_space(tmp_path, 3_000_000)
    with pytest.raises(ModelError, match="270 MB are needed, but only 3 MB are free"):
        require_space(tmp_path, 270_000_000)
