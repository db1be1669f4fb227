"""The supported row formats: recognize the format of a file, check its rows, and convert a row to a conversation.

A file has the format that most of its rows have. A row in another format is an error, because it is probably a mistake.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher, get_close_matches

from lorasmith.data.rows.calls import parse_tools, tools_problem
from lorasmith.data.rows.cells import json_problem, parse_list_cells
from lorasmith.data.rows.conversation import Conversation, Message, Record, RowError, quoted, type_name
from lorasmith.data.rows.messages import messages_problem, not_text, parse_messages
from lorasmith.data.rows.other_methods import media_column, other_method, scores
from lorasmith.data.rows.styles import OPENAI, detect_style
from lorasmith.i18n import _, listed

Fields = Mapping[str, object]


@dataclass(frozen=True)
class RowFormat:
    """A row format.

    required: the columns by which it is recognized; optional: further columns that it reads. problem: why a row is
    invalid, or None. conversation: converts fields; its arguments are those of `to_conversation`.
    """

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    problem: Callable[[Fields], str | None]
    conversation: Callable[[Fields, str, bool], Conversation]

    @property
    def keys(self) -> tuple[str, ...]:
        """All columns that the format reads."""
        return (*self.required, *self.optional)

    @property
    def example(self) -> str:
        """A row in this format, for messages."""
        return "{" + ", ".join(f'"{key}": ...' for key in self.required) + "}"


def _list_format(name: str, key: str) -> RowFormat:
    def problem(fields: Fields) -> str | None:
        text = messages_problem(key, fields[key]) or tools_problem_of(fields) or _text_problem(fields, ())
        return text or _system_problem(fields, key)

    def made(fields: Fields, source: str, _strip: bool) -> Conversation:
        messages = parse_messages(_list(fields[key]))
        return Conversation((*system_messages(fields), *messages), source, tools_of(fields))

    return RowFormat(name, (key,), ("system", "tools", "functions"), problem, made)


def _alpaca_problem(fields: Fields) -> str | None:
    text = _text_problem(fields, ("instruction", "output"), ("input",))
    return text or _empty(fields, "output") or history_problem(fields.get("history"))


def _alpaca(fields: Fields, source: str, strip: bool) -> Conversation:
    messages = parse_messages([*alpaca_messages(fields, strip), *as_messages(str(fields["output"]), "assistant")])
    return Conversation((*system_messages(fields), *messages), source)


def alpaca_messages(fields: Fields, strip: bool) -> list[dict[str, object]]:
    """The user message of an alpaca row, after the pairs of its history. strip: as `to_conversation`."""
    asked = f"{fields['instruction']}\n{fields.get('input') or ''}"
    texts = [str(text) for pair in _list(fields.get("history")) for text in pair]
    texts.append(asked.strip() if strip else asked)
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def _prompt_problem(fields: Fields) -> str | None:
    if not any(isinstance(fields[key], list) for key in ("prompt", "completion")):
        text = _text_problem(fields, ("prompt", "completion")) or _empty(fields, "completion")
        return text or tools_problem_of(fields)
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        messages = fields[key]
        if not isinstance(messages, str | list):
            return _("'{key}' must be text or a list of messages, found {found}.", key=key, found=type_name(messages))
        listed_messages = as_messages(messages, role)
        style = detect_style(list(listed_messages))
        answer = [{style.role: style.answer, style.content: "-"}] if role == "user" else []  # a prompt needs none
        if text := messages_problem(key, [*listed_messages, *answer]):
            return text
    return tools_problem_of(fields) or _text_problem(fields, ()) or _system_problem(fields, "prompt")


def _prompt(fields: Fields, source: str, _strip: bool) -> Conversation:
    """The answers in a prompt of messages are not trained on, as in TRL."""
    if not any(isinstance(fields[key], list) for key in ("prompt", "completion")):
        pair = _pair([str(fields["prompt"]), str(fields["completion"])])
        return Conversation((*system_messages(fields), *pair), source, tools_of(fields))
    before = parse_messages(as_messages(fields["prompt"], "user"))
    prompt = (message._replace(learn=False) if message.role == "assistant" else message for message in before)
    messages = (*prompt, *parse_messages(as_messages(fields["completion"], "assistant")))
    return Conversation((*system_messages(fields), *messages), source, tools_of(fields))


def as_messages(value: object, role: str) -> list[dict[str, object]]:
    """A list of messages; a text is one message of `role`."""
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _plain_problem(fields: Fields) -> str | None:
    return _text_problem(fields, ("text",)) or _empty(fields, "text")


def _plain(fields: Fields, source: str, _strip: bool) -> Conversation:
    return Conversation((), source, text=str(fields["text"]))


# A row with the columns of several formats has the first of them.
FORMATS = (
    _list_format("chat", "messages"),
    _list_format("ShareGPT", "conversations"),
    RowFormat("alpaca", ("instruction", "output"), ("input", "history", "system"), _alpaca_problem, _alpaca),
    RowFormat(
        "prompt/completion", ("prompt", "completion"), ("system", "tools", "functions"), _prompt_problem, _prompt
    ),
    _list_format("ShareGPT", "conversation"),
    RowFormat("text", ("text",), (), _plain_problem, _plain),
)
# Other common names of columns. In an error message, the first one that a row has is suggested.
COLUMN_SYNONYMS = {
    "messages": ("message", "chat", "dialog", "dialogue", "turns"),
    "conversations": ("dialogs", "dialogues"),
    "instruction": (
        "question", "query", "prompt", "ask", "problem", "问题", "指令", "article", "document", "dialogue", "content",
        "user", "human",
    ),
    "input": ("context", "article", "passage"),
    "output": (
        "response", "answer", "completion", "target", "reply", "solution", "label", "回答", "答案", "summary",
        "highlights", "assistant", "gpt",
    ),
    "prompt": ("question", "query", "instruction", "input"),
    "completion": ("response", "answer", "output", "target"),
    "text": ("content", "document"),
    "system": ("system_prompt", "system_message"),
}  # fmt: skip


NO_TEXT = re.compile(r"(^|_)(id|idx|index|uuid|source|url|split|date|hash)$")  # columns that are about a row


def to_conversation(record: Record, strip: bool = True) -> Conversation:
    """The conversation of a record. An alpaca row becomes a user message and an answer, after those of its history.

    strip: remove whitespace around the user message of an alpaca row. Raises RowError if the row has no known format or
    cannot be used.
    """
    row_format = recognize_format([record.fields])
    text = row_problem(record.fields, row_format)
    if text is not None or row_format is None:
        raise RowError(record.source, text or "")
    return row_format.conversation(record.fields, record.source, strip)


def recognize_format(rows: Iterable[Fields]) -> RowFormat | None:
    """The format that most rows have, or None if no row has the columns of any. If two have equally many: the first."""
    filled: Counter[RowFormat] = Counter()
    named: Counter[RowFormat] = Counter()
    for row in rows:
        for counts, columns in ((filled, {key for key in row if row[key] is not None}), (named, row.keys())):
            row_format = format_of(columns)
            counts.update([row_format] if row_format else [])
    votes = filled or named  # columns with only nulls, as in Parquet, count only if no row has values
    return max(FORMATS, key=lambda one: votes[one]) if votes else None


def answer_column(columns: Collection[str]) -> str:
    """The column for the answer in a row that has these other columns, such as 'completion' beside 'prompt'."""
    pairs = (one.required for one in FORMATS if len(one.required) > 1)
    return next((required[-1] for required in pairs if required[0] in columns), "output")


def row_problem(fields: Fields, row_format: RowFormat | None) -> str | None:
    """Why this row is not a valid row in the format `row_format` of its file, as a sentence; None if it is."""
    is_known = format_of(key for key in fields if fields[key] is not None) is not None
    if (text := other_method(fields, is_known)) is not None:
        return text
    if (column := media_column(fields)) is not None:
        return not_text(quoted([column]))
    if row_format is None or not fields.keys() >= set(row_format.required):
        return _columns_problem(fields, row_format)
    return row_format.problem(fields)


def format_of(columns: Iterable[str]) -> RowFormat | None:
    """The first format whose columns are all there."""
    there = set(columns)
    return next((one for one in FORMATS if there.issuperset(one.required)), None)


def _columns_problem(fields: Fields, wanted: RowFormat | None) -> str:
    other = format_of(key for key in fields if fields[key] is not None)
    if wanted is not None and other is not None:
        return _(
            "this row is in {other} format ({found}), but most rows of the file are in {form} format, such as "
            "{example}. Convert it, or move it to a file of its own.",
            other=other.name,
            found=quoted(fields),
            form=wanted.name,
            example=wanted.example,
        )
    text = _("this row has {found}; ", found=quoted(fields) or _("no keys"))
    if wanted is None and (columns := scores(fields)):
        return text + _(
            "it has scores of answers ({columns}), as reward modeling uses them. Keep the rows with good answers, "
            "without these columns.",
            columns=quoted(columns),
        )
    nearest, renamed = _nearest(fields, wanted)
    if wanted is not None:
        text += _(
            "the rows of the file are in {form} format, such as {example}.", form=wanted.name, example=wanted.example
        )
    elif nearest is None:
        return text + _other_columns(fields)
    else:
        text += _("the closest format is {form}, such as {example}.", form=nearest.name, example=nearest.example)
    for key, meant in renamed.items():
        text += " " + _("Should '{key}' be '{wanted}'?", key=key, wanted=meant)
    if renamed and wanted is None:
        words = " ".join(f"{meant}={key}" for key, meant in renamed.items())
        text += " " + _("If so, use --map {words}.", words=words)
    return text


def _other_columns(fields: Fields) -> str:
    """What to do with columns that nobody knows: with their names if just two can be a question and its answer."""
    columns = [key for key in fields if isinstance(fields[key], str) and not NO_TEXT.search(key.lower())]
    renamed = dict(zip(columns, ("instruction", "output"), strict=False))
    is_clear = len(columns) == 2 and OPENAI.roles.keys().isdisjoint(map(str.lower, columns))
    words = columns if is_clear and _is_read(fields, renamed) else ["COLUMN", "COLUMN"]
    return _(
        "supported formats are {examples}. Say which column is which, for example: --map "
        "instruction={first} output={second}",
        examples=listed(dict.fromkeys(one.example for one in FORMATS)),
        first=words[0],
        second=words[1],
    )


def _nearest(fields: Fields, wanted: RowFormat | None) -> tuple[RowFormat | None, dict[str, str]]:
    """The format of which the row has the most columns, and those that have other names, as {theirs: ours}.

    Other names are only given if the row can be read with them, and no column is left that another format would use.
    wanted: the format, if it is known.
    """

    def there(row_format: RowFormat) -> int:
        return sum(key in fields for key in row_format.required)

    def used(row_format: RowFormat) -> set[str]:
        return {*guesses[row_format], *(key for key in row_format.keys if key in fields)}

    guesses = {one: _renamed(fields, one) for one in ([wanted] if wanted else FORMATS)}
    known = set[str]().union(*map(used, guesses))
    best_first = sorted(guesses, key=there, reverse=True)
    for one in best_first:
        if guesses[one] and used(one) == known and _is_read(fields, guesses[one]):
            return one, guesses[one]
    return (best_first[0] if there(best_first[0]) else None), {}


def _is_read(fields: Fields, renamed: Mapping[str, str]) -> bool:
    """Whether the row would be valid with these columns renamed, as {theirs: ours}."""
    row = {renamed.get(key, key): value for key, value in fields.items()}
    row_format = format_of(row)
    return row_format is not None and row_problem(parse_list_cells(row), row_format) is None


def _renamed(fields: Fields, row_format: RowFormat) -> dict[str, str]:
    """Columns of the row that probably are columns of the format: by a synonym, or else by a similar spelling."""
    found: dict[str, str] = {}
    lowered = {key.lower(): key for key in fields if key not in row_format.keys}
    for wanted in row_format.keys:
        if wanted in fields:
            continue
        left = {name: key for name, key in lowered.items() if key not in found}
        names = [wanted, *COLUMN_SYNONYMS.get(wanted, ())]
        name = next((name for name in names if name in left), None) or _closest(wanted, left)
        if name is not None:
            found[left[name]] = wanted
    return found


def _closest(wanted: str, names: Iterable[str]) -> str | None:
    """The name with the most similar spelling; None if none is, or two are equally, as 'text_a' and 'text_b'."""
    near = get_close_matches(wanted, list(names), 2, 0.75)
    ratios = {SequenceMatcher(None, name, wanted).ratio() for name in near}
    return near[0] if len(ratios) == len(near) > 0 else None


def _text_problem(fields: Fields, required: Iterable[str], optional: Iterable[str] = ()) -> str | None:
    """The problem of the first of these columns, or of 'system', that is not text; None if all are."""
    for key in (*required, *optional, "system"):
        value = fields.get(key)
        if value is None and key not in required:
            continue
        if not isinstance(value, str):
            return _("'{key}' must be text, found {found}.", key=key, found=type_name(value))
    return None


def _empty(fields: Fields, key: str) -> str | None:
    if str(fields[key]).strip():
        return None
    return _("'{key}' is empty, so there is nothing to train on. Fill it in, or remove the row.", key=key)


def _system_problem(fields: Fields, key: str) -> str | None:
    """Two system prompts: the column `system`, and the first of the messages under `key`."""
    messages = _list(fields[key]) if fields.get("system") else []
    if not messages or parse_messages(messages)[0].role != "system":
        return None
    return _("'system' is set, but the first message has the role 'system' too. Keep only one of them.")


def history_problem(history: object) -> str | None:
    """Why the pairs of an alpaca row's history are invalid, or None."""
    if not history:
        return None
    if isinstance(history, str) and (text := json_problem("history", history)):
        return text
    if not isinstance(history, list):
        return _("'history' must be a list of pairs [question, answer], found {found}.", found=type_name(history))
    for number, pair in enumerate(history, 1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            return _("'history': item {number} must be a pair of texts [question, answer].", number=number)
        if not pair[1].strip():
            return _(
                "'history': the answer of item {number} is empty. Add an answer, or remove the pair.", number=number
            )
    return None


def tools_problem_of(fields: Fields) -> str | None:
    """The problem of `tools`, or of `functions`, its name in OpenAI's older files."""
    if fields.get("tools") and fields.get("functions"):
        return _("the row has both 'tools' and 'functions'. Keep one of them.")
    return next((text for key in ("tools", "functions") if (text := tools_problem(key, fields.get(key)))), None)


def tools_of(fields: Fields) -> tuple[dict[str, object], ...]:
    """The functions that a row declares."""
    return parse_tools(fields.get("tools") or fields.get("functions"))


def system_messages(fields: Fields) -> tuple[Message, ...]:
    """The system message in the column `system`, if there is one."""
    return (Message("system", str(fields["system"])),) if fields.get("system") else ()


def _pair(texts: list[str]) -> tuple[Message, Message]:
    return Message("user", texts[0]), Message("assistant", texts[1])


def _list(value: object) -> list[dict[str, object]]:
    return value if isinstance(value, list) else []
