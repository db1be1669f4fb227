"""Lists of messages in OpenAI's and ShareGPT's keys: what they become, and what is said of invalid ones."""

import json
import re

import pytest

from lorasmith.data.rows.cells import parse_list_cells
from lorasmith.data.rows.conversation import Conversation, Message, Record, RowError
from lorasmith.data.rows.formats import to_conversation
from lorasmith.data.rows.messages import marks_prompts, parse_messages, unread_message_keys
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


def test_unset_keys_have_their_defaults():
    (message,) = parse_messages([{"role": "assistant", "content": "Hi", "learn": None, "weight": None, "name": None}])
    assert message == Message("assistant", "Hi")


def test_reasoning_is_kept_under_every_key_and_as_a_part(made):
    answer = Message("assistant", "4", reasoning="Two and two.")
    for key in ("reasoning_content", "thinking", "reasoning"):
        row = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", key: answer[7], "content": "4"}]}
        assert made(row).messages[1] == answer
    parts = [{"type": "thinking", "thinking": answer.reasoning, "signature": "x"}, {"type": "text", "text": "4"}]
    assert made(chat(content=parts)).messages[1] == answer
    assert unread_message_keys([{"role": "assistant", "content": "4", "thinking": True, "id": False, "x": None}]) == {
        "thinking", "id",
    }  # fmt: skip
    cached = {"type": "text", "text": "4", "cache_control": {"type": "ephemeral"}}
    assert unread_message_keys([{"role": "user", "content": [cached]}]) == {"content.cache_control"}


def test_calls_in_every_form_are_calls_of_one_answer(made):
    """ms-swift's and ShareGPT's messages that are calls, OpenAI's older key, Anthropic's and LLaMA-Factory's parts."""
    bare = {"name": "weather", "arguments": {"city": "Köln"}}
    text = json.dumps(bare)
    ask, end = {"role": "user", "content": "Weather?"}, {"role": "assistant", "content": "Sunny."}
    swift = [
        ask,
        {"role": "assistant", "content": "I look."},
        {"role": "tool_call", "content": text},
        {"role": "tool_call", "content": bare},
        {"role": "tool_response", "content": {"sky": "blue"}},
        {"role": "tool_response", "content": "sun"},
        end,
    ]
    messages = made({"messages": swift}).messages
    assert messages[1] == Message("assistant", "I look.", (CALL, CALL))
    assert [(message.role, message.content) for message in messages[2:4]] == [
        ("tool", '{"sky": "blue"}'),
        ("tool", "sun"),
    ]
    older = [
        ask,
        {
            "role": "assistant",
            "content": None,
            "function_call": {"name": "weather", "arguments": json.dumps(bare["arguments"])},
        },
    ]
    result = {"role": "function", "name": "weather", "content": "sun"}
    assert made({"messages": [*older, result, end], "functions": [TOOL["function"]]}) == Conversation(
        (
            Message("user", "Weather?"),
            Message("assistant", "", (CALL,)),
            Message("tool", "sun", name="weather"),
            Message("assistant", "Sunny."),
        ),
        "a:1",
        (TOOL,),
    )
    factory = [
        ask,
        {"role": "assistant", "content": [{"type": "reasoning", "value": "Hm."}, {"type": "tool_call", "value": text}]},
    ]
    assert made({"messages": factory}).messages[1] == Message("assistant", "", (CALL,), reasoning="Hm.")


def test_anthropics_blocks_are_messages(made):
    blocks = [
        {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
        {"role": "assistant", "content": [
            {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Köln"}},
        ]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1",
                                      "content": [{"type": "text", "text": "sun"}]}, {"type": "text", "text": "And?"}]},
        {"role": "assistant", "content": "Sunny."},
    ]  # fmt: skip
    assert made({"messages": blocks}).messages == (
        Message("user", "Weather?"),
        Message("assistant", "I look.", ({"id": "t1", **CALL},)),
        Message("tool", "sun", tool_call_id="t1"),
        Message("user", "And?"),
        Message("assistant", "Sunny."),
    )


def test_marks_of_other_programs_decide_what_is_trained_on(made):
    wrong, right = ("gpt", "WRONG"), ("gpt", "No: four.")
    for mark in ({"train": False}, {"loss": False}, {"training": False}, {"learn": False}):
        row = [{"from": "human", "value": "2+2?"}, {"from": wrong[0], "value": wrong[1]} | mark,
               {"from": "human", "value": "Sure?"}, {"from": right[0], "value": right[1]}]  # fmt: skip
        assert [m.learn for m in made({"conversations": row}).messages] == [True, False, True, True]
    assert made(chat(loss_weight=0.5, loss_scale=2, weight=3)).messages[1].weight == 3
    details = [
        {"begin_offset": 0, "end_offset": 1, "train": True},
        {"begin_offset": 2, "end_offset": 4, "train": False},
    ]
    assert made(chat(train_detail=details)).messages[1].masked == ((2, 5),)


