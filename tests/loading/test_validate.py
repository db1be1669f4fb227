"""Configs and weights that do not fit are named by file and key."""

from pathlib import Path

import pytest
import torch

from lorasmith.errors import ModelError
from lorasmith.loading import validate
from lorasmith.loading.validate import load_error
from tests.support.model_folders import configure, load, said, spoil


def test_an_unknown_architecture(folder: Path) -> None:
    configure(folder, model_type="nextyear")
    assert said(folder).startswith("MODEL: transformers does not support this model: ")


def test_an_architecture_that_is_no_causal_model(folder: Path) -> None:
    configure(folder, model_type="vit")
    assert said(folder).startswith("MODEL: transformers cannot load this model: ")


def test_weights_of_another_shape(folder: Path) -> None:
    spoil(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))
    assert said(folder) == (
        "MODEL/model.safetensors: model.norm.weight has the shape (31,); a model with this config.json needs (32,)."
    )


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"hidden_size": "big"}, "Field 'hidden_size' expected int, got str (value: 'big')."),
        ({"rms_norm_eps": "x"}, "Field 'rms_norm_eps' expected float, got str (value: 'x')."),
        ({"num_attention_heads": 5}, "its values are inconsistent: The hidden size (32) is not a multiple of"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; it must be a whole number of at least 1."),
        ({"dtype": "floaty"}, 'dtype is "floaty"; it must be a torch dtype, such as "bfloat16".'),
        ({"hidden_act": "foo"}, 'hidden_act is "foo", which this version of transformers does not know.'),
        ({"rope_scaling": {"type": "foo"}}, 'rope_scaling.type is "foo", which this version of transformers does not'),
        (
            {"attn_implementation": "flash_attention_2"},
            "attn_implementation requires a package that cannot be imported",
        ),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "the weights are quantized with gptq, on which lorasmith cannot train. Use the unquantized model; "
            "--quantize nf4 saves as much memory.",
        ),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "are quantized with awq, on which lorasmith"),
        ({"quantization_config": {"quant_method": "fp8"}}, "are quantized with fp8, on which lorasmith cannot train."),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "quantized with compressed-tensors, on"),
        ({"quantization_config": "yes"}, 'quantization_config is "yes"; it must be an object whose quant_method'),
        ({"quantization_config": {"quant_method": "mine"}}, "it must be an object whose quant_method is one that"),
    ],
)
def test_a_wrong_value_in_the_config_is_named(folder: Path, keys: dict[str, object], words: str) -> None:
    configure(folder, **keys)
    problem = said(folder)
    assert problem.startswith("MODEL/config.json: ")
    assert words in problem


@pytest.mark.parametrize("mark", [{"load_in_8bit": True}, {"quant_method": "bitsandbytes", "load_in_4bit": True}])
def test_the_packages_for_quantized_weights_are_named(
    folder: Path, mark: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(folder, quantization_config=mark)
    monkeypatch.setattr(validate, "find_spec", lambda _name: None)
    assert said(folder) == (
        "MODEL/config.json: the weights are quantized (bitsandbytes), and loading them requires bitsandbytes, "
        "accelerate. Install it with: pip install bitsandbytes accelerate. Or use the unquantized model."
    )


def test_sizes_that_the_weights_do_not_have_are_named(folder: Path) -> None:
    configure(folder, vocab_size=100)
    with pytest.raises(ModelError) as caught:
        load(folder)
    assert caught.value.problems[0] == (
        f"{folder}/model.safetensors: lm_head.weight has the shape (300, 32); "
        "a model with this config.json needs (100, 32)."
    )


def test_fewer_layers_than_the_weights_hold(folder: Path) -> None:
    configure(folder, num_hidden_layers=1)
    assert said(folder) == (
        "MODEL: its weights contain 2 layers (model.layers.1.input_layernorm.weight), but its config.json specifies 1. "
        "Use the config.json that belongs to these weights."
    )


def test_a_bias_that_the_config_says_nothing_of(folder: Path) -> None:
    spoil(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}))
    assert said(folder) == (
        "MODEL: its weights contain model.layers.0.self_attn.q_proj.bias, which a model with this config.json does not "
        "have. Use the config.json that belongs to these weights."
    )


def test_parts_of_which_transformers_knows_nothing_are_left_out(folder: Path) -> None:
    """An encoder for images beside a language model, or a layer with parts of its own that predicts another token."""
    more = {"vision.layers.0.weight": torch.ones(2, 2), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    more |= {"model.layers.2.eh_proj.weight": torch.ones(2, 2), "model.layers.2.mlp.up_proj.weight": torch.ones(2, 2)}
    spoil(folder, lambda tensors: tensors.update(more))
    assert load(folder).layout == "packed"


def test_quantized_weights_that_this_machine_cannot_load(folder: Path) -> None:
    configure(folder, quantization_config={"quant_method": "mxfp4"})
    assert str(load_error(folder, RuntimeError("No GPU found."))) == (
        f"{folder}/config.json: the weights are quantized (mxfp4) and cannot be loaded on this machine: No GPU found. "
        "Use the unquantized model."
    )
