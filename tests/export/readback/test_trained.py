"""What the trained model says is what generate and plain log probabilities say."""

import torch

from lorasmith.adapters.session import open_adapters
from lorasmith.export.readback.trained import Said, mean_log_probs, measure
from lorasmith.model.row import IGNORED, Example
from tests.support.exported import adapter_of, folder_of


def test_mean_log_probabilities_are_of_the_learned_tokens():
    row = Example([1, 2, 3], [IGNORED, 3, 4], [1.0] * 3, "")
    logits_LV = torch.randn(3, 9)
    wanted = logits_LV.log_softmax(-1)[[1, 2], [3, 4]].mean()
    assert mean_log_probs(lambda _rows: [logits_LV], [row]) == [float(wanted)]


def test_measure(tmp_path):
    folder = adapter_of(folder_of("llama", tmp_path / "base"), tmp_path / "adapter")
    session = open_adapters([folder])
    rows = [Example([*range(3, 143)], [*range(4, 144)], [1.0] * 140, ""), Example([3], [IGNORED], [1.0], "")]
    found = measure(session, rows)
    assert (found.context, len(found.prompts), len(found.replies)) == (128, 20, 20)
    assert [len(row.ids) for row in found.rows] == [128]  # cut to the context; one without learned tokens is left out
    assert all(isinstance(said, Said) and len(said.ids) == len(said.leads) for said in found.replies)
    assert min(min(said.leads) for said in found.replies) >= 0
    assert found.longest == 128
