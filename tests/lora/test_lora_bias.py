"""B with a bias, against PEFT and written out."""

from pathlib import Path

import peft
import pytest
import torch

from lorasmith.adapters.folder import AdapterFolder
from lorasmith.config.lora import LoraConfig
from lorasmith.errors import AdapterError, ConfigError
from lorasmith.lora.files import read_weights, save_adapter
from lorasmith.lora.inject import inject
from lorasmith.lora.merge import merged_weights
from lorasmith.lora.saved_values import has_moved
from tests.support.families import adapted, distance, far_apart, logits_of, own_logits, tiny, tiny_base
from tests.support.tiny import losses, trained

pytestmark = [pytest.mark.usefixtures("exact"), pytest.mark.filterwarnings("ignore::UserWarning:peft")]
LIMIT = 1e-12


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_logits_and_gradients_equal_those_of_peft(family: str, tmp_path: Path) -> None:
    base, adapter = adapted(family, lora_bias=True, use_rslora=True, target_modules="all-linear")
    save_adapter(adapter, base.model, tmp_path, "")
    theirs = peft.PeftModel.from_pretrained(tiny(family), tmp_path, is_trainable=True)
    assert distance(own_logits(base), own_logits(theirs)) < LIMIT
    named = {n.replace(".default", ""): p for n, p in theirs.named_parameters() if p.requires_grad}
    assert named.keys() == adapter.parameters.keys()
    for logits in (own_logits(base), own_logits(theirs)):
        (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view(logits.shape)).sum().backward()
    grads = [{key: p.grad for key, p in parameters.items()} for parameters in (adapter.parameters, named)]
    assert not far_apart(grads[0], grads[1], LIMIT)


def test_a_folder_of_peft_is_read(tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_bias=True, target_modules=["q_proj", "up_proj"])
    theirs = peft.get_peft_model(tiny("llama"), config)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn_like(p)
    theirs.save_pretrained(tmp_path)
    base = tiny_base("llama")
    AdapterFolder.read(tmp_path).load_into(base, "default")
    assert distance(logits_of(base), logits_of(theirs)) < LIMIT
    assert base.adapters["default"].config.lora_bias


def test_merged_equals_unmerged_where_the_layers_have_biases() -> None:
    base, adapter = adapted("gpt2", lora_bias=True, target_modules=("c_attn", "c_fc"))
    merged = tiny("gpt2")
    for name, weight in merged_weights(base.model, adapter).items():
        merged.get_parameter(name).data.copy_(weight)
    assert distance(logits_of(merged), own_logits(base)) < 1e-11


def test_a_merge_into_layers_without_bias_is_refused() -> None:
    base, adapter = adapted("llama", lora_bias=True)
    with pytest.raises(AdapterError, match=r"biases of its own \(lora_bias\).* cannot be merged"):
        merged_weights(base.model, adapter)


def test_a_fresh_one_changes_no_bit_and_the_bias_alone_counts_as_moved() -> None:
    base = tiny_base("llama")
    before = logits_of(base)
    adapter = inject(base.model, LoraConfig(lora_bias=True), base.router)
    assert torch.equal(logits_of(base), before)
    assert not has_moved(adapter, base.model)
    with torch.no_grad():
        next(p for key, p in adapter.parameters.items() if key.endswith("lora_B.bias")).fill_(1.0)
    assert has_moved(adapter, base.model)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_beside_another_variant_it_is_refused(options: dict) -> None:
    base = tiny_base("llama")
    with pytest.raises(ConfigError, match=r"lora\.lora_bias.* mutually exclusive|lora\.use_dora and lora\.lora_bias"):
        inject(base.model, LoraConfig(lora_bias=True, **options), base.router)


def test_a_run_trains_the_biases(tmp_path: Path) -> None:
    trained(tmp_path / "run", lora_bias=True)
    trained(tmp_path / "plain")
    assert losses(tmp_path / "run") != losses(tmp_path / "plain")
    biases = {key: b for key, b in read_weights(tmp_path / "run" / "adapter").items() if key.endswith("lora_B.bias")}
    assert len(biases) == 14
    assert all(b.any() for b in biases.values())