def test_a_reasoning_that_stands_twice_is_read_once(made):
    parts = [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "Hello"}]
    assert made(chat(content=parts, thinking="Hm.")).messages[1] == Message("assistant", "Hello", reasoning="Hm.")


def test_marks_of_parts_mask_their_text(made):
    parts = [{"type": "text", "text": "SECRET ", "train": False}, {"type": "text", "text": "good"}]
    assert made(chat(content=parts)).messages[1] == Message("assistant", "SECRET good", masked=((0, 7),))
    none = {"role": "assistant", "content": [parts[0]]}
    messages = made({"messages": [none, *chat()["messages"]]}).messages
    assert [one.learn for one in messages] == [False, True, True]
    detail = {"begin_offset": 3, "end_offset": 8, "train": True}
    assert made(chat(content=parts, train_detail=[detail])).messages[1].masked == ((0, 7), (9, 11))
    result = {"type": "tool_result", "tool_use_id": "t", "content": [parts[0]]}
    tool = made({"messages": [{"role": "user", "content": [result]}, *chat()["messages"]]}).messages[0]
    assert tool == Message("tool", "SECRET ", tool_call_id="t", learn=False, masked=((0, 7),))


def test_marks_on_prompts_are_found():
    asked = {"role": "user", "content": "Hi"}
    assert marks_prompts([asked | {"train": True}])
    assert not marks_prompts([asked, {"role": "assistant", "content": "Hello", "train": True}])
    assert marks_prompts([{"role": "user", "content": [{"type": "text", "text": "Hi", "train": True}]}])
    assert not marks_prompts("Hi")


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
        ({"messages": [{"role": "pupil", "content": "Hi"}]}, "message 1 has the unknown role 'pupil'; "
         "supported roles are 'system', 'user', 'assistant', 'tool'. If it is one of them, say which: --roles "
         "pupil=user."),
        ({"messages": [{"role": "Customer", "content": "Hi"}]}, "say which: --roles Customer=user."),
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
         "look like "),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [CALL]}]}, "only an assistant message "
         "can have 'tool"),
        (chat(learn="no"), "message 2 (assistant): 'learn' must be true or false, found text."),
        (chat(weight=-1), "message 2 (assistant): 'weight' must be between 0 and 1000000, found -1."),
        (chat(weight=True), "message 2 (assistant): 'weight' must be a number, found true or false."),
        (chat(learn=False), "every answer is marked not to be trained on ('learn'), so there is nothing to train on."),
        (chat(content=[{"type": "text", "text": "a", "weight": 0}]), "not to be trained on ('weight'), so there"),
        (chat(train=False, loss_weight=0), "not to be trained on ('train', 'loss_weight')"),
        (chat(reasoning_content="a", thinking="b"), "the keys 'reasoning_content', 'thinking' hold different texts."),
        (chat(content=[{"type": "thinking", "thinking": "a"}, {"type": "text", "text": "b"}], reasoning_content="c"),
         "message 2 (assistant): the keys 'reasoning_content', 'content.thinking' hold different texts."),
        ({"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "a"}]}, *CHAT["messages"]]},
         "message 1 (user): only an assistant message can have 'content.thinking'."),
        ({"messages": [{"role": "user", "content": "a", "reasoning": "b"}]}, "message 1 (user): only an assistant "
         "message can have 'reasoning'."),
        (chat(content=[{"type": "image_url"}]), "found a part of type 'image_url', but only text can be trained on"),
        ({"messages": [{"role": "user", "content": "<image>\nWhat?"}]}, "message 1 (user): found <image>, but only"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use", "name": "f", "input": {}}]}]}, "message 1 "
         "(user): only an assistant message can have function calls."),
        (chat(function_call={"name": "f", "arguments": "{"}), "message 2 (assistant): 'function_call' must look like"),
        (CHAT | {"tools": [TOOL], "functions": [TOOL]}, "the row has both 'tools' and 'functions'."),
        (CHAT | {"tools": "[{"}, "'tools' is not valid JSON (line 1, column 3 of its text): "),
        (CHAT | {"tools": ["weather"]}, "'tools' must be a list of function schemas, found a list."),
    ],
)  # fmt: skip
def test_an_invalid_message_is_named(row, text):
    with pytest.raises(RowError, match=re.escape(text)):
        to_conversation(Record(parse_list_cells(row), "a:1"))
