"""Rows longer than `data.max_length`, handled as `data.too_long` says: refused, truncated, split or dropped."""

from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile

from lorasmith.config.data import DataConfig
from lorasmith.data.rows.conversation import MAX_PLACES, Conversation, Message, RowError, places
from lorasmith.data.template.encoding import Template
from lorasmith.data.template.loss_mask import ExampleBuilder
from lorasmith.errors import DataError
from lorasmith.i18n import _, counted
from lorasmith.model.row import IGNORED, Example
from lorasmith.report import Report

REPORT_EVERY = 200  # rows between two progress updates


@dataclass
class DataSplit:
    """The rows of the training data or of the held-out data, and the examples that each row is encoded to.

    A row is several examples if its template rewrites earlier turns. option: 'data.data' or 'data.held_out', for
    messages. lost: what each encoded row lacks, as kinds of data/template/findings.py.
    """

    option: str
    conversations: list[Conversation]
    rows: list[list[Example]]
    lost: list[Collection[str]] = field(default_factory=list)


def truncate(example: Example, length: int) -> Example:
    """The first `length` tokens of `example`; the last of them has no target."""
    if len(example.ids) <= length:
        return example
    targets = [*example.targets[: length - 1], IGNORED]
    return replace(example, ids=example.ids[:length], targets=targets, weights=example.weights[:length])


def split_text(example: Example, length: int) -> list[Example]:
    """Split plain text into pieces of `length` tokens.

    Pieces overlap by one token: the last token of a piece has no target there, and predicts the next token in the next
    piece. So every token but the first is a target once.
    """
    starts = range(0, max(len(example.ids) - 1, 1), length - 1)
    parts = (slice(start, start + length) for start in starts)
    return [
        Example(example.ids[at], [*example.targets[at][:-1], IGNORED], example.weights[at], example.source)
        for at in parts
    ]


def refuse_too_long(splits: Sequence[DataSplit], cfg: DataConfig, length: int) -> None:
    """Raise DataError with all rows that are too long for `cfg.too_long` 'error' or 'split'."""
    texts = []
    for split in splits:
        too_long = [
            (row, n)
            for row, conversation in zip(split.rows, split.conversations, strict=True)
            if (n := _lost(row, length)) and (cfg.too_long == "error" or conversation.text is None)
        ]
        if too_long:
            texts.append(_too_long(split, too_long, length) if cfg.too_long == "error" else _unsplit(split, too_long))
    if texts:
        raise DataError(*texts)


def _too_long(split: DataSplit, lost: list[tuple[list[Example], int]], length: int) -> str:
    text = _(
        "{option}: found {rows} of {all} longer than {length} tokens, the longest with {longest}; truncating "
        "them would lose {tokens} answer tokens ({places}). Raise data.max_length, or set data.too_long to "
        "'truncate' to cut off the end, to 'truncate-left' to cut off the beginning, or to 'drop' to skip "
        "these rows.",
        option=split.option,
        rows=rows_text(len(lost)),
        all=f"{len(split.rows):,}",
        length=f"{length:,}",
        longest=f"{max(_longest(row) for row, _n in lost):,}",
        tokens=f"{sum(n for _row, n in lost):,}",
        places=places([row[0].source for row, _n in lost], MAX_PLACES),
    )
    if any(conversation.text is not None for conversation in split.conversations):
        text += " " + _("Plain text can also be split into pieces: 'split'.")
    return text


def _unsplit(split: DataSplit, rows: list[tuple[list[Example], int]]) -> str:
    return _(
        "{option}: data.too_long 'split' works for plain text only, but found {rows} with conversations that "
        "are too long, the longest with {longest} tokens ({places}). Set data.too_long to 'truncate-left', or "
        "raise data.max_length.",
        option=split.option,
        rows=rows_text(len(rows)),
        longest=f"{max(_longest(row) for row, _n in rows):,}",
        places=places([row[0].source for row, _n in rows], MAX_PLACES),
    )


def fit(split: DataSplit, template: Template, cfg: DataConfig, length: int, report: Report) -> list[str]:
    """Shorten the rows of `split` to `length` tokens, in place; return messages about what was truncated or lost."""
    total = (
        len(split.rows) if cfg.too_long == "truncate-left" else 0
    )  # this encodes rows again; the other ways take no time
    kept, dropped = list[tuple[Conversation, list[Example]]](), list[str]()
    shortened = tokens = parts = 0
    for done, (conversation, row) in enumerate(zip(split.conversations, split.rows, strict=True), 1):
        lost = _lost(row, length)
        if total > REPORT_EVERY and (done % REPORT_EVERY == 0 or done == total):
            report.progress(_("truncating"), done, total)
        short = _short(conversation, row, template, cfg, length) if lost else [truncate(e, length) for e in row]
        if not short:
            dropped.append(row[0].source)
        else:
            kept.append((conversation, short))
            shortened += lost > 0
            parts += len(short) if lost else 0
        tokens += _target_tokens(row) - _target_tokens(short)
    split.conversations, split.rows = [one for one, _row in kept], [row for _one, row in kept]
    messages = [_truncated_text(split.option, cfg, length, shortened, tokens, parts)] if shortened else []
    return messages + ([_dropped_text(split.option, cfg, length, dropped)] if dropped else [])


