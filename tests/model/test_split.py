"""Law 4: however a step is split into rows, loss and gradients are those of the mathematics."""

import random
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorasmith.lora.inject import Adapter
from lorasmith.model import attention
from lorasmith.model.base import Base
from lorasmith.model.head import loss_sum, token_losses
from lorasmith.model.row import Example, flatten
from tests.support.families import (
    CONFIGS,
    MAIN,
    PADDED,
    adapted,
    examples,
    far_apart,
    gradients,
    one_linear,
    own_logits,
)

LIMIT = 1e-12  # float64, casts down taken out: sums in another order
BATCH = examples((5, 9, 3, 12, 7, 1))
TOTAL = sum(e.weight for e in BATCH)
LAYOUTS = [
    (family, layout)
    for family in CONFIGS
    for layout in ("packed", "padded")
    if layout == "padded" or family not in PADDED
]
pytestmark = pytest.mark.usefixtures("exact")


def in_layout(base: Base, layout: str) -> Base:
    """The same base, made to use the padded path in the model's own attention, or as the probe found it."""
    if layout == "padded" and base.layout == "packed":
        base.model.set_attn_implementation("sdpa")
        base.layout = "padded"
    assert base.layout == layout
    assert (base.model.config._attn_implementation == attention.IMPLEMENTATION) == (layout == "packed")
    return base


def step(base: Base, adapter: Adapter, rows: Sequence[Sequence[Example]]) -> tuple[float, dict[str, Tensor]]:
    loss = 0.0
    for batch in rows:
        part = loss_sum(base, flatten(batch, TOTAL))
        part.backward()
        loss += float(part)
    return loss, gradients(adapter)


def by_the_book(base: Base, adapter: Adapter) -> tuple[float, dict[str, Tensor]]:
    """Sum of weight x cross entropy over the sum of weights, of transformers' own logits, an example at a time."""
    losses = []
    for example in BATCH:
        logits = own_logits(base, torch.tensor([example.ids]))[0]
        at = [i for i, target in enumerate(example.targets) if target != -100]
        each = F.cross_entropy(logits[at], torch.tensor(example.targets)[at], reduction="none")
        losses.append(each @ torch.tensor(example.weights, dtype=torch.float64)[at])
    loss = torch.stack(losses).sum() / TOTAL
    loss.backward()
    return float(loss), gradients(adapter)


@pytest.mark.parametrize(("family", "layout"), LAYOUTS)
def test_any_split_gives_the_loss_and_gradients_of_the_mathematics(family: str, layout: str) -> None:
    base, adapter = adapted(family)
    in_layout(base, layout)
    loss, wanted = by_the_book(base, adapter)
    for seed in range(3):
        rng = random.Random(seed)
        order = rng.sample(BATCH, len(BATCH))
        cuts = sorted(rng.sample(range(1, len(BATCH)), seed))  # one row, two rows, three rows
        rows = [order[a:b] for a, b in zip([0, *cuts], [*cuts, len(BATCH)], strict=True)]
        ours, found = step(base, adapter, rows)
        assert ours == pytest.approx(loss, rel=LIMIT)
        assert not far_apart(found, wanted, LIMIT)


@pytest.mark.parametrize("family", MAIN)
def test_average_of_averages_is_another_loss(family: str) -> None:
    """What law 4 forbids, so that the test above can fail: each row divided by its own weight."""
    base, adapter = adapted(family, target_modules=one_linear(family))
    rows = [BATCH[:2], BATCH[2:]]
    wrong = sum(float(loss_sum(base, flatten(row, sum(e.weight for e in row)))) for row in rows) / 2
    assert abs(wrong - step(base, adapter, rows)[0]) > 1e-3


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_losses_of_single_tokens_sum_to_the_loss(family: str) -> None:
    base, _adapter = adapted(family)
    row = flatten(BATCH, TOTAL)
    losses = token_losses(base, row)
    assert losses.shape == (sum(e.n_targets for e in BATCH),)
    assert not losses.requires_grad
    assert float(losses @ row.weight_N) == pytest.approx(float(loss_sum(base, row)), rel=LIMIT)
