"""The answers of preference rows as examples: one for each, from the cache too, and pairs stay pairs."""

import json

import pytest

from lorasmith.config.data import DataConfig
from lorasmith.data.dataset.prepare import prepare
from lorasmith.data.template.encoding import Template
from lorasmith.errors import DataError
from tests.support.preferences import pair, pairs_file, rated, write_rows
from tests.support.tiny import tokenizer


def prepared(file: str, method: str = "dpo", family: str = "llama", **options):
    cfg = DataConfig(data=(file,), **{"held_out": 0.0} | options)
    return prepare(cfg, Template.of(tokenizer(family)), None, None, 0, None, None, method)


def test_a_pair_is_two_examples_with_the_same_prompt(tmp_path):
    made = prepared(pairs_file(tmp_path / "a.jsonl", 4), held_out=1)
    assert [one.desirable for one in made.train] == [True, False] * 3
    assert [one.desirable for one in made.held_out] == [True, False]
    for chosen, rejected in zip(made.train[::2], made.train[1::2], strict=True):
        start = chosen.learned[0] + 1
        assert chosen.source == rejected.source
        assert chosen.ids[:start] == rejected.ids[:start]
        assert rejected.learned[0] + 1 == start


def test_the_encoded_copies_of_an_earlier_run_give_the_same(tmp_path):
    file = pairs_file(tmp_path / "a.jsonl", 70)
    first, second = prepared(file), prepared(file)
    assert any("Encoded copies" in text for text in second.notes) or first.train == second.train
    assert first.train == second.train


def test_a_rated_answer_is_one_example_and_kto_takes_pairs_too(tmp_path):
    made = prepared(write_rows(tmp_path / "a.jsonl", [rated(i) for i in range(4)]), "kto")
    assert [one.desirable for one in made.train] == [False, True, False, True]
    assert len(prepared(pairs_file(tmp_path / "b.jsonl", 4), "kto").train) == 8


def test_another_label_is_other_data(tmp_path):
    rows = [rated(i) for i in range(3)]
    other = [*rows[:2], rows[2] | {"label": not rows[2]["label"]}]
    first, second = (prepared(write_rows(tmp_path / "a.jsonl", some), "kto") for some in (rows, other))
    assert first.train_sha256 != second.train_sha256


def test_a_pair_of_which_one_answer_does_not_fit_is_left_out(tmp_path):
    long = pair(0) | {"rejected": "No. " * 40}
    shared = {"prompt": "Hi", "chosen": "No. " * 40 + "a", "rejected": "No. " * 40 + "b"}
    file = write_rows(tmp_path / "a.jsonl", [long, pair(1), shared])
    made = prepared(file, max_length=90, too_long="drop")
    assert {one.source.rpartition(":")[2] for one in made.train} == {"2"}
    made = prepared(file, max_length=90, too_long="truncate")  # cut, the last pair is twice the same
    assert {one.source.rpartition(":")[2] for one in made.train} == {"1", "2"}
    assert [one.desirable for one in made.train] == [True, False] * 2
    with pytest.raises(DataError, match=r"found 2 rows of 3 longer than 90 tokens"):
        prepared(file, max_length=90)


def test_pairs_whose_tokens_are_the_same_are_refused(tmp_path):
    file = tmp_path / "a.jsonl"
    messages = [{"role": "user", "content": "Hi"}]
    answers = {
        kind: [{"role": "assistant", "content": "No.", **more}]
        for kind, more in (("chosen", {"name": "x"}), ("rejected", {}))
    }
    file.write_text(json.dumps({"prompt": messages, **answers}) + "\n", "utf-8")
    with pytest.raises(DataError, match="are the same tokens"):
        prepared(str(file))


def test_an_answer_of_several_turns_that_the_template_rewrites_is_refused(tmp_path):
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m.role == 'assistant' and not loop.last %}"
        "{{ '(earlier) ' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    (tmp_path / "t.jinja").write_text(template, "utf-8")
    turns = [("assistant", "A"), ("user", "B"), ("assistant", "C")]
    chosen = [{"role": role, "content": text} for role, text in turns]
    row = {"prompt": [{"role": "user", "content": "Hi"}], "chosen": chosen, "rejected": chosen[:1]}
    row["rejected"] = [{"role": "assistant", "content": "Z"}]
    file = write_rows(tmp_path / "a.jsonl", [row])
    cfg = DataConfig(data=(file,), held_out=0.0)
    made = Template.of(tokenizer("llama"), str(tmp_path / "t.jinja"))
    with pytest.raises(DataError, match="the answer has several turns"):
        prepare(cfg, made, None, None, 0, None, None, "dpo")
