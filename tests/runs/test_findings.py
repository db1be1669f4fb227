"""Each answer of a report appears where the figures say so, and not where they do not."""

import pytest
import torch

from lorasmith.evaluation.interval import Interval
from lorasmith.evaluation.loss import Comparison
from lorasmith.evaluation.results import Forgetting
from lorasmith.evaluation.trend import Trend
from lorasmith.lora.spectrum import LayerSpectrum
from lorasmith.runs.findings import (
    Finding,
    falling_finding,
    forgotten_finding,
    gap_finding,
    learned_finding,
    rank_finding,
)


def loss(difference: float, half: float = 0.1, examples: int = 40, kind: type[Comparison] = Comparison) -> Comparison:
    return kind(3.0, 3.0 + difference, difference - half, difference + half, examples)


def interval(value: float, half: float = 0.02, examples: int = 40) -> Interval:
    return Interval(value, value - half, value + half, examples)


def slope(change: float, half: float, mean: float = 2.0) -> Trend:
    """A trend over 100 steps."""
    return Trend(change / 100, (change - half) / 100, (change + half) / 100, 200, 300, mean, 100, 0.0)


def result(finding: Finding) -> tuple[str, str]:
    assert finding.answer
    assert finding.question
    assert finding.certainty
    return finding.outcome, finding.sure


@pytest.mark.parametrize(
    ("one", "wanted"),
    [
        (None, ("unknown", "unknown")),
        (loss(-0.5), ("better", "clear")),
        (loss(-0.05), ("none", "likely")),
        (loss(0.05), ("none", "likely")),
        (loss(0.5), ("worse", "clear")),
        (loss(-0.5, examples=9), ("unclear", "unknown")),
    ],
)
def test_learned(one, wanted):
    finding = learned_finding(one, ["nothing is held out"])
    assert result(finding) == wanted
    if one is None:
        assert finding.evidence == ("nothing is held out",)
    else:
        assert f"{one.examples} examples" in finding.evidence[0]
        assert f"{one.difference:+.3f} (95% CI {one.low:+.3f} to {one.high:+.3f})" in finding.evidence[0]


def test_a_chosen_adapter_is_flattered():
    assert "best of 7 evaluations" in learned_finding(loss(-0.5), [], 7).evidence[1]
    assert len(learned_finding(loss(-0.5), [], 1).evidence) == 1


@pytest.mark.parametrize(
    ("one", "wanted"),
    [
        (None, ("unknown", "unknown")),
        (loss(0.5, kind=Forgetting), ("forgot", "clear")),
        (loss(0.05, kind=Forgetting), ("none", "likely")),
        (loss(0.5, examples=9, kind=Forgetting), ("none", "likely")),
        (loss(-0.5, kind=Forgetting), ("better", "clear")),
    ],
)
def test_forgotten(one, wanted):
    assert result(forgotten_finding(one)) == wanted


@pytest.mark.parametrize(
    ("end", "wanted"),
    [
        (None, ("unknown", "unknown")),
        (slope(-0.2, 0.05), ("falling", "clear")),
        (slope(-0.01, 0.005), ("level", "likely")),  # half a percent of the loss: certain, but too little to matter
        (slope(0.0, 0.03), ("level", "likely")),
        (slope(-0.03, 0.04), ("unclear", "unknown")),
        (slope(-0.1, 0.2), ("unclear", "unknown")),
        (slope(0.2, 0.05), ("rising", "clear")),
        (slope(0.01, 0.005), ("level", "likely")),
    ],
)
def test_falling(end, wanted):
    finding = falling_finding(end)
    assert result(finding) == wanted
    if end:
        assert "steps 200 to 300, 100 logged losses" in finding.evidence[0]


def test_what_flattens_a_curve_is_told():
    assert len(falling_finding(slope(0, 0.01)).evidence) == 1
    assert len(falling_finding(slope(0, 0.01), (2e-4, 1.9e-4)).evidence) == 1
    assert "from 0.0002 to 1e-06" in falling_finding(slope(0, 0.01), (2e-4, 1e-6)).evidence[1]
    held_out = [(0, 3.0), (150, 2.5), (300, 2.25)]
    assert (
        "steps 150 and 300) the held-out loss changed by -0.250"
        in falling_finding(slope(0, 0.01), None, held_out).evidence[-1]
    )


TRAINED = loss(-1.0)


@pytest.mark.parametrize(
    ("figures", "wanted"),
    [
        ((None, None, None, None), ("unknown", "unknown")),
        ((interval(0.01), TRAINED, None, None), ("closed", "likely")),
        ((interval(0.01, half=0.2), TRAINED, None, None), ("closed", "hint")),
        ((interval(0.05), TRAINED, None, None), ("closed", "likely")),  # significant, but small
        ((interval(0.3), TRAINED, None, None), ("open", "clear")),
        ((interval(0.3, examples=9), TRAINED, None, None), ("unclear", "unknown")),
        ((interval(0.7), TRAINED, None, None), ("memorized", "clear")),
        ((interval(0.01), TRAINED, None, loss(0.5)), ("harmful", "clear")),
        ((interval(0.01), TRAINED, None, loss(0.05)), ("closed", "likely")),
        ((interval(0.01), TRAINED, slope(0.5, 0.2), None), ("closed", "likely")),
        ((None, None, slope(0.5, 0.2), None), ("open", "hint")),
        ((None, None, slope(0.1, 0.2), None), ("unclear", "unknown")),
    ],
)
def test_gap(figures, wanted):
    finding = gap_finding(*figures, hint="evaluate more often")
    assert result(finding) == wanted
    gap, _trained_on, opening, later = figures
    assert len(finding.evidence) == sum(one is not None for one in (gap, opening, later)) or wanted[0] == "unknown"
    assert (finding.evidence == ("evaluate more often",)) == (wanted[0] == "unknown")


def layers(*values: float, count: int = 3) -> list[LayerSpectrum]:
    return [LayerSpectrum(f"model.layers.{i}.q", torch.tensor([values], dtype=torch.float64)) for i in range(count)]


FLAT, STEEP = layers(1, 1, 1, 1), layers(1, 0.1, 0, 0)


@pytest.mark.parametrize(
    ("spectra", "half", "wanted"),
    [
        (FLAT, interval(0.5), ("used", "hint")),
        (STEEP, interval(0.5), ("used", "hint")),  # what the losses say weighs more
        (FLAT, interval(0.95), ("spare", "likely")),
        (FLAT, interval(0.9), ("unclear", "unknown")),
        (FLAT, interval(0.5, examples=9), ("unknown", "unknown")),
        (FLAT, None, ("unknown", "unknown")),
        (STEEP, None, ("spare", "hint")),
        ([], None, ("unknown", "unknown")),
        (layers(1.0), interval(0.5), ("unknown", "unknown")),
        (layers(0, 0, 0), None, ("unknown", "unknown")),
    ],
)
def test_rank(spectra, half, wanted):
    finding = rank_finding(spectra, half)
    assert result(finding) == wanted
    if any(spectra is one for one in (FLAT, STEEP)):
        assert any("over 3 updates of rank 4" in line for line in finding.evidence)
