"""What a report measures: the same figures as `eval`, and those that only it has."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasmith.adapters.session import open_adapters
from lorasmith.config.model import ModelConfig
from lorasmith.evaluation.loss import evaluate_loss
from lorasmith.lora.spectrum import reduced
from lorasmith.report import Report
from lorasmith.runs.evaluate import EvaluationOptions, evaluate, prepared_again
from lorasmith.runs.evidence import Evidence, chosen_of, measure
from lorasmith.runs.subject import find_subject
from tests.support.tiny import Watch, rows_file, settings, train, trained


def measured(run: Path, *files: str, report: Report | None = None) -> Evidence:
    return measure(find_subject(run), files, None, report or Report())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two and a half epochs on 28 rows, with 12 held out; rows beside it."""
    folder = tmp_path_factory.mktemp("evidence")
    rows = rows_file(folder / "rows.jsonl", range(40))
    train(rows, **{"output": folder / "run"} | settings(held_out=12, max_steps=18, seed=5, r=4))
    return folder / "run"


@pytest.fixture(scope="module")
def found(run: Path) -> Evidence:
    return measured(run)


def test_losses_are_those_of_eval(run, found):
    (wanted,) = evaluate([run], EvaluationOptions(forget="")).adapters
    assert found.learned == wanted.loss
    assert found.forgotten == wanted.forgotten
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    assert found.learned.after == pytest.approx(summary["loss_after"], rel=1e-6)
    assert found.train_examples == 28
    assert found.missing == ()


def test_training_examples_are_compared_with_held_out_ones(run, found):
    session = open_adapters([run])
    subject = find_subject(run)
    train = prepared_again(session, run, subject.config, Report()).train
    before, after = (evaluate_loss(session.base, train, name).loss for name in (None, "run"))
    assert (found.trained_on.before, found.trained_on.after) == pytest.approx((before, after), rel=1e-6)
    assert found.gap.value == pytest.approx(found.learned.difference - (after - before), rel=1e-5)
    assert found.gap.examples == 12


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_half_the_rank_is_an_adapter_whose_products_are_cut(run, tmp_path, dtype):
    """The same as an adapter on disk with the largest half of the dense product's singular values."""
    shutil.copytree(run / "adapter", tmp_path / "half")
    file = tmp_path / "half" / "adapter_model.safetensors"
    tensors = load_file(file)
    for key in [key for key in tensors if ".lora_A." in key]:
        other = key.replace("lora_A", "lora_B")
        U, values, Vh = torch.linalg.svd(tensors[other].double() @ tensors[key].double())
        root = values[:2].sqrt()
        tensors[key][2:], tensors[other][:, 2:] = 0, 0
        tensors[key][:2], tensors[other][:, :2] = root[:, None] * Vh[:2], U[:, :2] * root
    save_file(tensors, file)
    data = rows_file(tmp_path / "own.jsonl", range(50, 70))
    model = ModelConfig(dtype=dtype)
    whole, half = evaluate([run, tmp_path / "half"], EvaluationOptions((data,)), model).adapters
    share = measure(find_subject(run), (data,), model, Report()).half
    wanted = (half.loss.before - half.loss.after) / (whole.loss.before - whole.loss.after)
    assert share.value == pytest.approx(wanted, abs=1e-5 if dtype == "float32" else 0.02)
    assert share.examples == 20
    assert share.low < share.value < share.high < 0.95


def test_a_later_checkpoint_is_compared(run, tmp_path):
    """Its B is ten times as large, so it is worse."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    summary = (copy / "summary.json").read_text("utf-8")
    (copy / "summary.json").write_text(summary.replace('"best_step": 18', '"best_step": 9'), "utf-8")
    file = copy / "checkpoints" / "step-000018" / "adapter_model.safetensors"
    save_file({key: t * (10 if "lora_B" in key else 1) for key, t in load_file(file).items()}, file)
    later = measured(copy).later
    assert later.before == pytest.approx(measured(run).learned.after, rel=1e-6)
    assert later.difference > 0
    assert later.is_significant
    assert measured(run).later is None


def test_examples_are_taken_from_the_whole_order(found):
    assert [one.place for one in found.shown] == ["worst", "worst", "middle", "middle", "best", "best"]
    changes = [one.after - one.before for one in found.shown]
    assert changes == sorted(changes, reverse=True)
    assert found.eligible == 12
    assert all(one.prompt.reference for one in found.shown)


@pytest.mark.parametrize("count", range(1, 15))
def test_no_example_is_shown_twice(count):
    chosen = chosen_of(range(count))
    order = [i for _place, i in chosen]
    assert order == sorted(set(order))
    assert order[0] == 0
    assert (count == 1) or order[-1] == count - 1
    assert len(chosen) == (min(count, 3) if count < 6 else 6)


def test_files_take_the_place_of_the_held_out_examples(run, tmp_path):
    data = rows_file(tmp_path / "own.jsonl", range(60, 75))
    report = Watch()
    found = measured(run, data, report=report)
    assert found.learned.examples == 15
    assert found.gap.examples == 15
    assert found.warnings == ()
    assert measured(run, rows_file(tmp_path / "seen.jsonl", range(40))).warnings[0].startswith("run was trained on")
    assert "held-out loss with half the rank" in report.tasks


def test_nothing_held_out(tmp_path):
    trained(tmp_path / "run", held_out=0)
    found = measured(tmp_path / "run")
    assert (found.learned, found.gap, found.half, found.shown) == (None, None, None, ())
    assert found.forgotten is not None
    assert "The run held out no examples" in found.missing[0]


def test_a_run_that_has_not_seen_every_row(run, tmp_path):
    rows = rows_file(tmp_path / "rows.jsonl", range(40))
    train(rows, **{"output": tmp_path / "short"} | settings(held_out=12, max_steps=3))
    found = measured(tmp_path / "short")
    assert found.learned is not None
    assert found.gap is None
    assert "before the training had seen every row" in found.missing[0]


def test_data_that_changed_leaves_the_general_text(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    config = (copy / "config.toml").read_text("utf-8")
    other = rows_file(tmp_path / "rows.jsonl", range(3, 43))
    (copy / "config.toml").write_text(config.replace(str(run.parent / "rows.jsonl"), other), "utf-8")
    found = measured(copy)
    assert found.learned is None
    assert found.forgotten is not None
    assert "the data has changed since training" in found.missing[0]


def test_an_adapter_alone(run, tmp_path):
    shutil.copytree(run / "adapter", tmp_path / "mine")
    found = measured(tmp_path / "mine")
    assert found.learned is None
    assert f"lorasmith report {tmp_path / 'mine'} FILE" in found.missing[0]
    found = measured(tmp_path / "mine", rows_file(tmp_path / "own.jsonl", range(60, 75)))
    assert found.learned.examples == 15
    assert found.half is not None
    assert found.gap is None


def test_plain_text_has_no_answers(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": f"Cats eat mice, {i} times."}) + "\n" for i in range(24)), "utf-8")
    train(str(file), **{"output": tmp_path / "run"} | settings(held_out=12, max_steps=6))
    found = measured(tmp_path / "run")
    assert found.learned.examples == 12
    assert found.shown == ()
    assert "None of the held-out examples has a prompt" in found.missing[-1]


def test_reduced_is_used_for_every_update():
    A, B = torch.randn(1, 4, 6).double(), torch.randn(1, 5, 4).double()
    product = torch.matmul(*reversed(reduced(A, B)))[0]
    assert torch.linalg.matrix_rank(product) == 2
