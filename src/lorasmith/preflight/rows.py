"""Rows as the model sees them: which text is learned, which is only read, and where a reply stops."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Literal

from lorasmith.data.template.encoding import Template
from lorasmith.i18n import _
from lorasmith.model.row import IGNORED, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["read", "learned", "stop"]


@dataclass(frozen=True)
class Piece:
    """Text of one kind. 'stop' is learned too, and a reply ends with it."""

    kind: Kind
    text: str


@dataclass(frozen=True)
class Shown:
    """One row for a reader. `why` it is shown; `stops`: whether its last learned token is a stop token."""

    why: str
    source: str
    tokens: int
    learned: int
    stops: bool
    pieces: tuple[Piece, ...]


def shown_rows(examples: Sequence[Example], template: Template) -> list[Shown]:
    """The first row, the longest, and one that was cut, where there is one."""
    longest = max(range(len(examples)), key=lambda i: examples[i].useful_length)
    cut = next((i for i, example in enumerate(examples) if not stops(example, template.stop_ids)), None)
    reasons: dict[int, list[str]] = {0: [_("the first row")]}
    reasons.setdefault(longest, []).append(_("the longest row"))
    if cut is not None:
        reasons.setdefault(cut, []).append(_("a truncated row"))
    return [_shown(examples[i], ", ".join(why), template) for i, why in reasons.items()]


def stops(example: Example, stop_ids: Collection[int]) -> bool:
    """Whether the last learned token is one that ends a reply; where not, the row was cut."""
    return example.useful_length > 0 and example.targets[example.useful_length - 1] in stop_ids


def pieces_of(example: Example, tokenizer: "PreTrainedTokenizerBase", stop_ids: Collection[int]) -> tuple[Piece, ...]:
    """The whole row as text, split where its kind changes."""
    kinds: list[Kind] = ["read"]
    for target in example.targets[:-1]:  # what position i must predict is token i + 1
        kinds.append("read" if target == IGNORED else "stop" if target in stop_ids else "learned")
    pieces, end = [], 0
    for kind, group in groupby(kinds):
        start, end = end, end + len(list(group))
        pieces.append(Piece(kind, _text(tokenizer, example.ids, start, end)))
    return tuple(pieces)


def _text(tokenizer: "PreTrainedTokenizerBase", ids: list[int], start: int, end: int) -> str:
    """What tokens [start, end) add to the text before them: alone, some tokenizers drop their first blank."""
    before, whole = (str(tokenizer.decode(ids[:to], clean_up_tokenization_spaces=False)) for to in (start, end))
    if whole.startswith(before):
        return whole[len(before) :]
    return str(tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False))


def _shown(example: Example, why: str, template: Template) -> Shown:
    return Shown(
        why=why,
        source=example.source,
        tokens=len(example.ids),
        learned=example.n_targets,
        stops=stops(example, template.stop_ids),
        pieces=pieces_of(example, template.tokenizer, template.stop_ids),
    )
