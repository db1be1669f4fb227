"""What is suggested after a run, and that each command can be run as it stands."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from lorasmith.cli import train as command_line
from lorasmith.cli.flags import config_of
from lorasmith.config.data import DataConfig
from lorasmith.config.lora import LoraConfig
from lorasmith.config.model import ModelConfig
from lorasmith.config.toml import Config, to_toml
from lorasmith.config.training import TrainingConfig
from lorasmith.runs.findings import Finding
from lorasmith.runs.next_steps import NextStep, next_steps
from lorasmith.runs.subject import Subject

GOOD = {"learned": "better", "forgotten": "none", "falling": "level", "gap": "closed", "rank": "spare"}


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    """A run in a folder whose name needs quotes."""
    folder = tmp_path / "my run"
    folder.mkdir()
    config = Config(
        model=ModelConfig(model="m"), data=DataConfig(data=("rows.jsonl",), held_out=0.1), output=str(folder)
    )
    (folder / "config.toml").write_text(to_toml(config, {}), "utf-8")
    return Subject(folder, folder / "adapter", "finished", config, training=[(100, 1.0)], step=60)


def steps(subject: Subject, **outcomes: str) -> list[NextStep]:
    found = {key: Finding(key, what, "a", (), "clear", "good") for key, what in (GOOD | outcomes).items()}
    return next_steps(found, subject)


def config(step: NextStep) -> Config:
    """The configuration that the command asks for."""
    program, verb, *words = shlex.split(step.command)
    assert (program, verb) == ("lorasmith", "train")
    args, problems = command_line.parser().read(words)
    assert problems == []
    return config_of(args)


def of(subject: Subject, **sections: object) -> Subject:
    return replace(subject, config=subject.config.model_copy(update=sections))


def test_nothing_is_called_for(subject):
    assert steps(subject) == []
    assert steps(subject, forgotten="better", falling="unclear", rank="unknown", gap="unknown") == []


def test_without_a_run_there_is_no_command(subject):
    assert steps(replace(subject, config=None), learned="worse") == []


def test_a_run_that_was_still_falling(subject):
    (longer,) = steps(subject, falling="falling")
    found = config(longer)
    assert found.output == str(subject.folder.with_name("my run-longer"))
    assert (found.training.epochs, found.training.eval_every, found.training.patience) == (2.0, 10, 3)
    limited = of(subject, training=TrainingConfig(max_steps=30, eval_every="epoch"))
    found = config(steps(limited, falling="falling")[0])
    assert (found.training.max_steps, found.training.eval_every) == (60, "epoch")
    nothing_held_out = of(subject, data=DataConfig(data=("rows.jsonl",), held_out=0))
    _hold_out, longer = steps(nothing_held_out, falling="falling", learned="unknown")
    assert config(longer).training.patience == 0


def test_the_rank_is_used_up(subject):
    (larger,) = steps(subject, rank="used")
    assert config(larger).lora.r == 32
    assert config(larger).lora.lora_alpha == subject.config.lora.lora_alpha
    assert steps(subject, rank="used", gap="harmful")[0].what == "Stop earlier"
    assert [step.what for step in steps(subject, rank="used", gap="open")][-1] == "More data"


def test_full_fine_tuning_is_suggested_for_a_large_rank(subject):
    large = of(subject, lora=LoraConfig(r=64, lora_alpha=32, use_rslora=True), model=ModelConfig(quantize="nf4"))
    (subject.folder / "config.toml").write_text(to_toml(large.config, {}), "utf-8")
    (full,) = steps(large, rank="used")
    found = config(full)
    assert (found.training.method, found.training.learning_rate) == ("full", pytest.approx(2e-5))
    assert (found.lora, found.model.quantize) == (LoraConfig(), "none")
    assert steps(large, rank="spare") == []
    assert "--method" not in steps(subject, rank="used")[0].command
    special = of(subject, lora=LoraConfig(r=64, rank_pattern={"q_proj": 8}))
    assert steps(special, rank="used")[0].command == ""
    on_preferences = of(subject, lora=LoraConfig(r=64), training=TrainingConfig(method="dpo"))
    assert steps(on_preferences, rank="used")[0].what == "A larger rank"


def test_lora_is_suggested_where_a_rank_of_the_update_is_enough(subject):
    full = of(subject, training=TrainingConfig(method="full", learning_rate=3e-5))
    (subject.folder / "config.toml").write_text(to_toml(full.config, {}), "utf-8")
    (lora,) = steps(full, full="rank 64")
    found = config(lora)
    assert (found.training.method, found.training.learning_rate) == ("lora", pytest.approx(3e-4))
    assert found.lora == LoraConfig(r=64)
    assert lora.what == "LoRA with rank 64"
    assert steps(full, full="needed") == []


@pytest.mark.parametrize("outcome", [{"learned": "worse"}, {"falling": "rising"}])
def test_too_large_a_learning_rate(subject, outcome):
    (lower,) = steps(subject, **outcome)
    assert config(lower).training.learning_rate == pytest.approx(6.7e-5)


def test_no_effect(subject):
    (higher,) = steps(subject, learned="none")
    assert config(higher).training.learning_rate == pytest.approx(6e-4)
    (longer,) = steps(subject, learned="none", falling="falling")
    assert config(longer).training.learning_rate == subject.config.training.learning_rate


def test_overfitting(subject):
    earlier, more = steps(subject, gap="harmful", falling="falling")
    assert "step 60" in earlier.why
    found = config(earlier)
    assert (found.training.eval_every, found.training.patience) == (10, 3)
    assert more.command == ""


def test_memorizing(subject):
    evaluate, data = steps(subject, gap="memorized", falling="falling")
    assert config(evaluate).training.eval_every == 10
    assert data.what == "More data"
    evaluated = of(subject, training=TrainingConfig(eval_every=5))
    assert [step.what for step in steps(evaluated, gap="memorized", falling="falling")] == ["More data"]
    assert [step.what for step in steps(evaluated, gap="open", falling="falling")] == ["Train for longer", "More data"]


def test_forgetting(subject):
    (lower,) = steps(subject, forgotten="forgot")
    assert config(lower).training.learning_rate == pytest.approx(1e-4)


def test_nothing_held_out(subject):
    blind = of(subject, data=DataConfig(data=("rows.jsonl",), held_out=0))
    (hold_out,) = steps(blind, learned="unknown", gap="unknown")
    assert config(hold_out).data.held_out == 0.1
