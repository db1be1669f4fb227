"""The layers and parameters of an adapter in a model, which PEFT's names tell too."""

import torch

import lorasmith.peft as ours
from lorasmith.lora.adapted import cast_to_base, layers_of, linear_layers, parameters_of, rank_in, set_trained
from tests.support.peft_pair import base, two


def test_layers_and_parameters_are_those_of_the_adapter() -> None:
    model = two(ours)
    assert len(dict(layers_of(model))) == 6
    assert len(dict(layers_of(model, "second"))) == 4
    assert {rank_in(layer, "first") for _path, layer in layers_of(model, "first")} == {4}
    keys = {key for key, _p, _dtype in parameters_of(model, "first")}
    assert keys == {key for key in model.state_dict() if ".first." in key}


def test_an_embedding_is_no_linear_layer() -> None:
    model = ours.get_peft_model(base(), ours.LoraConfig(target_modules=["embed_tokens", "q_proj"], r=3))
    assert [path.rpartition(".")[2] for path in linear_layers(model, "default")] == ["q_proj", "q_proj"]
    assert {rank_in(layer, "default") for _path, layer in layers_of(model)} == {3}


def test_b_of_mica_stays_frozen() -> None:
    model = two(ours)
    set_trained(model, "first", True, is_mica=True)
    assert {key for key, p, _dtype in parameters_of(model, "first") if p.requires_grad} == {
        key for key in model.state_dict() if "lora_A.first" in key
    }
    set_trained(model, "first", False, is_mica=False)
    assert not any(p.requires_grad for _key, p, _dtype in parameters_of(model, "first"))


def test_parameters_are_cast_to_the_dtype_of_the_base() -> None:
    model = ours.get_peft_model(base(dtype=torch.bfloat16), ours.LoraConfig(target_modules=["q_proj"]))
    assert {p.dtype for _key, p, _dtype in parameters_of(model, "default")} == {torch.float32}
    cast_to_base(model, "default")
    assert {p.dtype for _key, p, _dtype in parameters_of(model, "default")} == {torch.bfloat16}
