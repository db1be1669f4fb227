import json

import pytest

from lorasmith.data.dataset.fit import truncate
from lorasmith.data.rows.conversation import Message, Record
from lorasmith.data.template.contents import ContentOptions
from lorasmith.data.template.encoding import Template
from lorasmith.errors import ConfigError, DataError, ModelError
from lorasmith.model.row import IGNORED, Example
from tests.support.paths import SHARED

# Ends of turn of the stock templates in conftest.py.
STOCK = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "qwen2.5": "<|im_end|>", "gemma": "<end_of_turn>"}
TWO_TURNS = (
    Message("user", "what is the sky?"),
    Message("assistant", "the sky is blue.\n\nIs it?  "),
    Message("user", "考试有哪些技巧？"),
    Message("assistant", "先做会做的题。"),
)


def learned(template: Template, example: Example) -> list[str]:
    """The learned text, one string for each unbroken stretch."""
    runs, open_run = [], False
    for target in example.targets:
        if target != IGNORED:
            runs = runs if open_run else [*runs, []]
            runs[-1].append(target)
        open_run = target != IGNORED
    return [template.tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("name", STOCK)
def test_every_answer_is_learned_with_its_stop_token_and_nothing_else(make, name):
    template = Template.of(make(name))
    example = template.encode(TWO_TURNS, "train.jsonl:3")
    strips = name in ("llama3", "gemma")
    answers = [m.content.strip() if strips else m.content for m in TWO_TURNS if m.role == "assistant"]
    assert learned(template, example) == [answer + STOCK[name] for answer in answers]
    assert all(t in (IGNORED, following) for t, following in zip(example.targets, example.ids[1:], strict=False))
    assert example.targets[-1] == IGNORED
    assert example.source == "train.jsonl:3"
    assert set(example.weights) == {1.0}


@pytest.mark.parametrize("name", STOCK)
def test_ids_are_those_of_the_whole_render_and_prompts_are_their_prefixes(make, name):
    template = Template.of(make(name))
    example = template.encode(TWO_TURNS)
    assert template.tokenizer.decode(example.ids) == template.render(TWO_TURNS)
    if name != "llama3":  # whose clock stands still here and nowhere else
        whole = [m._asdict() for m in TWO_TURNS]
        assert template.render(TWO_TURNS) == template.tokenizer.apply_chat_template(whole, tokenize=False)
    starts = [i + 1 for i, t in enumerate(example.targets) if t != IGNORED and example.targets[i - 1] == IGNORED]
    for end, start in zip((1, 3), starts, strict=True):
        assert template.encode_prompt(TWO_TURNS[:end]) == example.ids[:start]


@pytest.mark.parametrize("name", STOCK)
def test_a_begin_token_stands_once_and_only_where_the_template_puts_it(make, name):
    template = Template.of(make(name))
    count = template.encode(TWO_TURNS).ids.count(template.tokenizer.bos_token_id)
    assert count == (1 if name in ("llama3", "gemma") else 0)


@pytest.mark.parametrize("name", STOCK)
def test_stop_tokens_are_found_by_trying(make, name):
    tokenizer = make(name)
    ids = {tokenizer.convert_tokens_to_ids(STOCK[name]), tokenizer.eos_token_id, 17}
    assert Template.of(tokenizer, eos_ids=[17]).stop_ids == tuple(sorted(ids))


def test_what_follows_the_last_answer_changes_nothing(make):
    template = Template.of(make("chatml"))
    assert template.encode([*TWO_TURNS, Message("user", "More?")]) == template.encode(TWO_TURNS)


def test_the_clock_of_a_template_stands_still(make):
    text = Template.of(make("llama3")).render(TWO_TURNS)
    assert "Today is 26 Jul 2024\n" in text


def test_a_template_that_rewrites_earlier_turns_gives_an_example_for_each_answer(make):
    template = Template.of(make("qwen3"))
    with pytest.raises(DataError, match=r"train\.jsonl line 7: this template rewrites earlier turns"):
        template.encode(TWO_TURNS, "train.jsonl:7")
    examples = template.encode_all(TWO_TURNS)
    assert len(examples) == 2
    thought = "<think>\n\n</think>\n\n"
    for example, end in zip(examples, (1, 3), strict=True):
        assert learned(template, example) == [thought + TWO_TURNS[end].content + "<|im_end|>"]
        prompt = template.encode_prompt(TWO_TURNS[:end])
        assert example.ids[: len(prompt)] == prompt
        assert thought not in template.tokenizer.decode(prompt)
    assert template.encode(TWO_TURNS[:2]) == examples[0]


def test_what_only_the_prompt_has_is_left_out_of_it(make):
    template = Template.of(make("thought"))
    example = template.encode(TWO_TURNS[:2], "a.json:2")
    prompt = template.encode_prompt(TWO_TURNS[:1])
    assert example.ids[: len(prompt)] == prompt
    assert "<thought>" not in template.tokenizer.decode(example.ids)
    assert template.render(TWO_TURNS[:3]).endswith("<|im_start|>assistant\n")


def test_a_template_without_a_stop_token_is_refused(make):
    template = Template.of(make("endless"))
    assert template.stop_ids == (template.tokenizer.eos_token_id,)
    with pytest.raises(
        DataError,
        match=r"the answer does not end with a stop token \('<eos>'\), so the model would never learn to stop",
    ):
        template.encode(TWO_TURNS)


def test_what_the_template_itself_refuses_names_the_row(make):
    template = Template.of(make("gemma"))
    with pytest.raises(DataError, match=r"^x\.jsonl line 5: .*rejected this conversation: System role not supported"):
        template.encode([Message("system", "Be brief."), *TWO_TURNS], "x.jsonl:5")


@pytest.mark.parametrize("kind", ["model", "human-assistant"])
def test_an_answer_to_nothing_is_refused(make, kind):
    template = Template.of(make("chatml"), kind)
    with pytest.raises(DataError, match="the first message is an answer"):
        template.encode(TWO_TURNS[1:])
    with pytest.raises(DataError, match="role 'assistant'"):
        template.encode(TWO_TURNS[:1])
    with pytest.raises(DataError, match="the last message must be one to answer"):
        template.encode_prompt(TWO_TURNS[:2])


def test_auto_is_the_models_own_template_where_there_is_one(make):
    assert Template.of(make("chatml")).kind == "model"
    assert Template.of(make()).kind == "human-assistant"
    with pytest.raises(ConfigError, match="requires a chat template, but this model's tokenizer has none"):
        Template.of(make(), "model")
    bare = make()
    bare.eos_token = None
    with pytest.raises(ModelError, match="has none"):
        Template.of(bare)


# -- the tutorial's pattern ---------------------------------------------------------------------------------------


def process_func(example, tokenizer, max_length=256):
    """The tutorial's function, but for the attention mask: copied, not mended."""
    prompt = "\n".join(["Human: " + example["instruction"], example["input"]]).strip() + "\n\nAssistant: "
    instruction_tokenized = tokenizer(prompt, add_special_tokens=False)
    response_tokenized = tokenizer(example["output"] + tokenizer.eos_token, add_special_tokens=False)
    input_ids = instruction_tokenized["input_ids"] + response_tokenized["input_ids"]
    labels = [-100] * len(instruction_tokenized["input_ids"]) + response_tokenized["input_ids"]
    return input_ids[:max_length], labels[:max_length]


def assert_equals_tutorial(template: Template, fields: dict[str, str]) -> None:
    example = truncate(template.encode(template.conversation(Record(fields, "x:1")).messages), 256)
    ids, labels = process_func(fields, template.tokenizer)
    assert example.ids == ids
    assert example.targets == [*labels[1:], IGNORED]


@pytest.mark.parametrize(
    "fields",
    [
        {"instruction": "what is the sky?", "input": "", "output": "blue"},
        {"instruction": " what ", "input": " is it?\n", "output": " blue \n"},
        {"instruction": "", "input": "the sky", "output": "blue<eos>"},
        {"instruction": "\n", "input": " ", "output": "blue"},
        {"instruction": "the sky " * 80, "input": "考试", "output": "blue " * 80},
    ],
    ids=["plain", "blanks", "no instruction", "nothing", "longer than 256"],
)
def test_human_assistant_equals_the_tutorial(make, fields):
    options = ContentOptions(special_tokens="tokens")
    assert_equals_tutorial(Template.of(make("chatml"), "human-assistant", options=options), fields)


def test_human_assistant_equals_the_tutorial_on_real_rows(make):
    path = SHARED / "data/alpaca_zh_demo.json"
    if not path.exists():
        pytest.skip("../shared/data/alpaca_zh_demo.json is not there")
    template = Template.of(make())
    rows = json.loads(path.read_text("utf-8"))
    for fields in rows:
        assert_equals_tutorial(template, fields)
    assert len(rows) == 1000


def test_human_assistant_repeats_its_pattern_turn_by_turn(make):
    template = Template.of(make())
    text = template.render([Message("system", "Be kind."), *TWO_TURNS[:3]])
    assert text == (
        "Human: Be kind.\n\nwhat is the sky?\n\nAssistant: the sky is blue.\n\nIs it?  <eos>"
        "Human: 考试有哪些技巧？\n\nAssistant: "
    )
    assert learned(template, template.encode(TWO_TURNS)) == [TWO_TURNS[1].content + "<eos>", "先做会做的题。<eos>"]
    with pytest.raises(DataError, match="two answers follow each other"):
        template.encode([*TWO_TURNS[:2], TWO_TURNS[1]])


def test_an_alpaca_row_is_one_message_under_the_models_template(make):
    record = Record({"instruction": " Translate ", "input": "sky\n", "output": "天"}, "a.json:1")
    messages = Template.of(make("chatml")).conversation(record).messages
    assert messages == (Message("user", "Translate \nsky"), Message("assistant", "天"))


# -- what travels in the adapter folder -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*STOCK, "qwen3", None])
def test_saved_and_loaded_it_encodes_the_same(make, name):
    template = Template.of(make(name), eos_ids=[17])
    data = json.loads(json.dumps(template.to_json()))
    assert len(data["golden"]) == 3
    other = make(name)
    other.chat_template = "{{ 'another' }}"  # the adapter's counts, not the one of the tokenizer at hand
    loaded = Template.from_json(data, other)
    assert loaded.stop_ids == template.stop_ids
    assert loaded.encode_all(TWO_TURNS) == template.encode_all(TWO_TURNS)


# -- faults that a review found ---------------------------------------------------------------------------------------


def test_an_adapter_of_version_2_keeps_its_encoding(make):
    """Prompts and answers in two parts, the template's own generation prompt, special tokens as such."""
    old = Template.of(make("thought")).to_json() | {"version": 2, "golden": []}
    for key in ("end", "tool_template", "kwargs", "options"):
        del old[key]
    template = Template.from_json(old, make("thought"))
    assert template.render(TWO_TURNS[:1]).endswith("<thought>")
    assert len(template.prompt_texts(TWO_TURNS[:3])) == 3 or not template.is_whole
    assert template.options.special_tokens == "tokens"
    assert template.to_json()["version"] == 2


def test_a_blank_at_the_end_of_the_generation_prompt_belongs_to_the_answer(make):
    text = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    text += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    tokenizer = make()
    tokenizer.chat_template = text
    template = Template.of(tokenizer)
    messages = (Message("user", "what is the sky?"), Message("assistant", "the sky is blue"))
    example, prompt = template.encode(messages), template.encode_prompt(messages[:1])
    assert example.ids[: len(prompt)] == prompt
    assert learned(template, example) == [" the sky is blue<eos>"]


def test_system_messages_in_user_messages_are_not_doubled(make):
    options = ContentOptions(system_as="user")
    template = Template.of(make("chatml"), system="Always.", options=options)
    own = (Message("system", "Mine."), Message("user", "Hi"))
    assert "Mine.\n\nHi" in template.render(own)
    assert "Always." not in template.render(own)
    after = [Message("user", "Hi"), Message("assistant", "Yes"), Message("system", "Now.")]
    with pytest.raises(DataError, match="the last message must be one to answer"):
        Template.of(make("chatml"), options=ContentOptions(system_as="first")).encode_prompt(after)


@pytest.mark.parametrize("name", ["gemma", "chatml"])
def test_other_programs_get_the_system_message_and_the_variables_where_they_belong(make, name):
    options = ContentOptions(system_as="user")
    template = Template.of(make(name), system="Be brief.", kwargs={"mood": "kind"}, options=options)
    rendered = template.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}],
        tokenize=False,
        add_generation_prompt=True,
        chat_template=template.as_jinja(),
    )
    assert rendered == template.render([Message("user", "Hi")])
    assert "mood" in template.as_jinja()
    assert "+%}" not in template.as_jinja()  # which llama.cpp does not know


def test_a_template_that_divides_by_zero_refuses_the_row(make):
    tokenizer = make("chatml")
    tokenizer.chat_template += "{{ 1 // (messages | length - 2) }}"
    with pytest.raises(DataError, match="rejected this conversation: integer"):
        Template.of(tokenizer).encode(TWO_TURNS[:2])
