"""A signal asks the training to stop; the next one has its usual effect."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from lorasmith.training.interrupt import HANG_UP, stop_on_signal

SIGNALS = [number for number in (signal.SIGINT, signal.SIGTERM, HANG_UP) if number is not None]


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """The handlers that each test finds are there again after it."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_sets_the_request_and_is_announced(number):
    announced: list[str] = []
    before = signal.getsignal(number)
    with stop_on_signal(lambda: announced.append("stopping")) as request:
        assert not request.is_set
        os.kill(os.getpid(), number)
        assert request.is_set
        assert announced == ["stopping"]
    assert signal.getsignal(number) is before


def test_the_second_ctrl_c_interrupts_at_once():
    def twice() -> None:
        with stop_on_signal(lambda: None):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        twice()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.skipif(HANG_UP is None, reason="this system has no SIGHUP")
def test_a_terminal_that_goes_away_sends_sighup_twice():
    announced: list[str] = []
    signal.signal(HANG_UP, lambda *_args: pytest.fail("the second one had an effect"))
    with stop_on_signal(lambda: announced.append("stopping")) as request:
        os.kill(os.getpid(), HANG_UP)
        os.kill(os.getpid(), HANG_UP)
        assert request.is_set
    assert announced == ["stopping"]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_was_ignored_stays_ignored(number):
    signal.signal(number, signal.SIG_IGN)
    with stop_on_signal(lambda: pytest.fail("announced")) as request:
        os.kill(os.getpid(), number)
        assert not request.is_set
    assert signal.getsignal(number) is signal.SIG_IGN


def test_another_thread_handles_no_signals():
    before, inside = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with stop_on_signal(lambda: None) as request:
            inside.append((signal.getsignal(signal.SIGINT), request.is_set))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [(before, False)]
