"""Measured memory and speed of a training, cached so that the next identical run is estimated from them.

$XDG_CACHE_HOME/lorasmith/measured/KEY.json      one Measurement; at most `FILES` of them

KEY is a hash of everything that memory and speed depend on: model, data, options, machine and versions.
"""

import json
import platform
import sys
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal

import torch
from pydantic import TypeAdapter

from lorasmith.config.files import parse_json
from lorasmith.config.toml import Config
from lorasmith.system.cache import cache_folder, write_cached
from lorasmith.system.memory import peak_memory_mib
from lorasmith.training import loop
from lorasmith.training.loop import Job
from lorasmith.version import installed_version

FORMAT = "1"
FILES = 200
# options that change neither the time of a token nor the memory of a row
IRRELEVANT_OPTIONS = {
    "learning_rate",
    "min_learning_rate",
    "schedule",
    "warmup",
    "beta1",
    "beta2",
    "eps",
    "weight_decay",
    "clip",
    "log_every",
    "keep_checkpoints",
    "report_to",
    "tensorboard",
}


@dataclass(frozen=True)
class Measurement:
    """What was measured; times in seconds.

    start: loading, until the first evaluation; first: what the first row took beyond `token` per token; token,
    held_out_token: one token of training, and of evaluation; save: one checkpoint; by: a dry run or a whole training.
    """

    peak_mib: float
    start: float
    first: float
    token: float
    held_out_token: float
    save: float
    by: Literal["dry step", "training"]


def measurement_path(job: Job, config: Config) -> Path:
    """The cache file of the measurement of `job`."""
    training = {key: value for key, value in job.config.model_dump().items() if key not in IRRELEVANT_OPTIONS}
    parts = {
        "format": FORMAT,
        "version": str(installed_version()),
        "python": sys.version,
        "system": platform.platform(),
        "processor": sorted(name for name, value in torch.cpu.get_capabilities().items() if value is True),
        "base": job.base.identity,
        "settings": job.origin.settings,
        "lora": config.lora.model_dump(mode="json"),
        "training": training | {"steps": len(job.plan)},
    }
    key = sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]
    return cache_folder() / "measured" / f"{key}.json"


def load_measurement(path: Path) -> Measurement | None:
    """The measurement of an earlier run, or None."""
    try:
        return TypeAdapter(Measurement).validate_python(parse_json(path.read_bytes()))
    except (OSError, ValueError):  # pydantic's error and ours are ValueErrors
        return None


def save_measurement(path: Path, measurement: Measurement) -> None:
    """Save it for the next run. A cache that cannot be written is no error: the next check measures again."""
    text = json.dumps(asdict(measurement), indent=2) + "\n"
    write_cached(path, FILES, lambda staging: staging.write_text(text, "utf-8"))


def measurement_of_run(job: Job, start: float, evaluated: float, trained: float, seconds: float) -> Measurement:
    """The measurement of a whole run of `job`.

    start: seconds until the first evaluation; evaluated: seconds of one evaluation; trained: of all steps; seconds: of
    the whole run.
    """
    evaluations, saves = _evaluations(job), _saves(job)
    return Measurement(
        peak_mib=peak_memory_mib(job.base.device),
        start=start,
        first=0.0,
        token=trained / training_tokens(job),
        held_out_token=evaluated / max(1, held_out_tokens(job)),
        save=max(0.0, seconds - start - trained - evaluations * evaluated) / saves,
        by="training",
    )


def estimate_seconds(job: Job, measurement: Measurement) -> dict[str, float]:
    """Seconds of each part of a run, in order."""
    return {
        "start": measurement.start,
        "training": measurement.first + measurement.token * training_tokens(job),
        "evaluation": _evaluations(job) * measurement.held_out_token * held_out_tokens(job),
        "saving": _saves(job) * measurement.save,
    }


def _evaluations(job: Job) -> int:
    """Number of evaluations: before, after, and those of `eval_every` in between."""
    every = loop.steps_between(job.config.eval_every, job.plan)
    return 2 + ((len(job.plan) - 1) // every if every else 0)


def _saves(job: Job) -> int:
    """Number of checkpoints, and the adapter at the end."""
    every = loop.steps_between(job.config.save_every, job.plan)
    return 2 + ((len(job.plan) - 1) // every if every else 0)


def training_tokens(job: Job) -> int:
    """Tokens of the whole training, without those after the last target of an example."""
    return job.plan.total(job.plan.lengths)


def held_out_tokens(job: Job) -> int:
    """Tokens of one evaluation."""
    return sum(example.useful_length for example in job.held_out)
