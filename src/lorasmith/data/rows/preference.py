"""Preference rows: which answers to a prompt are better. The forms of TRL, LLaMA-Factory and ms-swift.

    pairs      prompt or instruction or conversations, and chosen and rejected: texts, messages or lists of messages; or
               chosen and rejected alone, each a whole conversation, also in one text as in HH-RLHF; or as in
               ms-swift, messages that end with the chosen answer, and rejected_response or rejected_messages
    rated      any row format with an answer, and label or kto_tag: whether the answer is a good one

Each answer becomes a conversation in which only this answer is trained on.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from itertools import takewhile
from typing import Any

from lorasmith.data.rows.conversation import Conversation, Message, Record, RowError, quoted, type_name
from lorasmith.data.rows.dialogue import dialogue
from lorasmith.data.rows.formats import (
    Fields,
    RowFormat,
    alpaca_messages,
    as_messages,
    format_of,
    history_problem,
    system_messages,
    tools_of,
    tools_problem_of,
)
from lorasmith.data.rows.messages import messages_problem, not_text, parse_messages
from lorasmith.data.rows.other_methods import answer_columns, media_column
from lorasmith.data.rows.styles import detect_style
from lorasmith.i18n import _

Messages = list[Any]

ANSWERS = ("chosen", "rejected")
REJECTED = ("rejected_messages", "rejected_response")  # beside messages that end with the chosen answer
LABELS = ("kto_tag", "label")
PROMPTS = ("conversations", "messages", "instruction", "prompt")
YES, NO = ("true", "1"), ("false", "0")


def preference_format(rows: Iterable[Fields]) -> RowFormat | None:
    """The preference format that most rows have, or None if no row has one."""
    votes = Counter(found for row in rows if (found := _format(_as_pair(row))) is not None)
    return max((PAIRS, RATED), key=lambda one: votes[one]) if votes else None


def preference_problem(fields: Fields, row_format: RowFormat | None, method: str) -> str | None:
    """Why this row cannot be trained on with `method`, as a sentence; None if it can.

    row_format: that of its file.
    """
    if (column := media_column(fields)) is not None:
        return not_text(quoted([column]))
    fields = _as_pair(fields)
    found = _format(fields)
    if found is None:
        return _no_preference(fields, method)
    if found is RATED and method != "kto":
        return _(
            "this row has '{label}', which marks one answer as good or bad. Only --method kto trains on such rows; "
            "{method} needs pairs, such as {example}.",
            label=_label(fields),
            method=method,
            example=PAIRS.example,
        )
    if row_format is not None and found is not row_format:
        return _(
            "this row is in {other} format ({found}), but most rows of the file are in {form} format, such as "
            "{example}. Convert it, or move it to a file of its own.",
            other=found.name,
            found=quoted(fields),
            form=row_format.name,
            example=row_format.example,
        )
    return found.problem(fields)


def answers_of(record: Record, strip: bool = True) -> tuple[Conversation, ...]:
    """The conversations of a row's answers: of a pair the chosen one first. Raises RowError if it cannot be used.

    strip: as in `to_conversation`.
    """
    fields = _as_pair(record.fields)
    found = _format(fields)
    text = _no_preference(fields, "dpo") if found is None else found.problem(fields)
    if text is not None:
        raise RowError(record.source, text)
    if found is RATED:
        return (_rated(fields, record.source, strip),)
    pair = tuple(_answer(fields, record.source, strip, key) for key in ANSWERS)
    if pair[0].messages == pair[1].messages:
        raise RowError(record.source, _equal())
    return pair


def _as_pair(fields: Fields) -> Fields:
    """The row with `chosen` and `rejected` instead of ms-swift's `messages` and what would be rejected."""
    messages = fields.get("messages")
    column = next((key for key in REJECTED if fields.get(key) is not None), None)
    if column is None or not isinstance(messages, list) or fields.keys() & set(ANSWERS):
        return fields
    rejected, style = fields[column], detect_style(messages)
    asked = [number for number, one in enumerate(messages, 1) if style.role_of(one) == "user"]
    if column == "rejected_response" and asked:
        answer = [{style.role: style.answer, style.content: rejected}] if isinstance(rejected, str) else rejected
        rejected = [*messages[: asked[-1]], *answer] if isinstance(answer, list) else answer
    kept = {key: value for key, value in fields.items() if key not in (*REJECTED, "messages")}
    return {**kept, "chosen": messages, "rejected": rejected}


