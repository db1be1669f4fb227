"""Families that other tests do without: each loads and learns, or is refused in a sentence that says why."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lorasmith.config.lora import LoraConfig
from lorasmith.config.model import ModelConfig
from lorasmith.errors import ConfigError, ModelError
from lorasmith.loading.load import load_base
from lorasmith.lora.inject import inject
from lorasmith.lora.layer import LoRALayer
from lorasmith.model import untrained
from lorasmith.model.base import Base
from lorasmith.model.untrained import refuse_untrained
from lorasmith.model.verify import speed_up, trial_loss
from lorasmith.system.transformers_logging import quiet_transformers
from tests.support.families import adapted, one_linear, tiny_base
from tests.support.tiny import tokenizer

IDS = [5, 17, 60, 3, 8, 44, 92, 31, 9, 9, 12, 71, 4, 20, 6, 50]
_ENDS = {"pad_token_id": 0, "eos_token_id": 0, "bos_token_id": 0, "vocab_size": 300}
_SMALL = _ENDS | {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 4}
_MAMBA = _ENDS | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "ctrl": _ENDS | {"n_embd": 32, "dff": 48, "n_layer": 2, "n_head": 4, "n_positions": 64},  # writes into embeddings
    "llama4_text": _SMALL  # names itself as its decoder; its router is a Linear that returns a tuple
    | {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2}
    | {"no_rope_layers": [1, 0], "moe_layers": [1], "attention_chunk_size": 16},
    "modernbert-decoder": _SMALL | {"layer_types": ["full_attention", "sliding_attention"], "cls_token_id": 0},
    "falcon_mamba": _MAMBA,  # norms without parameters
    "mamba": _MAMBA,
    "mamba2": _MAMBA | {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16},  # looks at in_proj.weight
    "rembert": _SMALL | {"is_decoder": True, "input_embedding_size": 16, "output_embedding_size": 48},
    "phimoe": _SMALL | {"num_key_value_heads": 2, "num_local_experts": 4, "sliding_window": None},
    "reformer": _ENDS | {"is_decoder": True, "attn_layers": ["local"], "hidden_size": 32, "attention_head_size": 8}
    | {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8], "num_attention_heads": 4},
}  # fmt: skip


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """A tiny base of a family, read from a folder."""

    def loaded(family: str, dtype: str = "float32") -> Base:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **CONFIGS[family]))
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn_like(p) * 0.1 if p.dim() > 1 else p)
        with quiet_transformers():
            model.save_pretrained(tmp_path)
        tokenizer("llama").save_pretrained(tmp_path)
        return load_base(ModelConfig(model=str(tmp_path), dtype=dtype, device="cpu"))

    return loaded


def adapt(base: Base, **options: Any) -> None:
    base.adapters["a"] = inject(base.model, LoraConfig(r=2, **options), base.router, "a")
    refuse_untrained(base, "a", IDS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["ctrl", "llama4_text", "modernbert-decoder", "mamba2", "rembert", "phimoe"])
def test_all_linear_learns(family: str, dtype: str, load: Any) -> None:
    base = load(family, dtype)
    adapt(base)
    speed_up(base, "a", IDS)
    loss, _tokens = trial_loss(base, "a", IDS)
    loss.backward()
    grads = [p.grad for key, p in base.adapters["a"].parameters.items() if ".lora_B." in key and "experts" not in key]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)


def test_a_router_that_returns_a_tuple_is_no_target(load: Any) -> None:
    base = load("phimoe")
    adapt(base)
    router = base.model.get_submodule("model.layers.0.mlp.router")
    assert isinstance(router, torch.nn.Linear)
    assert not isinstance(router, LoRALayer)
    with pytest.raises(ConfigError, match=r"'router' matches model\.layers\.0\.mlp\.router, a \w+Router"):
        inject(base.model, LoraConfig(target_modules="router"), base.router, "b")


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba"])
def test_a_weight_that_the_model_takes_by_itself_is_refused_by_name(family: str, load: Any) -> None:
    base = load(family)
    kind = type(base.model).__name__
    with pytest.raises(ConfigError) as caught:
        adapt(base)
    assert str(caught.value) == (
        f"lora.target_modules: {kind} computes with the weight of dt_proj and never calls the module, so LoRA on it "
        "would change nothing. Leave it out: --exclude-modules dt_proj"
    )
    assert not any(
        p.requires_grad for p in base.model.get_submodule("backbone.layers.0.mixer.dt_proj").base_layer.parameters()
    )


def test_without_it_mamba_learns(load: Any) -> None:
    base = load("mamba")
    adapt(base, exclude_modules="dt_proj")
    speed_up(base, "a", IDS)


def test_a_copy_of_such_a_module_is_refused_too(load: Any) -> None:
    base = load("mamba")
    with pytest.raises(
        ConfigError, match=r"lora\.modules_to_save: MambaForCausalLM computes with the weight of dt_proj"
    ):
        adapt(base, target_modules="in_proj", modules_to_save=("dt_proj",))


def test_a_model_that_cannot_read_a_short_text_is_refused(load: Any) -> None:
    with pytest.raises(ModelError) as caught:
        load("reformer")
    text = str(caught.value)
    assert "ReformerModelWithLMHead cannot be used as a language model of plain text" in text
    assert "axial_pos_shape" in text


def test_a_model_that_fails_with_an_adapter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = adapted("llama", target_modules="q_proj")
    base.adapters["default"] = adapter

    def fail(*_args: Any) -> None:
        raise AttributeError("no such thing")

    monkeypatch.setattr(untrained, "trial_loss", fail)
    with pytest.raises(
        ModelError, match=r"a training step with LoRA on q_proj fails in this model \(AttributeError: no such"
    ):
        refuse_untrained(base, "default", IDS)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_the_trial_leaves_everything_as_it_was(family: str) -> None:
    base = tiny_base(family)
    base.adapters["a"] = inject(base.model, LoraConfig(r=2, lora_dropout=0.5), base.router, "a")
    before, fast, state = copy.deepcopy(base.model.state_dict()), base.fast, torch.get_rng_state()
    refuse_untrained(base, "a", IDS)
    assert base.fast == fast
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(base.model.state_dict()[key], value) for key, value in before.items())
    assert one_linear(family) in {key.split(".")[-3] for key in base.adapters["a"].parameters}
