"""Rows that are too long: what is cut, what is kept, and what is said of it."""

import pytest

from lorasmith.config.data import DataConfig
from lorasmith.data.dataset.fit import split_text, truncate_left
from lorasmith.data.dataset.prepare import prepare_rows
from lorasmith.data.rows.conversation import Message, Record
from lorasmith.data.template.encoding import Template
from lorasmith.errors import DataError
from lorasmith.model.row import IGNORED
from lorasmith.report import Report

SYSTEM = {"role": "system", "content": "Be kind."}


def chat(turns: int, words: int = 5) -> dict:
    pairs = [(f"what {i} is the sky? " * words, f"sky {i} is blue.") for i in range(turns)]
    texts = [text for pair in pairs for text in pair]
    return {"messages": [SYSTEM, *({"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts))]}


class Warned(Report):
    def __init__(self):
        self.texts = []

    def warn(self, text):
        self.texts.append(text)


def prepared(template: Template, rows: list[dict], **options):
    records = [Record(row, f"train.jsonl:{n}") for n, row in enumerate(rows, 1)]
    heard = Warned()
    made = prepare_rows(records, None, DataConfig(held_out=0, **options), template, None, heard)
    return made, heard.texts


def learned(template: Template, example) -> str:
    return template.tokenizer.decode([t for t in example.targets if t != IGNORED])


@pytest.mark.parametrize("name", ["qwen2.5", None])
def test_the_first_turns_go_and_the_system_text_stays(make, name):
    template = Template.of(make(name))
    (whole,) = prepared(template, [chat(3)])[0].train
    shorter = {"messages": [SYSTEM, *chat(3)["messages"][3:]]}
    (wanted,) = prepared(template, [shorter])[0].train
    made, said = prepared(template, [chat(3)], max_length=wanted.useful_length + 1, too_long="truncate-left")
    (example,) = made.train
    assert example.ids[: example.useful_length] == wanted.ids[: wanted.useful_length]
    assert example.n_targets == wanted.n_targets
    lost = whole.n_targets - wanted.n_targets
    length = wanted.useful_length + 1
    text = f"data.data: truncated the beginning of 1 row to fit into {length} tokens; answer tokens lost: {lost}."
    assert said == [text]


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", None])
@pytest.mark.parametrize("learn", ["answers", "all", "last-answer"])
def test_a_question_that_is_too_long_loses_its_beginning_and_the_answer_stays(make, name, learn):
    template = Template.of(make(name), system="Be brief.")
    row = chat(2, words=30)
    row["messages"] = row["messages"][1:]
    (example,) = prepared(template, [row], max_length=60, too_long="truncate-left", learn=learn)[0].train[-1:]
    text = template.tokenizer.decode(example.ids)
    assert len(example.ids) <= 60
    assert example.useful_length in (58, 59)
    assert "Be brief." in text
    assert "sky?" in text
    assert ("<think>" in text) == (name == "qwen3")
    end = "<eos>" if name is None else "<|im_end|>"
    assert learned(template, example).endswith("sky 1 is blue." + end)


def test_each_answer_of_a_rewriting_template_is_cut_for_itself(make):
    template = Template.of(make("qwen3"))
    made, said = prepared(template, [chat(3)], max_length=100, too_long="truncate-left")
    assert len(made.train) == 3
    for i, example in enumerate(made.train):
        assert len(example.ids) <= 100
        assert learned(template, example) == f"<think>\n\n</think>\n\nsky {i} is blue.<|im_end|>"
        assert "Be kind." in template.tokenizer.decode(example.ids)
    assert said == ["data.data: truncated the beginning of 1 row to fit into 100 tokens; answer tokens lost: 0."]


def test_an_answer_that_does_not_fit_is_never_cut_but_left_out(make):
    template = Template.of(make("qwen2.5"))
    long = {"messages": [chat(1)["messages"][1], {"role": "assistant", "content": "sky " * 80}]}
    made, said = prepared(template, [chat(1), long], max_length=70, too_long="truncate-left")
    assert [example.source for example in made.train] == ["train.jsonl:1"]
    assert said[-1] == "data.data: skipped 1 row whose answer does not fit into 70 tokens: train.jsonl line 2."
    conversation = template.conversation(Record(long, "a:1"))
    assert truncate_left(conversation, template, "answers", 1000) == template.encode_row(conversation)


def test_plain_text_in_pieces_learns_every_token_once(make):
    template = Template.of(make())
    text = "the sky is blue. " * 20
    (whole,) = prepared(template, [{"text": text}])[0].train
    made, said = prepared(template, [{"text": text}, {"text": "blue"}], max_length=30, too_long="split")
    parts = made.train[:-1]
    assert all(len(part.ids) <= 30 for part in parts)
    assert [t for part in parts for t in part.targets if t != IGNORED] == whole.ids[1:]
    assert said == [f"data.data: split 1 row into {len(parts)} pieces of at most 30 tokens."]
    assert split_text(whole, len(whole.ids)) == [whole]
    (end,) = prepared(template, [{"text": text}], max_length=30, too_long="truncate-left")[0].train
    assert end.ids == whole.ids[-30:]


def test_conversations_are_not_split(make):
    rows = [chat(1), {"text": "blue " * 50}, chat(9), chat(8)]
    with pytest.raises(DataError, match=r"'split' works for plain text only, but found 2 rows with") as caught:
        prepared(Template.of(make("chatml")), rows, max_length=70, too_long="split")
    assert "(train.jsonl lines 3-4)" in str(caught.value)


def test_plain_text_that_is_too_long_is_told_of_pieces(make):
    with pytest.raises(
        DataError, match=r"found 1 row of 2 longer than 20 tokens, .*Plain text can also be split into pieces"
    ):
        prepared(Template.of(make()), [{"text": "blue"}, {"text": "sky " * 50}], max_length=20)


def test_stop_tokens_between_turns_are_no_surprise_where_all_is_learned(make):
    made, said = prepared(Template.of(make("qwen2.5")), [chat(3)], learn="all")
    assert said == []
    assert made.train[0].n_targets > 2 * prepared(Template.of(make("qwen2.5")), [chat(3)])[0].train[0].n_targets


def test_weights_are_part_of_the_fingerprint_and_of_the_example(make):
    template, rows = Template.of(make("chatml")), [chat(1), chat(1)]
    rows[1]["messages"][-1]["weight"] = 0.5
    light, plain = prepared(template, rows[1:])[0], prepared(template, rows[:1])[0]
    assert light.train[0].weight == plain.train[0].weight / 2
    assert light.train_sha256 != plain.train_sha256


def test_tools_that_nobody_sees_and_a_clock_that_stands_still_are_said(make):
    row = chat(1) | {"tools": [{"type": "function", "function": {"name": "look"}}]}
    made, _said = prepared(Template.of(make("llama3")), [chat(1)])
    assert any(
        text.startswith("The chat template inserts the current date, which is fixed to 26 July") for text in made.notes
    )
    (text,) = prepared(Template.of(make("llama3")), [row])[1]
    assert text.startswith("In 1 row, the chat template has no place for 'tools', so the model does not see them")
    assert prepared(Template.of(make("tools")), [row])[1] == []
    assert Message("user", "a")._asdict() == {"role": "user", "content": "a"}
