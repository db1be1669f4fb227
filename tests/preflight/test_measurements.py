"""Measurements: found again for the same run only, and times that follow from them."""

import pytest

from lorasmith.preflight.measurements import (
    Measurement,
    estimate_seconds,
    held_out_tokens,
    load_measurement,
    measurement_of_run,
    measurement_path,
    save_measurement,
    training_tokens,
)
from tests.support.checks import config, job_of
from tests.support.tiny import rows_file

MEASURED = Measurement(500.0, 2.0, 1.0, 0.01, 0.001, 0.5, by="dry step")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return rows_file(tmp_path_factory.mktemp("measured") / "rows.jsonl")


def test_a_measurement_is_read_as_it_was_saved(tmp_path):
    path = tmp_path / "cache" / "one.json"
    assert load_measurement(path) is None
    save_measurement(path, MEASURED)
    assert load_measurement(path) == MEASURED
    assert [file.name for file in path.parent.iterdir()] == ["one.json"]


@pytest.mark.parametrize("text", ["{", "[]", '{"peak_mib": 1}', '{"unknown": 1}'])
def test_a_damaged_measurement_is_measured_again(tmp_path, text):
    (tmp_path / "one.json").write_text(text, "utf-8")
    assert load_measurement(tmp_path / "one.json") is None


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").touch()
    save_measurement(tmp_path / "file" / "one.json", MEASURED)


def test_the_path_follows_what_memory_and_speed_depend_on(files, tmp_path):
    def path(**changes):
        return measurement_path(job_of(files, tmp_path, **changes), config(files, **changes))

    usual = path()
    assert path() == usual
    assert path(learning_rate=1e-4, clip=0.5) == usual
    others = [{"batch_size": 3}, {"target_modules": ["q_proj"]}, {"held_out": 2}, {"max_steps": 5}]
    assert len({usual, *(path(**change) for change in others)}) == 5


def test_seconds_of_a_run_by_hand(files, tmp_path):
    job = job_of(files, tmp_path, max_steps=6, eval_every=2, save_every=3)
    tokens = sum(job.plan.lengths[i] for k in range(6) for i in job.plan.members(k))
    assert training_tokens(job) == tokens
    held_out = sum(example.useful_length for example in job.held_out)
    assert held_out_tokens(job) == held_out
    found = estimate_seconds(job, MEASURED)
    assert found["training"] == pytest.approx(1 + 0.01 * tokens)
    assert found["evaluation"] == pytest.approx(4 * 0.001 * held_out)  # before, after steps 2 and 4, after


def test_evaluations_once_per_epoch_take_as_long_as_every_so_many_steps(files, tmp_path):
    job = job_of(files, tmp_path, max_steps=6, eval_every="epoch", batch_size=4)
    every = job_of(files, tmp_path, max_steps=6, eval_every=job.plan.steps_per_epoch, batch_size=4)
    assert estimate_seconds(job, MEASURED) == estimate_seconds(every, MEASURED)
    assert estimate_seconds(job, MEASURED)["evaluation"] > 2 * 0.001 * held_out_tokens(job)


def test_a_finished_run_foretells_itself(files, tmp_path):
    job = job_of(files, tmp_path, max_steps=6, eval_every=2)
    measured = measurement_of_run(job, start=2.0, evaluated=0.3, trained=5.0, seconds=9.0)
    assert measured.by == "training"
    assert sum(estimate_seconds(job, measured).values()) == pytest.approx(9.0)
