"""Training on preferences: the starting model as reference, resuming, and the same steps as TRL takes."""

import math
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from lorasmith import train
from lorasmith.data.dataset.plan import plan
from lorasmith.errors import ConfigError, DataError, RunError
from lorasmith.model.preference import PreferenceLoss
from lorasmith.model.row import IGNORED, Example
from lorasmith.training.preference import Preference, Reference
from lorasmith.training.run_files import REFERENCE, read_summary
from tests.support.checks import job_of
from tests.support.preferences import pair, pairs_file, rated, write_rows
from tests.support.tiny import (
    EXACT,
    Crash,
    adapter_bytes,
    assert_same_results,
    crash_at,
    metrics,
    model_folder,
    settings,
    tokenizer,
    trained,
)
from tests.training.test_distributed import in_two_processes

METHODS = ("dpo", "orpo", "kto", "simpo")


def preferred(run: Path, report: Any = None, resume: bool = False, **changes: Any) -> Any:
    files = pairs_file(run.with_name("pairs.jsonl"))
    return train(files, report=report, output=run, resume=resume, **settings(**{"method": "dpo"} | changes))


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on examples, from whose adapter a training on preferences starts."""
    run = tmp_path_factory.mktemp("first") / "run"
    trained(run, max_steps=2)
    return run


def test_every_method_learns_and_says_what_trl_says(tmp_path: Path) -> None:
    for method in METHODS:
        run = tmp_path / method
        summary = preferred(run, method=method, max_steps=6, learning_rate=5e-3, eval_every=3)
        assert summary.loss_after < summary.loss_before
        assert summary.accuracy is not None
        assert summary.margin_interval[0] <= summary.margin <= summary.margin_interval[1]
        lines = metrics(run)
        steps = [line for line in lines if "loss" in line]
        assert {"rewards/margins", "rewards/accuracies", "logps/chosen"} <= steps[-1].keys()
        assert ("kl" in steps[-1]) == (method == "kto")
        held_out = [line for line in lines if "held_out_loss" in line]
        assert [line["step"] for line in held_out] == [0, 3, 6]
        assert all({"held_out_accuracy", "held_out_margin"} <= line.keys() for line in held_out)
        if method in ("dpo", "kto"):
            start = math.log(2) if method == "dpo" else 0.5
            assert summary.loss_before == start == pytest.approx(steps[0]["loss"], abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_killed_then_resumed_equals_uninterrupted(first: Path, tmp_path: Path, method: str) -> None:
    """Also when the adapter that the training started from is gone: its answers are in the run folder."""
    start = shutil.copytree(first / "adapter", tmp_path / "start")
    hard = {"method": method, "start_from": str(start), "lora_dropout": 0.3, "eval_every": 2, "save_every": 2}
    preferred(tmp_path / "whole", **hard)
    with pytest.raises(Crash):
        preferred(tmp_path / "run", crash_at(3), **hard)
    shutil.rmtree(start)
    preferred(tmp_path / "run", resume=True, **hard)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")
    ours, theirs = read_summary(tmp_path / "run"), read_summary(tmp_path / "whole")
    assert (ours.loss_before, ours.margin, ours.accuracy) == (theirs.loss_before, theirs.margin, theirs.accuracy)


def test_a_run_without_its_reference_is_not_resumed(tmp_path: Path) -> None:
    with pytest.raises(Crash):
        preferred(tmp_path / "run", crash_at(3), save_every=2)
    (tmp_path / "run" / REFERENCE).unlink()
    with pytest.raises(RunError, match=r"reference\.safetensors: cannot be read .*--overwrite"):
        preferred(tmp_path / "run", resume=True, save_every=2)


def test_the_reference_is_the_adapter_that_training_starts_from(first: Path, tmp_path: Path) -> None:
    """With the base as reference, the first step would have another loss than log 2."""
    preferred(tmp_path / "run", start_from=str(first), learning_rate=1e-4)
    assert metrics(tmp_path / "run")[1]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_the_steps_are_those_of_trl(first: Path, tmp_path: Path) -> None:
    """Four steps on a trained adapter, all pairs in each of them: losses, margins and accuracies of every step."""
    steps = {"learning_rate": 1e-3, "max_steps": 4, "schedule": "constant", "batch_size": 12, "held_out": 0}
    preferred(tmp_path / "run", start_from=str(first), **steps)
    ours = [line for line in metrics(tmp_path / "run") if "loss" in line]
    files = pairs_file(tmp_path / "pairs.jsonl")
    options = {"held_out": 0, "method": "dpo", "start_from": str(first)}
    job = job_of(files, tmp_path / "other", **options)
    base = AutoModelForCausalLM.from_pretrained(model_folder())
    model = peft.PeftModel.from_pretrained(base, first / "adapter", is_trainable=True)
    args = DPOConfig(
        output_dir=str(tmp_path / "trl"), max_steps=4, per_device_train_batch_size=12, learning_rate=1e-3, bf16=False,
        lr_scheduler_type="constant", report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1,
        save_strategy="no",
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    trainer = DPOTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer("llama"))
    trainer.train_dataset = Dataset.from_list([tokens(*job.examples([i])) for i in range(12)])
    trainer.train()
    theirs = [line for line in trainer.state.log_history if "loss" in line]
    assert len(ours) == len(theirs) == 4
    for one, other in zip(ours, theirs, strict=True):
        for key in ("loss", "rewards/margins", "rewards/chosen", "rewards/rejected", "grad_norm"):
            assert one[key] == pytest.approx(other[key], rel=1e-3, abs=1e-4), (one["step"], key)
    assert ours[-1]["rewards/accuracies"] == pytest.approx(theirs[-1]["rewards/accuracies"])
    assert ours[-1]["loss"] < ours[0]["loss"] - 0.05


def tokens(chosen: Example, rejected: Example) -> dict[str, list[int]]:
    """A pair as TRL tokenizes one."""
    start = chosen.learned[0] + 1
    whole = ([*one.ids[: one.useful_length], one.targets[one.useful_length - 1]] for one in (chosen, rejected))
    chosen_ids, rejected_ids = whole
    assert chosen_ids[:start] == rejected_ids[:start]
    return {"prompt_ids": chosen_ids[:start], "chosen_ids": chosen_ids[start:], "rejected_ids": rejected_ids[start:]}


def answer(i: int, prompt: int, length: int, desirable: bool) -> Example:
    ids = [100 + i] * prompt + [200 + i] * length
    targets = [IGNORED] * (prompt - 1) + ids[prompt:]
    return Example(ids[:-1], targets, [1.0] * len(targets), f"{i}", desirable)


class Steps:
    batch_size, accumulate, epochs, max_steps, row_tokens = 3, 1, 1.0, None, 64


def test_an_unrelated_answer_is_that_of_the_example_before_in_the_step() -> None:
    examples = [answer(i, 3 + i % 2, 2 + i % 3, i % 2 == 0) for i in range(7)]
    preference = Preference(PreferenceLoss("kto"), examples, examples, 64)
    made = plan([len(e.ids) for e in examples], [e.n_targets for e in examples], Steps, 0, "packed")
    preference.follow(made)
    for k in range(len(made)):
        members = made.members(k)
        answered = [preference.unrelated[i].ids[-1] - 200 for i in members]
        expected = [members[-1], *members[:-1]] if len(members) > 1 else [made.members(k - 1)[-1]]
        assert answered == expected
    for i, mixed in enumerate(preference.unrelated):
        assert mixed.ids[0] == 100 + i
        assert [t - 200 for t in mixed.targets if t != IGNORED] == [mixed.ids[-1] - 200] * mixed.n_targets
    of_pairs = [mixed.ids[-1] - 200 for mixed in preference.held_out_unrelated]
    assert of_pairs == [5, 6, 0, 1, 2, 3, 4]


def test_an_unrelated_answer_that_is_too_long_is_cut_off() -> None:
    examples = [answer(0, 8, 2, True), answer(1, 2, 8, False)]
    mixed = Preference(PreferenceLoss("kto"), examples, examples, 10).held_out_unrelated
    assert [len(one.ids) for one in mixed] == [10, 3]
    assert mixed[0].n_targets == 2


def test_kto_needs_two_answers(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [rated(0)])
    with pytest.raises(DataError, match="kto needs at least two answers"):
        train(file, output=tmp_path / "run", **settings(method="kto", held_out=0))


def test_rated_rows_train_with_kto(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [rated(i) for i in range(12)])
    summary = train(file, output=tmp_path / "run", **settings(method="kto", learning_rate=5e-3, undesirable_weight=1.2))
    assert summary.loss_after < summary.loss_before


def test_held_out_answers_of_one_kind_have_no_margin(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [rated(i) for i in range(8)])
    good = write_rows(tmp_path / "good.jsonl", [rated(i) for i in (9, 11, 13)])
    train(file, output=tmp_path / "run", **settings(method="kto", held_out=good, learning_rate=5e-3))
    assert read_summary(tmp_path / "run").margin is None
    assert read_summary(tmp_path / "run").accuracy is not None
    assert all("held_out_margin" not in line for line in metrics(tmp_path / "run"))


def test_rows_of_the_other_kind_are_refused_with_the_flag_that_is_meant(tmp_path: Path) -> None:
    pairs, examples = (
        pairs_file(tmp_path / "pairs.jsonl"),
        write_rows(tmp_path / "examples.jsonl", [{"prompt": "a", "completion": "b"}]),
    )
    with pytest.raises(DataError, match=r"pairs\.jsonl lines 1-12: this is a preference row .* --method dpo, orpo"):
        train(pairs, output=tmp_path / "run", **settings())
    with pytest.raises(DataError, match=r"examples\.jsonl line 1: this row has one answer .* use --method lora"):
        train(examples, output=tmp_path / "run", **settings(method="dpo"))


def test_pairs_that_are_equal_or_empty_are_refused_or_left_out(tmp_path: Path) -> None:
    bad = [pair(0) | {"rejected": pair(0)["chosen"]}, pair(1) | {"chosen": " "}]
    file = write_rows(tmp_path / "pairs.jsonl", [*bad, *(pair(i) for i in range(12))])
    with pytest.raises(DataError, match=r"line 1: 'chosen' and 'rejected' are equal.*\n.*line 2: 'chosen' is empty"):
        train(file, output=tmp_path / "run", **settings(method="dpo"))
    train(file, output=tmp_path / "run", **settings(method="dpo", skip_bad_rows=2))


def test_an_option_of_another_method_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"preference\.gamma: used by simpo only, but training\.method is 'dpo'"):
        preferred(tmp_path / "run", gamma=0.5)


def test_a_reference_is_read_back(tmp_path: Path) -> None:
    written = Reference(torch.rand(3), torch.rand(0), torch.rand(4, 2), torch.rand(2))
    written.save(tmp_path / REFERENCE)
    read = Reference.load(tmp_path / REFERENCE)
    assert torch.equal(read.train, written.train)
    assert torch.equal(read.held_out, written.held_out)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("method", ["dpo", "kto", "orpo"])
def test_two_processes_equal_one(tmp_path: Path, method: str) -> None:
    options = EXACT | {"method": method, "batch_size": 3, "eval_every": 1}
    preferred(tmp_path / "one", **options)
    assert in_two_processes(lambda rank: preferred(tmp_path / "two", **options)) == [0, 0]
    assert_same_results(tmp_path / "two", tmp_path / "one")
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert one == pytest.approx(two, rel=1e-9, abs=1e-12)
