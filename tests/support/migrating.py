"""Configurations of other programs, of our own writing, converted to ours."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorasmith.config.migrate.convert import convert
from lorasmith.config.migrate.migration import Migration
from lorasmith.config.toml import SECTIONS, Config

LLAMA_FACTORY = """
model_name_or_path: org/base
stage: sft
finetuning_type: lora
lora_target: all
dataset: mine
template: qwen3
"""
AXOLOTL = """
base_model: org/base
adapter: lora
lora_r: 16
lora_alpha: 32
sequence_len: 2048
datasets:
  - path: org/rows
    type: chat_template
"""
MS_SWIFT = """
model: org/base
tuner_type: lora
target_modules: all-linear
dataset: org/rows
"""
TRL = """
model_name_or_path: org/base
dataset_name: org/rows
use_peft: true
lora_target_modules: all-linear
assistant_only_loss: true
"""
MLX_LM = """
model: org/base
fine_tune_type: lora
data: org/rows
iters: 600
"""


def is_option(ours: str) -> bool:
    """Whether there is an option of this name, such as "lora.r"."""
    section, dot, name = ours.partition(".")
    return name in SECTIONS[section].model_fields if dot else section in Config.model_fields


def described(folder: Path, entry: str = '{"file_name": "mine.jsonl"}') -> None:
    """Write a dataset_info.json that describes the dataset `mine`, into the folder `data`."""
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "dataset_info.json").write_text(f'{{"mine": {entry}}}', "utf-8")


def converted(
    folder: Path, text: str, name: str = "theirs.yaml", given: Mapping[str, Any] | None = None
) -> tuple[Config, Migration]:
    """Write a file into `folder` and convert it."""
    path = folder / name
    path.write_text(text, "utf-8")
    return convert(path, given or {})
