"""What is lost or changed between a row and its tokens: things that are no error, and that the user should know."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lorasmith.data.rows.conversation import MAX_PLACES, Conversation, Message, RowError, places
from lorasmith.data.template.chat_template import split_reasoning
from lorasmith.data.template.contents import shows
from lorasmith.data.template.golden import PROBES
from lorasmith.data.template.special_tokens import count_special
from lorasmith.data.template.turns import grouped
from lorasmith.i18n import _, counted, listed

if TYPE_CHECKING:
    from lorasmith.data.template.encoding import Template

# Not such as [INST] or <tools>, which are ordinary text in many templates.
_LOOKS_SPECIAL = re.compile(r"<[|｜][^|｜<>\s]+[|｜]>|<(?:start|end)_of_\w+>|</?s>|<(?:bos|eos|pad)>")
KINDS = REASONING, TEXT, TOOLS, SPECIAL, MERGED = "reasoning", "text", "tools", "special", "merged"


def lost(template: "Template", row: Conversation, learn: str = "answers") -> set[str]:
    """What the encoded row lacks or has otherwise: any of the kinds above."""
    if row.text is not None or not (row.tools or _may_lose(template, row.messages)):
        return set()
    messages = template.with_system(row.messages)
    found = {SPECIAL} if _spells_special(template, messages) else set[str]()
    try:
        if not template.shows_tools(row):
            found.add(TOOLS)
        turns = template.turns(messages, row.source, row.tools)
        last = "".join(turn.prompt + (turn.answer or "") for turn in grouped(turns)[-1])
        for turn in turns:
            if turn.answer is None or turn.at == len(messages):
                continue
            answer = messages[turn.at]
            reasoning, text = split_reasoning(answer)
            if reasoning and not shows(last if learn == "all" else turn.answer, reasoning):
                found.add(REASONING)
            if answer.tool_calls and text.strip() and not shows(turn.answer, text):
                found.add(TEXT)
            if text[:1].isspace() and _merges(template, messages[: turn.at + 1], row):
                found.add(MERGED)
    except RowError:
        return found  # the row is refused, with the reason
    return found


def notes_of_losses(rows: Iterable[tuple[str, Iterable[str]]]) -> Iterator[str]:
    """A sentence for each kind of loss, with the number of rows and the places of the first ones.

    rows: the source of each row, and what `lost` found.
    """
    found: dict[str, list[str]] = {}
    for source, kinds in rows:
        for kind in kinds:
            found.setdefault(kind, []).append(source)
    for kind, sources in sorted(found.items()):
        values = {
            "rows": counted(len(sources), _("1 row"), _("{count} rows")),
            "places": places(sources, MAX_PLACES),
        }
        yield _TEXTS[kind]().format(**values)


def template_notes(template: "Template") -> Iterator[str]:
    """What the template does at the beginning and the end of answers that users would not expect."""
    if not template.text:
        return
    behavior = template.jinja.behavior
    if behavior.dropped:
        yield _(
            "The generation prompt of the chat template ends with {dropped}, which the template does not render before "
            "answers. It is left out of the prompts here, so that replies begin as the answers in training do. The "
            "chat template that is saved with a merged model leaves it out as well.",
            dropped=repr(behavior.dropped),
        )
    end = _end_of_probe(template)
    if end is not None:
        yield _(
            "The chat template does not end answers. {token}, at which generation stops, is trained on after each of "
            "them.",
            token=repr(template.token(end)),
        )
    if behavior.header:
        yield _(
            "The chat template renders {header} before every answer, and its own generation prompt is different. "
            "Prompts end with this text here, so that replies begin as the answers in training do.",
            header=repr(behavior.header),
        )
    if missing := _missing_tokens(template):
        yield _(
            "The chat template writes {tokens}, but the tokenizer has no such token, so the model sees it in pieces. "
            "Use the chat template that belongs to this model, or add the token with --add-tokens.",
            tokens=listed(map(repr, missing)),
        )


def _end_of_probe(template: "Template") -> int | None:
    """The token that is added to the answer of a probe conversation; None if the template ends it by itself."""
    try:
        return template.turns(PROBES[0], needs_end=lambda _turn: True)[-1].stop
    except RowError:
        return None


def _missing_tokens(template: "Template") -> list[str]:
    """What the template writes around messages that looks like a special token, and is not one token."""
    texts = []
    for messages in (PROBES[0], (Message("system", "Be brief."), *PROBES[0]), PROBES[0][:1]):
        try:
            texts.append(template.render(messages))
        except RowError:  # it has no system messages
            continue
    named = dict.fromkeys(name for text in texts for name in _LOOKS_SPECIAL.findall(text))
    return [name for name in named if not _is_token(template, name)]


def _is_token(template: "Template", name: str) -> bool:
    token_id: Any = template.tokenizer.convert_tokens_to_ids(name)  # None, or the unknown token's, if it has none
    return token_id is not None and template.token(token_id) == name and token_id in template.ids_of([name])


def _may_lose(template: "Template", messages: Sequence[Message]) -> bool:
    """Whether it is worth rendering the row once more."""
    return _spells_special(template, messages) or any(
        m.role == "assistant" and (m.reasoning or m.tool_calls or "</think>" in m.content or m.content[:1].isspace())
        for m in messages
    )


def _spells_special(template: "Template", messages: Sequence[Message]) -> bool:
    """Whether the messages spell special tokens that are encoded as ordinary text."""
    return template.options.special_tokens == "text" and count_special(messages, template.special_pattern) > 0


def _merges(template: "Template", messages: Sequence[Message], row: Conversation) -> bool:
    tools = row.tools if template.shows_tools(row) else ()
    prompt = template.encode_prompt(messages[:-1], tools)
    whole = template.ids_of(["".join(template.prompt_texts([*messages, Message("user", "?")], tools))])
    return whole[: len(prompt)] != prompt


_TEXTS = {
    REASONING: lambda: _(
        "In {rows}, the chat template does not show the reasoning of an answer, so it is not trained on: {places}. "
        "Use a chat template that shows it, or remove it from the data."
    ),
    TEXT: lambda: _(
        "In {rows}, the chat template does not show the text beside a function call, so it is not trained on: {places}."
    ),
    TOOLS: lambda: _(
        "In {rows}, the chat template has no place for 'tools', so the model does not see them: {places}. Use a model "
        "whose chat template shows tools, or a Jinja file that does."
    ),
    SPECIAL: lambda: _(
        "In {rows}, a message spells special tokens of the model. They are encoded as ordinary text, so that they "
        "cannot end a turn. If the rows were rendered with a chat template before, remove these tokens; to encode them "
        "as special tokens, use data.special_tokens 'tokens': {places}."
    ),
    MERGED: lambda: _(
        "In {rows}, an answer begins with whitespace that the tokenizer merges with the end of the prompt. At "
        "inference the prompt ends before it, so the model does not see what it was trained on; remove the "
        "whitespace: {places}."
    ),
}
