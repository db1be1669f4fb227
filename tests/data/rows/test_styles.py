"""The keys and roles of messages, and messages that are pairs."""

import pytest

from lorasmith.data.rows.styles import CALL, OPENAI, SHAREGPT, detect_style, expand_pairs, rename_roles, unread_keys


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


def test_the_keys_of_both_styles_may_be_mixed():
    style = detect_style([{"role": "human", "value": "Hi"}])
    assert (style.role, style.content) == ("role", "value")
    style = detect_style([{"from": "user", "content": "Hi"}])
    assert (style.role, style.content) == ("from", "content")


@pytest.mark.parametrize(
    ("name", "role"),
    [("developer", "system"), ("human", "user"), ("bot", "assistant"), ("chatgpt", "assistant"), ("bing", "assistant"),
     ("observation", "tool"), ("tool_response", "tool"), ("tool_call", CALL), ("function_call", CALL), ("pupil", None)],
)  # fmt: skip
def test_names_of_roles(name, role):
    assert OPENAI.role_of({"role": name}) == SHAREGPT.role_of({"from": name}) == role


def test_a_function_is_a_result_in_openais_files_and_a_call_in_sharegpts():
    assert (OPENAI.role_of({"role": "function"}), SHAREGPT.role_of({"from": "function"})) == ("tool", CALL)
    assert (OPENAI.role_of({"role": ["user"]}), OPENAI.role_of("Hi")) == (None, None)
    assert (OPENAI.answer, SHAREGPT.answer) == ("assistant", "gpt")


def test_pairs_are_messages():
    pairs = [{"system": "Be kind."}, {"human": "Hi", "assistant": "Hello", "id": 1}, {"tool": "sun", "gpt": "Sunny."}]
    assert expand_pairs(pairs) == [
        {"role": "system", "content": "Be kind."},
        {"role": "human", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "tool", "content": "sun"},
        {"role": "gpt", "content": "Sunny."},
    ]
    assert expand_pairs([{"system": "", "input": "Hi", "output": "Hello", "output_with_loss": False}]) == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello", "output_with_loss": False},
    ]
    others = [{}, "Hi", {"role": "user", "user": "x"}, {"user": "x", "text": "y"}, {"model": "gpt-4"}]
    assert expand_pairs(others) == others
    assert unread_keys(pairs[1], frozenset()) == {"id"}
    assert unread_keys({"user": "x", "text": False, "role": "a", "y": None}, frozenset({"role"})) == {"user", "text"}


def test_roles_are_renamed_in_messages_and_pairs():
    roles = {"customer": "user", "agent": "assistant", "boss": "system"}
    row = {
        "messages": [{"role": "customer", "content": "Hi", "agent": "x"}, {"from": "gpt", "value": "Hello"}, "?"],
        "conversation": [{"customer": "Hi", "agent": "Hello"}],
        "history": [{"role": "customer"}],
    }
    found, names = rename_roles(row, roles)
    assert found == {
        "messages": [{"role": "user", "content": "Hi", "agent": "x"}, {"from": "gpt", "value": "Hello"}, "?"],
        "conversation": [{"user": "Hi", "assistant": "Hello"}],
        "history": [{"role": "customer"}],
    }
    assert names == {"customer", "agent"}
    assert row["messages"][0]["role"] == "customer"
