"""Which adapters a base can hold at once."""

from pathlib import Path

import pytest

from lorasmith.adapters.folder import write_adapter
from lorasmith.config.lora import LoraConfig
from lorasmith.config.model import ModelConfig
from lorasmith.data.template.encoding import Template
from lorasmith.engine.engine import Engine
from lorasmith.errors import AdapterError
from lorasmith.loading.load import load_base
from lorasmith.lora.held import read_contents
from lorasmith.lora.inject import inject
from lorasmith.model.base import Base
from lorasmith.serve.adapters import offer, withdraw
from tests.support import tiny
from tests.support.families import stir


def base_of() -> Base:
    return load_base(ModelConfig(model=str(tiny.model_folder()), dtype="float32", device="cpu"))


def offer_folder(base: Base, name: str, folder: Path) -> None:
    offer(base, name, read_contents(folder, base.dtype), name)


def test_lora_and_a_module_trained_whole_beside_it_exclude_each_other(tmp_path: Path) -> None:
    """Whichever is first; the other is refused, and the base is as it was."""
    base = base_of()
    configs = {
        "lora": LoraConfig(r=2, target_modules=("v_proj",)),
        "whole": LoraConfig(r=2, target_modules=("up_proj",), modules_to_save=("v_proj",)),
        "beside": LoraConfig(r=2, target_modules=("up_proj",), modules_to_save=("q_proj",)),
    }
    for name, config in configs.items():
        own = base_of()
        own.adapters[name] = inject(own.model, config, own.router, name)
        stir(own.adapters[name])
        write_adapter(own, name, Template.of(own.tokenizer), tmp_path / name, {"data": []})
    Engine(base)
    assert base.bank is not None
    paths = base.bank.paths
    offer_folder(base, "lora", tmp_path / "lora")
    for name in ("whole", "beside"):
        with pytest.raises(AdapterError, match="v_proj: another adapter has LoRA on this module"):
            offer_folder(base, name, tmp_path / name)
        assert (list(base.adapters), base.bank.paths) == ([], paths)
    withdraw(base, "lora")
    offer_folder(base, "whole", tmp_path / "whole")
    with pytest.raises(AdapterError, match="v_proj: another adapter trains this module in full"):
        offer_folder(base, "lora", tmp_path / "lora")
    withdraw(base, "whole")
    offer_folder(base, "lora", tmp_path / "lora")
    assert (list(base.adapters), base.bank.paths, list(base.ranks)) == ([], paths, ["lora"])
