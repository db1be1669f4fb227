"""Standard streams that are closed or cannot be written: a broken pipe, a full disk, a terminal that is gone."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO, cast


def reopen_closed_streams() -> None:
    """Connect standard streams that were closed, as with `>&-`, to the null device.

    Otherwise the next file to be opened would get the descriptor of a standard stream.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False))


@contextmanager
def ignoring_write_errors() -> Iterator[None]:
    """A context in which output that cannot be written is dropped without an error."""
    with redirect_stdout(_sink(sys.stdout)), redirect_stderr(_sink(sys.stderr)):
        yield


def discard_unwritable_output() -> None:
    """Drop buffered output that cannot be written, about which Python would complain at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            _connect_to_null(stream)


def _connect_to_null(stream: TextIO) -> None:
    """Connect the stream's descriptor to the null device."""
    with suppress(OSError):  # a replaced stream, as in a test or a notebook, has no descriptor
        number = stream.fileno()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, number)
        os.close(null)


class _Sink:
    """A stream that drops what the stream behind it cannot write."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            _connect_to_null(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            _connect_to_null(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _sink(stream: TextIO) -> TextIO:
    return cast(TextIO, _Sink(stream))
