"""One process at a time in a folder, whatever ends it; who only looks takes nothing from anybody."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lorasmith.errors import RunError
from lorasmith.system import locking
from lorasmith.system.locking import is_locked, locked

HOLDS = """
import sys, time
from pathlib import Path
from lorasmith.system.locking import locked
path = Path(sys.argv[1])
with locked(path, path.parent):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / ".lorasmith.lock"


def test_a_folder_is_made_for_it_and_goes_again_if_nothing_came_into_it(tmp_path):
    path = tmp_path / "a" / "b" / ".lorasmith.lock"
    with locked(path, path.parent):
        assert is_locked(path)
    assert list(tmp_path.iterdir()) == []
    with locked(path, path.parent):
        (tmp_path / "a" / "mine").write_text("")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine"]


def test_another_process_is_named_and_its_death_ends_it(path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDS, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    holder.stdout.readline()
    assert is_locked(path)
    with (
        pytest.raises(RunError, match=rf"run is in use by process {holder.pid}\. Wait until it has finished"),
        locked(path, path.parent),
    ):
        pass
    assert is_locked(path), "a refused one takes it from nobody"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert path.is_file(), "a killed process takes nothing away"
    assert not is_locked(path)
    with locked(path, path.parent) as has_locks:
        assert has_locks
    assert not path.exists()


def test_a_process_of_another_machine_is_named_with_it(path, monkeypatch):
    with locked(path, path.parent):
        monkeypatch.setattr(socket, "gethostname", lambda: "other")
        with (
            pytest.raises(RunError, match=rf"in use by process {os.getpid()} on \S+\. Wait"),
            locked(path, path.parent),
        ):
            pass


def test_looking_neither_drops_it_nor_keeps_one_out(path):
    """fcntl's locks go when any descriptor of the process is closed, and a look takes a shared one for an instant."""
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            is_locked(path)

    looking = [threading.Thread(target=look) for _one in range(4)]
    for one in looking:
        one.start()
    try:
        for _time in range(50):
            with locked(path, path.parent):
                assert is_locked(path)
                assert subprocess_cannot_take(path) if _time == 0 else True
    finally:
        done.set()
        for one in looking:
            one.join()


def subprocess_cannot_take(path: Path) -> bool:
    words = [sys.executable, "-c", HOLDS, str(path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    return "RunError" in done.stderr and "in use by process" in done.stderr


def test_of_many_at_once_one_has_it_at_a_time(path):
    """Also while the file is taken away and made again."""
    inside, most, errors = [0], [0], list[BaseException]()

    def work() -> None:
        try:
            for _time in range(20):
                with locked(path, path.parent):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    time.sleep(0.0002)
                    inside[0] -= 1
        except RunError as error:  # it waited for its second in vain
            errors.append(error)

    threads = [threading.Thread(target=work) for _one in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert most == [1]


def test_a_link_in_its_place_is_not_written_through(path, tmp_path):
    path.parent.mkdir()
    (tmp_path / "mine").write_text("mine")
    path.symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="symbolic links"), locked(path, path.parent):
        pass
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_file_system_without_locks_is_told(path, monkeypatch):
    monkeypatch.setattr(locking, "flock", lambda *_args, **_more: None)
    with locked(path, path.parent) as has_locks:
        assert has_locks is False
