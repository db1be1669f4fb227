"""Law 7: interrupted and resumed equals uninterrupted, bit for bit; and what Ctrl-C does."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lorasmith import train
from lorasmith.config.toml import load_config
from lorasmith.errors import Interrupted, RunError
from lorasmith.evaluation.loss import ExampleLosses, evaluate_loss
from lorasmith.runs.listing import find_runs
from lorasmith.training.run_files import read_summary
from tests.support.experts import moe_folder
from tests.support.tiny import (
    CHATML,
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

STEPS = 8
GO_ON = r"^Interrupted\. Saved progress is in {run}\. Resume with: lorasmith train --output {run} --resume$"
# everything that could make a difference: dropout, recomputation, evaluations, checkpoints, a moving learning rate
HARD = {"lora_dropout": 0.3, "gradient_checkpointing": True, "eval_every": 2, "save_every": 3, "max_steps": STEPS,
        "schedule": "cosine", "warmup": 2, "weight_decay": 0.1}  # fmt: skip
COMMAND = [sys.executable, "-c", "import sys; from lorasmith.cli.main import main; sys.exit(main(sys.argv[1:]))"]


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


def test_experts_resume_like_other_layers(tmp_path):
    options = {"model": str(moe_folder(tmp_path / "model", "mixtral")), "save_every": 2, "max_steps": 5}
    trained(tmp_path / "whole", **options)
    with pytest.raises(Crash):
        trained(tmp_path / "run", crash_at(3), **options)
    trained(tmp_path / "run", resume=True, **options)
    assert_same(tmp_path / "run", tmp_path / "whole")
    without = tmp_path / "without"
    trained(without, **options, exclude_modules=("experts",))
    assert metrics(without) != metrics(tmp_path / "whole")


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


def test_a_run_with_a_named_template_resumes_with_it(tmp_path):
    """The other one gives the same rows as long as there are no tools, but would be stored with the adapter."""
    base = Path(shutil.copytree(model_folder(), tmp_path / "base"))
    loud = CHATML.replace("'<|im_start|>'", "'<|im_start|>!'")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = {"default": CHATML, "loud": loud}
    tokenizer.save_pretrained(base)
    options = {"model": str(base), "template": "loud", "save_every": 1}
    trained(tmp_path / "whole", **options)
    assert load_config(tmp_path / "whole" / "config.toml", {}).data.template == "loud"
    with pytest.raises(Crash):
        trained(tmp_path / "run", crash_at(2), **options)
    train(output=tmp_path / "run", resume=True)
    assert_same(tmp_path / "run", tmp_path / "whole")
    stored = json.loads((tmp_path / "run" / "adapter" / "lorasmith.json").read_text("utf-8"))["template"]
    assert stored["chat_template"] == loud


@pytest.mark.parametrize("save_every", [1, 0], ids=["checkpoint", "no checkpoint"])
def test_a_chat_template_that_changed_is_refused_even_if_the_rows_are_the_same(tmp_path, save_every):
    run, template = tmp_path / "run", tmp_path / "chat.jinja"
    template.write_text(CHATML)
    options = {"template": str(template), "save_every": save_every}
    with pytest.raises(Crash):
        trained(run, crash_at(2), **options)
    template.write_text("{% if tools %}Tools{% endif %}" + CHATML)
    with pytest.raises(RunError) as caught:
        trained(run, resume=True, **options)
    assert caught.value.problems == (
        f"{run}: the chat template has changed since this run started. Restore the original one, or start again with "
        "--overwrite.",
    )
    template.write_text(CHATML)
    trained(run, resume=True, **options)


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
    assert [path.name for path in run.glob("**/.*")] == [".lorasmith"]


@pytest.mark.parametrize("done", [1, 5])
def test_ctrl_c_in_the_first_or_the_last_evaluation_says_how_to_go_on(tmp_path, monkeypatch, done):
    run, calls = tmp_path / "run", []

    def interrupted(*args: Any) -> ExampleLosses:
        calls.append(args)
        if len(calls) == done:
            raise KeyboardInterrupt
        return evaluate_loss(*args)

    monkeypatch.setattr("lorasmith.training.evaluator.evaluate_loss", interrupted)
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


# --- two at once


CHILD = """
import sys, time
from pathlib import Path
from lorasmith.runs import train as run
from lorasmith.cli.main import main
folder, assemble = Path(sys.argv[1]), run.assemble

def together(*given):
    (folder / sys.argv[2]).touch()
    while not (folder / "go").exists():
        time.sleep(0.002)
    return assemble(*given)

run.assemble = together
sys.exit(main(sys.argv[3:]))
"""


def start_at(place: Path, name: str, run: Path, *words: str) -> subprocess.Popen[str]:
    """A training that waits, once its options are read, until `place`/go is there."""
    command = [sys.executable, "-c", CHILD, str(place), name, "train", *words, "--output", str(run)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("verb", ["new", "resume", "overwrite"])
def test_of_two_that_start_at_once_one_trains_and_the_other_says_who(tmp_path, verb):
    run, changes = tmp_path / "run", {"save_every": 1, "max_steps": 4}
    if verb == "resume":
        with pytest.raises(Crash):
            trained(run, crash_at(2), **changes)
    elif verb == "overwrite":
        trained(run, **changes)
    rows = rows_file(tmp_path / "rows.jsonl")
    words = [["--resume"]] * 2 if verb == "resume" else [[rows, *flags(settings(r=r, **changes))] for r in (4, 8)]
    more = ["--overwrite"] if verb == "overwrite" else []
    both = [start_at(tmp_path, f"ready-{n}", run, *words[n], *more) for n in (0, 1)]
    wait_for(lambda: any(work.poll() is not None for work in both) or all(ready(tmp_path)))
    (tmp_path / "go").touch()
    said = [work.communicate(timeout=60)[1] for work in both]
    assert sorted(work.returncode for work in both) == [0, 2], said
    winner = next(n for n in (0, 1) if both[n].returncode == 0)
    assert f"{run} is in use by process {both[winner].pid}. Wait until it has finished, or stop it." in said[1 - winner]
    assert "Traceback" not in "".join(said)
    adapter = json.loads((run / "adapter" / "adapter_config.json").read_text("utf-8"))
    assert load_config(run / "config.toml", {}).lora.r == adapter["r"]
    assert not (run / ".lorasmith.lock").exists()


def ready(place: Path) -> list[bool]:
    return [(place / f"ready-{n}").exists() for n in (0, 1)]


def test_a_list_beside_a_start_never_keeps_it_out_nor_lets_another_in(tmp_path):
    """Somebody looks at the folder all the time."""
    run, stop, states = tmp_path / "run", threading.Event(), list[str]()
    with pytest.raises(Crash):
        trained(run, crash_at(2), save_every=1)

    def look() -> None:
        while not stop.is_set():
            find_runs(tmp_path)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        trained(run, Watch(lambda _step: states.append(find_runs(run)[0].state)), resume=True, save_every=1)
    finally:
        stop.set()
        looking.join()
    assert set(states) == {"running"}
    assert find_runs(run)[0].state == "finished"
