"""Rows that are made for another kind of training: preference pairs, scored answers, token ids and the like.

They often have the columns of a row format too, so without these checks their bad answers would be learned.
"""

import json
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache

from lorasmith.data.rows.conversation import quoted
from lorasmith.i18n import _

Fields = Mapping[str, object]

_ANSWER = "(?:answer|completion|conversation|message|output|response|text)s?"
_COLUMNS = {
    "chosen": re.compile(rf"(?:chosen|preferred)(?:[_-]{_ANSWER})?|{_ANSWER}[_-](?:chosen|preferred)"),
    "rejected": re.compile(
        rf"(?:rejected|reject|dispreferred|non_preferred)(?:[_-]{_ANSWER})?|{_ANSWER}[_-](?:rejected|dispreferred)"
    ),
    "counted": re.compile(  # one of several answers
        rf"(?:answer|completion|conversation|human_ref|output|response)[_-]?[abjk0-3]|model[_-]?[ab12][_-]{_ANSWER}"
    ),
    "winning": re.compile(
        rf"(?:accepted|best|better|correct|good|pos|positive|winning)[_-]{_ANSWER}|{_ANSWER}[_-](?:best|good|w|win|winner)|"
        "accept|accepted|best|better|good|win|winner|y_w"
    ),
    "losing": re.compile(
        rf"(?:bad|declined|incorrect|losing|neg|negative|worse|worst|wrong)[_-]{_ANSWER}|"
        rf"{_ANSWER}[_-](?:bad|l|lose|loser|worst)|bad|decline|declined|lose|loser|worse|worst|y_l"
    ),
    "several": re.compile("output|completion|responses"),
    "label": re.compile("label"),
    "kto": re.compile("kto_tag|kto_label"),
    "tokens": re.compile("input_ids"),
    "steps": re.compile("completions|labels"),
    "contrast": re.compile("pos|neg|positive|negative"),
}
_SCORE = re.compile("scores?|ratings?|rewards?|helpfulness|overall_score")
_BOOLEANS = ("true", "false")  # as text, in CSV
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")


def other_method(fields: Fields, is_known: bool) -> str | None:
    """What training these fields are made for, as a sentence, and what takes them; None if it may be this one.

    is_known: whether they have the columns of a row format; then many other columns are only left over.
    """
    columns = {kind: [key for key in keys if fields[key]] for kind, keys in _kinds(tuple(fields)).items()}
    if answers := _several_answers(fields, columns, is_known):
        return _(
            "this is a preference row ({columns}): answers of which one is better. Training on examples learns every "
            "answer that it gets. Train on preferences with --method dpo, orpo, simpo or kto, or give rows with good "
            "answers only.",
            columns=quoted(answers),
        )
    if label := _kto_label(fields):
        return _(
            "this row has '{label}': {value}, which marks a good or a bad answer. Training on examples learns every "
            "answer that it gets. Train on such rows with --method kto, or give the rows with good answers only, "
            "without this column.",
            label=label,
            value=json.dumps(fields[label], ensure_ascii=False, default=str)[:40],
        )
    if is_known:
        return None
    if columns.get("tokens"):
        return _(
            "this row holds token ids ('input_ids'), made with some tokenizer and template. lorasmith encodes rows "
            "itself, so give it the texts."
        )
    if len(columns.get("steps", ())) > 1:
        return _("this row has steps and their labels ('completions', 'labels'), for a process reward model.")
    if len(columns.get("contrast", ())) > 1:
        return _("this row has positive and negative texts, for training an embedding model.")
    return None


def answer_columns(fields: Fields) -> list[str]:
    """The columns with several answers to the same prompt, the better one first; empty if there are none."""
    columns = {kind: [key for key in keys if fields[key]] for kind, keys in _kinds(tuple(fields)).items()}
    return _several_answers(fields, columns, is_known=False)


def scores(columns: Iterable[str]) -> list[str]:
    """The columns that usually hold scores of answers."""
    return [key for key in columns if _SCORE.fullmatch(key.lower())]


def labels(columns: Iterable[str]) -> list[str]:
    """The columns that hold a label; if it is 0 or 1, it may mark good and bad answers."""
    return _kinds(tuple(columns)).get("label", [])


def media_column(fields: Fields) -> str | None:
    """The first column with images, video or audio; None if the row has none."""
    return next((key for key in _MEDIA if fields.get(key)), None)


@lru_cache(maxsize=256)
def _kinds(columns: tuple[str, ...]) -> dict[str, list[str]]:
    """The columns of each kind in `_COLUMNS`, without kinds that have none. Nearly all rows of a file have the same."""
    lowered = {key: key.lower().replace(" ", "_") for key in columns}
    found = {kind: [key for key in columns if one.fullmatch(lowered[key])] for kind, one in _COLUMNS.items()}
    return {kind: keys for kind, keys in found.items() if keys}


def _several_answers(fields: Fields, columns: Mapping[str, list[str]], is_known: bool) -> list[str]:
    """The columns by which a row has several answers to the same prompt."""

    def texts(kind: str) -> list[str]:
        return [key for key in columns.get(kind, ()) if isinstance(fields[key], str | list | dict)]

    if texts("rejected"):
        return texts("chosen") + texts("rejected")
    several = [key for key in texts("several") if _is_choice(fields[key])]
    if is_known:
        is_asked = any(isinstance(fields.get(key), str) for key in ("instruction", "prompt"))
        return [key for key in several if key != "responses" and is_asked]
    if texts("winning") and texts("losing"):
        return texts("winning") + texts("losing")
    return texts("chosen") or (texts("counted") if len(texts("counted")) > 1 else several)


def _kto_label(fields: Fields) -> str | None:
    """The column that marks a good or a bad answer: `label` may be anything else, unless it is true or false."""
    kinds = _kinds(tuple(fields))
    found = [key for key in kinds.get("kto", ()) if fields[key] not in (None, "")]
    return next(iter(found + [key for key in kinds.get("label", ()) if _is_boolean(fields[key])]), None)


def _is_choice(value: object) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(isinstance(one, str) for one in value)


def _is_boolean(value: object) -> bool:
    return isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in _BOOLEANS)
