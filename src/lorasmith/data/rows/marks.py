"""Marks on a message that say whether, and how much, it is trained on: ours, and those of other programs.

| key | value | from |
| --- | --- | --- |
| learn | true, false | lorasmith |
| loss | true, false | ms-swift |
| train, training | true, false | Axolotl, ShareGPT files |
| output_with_loss | true, false | XTuner |
| masked | false, true | torchtune; true says not to train on it |
| weight | a number | lorasmith, OpenAI |
| loss_weight | a number | LLaMA-Factory |
| loss_scale | a number | ms-swift |
| train_detail, training_detail | [{"begin_offset", "end_offset", "train"}] | Axolotl |
"""

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

from lorasmith.data.rows.conversation import type_name
from lorasmith.i18n import _

FLAGS = ("learn", "loss", "train", "training", "output_with_loss")
MASKED = "masked"
WEIGHTS = ("weight", "loss_weight", "loss_scale")
DETAILS = ("train_detail", "training_detail")
MARKS = frozenset((*FLAGS, MASKED, *WEIGHTS, *DETAILS))
MAX_WEIGHT = 1_000_000  # more would make all other tokens of a step irrelevant

Spans = tuple[tuple[int, int], ...]


def is_learned(message: Mapping[str, object]) -> bool:
    """Whether no mark says that the message is not to be trained on; its weight may still be 0."""
    if MARKS.isdisjoint(message):
        return True
    details = [one for key in DETAILS for one in _details(message.get(key))]
    is_trained = all(message.get(key) is not False for key in FLAGS) and message.get(MASKED) is not True
    return is_trained and (not details or any(one["train"] for one in details))


def weight_of(message: Mapping[str, object]) -> float:
    """The weight of the message in the loss."""
    if MARKS.isdisjoint(message):
        return 1.0
    values = (message.get(key) for key in WEIGHTS)
    return float(prod(value for value in values if isinstance(value, int | float)))


def masked_spans(message: Mapping[str, object], length: int, parts: Spans = ()) -> Spans:
    """The parts of a content of `length` characters that are not trained on, as half-open spans.

    If there are details, everything that none of them says to train on, as in Axolotl; both offsets are included.
    parts: the spans of the parts of the content that are not trained on.
    """
    details = [one for key in DETAILS for one in _details(message.get(key))]
    if not details and not parts:
        return ()
    kept = sorted((one["begin_offset"], one["end_offset"] + 1) for one in details if one["train"])
    masked = [*(_gaps(kept, length) if details else ()), *parts]
    return tuple(_gaps(list(_gaps(sorted(masked), length)), length))


def _gaps(kept: list[tuple[int, int]], length: int) -> Iterator[tuple[int, int]]:
    """The spans of [0, length) between the ascending spans `kept`."""
    end = 0
    for start, stop in [*kept, (length, length)]:
        if start > end:
            yield end, start
        end = max(end, stop)


def wants_training(message: Mapping[str, object]) -> bool:
    """Whether a mark says that the message is to be trained on."""
    if MARKS.isdisjoint(message):
        return False
    flags, weights = (message.get(key) is True for key in FLAGS), (message.get(key) for key in WEIGHTS)
    details = (one["train"] for key in DETAILS for one in _details(message.get(key)))
    return any(flags) or any(details) or any(isinstance(weight, int | float) and weight > 0 for weight in weights)


def exclusions(message: Mapping[str, object]) -> list[str]:
    """The marks of a message by which it is not trained on."""
    false = [key for key in FLAGS if message.get(key) is False]
    zero = [key for key in WEIGHTS if message.get(key) == 0 and message.get(key) is not False]
    none = [key for key in DETAILS if (found := _details(message.get(key))) and not any(d["train"] for d in found)]
    return [*false, *([MASKED] if message.get(MASKED) is True else []), *zero, *none]


def marks_problem(message: Mapping[str, object], length: int) -> str | None:
    """Why the marks of a message with `length` characters are invalid, as a sentence; else None."""
    for key in (*FLAGS, MASKED):
        value = message.get(key)
        if value is not None and not isinstance(value, bool):
            return _("'{key}' must be true or false, found {found}.", key=key, found=type_name(value))
    for key in WEIGHTS:
        weight = message.get(key)
        if weight is None:
            continue
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            return _("'{key}' must be a number, found {found}.", key=key, found=type_name(weight))
        if not 0 <= weight <= MAX_WEIGHT:  # False for NaN, too
            shown = str(weight)[:40]
            return _("'{key}' must be between 0 and {most}, found {weight}.", key=key, most=MAX_WEIGHT, weight=shown)
    return next((text for key in DETAILS if (text := _details_problem(key, message.get(key), length))), None)


def _details_problem(key: str, details: object, length: int) -> str | None:
    if details is None:
        return None
    if not isinstance(details, list) or not all(_is_detail(one) for one in details):
        return _(
            "'{key}' must be a list of parts of the text, each like {example}.",
            key=key,
            example='{"begin_offset": 0, "end_offset": 8, "train": false}',
        )
    for number, one in enumerate(details, 1):
        begin, end = one["begin_offset"], one["end_offset"]
        if not 0 <= begin <= end < length:
            return _(
                "'{key}': part {number} is from {begin} to {end}, but the text has the characters 0 to {last}.",
                key=key,
                number=number,
                begin=begin,
                end=end,
                last=length - 1,
            )
    return None


def _is_detail(one: object) -> bool:
    if not isinstance(one, dict) or not isinstance(one.get("train"), bool):
        return False
    return all(type(one.get(key)) is int for key in ("begin_offset", "end_offset"))


def _details(value: object) -> list[dict[str, Any]]:
    return value if isinstance(value, list) else []
