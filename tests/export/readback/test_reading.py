"""What a reader says otherwise than the trained model is named, unless rounding explains it."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from lorasmith.data.template.encoding import Template
from lorasmith.export.readback.reading import Rounding, read
from lorasmith.export.readback.trained import Said, Trained, mean_log_probs
from lorasmith.model.row import IGNORED, Example
from tests.support.tiny import tokenizer

ROW = Example([5, 6, 7], [6, 7, IGNORED], [1.0] * 3, "a.jsonl:1")
LOGITS = {5: [3.0, 0.0, 0.0], 6: [0.0, 3.0, 2.0], 7: [0.0, 1.0, 3.0]}


def logits_of(rows: list[list[int]], off: float = 0.0) -> list[Tensor]:
    """Of tokens 5 to 7, the largest of three for the next token; `off` moves it."""
    found = []
    for row in rows:
        logits_LV = torch.zeros(len(row), 300)
        for at, token in enumerate(row):
            logits_LV[at, 5:8] = torch.tensor(LOGITS.get(token, [0.0, 0.0, 0.0])) + off * torch.tensor([1.0, -1, 0])
        found.append(logits_LV)
    return found


@dataclass
class Fake:
    """A reader that is off by as much, with replies of its own."""

    off: float = 0.0
    said: list[list[int]] = field(default_factory=lambda: [[6, 7]])
    name: str = "fake"
    version: str = "1"
    slack: float = 1.0
    floor: float = 1e-4
    ids: list[int] | None = None

    def tokens(self, _text: str) -> list[int] | None:
        return self.ids

    def logits(self, rows: list[list[int]]) -> list[Tensor]:
        return logits_of(rows, self.off)

    def replies(self, *_rest: object) -> list[list[int]]:
        return self.said


def trained() -> Trained:
    template, probes = Template.of(tokenizer("llama")), [[5, 6, 7], [7, 5]]
    said = [Said([6, 7], [2.0, 1.0])]
    rows = [ROW]
    return Trained(template, 50, probes, logits_of(probes), [[5]], said, rows, mean_log_probs(logits_of, rows))


def rounding(off: float = 0.01) -> Rounding:
    own = trained()
    return Rounding(logits_of(list(own.probes), off), mean_log_probs(lambda rows: logits_of(list(rows), off), own.rows))


def test_what_rounding_explains_is_no_problem():
    reading, problems = read(Fake(0.01), trained(), rounding())
    assert problems == []
    assert reading.error < reading.limit < 0.02
    assert (reading.replies, reading.equal_replies, reading.rows) == (1, 1, 1)
    assert 0 < reading.log_prob_error < reading.log_prob_limit


@pytest.mark.parametrize(
    ("reader", "words"),
    [
        (Fake(0.02), "as fake reads it, its logits differ from those of the trained model by"),
        (Fake(ids=[1]), "fake splits the text"),
        (Fake(said=[[5, 7]]), "as fake reads it, it replies"),
        (Fake(said=[[6]]), "as fake reads it, it replies"),
    ],
)
def test_what_rounding_does_not_explain_is_named(reader, words):
    _reading, problems = read(reader, trained(), rounding())
    assert problems[0].startswith(words)
    assert len(problems) == 1


def test_slack_allows_more():
    assert read(Fake(0.02, slack=3.0), trained(), rounding())[1] == []


def test_a_reply_may_differ_where_the_lead_was_small():
    own = trained()
    close = Trained(**vars(own) | {"replies": [Said([6, 7], [2.0, 0.01])]})
    reading, problems = read(Fake(said=[[6, 5, 5]]), close, rounding())
    assert problems == []
    assert (reading.replies, reading.equal_replies) == (1, 0)


def test_log_probabilities_of_held_out_rows():
    class Other(Fake):
        def logits(self, rows: list[list[int]]) -> list[Tensor]:
            return logits_of(rows, 0.5 if rows == [ROW.ids] else 0.0)

    _reading, problems = read(Other(), trained(), rounding())
    assert problems[0].startswith("as fake reads it, the mean log probability of a held-out row differs by")
