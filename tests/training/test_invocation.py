"""Which training examples teach an aLoRA something. Through a run: tests/lora/test_alora.py."""

import pytest

from lorasmith.config.lora import LoraConfig
from lorasmith.errors import ConfigError
from lorasmith.model.row import IGNORED, Example
from lorasmith.training.invocation import check_invocation
from tests.support.tiny import Watch

CONFIG = LoraConfig(alora_invocation_tokens=(7, 8))


def of_text(ids: list[int], learned: int, source: str = "a.jsonl:1") -> Example:
    """The last `learned` tokens are trained on."""
    targets = [*[IGNORED] * (len(ids) - 1 - learned), *ids[-learned:]]
    return Example(ids[:-1], targets, [1.0] * (len(ids) - 1), source)


GOOD = of_text([3, 7, 8, 4, 5], 2)


def test_the_sequence_before_a_label_is_enough() -> None:
    report = Watch()
    check_invocation([GOOD, of_text([3, 4, 7, 8, 5], 1)], CONFIG, report)
    check_invocation([of_text([3, 4, 5], 1)], LoraConfig(), report)
    assert report.warned == []


@pytest.mark.parametrize("ids", [[3, 4, 5, 6], [3, 4, 5, 7, 8]])
def test_without_it_there_is_nothing_to_learn(ids: list[int]) -> None:
    """In the last two tokens it is too late: what is active there predicts nothing that is trained on."""
    silent = of_text(ids, 1, "b.jsonl:2")
    silent = Example(silent.ids, [*silent.targets[:-2], silent.targets[-1], IGNORED], silent.weights, silent.source)
    report = Watch()
    check_invocation([GOOD, silent], CONFIG, report)
    (text,) = report.warned
    assert "1 of 2 examples do not have these tokens before what is trained on, such as b.jsonl:2" in text
    with pytest.raises(ConfigError, match=r"no example has the tokens \[7, 8\] before what is trained on"):
        check_invocation([silent], CONFIG, report)
