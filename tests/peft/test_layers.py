"""What PEFT's functions and TRL ask of a layer."""

import copy

from peft.tuners.tuners_utils import BaseTunerLayer

import lorasmith.peft as ours
from lorasmith.peft.layers import layers_of, parameters_of
from tests.support.peft_pair import two


def test_layers_are_layers_of_peft_to_those_who_ask() -> None:
    model = two(ours)
    layers = dict(layers_of(model))
    assert len(layers) == 6
    assert len(dict(layers_of(model, "second"))) == 4
    assert all(isinstance(layer, BaseTunerLayer) for layer in layers.values())
    keys = {key for key, _p, _dtype in parameters_of(model, "first")}
    assert keys == {key for key in model.state_dict() if ".first." in key}


def test_a_copied_layer_tells_of_its_own_adapters() -> None:
    model = two(ours)
    twin = copy.deepcopy(model)
    twin.delete_adapter("second")
    assert twin.get_model_status().available_adapters == ["first"]
    assert model.get_model_status().available_adapters == ["first", "second"]
