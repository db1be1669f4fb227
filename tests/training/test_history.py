"""The history of a run: what a resumed run keeps of it, and TensorBoard's event files."""

import json
from importlib import import_module
from pathlib import Path

import pytest

from lorasmith.errors import RunError
from lorasmith.training.history import History, read_losses, read_scores
from tests.support.tiny import Crash, crash_at, metrics, trained

HARD = {"lora_dropout": 0.3, "eval_every": 2, "max_steps": 6, "save_every": 3}


def recorded(folder):
    """A history of an evaluation of the base model, two steps and two more evaluations."""
    history = History(folder)
    for values in (
        {"step": 0, "held_out_loss": 3.0},
        {"step": 1, "loss": 2.5},
        {"step": 1, "held_out_loss": 2.75},
        {"step": 2, "loss": 2.0},
        {"step": 2, "held_out_loss": 2.25},
    ):
        history.append(values)
    history.append_sample(1, "Why?", "因为")
    history.append_sample(2, "Why?", "Because.")
    return history


def test_losses_are_read_back(tmp_path):
    recorded(tmp_path)
    assert read_losses(tmp_path) == ([(1, 2.5), (2, 2.0)], [(0, 3.0), (1, 2.75), (2, 2.25)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # as while it is being written
    assert read_losses(tmp_path)[0][-1] == (2, 2.0)


@pytest.mark.parametrize(
    ("step", "training", "held_out", "samples"),
    [(0, [], [], []), (1, [1], [0], []), (2, [1, 2], [0, 1], [1]), (3, [1, 2], [0, 1, 2], [1, 2])],
)
def test_rewinding_keeps_what_a_resumed_run_does_not_write_again(tmp_path, step, training, held_out, samples):
    """It evaluates again at the step after which it resumes, because it evaluates before the next step."""
    recorded(tmp_path).rewind(step)
    losses = read_losses(tmp_path)
    assert [[at for at, _loss in points] for points in losses] == [training, held_out]
    lines = (tmp_path / "samples.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == samples


def test_rewinding_keeps_a_line_that_has_no_step(tmp_path):
    history = recorded(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"note": "mine"}\n')
    history.rewind(0)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"note": "mine"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"metrics\.jsonl: cannot be read"),
        ('{"loss": 1.0}\n', "not a valid metrics file"),
        ("{}}\n", "not valid JSON"),
    ],
)
def test_something_else_is_not_a_history(tmp_path, content, message):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(RunError, match=message):
        read_losses(tmp_path)


def test_a_file_that_cannot_be_written_is_an_error_with_its_name(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(RunError, match=r"metrics\.jsonl: cannot be written: Is a directory"):
        History(tmp_path).append({"step": 1, "loss": 2.0})


@pytest.mark.parametrize("option", [{"tensorboard": True}, {"report_to": ("tensorboard",)}])
def test_events_hold_what_metrics_hold_also_after_a_resume(tmp_path, option):
    reading = import_module("tensorboard.backend.event_processing.event_accumulator")
    run = tmp_path / "run"
    with pytest.raises(Crash):
        trained(run, crash_at(5), **option, **HARD)
    trained(run, resume=True, **option, **HARD)
    found = reading.EventAccumulator(str(run / "tensorboard")).Reload()
    for name in ("loss", "held_out_loss", "learning_rate"):
        wanted = {line["step"]: line[name] for line in metrics(run) if name in line}
        events = {event.step: event.value for event in found.Scalars(name)}
        assert events == pytest.approx(wanted, rel=1e-6), name  # an event holds float32


def test_scores_are_those_before_and_of_the_kept_adapter(tmp_path):
    assert read_scores(scored(tmp_path, []), 1) == {}
    run = scored(tmp_path, [(0, 1.0), (2, 3.0), (4, 2.0)])
    assert read_scores(run, 2) == {"f1": (1.0, 3.0)}
    assert read_scores(run, None) == {"f1": (1.0, 2.0)}


def scored(run: Path, scores: list[tuple[int, float]]) -> Path:
    lines = [{"step": step, "held_out_loss": 2.0, "f1": score} for step, score in scores]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [{"step": 1, "loss": 3.0}, *lines]))
    return run
