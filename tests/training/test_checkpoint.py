"""Checkpoints: what is one, what is never touched beside them, and which are refused."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasmith import train
from lorasmith.errors import Interrupted, LorasmithError, RunError
from lorasmith.training.checkpoint import State, best_name, drop_old, read_state
from lorasmith.training.run_files import checkpoints_in
from tests.support.tiny import Watch, adapter_bytes, metrics, model_folder, rows_file, settings, trained

OFTEN = {"save_every": 1, "eval_every": 1}


def stopped(run: Path, step: int = 2, **changes: Any) -> None:
    """A run that Ctrl-C stopped after `step` steps."""

    def at_step(done: int) -> None:
        if done == step - 1:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        trained(run, Watch(at_step), **changes)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped after step 2 of 4."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    stopped(run)
    return run


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """The same, for one test, with the rows where they were."""
    return Path(shutil.copytree(made, tmp_path / "run"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing interrupts."""
    run = tmp_path_factory.mktemp("whole") / "run"
    trained(run)
    return run


def state(run: Path) -> Path:
    return run / "checkpoints" / "step-000002" / "state.json"


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


MINE = ("step-notes", "step-000010 keep", "step-000001.bak", "best-of-mine", "best-00", ".git", "step-000003-mine")


def test_what_others_put_beside_and_into_checkpoints_stays_and_ends_no_training(tmp_path, whole):
    run = tmp_path / "run"

    def at_step(step: int) -> None:
        if step == 2:
            for name in MINE:
                (run / "checkpoints" / name).mkdir()
                (run / "checkpoints" / name / "notes").write_text(name)
            (run / "checkpoints" / "best-x.txt").write_text("mine")
            (run / "checkpoints" / "step-000001" / "my notes").write_text("mine")
            (run / "checkpoints" / ".link").symlink_to(tmp_path)
            (run / "checkpoints" / "step-000000").symlink_to(tmp_path)

    trained(run, Watch(at_step), **OFTEN)
    found = names(run / "checkpoints")
    assert found >= {*MINE, "best-x.txt", ".link", "step-000000", "step-000001", "step-000004"}
    assert not found & {"step-000002", "step-000003"}
    assert all((run / "checkpoints" / name / "notes").read_text() == name for name in MINE)
    assert (run / "checkpoints" / "step-000001" / "my notes").read_text() == "mine"
    assert adapter_bytes(run) == adapter_bytes(whole)


def test_resume_touches_no_hidden_entry_of_others(run, whole):
    """git init in a run, resume, and .git is still there; a hidden link is no traceback."""
    for name in (".git", ".vscode", "checkpoints/.git", ".adapter.mine"):
        (run / name).mkdir()
        (run / name / "notes").write_text("mine")
    (run / ".notes").write_text("mine")
    (run / ".link").symlink_to(run.parent)
    (run / ".step-000002.lorasmith-old").symlink_to(run.parent)
    train(output=run, resume=True)
    assert (run / "checkpoints" / ".git" / "notes").read_text() == "mine"
    hidden = {".git", ".vscode", ".adapter.mine", ".notes", ".link", ".step-000002.lorasmith-old", ".lorasmith"}
    assert {name for name in names(run) if name.startswith(".")} == hidden
    assert adapter_bytes(run) == adapter_bytes(whole)


@pytest.mark.parametrize("form", [".{}.old.4242", ".{}.lorasmith-old"])
@pytest.mark.parametrize("new", [".step-000002.4242", ".step-000002.lorasmith-new-abcd1234"])
def test_a_kill_between_two_renames_loses_no_checkpoint(run, whole, form, new):
    """The old copy had given its name away; the new one, beside it, had not got it yet. By 0.1.0 too."""
    place = run / "checkpoints"
    shutil.copytree(place / "step-000002", place / new)
    (place / "step-000002").rename(place / form.format("step-000002"))
    (run / ".metrics.jsonl.4242").write_text("half a li")
    watch = Watch()
    train(output=run, resume=True, report=watch)
    assert "Resuming after step 2 of 4" in watch.said
    assert names(place) == {"step-000004"}
    assert {name for name in names(run) if name.startswith(".")} == {".lorasmith"}
    assert (metrics(run), adapter_bytes(run)) == (metrics(whole), adapter_bytes(whole))


def test_a_step_that_is_saved_again_is_never_without_a_whole_checkpoint(tmp_path, monkeypatch):
    """As an early stop does: at every rename the old or the new copy lies there whole."""
    run, rename, seen = tmp_path / "run", Path.rename, []

    def watched(path: Path, target: Path) -> Path:
        result = rename(path, target)
        if "step-" in path.name and "lorasmith-new-" in path.name:
            seen.append(path.name)
        wholes = [one for one in (run / "checkpoints").iterdir() if (one / "state.json").is_file()]
        assert wholes, f"{path.name} -> {target.name}"
        return result

    again = {"learning_rate": 0.5, "schedule": "constant", "max_steps": 12, "patience": 2, **OFTEN}
    monkeypatch.setattr(Path, "rename", watched)
    assert trained(run, **again).stopped_early
    last = [name[:12] for name in seen][-2:]
    assert last[0] == last[1], "this test needs a step that is saved twice"


