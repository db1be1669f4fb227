import json
import math
import random

import pytest

from lorasmith.config.data import DataConfig
from lorasmith.data.dataset.prepare import Prepared, fingerprint, prepare, prepare_rows
from lorasmith.data.dataset.split import MAX_HELD_OUT
from lorasmith.data.rows.conversation import Record
from lorasmith.data.template.contents import ContentOptions
from lorasmith.data.template.encoding import Template
from lorasmith.errors import ConfigError, DataError
from lorasmith.report import Report


class Heard(Report):
    def __init__(self):
        self.said, self.warned, self.steps = [], [], []

    def say(self, text):
        self.said.append(text)

    def warn(self, text):
        self.warned.append(text)

    def progress(self, task, done, total, **numbers):
        self.steps.append((done, total))


def alpaca(n: int, output: str = "blue") -> dict[str, str]:
    return {"instruction": f"sky {n}?", "output": output}


@pytest.fixture
def run(tmp_path, make):
    """`run(rows, **options)`: prepared with the tutorial's pattern, and what the report heard."""

    def run(rows, template=None, limit=None, seed=0, files=("train.jsonl",), **options) -> tuple[Prepared, Heard]:
        for name, content in {files[0].partition(":")[0]: rows, **options.pop("more", {})}.items():
            (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in content), "utf-8")
        if isinstance(options.get("held_out"), str) and options["held_out"].endswith("jsonl"):
            options["held_out"] = str(tmp_path / options["held_out"])
        cfg = DataConfig(data=tuple(str(tmp_path / name) for name in files), **options)
        heard = Heard()
        return prepare(cfg, Template.of(make(template)), limit, heard, seed), heard

    return run


def lines(examples) -> list[int]:
    return [int(example.source.rpartition(":")[2]) for example in examples]


def test_counts_are_said_in_a_sentence(run):
    made, heard = run([alpaca(n) for n in range(40)])
    assert (len(made.train), len(made.held_out)) == (38, 2)
    tokens, targets = sum(e.useful_length for e in made.train), sum(e.n_targets for e in made.train)
    assert heard.said[0].endswith("train.jsonl: alpaca format, 40 rows, none skipped.")
    assert heard.said[1:] == [
        f"38 rows to train on, 2 held out; {tokens:,} tokens per epoch, {targets:,} of them trained on "
        f"({targets / tokens:.0%})."
    ]
    assert heard.warned == []
    assert made.notes == tuple(heard.said)
    assert made.max_length == 1024


def test_the_encoding_of_many_rows_shows_progress(run):
    _made, heard = run([alpaca(n) for n in range(450)])
    assert heard.steps == [(200, 450), (400, 450), (450, 450)]


# -- held out -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "rows", "held"),
    [(0.05, 100, 5), (0.05, 19, 0), (0.29, 100, 29), (0.9, 500, MAX_HELD_OUT), (0, 10, 0), (1, 10, 1), (300, 400, 300),
     (3.0, 10, 3), (0.2, 10, 2)],
)  # fmt: skip
def test_held_out_as_a_number_or_a_part(run, asked, rows, held):
    made, _heard = run([alpaca(n) for n in range(rows)], held_out=asked)
    assert len(made.held_out) == held
    assert sorted(lines(made.train) + lines(made.held_out)) == list(range(1, rows + 1))


def test_held_out_rows_are_drawn_by_the_seed(run):
    rows = [alpaca(n) for n in range(60)]
    first, again, other = (run(rows, held_out=10, seed=seed)[0] for seed in (0, 0, 1))
    assert first == again
    assert lines(first.held_out) != lines(other.held_out)
    assert lines(first.held_out) != list(range(1, 11))
    assert first.train_sha256 != other.train_sha256
    order = list(range(60))
    random.Random("held-out-0").shuffle(order)
    assert lines(first.held_out) == sorted(i + 1 for i in order[:10])


def test_a_part_of_too_few_rows_is_said(run):
    _made, heard = run([alpaca(n) for n in range(5)])
    assert heard.said[1] == "No rows are held out: the fraction 0.05 of 5 rows is less than one row."


def test_held_out_as_a_file(run):
    made, heard = run([alpaca(1), alpaca(2)], held_out="test.jsonl", more={"test.jsonl": [alpaca(3), alpaca(2)]})
    assert (len(made.train), len(made.held_out)) == (2, 2)
    assert "The training data contains 1 row of the held-out data" in heard.warned[0]
    assert heard.warned[0].endswith("test.jsonl line 2.")


