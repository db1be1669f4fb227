"""Law 7: interrupted and resumed equals uninterrupted, bit for bit; and what Ctrl-C does."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorasmith.errors import Interrupted
from lorasmith.evaluation.loss import HeldOut, held_out
from lorasmith.training.run_folder import read_summary
from tests.support.tiny import Watch, adapter_bytes, flags, metrics, rows_file, settings, trained

STEPS = 8
GO_ON = r"^Interrupted\. Saved progress is in {run}\. Resume with: lorasmith train --output {run} --resume$"
# everything that could make a difference: dropout, recomputation, evaluations, checkpoints, a moving learning rate
HARD = {"lora_dropout": 0.3, "gradient_checkpointing": True, "eval_every": 2, "save_every": 3, "max_steps": STEPS,
        "schedule": "cosine", "warmup": 2, "weight_decay": 0.1}  # fmt: skip
COMMAND = [sys.executable, "-c", "import sys; from lorasmith.cli.main import main; sys.exit(main(sys.argv[1:]))"]


class Crash(Exception):
    """The process dies here: nothing is saved."""


def crash_at(step: int) -> Watch:
    def at_step(done: int) -> None:
        if done == step:
            raise Crash

    return Watch(at_step)


def ctrl_c_at(step: int, times: int = 1) -> Watch:
    def at_step(done: int) -> None:
        for _time in range(times if done == step else 0):
            os.kill(os.getpid(), signal.SIGINT)

    return Watch(at_step)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The run that nothing interrupts."""
    run = tmp_path_factory.mktemp("whole") / "run"
    trained(run, **HARD)
    return run


def assert_same(run: Path, whole: Path) -> None:
    assert metrics(run) == metrics(whole)
    assert adapter_bytes(run) == adapter_bytes(whole)
    ours, theirs = read_summary(run), read_summary(whole)
    assert (ours.loss_before, ours.loss_after, ours.interval) == (
        theirs.loss_before,
        theirs.loss_after,
        theirs.interval,
    )
    assert (ours.steps, ours.tokens) == (theirs.steps, theirs.tokens)


def test_dropout_is_on_and_the_run_has_a_best_step(whole, tmp_path):
    """Otherwise the tests below would show less than they say."""
    trained(tmp_path / "run", **HARD | {"lora_dropout": 0.0})
    assert adapter_bytes(tmp_path / "run") != adapter_bytes(whole)
    assert sum("held_out_loss" in line for line in metrics(whole)) == STEPS // 2 + 1  # and the base before step 1


@pytest.mark.parametrize("step", [1, 3, 4, 6])
def test_ctrl_c_then_resume_equals_uninterrupted(whole, tmp_path, step):
    run = tmp_path / "run"
    with pytest.raises(Interrupted, match=rf"Stopped after step {step + 1}; saved in .*step-00000{step + 1}"):
        trained(run, ctrl_c_at(step), **HARD)
    assert read_summary(run) is None
    trained(run, resume=True, **HARD)
    assert_same(run, whole)


@pytest.mark.parametrize("step", [1, 2, 4, 7, 8])
def test_killed_then_resumed_equals_uninterrupted(whole, tmp_path, step):
    run = tmp_path / "run"
    with pytest.raises(Crash):
        trained(run, crash_at(step), **HARD)
    trained(run, resume=True, **HARD)
    assert_same(run, whole)


def test_interrupted_again_and_again(whole, tmp_path):
    run = tmp_path / "run"
    for step in (2, 4, 6):
        with pytest.raises(Interrupted):
            trained(run, ctrl_c_at(step), resume=step > 2, **HARD)
    with pytest.raises(Crash):
        trained(run, crash_at(8), resume=True, **HARD)
    trained(run, resume=True, **HARD)
    assert_same(run, whole)


