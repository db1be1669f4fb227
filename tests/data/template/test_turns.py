"""Turns by prefix differences, and the quick way to the same turns."""

from dataclasses import replace

import pytest

from lorasmith.data.rows.conversation import Conversation, Message, RowError
from lorasmith.data.template.encoding import Template
from lorasmith.data.template.turns import Pattern, prefix_turns
from lorasmith.model.row import IGNORED
from tests.data.corpus.behaviors import BEHAVIORS
from tests.data.corpus.tokenizers import tokenizer_for

SYSTEM = Message("system", "Be brief.")
CHAT = tuple(Message(("user", "assistant")[i % 2], f"what {i} is the sky? " * (i % 3) + "考试") for i in range(9))
QUICK = ("chatml", "llama3", "qwen2.5", "gemma", "mistral", "marked", "tools", "stripped")


@pytest.mark.parametrize("name", [*QUICK, "qwen3", "thought"])
@pytest.mark.parametrize("before", [(), (SYSTEM,)], ids=["alone", "system"])
def test_the_quick_way_gives_the_turns_of_the_long_one(make, name, before):
    jinja = Template.of(make(name)).jinja
    pattern = Pattern.of(jinja)
    assert (pattern is not None) == (name in QUICK)
    if pattern is None or (before and name == "gemma"):  # gemma refuses a system text
        return
    for end in range(1, len(CHAT) + 1):
        messages = [*before, *CHAT[:end]]
        assert pattern.turns(jinja, messages, "") == list(prefix_turns(jinja, messages, ""))


def test_contents_that_a_template_may_look_at_go_the_long_way(make):
    jinja = Template.of(make("stripped")).jinja
    thinking = [CHAT[0], Message("assistant", "<think>\nx\n</think>\n\nblue"), *CHAT[2:4]]
    assert Pattern.of(jinja).turns(jinja, thinking, "") is None
    blanks = [Message("user", " sky "), Message("assistant", " blue ")]
    for name in ("chatml", "gemma"):
        jinja = Template.of(make(name)).jinja
        assert Pattern.of(jinja).turns(jinja, blanks, "") == list(prefix_turns(jinja, blanks, ""))


def test_a_long_conversation_is_rendered_twice(make, monkeypatch):
    template = Template.of(make("qwen2.5"))
    template.encode(CHAT[:2])
    renders = []
    apply = type(template.tokenizer).apply_chat_template
    monkeypatch.setattr(
        type(template.tokenizer), "apply_chat_template", lambda *a, **k: renders.append(1) or apply(*a, **k)
    )
    template.encode(CHAT[:8])
    assert len(renders) == 2


def test_thoughts_that_are_taken_out_of_earlier_turns_are_learned_turn_by_turn(make):
    template = Template.of(make("stripped"))
    answers = ["<think>\nsky\n</think>\n\nblue", "<think>\nmodel\n</think>\n\nsky"]
    chat = [CHAT[0], Message("assistant", answers[0]), CHAT[2], Message("assistant", answers[1])]
    one, two = template.encode_all(chat)
    for example, answer, end in ((one, answers[0], 1), (two, answers[1], 3)):
        learned = [target for target in example.targets if target != IGNORED]
        assert template.tokenizer.decode(learned) == answer + "<|im_end|>"
        prompt = template.encode_prompt(chat[:end])
        assert example.ids[: len(prompt)] == prompt
    assert "<think>" not in template.tokenizer.decode(template.encode_prompt(chat[:3]))
    last_alone = [
        *chat[:1],
        CHAT[1],
        *chat[2:],
    ]  # only the last answer thinks: nothing is taken out, one text holds all
    assert len(template.encode_all(last_alone)) == 1


def test_tools_are_shown_or_refused(make):
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}
    messages = (
        Message("user", "sky?"),
        Message("assistant", "", tool_calls=(call,)),
        Message("tool", "blue", tool_call_id="1"),
        Message("assistant", "It is blue."),
    )
    row = Conversation(messages, "a:1", ({"type": "function", "function": {"name": "look"}},))
    shown, blind = Template.of(make("tools")), Template.of(make("chatml"))
    for kind in (blind, Template.of(make("chatml"), "human-assistant"), Template.of(make("chatml"), "alpaca")):
        with pytest.raises(RowError, match=r"^a line 1: the template does not show 'tool_calls'"):
            kind.encode_row(replace(row, tools=()))
        with pytest.raises(RowError, match=r"^b line 2: the template has no place for 'tools'"):
            kind.encode_prompt(messages[:1], row.tools, "b:2")
        with pytest.raises(RowError, match=r"^the template does not show 'tool_calls'"):
            kind.encode_prompt(messages[:3])
    (example,) = shown.encode_row(row)
    assert (
        shown.encode_prompt(messages[:3], row.tools) == example.ids[: len(shown.encode_prompt(messages[:3], row.tools))]
    )
    learned = shown.tokenizer.decode([t for t in example.targets if t != IGNORED])
    assert learned == '<tool_call>{"name": "look", "arguments": {"at": "sky"}}<|im_end|>It is blue.<|im_end|>'


@pytest.mark.parametrize(("question", "answer"), [("", "Yes."), ("hi", "Oh hi there"), ("   ", "Yes.")])
def test_a_system_message_in_prompts_only_and_odd_contents(question, answer):
    """The question is empty, or the answer repeats it."""
    one = BEHAVIORS["a system message in prompts only"]
    template = Template.of(tokenizer_for(one.text, "<s>", one.eos))
    messages = (Message("system", "Be kind."), Message("user", question), Message("assistant", answer))
    if not question.strip():
        with pytest.raises(RowError, match="does not render an answer the way"):
            template.encode(messages)
        return
    example = template.encode(messages)
    assert template.tokenizer.decode([t for t in example.targets if t != IGNORED]) == answer + "</s>"
