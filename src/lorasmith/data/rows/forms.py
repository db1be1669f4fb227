"""The forms of rows that are known, which one a file has, and how a row becomes a conversation.

A file has the form of most of its rows; a row of another form is a mistake to be told, never read in its own way.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice

from lorasmith.data.rows.cells import json_problem
from lorasmith.data.rows.conversation import Conversation, Message, Record, RowError, kind_of, quoted
from lorasmith.data.rows.messages import left_out, messages_of, messages_problem, tools_problem
from lorasmith.i18n import _, listed

Fields = Mapping[str, object]


@dataclass(frozen=True)
class Form:
    """One form: the columns that make it and those that may come with them; what is wrong with a row, what it says,
    and why a row with nothing wrong is left out."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    problem: Callable[[Fields], str | None]
    conversation: Callable[[Fields, str, bool], Conversation]
    left_out: Callable[[Fields], str | None] = lambda _fields: None

    @property
    def keys(self) -> tuple[str, ...]:
        """All columns that it reads."""
        return (*self.required, *self.optional)

    @property
    def example(self) -> str:
        """A row of this form, for a reader."""
        return "{" + ", ".join(f'"{key}": ...' for key in self.required) + "}"


def _list_form(name: str, key: str) -> Form:
    def problem(fields: Fields) -> str | None:
        text = messages_problem(key, fields[key]) or tools_problem(fields.get("tools")) or _text_problem(fields, ())
        if text is None and fields.get("system") and messages_of(_list(fields[key]))[0].role == "system":
            text = _("'system' is set, but the first message has the role 'system' too. Keep only one of them.")
        return text

    def made(fields: Fields, source: str, _strip: bool) -> Conversation:
        messages = messages_of(_list(fields[key]))
        return Conversation((*_system(fields), *messages), source, tuple(_list(fields.get("tools"))))

    return Form(name, (key,), ("system", "tools"), problem, made, lambda fields: left_out(_list(fields[key])))


def _alpaca_problem(fields: Fields) -> str | None:
    text = _text_problem(fields, ("instruction", "output"), ("input",))
    return text or _empty(fields, "output") or _history_problem(fields.get("history"))


def _alpaca(fields: Fields, source: str, strip: bool) -> Conversation:
    asked = f"{fields['instruction']}\n{fields.get('input') or ''}"
    pairs = [[str(text) for text in pair] for pair in _list(fields.get("history"))]
    pairs.append([asked.strip() if strip else asked, str(fields["output"])])
    return Conversation((*_system(fields), *(message for pair in pairs for message in _pair(pair))), source)


def _prompt_problem(fields: Fields) -> str | None:
    return _text_problem(fields, ("prompt", "completion")) or _empty(fields, "completion")


def _prompt(fields: Fields, source: str, _strip: bool) -> Conversation:
    return Conversation((*_system(fields), *_pair([str(fields["prompt"]), str(fields["completion"])])), source)


def _plain_problem(fields: Fields) -> str | None:
    return _text_problem(fields, ("text",)) or _empty(fields, "text")


def _plain(fields: Fields, source: str, _strip: bool) -> Conversation:
    return Conversation((), source, text=str(fields["text"]))


# In the order in which a row that has the columns of several is taken to be one of them.
FORMS = (
    _list_form("chat", "messages"),
    _list_form("ShareGPT", "conversations"),
    Form("alpaca", ("instruction", "output"), ("input", "history", "system"), _alpaca_problem, _alpaca),
    Form("prompt/completion", ("prompt", "completion"), ("system",), _prompt_problem, _prompt),
    Form("text", ("text",), (), _plain_problem, _plain),
)
# What others call the column that a form calls so; the first that fits is told.
OTHER_NAMES = {
    "messages": ("message", "chat", "dialog", "dialogue", "conversation"),
    "conversations": ("conversation",),
    "instruction": ("question", "query", "prompt", "ask", "问题", "指令"),
    "input": ("context",),
    "output": ("response", "answer", "completion", "target", "reply", "label", "回答", "答案"),
    "prompt": ("question", "query", "instruction", "input"),
    "completion": ("response", "answer", "output", "target"),
    "text": ("content", "document"),
}


def conversation(record: Record, strip: bool = True) -> Conversation:
    """The record's messages, or its plain text; an alpaca row is a user message for each question, and its answers.

    `strip=False` keeps the blanks around instruction and input, for a template that strips by its own rule.
    Raises RowError where the row has no known form or nothing to learn from.
    """
    form = recognised([record.fields])
    text = row_problem(record.fields, form) or (form.left_out(record.fields) if form else None)
    if text is not None or form is None:
        raise RowError(record.source, text or "")
    return form.conversation(record.fields, record.source, strip)


def answer_column(columns: Collection[str]) -> str:
    """The column that would hold the answer to a row with these columns: 'completion' where there is a 'prompt'."""
    pairs = (form.required for form in FORMS if len(form.required) > 1)
    return next((required[-1] for required in pairs if required[0] in columns), "output")


