"""Graceful stop on Ctrl-C: the current step is finished and saved. A second Ctrl-C stops at once."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

HANG_UP = getattr(signal, "SIGHUP", None)  # the terminal or the connection to it is gone; does not exist on Windows


class StopRequest:
    """Whether a signal has asked the training to stop."""

    def __init__(self) -> None:
        self.is_set = False


@contextmanager
def stop_on_signal(announce: Callable[[], None]) -> Iterator[StopRequest]:
    """A context in which the first SIGINT, SIGTERM or SIGHUP sets the stop request and calls `announce`.

    Further signals have their usual effect, except SIGHUP, which is ignored from then on: both the shell and the
    system send it when a terminal closes. A signal that was ignored when the program started, as with nohup, stays
    ignored. Outside the main thread, which alone can handle signals, the request is never set.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    signals = [number for number in (signal.SIGINT, signal.SIGTERM, HANG_UP) if number is not None]
    before = {number: signal.getsignal(number) for number in signals}
    handled = [number for number in signals if before[number] is not signal.SIG_IGN]

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        request.is_set = True
        for each in handled:
            signal.signal(each, signal.SIG_IGN if each == HANG_UP else before[each])
        announce()

    for number in handled:
        signal.signal(number, on_signal)
    try:
        yield request
    finally:
        for number in handled:
            signal.signal(number, before[number])