def _format(fields: Fields) -> RowFormat | None:
    if fields.keys() >= set(ANSWERS):
        return PAIRS
    return RATED if _label(fields) and format_of(_unlabelled(fields)) is not None else None


def _label(fields: Fields) -> str | None:
    return next((key for key in LABELS if fields.get(key) is not None), None)


def _unlabelled(fields: Fields) -> dict[str, object]:
    return {key: value for key, value in fields.items() if key not in LABELS and value is not None}


def _no_preference(fields: Fields, method: str) -> str:
    columns = answer_columns(fields)
    if len(columns) == 2:
        return _(
            "this row has {found}; {method} needs pairs, such as {example}. If '{chosen}' is the better answer, use "
            "--map chosen={chosen} rejected={rejected}.",
            found=quoted(fields),
            method=method,
            example=PAIRS.example,
            chosen=columns[0],
            rejected=columns[1],
        )
    if format_of(_unlabelled(fields)) is not None:
        return _(
            "this row has one answer ({found}), and {method} needs to know which answers are better: {example}. To "
            "train on examples, use --method lora.",
            found=quoted(fields),
            method=method,
            example=(RATED if method == "kto" else PAIRS).example,
        )
    return _(
        "this row has {found}; {method} needs rows such as {example}.",
        found=quoted(fields) or _("no keys"),
        method=method,
        example=(RATED if method == "kto" else PAIRS).example,
    )


# -- pairs ----------------------------------------------------------------------------------------------------------


def _pair_problem(fields: Fields) -> str | None:
    fields = _with_messages(fields)
    for key in ANSWERS:
        if not isinstance(fields[key], str | dict | list):
            return _(
                "'{key}' must be text, a message or a list of messages, found {found}.",
                key=key,
                found=type_name(fields[key]),
            )
        if not fields[key] or not str(fields[key]).strip():
            return _("'{key}' is empty, so there is nothing to compare. Fill it in, or remove the row.", key=key)
    if fields["chosen"] == fields["rejected"]:
        return _equal()
    if (text := _prompt_problem(fields) or tools_problem_of(fields)) is not None:
        return text
    prompt, answers = _split(fields, strip=True)
    if not prompt:
        return _(
            "'chosen' and 'rejected' do not begin with the same messages, so they answer different questions. Give the "
            "question in 'prompt', or remove the row."
        )
    for key, messages in answers.items():
        style = detect_style(messages)
        if not messages or style.role_of(messages[0]) not in ("assistant", "call"):
            return _(
                "'{key}' does not begin with an answer after the messages that it shares with the other one. It must "
                "be the answer to the same question.",
                key=key,
            )
        if (text := messages_problem(key, messages)) is not None:
            return text
    return None


def _with_messages(fields: Fields) -> Fields:
    """The row with messages instead of dialogues in one text."""
    read = {key: found for key in ("prompt", *ANSWERS) if (found := dialogue(fields.get(key))) is not None}
    if read.keys() >= set(ANSWERS):  # a prompt beside whole conversations repeats their beginning
        return {key: value for key, value in fields.items() if key != "prompt"} | {key: read[key] for key in ANSWERS}
    if "prompt" not in read:
        return fields
    answers = {key: value.strip() for key in ANSWERS if isinstance(value := fields[key], str)}
    return {**fields, **answers, "prompt": read["prompt"]}


def _prompt_problem(fields: Fields) -> str | None:
    """The problem of the column that holds the prompt, and of those that belong to it."""
    column = _prompt_column(fields)
    if column is None:
        if isinstance(fields["chosen"], list) and isinstance(fields["rejected"], list):
            return None
        return _(
            "'chosen' and 'rejected' are answers without a question. Give it in 'prompt' (text or messages), or "
            "'instruction', or with --map prompt=COLUMN, or make 'chosen' and 'rejected' whole conversations: lists of "
            "messages."
        )
    wanted = (str,) if column == "instruction" else (list,) if column in ("conversations", "messages") else (str, list)
    for key, kinds in ((column, wanted), ("input", (str,)), ("system", (str,))):
        value = fields.get(key)
        if value is not None and not isinstance(value, kinds):
            return _("'{key}' must be text, found {found}.", key=key, found=type_name(value))
    if isinstance(fields[column], list):
        messages: Messages = list(fields[column])  # type: ignore[call-overload]
        style = detect_style(messages)
        return messages_problem(column, [*messages, {style.role: style.answer, style.content: "-"}])
    return history_problem(fields.get("history"))


