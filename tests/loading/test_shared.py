"""A base model that several trainings share gives each what a base of its own would give, bit for bit."""

from pathlib import Path

import pytest
import torch

from lorasmith.config.model import ModelConfig
from lorasmith.config.toml import Config, load_config
from lorasmith.loading.load import load_base
from lorasmith.loading.shared import SharedBase, checksums, on_same_weights
from lorasmith.runs.train import train
from tests.support.tiny import adapter_bytes, metrics, model_folder, rows_file


def of(folder: Path, name: str, **lora: object) -> Config:
    few = {"batch_size": 4, "max_steps": 3, "learning_rate": 1e-2, "warmup": 0}
    sections = {
        "model": {"model": str(model_folder()), "dtype": "float32"},
        "data": {"data": [rows_file(folder / "rows.jsonl")], "held_out": 3},
        "lora": lora,
        "training": few,
    }
    return load_config(None, {**sections, "output": str(folder / name)})


KINDS = {
    "plain": {"r": 4},
    "dora": {"r": 2, "use_dora": True},
    "pissa": {"r": 2, "init_lora_weights": "pissa"},
    "embedding": {"r": 2, "modules_to_save": ["embed_tokens"]},
    "bias": {"r": 2, "bias": "lora_only"},
    "again": {"r": 4},
}


def test_runs_that_share_a_base_equal_runs_alone(tmp_path):
    shared = SharedBase()
    for name, lora in KINDS.items():
        train(of(tmp_path, f"{name}-shared", **lora), load=shared)
        train(of(tmp_path, f"{name}-alone", **lora))
        together, alone = tmp_path / f"{name}-shared", tmp_path / f"{name}-alone"
        assert metrics(together) == metrics(alone), name
        assert adapter_bytes(together) == adapter_bytes(alone), name
    assert shared.loads == 1


def test_another_base_is_loaded_and_an_unchanged_one_is_not():
    shared = SharedBase()
    first, other = (ModelConfig(model=str(model_folder(seed=seed)), dtype="float32") for seed in (0, 1))
    weights = [base.model.lm_head.weight.clone() for base in (shared(first), shared(first), shared(other))]
    assert shared.loads == 2
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_base_whose_weights_a_training_changed_is_loaded_again():
    shared, config = SharedBase(), ModelConfig(model=str(model_folder()), dtype="float32")
    weight = shared(config).model.model.layers[1].mlp.down_proj.weight
    before = weight.clone()
    with torch.no_grad():
        weight += 1e-3
    assert torch.equal(shared(config).model.model.layers[1].mlp.down_proj.weight, before)
    assert shared.loads == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_single_changed_bit_changes_the_checksums(dtype):
    base = load_base(ModelConfig(model=str(model_folder()), dtype=dtype))
    before, copied = checksums(base), on_same_weights(base)
    assert checksums(copied) == before
    weight = copied.model.model.layers[0].mlp.down_proj.weight
    with torch.no_grad():
        weight[0, 0] = torch.nextafter(weight[0, 0], weight[0, 0] + 1)
    assert checksums(base) != before, "the copy shares the weights of the original"


def test_a_copy_has_modules_of_its_own():
    base = load_base(ModelConfig(model=str(model_folder()), dtype="float32"))
    copied = on_same_weights(base)
    copied.model.requires_grad_(True)
    copied.model.model.layers[0].mlp.down_proj = torch.nn.Identity()
    assert not any(p.requires_grad for p in base.model.parameters())
    assert isinstance(base.model.model.layers[0].mlp.down_proj, torch.nn.Linear)
    assert copied.router is not base.router
    assert copied.tokenizer is base.tokenizer
