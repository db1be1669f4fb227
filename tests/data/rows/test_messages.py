"""Lists of messages in OpenAI's and ShareGPT's keys: what they become, and what is said of invalid ones."""

import json
import re

import pytest

from lorasmith.data.rows.cells import parse_list_cells
from lorasmith.data.rows.conversation import Conversation, Message, Record, RowError
from lorasmith.data.rows.formats import to_conversation
from lorasmith.data.rows.messages import OPENAI, SHAREGPT, detect_style, parse_messages
from tests.support.row_files import CHAT

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}


@pytest.fixture
def made():
    """`made(row)`: the conversation of a row."""
    return lambda row: to_conversation(Record(row, "a:1"))


def test_sharegpt_and_chat_say_the_same_with_tools(made):
    call = {"name": "weather", "arguments": {"city": "Köln"}}
    talk = [("human", "Weather?"), ("function_call", json.dumps(call)), ("observation", "sun"), ("gpt", "Sunny.")]
    row = {
        "conversations": [{"from": f, "value": v} for f, v in talk],
        "system": "Be kind.",
        "tools": [TOOL],
    }
    sharegpt = made(row)
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": call | {"arguments": '{"city": "Köln"}'}}]},
        {"role": "tool", "content": "sun"},
        {"role": "assistant", "content": "Sunny.", "tool_calls": None, "name": None},
    ]
    chat = made({"messages": messages, "tools": [TOOL]})
    assert sharegpt == Conversation(chat.messages, sharegpt.source, (TOOL,))
    assert chat.tools == (TOOL,)
    assert [message._asdict() for message in chat.messages[2:4]] == [
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "sun"},
    ]


def test_a_content_of_parts_is_their_text(made):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo", "image": None}]
    assert made(chat(content=parts)).messages == made(CHAT).messages
    values = [{"from": "human", "value": parts[:1]}, {"from": "gpt", "value": parts}]
    assert [message.content for message in made({"conversations": values}).messages] == ["Hel", "Hello"]


@pytest.mark.parametrize(
    ("messages", "style"),
    [
        ([], OPENAI),
        (["Hi", {"from": "human"}], SHAREGPT),
        ([{"role": "user", "from": "human"}], OPENAI),
        ([{}], OPENAI),
    ],
)
def test_the_first_message_with_a_role_decides_the_style(messages, style):
    assert detect_style(messages) is style


def test_unset_keys_have_their_defaults():
    (message,) = parse_messages([{"role": "assistant", "content": "Hi", "learn": None, "weight": None, "name": None}])
    assert message == Message("assistant", "Hi")


# -- messages that cannot be used -----------------------------------------------------------------------------------


def chat(**message):
    return {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"} | message]}


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"messages": "Hi"}, "'messages' must be a list of messages, found text."),
        ({"messages": []}, "'messages' is empty"),
        ({"messages": ["Hi"]}, "message 1 must be an object with 'role' and 'content', found text."),
        ({"messages": [{"role": "user", "text": "Hi"}]}, "message 1 has no 'content', only 'role', "
         '\'text\'. A message looks like {"role": ..., "content": ...}.'),
        ({"messages": [{"role": "bot", "content": "Hi"}]}, "message 1 has the unknown role 'bot'; "
         "supported roles are 'system', 'user', 'assistant', 'tool'."),
        ({"messages": [{"role": ["user"], "content": "Hi"}]}, "message 1 has the unknown role ['user']; "
         "supported roles are"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "message 1 (user): 'content': part 1 must "
         'look like {"type": "text", "text": ...}, found \'type\'.'),
        (chat(content=[{"type": "image"}, "Hello"]), "message 2 (assistant): 'content': part 2 must look like"),
        (chat(content=[{"type": "text", "text": " "}]), "message 2 (assistant): the message is empty"),
        ({"messages": str(CHAT["messages"])}, "'messages' contains a Python literal, not JSON. Write it with"),
        ({"messages": "[" * 10**5}, "'messages' is text that is not valid JSON: nested too deeply."),
        ({"messages": '{"role": "user"}'}, "'messages' must be a list of messages, found an object."),
        ({"messages": CHAT["messages"][:1]}, "no message has the role 'assistant', so there is nothing to train on. "
         "Add an answer, or remove the row."),
        ({"messages": [*CHAT["messages"], {"role": "assistant", "content": ""}]}, "message 3 "
         "(assistant): the message is empty"),
        ({"conversations": [{"role": "user", "content": "a"}, {"from": "gpt", "value": "b"}]}, "message 2 has "
         "no 'role', only 'from', 'value'."),
        ({"conversations": [{"from": "human", "value": "Hi"}]}, "no message has the role 'gpt', so there is nothing"),
        ({"conversations": [{"from": "Humans", "value": "Hi"}]}, "message 1 has the unknown role 'Humans'; "
         "supported roles are 'human', 'gpt', 'system', 'function_call', 'observation'. Did you mean 'human'?"),
        ({"conversations": [{"from": "function", "value": "sun"}]}, "message 1 (function): the text must be a "
         'function call in JSON, such as {"name": ..., "arguments": {...}}. For the result of a function, use the role '
         "'observation'."),
        (chat(tool_calls=[{"function": {"name": "f", "arguments": "{"}}]), "message 2 (assistant): 'tool_calls' must "
         "be a list like "),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [CALL]}]}, "only an assistant message "
         "can have 'tool"),
        (chat(learn="no"), "message 2 (assistant): 'learn' must be true or false, found text."),
        (chat(weight=-1), "message 2 (assistant): 'weight' must be between 0 and 1000000, found -1."),
        (chat(weight=True), "message 2 (assistant): 'weight' must be a number, found true or false."),
        (chat(learn=False), "every answer has 'learn' false or 'weight' 0, so there is nothing to train on."),
        (CHAT | {"tools": "[{"}, "'tools' is not valid JSON (line 1, column 3 of its text): "),
        (CHAT | {"tools": ["weather"]}, "'tools' must be a list of function schemas, found a list."),
    ],
)  # fmt: skip
def test_an_invalid_message_is_named(row, text):
    with pytest.raises(RowError, match=re.escape(text)):
        to_conversation(Record(parse_list_cells(row), "a:1"))
