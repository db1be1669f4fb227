"""What is learned under each behavior of chat templates, against the oracle and by hand."""

import pytest

from lorasmith.data.rows.conversation import Conversation, Message, Record, RowError
from lorasmith.data.template.encoding import Template
from tests.data.corpus.behaviors import BEHAVIORS
from tests.data.corpus.conversations import KINDS, TOOLS
from tests.data.corpus.oracle import REFUSED, RIGHT, TOLD, judge, learned
from tests.data.corpus.tokenizers import tokenizer_for

# What is not learned exactly: where the template has no place for it.
ALLOWED = {
    ("reasoning cut out of the content", "thinking"): TOLD,
    ("no place for a system message", "system"): REFUSED,
    ("calls are not shown", "tool call"): REFUSED,
    ("tools are not shown", "tool call"): TOLD,
    ("empty thought before every answer", "thinking"): TOLD,
}
SHOWS_CALLS = [name for name, one in BEHAVIORS.items() if "tool_calls" in one.text]


def template_of(name: str) -> Template:
    one = BEHAVIORS[name]
    tokenizer = tokenizer_for(one.text, "<s>", one.eos, one.ends)
    return Template.of(tokenizer, "model", tokenizer.convert_tokens_to_ids(list(one.ends)))


@pytest.mark.parametrize("name", BEHAVIORS)
def test_the_oracle_agrees(name):
    template = template_of(name)
    for kind, messages in KINDS.items():
        if kind == "tool call" and name not in SHOWS_CALLS and (name, kind) not in ALLOWED:
            continue
        verdict = judge(template, template.tokenizer, messages)
        wanted = next((fate for (one, part), fate in ALLOWED.items() if one == name and part in kind), RIGHT)
        assert verdict.fate == wanted, (kind, verdict.why)


def texts(name: str, kind: str = "plain") -> list[str]:
    """What is learned, one text for each answer."""
    template = template_of(name)
    row = template.conversation(Record({"messages": KINDS[kind], "tools": TOOLS * (kind == "tool call")}, "row"))
    return [run.text for example in template.encode_row(row) for run in learned(template.tokenizer, example)]


@pytest.mark.parametrize(
    ("name", "kind", "wanted"),
    [
        ("opened thought in the prompt", "plain", ["Qanswer0z.<|im_end|>"]),
        ("opened thought in the prompt", "inline thinking", ["<think>\nQthought0z.\n</think>\n\nQanswer0z.<|im_end|>"]),
        ("empty thought in the prompt", "plain", ["Qanswer0z.<|im_end|>"]),
        ("prompt that shares half a token", "plain", ["<|START_RESPONSE|>Qanswer0z.<|im_end|>"]),
        ("no generation prompt", "plain", ["Qanswer0z.<|im_end|>"]),
        ("other blank lines before the prompt", "plain", ["Qanswer0z.</s>"]),
        ("the next role ends an answer", "two turns", ["Qanswer0z.<|user|>", "Qanswer1z.<|user|>"]),
        ("no end at all", "two turns", ["Qanswer0z.</s>", "Qanswer1z.</s>"]),
        ("a second end after the last answer", "plain", ["Qanswer0z.<|end|>"]),
        ("several tokens close an answer", "plain", ["Qanswer0z.<|close|>answer<|sep|><|end_of_msg|>"]),
        ("reasoning under thinking", "thinking", ["<think>\nQthought0z.\n</think>\n\nQanswer0z.<|im_end|>"]),
        (
            "reasoning of the last answer only",
            "thinking, two turns",
            [f"<think>\nQthought{i}z.\n</think>\n\nQanswer{i}z.<|im_end|>" for i in (0, 1)],
        ),
        ("empty thought before every answer", "plain", ["<think>\n\n</think>\n\nQanswer0z.<|im_end|>"]),
        ("a system message in prompts only", "system", ["Qanswer0z.</s>"]),
        (
            "arguments as text",
            "tool call",
            ['<tool_call>get_stock0z {"item": "Qitem0z"}</tool_call><|im_end|>', "Qanswer0z.<|im_end|>"],
        ),
        ("generation tags around the role", "plain", ["<|im_start|>assistant\nQanswer0z.<|im_end|>"]),
    ],
)
def test_what_is_learned(name, kind, wanted):
    assert texts(name, kind) == wanted


@pytest.mark.parametrize("name", BEHAVIORS)
def test_other_programs_render_the_prompt_of_the_training(name):
    template = template_of(name)
    messages = [{"role": "user", "content": "Q?"}]
    given = [{"role": "user", "content": [{"type": "text", "text": "Q?"}]}] if "parts" in name else messages
    text = template.tokenizer.apply_chat_template(
        given, tokenize=False, add_generation_prompt=True, chat_template=template.as_jinja()
    )
    assert text == template.render([Message("user", "Q?")])


def test_text_beside_a_call_and_tools_that_are_not_shown_are_told():
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    messages = (Message("user", "Q?"), Message("assistant", "Let me look.", tool_calls=(call,)))
    row = Conversation(messages, "row", tuple(TOOLS))
    assert template_of("text beside a call is lost").lost(row) == {"text"}
    assert template_of("tools are not shown").lost(row) == {"tools"}
    assert template_of("arguments as an object").lost(row) == set()


def test_an_answer_that_vanishes_is_refused():
    text = "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content if m.role == 'user' else '') + "
    text += "'<|im_end|>\n' }}{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
    template = Template.of(tokenizer_for(text, "<s>", "<|im_end|>"))
    with pytest.raises(
        RowError, match=r"does not show message 2 \(assistant\) as it is: '<\|im_end\|>\\n' is rendered"
    ):
        template.encode([Message("user", "Q?"), Message("assistant", "Four.")])


def test_a_template_whose_prompt_and_answer_cannot_be_brought_together_is_refused_with_both_texts():
    text = BEHAVIORS["reasoning under reasoning_content"].text
    text = text.replace("{%- endif %}{{ m.content", "{%- else %}{{ '<think></think>' }}{%- endif %}{{ m.content")
    prompt = "{{ '<|im_start|>assistant\n' }}{%- endif %}"
    text = text.removesuffix(prompt) + prompt.replace("assistant\n", "assistant\n<think></think>")
    template = Template.of(tokenizer_for(text, "<s>", "<|im_end|>"))
    assert template.encode([Message("user", "Q?"), Message("assistant", "Four.")])
    with pytest.raises(RowError, match=r"the prompt goes on with '</think>', the rendered conversation with '\\nHm"):
        template.encode([Message("user", "Q?"), Message("assistant", "Four.", reasoning="Hm.")])
