"""The contents of messages: how they are arranged before they are rendered, and whether the rendered text has them."""

from collections.abc import Sequence
from itertools import dropwhile
from typing import NamedTuple

from lorasmith.config.data import LeadingAnswer, SpecialTokens, SystemAs
from lorasmith.data.rows.conversation import Message, RowError
from lorasmith.data.template.behavior import common_length
from lorasmith.data.template.chat_template import split_reasoning
from lorasmith.data.template.special_tokens import without_marks
from lorasmith.data.template.turns import Turn
from lorasmith.i18n import _, listed

_SHOWN = 60  # most characters of a text in a message


class ContentOptions(NamedTuple):
    """How messages are changed before they are rendered.

    system_as: 'system' leaves system messages as they are; 'first' joins them into one at the beginning; 'user' puts
    each before the text of the next user message. special_tokens: whether special tokens that a content spells are
    encoded as ordinary text or as special tokens. leading_answer: whether answers before the first question are
    dropped.
    """

    system_as: SystemAs = "system"
    special_tokens: SpecialTokens = "text"
    leading_answer: LeadingAnswer = "error"

    def arrange(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The messages with their system messages where they belong."""
        if self.leading_answer == "drop":
            head = [m for m in messages[:1] if m.role == "system"]
            messages = [*head, *dropwhile(lambda m: m.role == "assistant", messages[len(head) :])]
        texts = [message.content for message in messages if message.role == "system"]
        if self.system_as == "system" or not texts:
            return messages
        if self.system_as == "first":
            first = next(message for message in messages if message.role == "system")
            rest = [message for message in messages if message.role != "system"]
            return [first._replace(content="\n\n".join(texts)), *rest]
        return _into_user_messages(messages)


AS_GIVEN = ContentOptions()


def _into_user_messages(messages: Sequence[Message]) -> list[Message]:
    found, waiting = list[Message](), list[Message]()
    for message in messages:
        if message.role == "system":
            waiting.append(message)
        elif message.role == "user" and waiting:
            texts = [one.content for one in (*waiting, message)]
            found.append(message._replace(content="\n\n".join(texts)))
            waiting = []
        else:
            found.append(message)
    return [*found, *(message._replace(role="user") for message in waiting)]


def refuse_hidden(messages: Sequence[Message], turn: Turn, source: str) -> None:
    """Raise RowError if the rendered turn lacks the text of its answer, or of a system or user message before it.

    A template may render the reasoning of an answer elsewhere, and leave out text beside function calls.
    """
    for number, message in enumerate(messages[turn.first : turn.at], turn.first + 1):
        if message.role in ("system", "user") and not shows(turn.prompt, message.content):
            raise RowError(
                source,
                _(
                    "the chat template does not show message {number} ({role}), so the model would never see it. "
                    "Remove the message, use data.system_as 'user' for system messages, or use another template.",
                    number=number,
                    role=message.role,
                ),
            )
    answer = messages[turn.at]
    text = split_reasoning(answer)[1]
    names = [str(call["function"]["name"]) for call in answer.tool_calls]  # type: ignore[index]
    if turn.answer is None or (answer.tool_calls and all(name in turn.answer for name in names)):
        return
    if not answer.tool_calls and shows(turn.answer, text):
        return
    text = text or listed(names)
    raise RowError(
        source,
        _(
            "the chat template does not show message {number} (assistant) as it is: {found} is rendered for {wanted}. "
            "Change the message, or use another template.",
            number=turn.at + 1,
            found=_short(without_marks(turn.answer)),
            wanted=_short(text),
        ),
    )


def shows(rendered: str, content: str) -> bool:
    """Whether a content is in the rendered text, whatever the template does to its whitespace."""
    rendered, content = without_marks(rendered), content.strip()
    return content in rendered or "".join(content.split()) in "".join(rendered.split())


def different_opening(turn: Turn) -> str:
    """Why a turn has no answer: the two texts where the generation prompt and the rendered answer part."""
    at = common_length([turn.prompt, turn.instead])
    return _(
        "this template does not render an answer the way its own generation prompt begins it, so training would not "
        "match inference: the prompt goes on with {prompt}, the rendered conversation with {answer}. Use "
        "data.template 'human-assistant'.",
        prompt=_short(turn.prompt[at:]),
        answer=_short(turn.instead[at:]),
    )


def _short(text: str) -> str:
    return repr(text[:_SHOWN] + "…" if len(text) > _SHOWN else text)
