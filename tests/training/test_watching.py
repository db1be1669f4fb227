"""What one watches a training by: samples, early stopping, event files. None of them changes a number of it."""

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from lorasmith.adapters.session import open_adapters
from lorasmith.cli.main import main
from lorasmith.config.sampling import SamplingConfig
from lorasmith.data.read.prompts import as_record
from lorasmith.errors import ConfigError, MissingExtraError
from lorasmith.runs.evaluate import EvaluationOptions, evaluate
from lorasmith.training.samples import SAMPLING
from lorasmith.training.summary import read_summary
from tests.support.tiny import Watch, adapter_bytes, flags, losses, metrics, rows_file, settings, trained

PROMPTS = ("Why is the sky blue? (0)", "考试有哪些技巧？")
# dropout would show a generator that was drawn from; so would a mode that stays `eval`
HARD = {"lora_dropout": 0.3, "eval_every": 2, "max_steps": 6, "save_every": 3}
# the first steps help, the later ones do not
WORSE = {"learning_rate": 0.5, "schedule": "constant", "eval_every": 1, "max_steps": 12}


class Crash(Exception):
    pass


def crash_at(step: int) -> Watch:
    def at_step(done: int) -> None:
        if done == step:
            raise Crash

    return Watch(at_step)


def samples(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Watch]:
    run, watch = tmp_path_factory.mktemp("asked") / "run", Watch()
    trained(run, watch, samples=PROMPTS, **HARD)
    return run, watch


@pytest.mark.parametrize("more", [{}, {"gradient_checkpointing": True}])
def test_samples_change_no_number_of_the_training(tmp_path, asked, more):
    with_samples = asked[0]
    if more:
        with_samples = tmp_path / "with"
        trained(with_samples, samples=PROMPTS, **HARD, **more)
    trained(tmp_path / "without", **HARD, **more)
    assert adapter_bytes(with_samples) == adapter_bytes(tmp_path / "without")
    assert metrics(with_samples) == metrics(tmp_path / "without")
    assert not (tmp_path / "without" / "samples.jsonl").exists()


def test_samples_are_what_chat_answers_then(asked):
    run, watch = asked
    found = samples(run)
    assert [(line["step"], line["prompt"]) for line in found] == [(k, p) for k in (0, 2, 4, 6) for p in PROMPTS]
    step = run / "checkpoints" / "step-000006"
    session = open_adapters([step])
    conversations = [session.template.conversation(as_record(prompt)).messages[:-1] for prompt in PROMPTS]
    assert [line["answer"] for line in found if line["step"] == 6] == session.reply(
        conversations, session.names[0], SAMPLING
    )
    assert [line["answer"] for line in found if line["step"] == 0] == session.reply(conversations, None, SAMPLING)
    assert any(PROMPTS[0] in text for text in watch.said)
    assert "Answers after step 6:" in watch.said


def test_samples_without_held_out_rows(tmp_path):
    watch = Watch()
    trained(tmp_path / "run", watch, samples=PROMPTS[:1], held_out=0, eval_every=2)
    assert [line["step"] for line in samples(tmp_path / "run")] == [0, 2, 4]
    assert not [text for text in watch.warned if "nothing is held out" in text]


