"""The templates that come with this program, one from a file, and a system text: the same in training and after."""

import json
from dataclasses import replace

import pytest

from lorasmith.config.data import DataConfig
from lorasmith.data.rows.conversation import Conversation, Message, Record
from lorasmith.data.template.encoding import Template
from lorasmith.errors import AdapterError, ConfigError, ModelError
from tests.data.conftest import CHATML, TOOLS

CHAT = (
    Message("user", "what is the sky?"),
    Message("assistant", "blue"),
    Message("user", "考试"),
    Message("assistant", "先做会做的题。"),
)


def test_chatml(make):
    template = Template.of(make(), "chatml", system="Be kind.")
    assert template.render(CHAT[:3]) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nwhat is the sky?<|im_end|>\n"
        "<|im_start|>assistant\nblue<|im_end|>\n<|im_start|>user\n考试<|im_end|>\n<|im_start|>assistant\n"
    )
    end = template.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert set(template.stop_ids) == {end, template.tokenizer.eos_token_id}


def test_chatml_needs_its_tokens(make):
    bare = make()
    bare.get_vocab = lambda: {"a": 0}
    with pytest.raises(ConfigError, match=r"'chatml' needs the tokens <\|im_start\|>, <\|im_end\|>, which"):
        Template.of(bare, "chatml")


# As github.com/tatsu-lab/stanford_alpaca has them in train.py.
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@pytest.mark.parametrize(("given", "pattern"), [("the sky", WITH_INPUT), ("", WITHOUT_INPUT)])
def test_alpaca_is_stanfords_prompt(make, given, pattern):
    template = Template.of(make(), "alpaca")
    fields = {"instruction": "Translate.", "input": given, "output": "天"}
    messages = template.conversation(Record(dict(fields), "a:1")).messages
    example = template.encode(messages)
    assert template.tokenizer.decode(example.ids) == pattern.format(**fields) + "天<eos>"
    assert template.encode_prompt(messages[:1]) == example.ids[: -example.n_targets]


def test_alpaca_goes_on_with_a_second_question(make):
    text = Template.of(make(), "alpaca", system="Be kind.").render(CHAT[:3])
    assert text == (
        "Be kind.\n\n### Instruction:\nwhat is the sky?\n\n### Response:\nblue<eos>\n\n"
        "### Instruction:\n考试\n\n### Response:\n"
    )
    bare = make()
    bare.eos_token = None
    with pytest.raises(ModelError, match="'alpaca' ends each answer with the tokenizer's EOS token"):
        Template.of(bare, "alpaca")


def test_a_jinja_file(make, tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text(
        "{% for m in messages %}<start_of_turn>{{ m.role }}: {{ m.content }}<end_of_turn>{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>assistant: {% endif %}\n",
        "utf-8",
    )
    template = Template.of(make("chatml"), str(path))
    text = "<start_of_turn>user: what is the sky?<end_of_turn><start_of_turn>assistant:"  # the blank is the answer's
    assert template.render(CHAT[:1]) == text
    path.unlink()
    loaded = Template.from_json(json.loads(json.dumps(template.to_json())), make())
    assert (loaded.kind, loaded.render(CHAT[:1])) == ("file", text)
    assert loaded.stop_ids == template.stop_ids


def test_a_file_that_cannot_be_used(make, tmp_path):
    path = tmp_path / "chat.jinja"
    with pytest.raises(
        ConfigError, match=r"chat\.jinja' is not one of auto, model, .*cannot be read as a file: No such file"
    ):
        Template.of(make(), str(path))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"chat\.jinja: byte 0 is not valid UTF-8"):
        Template.of(make(), str(path))
    path.write_text(" \n")
    with pytest.raises(ConfigError, match=r"chat\.jinja is empty"):
        Template.of(make(), str(path))
    path.write_text("{% for m in messages %}\n{{ m.content }\n{% endfor %}")
    with pytest.raises(ConfigError, match=r"chat\.jinja line 2: invalid Jinja: unexpected '}'"):
        Template.of(make(), str(path))


def test_a_name_that_is_none_is_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match=r"'chatm' is not one of auto, .*\. Did you mean 'chatml'\?"):
        DataConfig(template="chatm")
    assert DataConfig(template="./mine").template == "./mine"


def test_a_system_text_stands_before_conversations_that_have_none(make):
    template = Template.of(make("qwen2.5"), system="Be brief.")
    own = (Message("system", "Be long."), *CHAT)
    assert template.render(CHAT).startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert "Be brief." not in template.render(own)
    example = template.encode(CHAT)
    assert template.tokenizer.decode(example.ids) == template.render(CHAT)
    loaded = Template.from_json(json.loads(json.dumps(template.to_json())), make("qwen2.5"))
    assert loaded.encode_prompt(CHAT[:3]) == template.encode_prompt(CHAT[:3])
    assert template.render(CHAT) != Template.of(make("qwen2.5")).render(CHAT)


def test_a_system_text_that_the_template_cannot_show(make):
    with pytest.raises(
        ConfigError,
        match=r"^data\.system: .*rejected this conversation: System role not supported\. Remove the system message",
    ):
        Template.of(make("gemma"), system="Be brief.")
    deaf = make("chatml")
    deaf.chat_template = "{% for m in messages if m.role != 'system' %}{{ m.content + '<eos>' }}{% endfor %}"
    with pytest.raises(ConfigError, match=r"^data\.system: this template ignores system messages"):
        Template.of(deaf, system="Be brief.")


def test_a_model_with_several_templates(make):
    """The one for tools is used for rows with tools; another is chosen by its name."""
    tokenizer = make()
    shout = CHATML.replace("['content']", "['content'] | upper")
    tokenizer.chat_template = {"default": CHATML, "tool_use": TOOLS, "shout": shout}
    template = Template.of(tokenizer)
    assert template.text == CHATML
    row = Conversation((Message("user", "a"), Message("assistant", "b")), "row", ({"name": "look"},))
    assert '"look"' in tokenizer.decode(template.encode_row(row)[0].ids)
    assert '"look"' not in tokenizer.decode(template.encode_row(replace(row, tools=()))[0].ids)
    saved = Template.from_json(json.loads(json.dumps(template.to_json())), tokenizer)
    assert saved.encode_row(row) == template.encode_row(row)
    assert "A<|im_end|>" in Template.of(tokenizer, "shout").render(row.messages)
    with pytest.raises(
        ConfigError, match=r"^data\.template: 'whisper' is not one of .*, tool_use, shout; to use a Jinja"
    ):
        Template.of(tokenizer, "whisper")
    del tokenizer.chat_template["default"]
    with pytest.raises(ConfigError, match=r"several chat templates and none is called 'default'.*: tool_use, shout"):
        Template.of(tokenizer)


def test_a_template_of_the_first_version_is_read(make):
    old = Template.of(make("chatml")).to_json() | {"version": 1}
    del old["system"]
    assert Template.from_json(old, make("chatml")).system == ""
    with pytest.raises(AdapterError, match="version 4"):
        Template.from_json(old | {"version": 4}, make("chatml"))
