"""The update of a run of all weights cut to a rank, against models whose weights were cut by hand."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lorasmith.adapters.session import open_adapters
from lorasmith.config.model import ModelConfig
from lorasmith.evaluation.loss import evaluate_loss
from lorasmith.loading.load import load_base
from lorasmith.model.base import Base
from lorasmith.report import Report
from lorasmith.runs.evaluate import original_of, prepared_again
from lorasmith.runs.evidence import measure
from lorasmith.runs.subject import find_subject
from lorasmith.runs.whole_update import RANKS
from tests.support.experts import moe_folder
from tests.support.tiny import Watch, rows_file, settings, train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of all weights on 28 rows, with 12 held out."""
    folder = tmp_path_factory.mktemp("whole")
    rows = rows_file(folder / "rows.jsonl", range(40))
    train(rows, **{"output": folder / "run"} | settings(held_out=12, max_steps=24, method="full", learning_rate=3e-3))
    return folder / "run"


def cut_by_hand(original: Base, trained: Base, rank: int, folder: Path) -> Base:
    """The original with the update of its linear layers but the head cut to `rank`, loaded from a folder."""
    model = AutoModelForCausalLM.from_pretrained(original.folder, dtype=torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            update = trained.model.get_submodule(name).weight.double() - module.weight.double()
            U, S, Vh = torch.linalg.svd(update, full_matrices=False)
            module.weight.data += ((U[:, :rank] * S[:rank]) @ Vh[:rank]).float()
    model.save_pretrained(folder)
    trained.tokenizer.save_pretrained(folder)
    return load_base(ModelConfig(model=str(folder), dtype="float32"))


def test_a_rank_keeps_what_weights_cut_by_hand_keep(run, tmp_path):
    watch = Watch()
    found = measure(find_subject(run), (), ModelConfig(dtype="float32"), watch)
    assert set(found.update.retained) == {*RANKS}
    assert "singular values" in watch.tasks
    assert found.update.rounded_to == ""
    session = open_adapters([run], ModelConfig(dtype="float32"))
    original = original_of(session, ModelConfig(dtype="float32"), Report())
    held_out = prepared_again(session, run, find_subject(run).config, Report()).held_out
    before, after = (evaluate_loss(base, held_out, None).loss for base in (original, session.base))
    assert found.update.of_layers.value == pytest.approx(found.update.retained[64].value, abs=1e-4)  # 32 rows at most
    for rank in RANKS:
        base = cut_by_hand(original, session.base, rank, tmp_path / str(rank))
        wanted = (before - evaluate_loss(base, held_out, None).loss) / (before - after)
        part = found.update.retained[rank]
        assert part.value == pytest.approx(wanted, abs=1e-4)
        assert part.low < part.value < part.high
    assert found.update.retained[8].value < found.update.retained[64].value


def test_the_base_model_is_the_original(run):
    found = measure(find_subject(run), (), None, Report())
    assert found.learned.before > found.learned.after
    assert found.half is None
    assert [one.place for one in found.shown] == ["worst", "worst", "middle", "middle", "best", "best"]
    assert any(one.base.text != one.adapter.text for one in found.shown)


def test_ranks_are_left_out_where_the_loss_did_not_fall(run, tmp_path):
    rows = rows_file(tmp_path / "few.jsonl", range(60, 64))
    found = measure(find_subject(run), (rows,), None, Report())
    assert found.learned.examples == 4
    assert found.update.retained == {}
    assert len(found.update.spectra) == 14


def test_rounding_is_told(run):
    rows = str(run.parent / "rows.jsonl")
    found = measure(find_subject(run), (rows,), ModelConfig(dtype="bfloat16"), Report())
    assert found.update.rounded_to == "bfloat16"


def test_experts_are_left_out_with_the_reason(tmp_path):
    rows = rows_file(tmp_path / "rows.jsonl", range(20))
    model = str(moe_folder(tmp_path / "moe", "qwen3_moe"))
    options = settings(held_out=4, max_steps=2, model=model, method="full", learning_rate=1e-3)
    train(rows, **{"output": tmp_path / "run"} | options)
    found = measure(find_subject(tmp_path / "run"), (), None, Report())
    assert found.update is None
    assert "the model has experts, whose update cannot be cut to a rank here." in found.missing[-1]
