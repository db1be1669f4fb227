"""Whether adapters can be trained at once."""

from pathlib import Path

import pytest
import torch

from lorasmith.config.toml import Config, load_config
from lorasmith.report import Report
from lorasmith.training import at_once
from lorasmith.training.assemble import assemble
from lorasmith.training.at_once import not_at_once, why_alone
from lorasmith.training.distributed import World
from lorasmith.training.loop import Job
from tests.support.tiny import model_folder, rows_file


@pytest.mark.parametrize(
    ("section", "options", "why"),
    [
        ("training", {"start_from": "runs/a"}, "training.start_from chooses"),
        ("training", {"report_to": ("wandb",)}, "a tracker of training.report_to"),
        ("data", {"add_tokens": ("<|call|>",)}, "data.add_tokens changes"),
        ("lora", {"bias": "all"}, "lora.bias trains"),
        ("lora", {"modules_to_save": ("lm_head",)}, "lora.modules_to_save trains"),
    ],
)
def test_why_an_adapter_cannot_share_its_base_model(section, options, why):
    assert why_alone(load_config(None, {section: options}), World()).startswith(why)


def test_most_adapters_can():
    assert why_alone(Config(), World()) == ""
    assert why_alone(Config(), World(0, 2)) == "it is trained with several processes"


@pytest.fixture
def jobs(tmp_path: Path) -> list[Job]:
    files, model = rows_file(tmp_path / "rows.jsonl"), {"model": str(model_folder()), "dtype": "float32"}
    config = load_config(None, {"model": model, "data": {"data": (files,)}})
    first = assemble(config, tmp_path / "a", Report(), World(), name="a").job
    second = assemble(config, tmp_path / "b", Report(), World(), load=lambda *_args: first.base, name="b").job
    return [first, second]


def test_a_step_that_mixes_up_adapters_is_found(jobs, monkeypatch):
    assert not_at_once(jobs) == ""
    gradients = at_once._gradients

    def wrong(base, row, parameters):
        found = gradients(base, row, parameters)
        return torch.cat([found[: len(found) // 2], 1.5 * found[len(found) // 2 :]]) if len(row.slots) > 1 else found

    monkeypatch.setattr(at_once, "_gradients", wrong)
    assert not_at_once(jobs) == "the gradients of b differ by 5.0e-01"


def test_a_step_that_fails_is_found(jobs, monkeypatch):
    def broken(*_args):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(at_once, "_gradients", broken)
    assert not_at_once(jobs) == "it fails with an error: no such kernel"


def test_the_trial_leaves_parameters_and_gradients_alone(jobs):
    before = [(job.parameters.values.clone(), job.parameters.gradient.clone()) for job in jobs]
    assert not_at_once(jobs) == ""
    for job, (values, gradient) in zip(jobs, before, strict=True):
        assert torch.equal(job.parameters.values, values)
        assert torch.equal(job.parameters.gradient, gradient)
