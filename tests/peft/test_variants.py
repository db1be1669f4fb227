"""Variants and starts of LoRA, and bases in 4 bits: the same program with PEFT and with lorasmith.peft."""

from pathlib import Path
from typing import Any

import pytest
import torch

import lorasmith.peft as ours
from lorasmith.errors import AdapterError, ConfigError
from tests.support.peft_pair import LIBRARIES, base, both, compare, ids, logits, same, stirred, trained

OPTIONS: list[dict[str, Any]] = [
    {"use_dora": True}, {"lora_bias": True},
    *({"init_lora_weights": start} for start in ("gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora", "mica")),
]  # fmt: skip


def _adapted(library: Any, options: dict[str, Any], family: str) -> Any:
    torch.manual_seed(2)
    targets = ["c_attn"] if family == "gpt2" else ["q_proj", "down_proj"]
    given = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": targets} | options
    return library.get_peft_model(base(family), library.LoraConfig(**given))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_each_computes_trains_and_saves_as_in_peft(options: dict[str, Any], family: str, tmp_path: Path) -> None:
    if "olora" in options.values() and family == "gpt2":
        pytest.skip("PEFT's OLoRA gives Conv1D a transposed A")

    def program(library: Any) -> list[Any]:
        model = _adapted(library, options, family)
        start = logits(model)
        model(input_ids=ids(), labels=ids()).loss.backward()
        gradients = [p.grad for name, p in sorted(model.named_parameters()) if p.grad is not None]
        for p in (p for p in model.parameters() if p.requires_grad):
            p.data += torch.linspace(-0.1, 0.1, p.numel()).view(p.shape)
        model.save_pretrained(tmp_path / library.__name__)
        shown = {name.replace("default.weight", "default"): value for name, value in trained(model).items()}
        return [start, gradients, shown, library.get_peft_model_state_dict(model), logits(model)]

    mine = same(program, limit=1e-4)
    assert not torch.allclose(mine[0], mine[4], atol=1e-3)
    if "pissa_niter_4" in options.values():
        with pytest.raises(AdapterError, match="init_lora_weights is 'pissa_niter_4', so the adapter belongs to a"):
            ours.PeftModel.from_pretrained(base(family), tmp_path / "peft")
        return  # PEFT reads it, with a start that is drawn again
    for library, writer in ((library, writer) for library in both() for writer in LIBRARIES):
        read = library.PeftModel.from_pretrained(base(family), tmp_path / writer)
        compare(logits(read), mine[4], 1e-4)
    fast = ours.PeftModel.from_pretrained(base(family), tmp_path / "peft", low_cpu_mem_usage=True)
    compare(logits(fast), mine[4], 1e-4)
    if not ("lora_bias" in options and family == "llama"):
        fast.merge_adapter()
        compare(logits(fast), mine[4], 1e-4)
        fast.unmerge_adapter()
        compare(logits(fast), mine[4], 1e-4)
        compare(logits(fast.merge_and_unload()), mine[4], 1e-4)


def test_a_start_can_be_converted_to_plain_lora(tmp_path: Path) -> None:
    model = _adapted(ours, {"init_lora_weights": "pissa"}, "llama")
    model.save_pretrained(tmp_path / "start")
    stirred(model)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    for library in both():
        compare(logits(library.PeftModel.from_pretrained(base(), tmp_path / "plain")), logits(model), 1e-4)


def test_lora_bias_is_merged_into_a_bias_or_not_at_all() -> None:
    model = stirred(_adapted(ours, {"lora_bias": True}, "llama"))
    weights = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(AdapterError, match="lora_bias"):
        model.merge_adapter()
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_a_second_adapter_beside_one_with_lora_bias() -> None:
    model = _adapted(ours, {"lora_bias": True}, "llama")
    model.add_adapter("other", ours.LoraConfig(target_modules=["q_proj"]))
    assert model.base_model.peft_config.keys() == {"default", "other"}


def test_mica_keeps_b_frozen() -> None:
    model = _adapted(ours, {"init_lora_weights": "mica"}, "llama")
    for change in (lambda: model.set_adapter("default"), lambda: model.set_requires_grad("default"),
                   model.enable_adapter_layers):  # fmt: skip
        change()
        assert not any(p.requires_grad for name, p in model.named_parameters() if "lora_B" in name)
        assert any(p.requires_grad for name, p in model.named_parameters() if "lora_A" in name)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        *(({"init_lora_weights": start}, start) for start in ("corda", "lora_ga")),
    ],
)
def test_what_would_not_be_right_is_refused_by_name(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"{named}.* is not supported by lorasmith.peft"):
        ours.LoraConfig(**options)


def test_a_file_whose_start_is_over_is_read() -> None:
    config = ours.PeftConfig.from_peft_type(peft_type="LORA", target_modules=["q_proj"], init_lora_weights="eva")
    assert config.init_lora_weights == "eva"


def test_weights_of_starts_cannot_be_summed() -> None:
    model = _adapted(ours, {"init_lora_weights": "pissa"}, "llama")
    with pytest.raises(AdapterError, match="default is no plain LoRA"):
        model.add_weighted_adapter(["default"], [1.0], "sum", combination_type="linear")


def test_a_base_in_4_bits() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def program(library: Any) -> list[Any]:
        model = base()
        for layer in model.model.layers:
            plain = layer.self_attn.q_proj
            quantized = bitsandbytes.nn.Linear4bit(plain.in_features, plain.out_features, bias=False, quant_type="nf4")
            quantized.weight = bitsandbytes.nn.Params4bit(plain.weight.data, requires_grad=False, quant_type="nf4")
            layer.self_attn.q_proj = quantized.to("cpu")
        model.is_loaded_in_4bit = True
        library.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        torch.manual_seed(2)
        adapted = library.get_peft_model(model, library.LoraConfig(target_modules=["q_proj", "v_proj"], r=4))
        stirred(adapted)(input_ids=ids(), labels=ids()).loss.backward()
        gradients = [p.grad for name, p in sorted(adapted.named_parameters()) if p.grad is not None]
        if library is ours:
            with pytest.raises(ConfigError, match="merging into a quantized base model"):
                adapted.merge_adapter()
        return [trained(adapted), logits(adapted), gradients]

    same(program, limit=1e-4)
