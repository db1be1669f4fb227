"""A small text on everyday things in English and Chinese, to see what a training made a model forget.

general.jsonl was written for this program and is given to everyone (CC0 1.0).
"""

from importlib.resources import files
from typing import TYPE_CHECKING

from lorasmith.config.files import parse_json
from lorasmith.model.row import IGNORED, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAME = "general.jsonl"


def general_examples(tokenizer: "PreTrainedTokenizerBase", limit: int | None = None) -> list[Example]:
    """Each text as an example in which every token is learned; cut after `limit` tokens, None: never."""
    lines = (files("lorasmith.data") / NAME).read_text("utf-8").splitlines()
    return [_example(tokenizer(parse_json(line)["text"])["input_ids"][:limit], i) for i, line in enumerate(lines, 1)]


def _example(ids: list[int], line: int) -> Example:
    return Example(ids, [*ids[1:], IGNORED], [1.0] * len(ids), f"{NAME}:{line}")
