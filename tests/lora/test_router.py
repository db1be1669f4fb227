"""Which adapter a token uses."""

import pytest

from lorasmith.lora.router import Router, Slice


def test_without_slices_every_token_uses_the_active_adapter() -> None:
    router = Router()
    assert router.slices_of(7) == (Slice(None, 0, 7),)
    router.active = "a"
    assert router.slices_of(7) == (Slice("a", 0, 7),)
    router.route([("b", 0, 7)])
    assert router.slices_of(3) == (Slice("b", 0, 3),)  # part of the batch, since one adapter is used for all of it
    router.route(None)
    assert router.slices_of(7) == (Slice("a", 0, 7),)


def test_slices_hold_for_one_size_and_each_route_is_a_turn() -> None:
    router = Router()
    router.route([("a", 0, 3), (None, 3, 5)], stacked=True)
    assert router.slices_of(5) == (Slice("a", 0, 3), Slice(None, 3, 5))
    assert (router.stacked, router.turn) == (True, 1)
    with pytest.raises(AssertionError, match="routed for 5 tokens, called with 4"):
        router.slices_of(4)
    router.route(None)
    assert (router.slices, router.stacked, router.turn) == (None, False, 2)


def test_several_active_adapters_pass_one_after_the_other() -> None:
    router = Router()
    router.activate(["a", "b"])
    assert router.passes(7) == ((Slice("a", 0, 7),), (Slice("b", 0, 7),))
    with pytest.raises(AssertionError, match="several adapters are active"):
        router.slices_of(7)  # what knows of one adapter for each token alone
    router.route([("c", 0, 7)])
    assert router.passes(7) == (router.slices_of(7),)  # slices come first
    router.route(None)
    turn = router.turn
    router.activate(["b"])
    assert (router.passes(7), router.turn) == (((Slice("b", 0, 7),),), turn + 1)
    router.activate([])
    assert router.passes(7) == ((Slice(None, 0, 7),),)