@pytest.mark.parametrize("value", [-1, 1.5, -0.1, math.nan, math.inf, 1e300])
def test_held_out_that_cannot_be(run, value):
    with pytest.raises(ConfigError, match=r"data\.held_out: .*\. Give a file, a whole number of rows"):
        run([alpaca(1)], held_out=value)


def test_nothing_left_to_learn_from(run):
    with pytest.raises(DataError, match="holding out 10 of 10 rows leaves none to train on"):
        run([alpaca(n) for n in range(10)], held_out=10)


# -- length ---------------------------------------------------------------------------------------------------------


LONG = [alpaca(1), alpaca(2, "blue " * 30), alpaca(3), alpaca(4, "sky " * 40), alpaca(5)]


def test_too_long_is_an_error_by_default_and_counts_what_would_be_lost(run):
    whole, _heard = run(LONG, held_out=0)
    with pytest.raises(DataError) as caught:
        run(LONG, held_out=0, max_length=30)
    lost = sum(max(0, e.useful_length + 1 - 30) for e in whole.train)
    longest = max(e.useful_length + 1 for e in whole.train)
    (text,) = caught.value.problems
    assert text.startswith(
        f"data.data: found 2 rows of 5 longer than 30 tokens, the longest with {longest}; "
        f"truncating them would lose {lost} answer tokens "
    )
    assert "train.jsonl lines 2, 4)" in text
    made, _heard = run(LONG, held_out=0, max_length=longest)
    assert made.train == whole.train
    with pytest.raises(DataError, match=r"1 row of 5.* would lose 1 answer tokens"):
        run(LONG, held_out=0, max_length=longest - 1)


def test_too_long_in_both_files_is_told_at_once(run):
    with pytest.raises(DataError) as caught:
        run(LONG, held_out="test.jsonl", more={"test.jsonl": LONG[1:2]}, max_length=30)
    assert [text.partition(":")[0] for text in caught.value.problems] == ["data.data", "data.held_out"]


def test_truncate_cuts_the_end_and_says_so(run):
    whole, _heard = run(LONG, held_out=0)
    made, heard = run(LONG, held_out=0, max_length=30, too_long="truncate")
    assert [e.ids for e in made.train] == [e.ids[:30] for e in whole.train]
    assert made.train[1].targets == [*whole.train[1].targets[:29], -100]
    lost = sum(a.n_targets - b.n_targets for a, b in zip(whole.train, made.train, strict=True))
    assert heard.warned == [f"data.data: truncated 2 rows to 30 tokens; answer tokens lost: {lost}."]


def test_a_row_that_loses_its_answer_by_cutting_is_left_out_and_counted(run):
    rows = [alpaca(1), {"instruction": "sky " * 50, "output": "blue"}]
    made, heard = run(rows, held_out=0, max_length=30, too_long="truncate")
    assert lines(made.train) == [1]
    assert len(heard.warned) == 1
    assert "skipped 1 row without an answer in the first 30 tokens: " in heard.warned[0]
    with pytest.raises(DataError, match="no rows are left to train on"):
        run(rows[1:], max_length=30, too_long="truncate")


def test_drop_leaves_out_what_does_not_fit(run):
    made, heard = run(LONG, held_out=0, max_length=30, too_long="drop")
    assert lines(made.train) == [1, 3, 5]
    assert len(heard.warned) == 1
    assert "skipped 2 rows longer than 30 tokens: " in heard.warned[0]


def test_context_after_the_last_answer_is_cut_without_a_word(run):
    chat = {"messages": [{"role": "user", "content": "sky?"}, {"role": "assistant", "content": "blue"}]}
    whole, _heard = run([chat], "chatml", held_out=0)
    fits = whole.train[0].useful_length + 1
    assert fits < len(whole.train[0].ids)  # the line break after <|im_end|>
    made, heard = run([chat], "chatml", held_out=0, max_length=fits)
    assert made.train[0].n_targets == whole.train[0].n_targets
    assert heard.warned == []


