"""The dry run: measures, leaves nothing behind, and tells of a loss that is not finite."""

import torch

from lorasmith.preflight.dry_run import dry_run
from tests.support.checks import job_of
from tests.support.tiny import rows_file


def test_it_measures_every_part_and_writes_nothing(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    job = job_of(rows_file(tmp_path / "rows.jsonl"), folder, max_steps=12, batch_size=2)
    found = dry_run(job, start=7.0)
    assert found is not None
    assert (found.start, found.by) == (7.0, "dry step")
    assert found.peak_mib > 0
    assert found.token > 0
    assert found.held_out_token > 0
    assert found.save > 0
    assert list(folder.iterdir()) == []


def test_without_held_out_rows_there_is_no_evaluation(tmp_path):
    job = job_of(rows_file(tmp_path / "rows.jsonl"), tmp_path, held_out=0)
    found = dry_run(job, start=0.0)
    assert found is not None
    assert found.held_out_token == 0


def test_a_loss_that_is_not_finite_ends_it(tmp_path):
    job = job_of(rows_file(tmp_path / "rows.jsonl"), tmp_path)
    with torch.no_grad():
        job.base.model.get_output_embeddings().weight.fill_(float("inf"))
    assert dry_run(job, start=0.0) is None
