"""Keys of other tools: read where one module only can be meant, else refused with what was found."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasmith.adapters.folder import AdapterFolder
from lorasmith.errors import AdapterError
from lorasmith.lora.adapter_keys import peft_keys
from lorasmith.lora.files import ADAPTER_WEIGHTS, save_adapter
from lorasmith.lora.inject import module_paths
from tests.support.families import adapted, embedding, logits_of, one_linear, tiny, tiny_base

P = "base_model.model."
PATHS = ["", "model", "model.layers", "model.layers.0", "model.layers.0.q_proj", "model.norm", "lm_head"]
Q = "base_model.model.model.layers.0.q_proj.lora_A.weight"


def keys(*given: str, paths: list[str] = PATHS, prefix: str = "model") -> list[str]:
    return list(peft_keys(dict.fromkeys(given, torch.zeros(1)), paths, prefix))


@pytest.mark.parametrize(
    "key",
    [
        Q,
        "base_model.model.model.layers.0.q_proj.lora_A.default.weight",
        "base_model.model.model.layers.0.q_proj.lora_A.weight.weight",  # an adapter that is called weight
        "model.layers.0.q_proj.lora_A.weight",
        "layers.0.q_proj.lora_A.weight",
        "base_model.model.layers.0.q_proj.lora_A.weight",  # of the model without its head: PEFT issue 1579
        "base_model.model.base_model.model.model.layers.0.q_proj.lora_A.weight",
        "base_model.model.model.model.layers.0.q_proj.lora_A.weight",
        "base_model.model.model.language_model.layers.0.q_proj.lora_A.weight",  # Qwen3.5, trained with its images part
        "base_model.model.language_model.model.layers.0.q_proj.lora_A.weight",
        "module.base_model.model.model.layers.0.q_proj.lora_A.default.weight",
        "base_model.model._orig_mod.model.layers.0.q_proj.lora_A.weight",
        "_orig_mod.base_model.model.model.layers.0._checkpoint_wrapped_module.q_proj.lora_A.default.weight",
        "_fsdp_wrapped_module.base_model.model.model.layers.0._fsdp_wrapped_module.q_proj.lora_A.weight",
    ],
)
def test_one_module_in_many_spellings(key: str) -> None:
    assert keys(key) == [Q]


@pytest.mark.parametrize(
    ("part", "plain"),
    [
        ("lora_B.mine.weight", "lora_B.weight"),
        ("lora_B.mine.bias", "lora_B.bias"),
        ("lora_B.bias", "lora_B.bias"),
        ("lora_embedding_A.mine", "lora_embedding_A"),
        ("lora_embedding_B", "lora_embedding_B"),
        ("lora_magnitude_vector", "lora_magnitude_vector"),
        ("lora_magnitude_vector.weight", "lora_magnitude_vector"),
        ("lora_magnitude_vector.mine", "lora_magnitude_vector"),
        ("lora_magnitude_vector.mine.weight", "lora_magnitude_vector"),
        ("modules_to_save.mine.weight", "weight"),
        ("modules_to_save.mine.up_proj.weight", "up_proj.weight"),
        ("modules_to_save.weight", "modules_to_save.weight"),
        ("token_adapter.trainable_tokens_delta.mine", "token_adapter.trainable_tokens_delta"),
        ("token_adapter.base_layer.weight", "token_adapter.base_layer.weight"),
        ("original_module.weight", "original_module.weight"),
        ("base_layer.weight", "base_layer.weight"),
        ("base_layer.lora_A.mine.weight", "base_layer.lora_A.weight"),
    ],
)
def test_the_name_of_the_adapter_is_left_out(part: str, plain: str) -> None:
    assert keys(f"model.layers.0.q_proj.{part}") == [f"{P}model.layers.0.q_proj.{plain}"]


def test_what_this_model_lacks_stays_as_it_is() -> None:
    given = ["model.layers.7.q_proj.lora_A.default.weight", "rotary.inv_freq", "weight", ""]
    assert keys(Q, *given) == [Q, *given]


def test_a_whole_module_without_prefix() -> None:
    assert keys("model.norm.weight", "norm.bias", "lm_head.weight") == [
        P + "model.norm.weight", P + "model.norm.bias", P + "lm_head.weight",
    ]  # fmt: skip


def test_several_modules_that_may_be_meant_are_named() -> None:
    paths = ["model.language_model.layers.0.q", "text_model.layers.0.q", "vision.layers.0.q"]
    with pytest.raises(AdapterError) as caught:
        keys("layers.0.q.lora_A.weight", "vision.layers.0.q.lora_A.weight", paths=paths)
    assert str(caught.value) == (
        "layers.0.q.lora_A.weight can mean model.language_model.layers.0.q, text_model.layers.0.q in this model."
    )
    assert keys("text_model.layers.0.q.lora_A.weight", paths=paths) == [P + "text_model.layers.0.q.lora_A.weight"]


def test_two_keys_of_one_tensor_and_two_adapters_are_refused() -> None:
    with pytest.raises(AdapterError, match=r"q_proj\.lora_A\.weight are the same tensor of this model"):
        keys(Q, "layers.0.q_proj.lora_A.weight")
    with pytest.raises(AdapterError, match=r"several adapters \(a, b\)\. Save each of them in a folder of its own"):
        keys("model.layers.0.q_proj.lora_A.a.weight", "model.layers.0.q_proj.lora_A.b.weight")


def test_the_loader_names_the_file(folder: Path) -> None:
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    save_file(tensors | {"layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 32)}, folder / ADAPTER_WEIGHTS)
    with pytest.raises(AdapterError) as caught:
        AdapterFolder.read(folder).load_into(tiny_base("llama"), "default")
    assert str(caught.value).startswith(f"{folder / ADAPTER_WEIGHTS}: ")
    assert str(caught.value).endswith("are the same tensor of this model.")


def named(key: str) -> str:
    """The key with the name of an adapter, as in the state dict of PEFT's model."""
    for part in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"):
        key = key.replace(f".{part}", f".{part}.default")
    return key.replace("lm_head.weight", "lm_head.modules_to_save.default.weight")


