"""Rows that are longer than allowed: refused, cut at either end, made into pieces or left out, and what that costs."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from lorasmith.config.data import DataConfig
from lorasmith.data.rows.conversation import Conversation, Message, RowError, places
from lorasmith.data.template.encoding import Template
from lorasmith.data.template.marks import Draft
from lorasmith.errors import DataError
from lorasmith.i18n import _
from lorasmith.model.row import IGNORED, Example
from lorasmith.report import Report

NAMED = 5  # rows that a sentence names before it only counts
REPORTED = 200  # rows between two lines of progress


@dataclass
class Side:
    """The rows of one side, and the examples of each; a row is several where its template rewrites earlier turns."""

    option: str
    conversations: list[Conversation]
    rows: list[list[Example]]


def cut(example: Example, length: int) -> Example:
    """The first `length` tokens: its last token has nothing left to predict."""
    if len(example.ids) <= length:
        return example
    targets = [*example.targets[: length - 1], IGNORED]
    return Example(example.ids[:length], targets, example.weights[:length], example.source)


def pieces(example: Example, length: int) -> list[Example]:
    """Plain text in pieces of `length` tokens. A piece begins with the last token before it: all others are learned."""
    starts = range(0, max(len(example.ids) - 1, 1), length - 1)
    parts = (slice(start, start + length) for start in starts)
    return [
        Example(example.ids[at], [*example.targets[at][:-1], IGNORED], example.weights[at], example.source)
        for at in parts
    ]


def refuse(sides: Sequence[Side], cfg: DataConfig, length: int) -> None:
    """Raise DataError for rows that `cfg.too_long` 'error' or 'split' does not take, those of all sides together."""
    texts = []
    for side in sides:
        too_long = [
            (row, n)
            for row, conversation in zip(side.rows, side.conversations, strict=True)
            if (n := _lost(row, length)) and (cfg.too_long == "error" or conversation.text is None)
        ]
        if too_long:
            texts.append(_too_long(side, too_long, length) if cfg.too_long == "error" else _unsplit(side, too_long))
    if texts:
        raise DataError(*texts)


def _too_long(side: Side, lost: list[tuple[list[Example], int]], length: int) -> str:
    text = _(
        "{option}: found {rows} of {all} longer than {length} tokens, the longest with {longest}; truncating "
        "them would lose {tokens} answer tokens ({places}). Raise data.max_length, or set data.too_long to "
        "'truncate' to cut off the end, to 'truncate-left' to cut off the beginning, or to 'drop' to skip "
        "these rows.",
        option=side.option,
        rows=in_rows(len(lost)),
        all=f"{len(side.rows):,}",
        length=f"{length:,}",
        longest=f"{max(_longest(row) for row, _n in lost):,}",
        tokens=f"{sum(n for _row, n in lost):,}",
        places=places([row[0].source for row, _n in lost], NAMED),
    )
    if any(conversation.text is not None for conversation in side.conversations):
        text += " " + _("Plain text can also be split into pieces: 'split'.")
    return text


def _unsplit(side: Side, rows: list[tuple[list[Example], int]]) -> str:
    return _(
        "{option}: data.too_long 'split' works for plain text only, but found {rows} with conversations that "
        "are too long, the longest with {longest} tokens ({places}). Set data.too_long to 'truncate-left', or "
        "raise data.max_length.",
        option=side.option,
        rows=in_rows(len(rows)),
        longest=f"{max(_longest(row) for row, _n in rows):,}",
        places=places([row[0].source for row, _n in rows], NAMED),
    )


def fit(side: Side, template: Template, cfg: DataConfig, length: int, report: Report) -> list[str]:
    """Make the rows of `side` at most `length` tokens long; sentences that say what was cut, left out and lost."""
    total = len(side.rows) if cfg.too_long == "truncate-left" else 0  # which encodes anew; the others take no time
    kept, left_out = list[tuple[Conversation, list[Example]]](), list[str]()
    shortened = tokens = parts = 0
    for done, (conversation, row) in enumerate(zip(side.conversations, side.rows, strict=True), 1):
        lost = _lost(row, length)
        if total > REPORTED and (done % REPORTED == 0 or done == total):
            report.progress(_("truncating"), done, total)
        short = _short(conversation, row, template, cfg, length) if lost else [cut(e, length) for e in row]
        if not short:
            left_out.append(row[0].source)
        else:
            kept.append((conversation, short))
            shortened += lost > 0
            parts += len(short) if lost else 0
        tokens += _learned(row) - _learned(short)
    side.conversations, side.rows = [one for one, _row in kept], [row for _one, row in kept]
    said = [_cut_text(side.option, cfg, length, shortened, tokens, parts)] if shortened else []
    return said + ([_left_out_text(side.option, cfg, length, left_out)] if left_out else [])


def _short(
    row: Conversation, examples: list[Example], template: Template, cfg: DataConfig, length: int
) -> list[Example]:
    """What `cfg.too_long` leaves of a row that is too long."""
    if cfg.too_long == "drop":
        return []
    if cfg.too_long == "split":
        return [piece for example in examples for piece in pieces(example, length)]
    if cfg.too_long == "truncate-left":
        return cut_left(row, template, cfg.learn, length)
    return [short for short in (cut(example, length) for example in examples) if short.n_targets]


def _cut_text(option: str, cfg: DataConfig, length: int, rows: int, tokens: int, parts: int) -> str:
    numbers = {"option": option, "length": f"{length:,}", "tokens": f"{tokens:,}", "cut": in_rows(rows)}
    if cfg.too_long == "split":
        return _("{option}: split {cut} into {parts} pieces of at most {length} tokens.", **numbers, parts=f"{parts:,}")
    if cfg.too_long == "truncate-left":
        return _(
            "{option}: truncated the beginning of {cut} to fit into {length} tokens; answer tokens lost: {tokens}.",
            **numbers,
        )
    return _("{option}: truncated {cut} to {length} tokens; answer tokens lost: {tokens}.", **numbers)


def _left_out_text(option: str, cfg: DataConfig, length: int, sources: list[str]) -> str:
    values = {
        "option": option,
        "length": f"{length:,}",
        "rows": in_rows(len(sources)),
        "places": places(sources, NAMED),
    }
    if cfg.too_long == "drop":
        return _("{option}: skipped {rows} longer than {length} tokens: {places}.", **values)
    if cfg.too_long == "truncate-left":
        return _("{option}: skipped {rows} whose answer does not fit into {length} tokens: {places}.", **values)
    return _("{option}: skipped {rows} without an answer in the first {length} tokens: {places}.", **values)


# -- the beginning cut off ------------------------------------------------------------------------------------------


def cut_left(row: Conversation, template: Template, learn: str, length: int) -> list[Example]:
    """The row's examples, each without its first turns, or with only the end of its last question; none where that
    is not enough. The system text stays, and no answer that is learned is cut within.
    """
    if row.text is not None:
        (example,) = template.encode_row(row)
        ids, targets = example.ids[-length:], example.targets[-length:]
        return [Example(ids, targets, example.weights[-length:], row.source)]
    found = (_draft_cut_left(draft, row, template, learn, length) for draft in template.drafts(row, learn))
    return [cut(example, length) for example in found if example]


def _draft_cut_left(draft: Draft, row: Conversation, template: Template, learn: str, length: int) -> Example | None:
    whole = draft.example(row.source)
    if _longest([whole]) <= length:
        return whole
    messages = template.with_system(row.messages)[: draft.last + 1]
    head = list(takewhile(lambda message: message.role == "system", messages))
    rest = range(len(head), len(messages))
    starts = [i for i in rest if messages[i].role == "user" and (i == len(head) or messages[i - 1].role != "user")]
    if learn != "all":  # what another example of this row teaches is context here
        messages = [m if i >= draft.first else m._replace(learn=False) for i, m in enumerate(messages)]

    def since(start: int) -> Example | None:
        try:
            short = replace(row, messages=(*head, *messages[start:]))
            return template.drafts(short, learn)[-1].example(row.source)
        except RowError:  # none of its last answers is learned
            return None

    def is_short(start: int) -> bool:
        example = since(start)
        return example is None or _longest([example]) <= length

    at = bisect_left(starts, True, key=is_short)
    if at < len(starts):
        return since(starts[at])
    return (
        _without_tokens(since(starts[-1]), [*head, *messages[starts[-1] :]], row, template, length) if starts else None
    )


def _without_tokens(
    example: Example | None, messages: Sequence[Message], row: Conversation, template: Template, length: int
) -> Example | None:
    """One question and its answers with the question's first tokens left out; None where there are too few of them."""
    if example is None:
        return None
    asked = list(takewhile(lambda message: message.role != "assistant", messages))
    other = [message if message.role == "system" else message._replace(content="?") for message in asked]
    prompt, bare = template.encode_prompt(asked, row.tools), template.encode_prompt(other, row.tools)
    head = sum(1 for _pair in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, bare, strict=False)))
    end, first = _longest([example]), min(head, len(prompt))
    resume = end - (length - first)
    if resume >= len(prompt):
        return None
    kept = [*range(first), *range(resume, end)]
    targets = [example.targets[i] for i in kept]
    for at in (first - 1, len(kept) - 1):  # what followed them does no more
        targets[at] = IGNORED
    return Example([example.ids[i] for i in kept], targets, [example.weights[i] for i in kept], row.source)


def _learned(row: Sequence[Example]) -> int:
    return sum(example.n_targets for example in row)


def _lost(row: Sequence[Example], length: int) -> int:
    """Learned tokens that do not fit: the target of position i is token i + 1."""
    return sum(target != IGNORED for example in row for target in example.targets[length - 1 :])


def _longest(row: Sequence[Example]) -> int:
    """Tokens up to the last learned one, itself counted."""
    return max(example.useful_length for example in row) + 1


def in_rows(count: int) -> str:
    """'1 row', '2,000 rows'."""
    return _("1 row") if count == 1 else _("{count} rows", count=f"{count:,}")