def test_killed_between_the_last_step_and_the_summary(whole, tmp_path, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setattr("lorasmith.runs.train.plot_loss", lambda *_args: crash_at(0).at_step(0))
    with pytest.raises(Crash):
        trained(run, **HARD)
    monkeypatch.undo()
    assert (run / "adapter").is_dir()
    assert read_summary(run) is None
    trained(run, resume=True, **HARD)
    assert_same(run, whole)


def test_the_first_ctrl_c_answers_and_the_second_leaves_at_once(whole, tmp_path):
    run, watch = tmp_path / "run", ctrl_c_at(4, times=2)
    with pytest.raises(Interrupted, match=GO_ON.format(run=run)):
        trained(run, watch, **HARD)
    assert [text for text in watch.warned if "press Ctrl-C again to quit immediately" in text]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-000003"]
    trained(run, resume=True, **HARD)
    assert_same(run, whole)


def test_ctrl_c_in_the_last_step_finishes(whole, tmp_path):
    trained(tmp_path / "run", ctrl_c_at(STEPS), **HARD)
    assert_same(tmp_path / "run", whole)


def start(run: Path, **changes: object) -> subprocess.Popen[str]:
    words = [rows_file(run.with_name("rows.jsonl")), "--output", str(run), *flags(settings(**changes))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*COMMAND, "train", *words], stderr=subprocess.PIPE, text=True, env=environment)


def wait_for(ready: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.002)


def lines_of(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def test_ctrl_c_in_a_terminal_says_where_and_exits_130(tmp_path):
    run = tmp_path / "run"
    work = start(run, max_steps=100_000)
    wait_for(lambda: lines_of(run) >= 5)
    work.send_signal(signal.SIGINT)
    _out, err = work.communicate(timeout=30)
    assert work.returncode == 130
    assert "Traceback" not in err
    step, folder = re.search(r"^Stopped after step (\d+); saved in (.*)$", err, re.MULTILINE).groups()
    assert Path(folder) == run / "checkpoints" / f"step-{int(step):06d}"
    assert (run / "checkpoints" / f"step-{int(step):06d}" / "state.json").is_file()
    assert not (run / "adapter").exists()
    assert lines_of(run) == int(step) + 1  # and the base before step 1


def test_sigkill_in_the_middle_then_resume_equals_uninterrupted(tmp_path):
    long = {"max_steps": 300, "save_every": 7, "lora_dropout": 0.2, "eval_every": 20}
    run, whole = tmp_path / "run", tmp_path / "whole"
    work = start(run, **long)
    wait_for(lambda: lines_of(run) >= 40)
    work.kill()
    work.communicate()
    assert read_summary(run) is None
    assert not (run / "adapter").exists()
    assert 40 <= lines_of(run) < 300
    for path in (run / "checkpoints").glob("step-*"):  # whatever has this name is whole
        assert {p.name for p in path.iterdir()} >= {"adapter_model.safetensors", "state.safetensors", "state.json"}
    trained(run, resume=True, **long)
    trained(whole, **long)
    assert_same(run, whole)
    assert not list(run.glob("**/.*"))


@pytest.mark.parametrize(("where", "done"), [("runs.train", 1), ("training.loop", 4)])
def test_ctrl_c_in_the_first_or_the_last_evaluation_says_how_to_go_on(tmp_path, monkeypatch, where, done):
    run, calls = tmp_path / "run", []

    def measured(*args: Any) -> HeldOut:
        calls.append(args)
        if len(calls) == done:
            raise KeyboardInterrupt
        return held_out(*args)

    monkeypatch.setattr(f"lorasmith.{where}.held_out", measured)
    with pytest.raises(Interrupted, match=GO_ON.format(run=run)):
        trained(run, **HARD)
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        patch.setattr("lorasmith.training.assemble.load_base", lambda *_args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(Interrupted, match=GO_ON.format(run=run)):
            trained(run, resume=True, **HARD)


def test_ctrl_c_before_there_is_a_folder_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "lorasmith.training.assemble.load_base", lambda *_args: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt) as stopped:
        trained(tmp_path / "run", **HARD)
    assert str(stopped.value) == ""
    assert not (tmp_path / "run").exists()
