"""lorasmith chat: commands, memory, a stopped reply; at a terminal and through a pipe."""

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from lorasmith.adapters.session import open_adapters
from lorasmith.cli.chat import COMMANDS, Chat
from lorasmith.cli.main import main
from lorasmith.cli.screen import Screen
from lorasmith.config.model import ModelConfig
from lorasmith.data.rows.conversation import Message
from lorasmith.engine.request import Event
from lorasmith.errors import DataError


class Echo:
    """Answers who was asked and how much it was told; keeps what it was asked."""

    def __init__(self, finish: str = "stop", during: Callable[[], None] = lambda: None) -> None:
        self.asked: list[tuple[str | None, list[str]]] = []
        self.finish, self.during = finish, during

    def __call__(self, messages: Sequence[Message], adapter: str | None) -> Iterator[Event]:
        self.asked.append((adapter, [message.content for message in messages]))
        if messages[-1].content == "too long":
            raise DataError("the prompt is too long")
        return self._events(f"{adapter} {len(messages)}".split())

    def _events(self, words: list[str]) -> Iterator[Event]:
        for i, word in enumerate(words):
            self.during()
            yield Event(0, i, f"{word} ", None)
        yield Event(0, 9, "", self.finish)  # type: ignore[arg-type]


def talk(monkeypatch, lines: Sequence[str], echo: Echo, system: str | None = None, tty: bool = False) -> str:
    """What is said besides the answers."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    if tty:
        monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    said = io.StringIO()
    Chat(echo, ["loud", "calm"], system, Screen(file=said)).talk()
    return said.getvalue()


def test_a_pipe_gets_answers_alone(monkeypatch, capsys):
    echo = Echo()
    assert talk(monkeypatch, ["hi", "", "  who?  "], echo) == ""
    assert capsys.readouterr().out == "loud 1 \nloud 3 \n"
    assert echo.asked[1] == ("loud", ["hi", "loud 1 ", "who?"])


def test_system_text_stands_first_and_outlives_a_reset(monkeypatch):
    echo = Echo()
    said = talk(monkeypatch, ["hi", "/reset", "ho"], echo, system="be kind")
    assert [asked for _who, asked in echo.asked] == [["be kind", "hi"], ["be kind", "ho"]]
    assert "Conversation cleared." in said


def test_switching_keeps_the_conversation(monkeypatch):
    echo = Echo()
    said = talk(monkeypatch, ["hi", "/adapter calm", "ho", "/base", "/again"], echo)
    assert [who for who, _asked in echo.asked] == ["loud", "calm", None]
    assert echo.asked[2][1] == echo.asked[1][1] == ["hi", "loud 1 ", "ho"]
    assert "Now chatting with calm." in said
    assert "Now chatting with the base model." in said


def test_commands_that_go_wrong_say_what_there_is(monkeypatch):
    echo = Echo()
    said = talk(monkeypatch, ["/adapter", "/adapter lout", "/bass", "/again", "/help", "//x"], echo)
    assert "Available adapters: loud, calm.\n" in said
    assert "Did you mean 'loud'?" in said
    assert "Unknown command /bass. Did you mean '/base'?" in said
    assert "There is no message to answer again yet." in said
    assert all(command in said for command in COMMANDS)
    assert [asked for _who, asked in echo.asked] == [["/x"]]


@pytest.mark.parametrize("word", ["/exit", "/quit"])
def test_leaves(monkeypatch, word):
    echo = Echo()
    talk(monkeypatch, [word, "hi"], echo)
    assert echo.asked == []


def test_a_problem_ends_a_pipe_but_not_a_talk(monkeypatch):
    with pytest.raises(DataError):
        talk(monkeypatch, ["too long", "hi"], Echo())
    echo = Echo()
    said = talk(monkeypatch, ["too long", "hi"], echo, tty=True)
    assert "warning: the prompt is too long" in said
    assert echo.asked[-1] == ("loud", ["hi"])  # what could not be answered is forgotten


def test_a_reply_that_was_cut_says_so(monkeypatch):
    assert "--max-new-tokens" in talk(monkeypatch, ["hi"], Echo("length"), tty=True)
    assert talk(monkeypatch, ["hi"], Echo("length")) == ""


def test_ctrl_c_keeps_what_was_said_and_goes_on(monkeypatch, capsys):
    echo = Echo(during=lambda: os.kill(os.getpid(), signal.SIGINT))
    before = signal.getsignal(signal.SIGINT)
    talk(monkeypatch, ["hi", "go on"], echo, tty=True)
    assert [asked for _who, asked in echo.asked] == [["hi"], ["hi", "loud ", "go on"]]
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_in_a_pipe_ends_the_program(monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        talk(monkeypatch, ["hi"], Echo(during=lambda: os.kill(os.getpid(), signal.SIGINT)))


def test_a_model_through_a_pipe(talkers: tuple[Path, Path], monkeypatch, capsys):
    session = open_adapters(talkers, ModelConfig(dtype="float32", device="cpu"))
    one, other = (session.generate("hi", name, max_new_tokens=6) for name in session.names)
    assert session.names == ["loud", "calm"]
    assert one != other
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n/reset\n/adapter calm\nhi\n"))
    words = ["--max-new-tokens", "6", "--dtype", "float32", "--device", "cpu"]
    assert main(["chat", *map(str, talkers), *words]) == 0
    assert capsys.readouterr().out == f"{one}\n{other}\n"


def test_a_model_at_a_terminal(talkers: tuple[Path, Path]):
    """A long reply, Ctrl-C, a line given up, a command, Ctrl-D."""
    ours, theirs = pty.openpty()
    code = "import sys; from lorasmith.cli.main import main; sys.exit(main(sys.argv[1:]))"
    words = ["chat", str(talkers[0]), "--max-new-tokens", "100000", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TERM": "dumb"}, preexec_fn=_own_terminal,
    )  # fmt: skip
    os.close(theirs)
    try:
        terminal = Terminal(ours)
        terminal.wait(r"Chatting with loud\..*?\n> ")
        terminal.write("hi\r")
        terminal.wait(r"hi\r\n.{3}")  # the reply has begun; nothing but Ctrl-C ends it
        terminal.write("\x03")
        terminal.wait(r"\n> ")
        terminal.write("given up")
        terminal.wait("given up")
        time.sleep(0.2)  # Python's readline misses a signal that comes while it goes to sleep
        terminal.write("\x03")
        terminal.wait(r"\n> ")
        terminal.write("/base\r")
        terminal.wait(r"Now chatting with the base model.*?\n> ")
        terminal.write("\x04")
        assert process.wait(20) == 0
    finally:
        process.kill()
        os.close(ours)


def _own_terminal() -> None:
    """The child's standard input becomes its controlling terminal, so that Ctrl-C reaches it as a signal."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Terminal:
    """What a terminal shows, read up to where a pattern was found."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self.unread = descriptor, ""

    def write(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def wait(self, pattern: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.unread, re.DOTALL)):
            ready, _, _ = select.select([self.descriptor], [], [], max(end - time.monotonic(), 0))
            assert ready, f"no {pattern!r} in {self.unread!r}"
            self.unread += os.read(self.descriptor, 4096).decode("utf-8", "replace")
        self.unread = self.unread[found.end() :]