def _short(
    row: Conversation, examples: list[Example], template: Template, cfg: DataConfig, length: int
) -> list[Example]:
    """The examples of a row that is too long, shortened as `cfg.too_long` says; empty if it is dropped."""
    if cfg.too_long == "drop":
        return []
    if cfg.too_long == "split":
        return [piece for example in examples for piece in split_text(example, length)]
    if cfg.too_long == "truncate-left":
        return truncate_left(row, template, cfg.learn, length)
    kept = [short for short in (truncate(example, length) for example in examples) if short.n_targets]
    is_pair = len(examples) == 2 and row.desirable is not None
    return [] if is_pair and (len(kept) < 2 or kept[0].ids == kept[1].ids) else kept  # then neither is better


def _truncated_text(option: str, cfg: DataConfig, length: int, rows: int, tokens: int, parts: int) -> str:
    numbers = {"option": option, "length": f"{length:,}", "tokens": f"{tokens:,}", "cut": rows_text(rows)}
    if cfg.too_long == "split":
        return _("{option}: split {cut} into {parts} pieces of at most {length} tokens.", **numbers, parts=f"{parts:,}")
    if cfg.too_long == "truncate-left":
        return _(
            "{option}: truncated the beginning of {cut} to fit into {length} tokens; answer tokens lost: {tokens}.",
            **numbers,
        )
    return _("{option}: truncated {cut} to {length} tokens; answer tokens lost: {tokens}.", **numbers)


def _dropped_text(option: str, cfg: DataConfig, length: int, sources: list[str]) -> str:
    values = {
        "option": option,
        "length": f"{length:,}",
        "rows": rows_text(len(sources)),
        "places": places(sources, MAX_PLACES),
    }
    if cfg.too_long == "drop":
        return _("{option}: skipped {rows} longer than {length} tokens: {places}.", **values)
    if cfg.too_long == "truncate-left":
        return _("{option}: skipped {rows} whose answer does not fit into {length} tokens: {places}.", **values)
    return _("{option}: skipped {rows} without an answer in the first {length} tokens: {places}.", **values)


# -- truncate-left --------------------------------------------------------------------------------------------------


def truncate_left(row: Conversation, template: Template, learn: str, length: int) -> list[Example]:
    """The row's examples without their first turns or, if that is not enough, with the end of the last user message.

    The system message stays, and no answer is truncated: an example whose answer alone is too long is left out.
    """
    if row.text is not None:
        (example,) = template.encode_row(row)
        ids, targets = example.ids[-length:], example.targets[-length:]
        return [Example(ids, targets, example.weights[-length:], row.source)]
    found = (_truncate_left(builder, row, template, learn, length) for builder in template.builders(row, learn))
    return [truncate(example, length) for example in found if example]


def _truncate_left(
    builder: ExampleBuilder, row: Conversation, template: Template, learn: str, length: int
) -> Example | None:
    whole = builder.build(row.source)
    if _longest([whole]) <= length:
        return whole
    messages = template.with_system(row.messages)[: builder.last + 1]
    head = list(takewhile(lambda message: message.role == "system", messages))
    rest = range(len(head), len(messages))
    starts = [i for i in rest if messages[i].role == "user" and (i == len(head) or messages[i - 1].role != "user")]
    if learn != "all":  # the answers of the row's other examples are only context here
        messages = [m if i >= builder.first else m._replace(learn=False) for i, m in enumerate(messages)]

    def since(start: int) -> Example | None:
        try:
            short = replace(row, messages=(*head, *messages[start:]))
            return template.builders(short, learn)[-1].build(row.source)
        except RowError:  # none of the remaining answers is trained on
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
    """One user message and its answers, without the message's first tokens; None if that is still too long."""
    if example is None:
        return None
    prompt_messages = list(takewhile(lambda message: message.role != "assistant", messages))
    other = [message if message.role == "system" else message._replace(content="?") for message in prompt_messages]
    tools = row.tools if template.shows_tools(row) else ()
    prompt, bare = template.encode_prompt(prompt_messages, tools), template.encode_prompt(other, tools)
    head = sum(1 for _pair in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, bare, strict=False)))
    end, first = _longest([example]), min(head, len(prompt))
    resume = end - (length - first)
    if resume >= len(prompt):
        return None
    kept = [*range(first), *range(resume, end)]
    targets = [example.targets[i] for i in kept]
    for at in (first - 1, len(kept) - 1):  # their next token was removed
        targets[at] = IGNORED
    return Example([example.ids[i] for i in kept], targets, [example.weights[i] for i in kept], row.source)


def _target_tokens(row: Sequence[Example]) -> int:
    return sum(example.n_targets for example in row)


def _lost(row: Sequence[Example], length: int) -> int:
    """Number of target tokens beyond `length`; the target of position i is token i + 1."""
    return sum(target != IGNORED for example in row for target in example.targets[length - 1 :])


def _longest(row: Sequence[Example]) -> int:
    """Tokens up to and including the last target, of the longest example."""
    return max(example.useful_length for example in row) + 1


def rows_text(count: int) -> str:
    """'1 row', '2,000 rows': part of a sentence."""
    return counted(count, _("1 row"), _("{count} rows"))
