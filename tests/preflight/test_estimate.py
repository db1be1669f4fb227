"""Estimates of memory and time, and how they are displayed."""

from dataclasses import replace

import pytest
import torch

from lorasmith.i18n import using_language
from lorasmith.preflight import estimate as estimate_module
from lorasmith.preflight.estimate import Estimate, duration, estimate, estimate_peak_mib, growth_mib
from lorasmith.preflight.measurements import Measurement
from tests.support.checks import job_of
from tests.support.families import examples, one_row
from tests.support.fast_base import fast_base
from tests.support.tiny import rows_file

MEASURED = Measurement(500.0, 2.0, 1.0, 0.0, 0.0, 0.5, by="training")


def test_the_peak_grows_with_the_row_and_is_not_foretold_where_nothing_was_tried() -> None:
    base, _adapter = fast_base("llama", torch.float32)
    small, large = (estimate_peak_mib(base, one_row(examples(lengths)), 1000) for lengths in ((5, 6), (60,) * 40))
    assert small is not None
    assert large is not None
    assert large > small
    base.saved_bytes_per_token = 0.0
    assert estimate_peak_mib(base, one_row(examples((5, 6))), 1000) is None


def test_a_system_that_does_not_say_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    base, _adapter = fast_base("llama", torch.float32)
    monkeypatch.setattr(estimate_module, "memory_mib", lambda: None)
    assert estimate_peak_mib(base, one_row(examples((5, 6))), 1000) is None


def test_only_where_every_shape_is_compiled_memory_grows_with_the_steps() -> None:
    row = one_row(examples((50, 40)))
    single, half = (fast_base("llama", dtype)[0] for dtype in (torch.float32, torch.bfloat16))
    assert growth_mib(single, row, 100) == 0
    assert growth_mib(half, row, 100) == growth_mib(half, row, 200) > growth_mib(half, row, 1) > 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (3599, "59 min 59 s"), (7500, "2 h 05 min")],
)
def test_a_duration_in_words(seconds, text):
    assert duration(seconds) == text


def test_a_measurement_needs_no_trial_and_tells_the_time(tmp_path, monkeypatch):
    job = job_of(rows_file(tmp_path / "rows.jsonl"), tmp_path, max_steps=4, save_every=2)
    monkeypatch.setattr(estimate_module, "estimate_peak_mib", lambda *_args: pytest.fail("looked at the trial"))
    monkeypatch.setattr(estimate_module, "usable_mib", lambda _device: 400.0)
    found = estimate(job, MEASURED, recompute=False)
    assert (found.peak_mib, found.free_mib, found.by) == (500.0, 400.0, "training")
    # saved three times: two checkpoints, and the adapter at the end
    assert found.seconds == {
        "start": 2.0,
        "training": 1.0,
        "evaluation": 0.0,
        "saving": 1.5,
    }
    assert found.recompute
    (warning,) = found.warnings
    assert "exceed the 400 MiB" in warning
    assert estimate(job, MEASURED, recompute=True).warnings == []


def test_what_is_unknown_is_not_shown():
    assert list(Estimate().lines()) == []
    (line,) = Estimate(peak_mib=1234.5).lines()
    assert line == ("memory", "up to about 1,234 MiB (estimated from a trial step on two short examples)")
    with using_language("zh"):
        assert "1,234" in next(Estimate(peak_mib=1234.5).lines())[1]


def test_quantizing_is_suggested_where_memory_is_short(tmp_path, monkeypatch):
    job = job_of(rows_file(tmp_path / "rows.jsonl"), tmp_path, max_steps=2)
    monkeypatch.setattr(estimate_module, "usable_mib", lambda _device: 400.0)
    monkeypatch.setattr(
        estimate_module, "weights_mib", lambda _folder, _dtype, form="none": 3000.0 if form == "none" else 900.0
    )
    (_recompute, suggestion) = estimate(job, MEASURED, recompute=False).warnings
    assert suggestion == "model.quantize: loading the base model with --quantize nf4 would save about 2,100 MiB."
    monkeypatch.setattr(estimate_module, "usable_mib", lambda _device: 4000.0)
    assert estimate(job, MEASURED, recompute=False).warnings == []
    monkeypatch.setattr(estimate_module, "usable_mib", lambda _device: 400.0)
    job.base.adapters["default"] = replace(job.base.adapters["default"], is_whole_model=True)  # which refuses it
    assert len(estimate(job, MEASURED, recompute=False).warnings) == 1
    job.base.adapters["default"] = replace(job.base.adapters["default"], is_whole_model=False)
    job.base.quantize = "int8"
    assert len(estimate(job, MEASURED, recompute=False).warnings) == 1


def test_a_quantized_base_needs_room_for_what_is_converted():
    base, _adapter = fast_base("llama", torch.float32)
    row = one_row(examples((5, 6)))
    plain = estimate_peak_mib(base, row, 1000)
    base.quantize = "nf4"
    assert estimate_peak_mib(base, row, 1000) - plain > 100
