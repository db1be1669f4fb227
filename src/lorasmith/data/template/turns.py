"""Split a conversation into turns, each an answer and the text before it, by rendering prefixes of the conversation.

The text of an answer is the difference between the conversation rendered with and without it: two renders per answer.
For a template that only puts constant texts between the contents (a `Pattern`, found by trial), the turns are assembled
from the constants, and two renders in all check them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from jinja2 import Environment

from lorasmith.data.rows.conversation import Message, RowError
from lorasmith.data.template.chat_template import JinjaTemplate
from lorasmith.i18n import _


class Turn(NamedTuple):
    """An answer and its prompt, the text since the previous answer.

    answer: None if there is none yet, or if the template renders it differently from what its generation prompt begins;
    then `instead` is what it renders. restart: the prompt is the whole text before the answer, because the template
    changed what it rendered before. stop: a token that is added after the answer, because the template renders none.
    The prompt contains messages [first, at); the answer is message `at`.
    """

    prompt: str
    answer: str | None
    restart: bool
    first: int
    at: int
    instead: str = ""
    stop: int | None = None


def human_turns(messages: Sequence[Message], eos: str, source: str) -> Iterator[Turn]:
    """The turns in the pattern of the tutorial. A system message stands before the next question, with a blank line.

    The user message of an alpaca row is instruction + line break + input, so the prompt equals the tutorial's
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
    jinja: JinjaTemplate, pattern: "Pattern | None", messages: Sequence[Message], source: str, tools: Sequence[Any] = ()
) -> Iterator[Turn]:
    """The turns in a chat template. pattern: that of the template, if it has one."""
    quick = pattern.turns(jinja, messages, source) if pattern and not tools else None
    return iter(quick) if quick is not None else prefix_turns(jinja, messages, source, tools)


def prefix_turns(
    jinja: JinjaTemplate, messages: Sequence[Message], source: str, tools: Sequence[Any] = ()
) -> Iterator[Turn]:
    """The turns by differences of rendered prefixes: most templates do not mark the answers."""
    text: str | None = ""
    first = 0
    for i, message in enumerate(messages):
        if message.role == "assistant":
            prompt = jinja.render(messages[:i], True, source, tools)
            whole = jinja.render(messages[: i + 1], False, source, tools)
            answer = whole[len(prompt) :] if whole.startswith(prompt) else None
            if answer is None and i:
                answer = _answer_after(messages[i - 1].content.strip(), prompt, whole)
                text = None  # the prompt is not the beginning of the rendered conversation
            yield _turn(prompt, answer, text, first, i)._replace(instead=whole if answer is None else "")
            text, first = (whole if answer is not None and whole.startswith(prompt) else None), i + 1
    if messages[-1].role != "assistant":
        yield _turn(jinja.render(messages, True, source, tools), None, text, first, len(messages))


def _answer_after(content: str, prompt: str, whole: str) -> str | None:
    """The answer that follows the last content in `whole` as it would follow the prompt; None if another text follows.

    Some templates put the system message into the last message before an answer, and leave it out when there is one.
    """
    ending = prompt.rpartition(content)[2] if content and content in prompt else ""
    found = whole.rpartition(content + ending) if ending else ("", "", "")
    return found[2] if found[1] else None


def _turn(prompt: str, answer: str | None, before: str | None, first: int, at: int) -> Turn:
    if not before or not prompt.startswith(before):
        return Turn(prompt, answer, True, 0, at)
    return Turn(prompt[len(before) :], answer, False, first, at)


def grouped(turns: Sequence[Turn]) -> list[list[Turn]]:
    """The turns of each example."""
    groups: list[list[Turn]] = []
    for turn in turns:
        if turn.restart:
            groups.append([])
        groups[-1].append(turn)
    return groups


