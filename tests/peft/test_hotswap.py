"""hotswap_adapter: PEFT's own function on lorasmith's layers."""

from pathlib import Path
from typing import Any

import pytest
import torch

import lorasmith.peft as ours
from lorasmith.peft import hotswap_adapter
from tests.support.peft_pair import base, compare, logits, stirred, two


def other(folder: Path, **options: Any) -> Any:
    """Another adapter, which is also written to `folder`."""
    torch.manual_seed(9)
    config = ours.LoraConfig(**{"r": 4, "lora_alpha": 40, "target_modules": ["q_proj", "v_proj"]} | options)
    model = stirred(ours.get_peft_model(base(), config), seed=77).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("options", [{}, {"r": 2}, {"target_modules": ["v_proj"]}], ids=str)
def test_hotswap_gives_an_adapter_the_weights_and_the_scaling_of_another(tmp_path: Path, options: Any) -> None:
    wanted = logits(other(tmp_path, **options))
    model = two(ours)
    hotswap_adapter(model, str(tmp_path), "first", torch_device="cpu")
    compare(logits(model), wanted, 1e-6)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    other(tmp_path / "wide", target_modules=["q_proj", "v_proj", "k_proj"])
    other(tmp_path / "rslora", use_rslora=True)
    model = two(ours)
    before = logits(model)
    with pytest.raises(RuntimeError, match=r"unexpected keys.*k_proj"):
        hotswap_adapter(model, str(tmp_path / "wide"), "first", torch_device="cpu")
    with pytest.raises(ValueError, match="use_rslora"):
        hotswap_adapter(model, str(tmp_path / "rslora"), "first", torch_device="cpu")
    compare(logits(model), before, 0)