def test_the_models_limit(run):
    assert run(LONG, limit=300)[0].max_length == 300
    assert run(LONG, limit=5000)[0].max_length == 1024
    assert run(LONG, limit=5000, max_length=2000)[0].max_length == 2000
    with pytest.raises(ConfigError, match="301 is more than the model's context length of 300 tokens"):
        run(LONG, limit=300, max_length=301)


# -- rows -----------------------------------------------------------------------------------------------------------


def test_bad_rows_of_all_files_are_told_at_once(run):
    with pytest.raises(DataError) as caught:
        run(
            [alpaca(1, "")],
            held_out="test.jsonl",
            more={"b.jsonl": [{}], "test.jsonl": [{}]},
            files=("a.jsonl", "b.jsonl"),
        )
    assert [text.partition(":")[0] for text in caught.value.problems] == ["data.data", "data.data", "data.held_out"]


def test_rows_that_the_template_refuses_are_told_at_once(run):
    bad = {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "sky?"},
                        {"role": "assistant", "content": "blue"}]}  # fmt: skip
    with pytest.raises(
        DataError, match=r"train\.jsonl lines 2-3: the chat template rejected this conversation: System role"
    ):
        run([{"messages": bad["messages"][1:]}, bad, bad], "gemma")


def test_few_rows_that_the_template_refuses_may_be_left_out(run):
    bad = {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "sky?"},
                        {"role": "assistant", "content": "blue"}]}  # fmt: skip
    good = {"messages": bad["messages"][1:]}
    made, heard = run([good] * 9 + [bad], "gemma", held_out=0, skip_bad_rows=0.1)
    assert lines(made.train) == [*range(1, 10)]
    assert heard.warned[0].endswith(
        "train.jsonl line 10: skipped: the chat template rejected this conversation: System role not supported"
    )
    assert heard.warned[0] in made.notes
    with pytest.raises(DataError, match=r"data\.data: 1 of 9 rows have problems, more than data\.skip_bad_rows = 0\.1"):
        run([good] * 8 + [bad], "gemma", held_out=0, skip_bad_rows=0.1)


def test_columns_of_one_file(run):
    german = [{"frage": "sky 1?", "antwort": "blue", "output": "grey"}]
    names = {"b.jsonl:instruction": "frage", "b.jsonl:output": "antwort"}
    made, _heard = run([alpaca(1)], files=("a.jsonl", "b.jsonl"), more={"b.jsonl": german}, held_out=0, map=names)
    assert made.train[0].ids == made.train[1].ids
    with pytest.raises(ConfigError, match=r"data\.map: c\.jsonl:output=x: no file c\.jsonl is given\."):
        run([alpaca(1)], held_out=0, map={"c.jsonl:output": "x"})


def test_roles_of_other_names(run):
    row = {"messages": [{"role": "customer", "content": "sky?"}, {"role": "agent", "content": "blue"}]}
    usual = {"messages": [{"role": "user", "content": "sky?"}, {"role": "assistant", "content": "blue"}]}
    made, _heard = run([row], "chatml", held_out=0, roles={"customer": "user", "agent": "assistant"})
    assert made.train == run([usual], "chatml", held_out=0)[0].train
    with pytest.raises(ConfigError, match=r"^data\.roles: boss: no message has this role\.$"):
        run([usual], "chatml", held_out=0, roles={"boss": "system"})


def test_placeholders_that_no_row_has_are_refused(run):
    made, _heard = run([alpaca(1, "{{name}}")], held_out=0, fill={"name": "blue"})
    assert made.train[0].ids == run([alpaca(1)], held_out=0)[0].train[0].ids
    with pytest.raises(ConfigError, match=r"^data\.fill: author: no row contains the placeholder \{\{author\}\}\.$"):
        run([alpaca(1, "{{name}}")], held_out=0, fill={"name": "blue", "author": "x"})


def test_a_rewriting_template_splits_rows_and_holds_out_whole_ones(run):
    chat = {"messages": [{"role": r, "content": c} for r, c in [("user", "sky?"), ("assistant", "blue")] * 2]}
    made, heard = run([chat] * 4, "qwen3", held_out=1)
    assert (len(made.train), len(made.held_out)) == (6, 2)
    assert len(set(lines(made.held_out))) == 1
    assert any("4 rows became 8 examples" in text for text in heard.said)
    assert any(text.startswith("3 rows to train on, 1 held out;") for text in heard.said)