def test_a_resumed_run_writes_each_sample_once(asked, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(Crash):
        trained(run, crash_at(5), samples=PROMPTS, **HARD)
    assert samples(run)[-1]["step"] == 4
    trained(run, resume=True, samples=PROMPTS, **HARD)
    assert samples(run) == samples(asked[0])
    assert adapter_bytes(run) == adapter_bytes(asked[0])


def test_a_measure_that_fails_midway_loses_nothing(tmp_path):
    run, judge = tmp_path / "run", tmp_path / "judge.py"
    judge.write_text(
        "calls = []\n\n\ndef f(prediction, reference):\n    calls.append(1)\n    return 1 / (len(calls) < 4)\n", "utf-8"
    )
    options = HARD | {"metric": (f"{judge}:f",), "save_every": 0, "generate": 3, "max_new_tokens": 8}
    with pytest.raises(ConfigError, match=r"(?s)judge.py line 6: ZeroDivisionError.*step-000002; fix the problem"):
        trained(run, **options)
    judge.write_text("def f(prediction, reference):\n    return 1\n", "utf-8")
    trained(run, resume=True, **options)
    trained(tmp_path / "without", **HARD)
    assert adapter_bytes(run) == adapter_bytes(tmp_path / "without")


def test_a_prompt_that_is_too_long_stops_the_run_before_its_first_step(tmp_path, capsys):
    files = rows_file(tmp_path / "rows.jsonl")
    options = flags(settings())
    assert main(["train", files, "--output", str(tmp_path / "run"), *options, "--samples", "why " * 200]) == 2
    assert "training.samples: prompt 1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# --- early stopping


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


# --- TensorBoard


def test_without_tensorboard_the_error_names_the_extra_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'lorasmith\[tensorboard\]'"):
        trained(tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()


def test_events_hold_what_metrics_hold_also_after_a_resume(tmp_path):
    reading = import_module("tensorboard.backend.event_processing.event_accumulator")
    run = tmp_path / "run"
    with pytest.raises(Crash):
        trained(run, crash_at(5), tensorboard=True, **HARD)
    trained(run, resume=True, tensorboard=True, **HARD)
    found = reading.EventAccumulator(str(run / "tensorboard")).Reload()
    for name in ("loss", "held_out_loss", "learning_rate"):
        wanted = {line["step"]: line[name] for line in metrics(run) if name in line}
        events = {event.step: event.value for event in found.Scalars(name)}
        assert events == pytest.approx(wanted, rel=1e-6), name  # an event holds float32


# --- held-out rows that are answered

QUIZ = {"generate": 3, "max_new_tokens": 8}
ODD = "def length(prediction, reference):\n    return len(prediction) - len(reference)\n"


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Watch]:
    run, watch = tmp_path_factory.mktemp("judged") / "run", Watch()
    judge = run.with_name("judge.py")
    judge.write_text(ODD, "utf-8")
    trained(run, watch, metric=(f"{judge}:length",), **QUIZ, **HARD)
    return run, watch


def figures(line: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in line.items() if key not in ("step", "held_out_loss")}


def test_answers_to_held_out_rows_are_measured_as_eval_measures_them(judged):
    run, watch = judged
    lines = {line["step"]: figures(line) for line in metrics(run) if "held_out_loss" in line}
    assert list(lines) == [0, 2, 4, 6]
    own = f"{run.parent / 'judge.py'}:length"
    wanted = EvaluationOptions(answers=3, sampling=SamplingConfig(max_new_tokens=8), metrics=(own,))
    (kept,) = evaluate([run], wanted).adapters
    best = lines[read_summary(run).best_step]
    assert list(best) == ["exact", "f1", "chrf", "bleu", "rouge_l", "ended", "judge.py:length"]
    assert list(best.values()) == [score.after for score in kept.scores]
    assert list(lines[0].values()) == [score.before for score in kept.scores]
    assert lines[0] != best
    (said,) = [text for text in watch.said if text.startswith("Scores after step 6 (3 held-out answers): exact match ")]
    assert said.endswith(f"length {lines[6]['judge.py:length']:.4f}")
    assert any(
        text.startswith("answers  replies to 3 rows of the held-out set at every evaluation") for text in watch.said
    )


def test_answering_changes_no_number_of_the_training_and_a_resumed_run_measures_once(judged, tmp_path):
    trained(tmp_path / "without", **HARD)
    assert adapter_bytes(judged[0]) == adapter_bytes(tmp_path / "without")
    bare = [{key: value for key, value in line.items() if key not in figures(line) or "loss" in line}
            for line in metrics(judged[0])]  # fmt: skip
    assert bare == metrics(tmp_path / "without")
    run, options = tmp_path / "run", QUIZ | HARD | {"metric": (f"{judged[0].parent / 'judge.py'}:length",)}
    with pytest.raises(Crash):
        trained(run, crash_at(5), **options)
    trained(run, resume=True, **options)
    assert metrics(run) == metrics(judged[0])


def test_what_cannot_be_answered_is_said_before_the_first_step(tmp_path):
    with pytest.raises(ConfigError, match=r"^training.metric: scores generated answers, but generate is 0"):
        trained(tmp_path / "run", metric=("no.py:f",))
    with pytest.raises(ConfigError, match=r"the file no\.py does not exist"):
        trained(tmp_path / "run", metric=("no.py:f",), generate=2)
    assert not (tmp_path / "run").exists()
    watch = Watch()
    trained(tmp_path / "run", watch, generate=2, held_out=0)
    assert [text for text in watch.warned if text.startswith("training.generate: no examples are held out")]