def _prompt_column(fields: Fields) -> str | None:
    """The column with the prompt; None if chosen and rejected are whole conversations, beside a prompt or not."""
    column = next((key for key in PROMPTS if fields.get(key)), None)
    if column == "prompt" and isinstance(fields["prompt"], str) and _repeats(fields["chosen"], fields["prompt"]):
        return None
    return column


def _repeats(chosen: object, prompt: str) -> bool:
    """Whether `chosen` is a whole conversation that contains the question which is also in `prompt`."""
    messages = chosen if isinstance(chosen, list) else []
    style = detect_style(messages)
    asked = [one for one in messages if style.role_of(one) == "user"]
    return bool(asked) and style.role_of(messages[0]) in ("user", "system") and asked[-1].get(style.content) == prompt


def _split(fields: Fields, strip: bool) -> tuple[Messages, dict[str, Messages]]:
    """The messages of the prompt, and those of each answer."""
    answers = {key: _answer_messages(fields[key]) for key in ANSWERS}
    column = _prompt_column(fields)
    if column is not None:
        if column == "instruction":
            return alpaca_messages(fields, strip), answers
        return list(as_messages(fields[column], "user")), answers
    chosen, rejected = answers.values()
    pairs = zip(chosen, rejected, strict=False)
    shared = sum(1 for _pair in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return chosen[:shared], {key: messages[shared:] for key, messages in answers.items()}


def _answer_messages(value: object) -> Messages:
    return [value] if isinstance(value, dict) else list(as_messages(value, "assistant"))


def _equal() -> str:
    return _("'chosen' and 'rejected' are equal, so neither is better. Remove the row.")


def _answer(fields: Fields, source: str, strip: bool, key: str) -> Conversation:
    fields = _with_messages(fields)
    prompt, answers = _split(fields, strip)
    messages = (*system_messages(fields), *_unlearned(parse_messages(prompt)), *parse_messages(answers[key]))
    return Conversation(messages, source, tools_of(fields), desirable=key == "chosen")


# -- rated answers --------------------------------------------------------------------------------------------------


def _rated_problem(fields: Fields) -> str | None:
    label = _label(fields) or LABELS[0]
    value = fields[label]
    if _plain(value) not in (*YES, *NO):
        return _("'{key}' must be true or false, found {found}.", key=label, found=repr(value)[:40])
    row = _unlabelled(fields)
    found = format_of(row)
    assert found is not None
    if found.required == ("text",):
        return _("a 'text' row has no answer to mark as good or bad. Use 'prompt' and 'completion'.")
    return found.problem(row)


def _rated(fields: Fields, source: str, strip: bool) -> Conversation:
    row = _unlabelled(fields)
    found = format_of(row)
    assert found is not None
    made = found.conversation(row, source, strip)
    last = max(i for i, message in enumerate(made.messages) if message.role == "assistant")
    if found.required[0] == "prompt" and isinstance(row["completion"], list):
        last = 0  # all answers of the completion are the answer; those of the prompt are not learned anyway
    messages = (*_unlearned(made.messages[:last]), *made.messages[last:])
    desirable = _plain(fields[_label(fields) or ""]) in YES
    return replace(made, messages=messages, desirable=desirable)


def _plain(value: object) -> str:
    return str(value).strip().lower().removesuffix(".0")  # a column with nulls is one of floats


def _unlearned(messages: Iterable[Message]) -> Iterable[Message]:
    return (one._replace(learn=False) if one.role == "assistant" else one for one in messages)


def _conversation(fields: Fields, source: str, strip: bool) -> Conversation:
    return answers_of(Record(dict(fields), source), strip)[0]


_SHARED = ("system", "tools", "functions", "history", "input", "instruction", "conversations", "messages")
PAIRS = RowFormat("preference", ("prompt", *ANSWERS), (*REJECTED, *_SHARED), _pair_problem, _conversation)
RATED = RowFormat(
    "KTO",
    ("prompt", "completion", "label"),
    ("kto_tag", "output", "conversation", *_SHARED),
    _rated_problem,
    _conversation,
)
