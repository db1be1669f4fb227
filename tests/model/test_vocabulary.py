"""Tokens of a tokenizer that the model was never resized for: told at load, refused where they are used."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from lorasmith.adapters.merge import merge_run
from lorasmith.config.model import ModelConfig
from lorasmith.config.sampling import SamplingConfig
from lorasmith.engine.engine import Engine
from lorasmith.engine.request import Request
from lorasmith.engine.scoring import prompt_logprobs
from lorasmith.errors import ConfigError, DataError
from lorasmith.loading.load import load_base
from lorasmith.model.base import Base
from lorasmith.model.row import Example
from lorasmith.model.vocabulary import (
    add_tokens,
    embedding_rows,
    refuse_surplus_examples,
    surplus_tokens,
    unused_tokens,
    with_tokens,
)
from lorasmith.preflight.check import check
from tests.support.checks import config
from tests.support.commands import refused
from tests.support.families import tiny_base
from tests.support.model_folders import configure
from tests.support.tiny import Watch, model_folder, rows_file, trained

ROWS = 300  # of the tiny model's embedding
PAD = ROWS  # the id of the token that is added


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a tokenizer that got the tokens [PAD] and <|extra|>, and was not resized."""
    folder = Path(shutil.copytree(model_folder(), tmp_path_factory.mktemp("surplus") / "model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens("<|extra|>")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(folder: Path) -> Base:
    return load_base(ModelConfig(model=str(folder), dtype="float32", device="cpu"))


def says(source: str, token: str, token_id: int, model: object) -> str:
    return (
        f"{source}: contains the token '{token}', whose id is {token_id}, but the embedding of {model} has only "
        "300 rows. Use the tokenizer that belongs to the model, or a model that was resized for this one."
    )


def test_loading_names_them_and_goes_on(folder: Path) -> None:
    watch = Watch()
    loaded = load_base(ModelConfig(model=str(folder), dtype="float32", device="cpu"), watch)
    assert embedding_rows(loaded) == ROWS
    assert watch.warned == [
        f"{folder}: the tokenizer has tokens that the model has no embedding for (2: '[PAD]', '<|extra|>'). Rows and "
        "prompts that contain one are refused."
    ]
    assert surplus_tokens(load_base(ModelConfig(model=str(model_folder()), dtype="float32", device="cpu"))) == ""


def test_a_training_without_them_is_as_before_and_can_be_merged(folder: Path, tmp_path: Path) -> None:
    padded = Path(shutil.copytree(folder, tmp_path / "padded"))
    configure(padded, pad_token_id=PAD)  # as is done with the tokenizer, and transformers then loads no model
    wanted = trained(tmp_path / "ours").loss_after
    for model in (folder, padded):
        assert trained(tmp_path / f"run-{model.name}", model=str(model)).loss_after == wanted
    assert merge_run(tmp_path / "run-padded", tmp_path / "merged").holds
    assert load_base(ModelConfig(model=str(tmp_path / "merged"), device="cpu")).model.config.pad_token_id is None


def test_a_row_with_one_is_refused_by_check_and_train(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"instruction": "Why?", "output": f"Because {i}{' <|extra|>' * (i > 6)}"} for i in range(12)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = check(config(str(file), model=str(folder)))
    assert found.exit_code == 2
    texts = [says(f"{file}:{line}", "<|extra|>", 301, folder) for line in (8, 9, 10, 11, 12)]
    assert len(found.problems) == 4
    assert set(found.problems[:3]) < set(texts)
    assert found.problems[3] == "2 more rows contain such tokens."
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:8]))
    words = ["train", file, "--model", folder, "--output", tmp_path / "run", "--dtype", "float32", "--held-out", 1]
    assert refused(capsys, *words) == texts[0]
    assert not (tmp_path / "run").exists()


def test_a_prompt_of_the_training_with_one_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        trained(tmp_path / "run", model=str(folder), samples=["What is <|extra|>?"])
    assert str(caught.value) == says("training.samples", "<|extra|>", 301, folder)


def test_a_request_with_one_is_refused_and_the_engine_goes_on(base: Base, folder: Path) -> None:
    engine, settings = Engine(base), SamplingConfig(max_new_tokens=2)
    for ids in ([5, PAD, 9], [PAD + 1]):
        with pytest.raises(DataError, match=r"^the prompt: contains the token '(\[PAD\]|<\|extra\|>)'"):
            engine.add(Request(ids, settings))
        with pytest.raises(DataError, match="the prompt: contains the token"):
            prompt_logprobs(base, [Request([5, 9], settings), Request(ids, settings)])
    assert engine.add(Request([5, ROWS - 1], settings)) == 0


