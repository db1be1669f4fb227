"""Answers of which only parts are trained on: `Message.masked` says which parts are left out."""

from collections.abc import Sequence
from difflib import Match, SequenceMatcher
from typing import TYPE_CHECKING

from lorasmith.data.rows.conversation import Message, RowError
from lorasmith.data.template.loss_mask import ExampleBuilder
from lorasmith.i18n import _

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Spans = list[tuple[int, int]]


def mask_parts(
    builder: ExampleBuilder, messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase", source: str
) -> None:
    """Give the tokens of masked parts the weight 0. A token that lies only partly in one is trained on, as in Axolotl.

    Raises RowError if it is not known which characters the tokens of such an answer stand for.
    """
    answers = [m for m in messages[builder.first : builder.last + 1] if m.role == "assistant"]
    marked = [(m, span) for m, span in zip(answers, builder.answers, strict=True) if m.masked]
    if not marked:
        return
    if not tokenizer.is_fast:
        raise RowError(
            source, _("training on parts of an answer needs a fast tokenizer. Mark the whole answer instead.")
        )
    encoded = tokenizer(builder.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = encoded["input_ids"]
    if builder.ids[: len(ids)] == ids:
        blocks = [Match(0, 0, len(ids))]
    else:  # such as ids of prompts and answers that were tokenized separately
        blocks = SequenceMatcher(None, builder.ids, ids, autojunk=False).get_matching_blocks()
    at = {block.a + i: encoded["offset_mapping"][block.b + i] for block in blocks for i in range(block.size)}
    for message, (start, end) in marked:
        spans = _in_answer(builder.text[start:end], start, message, source)
        tokens = {i: (a, b) for i, (a, b) in at.items() if a < end and start < b}
        covered = {char for a, b in tokens.values() for char in range(a, b)}
        masked = {char for first, last in spans for char in range(first, last) if not builder.text[char].isspace()}
        if masked - covered or len(tokens) <= max(tokens, default=0) - min(tokens, default=0):
            raise RowError(source, _unknown())
        for i, (a, b) in tokens.items():
            if a < b and any(first <= a and b <= last for first, last in spans):
                builder.weights[i] = 0.0


def _in_answer(answer: str, start: int, message: Message, source: str) -> Spans:
    """The masked parts of a message as spans of the text in which its answer begins at `start`."""
    cut = len(message.content) - len(message.content.lstrip())
    at = answer.rfind(message.content.strip())  # after its reasoning, which may say the same
    if at < 0:
        raise RowError(source, _unknown())
    return [(first - cut + at + start, last - cut + at + start) for first, last in message.masked]


def _unknown() -> str:
    return _(
        "only parts of an answer are to be trained on, but the template or the tokenizer changes its text. Mark the "
        "whole answer instead."
    )
