"""The search for cycles rests, and is on again whatever happens."""

import gc

import pytest

from lorasmith.system.gc_pause import gc_paused


def test_it_rests_and_is_on_again_after_an_error() -> None:
    assert gc.isenabled()

    def load() -> None:
        with gc_paused():
            assert not gc.isenabled()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load()
    assert gc.isenabled()


def test_the_last_of_several_puts_back_what_the_first_found() -> None:
    first, second = gc_paused(), gc_paused()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not gc.isenabled()
    second.__exit__(None, None, None)
    assert gc.isenabled()


def test_where_it_was_off_it_stays_off() -> None:
    gc.disable()
    try:
        with gc_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
