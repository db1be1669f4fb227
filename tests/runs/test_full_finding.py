"""Whether full fine-tuning was needed: each answer where it is true."""

import pytest
import torch

from lorasmith.evaluation.interval import Interval
from lorasmith.lora.spectrum import LayerSpectrum
from lorasmith.runs.full_finding import directions_text, full_finding
from lorasmith.runs.whole_update import WholeUpdate

VALUES = torch.tensor([[2.0, 1.0, 0.5]], dtype=torch.float64)
SPECTRA = tuple(
    LayerSpectrum(f"model.layers.{i}.up_proj", VALUES, rest=rest) for i, rest in enumerate((0.0, 0.1, 40.0))
)


def update(
    eight: float, most: float, width: float = 0.02, examples: int = 40, dtype: str = "", layers: float = 0.99
) -> WholeUpdate:
    parts = {64: most, 8: eight}
    found = {rank: Interval(part, part - width, part + width, examples) for rank, part in parts.items()}
    return WholeUpdate(SPECTRA, found, Interval(layers, layers - width, layers + width, examples), dtype)


@pytest.mark.parametrize(
    ("found", "outcome", "sure", "words"),
    [
        (update(0.95, 0.99), "rank 8", "likely", "Probably not: cut to rank 8,"),
        (update(0.7, 0.95), "rank 64", "likely", "Probably not: cut to rank 64,"),
        (update(0.3, 0.6), "needed", "hint", "Perhaps: cut to rank 64,"),
        (update(0.3, 0.6, layers=0.7), "others", "hint", "Perhaps: a part of the effect is in weights"),
        (update(0.3, 0.9), "unclear", "unknown", "Unclear: cut to rank 64,"),
        (update(0.95, 0.99, examples=5), "unknown", "unknown", "Not known"),
        (WholeUpdate(SPECTRA, {}), "unknown", "unknown", "Not known"),
    ],
)
def test_the_answer_is_what_the_ranks_keep(found, outcome, sure, words):
    finding = full_finding(found, ())
    assert (finding.key, finding.outcome, finding.sure) == ("full", outcome, sure)
    assert finding.answer.startswith(words)
    assert any("remains" in line for line in finding.evidence) == (outcome != "unknown")


def test_the_evidence_names_every_figure():
    eight, most, layers, run, directions = full_finding(update(0.7, 0.95), ()).evidence
    assert "With only the 8 strongest directions" in eight
    assert "70% of the improvement on 40 held-out examples remains (95% CI 68% to 72%)" in eight
    assert "With only the 64 strongest" in most
    assert "With all directions of it, 99% remains (95% CI 97% to 101%)" in layers
    assert "only such a run can show it" in run
    assert "is in 2 directions in the median (2 to ≥4 over 3 layers)" in directions
    assert "bfloat16, whose rounding adds noise" in full_finding(update(0.7, 0.95, dtype="bfloat16"), ()).evidence[-1]


def test_without_an_update_it_is_said_why():
    finding = full_finding(None, ("because",))
    assert (finding.outcome, finding.evidence) == ("unknown", ("because",))
    still = WholeUpdate((LayerSpectrum("a", torch.zeros(1, 3, dtype=torch.float64)),), {})
    assert full_finding(still, ()).evidence == ()


def test_more_directions_than_were_computed():
    assert [directions_text(one) for one in SPECTRA] == ["2", "2", "≥4"]
