"""The training loop: early stopping, and when it evaluates and saves."""

from pathlib import Path

import pytest

from lorasmith.config.toml import load_config
from lorasmith.config.training import TrainingConfig
from lorasmith.data.dataset.plan import plan
from lorasmith.errors import ConfigError
from lorasmith.report import Report
from lorasmith.training.assemble import assemble
from lorasmith.training.distributed import World
from lorasmith.training.loop import disk_bytes, is_due
from lorasmith.training.run_files import read_summary
from tests.support.tiny import Crash, Watch, adapter_bytes, crash_at, losses, metrics, trained

# the first steps help, the later ones do not
WORSE = {"learning_rate": 0.5, "schedule": "constant", "eval_every": 1, "max_steps": 12}


@pytest.mark.parametrize(("every", "steps"), [(0, []), (1, [1, 2, 3, 4]), (3, [3]), ("epoch", [2, 4])])
def test_due_every_so_many_steps_or_once_per_epoch_or_never(every, steps):
    made = plan([5, 5, 5], [1, 1, 1], TrainingConfig(batch_size=2, epochs=2), 0, "packed")
    assert made.steps_per_epoch == 2
    assert [step for step in range(1, 5) if is_due(every, step, made)] == steps


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Watch]:
    run, watch = tmp_path_factory.mktemp("impatient") / "run", Watch()
    trained(run, watch, patience=2, **WORSE)
    return run, watch


def test_patience_ends_the_run_and_keeps_the_best(impatient, tmp_path):
    run, watch = impatient
    summary = read_summary(run)
    measured = {line["step"]: line["held_out_loss"] for line in metrics(run) if "held_out_loss" in line}
    best = min((step for step in measured if step), key=lambda step: measured[step])
    assert summary.stopped_early
    assert (summary.best_step, summary.steps) == (best, best + 2)
    assert summary.steps < WORSE["max_steps"], "choose another learning rate: this test needs a run that gets worse"
    assert list(measured) == list(range(summary.steps + 1))  # each step measured once
    assert len(losses(run)) == summary.steps
    assert summary.loss_after == pytest.approx(measured[best])
    kept = run / "checkpoints" / f"best-{best:06d}" / "adapter_model.safetensors"
    assert adapter_bytes(run) == kept.read_bytes()
    (said,) = [text for text in watch.said if text.startswith("Stopped early after step")]
    assert f"since step {best} " in said
    trained(tmp_path / "whole", **WORSE)
    assert losses(tmp_path / "whole")[: summary.steps] == losses(run)
    assert not read_summary(tmp_path / "whole").stopped_early


def test_patience_counts_evaluations_once_per_epoch(tmp_path):
    """Nine rows in steps of three: an epoch has three steps, and patience 1 is one epoch without a better loss."""
    options = WORSE | {"eval_every": "epoch", "batch_size": 3, "max_steps": 30, "patience": 1}
    summary = trained(tmp_path / "run", **options)
    assert summary.stopped_early
    assert summary.steps - summary.best_step == 3


@pytest.mark.parametrize("step", [1, 3])
def test_a_run_that_stops_early_resumes_as_it_would_have_gone_on(impatient, tmp_path, step):
    run = tmp_path / "run"
    options = WORSE | {"patience": 2, "save_every": 1}
    with pytest.raises(Crash):
        trained(run, crash_at(step), **options)
    trained(run, resume=True, **options)
    assert metrics(run) == metrics(impatient[0])
    assert adapter_bytes(run) == adapter_bytes(impatient[0])


def test_killed_between_the_early_stop_and_the_summary(impatient, tmp_path, monkeypatch):
    run = tmp_path / "run"

    def killed(*_args: object) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr("lorasmith.runs.train.plot_loss", killed)
        with pytest.raises(Crash):
            trained(run, patience=2, **WORSE)
    assert read_summary(run) is None
    trained(run, resume=True, patience=2, **WORSE)
    assert metrics(run) == metrics(impatient[0])
    assert read_summary(run).stopped_early
    assert adapter_bytes(run) == adapter_bytes(impatient[0])


def test_patience_needs_evaluations(tmp_path):
    with pytest.raises(ConfigError, match=r"^training.patience: counts evaluations .* eval_every is 0"):
        trained(tmp_path / "run", patience=2)


@pytest.mark.parametrize(("method", "dtype"), [("lora", "float32"), ("full", "float32"), ("full", "bfloat16")])
def test_the_bytes_on_disk_are_foretold(tmp_path, method, dtype):
    """Two checkpoints, one more while it is written, each with its best weights; and the weights at the end."""
    run, seen = tmp_path / "run", list[int]()
    options = {
        "method": method,
        "dtype": dtype,
        "max_steps": 6,
        "save_every": 1,
        "eval_every": 1,
        "keep_checkpoints": 2,
    }

    def measure(_step: int) -> None:
        seen.append(sum(path.stat().st_size for path in run.rglob("*.safetensors")))

    trained(run, Watch(measure), **options)
    measure(6)
    config = load_config(run / "config.toml", {})
    foretold = disk_bytes(assemble(config, tmp_path / "other", Report(), World()).job)
    assert max(seen) < foretold < 2.5 * max(seen)
