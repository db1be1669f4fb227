"""Experiment trackers that also get the numbers of metrics.jsonl: Weights & Biases, SwanLab, MLflow and Trackio.

Each is a package of its own and is imported only when it is asked for. Accounts, servers and offline modes are set as
the tracker itself documents it, usually by environment variables. A tracker that fails later ends no training.
"""

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

from lorasmith.errors import ConfigError, MissingExtraError, first_line
from lorasmith.i18n import _
from lorasmith.report import Report

PROJECT = "lorasmith"  # unless the tracker's own environment variable names another one
SWANLAB_ID = 21  # characters of a run's id in SwanLab
MAX_PARAMETER = 500  # characters of an option's value in MLflow


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run. `id` stays the same when the run is resumed."""

    name: str
    id: str
    options: Mapping[str, Any]


class Tracker(Protocol):
    """One run in one tracker."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record the values of a step."""

    def close(self, failed: bool) -> None:
        """Say that the run has ended; failed: before its last step, or with an error."""


class _WandB:
    def __init__(self, run: TrackedRun) -> None:
        wandb = import_module("wandb")
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        self._run = wandb.init(project=project, name=run.name, id=run.id, resume="allow", config=dict(run.options))

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _SwanLab:
    def __init__(self, run: TrackedRun) -> None:
        swanlab = import_module("swanlab")
        project = os.environ.get("SWANLAB_PROJECT", PROJECT)
        self._run = swanlab.init(
            project=project, experiment_name=run.name, id=run.id[:SWANLAB_ID], resume="allow", config=dict(run.options)
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        if failed:
            self._run.finish(_swanlab_crashed(), error="the training did not finish")
        else:
            self._run.finish()


def _swanlab_crashed() -> Any:
    """How SwanLab wants to be told that a run has failed, which depends on its version."""
    try:
        return import_module("swanlab.data.run").SwanLabRunState.CRASHED
    except ImportError:
        return "crashed"


class _MLflow:
    def __init__(self, run: TrackedRun) -> None:
        mlflow = import_module("mlflow")
        self._client = mlflow.MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self._client.create_experiment(name)
        found = self._client.search_runs([experiment], f"tags.lorasmith_run = '{run.id}'", max_results=1)
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        tags = {"lorasmith_run": run.id}
        self._id = self._client.create_run(experiment, tags=tags, run_name=run.name).info.run_id
        for key, value in run.options.items():
            self._client.log_param(self._id, key, str(value)[:MAX_PARAMETER])

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._client.log_metric(self._id, re.sub(r"[^\w\-. /]", "_", name), value, step=step)

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._id, status="FAILED" if failed else "FINISHED")


class _Trackio:
    def __init__(self, run: TrackedRun) -> None:
        self._trackio = import_module("trackio")
        name = f"{run.name}-{run.id[:8]}"  # Trackio resumes by name, and another run may have the same
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        options = dict(run.options)
        self._run = self._trackio.init(project=project, name=name, resume="allow", config=options, embed=False)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        self._trackio.finish()  # it knows no failed runs; the run's own would be called again when the process ends


_TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "wandb": _WandB, "swanlab": _SwanLab, "mlflow": _MLflow, "trackio": _Trackio
}  # fmt: skip


def require_trackers(names: Sequence[str]) -> None:
    """Raise MissingExtraError that names every package that is not installed."""
    problems = [
        _(
            "training.report_to: the {name} package is not installed. Install it with pip install "
            "'lorasmith[{name}]', or leave it out: metrics.jsonl in the run folder has the same values.",
            name=name,
        )
        for name in names
        if find_spec(name) is None
    ]
    if problems:
        raise MissingExtraError(*problems)


class Trackers:
    """The trackers of one run."""

    def __init__(self, names: Sequence[str], report: Report) -> None:
        self._names, self._report = [name for name in names if name in _TRACKERS], report
        self._open: dict[str, Tracker] = {}

    def open(self, run: TrackedRun) -> None:
        """Begin or resume the run in every tracker. Raises ConfigError if one cannot, before any step is trained."""
        for name in self._names:
            try:
                with redirect_stdout(sys.stderr):  # standard output may be read by a program
                    self._open[name] = _TRACKERS[name](run)
            except Exception as error:  # foreign code can raise anything
                raise ConfigError(
                    _(
                        "training.report_to: {name} could not be started: {why}. Log in to it, choose its offline "
                        "mode, or leave it out.",
                        name=name,
                        why=_why(error),
                    )
                ) from error

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record the values of a step. A tracker that fails is left out from then on, with a warning."""
        for name, tracker in list(self._open.items()):
            try:
                tracker.log(values, step)
            except Exception as error:  # noqa: BLE001 (foreign code, as above)
                del self._open[name]
                self._warn(name, error)

    def close(self, failed: bool = False) -> None:
        """End the run in every tracker; failed: the training was interrupted, or ended with an error."""
        while self._open:
            name, tracker = self._open.popitem()
            try:
                with redirect_stdout(sys.stderr):
                    tracker.close(failed)
            except Exception as error:  # noqa: BLE001 (foreign code, as above)
                self._warn(name, error)

    def _warn(self, name: str, error: Exception) -> None:
        self._report.warn(
            _(
                "{name} failed and gets no more values: {why}. The training goes on; metrics.jsonl in the run folder "
                "has all of them.",
                name=name,
                why=_why(error),
            )
        )


def _why(error: Exception) -> str:
    """The class of the error and the first line of its message."""
    name, text = type(error).__name__, first_line(error).rstrip(".")
    return name if text == name else f"{name}: {text}"
