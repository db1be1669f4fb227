"""Where a step's time goes: every operator of torch's profile belongs to one part, and the parts sum to the wall time.

An operator belongs to the nearest range around it that has a name here (an autograd function, an optimizer's step).
"""

from collections.abc import Iterable
from typing import Any

BASE, ADAPTER, ATTENTION = "base products", "adapter products", "attention"
ELEMENT, HEAD, OPTIMIZER, REST = "norms, rotary, SwiGLU", "head", "optimizer", "rest"
PARTS = (BASE, ADAPTER, ATTENTION, ELEMENT, HEAD, OPTIMIZER, REST)

BOTH, MLP = "base and adapter", "an MLP"  # told apart by shape; and what is no product in an MLP is SwiGLU
# How a range's name begins, leading underscores left out; "...Backward" is covered by the function's own name.
NAMES = {
    "LowRank": ADAPTER,
    "AdaptedLinear": BOTH,
    "QuantizedProduct": BASE,
    "ByHand": ATTENTION,
    "aten::bmm": ATTENTION,
    "aten::baddbmm": ATTENTION,
    "aten::scaled_dot_product": ATTENTION,
    "aten::_scaled_dot_product": ATTENTION,
    "ScaledDotProduct": ATTENTION,
    "RMSNorm": ELEMENT,
    "GatedMLP": MLP,
    "Gated": ELEMENT,
    "Rotary": ELEMENT,
    "ChunkedLoss": HEAD,
    "FrozenHead": HEAD,
    "Optimizer.step": OPTIMIZER,
    "torch::autograd::AccumulateGrad": OPTIMIZER,  # gradients meet in the flat buffer
}
PRODUCTS = ("aten::linear", "aten::mm", "aten::addmm", "aten::addmm_", "aten::matmul")
STACKED = 3  # thin products that may stand as one: of q, k and v


def parts_of(events: Iterable[Any], seconds: float, rank: int, trained: int) -> dict[str, float]:
    """Seconds of each part. events: of a torch profile with shapes; seconds: the wall time that they lie in.

    rank: the adapter's r; trained: how many numbers are learned. Python between the operators is `rest`.
    """
    found = dict.fromkeys(PARTS, 0.0)
    for event in events:
        found[part_of(event, rank, trained)] += event.self_cpu_time_total / 1e6
    found[REST] = seconds - sum(time for part, time in found.items() if part != REST)
    return found


def part_of(event: Any, rank: int, trained: int) -> str:
    """The part of one event; see `NAMES`."""
    product, around = None, event
    while around is not None:
        part = _named(around.name)
        if part == MLP and product is None and event.name not in PRODUCTS:
            return ELEMENT
        if part in (BOTH, MLP):
            return ADAPTER if _is_thin(product or event, rank) else BASE
        if part is not None:
            return part
        if product is None and around.name in PRODUCTS:
            product = around
        around = around.cpu_parent
    if product is not None:
        return ADAPTER if _is_thin(product, rank) else BASE
    if any(len(shape) == 1 and shape[0] >= trained for shape in event.input_shapes or ()):
        return OPTIMIZER  # zeroing, norm and clipping of the one flat buffer
    return ELEMENT if event.name.startswith("aten::") else REST


def _named(name: str) -> str | None:
    bare = name.lstrip("_")
    return next((part for begin, part in NAMES.items() if bare.startswith(begin)), None)


def _is_thin(event: Any, rank: int) -> bool:
    """Whether a product's smallest side is the rank, or the stacked ranks of layers that share their input."""
    sides = [side for shape in event.input_shapes or () if len(shape) > 1 for side in shape[-2:]]
    return bool(sides) and min(sides) <= STACKED * rank
