"""Configurations for `lorasmith check`, and jobs as a training has them, on the tiny model."""

from pathlib import Path
from typing import Any

from lorasmith.config.toml import Config, load_config
from lorasmith.report import Report
from lorasmith.training.assemble import assemble
from lorasmith.training.distributed import World
from lorasmith.training.loop import Job
from tests.support.tiny import settings

SECTIONS = {"model": "model", "dtype": "model", "held_out": "data", "max_length": "data", "too_long": "data"}
SECTIONS |= {
    "target_modules": "lora",
    "target_parameters": "lora",
    "exclude_modules": "lora",
    "output": "",
    "add_tokens": "data",
}


def config(files: str, **changes: Any) -> Config:
    """`settings` with changes as a configuration."""
    values: dict[str, Any] = {"data": {"data": [files]}}
    for name, value in settings(**changes).items():
        section = SECTIONS.get(name, "training")
        (values.setdefault(section, {}) if section else values)[name] = value
    return load_config(None, values)


def job_of(files: str, folder: Path, **changes: Any) -> Job:
    """The job of a training, before its first step."""
    return assemble(config(files, **changes), folder, Report(), World()).job
