"""Ctrl-C as a wish: the step in hand is finished and saved. A second one leaves at once."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Wish:
    """Whether somebody asked to stop."""

    def __init__(self) -> None:
        self.came = False


@contextmanager
def deferred(answer: Callable[[], None]) -> Iterator[Wish]:
    """Within it, the first SIGINT or SIGTERM sets the wish and calls `answer`; the next one does what it always did."""
    wish = Wish()
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield wish
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in signals}

    def on_signal(number: int, _frame: FrameType | None) -> None:
        wish.came = True
        for each in signals:
            signal.signal(each, before[each])
        answer()

    for number in signals:
        signal.signal(number, on_signal)
    try:
        yield wish
    finally:
        for number in signals:
            signal.signal(number, before[number])
