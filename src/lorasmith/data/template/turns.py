"""A conversation as turns: the prompt of each answer and the answer, by prefix differences of the rendered text.

Prefix differences render a conversation twice for each answer. A template that only sets constant texts between the
contents (`Pattern`, found by trying) needs two renders in all, which prove what was put together from its constants.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from jinja2 import Environment

from lorasmith.data.rows.conversation import Message, RowError
from lorasmith.data.template.chat_template import Jinja
from lorasmith.i18n import _


class Turn(NamedTuple):
    """One answer and the text since the answer before; `restart`: the prompt stands for the whole text before it.

    `answer` is None for a prompt that waits for its answer, and where the template shows an answer in another way
    than its own prompt begins it. The prompt holds messages [first, at), the answer is message `at`.
    """

    prompt: str
    answer: str | None
    restart: bool
    first: int
    at: int


def human_turns(messages: Sequence[Message], eos: str, source: str) -> Iterator[Turn]:
    """The tutorial's pattern, turn by turn; a system text stands, with a blank line, before the question it precedes.

    For an alpaca row the user's text is instruction + line break + input, so this is its
    "\\n".join(["Human: " + instruction, input]).strip() + "\\n\\nAssistant: ".
    """
    first = 0
    for i, message in enumerate(messages):
        if message.role != "assistant":
            continue
        if first == i:
            raise RowError(source, _("two answers follow each other. Put a message with the role 'user' between them."))
        yield Turn(_human(messages[first:i]), message.content + eos, first == 0, first, i)
        first = i + 1
    if first < len(messages):
        yield Turn(_human(messages[first:]), None, first == 0, first, len(messages))


def _human(asked: Sequence[Message]) -> str:
    return ("Human: " + "\n\n".join(message.content for message in asked)).strip() + "\n\nAssistant: "


def jinja_turns(
    jinja: Jinja, pattern: "Pattern | None", messages: Sequence[Message], source: str, tools: Sequence[Any] = ()
) -> Iterator[Turn]:
    """The same of a chat template. `pattern`: the template's, where it has one."""
    quick = pattern.turns(jinja, messages, source) if pattern and not tools else None
    return iter(quick) if quick is not None else prefix_turns(jinja, messages, source, tools)


def refuse_unseen_tools(jinja: Jinja | None, messages: Sequence[Message], source: str, tools: Sequence[Any]) -> None:
    """Raises RowError where the text is the same without the tools, or without the calls of them.

    `jinja` None: a template of roles and contents alone, which shows neither.
    """
    bare = [message._replace(tool_calls=()) for message in messages]

    def text(messages: Sequence[Message], tools: Sequence[Any]) -> str:
        return jinja.render(messages, messages[-1].role != "assistant", source, tools) if jinja else ""

    shown = text(messages, tools)
    if tools and text(messages, ()) == shown:
        raise RowError(
            source,
            _(
                "the template has no place for 'tools', so the model would never see them. Use a model whose chat "
                "template shows tools, or a Jinja file that does, or leave 'tools' out."
            ),
        )
    if bare != list(messages) and text(bare, tools) == shown:
        raise RowError(
            source,
            _(
                "the template does not show 'tool_calls', so the model would never see them. Use a model whose "
                "chat template shows tools, or a Jinja file that does, or leave these messages out."
            ),
        )


def prefix_turns(jinja: Jinja, messages: Sequence[Message], source: str, tools: Sequence[Any] = ()) -> Iterator[Turn]:
    """Prefix differences of the rendered conversation: stock templates mark no answers themselves."""
    text: str | None = ""
    first = 0
    for i, message in enumerate(messages):
        if message.role == "assistant":
            prompt = jinja.render(messages[:i], True, source, tools)
            whole = jinja.render(messages[: i + 1], False, source, tools)
            answer = whole[len(prompt) :] if whole.startswith(prompt) else None
            yield _turn(prompt, answer, text, first, i)
            text, first = (None if answer is None else whole), i + 1
    if messages[-1].role != "assistant":
        yield _turn(jinja.render(messages, True, source, tools), None, text, first, len(messages))