def test_targets_are_looked_at_too() -> None:
    base = tiny_base("llama")

    class Names:
        def convert_ids_to_tokens(self, token_id: int) -> str:
            return f"<{token_id}>"

    base.tokenizer = Names()  # type: ignore[assignment]
    rows = embedding_rows(base)
    refuse_surplus_examples(base, [Example([1, 2], [2, rows - 1], [1.0, 1.0], "a:1")])
    with pytest.raises(DataError, match=rf"^a:2: contains the token '<{rows}>', whose id is {rows}, but"):
        refuse_surplus_examples(base, [Example([1, 2], [2, rows], [1.0, 1.0], "a:2")])


def test_evaluation_refuses_such_rows(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path / "run", model=str(folder))
    file = tmp_path / "other.jsonl"
    file.write_text(json.dumps({"instruction": "Why?", "output": "It is <|extra|>"}) + "\n")
    assert refused(capsys, "eval", tmp_path / "run", file) == says(f"{file}:1", "<|extra|>", 301, folder)
    assert Path(rows_file(tmp_path / "fine.jsonl")).exists()


# -- added tokens ---------------------------------------------------------------------------------------------------


@pytest.fixture
def plain() -> Base:
    return load_base(ModelConfig(model=str(model_folder()), dtype="float32", device="cpu"))


def test_added_tokens_get_rows_and_keep_those_that_were_there(plain: Base) -> None:
    before, identity = plain.model.get_input_embeddings().weight.clone(), plain.identity
    add_tokens(plain, ["<call>", "<|call|>"])
    weight = plain.model.get_input_embeddings().weight
    assert embedding_rows(plain) == ROWS + 2
    assert torch.equal(weight[:ROWS], before)
    assert torch.allclose(weight[ROWS:], before.mean(0).expand(2, -1), atol=1e-7)
    assert plain.added_tokens == {"<call>": ROWS, "<|call|>": ROWS + 1}
    ids = plain.tokenizer("a<call>b <|call|>", add_special_tokens=False)["input_ids"]
    assert [i for i in ids if i >= ROWS] == [ROWS, ROWS + 1]
    assert plain.tokenizer.decode(ids, skip_special_tokens=True) == "a<call>b <|call|>"
    assert plain.identity == identity == load_base(ModelConfig(model=str(model_folder()), device="cpu")).identity
    assert with_tokens(plain.tokenizer, ["<call>"]) is plain.tokenizer


def test_tokens_that_exist_are_refused(plain: Base) -> None:
    add = "data.add_tokens: "
    with pytest.raises(ConfigError) as refusal:
        add_tokens(plain, ["<|im_end|>", "<call>", "a"])
    assert [text.partition(add)[2] for text in refusal.value.problems] == [
        f"{model_folder()} already has the token '<|im_end|>' (id 2). Leave it out.",
        f"{model_folder()} already has the token 'a' (id {plain.tokenizer.get_vocab()['a']}). Leave it out.",
    ]
    assert plain.added_tokens == {}
    assert embedding_rows(plain) == ROWS


def test_tokens_are_not_added_after_others_without_a_row(folder: Path) -> None:
    base = load_base(ModelConfig(model=str(folder), dtype="float32", device="cpu"))
    with pytest.raises(
        ConfigError, match=r"has tokens that the model has no embedding for, so none can be added after"
    ):
        add_tokens(base, ["<call>"])


class Deaf:
    """A tokenizer that takes tokens and then does not find them in a text."""

    def get_vocab(self) -> dict[str, int]:
        return {}

    def add_tokens(self, _tokens: list[object]) -> None: ...

    def convert_tokens_to_ids(self, _token: str) -> int:
        return 7

    def __call__(self, text: str, **_options: object) -> dict[str, list[int]]:
        return {"input_ids": list(range(len(text)))}


def test_a_token_that_is_read_as_others_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^data\.add_tokens: the tokenizer does not recognize '<a>' as one token\."):
        with_tokens(Deaf(), ["<a>"])  # type: ignore[arg-type]


def test_added_tokens_that_no_row_has_are_named(plain: Base) -> None:
    add_tokens(plain, ["<a>", "<b>", "<c>"])
    rows = [Example([5, ROWS], [ROWS, 6], [1.0, 1.0], "r:1"), Example([5, 6], [6, ROWS + 2], [1.0, 1.0], "r:2")]
    text = "data.add_tokens: no training row contains '<b>', so the model learns nothing about them."
    assert unused_tokens(plain, rows) == text
    assert unused_tokens(plain, [*rows, Example([ROWS + 1], [4], [1.0], "r:3")]) == ""
