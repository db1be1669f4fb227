"""hotswap_adapter: the weights of another folder, or a refusal."""

from pathlib import Path

import pytest
import torch

import lorasmith.peft as ours
from lorasmith.errors import AdapterError
from tests.support.peft_pair import base, compare, logits, stirred, two


def test_hotswap_gives_an_adapter_the_weights_of_another(tmp_path: Path) -> None:
    torch.manual_seed(9)
    other = ours.get_peft_model(base(), ours.LoraConfig(r=4, lora_alpha=40, target_modules=["q_proj", "v_proj"]))
    stirred(other, seed=77).save_pretrained(tmp_path / "other")
    model = two(ours)
    ours.hotswap_adapter(model, str(tmp_path / "other"), "first")
    compare(logits(model), logits(other.eval()), 0)
    with pytest.raises(AdapterError, match="It lacks 4 tensors"):
        ours.hotswap_adapter(model, str(tmp_path / "other"), "second")
    config = ours.LoraConfig(r=8, target_modules=["q_proj", "v_proj"])
    stirred(ours.get_peft_model(base(), config)).save_pretrained(tmp_path / "wide")
    with pytest.raises(AdapterError, match=r"wide: the shape is \(8, 32\), but this base model needs \(4, 32\)"):
        ours.hotswap_adapter(model, str(tmp_path / "wide"), "first")
    config = ours.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], use_rslora=True)
    stirred(ours.get_peft_model(base(), config)).save_pretrained(tmp_path / "rslora")
    with pytest.raises(AdapterError, match=r"use_rslora"):
        ours.hotswap_adapter(model, str(tmp_path / "rslora"), "first")
