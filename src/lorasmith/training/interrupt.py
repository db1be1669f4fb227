"""Ctrl-C as a wish: the step in hand is finished and saved. A second one leaves at once."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

HANG_UP = getattr(signal, "SIGHUP", None)  # the terminal, or the connection to it, is gone; Windows has none


class Wish:
    """Whether somebody asked to stop."""

    def __init__(self) -> None:
        self.came = False


@contextmanager
def deferred(answer: Callable[[], None]) -> Iterator[Wish]:
    """Within it, the first SIGINT, SIGTERM or SIGHUP sets the wish and calls `answer`; the next does as always.

    But SIGHUP, which shell and system both send when a terminal goes, counts once. A signal that the program was
    started to ignore, as with nohup, stays ignored.
    """
    wish = Wish()
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield wish
        return
    signals = [number for number in (signal.SIGINT, signal.SIGTERM, HANG_UP) if number is not None]
    before = {number: signal.getsignal(number) for number in signals}
    heard = [number for number in signals if before[number] is not signal.SIG_IGN]

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        wish.came = True
        for each in heard:
            signal.signal(each, signal.SIG_IGN if each == HANG_UP else before[each])
        answer()

    for number in heard:
        signal.signal(number, on_signal)
    try:
        yield wish
    finally:
        for number in heard:
            signal.signal(number, before[number])
