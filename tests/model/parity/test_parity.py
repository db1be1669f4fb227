"""A small set of the families of `make parity`, and that it notices when something stops working."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasmith.model import forward, head
from tests.model.parity import trial as trials
from tests.model.parity.configs import FAMILIES
from tests.model.parity.page import shortened, write
from tests.model.parity.trial import DTYPES, RANDOM, REPEATED, Outcome, trial
from tests.model.parity.verdicts import changes, known

SMALL_SET = ("gpt2", "llama", "qwen2", "qwen3", "gemma3_text", "bloom", "mamba", "mixtral")


def tried(family: str, folder: Path, *dtypes: str) -> dict[str, Any]:
    return {dtype: asdict(outcome) for dtype, outcome in trial(family, folder, dtypes or DTYPES).items()}


@pytest.mark.parametrize("family", SMALL_SET)
def test_nothing_became_worse(family: str, tmp_path: Path) -> None:
    found = tried(family, tmp_path)
    worse, _other = changes({family: found}, known())
    assert worse == [], {dtype: found[dtype]["problems"] for dtype in DTYPES}


def test_a_model_that_is_random_in_training_mode_is_compared_in_evaluation_mode(tmp_path: Path) -> None:
    found = tried("phimoe", tmp_path, "float32")["float32"]
    assert (found["verdict"], found["problems"]) == ("packed", {})
    assert RANDOM in found["said"]


def test_what_fails_with_one_adapter_only_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, seeds = head.hidden, list[int]()
    stirred = trials.stir
    monkeypatch.setattr(trials, "stir", lambda base, seed: seeds.append(seed) or stirred(base, seed))
    monkeypatch.setattr(head, "hidden", lambda base, row, kv=None: right(base, row, kv) * (1.01 if seeds == [1] else 1))
    found = tried("llama", tmp_path, "float32")["float32"]
    assert (found["verdict"], seeds) == ("packed", [1, 2])
    assert any(text.startswith(f"{REPEATED} 1: batch: ") for text in found["said"])


def test_every_family_is_on_record() -> None:
    assert set(known()) == set(FAMILIES)


def test_a_wrong_batch_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = head.hidden
    monkeypatch.setattr(head, "hidden", lambda base, row, kv=None: right(base, row, kv) * 1.01)
    found = tried("llama", tmp_path, "float32")["float32"]
    assert found["verdict"] == "fails"
    assert "batch gradient differs by" in found["problems"]["batch"]


def test_a_family_that_is_no_longer_packed_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = forward.packed_inputs
    wrong = lambda base, row, kv=None: right(base, row, kv) | {"position_ids": torch.arange(row.tokens)[None]}  # noqa: E731
    monkeypatch.setattr(forward, "packed_inputs", wrong)
    found = tried("gpt2", tmp_path, "float32")
    worse, _other = changes({"gpt2": found | {"bfloat16": found["float32"]}}, known())
    assert worse == ["gpt2, float32: packed -> padded", "gpt2, bfloat16: packed -> padded"]


def test_what_counts_as_worse() -> None:
    def of(verdict: str, peft: str = "equal", **problems: str) -> dict[str, Any]:
        return dict.fromkeys(DTYPES, asdict(Outcome(verdict, peft=peft, problems=problems)))

    record = {"a": {"float32": "padded", "bfloat16": "padded, no merge", "peft": "equal"}}
    assert changes({"a": of("padded")}, record) == ([], ["a, bfloat16: padded, no merge -> padded"])
    worse, other = changes({"a": of("refused", "cannot load it")}, record)
    assert worse == ["a, float32: padded -> refused", "a, bfloat16: padded, no merge -> refused"]
    assert other == ["a, peft: equal -> cannot"]
    assert changes({"a": of("padded", merge="x")}, record)[0] == ["a, float32: padded -> padded, no merge"]


def test_the_page_has_a_line_for_each_family_and_no_path_of_this_machine(tmp_path: Path) -> None:
    said = "/tmp/lorasmith-parity-x1/model: AModel cannot be used."
    found = {"a": dict.fromkeys(DTYPES, asdict(Outcome("refused", said, problems={"load": said})))}
    write(tmp_path, found, {"transformers": "5.23.0", "peft": "0.21.2"})
    for name in ("families.md", "families.zh.md"):
        lines = (tmp_path / name).read_text("utf-8").splitlines()
        assert "| a | refused | refused | - | - | AModel cannot be used. |" in lines
    assert shortened("!x: a|b <c>") == "x: a\\|b &lt;c>"
    assert shortened("/tmp/lorasmith-parity-x1/2/merged: not written") == "merged: not written"
