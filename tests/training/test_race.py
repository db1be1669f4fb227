"""The race of learning rates: what wins, what it costs, and that the run is one with that rate."""

import json

import pytest

from lorasmith.errors import ConfigError, RunError, TrainingError
from lorasmith.training import race as racing
from tests.support.tiny import Watch, adapter_bytes, metrics, trained

LONG = {"max_steps": 80, "learning_rate": "auto", "warmup": 0.03}


def test_the_run_is_that_of_the_rate_that_won(tmp_path):
    watch = Watch()
    trained(tmp_path / "run", watch, **LONG)
    text = (tmp_path / "run" / "config.toml").read_text("utf-8")
    (line,) = [line for line in text.splitlines() if line.startswith("learning_rate")]
    rate = float(line.split("=")[1])
    assert "# learning_rate: the best of a race over 3 steps; loss on 3 held-out examples: 0.0001: " in text
    shown = {float(said.split()[0]): float(said.split()[1]) for said in watch.said if said.startswith("  ")}
    assert tuple(shown) == (1e-4, 3.2e-4, 1e-3, 3.2e-3, 1e-2)
    assert rate == min(shown, key=lambda one: shown[one])
    trained(tmp_path / "plain", **LONG | {"learning_rate": rate})
    assert metrics(tmp_path / "run") == metrics(tmp_path / "plain")
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "plain")
    saved = json.loads((tmp_path / "run" / "checkpoints" / "step-000080" / "state.json").read_text("utf-8"))
    assert saved["options"]["training.learning_rate"] == json.dumps(rate)
    (tmp_path / "run" / "summary.json").unlink()
    trained(tmp_path / "run", resume=True, **LONG)
    with pytest.raises(RunError, match=r"training\.learning_rate: was"):
        trained(tmp_path / "run", resume=True, **LONG | {"learning_rate": 0.5})


def test_a_short_run_has_no_race(tmp_path):
    watch = Watch()
    trained(tmp_path / "run", watch, learning_rate="auto", max_steps=20)
    text = "the usual value; the run has too few steps (20) for a race of learning rates"
    assert f"Learning rate 0.001: {text}" in watch.said
    config = (tmp_path / "run" / "config.toml").read_text("utf-8")
    assert f"# learning_rate: {text}\nlearning_rate = 0.001\n" in config


def test_the_race_costs_at_most_a_quarter_of_the_training(tmp_path, monkeypatch):
    """Counted in tokens, as if computing rates at once gained nothing; without held-out rows, unseen ones decide."""
    tokens, evaluated, watch = [], [], Watch()
    steps, evaluate = racing.steps_at_once, racing.evaluate_loss

    def counted_steps(pairs):
        tokens.append(sum(job.plan.lengths[i] for job, k in pairs for i in job.plan.members(k)))
        return steps(pairs)

    def counted_losses(base, examples, adapter):
        evaluated.append(sum(e.useful_length for e in examples))
        return evaluate(base, examples, adapter)

    monkeypatch.setattr(racing, "steps_at_once", counted_steps)
    monkeypatch.setattr(racing, "evaluate_loss", counted_losses)
    trained(tmp_path / "run", watch, **LONG | {"held_out": 0, "batch_size": 2, "max_steps": 100})
    assert len(tokens) == 3
    assert len(evaluated) == 5
    whole = metrics(tmp_path / "run")[-1]["tokens"]
    assert sum(tokens) + racing.FORWARD * sum(evaluated) <= 0.25 * whole
    assert any("examples that it did not train on" in text for text in watch.said)


@pytest.mark.parametrize(
    ("option", "changes"),
    [("lora.bias", {"bias": "all"}), ("lora.modules_to_save", {"modules_to_save": ("lm_head",)}),
     ("data.add_tokens", {"add_tokens": ("<|call|>",)})],
)  # fmt: skip
def test_adapters_that_cannot_be_copied_are_refused_by_name(tmp_path, option, changes):
    with pytest.raises(ConfigError, match=f"auto is not possible with {option}"):
        trained(tmp_path / "run", **LONG | changes)


def test_a_race_that_nobody_finishes(tmp_path, monkeypatch):
    monkeypatch.setattr(racing, "TIMES", (1e32, 1e33))
    with pytest.raises(TrainingError, match="no rate of the race gave a finite loss"):
        trained(tmp_path / "run", **LONG)
    assert not (tmp_path / "run" / "config.toml").exists()
