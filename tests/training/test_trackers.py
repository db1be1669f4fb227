"""Trackers: what each package is told, also after a resume, and that none of them ends a training."""

import os
import signal
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lorasmith.errors import ConfigError, Interrupted, MissingExtraError
from lorasmith.preflight.check import check
from tests.support.checks import config
from tests.support.tiny import CHATML, Crash, Watch, adapter_bytes, crash_at, metrics, model_folder, rows_file, trained

Calls = list[tuple[str, Any]]
EVALUATED = {"eval_every": 2, "max_steps": 4}


class Failure(Exception):
    """As the packages' own errors, it is none of Python's."""


class FakeRun:
    """A run of wandb, swanlab or trackio, which look the same."""

    def __init__(self, calls: Calls, fails_at: int | None) -> None:
        self.calls, self.fails_at = calls, fails_at

    def log(self, values: dict[str, float], step: int) -> None:
        if step == self.fails_at:
            raise Failure("the server is gone\nand more")
        self.calls.append(("log", {"step": step, **values}))

    def finish(self, state: str | None = None, error: str | None = None, exit_code: int = 0) -> None:
        assert (state == "crashed") == (error is not None)
        self.calls.append(("finish", "failed" if exit_code or state == "crashed" else None))


class FakeClient:
    """The client of MLflow, whose experiments and runs outlive it."""

    runs: dict[str, str] = {}  # noqa: RUF012  tag -> id

    def __init__(self, calls: Calls) -> None:
        self.calls = calls

    def get_experiment_by_name(self, name: str) -> SimpleNamespace | None:
        return SimpleNamespace(experiment_id="7") if self.runs else None

    def create_experiment(self, name: str) -> str:
        self.calls.append(("experiment", name))
        return "7"

    def search_runs(self, experiments: list[str], query: str, max_results: int) -> list[SimpleNamespace]:
        (tag,) = [tag for tag in self.runs if query == f"tags.lorasmith_run = '{tag}'"] or [None]
        return [SimpleNamespace(info=SimpleNamespace(run_id=self.runs[tag]))] if tag else []

    def create_run(self, experiment: str, tags: dict[str, str], run_name: str) -> SimpleNamespace:
        self.calls.append(("init", {"name": run_name, "id": tags["lorasmith_run"]}))
        self.runs[tags["lorasmith_run"]] = "run-1"
        return SimpleNamespace(info=SimpleNamespace(run_id="run-1"))

    def update_run(self, run: str, status: str) -> None:
        (tag,) = self.runs
        self.calls.append(("init", {"name": "run", "id": tag}))

    def log_param(self, run: str, key: str, value: str) -> None:
        self.calls.append(("config", (key, value)))

    def log_metric(self, run: str, name: str, value: float, step: int) -> None:
        self.calls.append(("log", {"step": step, name: value}))

    def set_terminated(self, run: str, status: str) -> None:
        self.calls.append(("finish", {"FINISHED": None, "FAILED": "failed"}[status]))


def install(monkeypatch: pytest.MonkeyPatch, name: str, fails_at: int | None = None) -> Calls:
    """A package of this name that only keeps what it is told; with `fails_at` -1 it cannot be started."""
    calls: Calls = []

    def init(**given: Any) -> FakeRun:
        sys.stdout.write("welcome\n")
        if fails_at == -1:
            raise Failure("no API key")
        calls.append(("init", {"name": given.get("name", given.get("experiment_name")), "id": given.get("id")}))
        calls.extend(("config", pair) for pair in given["config"].items())
        assert given["resume"] == "allow"
        return FakeRun(calls, fails_at)

    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.init = init  # type: ignore[attr-defined]
    module.finish = lambda: calls.append(("finish", None))  # type: ignore[attr-defined]
    module.MlflowClient = lambda: FakeClient(calls)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(FakeClient, "runs", {})
    return calls


def logged(calls: Calls) -> Iterator[dict[str, float]]:
    volatile = ("tokens_per_second", "seconds", "peak_memory_mib")
    for kind, values in calls:
        if kind == "log" and (kept := {name: value for name, value in values.items() if name not in volatile}):
            yield kept


@pytest.mark.parametrize("name", ["wandb", "swanlab", "trackio"])
def test_a_tracker_gets_the_options_and_every_number(tmp_path, monkeypatch, capsys, name):
    calls = install(monkeypatch, name)
    trained(tmp_path / "run", report_to=(name,), **EVALUATED)
    assert list(logged(calls)) == metrics(tmp_path / "run")
    assert capsys.readouterr().out == "", "what trackers print goes to standard error"
    assert ("config", ("training.max_steps", 4)) in calls
    assert [kind for kind, _values in calls if kind in ("init", "finish")] == ["init", "finish"]
    assert str(calls[0][1]["name"]).startswith("run")


def test_mlflow_gets_the_options_and_every_number(tmp_path, monkeypatch):
    calls = install(monkeypatch, "mlflow")
    trained(tmp_path / "run", report_to=("mlflow",), **EVALUATED)
    found = {(values["step"], *pair) for values in logged(calls) for pair in values.items() if pair[0] != "step"}
    assert found == {
        (line["step"], name, value)
        for line in metrics(tmp_path / "run")
        for name, value in line.items()
        if name != "step"
    }
    assert ("config", ("training.max_steps", "4")) in calls
    assert calls[0] == ("experiment", "lorasmith")
    assert calls[-1] == ("finish", None)


