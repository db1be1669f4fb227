"""Standard output and error where nobody reads them: closed, a pipe whose reader left, a full disk, a lost terminal."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO, cast


def open_closed() -> None:
    """What was closed with `>&-` leads nowhere: else the first file that is opened would get its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False))


@contextmanager
def outliving_readers() -> Iterator[None]:
    """Within it, what cannot be written is lost without an error: the work matters, not who watches it."""
    with redirect_stdout(_sink(sys.stdout)), redirect_stderr(_sink(sys.stderr)):
        yield


def silence_unread() -> None:
    """What is still to be written leads nowhere where it cannot be: Python would complain while it leaves."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            _to_nowhere(stream)


def _to_nowhere(stream: TextIO) -> None:
    with suppress(OSError):  # it has no number: a stream of another program, in whose process we are
        number = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)


class _Sink:
    """A stream that takes everything."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            _to_nowhere(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            _to_nowhere(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _sink(stream: TextIO) -> TextIO:
    return cast(TextIO, _Sink(stream))
