"""Whoever reads may leave, the terminal may go, the disk may be full: a training goes on, or ends with all saved."""

import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny import flags, rows_file, settings, trained

COMMAND = [sys.executable, "-c", "import sys; from lorasmith.cli.main import main; sys.exit(main(sys.argv[1:]))"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "LORASMITH_LANG": "en"}


def words_of(run: Path, **changes: Any) -> list[str]:
    return ["train", rows_file(run.with_name("rows.jsonl")), "--output", str(run), *flags(settings(**changes))]


def shell(line: str, *words: str) -> subprocess.CompletedProcess[str]:
    """A line of bash in which "$@" is lorasmith with `words`."""
    argv = ["bash", "-c", line, "bash", *COMMAND, *words]
    return subprocess.run(argv, capture_output=True, text=True, env=ENVIRONMENT, timeout=120, check=False)


def wait_for(ready: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.002)


def lines_of(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def is_saved(run: Path) -> bool:
    """Whether the last step that was done is in a checkpoint."""
    (folder,) = (run / "checkpoints").glob("step-*")
    return int(folder.name.removeprefix("step-")) == lines_of(run) - 1  # and the base before step 1


@pytest.mark.parametrize(
    "line",
    [
        '"$@" | head -1; exit ${PIPESTATUS[0]}',
        '"$@" --json 2>&1 | true; exit ${PIPESTATUS[0]}',
        '"$@" <&- >&- 2>&-',
        '"$@" --plain >/dev/full',
    ],
)
def test_a_training_that_nobody_reads_comes_to_its_end(tmp_path, line):
    done = shell(line, *words_of(tmp_path / "run", max_steps=4, eval_every=2))
    assert "Traceback" not in done.stderr + done.stdout
    assert "Exception ignored" not in done.stderr
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "summary.json").is_file()
    assert lines_of(tmp_path / "run") == 4 + 3
    assert b"warning" not in (tmp_path / "run" / "metrics.jsonl").read_bytes()  # no file took a closed stream's number


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streams") / "run"
    trained(folder, max_steps=1)
    return folder


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ('"$@" | true; exit ${PIPESTATUS[0]}', 141, ["info"]),
        ('"$@" 2>&1 | true; exit ${PIPESTATUS[0]}', 2, ["no-verb"]),
        ('"$@" <&- >&-', 0, ["generate", "Hi", "--max-new-tokens", "3"]),
        ('"$@" <&-', 2, ["generate"]),
        ('"$@" 2>&1 >/dev/full', 2, ["info"]),
        ('"$@" 2>&1 >/dev/full', 2, ["--help"]),
    ],
)
def test_no_verb_ends_with_a_traceback(run, line, code, words):
    done = shell(line, words[0], *([str(run)] if words[0] in ("info", "generate") else []), *words[1:])
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_signal_saves_the_step_in_hand(tmp_path, number):
    run = tmp_path / "run"
    work = subprocess.Popen([*COMMAND, *words_of(run, max_steps=100_000)], stderr=subprocess.PIPE, text=True,
                            stdout=subprocess.DEVNULL, env=ENVIRONMENT)  # fmt: skip
    wait_for(lambda: lines_of(run) >= 5)
    work.send_signal(number)
    _out, err = work.communicate(timeout=30)
    assert work.returncode == 130
    assert re.search(r"^Stopped after step \d+; saved in ", err, re.MULTILINE)
    assert "Traceback" not in err
    assert is_saved(run)


def test_a_terminal_that_goes_away_saves_the_step_in_hand(tmp_path):
    """As a dropped ssh: the terminal is gone, and SIGHUP comes from the shell and from the system."""
    run = tmp_path / "run"
    words = [*COMMAND, *words_of(run, max_steps=100_000)]
    child, terminal = pty.fork()
    if not child:
        os.execve(sys.executable, words, ENVIRONMENT)
    wait_for(lambda: lines_of(run) >= 5)
    os.close(terminal)
    os.kill(child, signal.SIGHUP)
    _child, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 130
    assert is_saved(run)


def test_what_nohup_started_goes_on(tmp_path):
    run = tmp_path / "run"
    work = subprocess.Popen(["nohup", *COMMAND, *words_of(run, max_steps=200)], env=ENVIRONMENT,
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    wait_for(lambda: lines_of(run) >= 5)
    work.send_signal(signal.SIGHUP)
    assert work.wait(timeout=60) == 0
    assert lines_of(run) == 200 + 2