def test_columns_under_other_names_in_both_files(run):
    rows = [{"frage": f"sky {n}?", "antwort": "blue"} for n in range(4)]
    options = {
        "map": {"instruction": "frage", "output": "antwort"},
        "held_out": "test.jsonl",
        "more": {"test.jsonl": rows[:1]},
    }
    made, _heard = run(rows, **options)
    assert made.train == run([alpaca(n) for n in range(4)], held_out=0)[0].train
    with pytest.raises(DataError, match=r"data\.map: output=reply: .*train\.jsonl has no column 'reply'"):
        run(rows, map={"output": "reply"})


def test_a_column_of_another_name_must_be_in_one_of_the_files(run):
    german = [{"frage": "sky?", "antwort": "blue"}]
    files, names = ("a.jsonl", "b.jsonl"), {"instruction": "frage", "output": "antwort"}
    made, _heard = run([alpaca(1)], files=files, more={"b.jsonl": german}, held_out=0, map=names)
    assert len(made.train) == 2
    with pytest.raises(ConfigError, match=r"data\.map: system=sytsem: .*a\.jsonl, .*b\.jsonl has no column 'sytsem'"):
        run([alpaca(1)], files=files, more={"b.jsonl": german}, held_out=0, map=names | {"system": "sytsem"})


def test_files_with_weights_share_an_epoch_and_nothing_held_out_is_repeated(run):
    more = {"b.jsonl": [alpaca(n) for n in range(100, 110)]}
    made, heard = run([alpaca(n) for n in range(50)], files=("a.jsonl:0.6", "b.jsonl:0.4"), more=more, held_out=10)
    from_b = [example.source for example in made.train if "b.jsonl" in example.source]
    assert (len(made.train), len(from_b), len(made.held_out)) == (50, 20, 10)
    assert {e.source for e in made.train}.isdisjoint(e.source for e in made.held_out)
    assert sum("of the epoch" in text for text in heard.said) == 2
    assert made.notes == tuple(heard.said)


def test_a_stop_token_within_an_answer_is_warned_of(run, make):
    rows = [alpaca(1), alpaca(2, "blue<eos>grey"), alpaca(3)]
    _made, heard = run(rows, held_out=0)
    assert "In 1 row, a message spells special tokens of the model." in heard.warned[0]
    template, heard = Template.of(make(), options=ContentOptions(special_tokens="tokens")), Heard()
    records = [Record(row, f"train.jsonl:{number}") for number, row in enumerate(rows, 1)]
    prepare_rows(records, None, DataConfig(held_out=0), template, None, heard)
    assert len(heard.warned) == 1
    assert "In 1 row, an answer contains a stop token before its end;" in heard.warned[0]
    assert heard.warned[0].endswith("train.jsonl line 2.")


def test_the_default_length_follows_the_rows_where_the_model_and_the_memory_allow_it(run, make):
    rows = [alpaca(1), alpaca(2, "blue " * 2000)]
    made, heard = run(rows, held_out=0)
    assert made.max_length > 2000
    assert made.max_length % 64 == 0
    assert f"The maximum length of an example is {made.max_length:,} tokens, because the longest row" in heard.said[-2]
    records = [Record(row, f"train.jsonl:{number}") for number, row in enumerate(rows, 1)]
    for bounds in ({"limit": 1500}, {"limit": None, "affordable": 1500}):
        with pytest.raises(DataError, match=r"longer than 1,024 tokens"):
            prepare_rows(records, None, DataConfig(held_out=0), Template.of(make()), report=Heard(), **bounds)
    for chosen in ({"too_long": "truncate"}, {"max_length": 1024, "too_long": "truncate"}):
        assert run(rows, held_out=0, **chosen)[0].max_length == 1024
    assert run([alpaca(1)], held_out=0)[0].max_length == 1024


def test_no_file_named(make):
    with pytest.raises(ConfigError, match=r"data\.data: no training data"):
        prepare(DataConfig(), Template.of(make()), None)


def test_the_fingerprint_tells_ids_targets_and_order_apart(run):
    made, _heard = run([alpaca(1), alpaca(2)], held_out=0)
    one, two = made.train
    assert fingerprint([one, two]) == made.train_sha256
    assert len({fingerprint(s) for s in ([one, two], [two, one], [one], [], [one, one])}) == 5
    assert made.held_out_sha256 == fingerprint([])
