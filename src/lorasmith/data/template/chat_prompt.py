"""The prompt of a chat. Unlike a row, it may begin with an answer, and end with the beginning of one."""

from collections.abc import Sequence
from typing import Any

from lorasmith.data.rows.conversation import Message, RowError
from lorasmith.data.template.encoding import Template
from lorasmith.i18n import _


def chat_texts(template: Template, messages: Sequence[Message], tools: Sequence[Any] = ()) -> list[str]:
    """The texts of the prompt for the next answer, which are tokenized separately.

    If the last message is an answer, the reply continues it. Raises RowError if the template rejects the messages.
    """
    if not messages or messages[-1].role != "assistant":
        return template.prompt_texts(messages, tools, may_lead=True)
    begun = messages[-1]
    if begun.tool_calls or begun.reasoning:
        raise RowError(
            "", _("the last message is an answer with tool calls or reasoning, which a reply cannot continue.")
        )
    texts = template.prompt_texts(messages[:-1], tools, may_lead=True)
    content = template.shielded([begun])[0].content
    if template.is_whole:
        return [*texts[:-1], texts[-1] + content]
    return [*texts, content] if content else texts
