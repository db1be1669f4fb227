"""add_weighted_adapter, beside PEFT's."""

from typing import Any

import pytest
import torch

import lorasmith.peft as ours
from lorasmith.errors import AdapterError, ConfigError
from tests.support.peft_pair import base, compare, logits, same, stirred

METHODS: dict[str, dict[str, Any]] = {
    "svd": {}, "cat": {}, "linear": {}, "ties": {"density": 0.6}, "ties_svd": {"density": 0.6},
    "dare_linear": {"density": 0.6}, "dare_ties": {"density": 0.6}, "dare_linear_svd": {"density": 0.6},
    "dare_ties_svd": {"density": 0.6, "majority_sign_method": "frequency"}, "magnitude_prune": {"density": 0.6},
    "magnitude_prune_svd": {"density": 0.6},
}  # fmt: skip


def two(library: Any, second: int = 4, **changes: Any) -> Any:
    torch.manual_seed(1)
    given = {"target_modules": ["q_proj", "up_proj"], "lora_alpha": 8, "task_type": "CAUSAL_LM"} | changes
    model = library.get_peft_model(base(), library.LoraConfig(r=4, **given), adapter_name="first")
    model.add_adapter("second", library.LoraConfig(r=second, **given))
    return stirred(model).eval()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_pefts_model(method: str) -> None:
    def program(library: Any) -> list[Any]:
        model = two(library)
        torch.manual_seed(5)
        model.add_weighted_adapter(["first", "second"], [0.7, 0.4], "sum", combination_type=method, **METHODS[method])
        trained = {name: p.requires_grad for name, p in model.named_parameters()}
        model.set_adapter("sum")
        config = model.peft_config["sum"]
        return [
            logits(model),
            trained,
            config.r,
            config.lora_alpha,
            sorted(config.target_modules),
            model.active_adapters,
        ]

    same(program, limit=2e-4 if "svd" in method else 1e-5)


@pytest.mark.parametrize("method", ["svd", "cat"])
def test_different_ranks_and_modules(method: str) -> None:
    def program(library: Any) -> torch.Tensor:
        model = two(library, second=2)
        config = library.LoraConfig(target_modules=["v_proj"], r=3, use_rslora=False)
        model.add_adapter("third", config)
        stirred(model, seed=8)
        model.add_weighted_adapter(["first", "second", "third"], [1.0, -0.5, 2.0], "sum", method, svd_rank=6)
        model.set_adapter("sum")
        return logits(model)

    same(program, limit=2e-4)


def test_cat_is_the_sum_also_with_rslora() -> None:
    model = two(ours, use_rslora=True)
    model.add_weighted_adapter(["first", "second"], [0.5, 2.0], "sum", "cat")
    layer = next(m for m in model.modules() if hasattr(m, "updates"))
    deltas = {name: layer.lora_B[name].weight @ layer.lora_A[name].weight * layer.updates[name].scaling
              for name in ("first", "second", "sum")}  # fmt: skip
    compare(deltas["sum"], 0.5 * deltas["first"] + 2 * deltas["second"], 1e-5)


def test_what_cannot_be_is_refused() -> None:
    model = two(ours)
    with pytest.raises(ValueError, match="first exists already"):
        model.add_weighted_adapter(["first", "second"], [1.0, 1.0], "first")
    with pytest.raises(ConfigError, match="svd_clamp"):
        model.add_weighted_adapter(["first", "second"], [1.0, 1.0], "sum", svd_clamp=0.9)
    with pytest.raises(ValueError, match="third"):
        model.add_weighted_adapter(["first", "third"], [1.0, 1.0], "sum")
    with pytest.raises(AdapterError, match="first is no plain LoRA"):
        two(ours, use_dora=True).add_weighted_adapter(["first", "second"], [1.0, 1.0], "sum")
    model = two(ours)
    model.add_adapter("third", ours.LoraConfig(r=4, rank_pattern={"q_proj": 2}, target_modules=["q_proj", "up_proj"]))
    model.delete_adapter("second")
    with pytest.raises(AdapterError, match="the ranks 2, 4"):
        model.add_weighted_adapter(["first", "third"], [1.0, 1.0], "sum", "linear")
    assert list(model.peft_config) == ["first", "third"]
    with pytest.raises(ValueError, match="zip"):
        model.add_weighted_adapter(["first", "third"], [1.0], "sum")
    assert model.get_model_status().available_adapters == ["first", "third"]
