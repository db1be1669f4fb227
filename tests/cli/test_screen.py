"""What people see: 80 and 120 columns wide, in a terminal and through a pipe."""

import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios

import pytest
from rich.cells import cell_len

from lorasmith.cli.screen import Screen, clock, number, printable

SHOW = """
from lorasmith.cli.screen import Screen
with Screen() as screen:
    screen.say("one [bold]two[/bold] " + "word " * 20)
    for step in range(1, 33):
        screen.progress("train", step, 32, loss=4.4 - step / 50, tokens_per_second=1203, seconds_left=75, memory_mib=9)
        if step == 16:
            screen.progress("held-out loss", 1, 2)
            screen.progress("held-out loss", 2, 2, loss=3.9)
    screen.curve([(i, 4.0 / i) for i in range(1, 33)], "loss")
    screen.side_by_side([("hi " * 60, "long reply " * 20, "good"), ("你好", "你好" * 40, "")], "before", "after")
"""


def in_terminal(code: str, columns: int, **env: str) -> str:
    """What a terminal of that width receives."""
    pid, terminal = pty.fork()
    if pid == 0:
        given = {**os.environ, "TERM": "xterm", **env}  # without the COLUMNS that readline set behind Python's back
        given.pop("COLUMNS", None)
        os.execve(sys.executable, [sys.executable, "-c", f"import sys; sys.stdin.readline()\n{code}"], given)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    os.write(terminal, b"\n")
    received = b""
    while True:
        try:
            received += os.read(terminal, 65536)
        except OSError:  # Linux says EIO when the other side has closed
            break
    assert os.waitpid(pid, 0)[1] == 0, received.decode()
    return received.decode()


def through_pipe(file: io.StringIO | None = None, **more: object) -> tuple[Screen, io.StringIO]:
    file = file or io.StringIO()
    return Screen(file=file, **more), file


@pytest.mark.parametrize("columns", [50, 80, 120])
def test_a_terminal_sees_bars_that_fit_and_one_line_that_stays(columns):
    seen = in_terminal(SHOW, columns)
    assert "━" in seen
    assert "\x1b[?25l" in seen
    assert seen.rindex("\x1b[?25h") > seen.rindex("\x1b[?25l")
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "\n", seen))
    assert max(map(cell_len, lines)) <= columns
    assert "…" not in seen  # what does not fit beside a bar is left out whole
    words = " ".join(" ".join(lines).split())  # a narrow terminal wraps a line that stays
    assert "train 32/32 loss 3.760 1,203 tokens/s 1:15 left 9 MiB" in words
    assert "held-out loss 2/2 loss 3.900" in words


def test_chinese_fits_a_narrow_terminal():
    chinese = SHOW.replace("word ", "留出损失，").replace('"train"', '"训练"').replace('loss")', '损失")')
    seen = in_terminal(chinese, 50, LORASMITH_LANG="zh")
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "\n", seen))
    assert max(map(cell_len, lines)) <= 50
    assert "…" not in seen
    assert "训练 32/32  损失 3.760" in seen
    assert "剩余 1:15" in seen
    assert "loss" not in seen.replace("held-out loss", "")


def test_plain_is_words_alone_one_fact_a_line():
    more = 'screen.table(["what", "loss"], [[["base", "3.1"]], [["a", "2.9"]]])\n'
    seen = in_terminal(SHOW + "    " + more, 80, LORASMITH_PLAIN="1").replace("\r", "")
    assert "\x1b" not in seen
    assert not re.search(r"[\u2500-\u259f\u2800-\u28ff]", seen)  # no boxes, blocks or dots
    lines = seen.splitlines()
    for line in ("loss: lowest 0.125 at step 32", "before: long reply " + "long reply " * 18 + "long reply",
                 "after: (empty)", "what: base", "loss: 3.1", "what: a", "loss: 2.9"):  # fmt: skip
        assert line in lines, line


def test_no_color_takes_the_colors():
    assert re.search(r"\x1b\[[39]\dm", in_terminal(SHOW, 80))
    assert not re.search(r"\x1b\[(\d+;)*[349]\d(;\d+)*m", in_terminal(SHOW, 80, NO_COLOR="1"))


def test_a_pipe_sees_plain_whole_lines(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    screen, file = through_pipe()
    with screen:
        screen.say("one [bold]two[/bold] :smile: " + "word " * 40)
        screen.warn("3 rows were cut")
        screen.curve([(step, 4.0 / step) for step in range(1, 33)], "loss")
        screen.side_by_side([("你好", "long reply " * 20, "")], "before", "after")
    lines = file.getvalue().splitlines()
    assert lines[:2] == ["one [bold]two[/bold] :smile: " + "word " * 40, "warning: 3 rows were cut"]
    assert "\x1b" not in file.getvalue()
    assert max(map(cell_len, lines[1:])) <= 80
    assert any("│ (empty)" in line for line in lines)


def test_a_pipe_sees_about_twenty_lines_of_a_long_task_and_the_last():
    now = [0.0]
    screen, file = through_pipe(clock=lambda: now[0])
    for step in range(1, 1001):
        now[0] += 1.0
        screen.progress("train", step, 1000, loss=1.0)
    assert len(file.getvalue().splitlines()) in range(80, 120)  # every ten seconds: slower than 5 % a line
    screen, file = through_pipe(clock=lambda: now[0])
    for step in range(1, 1001):
        now[0] += 0.1
        screen.progress("train", step, 1000, loss=1.0)
    lines = file.getvalue().splitlines()
    assert len(lines) in range(18, 24)
    assert lines[0].startswith("train 1/")
    assert lines[-1] == "train 1,000/1,000  loss 1.000"


def test_with_json_people_read_stderr(capsys):
    with Screen(json=True) as screen:
        screen.say("for people")
    assert capsys.readouterr() == ("", "for people\n")


def test_replies_cannot_steer_the_terminal():
    assert printable("a\x1b[2Jb\r\nc\td👩‍💻\x9b") == "a\ufffd[2Jb\nc\td👩‍💻\ufffd"


def test_clock():
    assert [clock(s) for s in (0, 7.4, 75, 3723)] == ["0:00", "0:07", "1:15", "1:02:03"]


def test_the_numbers_of_preferences_have_names():
    found = [number("rewards/accuracies", 0.8125), number("rewards/margins", 0.12345), number("loss", 0.5)]
    assert found == ["accuracy 81%", "margin +0.123", "loss 0.500"]