def recognised(rows: Iterable[Fields]) -> Form | None:
    """The form of most rows, the first of those that as many rows have; None where no row has the columns of one."""
    filled: Counter[str] = Counter()
    named: Counter[str] = Counter()
    for row in rows:
        for counts, columns in ((filled, {key for key in row if row[key] is not None}), (named, row.keys())):
            form = _form_of(columns)
            counts.update([form.name] if form else [])
    votes = filled or named  # columns of nulls only, as Parquet has them, count where nothing else does
    return max(FORMS, key=lambda form: votes[form.name]) if votes else None


def row_problem(fields: Fields, form: Form | None) -> str | None:
    """Why this row cannot be learned from as `form`, its file's, as a sentence; None where it can."""
    if form is None or not fields.keys() >= set(form.required):
        return _columns_problem(fields, form)
    return form.problem(fields)


def _form_of(columns: Iterable[str]) -> Form | None:
    there = set(columns)
    return next((form for form in FORMS if there.issuperset(form.required)), None)


def _columns_problem(fields: Fields, wanted: Form | None) -> str:
    other = _form_of(key for key in fields if fields[key] is not None)
    if wanted is not None and other is not None:
        return _(
            "this row is in {other} format ({found}), but most rows of the file are in {form} format, such as "
            "{example}. Convert it, or move it to a file of its own.",
            other=other.name,
            found=quoted(fields),
            form=wanted.name,
            example=wanted.example,
        )
    nearest, renamed = wanted or _nearest(fields), dict[str, str]()
    text = _("this row has {found}; ", found=quoted(fields) or _("no keys"))
    if wanted is not None:
        text += _(
            "the rows of the file are in {form} format, such as {example}.", form=wanted.name, example=wanted.example
        )
    elif nearest is None:
        text += _(
            "supported formats are {examples}. Say which column is which, for example: --map "
            "instruction={first} output={second}",
            examples=listed(form.example for form in FORMS),
            first=next(iter(fields), "COLUMN"),
            second=next(islice(fields, 1, None), "COLUMN"),
        )
    else:
        text += _("the closest format is {form}, such as {example}.", form=nearest.name, example=nearest.example)
    if nearest is not None:
        renamed = _renamed(fields, nearest)
    for key, meant in renamed.items():
        text += " " + _("Should '{key}' be '{wanted}'?", key=key, wanted=meant)
    if renamed and wanted is None:
        words = " ".join(f"{meant}={key}" for key, meant in renamed.items())
        text += " " + _("If so, use --map {words}.", words=words)
    return text


def _nearest(fields: Fields) -> Form | None:
    """The form of which most columns are there, under their names or others'; None where there is none at all."""

    def score(form: Form) -> tuple[float, int]:
        there = sum(key in fields for key in form.required)
        return (there + len(set(_renamed(fields, form).values()) & set(form.required))) / len(form.required), there

    best = max(FORMS, key=score)
    return best if score(best)[0] else None


def _renamed(fields: Fields, form: Form) -> dict[str, str]:
    """Which columns of the row are probably which of the form's: by what others call them, else by like letters."""
    found: dict[str, str] = {}
    lowered = {key.lower(): key for key in fields if key not in form.keys}
    for wanted in form.keys:
        if wanted in fields:
            continue
        left = {name: key for name, key in lowered.items() if key not in found}
        names = [wanted, *OTHER_NAMES.get(wanted, ())]
        name = next((name for name in names if name in left), None) or next(
            iter(get_close_matches(wanted, list(left), 1, 0.75)), None
        )
        if name is not None:
            found[left[name]] = wanted
    return found


def _text_problem(fields: Fields, required: Iterable[str], optional: Iterable[str] = ()) -> str | None:
    """The first of these columns, or 'system', that is no text."""
    for key in (*required, *optional, "system"):
        value = fields.get(key)
        if value is None and key not in required:
            continue
        if not isinstance(value, str):
            return _("'{key}' must be text, found {found}.", key=key, found=kind_of(value))
    return None


def _empty(fields: Fields, key: str) -> str | None:
    if str(fields[key]).strip():
        return None
    return _("'{key}' is empty, so there is nothing to train on. Fill it in, or remove the row.", key=key)


def _history_problem(history: object) -> str | None:
    if not history:
        return None
    if isinstance(history, str) and (text := json_problem("history", history)):
        return text
    if not isinstance(history, list):
        return _("'history' must be a list of pairs [question, answer], found {found}.", found=kind_of(history))
    for number, pair in enumerate(history, 1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            return _("'history': item {number} must be a pair of texts [question, answer].", number=number)
        if not pair[1].strip():
            return _(
                "'history': the answer of item {number} is empty. Add an answer, or remove the pair.", number=number
            )
    return None


def _system(fields: Fields) -> tuple[Message, ...]:
    return (Message("system", str(fields["system"])),) if fields.get("system") else ()


def _pair(texts: list[str]) -> tuple[Message, Message]:
    return Message("user", texts[0]), Message("assistant", texts[1])


def _list(value: object) -> list[dict[str, object]]:
    return value if isinstance(value, list) else []
