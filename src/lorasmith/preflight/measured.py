"""What this model, these rows and this machine were measured at, kept between runs; and what follows for a run.

$XDG_CACHE_HOME/lorasmith/measured/KEY.json      one Measured; the key holds all that decides it
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
from lorasmith.system.cache import cache_folder, keep
from lorasmith.system.memory import peak_memory_mib
from lorasmith.training.loop import Job
from lorasmith.version import installed_version

FORMAT = "1"
FILES = 200  # kept; the oldest go
# what changes neither the time of a token nor the memory of a row
INDIFFERENT = {"learning_rate", "schedule", "warmup", "beta1", "beta2", "eps", "weight_decay", "clip", "log_every"}


@dataclass(frozen=True)
class Measured:
    """Seconds and MiB. `first`: what the first rows cost above `token`; `save`: one checkpoint; `by`: who measured."""

    peak_mib: float
    start: float
    first: float
    token: float
    held_out_token: float
    save: float
    by: Literal["dry step", "training"]


def place_of(job: Job, config: Config) -> Path:
    """Where the measurement of `job` lies."""
    training = {key: value for key, value in job.config.model_dump().items() if key not in INDIFFERENT}
    said = {
        "format": FORMAT,
        "version": str(installed_version()),
        "python": sys.version,
        "system": platform.platform(),
        "processor": sorted(name for name, value in torch.cpu.get_capabilities().items() if value is True),
        "base": job.base.identity,
        "settings": job.settings,
        "lora": config.lora.model_dump(mode="json"),
        "training": training | {"steps": len(job.plan)},
    }
    key = sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:32]
    return cache_folder() / "measured" / f"{key}.json"


def recall(place: Path) -> Measured | None:
    """What was measured before, or None."""
    try:
        return TypeAdapter(Measured).validate_python(parse_json(place.read_bytes()))
    except (OSError, ValueError):  # pydantic's and ours are ValueErrors
        return None


def remember(place: Path, measured: Measured) -> None:
    """Keep it for the next run; where the cache cannot be written, the next one measures again."""
    keep(place, FILES, lambda path: path.write_text(json.dumps(asdict(measured), indent=2) + "\n", "utf-8"))


def of_run(job: Job, start: float, evaluated: float, trained: float, seconds: float) -> Measured:
    """What a whole run of `job` came to: seconds until the first evaluation, of it, of all steps, and of everything."""
    evaluations, saves = _evaluations(job), _saves(job)
    return Measured(
        peak_mib=peak_memory_mib(job.base.device),
        start=start,
        first=0.0,
        token=trained / tokens_of(job),
        held_out_token=evaluated / max(1, held_out_tokens(job)),
        save=max(0.0, seconds - start - trained - evaluations * evaluated) / saves,
        by="training",
    )


def seconds_of(job: Job, measured: Measured) -> dict[str, float]:
    """Seconds of the run's parts, in their order."""
    return {
        "start": measured.start,
        "training": measured.first + measured.token * tokens_of(job),
        "evaluation": _evaluations(job) * measured.held_out_token * held_out_tokens(job),
        "saving": _saves(job) * measured.save,
    }


def _evaluations(job: Job) -> int:
    """Before, after, and what eval_every asks for in between."""
    every = job.config.eval_every
    return 2 + ((len(job.plan) - 1) // every if every else 0)


def _saves(job: Job) -> int:
    """Checkpoints, and the adapter at the end."""
    every = job.plan.steps_per_epoch if job.config.save_every == "epoch" else job.config.save_every
    return 2 + ((len(job.plan) - 1) // every if every else 0)


def tokens_of(job: Job) -> int:
    """Tokens of the whole training, those after an example's last learned one left out."""
    return job.plan.total(job.plan.lengths)


def held_out_tokens(job: Job) -> int:
    """Tokens of one evaluation."""
    return sum(example.useful_length for example in job.held_out)
