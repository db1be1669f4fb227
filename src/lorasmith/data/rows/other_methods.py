"""Rows that are made for another kind of training: preference pairs, scored answers, token ids and the like.

They often have the columns of a row format too, so without these checks their bad answers would be learned.
"""

import re
from collections.abc import Collection, Iterable, Mapping

from lorasmith.data.rows.conversation import quoted
from lorasmith.i18n import _

Fields = Mapping[str, object]

# Columns that hold an answer of a pair, and those whose names end in a letter or number that counts the answers.
_ANSWER = "(?:answer|completion|conversation|message|output|response|text)s?"
_CHOSEN = re.compile(rf"(?:chosen|preferred)(?:[_-]{_ANSWER})?|{_ANSWER}[_-](?:chosen|preferred)")
_REJECTED = re.compile(
    rf"(?:rejected|reject|dispreferred|non_preferred)(?:[_-]{_ANSWER})?|{_ANSWER}[_-](?:rejected|dispreferred)"
)
_COUNTED = re.compile(r"(?:answer|completion|output|response)[_-]?([ab]|[jk]|[0-3])")
_SCORES = frozenset({"score", "scores", "rating", "ratings", "reward", "rewards", "helpfulness", "overall_score"})
_LABELS = ("label", "kto_tag", "kto_label")
_BOOLEANS = ("true", "false")  # as text, in CSV
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")


def other_method(fields: Fields, is_known: bool) -> str | None:
    """What training these fields are made for, as a sentence, and what takes them; None if it may be this one.

    is_known: whether they have the columns of a row format; then many other columns are only left over.
    """
    there = [key for key, value in fields.items() if value not in (None, "", [])]
    if columns := _several_answers(fields, there, is_known):
        return _(
            "this is a preference row ({columns}): answers of which one is better, for DPO, ORPO, SimPO or reward "
            "modeling. Training a LoRA adapter on examples learns every answer it gets, so give it rows with good "
            "answers only.",
            columns=quoted(columns),
        )
    if label := next((key for key in there if key in _LABELS and _is_boolean(fields[key])), None):
        return _(
            "this is a row with a true or false '{label}', which marks good and bad answers for KTO. Training a LoRA "
            "adapter on examples learns every answer it gets, so give it the rows with good answers only, without "
            "this column.",
            label=label,
        )
    if is_known:
        return None
    if "input_ids" in there:
        return _(
            "this row holds token ids ('input_ids'), made with some tokenizer and template. lorasmith encodes rows "
            "itself, so give it the texts."
        )
    if {"completions", "labels"} <= {*there}:
        return _("this row has steps and their labels ('completions', 'labels'), for a process reward model.")
    if {"positive", "negative"} <= {*there} or {"pos", "neg"} <= {*there}:
        return _("this row has positive and negative texts, for training an embedding model.")
    return None


def scores(columns: Iterable[str]) -> list[str]:
    """The columns that usually hold scores of answers."""
    return [key for key in columns if key.lower() in _SCORES]


def media_column(fields: Fields) -> str | None:
    """The first column with images, video or audio; None if the row has none."""
    return next((key for key in _MEDIA if fields.get(key) not in (None, "", [])), None)


def _several_answers(fields: Fields, there: Collection[str], is_known: bool) -> list[str]:
    """The columns by which a row has several answers to the same prompt."""
    texts = [key for key in there if isinstance(fields[key], str | list | dict)]
    rejected = [key for key in texts if _REJECTED.fullmatch(key.lower())]
    chosen = [key for key in texts if _CHOSEN.fullmatch(key.lower())]
    counted = [key for key in texts if _COUNTED.fullmatch(key.lower())]
    if rejected:
        return chosen + rejected
    if is_known:
        return [key for key in ("output", "completion") if _is_choice(fields.get(key))]
    choices = [key for key in ("responses", "answers") if _is_choice(fields.get(key))]
    return chosen or (counted if len(counted) > 1 else choices)


def _is_choice(value: object) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(isinstance(one, str) for one in value)


def _is_boolean(value: object) -> bool:
    return isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in _BOOLEANS)