def with_stops(
    turns: Sequence[Turn],
    stops: Sequence[str],
    missing: Callable[[Turn], int | None],
    needs_end: Callable[[Turn], bool],
) -> list[Turn]:
    """The turns; those that `needs_end` chooses, and that the template does not end, are ended by a token of their own.

    stops: the texts of the stop tokens. missing: the token to add. After it, the text of the next turn cannot go on as
    the template has it, so the next turn restarts. An answer that is followed by a stop token needs none.
    """
    found: list[Turn] = []
    text = ""
    for number, one in enumerate(turns):
        is_cut = bool(found) and found[-1].stop is not None and not one.restart
        turn = one._replace(prompt=text + one.prompt, restart=True, first=0) if is_cut else one
        text = ("" if turn.restart else text) + turn.prompt + (turn.answer or "")
        if turn.answer is not None and needs_end(turn) and not any(stop in turn.answer for stop in stops):
            following = turns[number + 1] if number + 1 < len(turns) else None
            goes_on = following is not None and not following.restart and following.prompt.startswith(tuple(stops))
            turn = turn if goes_on else turn._replace(stop=missing(turn))
        found.append(turn)
    return found


def refuse_unseen_calls(
    jinja: JinjaTemplate | None, messages: Sequence[Message], source: str, tools: Sequence[Any]
) -> None:
    """Raise RowError if the template ignores the function calls. jinja: None for one that has no place for them."""
    names = {str(call["function"]["name"]) for message in messages for call in message.tool_calls}  # type: ignore[index]
    shown = jinja.render(messages, messages[-1].role != "assistant", source, tools) if jinja else ""
    if any(name not in shown for name in names):
        raise RowError(
            source,
            _(
                "the template does not show 'tool_calls', so the model would never see them. Use a model whose "
                "chat template shows tools, or a Jinja file that does, or leave these messages out."
            ),
        )


def shows_tools(jinja: JinjaTemplate, messages: Sequence[Message], tools: Sequence[Any]) -> bool:
    """Whether the template renders the tools; one that refuses to render the messages without them has a place."""
    prompt = messages[-1].role != "assistant"
    try:
        return jinja.render(messages, prompt, "", ()) != jinja.render(messages, prompt, "", tools)
    except RowError:
        return True


# -- templates of constant texts ------------------------------------------------------------------------------------

# Contents that no template contains, so that they can be found in the rendered text.
_SYSTEM = Message("system", "qsys0")
_PROBE = tuple(Message(("user", "assistant")[i % 2], f"q{'ua'[i % 2]}{i}z") for i in range(6))


@dataclass(frozen=True)
class _Constants:
    """The texts around the contents: head question ask | open answer close | next question ask | ..."""

    head: str
    system: (
        str | None
    )  # between the system message (after the head) and the first question; None if there is no system message
    ask: str
    open: str
    close: str
    next: str

    def turns(self, contents: Sequence[str]) -> list[Turn]:
        """The turns of contents that alternate between question and answer, after a system message if there is one."""
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
    """A template that puts constant texts between the contents of alternating questions and answers."""

    plain: _Constants
    with_system: _Constants | None
    literals: frozenset[
        str
    ]  # the template may search contents for these; conversations with one are rendered turn by turn

    @classmethod
    def of(cls, jinja: JinjaTemplate) -> Self | None:
        """The pattern of a template; None if it does anything else with the trial conversations."""
        plain = _constants(jinja, _PROBE)
        if plain is None:
            return None
        words = {token.value for token in Environment().lexer.tokenize(jinja.text) if token.type == "string"}
        marks = frozenset(word for word in words if len(word.strip()) > 2 and not word.replace("_", "").isalnum())
        return cls(plain, _constants(jinja, (_SYSTEM, *_PROBE)), marks)

    def turns(self, jinja: JinjaTemplate, messages: Sequence[Message], source: str) -> list[Turn] | None:
        """The turns, checked against two renders; None if they have to be found by rendering each.

        Raises RowError if the template rejects the conversation.
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
        if not asked or not in_turn or any(m.tool_calls or m.name or m.reasoning for m in messages):
            return None
        return self.with_system if has_system else self.plain


def _constants(jinja: JinjaTemplate, probe: Sequence[Message]) -> _Constants | None:
    """The constants of a template, found with the conversation `probe`; None if it is not made of constants."""
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
