"""DoRA (arXiv:2402.09353). Its numbers against PEFT, and folders both ways, are among the cases of test_peft.py."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorasmith.adapters.folder import AdapterFolder
from lorasmith.config.lora import LoraConfig
from lorasmith.errors import AdapterError, ConfigError
from lorasmith.lora.dora import MAGNITUDE, DoRA
from lorasmith.lora.files import save_adapter
from lorasmith.lora.inject import inject
from lorasmith.lora.layer import LoRALayer
from lorasmith.lora.merge import merged_weights
from lorasmith.lora.router import Router
from tests.support.families import MAIN, adapted, distance, logits_of, own_logits, stir, tiny, tiny_base

pytestmark = pytest.mark.usefixtures("exact")
I, O, T = 5, 7, 11


def layer(base: nn.Module, dropout: float = 0.0) -> LoRALayer:
    out = LoRALayer(base.requires_grad_(False), I, O, Router())
    out.add("a", 2, 0.7, dropout, torch.device("cpu"), DoRA)
    nn.init.normal_(out.lora_A["a"].weight)
    nn.init.zeros_(out.lora_B["a"].weight)
    out.updates["a"].start()
    out.router.active = "a"
    return out


KINDS = [lambda: nn.Linear(I, O).double(), lambda: nn.Linear(I, O, bias=False).double(), lambda: Conv1D(O, I).double()]


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_equation_5(kind: Any) -> None:
    module, x = layer(kind()), torch.randn(2, T, I, dtype=torch.float64)
    assert torch.equal(module(x), module.base_layer(x))
    A, B = module.updates["a"].matrices
    m = module.updates["a"].part(MAGNITUDE)
    with torch.no_grad():
        nn.init.normal_(B)
        m.mul_(torch.linspace(0.5, 2, O))
    base = module.base_layer
    W = (base.weight.t() if isinstance(base, Conv1D) else base.weight) + 0.7 * B @ A
    y = x @ (m / W.norm(dim=1).detach() * W.t()).double()
    y = y if base.bias is None else y + base.bias
    assert distance(module(x), y) < 1e-14
    wanted = [m, A, B]
    ours = torch.autograd.grad(module(x).pow(2).sum(), wanted)
    theirs = torch.autograd.grad(y.pow(2).sum(), wanted)
    assert all(distance(a, b) < 1e-12 for a, b in zip(ours, theirs, strict=True))


def test_dropout_falls_on_the_whole_input_as_in_peft() -> None:
    """With m as it starts and B at zero, y is W x whatever is dropped; with another m, the dropped x goes through W."""
    module, x = layer(nn.Linear(I, O).double(), dropout=0.5), torch.randn(T, I, dtype=torch.float64)
    assert torch.equal(module(x), module.base_layer(x))
    with torch.no_grad():
        module.updates["a"].part(MAGNITUDE).mul_(2)
    torch.manual_seed(4)
    y = module(x)
    torch.manual_seed(4)
    dropped = nn.functional.dropout(x, 0.5)
    assert distance(y, module.base_layer(x) + dropped @ module.base_layer.weight.t()) < 1e-14
    module.eval()
    assert distance(module(x), 2 * module.base_layer(x) - module.base_layer.bias) < 1e-14


@pytest.mark.parametrize("family", MAIN)
def test_merged_equals_unmerged(family: str) -> None:
    base, adapter = adapted(family, use_dora=True, target_modules="all-linear")
    merged = tiny(family)
    for name, weight in merged_weights(base.model, adapter).items():
        merged.get_parameter(name).data.copy_(weight)
    assert distance(logits_of(merged), own_logits(base)) < 1e-11


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_pefts_merge_gives_the_same_weights(family: str, tmp_path: Path) -> None:
    base, adapter = adapted(family, use_dora=True)
    save_adapter(adapter, base.model, tmp_path, "")
    theirs = peft.PeftModel.from_pretrained(tiny(family), tmp_path).merge_and_unload()
    for name, weight in merged_weights(base.model, adapter).items():
        assert distance(weight, theirs.get_parameter(name)) < 1e-12, name


def test_a_bfloat16_base_gives_pefts_logits_within_rounding(tmp_path: Path) -> None:
    base, adapter = adapted("llama", torch.bfloat16, use_dora=True)
    save_adapter(adapter, base.model, tmp_path, "")
    theirs = peft.PeftModel.from_pretrained(tiny("llama", torch.bfloat16), tmp_path)
    ours, pefts = logits_of(base), logits_of(theirs)
    truth = logits_of(copy.deepcopy(theirs).double())
    assert distance(ours, truth) < 2 * distance(pefts, truth)
    assert {p.dtype for p in adapter.parameters.values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_changes_no_bit(dtype: torch.dtype) -> None:
    base = tiny_base("qwen2", dtype)
    before = logits_of(base)
    inject(base.model, LoraConfig(use_dora=True), base.router)
    assert torch.equal(logits_of(base), before)


def test_beside_a_plain_adapter_on_the_same_layers() -> None:
    """Both directions of loading: what shares a layer shares nothing else."""
    base, _first = adapted("llama", use_dora=True)
    logits = logits_of(base)
    stir(inject(base.model, LoraConfig(r=3), base.router, "plain"), seed=2)
    alone = tiny_base("llama")
    stir(inject(alone.model, LoraConfig(r=3), alone.router, "plain"), seed=2)
    assert distance(logits_of(base), logits_of(alone)) < 1e-12
    base.router.active = "default"
    assert torch.equal(logits_of(base), logits)


def test_a_quantized_base_is_refused() -> None:
    base = tiny_base("llama")
    layer = base.model.model.layers[0].self_attn.q_proj
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match=r"lora\.use_dora: .*layers\.0\.self_attn\.q_proj: DoRA needs unquantized"):
        inject(base.model, LoraConfig(use_dora=True), base.router)


def test_a_folder_of_peft_with_an_embedding_is_refused(tmp_path: Path) -> None:
    config = peft.LoraConfig(use_dora=True, target_modules=["embed_tokens", "q_proj"])
    peft.get_peft_model(tiny("llama"), config).save_pretrained(tmp_path)
    base, before = tiny_base("llama"), logits_of(tiny("llama"))
    with pytest.raises(
        AdapterError, match=r"adapter_config\.json: lora\.use_dora: model\.embed_tokens is an embedding"
    ):
        AdapterFolder.read(tmp_path).load_into(base, "default")
    assert torch.equal(logits_of(base), before)
