"""Token ids of texts, in which special tokens that are ordinary text have a mark."""

from typing import TYPE_CHECKING

from lorasmith.data.template.special_tokens import MARK

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_ids(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens that the tokenizer would add; a text is cut at its marks."""
    if not any(texts):
        return [[] for _text in texts]
    if any(MARK in text for text in texts):
        return [_ids_of_pieces(tokenizer, text.split(MARK)) for text in texts]
    found: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return found


def _ids_of_pieces(tokenizer: "PreTrainedTokenizerBase", pieces: list[str]) -> list[int]:
    """Token ids of a text that is cut; none of the pieces after the first gets a blank that begins a text."""
    first, *rest = token_ids(tokenizer, [pieces[0], *(f"\n{piece}" for piece in pieces[1:])])
    line_break = token_ids(tokenizer, ["\n"])[0] if rest else []
    found = list(first)
    for piece, ids in zip(pieces[1:], rest, strict=True):
        goes_on = ids[: len(line_break)] == line_break
        found += ids[len(line_break) :] if goes_on else token_ids(tokenizer, [piece])[0]
    return found


def token_spans(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[tuple[int, int]] | None:
    """Start and end of each token in the text, in characters; None if they are not known."""
    if not tokenizer.is_fast or MARK in text:
        return None
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(encoded["offset_mapping"])