# --- how many are kept


@pytest.mark.parametrize(("keep", "wanted"), [(1, [6]), (2, [5, 6]), (4, [3, 4, 5, 6]), (9, [1, 2, 3, 4, 5, 6]),
                                              (0, [1, 2, 3, 4, 5, 6])])  # fmt: skip
def test_the_last_checkpoints_are_kept_with_the_best_adapters_that_they_need(tmp_path, keep, wanted):
    run = tmp_path / "run"
    trained(run, **OFTEN | {"keep_checkpoints": keep, "max_steps": 6})
    steps = checkpoints_in(run / "checkpoints")
    assert [step for step, _folder in steps] == wanted
    for _step, folder in steps:
        state, _origin = read_state(folder)
        assert state.best_loss is None or (run / "checkpoints" / best_name(state)).is_dir()


def test_an_earlier_checkpoint_that_was_kept_resumes_with_the_same_result(tmp_path):
    """The loss gets worse from some step on, so that the best adapter is an old one."""
    run, worse = tmp_path / "run", OFTEN | {"learning_rate": 3.0, "schedule": "constant", "max_steps": 8}
    best = trained(run, **worse | {"keep_checkpoints": 2}).best_step
    assert best < 6, "this test needs a best adapter that is older than the checkpoints"
    first = metrics(run), adapter_bytes(run)
    shutil.rmtree(run / "checkpoints" / "step-000008")
    (run / "summary.json").unlink()
    watch = Watch()
    train(output=run, resume=True, report=watch)
    assert "Resuming after step 7 of 8" in watch.said
    assert (metrics(run), adapter_bytes(run)) == first
    assert names(run / "checkpoints") == {f"best-{best:06d}", "step-000007", "step-000008"}


def test_best_adapters_that_no_checkpoint_needs_are_removed(tmp_path):
    """A checkpoint at step 4 may refer to the best adapter of step 4 or to the one before it, and to no other."""
    for name in ("step-000002", "step-000004", "step-000006", *(f"best-{step:06d}" for step in range(1, 7))):
        (tmp_path / name).mkdir()
    drop_old(tmp_path, State(step=6, best_step=5), keep=2)
    assert names(tmp_path) == {"step-000004", "step-000006", "best-000003", "best-000004", "best-000005"}


# --- what is refused


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '"text"',
        "3",
        "\xff",
        "[" * 100_000,
        '{"version": 1e999}',
        '{"version": ' + "9" * 5000 + "}",
    ],
    ids=["empty", "half", "list", "null", "text", "number", "not UTF-8", "deep", "infinite", "long"],
)
def test_a_state_that_is_no_state_is_one_sentence(run, text):
    state(run).write_bytes(text.encode("latin-1"))
    with pytest.raises(RunError, match=r"state\.json: .*Start again with --overwrite") as caught:
        train(output=run, resume=True)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("step", value) for value in (1, 3, 0, -2, 2.5, "2", None, True, [], 10**400)],
        *[("tokens", value) for value in ("9", None, -1, 0.5)],
        *[("seconds", value) for value in (0, -1, "1", None)],
        *[("best_loss", value) for value in ("low", 1.0, [])],
        *[("best_step", value) for value in ("2", 9, -1)],
        *[("settings", value) for value in (None, [], "x", {"dtype": 3})],
        *[("options", value) for value in (None, [], {"lora.r": 8})],
        *[("version", value) for value in (None, "1", 3, [])],
    ],
)
def test_a_state_with_a_wrong_value_is_one_sentence(run, key, value):
    change(state(run), **{key: value})
    with pytest.raises(RunError, match=r"state\.json: .*Start again with --overwrite") as caught:
        train(output=run, resume=True)
    assert len(caught.value.problems) == 1


def test_a_state_of_settings_that_are_unknown_is_no_traceback(run):
    settings = json.loads(state(run).read_text("utf-8"))["settings"]
    change(state(run), settings=settings | {"new": "thing"})
    assert train(output=run, resume=True).steps == 4


def test_a_checkpoint_of_more_steps_than_the_training_has(run):
    change(state(run), step=9)
    state(run).parent.rename(run / "checkpoints" / "step-000009")
    with pytest.raises(
        RunError, match=r"step-000009: this checkpoint belongs to another run, because this one has only 4 steps"
    ):
        train(output=run, resume=True)


def test_tensors_of_another_type(run):
    path = state(run).with_name("state.safetensors")
    save_file({name: tensor.to(torch.int32) for name, tensor in load_file(path).items()}, path)
    with pytest.raises(RunError, match="the saved adapter does not have the size of the configured one"):
        train(output=run, resume=True)


