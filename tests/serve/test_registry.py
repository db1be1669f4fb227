"""Which adapters a base can hold at once."""

from pathlib import Path

import pytest

from lorasmith.adapters.folder import AdapterFolder, write_adapter
from lorasmith.config.lora import LoraConfig
from lorasmith.config.model import ModelConfig
from lorasmith.config.sampling import SamplingConfig
from lorasmith.data.template.encoding import Template
from lorasmith.engine.engine import Engine
from lorasmith.engine.request import Request
from lorasmith.engine.scoring import prompt_logprobs
from lorasmith.errors import AdapterError
from lorasmith.loading.load import load_base
from lorasmith.lora.inject import inject
from lorasmith.model.base import Base
from lorasmith.serve.registry import attach, detach
from tests.support import tiny
from tests.support.families import stir


def base_of() -> Base:
    return load_base(ModelConfig(model=str(tiny.model_folder()), dtype="float32", device="cpu"))


def offer_folder(base: Base, name: str, folder: Path) -> None:
    adapter = AdapterFolder.read(folder)
    attach(base, name, adapter, adapter.tensors_in(base.dtype))


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
    assert base.fast_decoder is not None
    assert base.fast_decoder.bank is not None
    paths = base.fast_decoder.bank.paths
    offer_folder(base, "lora", tmp_path / "lora")
    for name in ("whole", "beside"):
        with pytest.raises(AdapterError, match="v_proj: another adapter has LoRA on this module"):
            offer_folder(base, name, tmp_path / name)
        assert (list(base.adapters), base.fast_decoder.bank.paths) == ([], paths)
    detach(base, "lora")
    offer_folder(base, "whole", tmp_path / "whole")
    with pytest.raises(AdapterError, match="v_proj: another adapter trains this module in full"):
        offer_folder(base, "lora", tmp_path / "lora")
    detach(base, "whole")
    offer_folder(base, "lora", tmp_path / "lora")
    assert (list(base.adapters), base.fast_decoder.bank.paths, list(base.fast_decoder.held)) == ([], paths, ["lora"])


def test_a_variant_of_lora_is_served_by_its_own_layers(tmp_path: Path) -> None:
    """Loaded first, a plain adapter on the same layers joins it there; loaded later, it is refused by name."""
    configs = {"dora": LoraConfig(r=2, use_dora=True), "lora": LoraConfig(r=3, target_modules=("v_proj", "up_proj"))}
    asked, alone = [7, 11, 13, 17, 19], {}
    for name, config in configs.items():
        own = base_of()
        own.adapters[name] = inject(own.model, config, own.router, name)
        stir(own.adapters[name])
        write_adapter(own, name, Template.of(own.tokenizer), tmp_path / name, {"data": []})
        (alone[name],) = prompt_logprobs(own, [Request(asked, SamplingConfig(), name, ())])
    base = base_of()
    Engine(base, prepack=True)
    offer_folder(base, "lora", tmp_path / "lora")
    with pytest.raises(AdapterError, match="an adapter with use_dora cannot share this layer"):
        offer_folder(base, "dora", tmp_path / "dora")
    detach(base, "lora")
    offer_folder(base, "dora", tmp_path / "dora")
    offer_folder(base, "lora", tmp_path / "lora")
    assert list(base.adapters) == ["dora", "lora"]
    for name in configs:
        (found,) = prompt_logprobs(base, [Request(asked, SamplingConfig(), name, ())])
        wanted = [one.logprob for one in alone[name] if one]
        assert [one.logprob for one in found if one] == pytest.approx(wanted, abs=1e-4)
