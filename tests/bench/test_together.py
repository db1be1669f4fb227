"""The bench of adapters at once: both ways take the same steps, and their seconds make the ratio."""

import time

import pytest
import torch

from bench import together
from lorasmith.config.model import ModelConfig
from lorasmith.loading.load import load_base
from lorasmith.report import Report
from tests.support.tiny import model_folder


def test_both_ways_train_every_adapter_in_every_round(monkeypatch):
    base = load_base(ModelConfig(model=str(model_folder()), dtype="float32", device="cpu"), Report())
    makers = [together._learner(base, f"adapter-{i}") for i in range(3)]
    seen = {"train_step": 0, "train_step_together": 0}
    for name in seen:
        monkeypatch.setattr(together, name, counting(seen, name, getattr(together, name)))
    values = [next(iter(base.adapters[f"adapter-{i}"].trained.values())).detach().clone() for i in range(3)]
    found = together.measure(base, makers, 16, 2)
    assert seen == {"train_step": 9, "train_step_together": 3}, "with a first round that is not counted"
    for i, value in enumerate(values):
        assert not torch.equal(next(iter(base.adapters[f"adapter-{i}"].trained.values())), value)
    assert found["faster"] == found["seconds"]["apart"] / found["seconds"]["together"]


def test_the_ratio_is_that_of_the_medians(monkeypatch):
    base = load_base(ModelConfig(model=str(model_folder()), dtype="float32", device="cpu"), Report())
    makers = [together._learner(base, f"adapter-{i}") for i in range(2)]
    monkeypatch.setattr(together, "train_step", lambda *_args: time.sleep(0.02))
    monkeypatch.setattr(together, "train_step_together", lambda *_args: time.sleep(0.02))
    assert together.measure(base, makers, 16, 3)["faster"] == pytest.approx(2, rel=0.3)


def counting(seen, name, function):
    def counted(*args):
        seen[name] += 1
        return function(*args)

    return counted
