"""EVA and LoftQ by PEFT's functions for them: the same program with PEFT and with lorasmith.peft."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig
from safetensors.torch import save_file

import lorasmith.peft as ours
from lorasmith.errors import ConfigError
from tests.support.peft_pair import base, ids, logits, same, stirred, trained
from tests.training.test_loftq import on_cpu

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
BATCHES = [{"input_ids": ids(8, 30, seed), "labels": ids(8, 30, seed)} for seed in range(3)]


def _eva(library: Any, rho: float = 2.0, family: str = "llama", low: bool = False, **options: Any) -> Any:
    torch.manual_seed(2)
    given = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear"} | options
    config = library.LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(rho=rho), **given)
    return library.get_peft_model(base(family), config, low_cpu_mem_usage=low)


@pytest.mark.parametrize(
    ("rho", "family", "options"),
    [
        (1.0, "llama", {}),
        (2.0, "llama", {"low": True}),
        (2.0, "gpt2", {"use_rslora": True, "target_modules": ["c_attn", "c_proj"]}),
        (2.0, "llama", {"use_dora": True, "lora_alpha": 3}),
    ],
)
def test_eva_is_pefts(rho: float, family: str, options: dict[str, Any], tmp_path: Path) -> None:
    def program(library: Any) -> list[Any]:
        model = _eva(library, rho, family, **options)
        library.initialize_lora_eva_weights(model, BATCHES, show_progress_bar=False)
        start, after = logits(model), torch.rand(3)
        config = stirred(model).peft_config["default"]
        shown = {name.replace("default.weight", "default"): value for name, value in trained(model).items()}
        model.save_pretrained(tmp_path / library.__name__)
        read = library.PeftModel.from_pretrained(base(family), tmp_path / library.__name__)
        return [start, after, set(config.target_modules), config.rank_pattern, config.alpha_pattern, shown,
                library.get_peft_model_state_dict(model), logits(model), logits(read)]  # fmt: skip

    mine = same(program, limit=2e-4)
    assert bool(mine[3]) == (rho > 1)


def test_eva_from_a_state_dict_that_leaves_layers_out() -> None:
    def program(library: Any) -> list[Any]:
        model = _eva(library, 1.0, target_modules=["q_proj", "v_proj"])
        found = library.get_eva_state_dict(model, BATCHES, show_progress_bar=False)
        path = "base_model.model.model.layers.1.self_attn.v_proj"
        found[path] = found[path][:0]
        library.initialize_lora_eva_weights(model, eva_state_dict=dict(found))
        return [library.get_peft_model_state_dict(model), set(model.peft_config["default"].target_modules)]

    assert len(same(program, limit=2e-4)[1]) == 3


def test_directions_that_are_missing_or_of_another_model() -> None:
    model = _eva(ours, 1.0, target_modules=["q_proj", "v_proj"])
    found = ours.get_eva_state_dict(model, BATCHES, show_progress_bar=False)
    kept = "base_model.model.model.layers.0.self_attn.q_proj"
    with pytest.raises(ConfigError, match=r"eva_state_dict: model\.other do not belong to a linear"):
        ours.initialize_lora_eva_weights(model, eva_state_dict=found | {"base_model.model.model.other": found[kept]})
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.q_proj do not belong"):
        ours.initialize_lora_eva_weights(model, eva_state_dict={kept: found[kept][:, 1:]})
    with pytest.warns(UserWarning, match=r"A starts at random in model\.layers\.0\.self_attn\.v_proj"):
        ours.initialize_lora_eva_weights(model, eva_state_dict={kept: found[kept]})
    assert torch.equal(model.get_parameter(f"{kept}.lora_A.default.weight"), found[kept].float())


def test_what_eva_cannot_start_is_refused() -> None:
    model = _eva(ours, target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(ConfigError, match=r"init_lora_weights='eva' is for linear layers only\. Leave out model"):
        ours.initialize_lora_eva_weights(model, BATCHES)
    with pytest.raises(ValueError, match="needs init_lora_weights='eva', and a dataloader or the result of get_eva"):
        ours.initialize_lora_eva_weights(model)
    plain = ours.get_peft_model(base(), ours.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="needs init_lora_weights='eva'"):
        ours.initialize_lora_eva_weights(plain, BATCHES)


def _in_4_bits(library: Any, alpha: int = 4) -> tuple[Any, dict[str, torch.Tensor]]:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model, weights = base(), {}
    for i, block in enumerate(model.model.layers):
        plain = torch.nn.Linear(64, 64, bias=False)
        torch.manual_seed(i)
        plain.weight.data.normal_(0, 0.1)
        weights[f"model.layers.{i}.wide.weight"] = plain.weight.data.clone()
        quantized = bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")
        quantized.weight = bitsandbytes.nn.Params4bit(plain.weight.data, requires_grad=False, quant_type="nf4")
        block.wide = quantized.to("cpu")
    model.is_loaded_in_4bit = True
    config = library.LoraConfig(target_modules=["wide"], r=4, lora_alpha=alpha)
    return library.get_peft_model(model, config), weights


def test_loftq_is_pefts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a scaling of 1: PEFT leaves it out. The signs of the directions are free."""

    def program(library: Any) -> list[Any]:
        model, weights = _in_4_bits(library)
        save_file(weights, tmp_path / "model.safetensors")
        asked: list[str] = []

        def keep(given: Any, path: str) -> bool:
            assert given is model
            asked.append(path)
            return path != "model.layers.0.wide"

        with monkeypatch.context() as patch:
            on_cpu(patch)
            library.replace_lora_weights_loftq(model, str(tmp_path / "model.safetensors"), callback=keep)
        layers = [model.get_submodule(f"base_model.model.{path}") for path in asked]
        return [asked, [layer.lora_B["default"].weight @ layer.lora_A["default"].weight for layer in layers]]

    asked, products = same(program)
    assert [bool(product.any()) for product in products] == [path != "model.layers.0.wide" for path in asked]


def test_loftq_takes_the_scaling_into_account_and_needs_a_quantized_layer(tmp_path: Path) -> None:
    found = []
    for alpha in (4, 16):
        model, weights = _in_4_bits(ours, alpha)
        save_file(weights, tmp_path / "model.safetensors")
        ours.replace_lora_weights_loftq(model, str(tmp_path / "model.safetensors"))
        layer = model.get_submodule("base_model.model.model.layers.0.wide")
        found.append(layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
    assert torch.allclose(found[0], found[1], atol=1e-6)
    with pytest.raises(ValueError, match="No layer of adapter default is quantized"):
        ours.replace_lora_weights_loftq(
            ours.get_peft_model(base(), ours.LoraConfig(target_modules=["q_proj"])), str(tmp_path / "model.safetensors")
        )
