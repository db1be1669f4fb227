"""The folder of a model all of whose weights were trained: transformers loads it, with the template of the training."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorasmith.adapters.folder import end_ids
from lorasmith.adapters.whole_model import read_model, write_model
from lorasmith.config.data import DataConfig
from lorasmith.config.model import ModelConfig
from lorasmith.data.dataset.prepare import prepare
from lorasmith.data.template.encoding import Template
from lorasmith.evaluation.loss import evaluate_loss
from lorasmith.loading.load import load_base
from lorasmith.model.base import Base
from lorasmith.report import Report
from tests.support.tiny import model_folder, trained


def base_of(folder: Path, dtype: str = "float32") -> Base:
    return load_base(ModelConfig(model=str(folder), dtype=dtype, device="cpu"), Report())


def test_the_run_folder_holds_a_model_that_transformers_loads(tmp_path):
    """With the loss that the summary tells, and no adapter."""
    run = tmp_path / "run"
    summary = trained(run, method="full", learning_rate=1e-3)
    assert not (run / "adapter").exists()
    assert {path.name for path in (run / "checkpoints" / "step-000004").iterdir()} == {
        "state.json",
        "state.safetensors",
    }
    base = base_of(run / "model")
    plain = AutoModelForCausalLM.from_pretrained(run / "model")
    assert all(torch.equal(p, dict(base.model.named_parameters())[name]) for name, p in plain.named_parameters())
    template = Template.of(base.tokenizer)
    examples = prepare(DataConfig(data=(str(tmp_path / "rows.jsonl"),), held_out=3.0), template, 128, Report()).held_out
    assert evaluate_loss(base, examples, None).loss == pytest.approx(summary.loss_after, rel=1e-6)
    assert summary.loss_after < summary.loss_before
    assert summary.trainable_parameters == sum(p.numel() for p in plain.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_is_written_is_read_again(tmp_path, family, dtype):
    """In the dtype of the base; gpt2 has a tied head, and its config asks for dropout."""
    base = base_of(model_folder(family), dtype)
    with torch.no_grad():
        for p in base.model.parameters():
            p.add_(0.1)
    changed = {name: p.clone() for name, p in base.model.named_parameters()}
    write_model(base, Template.of(base.tokenizer), tmp_path)
    with torch.no_grad():
        for p in base.model.parameters():
            p.zero_()
    read_model(base, tmp_path)
    assert all(torch.equal(p, changed[name]) for name, p in base.model.named_parameters())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain.dtype == getattr(torch, dtype)
    own = AutoModelForCausalLM.from_pretrained(model_folder(family)).config
    assert getattr(plain.config, "attn_pdrop", None) == getattr(own, "attn_pdrop", None)  # 0 while it was loaded


def test_the_template_and_the_stop_tokens_of_the_training_are_kept(tmp_path):
    base = base_of(model_folder("bloom"))  # which has no template
    template = Template.from_config(base.tokenizer, DataConfig(template="chatml"), end_ids(base))
    write_model(base, template, tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert "<|im_start|>" in saved.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert set(end_ids(base_of(tmp_path))) == set(template.stop_ids)
