"""A small general text in English and Chinese, on which `lorasmith eval --forget` detects forgetting.

general.jsonl was written for lorasmith and is free for any use (CC0 1.0).
"""

from importlib.resources import files
from typing import TYPE_CHECKING

from lorasmith.config.files import parse_json
from lorasmith.model.row import IGNORED, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERAL_TEXT = "general.jsonl"


def general_examples(tokenizer: "PreTrainedTokenizerBase", limit: int | None = None) -> list[Example]:
    """Each text as an example with a loss on every token, truncated to `limit` tokens (None: not truncated)."""
    lines = (files("lorasmith.evaluation") / GENERAL_TEXT).read_text("utf-8").splitlines()
    return [_example(tokenizer(parse_json(line)["text"])["input_ids"][:limit], i) for i, line in enumerate(lines, 1)]


def _example(ids: list[int], line: int) -> Example:
    return Example(ids, [*ids[1:], IGNORED], [1.0] * len(ids), f"{GENERAL_TEXT}:{line}")