SPELLINGS: dict[str, Callable[[str], str]] = {
    "plain": lambda key: key,
    "with the name of the adapter": named,
    "without prefix": lambda key: key.removeprefix(P),
    "compiled": lambda key: key.replace(P, P + "_orig_mod."),
    "in DDP": lambda key: "module." + named(key),
    "of the decoder alone": lambda key: key if "lm_head" in key else P + key.removeprefix(P).partition(".")[2],
    "one level more": lambda key: P + "model." + key.removeprefix(P),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_each_spelling_loads_equal(family: str, spelling: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "target_modules": (one_linear(family), embedding(family)),
        "modules_to_save": ("lm_head",),
    }
    base, adapter = adapted(family, **options)
    save_adapter(adapter, base.model, tmp_path, "")
    tensors = load_file(tmp_path / ADAPTER_WEIGHTS)
    save_file({SPELLINGS[spelling](key): t for key, t in tensors.items()}, tmp_path / ADAPTER_WEIGHTS)
    again = tiny_base(family)
    AdapterFolder.read(tmp_path).load_into(again, "default")
    assert torch.equal(logits_of(again), logits_of(base))


@pytest.mark.parametrize("dora", [False, True])
def test_the_state_dict_of_pefts_model_loads_equal(dora: bool, tmp_path: Path) -> None:
    """All of it, with the weights of the base model: what torch.save(model.state_dict()) writes."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"], use_dora=dora)
    theirs = peft.get_peft_model(tiny("llama"), config).eval()
    for p in theirs.parameters():
        if p.requires_grad:
            p.data += torch.randn(p.shape, dtype=p.dtype) * 0.2
    theirs.save_pretrained(tmp_path)
    state = {key: tensor.clone() for key, tensor in theirs.state_dict().items()}
    save_file(state, tmp_path / ADAPTER_WEIGHTS)
    base = tiny_base("llama")
    AdapterFolder.read(tmp_path).load_into(base, "default")
    assert torch.allclose(logits_of(base), logits_of(theirs), rtol=0, atol=1e-6)


def test_the_paths_are_those_of_the_model_without_adapters() -> None:
    base, _adapter = adapted("llama", target_modules=("q_proj",), modules_to_save=("lm_head",))
    assert module_paths(base.model) == [path for path, _module in tiny("llama").named_modules()]
