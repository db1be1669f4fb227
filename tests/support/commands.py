"""Commands as they are typed: exit code, what people read, and the line that programs read."""

import json
import subprocess
import sys

import pytest

from lorasmith.cli.main import main

Capture = pytest.CaptureFixture[str]
COMMAND = [sys.executable, "-c", "import sys; from lorasmith.cli.main import main; sys.exit(main(sys.argv[1:]))"]


def said(capsys: Capture, *argv: object) -> str:
    """What people read of a verb that succeeds."""
    assert main([str(word) for word in argv]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def as_json(capsys: Capture, *argv: object) -> dict[str, object]:
    """The one line on stdout; what people read is on stderr then."""
    assert main([*map(str, argv), "--json"]) == 0
    out, err = capsys.readouterr()
    assert err
    (line,) = out.splitlines()
    found: dict[str, object] = json.loads(line)
    return found


def server_process(*words: str) -> tuple[subprocess.Popen[str], str]:
    """A server as a process of its own, once it serves, and what it has shown until then."""
    program = subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert program.stdout is not None
    shown = ""
    while "curl" not in shown:
        line = program.stdout.readline()
        assert line, shown
        shown += line
    return program, shown


def refused(capsys: Capture, *argv: object) -> str:
    """The one sentence of a verb that the user can fix."""
    assert main([str(word) for word in argv]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1, err
    assert "Traceback" not in out + err
    return err.removeprefix("error: ").strip()
