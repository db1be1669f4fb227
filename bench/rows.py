"""The rows: the same files and the same tokens for both programs, encoded by lorasmith's own preparation."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from bench.programs import ROOT
from lorasmith.config.data import DataConfig
from lorasmith.data.dataset.prepare import prepare
from lorasmith.data.read.files import read_records
from lorasmith.data.template.encoding import Template
from lorasmith.loading.folder import eos_ids
from lorasmith.loading.tokenizer import load_tokenizer
from lorasmith.model.row import Example

ALPACA_FILE = ROOT.parent / "shared" / "data" / "alpaca_zh_demo.json"


@dataclass(frozen=True)
class Kind:
    """A sort of rows: its name, lorasmith's template for it, and the tokens that a row is cut to."""

    name: str
    template: str
    max_length: int

    @property
    def flags(self) -> list[str]:
        """The words that both programs take."""
        return ["--template", self.template, "--max-length", str(self.max_length)]


CHAT = Kind("chat", "auto", 128)
ALPACA = Kind("alpaca", "human-assistant", 256)
KINDS = {kind.name: kind for kind in (CHAT, ALPACA)}


@dataclass
class Rows:
    """Rows of one kind as files in `folder`, and how many tokens they hold for the model in `model`."""

    kind: Kind
    records: Sequence[dict[str, Any]]
    model: Path
    folder: Path
    counted: dict[int, int] = field(default_factory=dict)

    def file(self, count: int) -> Path:
        """The first `count` rows as JSONL."""
        path = self.folder / f"{self.kind.name}-{count}.jsonl"
        if not path.is_file():
            lines = (json.dumps(fields, ensure_ascii=False) + "\n" for fields in self.records[:count])
            path.write_text("".join(lines), "utf-8")
        return path

    def tokens(self, count: int) -> int:
        """Tokens of the first `count` rows as they stand after the cut, whatever a program computes of them."""
        if count not in self.counted:
            found = examples(self.file(count), self.kind, self.model, _tokenizer(self.model))
            self.counted[count] = sum(len(example.ids) for example in found)
        return self.counted[count]


def records_of(kind: Kind) -> list[dict[str, Any]] | None:
    """All rows of the demo or of the alpaca file; None where the latter is not there."""
    if kind is ALPACA:
        return [record.fields for record in read_records(ALPACA_FILE)] if ALPACA_FILE.is_file() else None
    from lorasmith.demo.run import demo_files  # here, so that the peer's start does not pay for it
    from lorasmith.report import Report

    return [record.fields for record in read_records(demo_files(Report())[0])]


def examples(file: Path, kind: Kind, model: Path, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """What `lorasmith train` learns from with these flags."""
    template = Template.of(tokenizer, kind.template, eos_ids(model))
    config = DataConfig(
        data=(str(file),), held_out=0, template=template.kind, max_length=kind.max_length, too_long="truncate"
    )
    return prepare(config, template, None).train


def for_trainer(example: Example) -> dict[str, list[int]]:
    """The same ids and labels as Trainer wants them: labels stand at the token itself, not before it."""
    labels = [-100, *example.targets[:-1]]
    return {"input_ids": example.ids, "attention_mask": [1] * len(example.ids), "labels": labels}


@lru_cache(maxsize=4)
def _tokenizer(model: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(model)
