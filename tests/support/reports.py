"""A report with every figure and picture, made without any training."""

from pathlib import Path

import torch

from lorasmith.config.data import DataConfig
from lorasmith.config.toml import Config
from lorasmith.evaluation.generation import Answer, Prompt
from lorasmith.evaluation.interval import Interval
from lorasmith.evaluation.loss import Comparison
from lorasmith.evaluation.results import Forgetting
from lorasmith.evaluation.trend import trend
from lorasmith.lora.spectrum import LayerSpectrum
from lorasmith.runs.evidence import Evidence, ShownExample
from lorasmith.runs.findings import (
    falling_finding,
    forgotten_finding,
    gap_finding,
    learned_finding,
    rank_finding,
)
from lorasmith.runs.next_steps import next_steps
from lorasmith.runs.report import RunReport, gaps_of
from lorasmith.runs.subject import Subject

TAGS = "<b>bold</b> & '你好'"  # what would be HTML if nobody took care


def made_report(folder: Path = Path("/runs/mine")) -> RunReport:
    """A run that overfits after step 60 of 100."""
    training = [(step, 3.0 - 0.02 * step + 0.05 * (-1) ** step) for step in range(1, 101)]
    held_out = [(step, 2.9 - 0.01 * step + 0.00012 * step**2) for step in range(0, 101, 20)]
    config = Config(data=DataConfig(data=("rows.jsonl",), held_out=0.1))
    subject = Subject(
        folder, folder / "adapter", "finished", config, training=training, held_out=held_out, step=60,
        later=(folder / "checkpoints" / "step-000100",),
    )  # fmt: skip
    evidence = Evidence(
        learned=Comparison(2.9, 2.7, -0.25, -0.15, 40),
        forgotten=Forgetting(3.1, 3.2, 0.05, 0.15, 48),
        trained_on=Comparison(2.9, 2.4, -0.6, -0.4, 50),
        gap=Interval(0.3, 0.2, 0.4, 40),
        later=Comparison(2.7, 2.8, 0.05, 0.15, 40),
        half=Interval(0.8, 0.7, 0.85, 40),
        shown=tuple(
            ShownExample(place, Prompt([1], f"{TAGS} {place}", f"reference {place}", "rows.jsonl:1"), 2.5, 2.25,
                         Answer(f"base says {place}", "length"), Answer("", "stop"))
            for place in ("worst", "middle", "best")
        ),
        eligible=40,
        train_examples=360,
        missing=(f"nobody knows {TAGS}",),
    )  # fmt: skip
    values = torch.tensor([[1.0, 0.5, 0.25, 0.1]], dtype=torch.float64)
    layers = [
        LayerSpectrum(f"model.layers.{i}.{kind}", values * (i + 1))
        for i in range(3)
        for kind in ("self_attn.q_proj", "mlp.up_proj")
    ]
    end = trend([point for point in training if point[0] > 66])
    gaps = gaps_of(training, held_out)
    opening = trend(gaps, 4)
    found = [
        learned_finding(evidence.learned, (), 5),
        forgotten_finding(evidence.forgotten),
        falling_finding(end),
        gap_finding(evidence.gap, evidence.trained_on, opening, evidence.later),
        rank_finding(layers, evidence.half),
    ]
    findings = {one.key: one for one in found}
    facts = [("base model", "a model"), ("data", TAGS)]
    steps = next_steps(findings, subject)
    return RunReport(subject, facts, evidence, end, gaps, opening, layers, findings, steps, evidence.missing)