def _turn(prompt: str, answer: str | None, before: str | None, first: int, at: int) -> Turn:
    if not before or not prompt.startswith(before):
        return Turn(prompt, answer, True, 0, at)
    return Turn(prompt[len(before) :], answer, False, first, at)


# -- templates of constant texts ------------------------------------------------------------------------------------

# Contents that no template knows, to be found again in what is rendered.
_SYSTEM = Message("system", "qsys0")
_PROBE = tuple(Message(("user", "assistant")[i % 2], f"q{'ua'[i % 2]}{i}z") for i in range(6))


@dataclass(frozen=True)
class _Constants:
    """The texts around contents: head question ask | open answer close | next question ask | ..."""

    head: str
    system: str | None  # between the system text, which follows the head, and the first question; None without one
    ask: str
    open: str
    close: str
    next: str

    def turns(self, contents: Sequence[str]) -> list[Turn]:
        """The turns of alternating questions and answers, after a system text where there is one."""
        leading = 0 if self.system is None else 1
        before = self.head if self.system is None else self.head + contents[0] + self.system
        found = []
        for i in range(leading, len(contents), 2):
            prompt, first, at = before + contents[i] + self.ask, 0 if i == leading else i, i + 1
            answer = self.open + contents[at] + self.close if at < len(contents) else None
            found.append(Turn(prompt, answer, i == leading, first, at))
            before = self.next
        return found


@dataclass(frozen=True)
class Pattern:
    """A template that sets constant texts between contents, for conversations of questions and answers in turn."""

    plain: _Constants
    with_system: _Constants | None
    literals: frozenset[str]  # what the template may look for in contents: those that hold one go the long way

    @classmethod
    def of(cls, jinja: Jinja) -> Self | None:
        """None where the template does anything else to conversations that try it."""
        plain = _constants(jinja, _PROBE)
        if plain is None:
            return None
        words = {token.value for token in Environment().lexer.tokenize(jinja.text) if token.type == "string"}
        marks = frozenset(word for word in words if len(word.strip()) > 2 and not word.replace("_", "").isalnum())
        return cls(plain, _constants(jinja, (_SYSTEM, *_PROBE)), marks)

    def turns(self, jinja: Jinja, messages: Sequence[Message], source: str) -> list[Turn] | None:
        """The turns, proved by the render of the whole and of its last prompt; None: they must be rendered one by one.

        Raises RowError where the template refuses the conversation.
        """
        constants = self._constants(messages)
        if constants is None or any(word in m.content for m in messages for word in self.literals):
            return None
        is_answered = messages[-1].role == "assistant"
        last = len(messages) - is_answered
        prompt = jinja.render(messages[:last], True, source)
        whole = jinja.render(messages, False, source) if is_answered else prompt
        for contents in ([m.content for m in messages], [m.content.strip() for m in messages]):
            turns = constants.turns(contents)
            text = "".join(turn.prompt + (turn.answer or "") for turn in turns)
            if text == whole and text.removesuffix(turns[-1].answer or "") == prompt:
                return turns
        return None

    def _constants(self, messages: Sequence[Message]) -> _Constants | None:
        has_system = messages[0].role == "system"
        asked = messages[has_system:]
        in_turn = all(m.role == ("user", "assistant")[i % 2] for i, m in enumerate(asked))
        if not asked or not in_turn or any(m.tool_calls or m.name for m in messages):
            return None
        return self.with_system if has_system else self.plain


def _constants(jinja: Jinja, probe: Sequence[Message]) -> _Constants | None:
    """The constants of a template by its prefix differences; None where these are not made of them."""
    try:
        turns = list(prefix_turns(jinja, probe, ""))
        has_system = probe[0].role == "system"
        question, answer, second = (m.content for m in probe[has_system:][:3])
        prompt, reply, later = turns[0].prompt, turns[0].answer or "", turns[1].prompt
        system = None
        if has_system:
            head, system = prompt.partition(probe[0].content)[::2]
            system, ask = system.partition(question)[::2]
        else:
            head, ask = prompt.partition(question)[::2]
        opening, close = reply.partition(answer)[::2]
        found = _Constants(head, system, ask, opening, close, later.partition(second)[0])
    except RowError:
        return None
    return found if found.turns([m.content for m in probe]) == turns else None
