"""Adapters that are switched layer by layer."""

import pytest

from lorasmith.errors import AdapterError
from lorasmith.lora.one_by_one import OneByOne


def test_it_is_done_once_all_layers_have_been_asked_for_the_same() -> None:
    one_by_one = OneByOne()
    one_by_one.check()
    assert not one_by_one.ask("a", "x", False, ["a", "b"])
    with pytest.raises(AdapterError, match="1 of 2 layers have been switched, and all must be, to the same adapters"):
        one_by_one.check()
    assert not one_by_one.ask("b", "y", False, ["a", "b"])
    assert not one_by_one.ask("b", "x", True, ["a", "b"])
    assert one_by_one.ask("b", ["x"], False, ["a", "b"])
