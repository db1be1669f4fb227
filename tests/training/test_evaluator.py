"""Evaluation during training: samples and custom metrics change no number of it, and nothing is lost."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorasmith.adapters.session import open_adapters
from lorasmith.cli.main import main
from lorasmith.config.sampling import SamplingConfig
from lorasmith.data.read.prompts import as_record
from lorasmith.errors import ConfigError
from lorasmith.evaluation.loss import ExampleLosses
from lorasmith.runs.evaluate import EvaluationOptions, evaluate
from lorasmith.training.checkpoint import read_state
from lorasmith.training.evaluator import SAMPLING, Evaluator
from lorasmith.training.run_files import read_summary
from tests.support.tiny import (
    Crash,
    Watch,
    adapter_bytes,
    crash_at,
    flags,
    metrics,
    model_folder,
    rows_file,
    settings,
    trained,
)

PROMPTS = ("Why is the sky blue? (0)", "考试有哪些技巧？")
# dropout would show a generator that was drawn from; so would a mode that stays `eval`
HARD = {"lora_dropout": 0.3, "eval_every": 2, "max_steps": 6, "save_every": 3}


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


def test_samples_leave_trained_biases_where_the_optimizer_updates_them(tmp_path):
    """Of q, k and v, which decoding fuses, only q and v have a trained bias."""
    options = {"model": str(model_folder("qwen2")), "bias": "lora_only", "target_modules": ("q_proj", "v_proj")}
    trained(tmp_path / "with", samples=PROMPTS, **HARD, **options)
    trained(tmp_path / "without", **HARD, **options)
    assert adapter_bytes(tmp_path / "with") == adapter_bytes(tmp_path / "without")


def test_a_loss_that_is_not_finite_is_never_the_best_and_the_run_can_be_resumed(tmp_path, monkeypatch):
    """Were NaN the best loss, no later loss could be better, and no checkpoint could be read again."""
    losses, run = Evaluator._losses, tmp_path / "run"

    def overflowing(self: Evaluator, adapter: str | None, task: str) -> ExampleLosses:
        found = losses(self, adapter, task)
        return found if adapter is None else replace(found, losses=found.losses * float("nan"))

    monkeypatch.setattr(Evaluator, "_losses", overflowing)
    with pytest.raises(Crash):
        trained(run, crash_at(4), **HARD)
    assert [math.isnan(line["held_out_loss"]) for line in metrics(run) if "held_out_loss" in line] == [False, True]
    monkeypatch.undo()
    state, _origin = read_state(run / "checkpoints" / "step-000003")
    assert state.best_step is None
    assert trained(run, resume=True, **HARD).best_step in (4, 6)


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


# --- held-out rows that are answered

GENERATE = {"generate": 3, "max_new_tokens": 8}
ODD = "def length(prediction, reference):\n    return len(prediction) - len(reference)\n"


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Watch]:
    run, watch = tmp_path_factory.mktemp("judged") / "run", Watch()
    judge = run.with_name("judge.py")
    judge.write_text(ODD, "utf-8")
    trained(run, watch, metric=(f"{judge}:length",), **GENERATE, **HARD)
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
    run, options = tmp_path / "run", GENERATE | HARD | {"metric": (f"{judged[0].parent / 'judge.py'}:length",)}
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
