"""Previews of encoded rows: which text is trained on, which is only context, and where a reply stops."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Literal

from lorasmith.data.template.encoding import Template
from lorasmith.i18n import _, listed
from lorasmith.model.row import IGNORED, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SpanKind = Literal["read", "learned", "stop"]


@dataclass(frozen=True)
class TextSpan:
    """A part of a row of one kind: 'read' is context only; 'learned' is trained on, and so is 'stop', a stop token."""

    kind: SpanKind
    text: str


@dataclass(frozen=True)
class RowPreview:
    """One row for display. why: why it is shown; stops: whether its last target is a stop token."""

    why: str
    source: str
    tokens: int
    learned: int
    stops: bool
    pieces: tuple[TextSpan, ...]


def preview_rows(examples: Sequence[Example], template: Template) -> list[RowPreview]:
    """The first row, the longest, and a truncated one if there is any; both answers of a pair."""
    longest = max(range(len(examples)), key=lambda i: examples[i].useful_length)
    truncated = next(
        (i for i, example in enumerate(examples) if not ends_with_stop_token(example, template.stop_ids)), None
    )
    reasons: dict[int, list[str]] = {0: [_("the first row")]}
    if len(examples) > 1 and examples[0].desirable is not None and examples[0].source == examples[1].source:
        reasons = {0: [_("the chosen answer of the first row")], 1: [_("the rejected answer of the first row")]}
    reasons.setdefault(longest, []).append(_("the longest row"))
    if truncated is not None:
        reasons.setdefault(truncated, []).append(_("a truncated row"))
    return [_preview(examples[i], listed(why), template) for i, why in reasons.items()]


def ends_with_stop_token(example: Example, stop_ids: Collection[int]) -> bool:
    """Whether the last target is a stop token; if it is not, the row was truncated."""
    return example.useful_length > 0 and example.targets[example.useful_length - 1] in stop_ids


def text_spans(
    example: Example, tokenizer: "PreTrainedTokenizerBase", stop_ids: Collection[int]
) -> tuple[TextSpan, ...]:
    """The whole row as text, split where its kind changes."""
    kinds: list[SpanKind] = ["read"]
    for target in example.targets[:-1]:  # the target of position i is token i + 1
        kinds.append("read" if target == IGNORED else "stop" if target in stop_ids else "learned")
    spans, end = [], 0
    for kind, group in groupby(kinds):
        start, end = end, end + len(list(group))
        spans.append(TextSpan(kind, _text(tokenizer, example.ids, start, end)))
    return tuple(spans)


def _text(tokenizer: "PreTrainedTokenizerBase", ids: list[int], start: int, end: int) -> str:
    """The text that tokens [start, end) add: decoded alone, some tokenizers drop a leading space."""
    before, whole = (str(tokenizer.decode(ids[:to], clean_up_tokenization_spaces=False)) for to in (start, end))
    if whole.startswith(before):
        return whole[len(before) :]
    return str(tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False))


def _preview(example: Example, why: str, template: Template) -> RowPreview:
    return RowPreview(
        why=why,
        source=example.source,
        tokens=len(example.ids),
        learned=example.n_targets,
        stops=ends_with_stop_token(example, template.stop_ids),
        pieces=text_spans(example, template.tokenizer, template.stop_ids),
    )
