"""Law 9: every option of LoRA changes something. And what is no option, or a wrong one, is refused."""

import hashlib
from typing import Any

import pytest
import torch

from lorasmith.config.lora import LoraConfig
from lorasmith.errors import ConfigError
from lorasmith.lora.inject import inject
from lorasmith.lora.merge import merged_weights
from lorasmith.model.forward import row_of
from lorasmith.model.head import loss_sum
from tests.support.families import examples, stir, tiny_base

CASES: dict[str, dict[str, Any]] = {
    "r": {"r": 3},
    "lora_alpha": {"lora_alpha": 5.0},
    "lora_dropout": {"lora_dropout": 0.5},
    "target_modules": {"target_modules": ("q_proj", "fc1")},
    "target_parameters": {"target_parameters": ("embed_positions.weight",)},
    "exclude_modules": {"exclude_modules": ("fc1",)},
    "layers_to_transform": {"layers_to_transform": (1,)},
    "last_layers": {"last_layers": 1},
    "rank_pattern": {"rank_pattern": {"fc1": 3}},
    "alpha_pattern": {"alpha_pattern": {"fc1": 3.0}},
    "modules_to_save": {"modules_to_save": ("lm_head",)},
    "bias": {"bias": "lora_only"},
    "use_rslora": {"use_rslora": True},
    "use_dora": {"use_dora": True},
    "init_lora_weights": {"init_lora_weights": "gaussian"},
    "lora_bias": {"lora_bias": True},
    "alora_invocation_tokens": {"alora_invocation_tokens": tuple(examples()[3].ids[4:6])},
}


def outcome(**options: Any) -> dict[str, str]:
    """What an adapter with these options is at its start, and what a step then does to it."""
    base = tiny_base("opt")
    adapter = base.adapters["default"] = inject(base.model, LoraConfig(**options), base.router)
    found = {f"start {key}": p.detach().clone() for key, p in adapter.parameters.items()}
    stir(adapter)
    torch.manual_seed(0)
    loss = loss_sum(base, row_of(base, examples(), sum(one.weight for one in examples()), "default"))
    loss.backward()
    found |= {f"gradient {key}": p.grad for key, p in adapter.parameters.items() if p.grad is not None}
    found |= {"loss": loss.detach()}
    if "alora_invocation_tokens" not in options:  # which cannot be merged
        found |= {f"merged {key}": W for key, W in merged_weights(base.model, adapter).items()}
    return {key: hashlib.sha256(t.detach().contiguous().numpy().tobytes()).hexdigest() for key, t in found.items()}


def test_the_same_options_give_the_same_outcome() -> None:
    assert outcome() == outcome()


@pytest.mark.parametrize("field", LoraConfig.model_fields)
def test_every_field_changes_something(field: str) -> None:
    assert field in CASES, f"{field} has no case here: show what it changes, or take it out"
    assert set(CASES[field]) == {field}
    assert outcome(**CASES[field]) != outcome()


def test_bias_all_trains_more_than_bias_of_targets() -> None:
    fewer, more = (outcome(target_modules="fc1", bias=bias) for bias in ("lora_only", "all"))
    assert {k for k in more if k.startswith("start")} > {k for k in fewer if k.startswith("start")}


PATTERN_BOUNDS = "the values of rank_pattern and alpha_pattern must be greater than 0, up to 1000000"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"r": 0}, "r: invalid value 0: must be greater than 0"),
        ({"r": True}, "r: invalid value True: must be a whole number"),
        ({"lora_alpha": 0}, "greater than 0"),
        ({"lora_alpha": float("inf")}, "finite number"),
        ({"lora_alpha": float("nan")}, "finite number"),
        (
            {"alpha_pattern": {"q_proj": float("inf")}},
            PATTERN_BOUNDS,
        ),
        ({"lora_dropout": 1}, "less than 1"),
        ({"last_layers": 1, "layers_to_transform": (0,)}, "last_layers and layers_to_transform both select layers"),
        ({"bias": "some"}, "'none', 'all' or 'lora_only'"),
        ({"init_lora_weights": "pisa"}, "unknown initialization 'pisa': choose from .*Did you mean 'pissa'"),
        ({"init_lora_weights": "pissa_niter_0"}, "unknown initialization 'pissa_niter_0'"),
        ({"init_lora_weights": "corda"}, "lorasmith does not have 'corda'; use 'pissa', 'eva' or 'default'"),
        ({"init_lora_weights": 1}, "init_lora_weights: invalid value 1: must be text"),
        ({"alora_invocation_tokens": ()}, "alora_invocation_tokens"),
        ({"target_moduls": "q_proj"}, "target_moduls: unknown key. Did you mean 'target_modules'?"),
        ({"target_modules": ()}, "no module would be adapted"),
        ({"target_modules": "", "modules_to_save": ("lm_head",)}, "no module would be adapted"),
        ({"target_modules": ("q_proj", "")}, "a name is empty"),
        ({"target_modules": "q_(proj"}, r"target_modules: 'q_\(proj' is not a valid regular expression"),
        ({"exclude_modules": "*x"}, "exclude_modules: .* is not a valid regular expression"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern: .* is not a valid regular expression"),
        ({"rank_pattern": {"q_proj": 0}}, PATTERN_BOUNDS),
        ({"alpha_pattern": {"q_proj": -1.0}}, PATTERN_BOUNDS),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        LoraConfig(**options)


@pytest.mark.parametrize(("given", "kept"), [(True, "default"), (False, "random"), ("true", "default")])
def test_pefts_truth_values_of_the_initialization(given: Any, kept: str) -> None:
    assert LoraConfig(init_lora_weights=given).init_lora_weights == kept


def test_the_scaling_of_the_papers() -> None:
    assert LoraConfig().scaling(8, 16) == 2  # arXiv:2106.09685, section 4.1
    assert LoraConfig(use_rslora=True).scaling(16, 8) == 2  # arXiv:2312.03732, section 3