@pytest.mark.parametrize("name", ["wandb", "swanlab", "mlflow", "trackio"])
def test_a_resumed_run_is_the_same_in_the_tracker_and_a_new_one_is_another(tmp_path, monkeypatch, name):
    calls = install(monkeypatch, name)
    options = {"report_to": (name,), "save_every": 1} | EVALUATED
    with pytest.raises(Crash):
        trained(tmp_path / "run", crash_at(3), **options)
    trained(tmp_path / "run", resume=True, **options)
    first, again = [values for kind, values in calls if kind == "init"]
    assert first == again
    (tmp_path / "a").mkdir()
    trained(tmp_path / "a" / "run", **options)
    other = [values for kind, values in calls if kind == "init"][-1]
    assert other != first
    found = {(values["step"], name) for values in logged(calls) for name in values}
    assert found == {(line["step"], name) for line in metrics(tmp_path / "run") for name in line}


@pytest.mark.parametrize("name", ["wandb", "swanlab", "trackio"])
def test_a_tracker_that_fails_later_is_left_out_with_a_warning(tmp_path, monkeypatch, name):
    calls, watch = install(monkeypatch, name, fails_at=2), Watch()
    trained(tmp_path / "run", watch, report_to=(name,), **EVALUATED)
    (warning,) = [text for text in watch.warned if text.startswith(name)]
    assert warning == (
        f"{name} failed and gets no more values: Failure: the server is gone. The training goes on; metrics.jsonl in "
        "the run folder has all of them."
    )
    assert {values["step"] for values in logged(calls)} == {0, 1}
    trained(tmp_path / "without", **EVALUATED)
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "without")


@pytest.mark.parametrize("name", ["wandb", "swanlab", "trackio"])
def test_a_tracker_that_cannot_be_started_ends_the_run_before_its_first_step(tmp_path, monkeypatch, name):
    install(monkeypatch, name, fails_at=-1)
    with pytest.raises(ConfigError) as caught:
        trained(tmp_path / "run", report_to=(name,))
    assert caught.value.problems == (
        f"training.report_to: {name} could not be started: Failure: no API key. Log in to it, choose its offline mode, "
        "or leave it out.",
    )
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("name", ["wandb", "swanlab", "mlflow"])
@pytest.mark.parametrize("how", ["crash", "Ctrl-C"])
def test_a_run_that_ends_early_has_failed_in_the_tracker_until_it_is_resumed(tmp_path, monkeypatch, name, how):
    calls = install(monkeypatch, name)
    options = {"report_to": (name,), "save_every": 1} | EVALUATED
    stop = (
        crash_at(3) if how == "crash" else Watch(lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 2 else 0)
    )
    with pytest.raises(Crash if how == "crash" else Interrupted):
        trained(tmp_path / "run", stop, **options)
    assert calls[-1] == ("finish", "failed")
    trained(tmp_path / "run", resume=True, **options)
    assert calls[-1] == ("finish", None)


def test_if_a_second_tracker_cannot_be_started_the_first_has_failed(tmp_path, monkeypatch):
    calls = install(monkeypatch, "wandb")
    install(monkeypatch, "swanlab", fails_at=-1)
    with pytest.raises(ConfigError, match="swanlab could not be started"):
        trained(tmp_path / "run", report_to=("wandb", "swanlab"))
    assert calls[-1] == ("finish", "failed")


def test_trackers_get_neither_texts_nor_paths(tmp_path, monkeypatch):
    calls = install(monkeypatch, "wandb")
    held_out, template = rows_file(tmp_path / "held.jsonl", [20, 21]), tmp_path / "chat.jinja"
    template.write_text(CHATML)
    monkeypatch.chdir(tmp_path)
    told = {
        "system": "secret-system",
        "samples": ("secret-sample",),
        "held_out": "held.jsonl",
        "template": "chat.jinja",
    }
    trained(tmp_path / "run", report_to=("wandb",), **told)
    given = dict(value for kind, value in calls if kind == "config")
    assert str(tmp_path) not in str(given)
    assert not [text for text in ("secret", "jsonl", "jinja", str(model_folder()), held_out) if text in str(given)]
    assert (given["lora.r"], given["data.learn"], given["training.max_steps"]) == (8, "answers", 4)


def test_the_id_of_a_run_has_the_length_that_swanlab_wants(tmp_path, monkeypatch):
    calls = install(monkeypatch, "swanlab")
    trained(tmp_path / "run", report_to=("swanlab",), max_steps=1)
    assert len(calls[0][1]["id"]) == 21


def test_packages_that_are_missing_are_named_with_their_extra_and_nothing_is_written(tmp_path, monkeypatch):
    for name in ("wandb", "mlflow", "tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError) as caught:
        trained(tmp_path / "run", report_to=("wandb", "mlflow"), tensorboard=True)
    assert [problem.split("'")[1] for problem in caught.value.problems] == [
        "lorasmith[wandb]", "lorasmith[mlflow]", "lorasmith[tensorboard]"
    ]  # fmt: skip
    assert not (tmp_path / "run").exists()
    problems = check(config(rows_file(tmp_path / "rows.jsonl"), report_to=("wandb",))).problems
    assert problems[0].startswith("training.report_to: the wandb package is not installed.")


def test_a_check_starts_no_tracker(tmp_path, monkeypatch):
    calls = install(monkeypatch, "wandb")
    assert check(config(rows_file(tmp_path / "rows.jsonl"), report_to=("wandb",))).problems == []
    assert calls == []
