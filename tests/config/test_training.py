"""Law 9: every option of the training changes something that can be seen."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorasmith.config.toml import load_config
from lorasmith.config.training import TrainingConfig
from lorasmith.errors import ConfigError
from lorasmith.lora.layer import LoRALayer
from tests.support.tiny import adapter_bytes, losses, metrics, trained

BASE = {"max_steps": 6, "batch_size": 3, "warmup": 2, "schedule": "linear", "save_every": 0}


def lines(run: Path) -> int:
    return len(losses(run))


def evaluations(run: Path) -> list[float]:
    return [line["step"] for line in metrics(run) if "held_out_loss" in line and line["step"]]


def first_batch(run: Path) -> float:
    return losses(run)[0]


def steps(run: Path) -> int:
    return int(json.loads((run / "summary.json").read_text("utf-8"))["steps"])


def tokens(run: Path) -> int:
    return int(json.loads((run / "summary.json").read_text("utf-8"))["tokens"])


See = Callable[[Path], Any]
# field -> its other value, and where it shows; the rest of the options are BASE (without max_steps for epochs)
CASES: dict[str, tuple[Any, See]] = {
    "batch_size": (2, tokens),
    "accumulate": (2, tokens),
    "epochs": (1.5, steps),
    "max_steps": (4, steps),
    "learning_rate": (5e-3, adapter_bytes),
    "min_learning_rate": (1e-3, adapter_bytes),
    "schedule": ("cosine", adapter_bytes),
    "warmup": (0.5, adapter_bytes),
    "optimizer": ("lion", adapter_bytes),
    "loraplus_lr_ratio": (16.0, adapter_bytes),
    "beta1": (0.8, adapter_bytes),
    "beta2": (0.9, adapter_bytes),
    "eps": (1e-3, adapter_bytes),
    "weight_decay": (0.1, adapter_bytes),
    "clip": (0.01, adapter_bytes),
    "log_every": (3, lines),
    "eval_every": (2, evaluations),
    "seed": (1, first_batch),
}
ELSEWHERE = {"gradient_checkpointing", "row_tokens", "save_every"}  # tests of their own below ...
ELSEWHERE |= {"patience", "samples", "tensorboard"}  # ... and in test_loop.py, test_evaluator.py and test_history.py
ELSEWHERE |= {"generate", "max_new_tokens", "metric"}  # the same
ELSEWHERE |= {"method"}  # in test_full.py and test_preference.py
ELSEWHERE |= {
    "keep_checkpoints",
    "start_from",
    "report_to",
}  # in test_checkpoint.py, test_start_from.py, test_trackers.py


@pytest.fixture(scope="module")
def usual(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("usual") / "run"
    trained(run, **BASE)
    return run


def test_every_option_has_a_case():
    assert CASES.keys() | ELSEWHERE == TrainingConfig.model_fields.keys()


@pytest.mark.parametrize("field", CASES)
def test_every_option_changes_something(usual, tmp_path, field):
    value, see = CASES[field]
    trained(tmp_path / "run", **BASE | ({"max_steps": None} if field == "epochs" else {}) | {field: value})
    assert see(tmp_path / "run") != see(usual)


def test_the_same_options_change_nothing(usual, tmp_path):
    trained(tmp_path / "run", **BASE)
    for see in {see for _value, see in CASES.values()}:
        assert see(tmp_path / "run") == see(usual)
    assert metrics(tmp_path / "run") == metrics(usual)


def test_another_seed_is_another_start_and_another_order(usual, tmp_path):
    trained(tmp_path / "run", seed=1, **BASE)
    assert adapter_bytes(tmp_path / "run") != adapter_bytes(usual)


def calls(monkeypatch: pytest.MonkeyPatch, run: Path, **options: Any) -> int:
    """How often an adapted layer was called in a run."""
    count = 0
    forward = LoRALayer.forward

    def counted(*args: Any, **more: Any) -> Any:
        nonlocal count
        count += 1
        return forward(*args, **more)

    monkeypatch.setattr(
        "lorasmith.training.assemble.enable_fast_parts", lambda base, *_: base.why.update(fast="")
    )  # it computes a few short steps of its own
    monkeypatch.setattr("lorasmith.training.full.check_targets", lambda *_: None)  # as does this
    monkeypatch.setattr(LoRALayer, "forward", counted)
    trained(run, **BASE | {"held_out": 0} | options)
    monkeypatch.undo()
    return count


def test_gradient_checkpointing_computes_twice_and_learns_the_same(tmp_path, monkeypatch):
    once = calls(monkeypatch, tmp_path / "once")
    twice = calls(monkeypatch, tmp_path / "twice", gradient_checkpointing=True)
    assert twice == 2 * once
    assert adapter_bytes(tmp_path / "once") == adapter_bytes(tmp_path / "twice")


def test_too_little_memory_turns_checkpointing_on_and_says_so(tmp_path, monkeypatch):
    from lorasmith.preflight import estimate as expected
    from lorasmith.report import Report
    from lorasmith.system import memory as memory

    heard = []
    monkeypatch.setattr(Report, "warn", lambda self, text: heard.append(text))
    monkeypatch.setattr(memory, "available_mib", lambda _device: 0.0)
    monkeypatch.setattr(expected, "estimate_peak_mib", lambda *_: 1e6)
    twice = calls(monkeypatch, tmp_path / "tight")
    monkeypatch.undo()
    assert any("recomputed in the backward pass" in text for text in heard)
    assert twice == 2 * calls(monkeypatch, tmp_path / "enough")


def test_row_tokens_decides_how_many_forwards_a_step_takes(tmp_path, monkeypatch):
    assert calls(monkeypatch, tmp_path / "short", row_tokens=1) == 3 * calls(monkeypatch, tmp_path / "long")


@pytest.mark.parametrize(
    ("save_every", "wanted"), [(2, [2, 4, 6, 7]), ("epoch", [3, 6, 7]), (0, [7]), (7, [7]), (100, [7])]
)
def test_checkpoints_come_when_they_are_due(tmp_path, monkeypatch, save_every, wanted):
    """Nine rows in steps of three: an epoch has three steps."""
    from lorasmith.training import loop

    saved = []
    save = loop.save

    def seen(job: loop.Job, state: loop.State) -> Path:
        saved.append(state.step)
        return save(job, state)

    monkeypatch.setattr(loop, "save", seen)
    trained(tmp_path / "run", **BASE | {"max_steps": 7, "save_every": save_every})
    assert saved == wanted
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000007"]


@pytest.mark.parametrize(
    ("eval_every", "wanted"), [(2, [2, 4, 6, 7]), ("epoch", [3, 6, 7]), (0, [7]), (3, [3, 6, 7]), (7, [7])]
)
def test_evaluations_come_when_they_are_due(tmp_path, eval_every, wanted):
    """Nine rows in steps of three: an epoch has three steps."""
    trained(tmp_path / "run", **BASE | {"max_steps": 7, "eval_every": eval_every})
    assert evaluations(tmp_path / "run") == wanted


def test_log_every_keeps_the_last_step(tmp_path):
    trained(tmp_path / "run", **BASE | {"log_every": 4, "held_out": 0})
    assert [line["step"] for line in metrics(tmp_path / "run")] == [4, 6]


def test_epochs_may_be_parts(tmp_path):
    for epochs, wanted in ((0.1, 1), (1, 3), (1.5, 5), (2, 6)):
        run = tmp_path / str(epochs)
        trained(run, **BASE | {"max_steps": None, "epochs": epochs, "warmup": 0})
        assert steps(run) == wanted
        assert metrics(run)[wanted]["epoch"] == pytest.approx(wanted / 3)


@pytest.mark.parametrize(
    "field", ["epochs", "warmup", "learning_rate", "weight_decay", "eps", "clip", "beta1", "beta2"]
)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_number_is_finite(field, value):
    with pytest.raises(ConfigError, match=rf"^training\.{field}: invalid value (inf|nan): must be "):
        load_config(None, {"training": {field: value}})


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            {"min_learning_rate": 1e-5, "schedule": "constant"},
            "training.min_learning_rate: has no effect with the constant schedule; set schedule to 'linear' or "
            "'cosine', or remove it",
        ),
        (
            {"min_learning_rate": 1e-3, "learning_rate": 1e-4},
            "training.min_learning_rate: 0.001 is above the peak, learning_rate 0.0001; lower it",
        ),
    ],
)
def test_a_lowest_learning_rate_that_cannot_be_is_refused(options, problem):
    with pytest.raises(ConfigError) as caught:
        load_config(None, {"training": options})
    assert caught.value.problems == (problem,)


def test_a_tracker_is_a_known_one():
    training = load_config(None, {"training": {"report_to": ["wandb", "mlflow"], "tensorboard": True}}).training
    assert training.trackers == ("wandb", "mlflow", "tensorboard")
    assert load_config(None, {"training": {"report_to": ["tensorboard"]}}).training.trackers == ("tensorboard",)
    with pytest.raises(
        ConfigError, match=r"^training\.report_to: unknown tracker 'wandbb': choose from .* Did you mean 'wandb'\?$"
    ):
        load_config(None, {"training": {"report_to": ["wandbb"]}})


@pytest.mark.parametrize(
    ("optimizer", "option"),
    [(name, option) for name in ("adafactor", "muon") for option in ("beta1", "beta2", "eps")] + [("lion", "eps")],
)
def test_an_option_that_the_optimizer_does_not_have_is_refused(optimizer, option):
    with pytest.raises(ConfigError) as caught:
        load_config(None, {"training": {"optimizer": optimizer, option: 0.5}})
    assert caught.value.problems == (f"training.{option}: the optimizer '{optimizer}' does not use it; remove it",)
    default = TrainingConfig.model_fields[option].default
    assert load_config(None, {"training": {"optimizer": optimizer, option: default}}).training.optimizer == optimizer


def test_checkpoints_at_every_so_many_steps_or_none():
    with pytest.raises(ConfigError, match=r"^training\.save_every: invalid value -1: must be at least 0 or 'epoch'$"):
        load_config(None, {"training": {"save_every": -1}})
    assert load_config(None, {"training": {"save_every": 0}}).training.save_every == 0