def test_a_best_adapter_that_is_gone(tmp_path):
    run = tmp_path / "run"
    stopped(run, 3, **OFTEN)
    (best,) = (run / "checkpoints").glob("best-*")
    shutil.rmtree(best)
    with pytest.raises(RunError, match=rf"{best.name} does not exist, but \S+ refers to it as the best adapter so far"):
        train(output=run, resume=True)


def files(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def config_of_base(folder: Path) -> None:
    change(folder / "config.json", rms_norm_eps=0.25)


def weights_of_base(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: t * 1.5 for name, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(("change_base", "part"), [(config_of_base, "config"), (weights_of_base, "tensors")])
@pytest.mark.parametrize(("saved", "version"), [(True, 1), (True, 2), (False, 2)])
def test_a_base_that_changed_since_the_start_is_refused(tmp_path, change_base, part, saved, version):
    """By the settings in state.json, by the adapter's lorasmith.json, and before the first checkpoint."""
    run, base = tmp_path / "run", Path(shutil.copytree(model_folder(), tmp_path / "base"))
    if saved:
        stopped(run, model=str(base))
    else:
        with pytest.raises(ZeroDivisionError):
            trained(run, Watch(lambda step: 1 // (2 - step)), model=str(base))
    if version == 1:
        as_by_0_1_0(state(run))
    change_base(base)
    before = files(run)
    with pytest.raises(RunError, match=rf"the base model {base} has changed since this run began \(in its {part}\)"):
        train(output=run, resume=True)
    assert files(run) == before


def as_by_0_1_0(path: Path) -> None:
    found = json.loads(path.read_text("utf-8"))
    found["settings"] = {k: v for k, v in found["settings"].items() if not k.startswith("base_")}
    del found["options"]
    path.write_text(json.dumps(found | {"version": 1}), "utf-8")


def test_a_checkpoint_of_0_1_0_goes_on(run, whole):
    as_by_0_1_0(state(run))
    (run / ".lorasmith").unlink()
    train(output=run, resume=True)
    assert (metrics(run), adapter_bytes(run)) == (metrics(whole), adapter_bytes(whole))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"seed": 7}, "training.seed: was 7, now 0"),
        ({"learning_rate": 0.5}, "training.learning_rate: was 0.5, now 0.01"),
        ({"lora_alpha": 64}, "lora.lora_alpha: was 64.0, now 16.0"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_what_differs(run, tmp_path, changes, line):
    stopped(tmp_path / "other", **changes)
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(tmp_path / "other" / "checkpoints", run / "checkpoints")
    before = files(run)
    with pytest.raises(RunError, match=r"was saved with options that differ from those in config\.toml") as caught:
        train(output=run, resume=True)
    assert caught.value.problems[1] == line
    assert files(run) == before


def test_options_that_leave_the_adapter_as_it_is_may_change(run):
    text = (run / "config.toml").read_text("utf-8")
    (run / "config.toml").write_text(text.replace('save_every = "epoch"', "save_every = 1"), "utf-8")
    assert train(output=run, resume=True).steps == 4


def test_rows_that_changed_before_the_first_checkpoint_are_refused(tmp_path):
    """Else environment.json would speak of other rows than the run learned from."""
    run = tmp_path / "run"
    with pytest.raises(ZeroDivisionError):
        trained(run, Watch(lambda step: 1 // (2 - step)))
    rows_file(tmp_path / "rows.jsonl", range(1, 13))
    with pytest.raises(RunError, match="the training data has changed since this run started"):
        train(output=run, resume=True)
    (run / "environment.json").write_text("[]", "utf-8")
    with pytest.raises(RunError, match=r"environment\.json: cannot be read: "):
        train(output=run, resume=True)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '"done"', "\xff", "[" * 100_000])
def test_a_broken_summary_is_one_sentence(run, text):
    (run / "summary.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(LorasmithError, match=r"summary\.json: not in the format that training writes: ") as caught:
        train(output=run, resume=True)
    assert len(caught.value.problems) == 1
    (run / "summary.json").unlink()  # as it says
    assert train(output=run, resume=True).steps == 4


def test_the_metrics_are_on_disk_before_the_checkpoint_is(tmp_path, monkeypatch):
    order, fsync = list[str](), os.fsync

    def noted(handle: int) -> None:
        order.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        fsync(handle)

    sync: Callable[[int], None] = noted
    monkeypatch.setattr(os, "fsync", sync)
    trained(tmp_path / "run", max_steps=1, held_out=0)
    assert order.index("metrics.jsonl") < order.index("state.json") < order.index("checkpoints")


def test_settings_of_a_checkpoint_name_the_base(run):
    found = json.loads(state(run).read_text("utf-8"))
    assert {"base_config", "base_tensors", "base_tokenizer"} < found["settings"].keys()
    assert found["options"]["lora.r"] == str(settings().get("r", 8))
