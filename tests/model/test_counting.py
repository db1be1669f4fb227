"""What a step costs, counted: no clock, so that a change that makes it slower shows on any machine.

The numbers are those of a tiny llama of two layers and four examples of twelve tokens. One that falls is good news and
is written down here; one that grows needs a reason.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from lorasmith.config.lora import LoraConfig
from lorasmith.lora.inject import inject
from lorasmith.model.base import Base
from lorasmith.model.fast.recognize import recognize_modules
from lorasmith.model.head import loss_sum, token_losses
from lorasmith.model.probe import probe
from lorasmith.model.row import Example, Row, flatten
from lorasmith.model.verify import enable_fast_parts, fast_candidates, use_fast_parts
from tests.support.families import CONFIGS, example, one_row
from tests.support.fast_base import IDS, PLAIN

H, HEADS, KV_HEADS, D, M, V = 64, 4, 2, 16, 160, 99  # widths: hidden, a head, MLP, words
Q, KV = HEADS * D, KV_HEADS * D
WIDE = {"hidden_size": H, "intermediate_size": M, "head_dim": D}
R, T, N = 4, 48, 24  # rank, tokens, labels
PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm")


def half_learned(seed: int) -> Example:
    """Twelve tokens, the last six of which are learned."""
    made = example(12, seed, learned=1)
    return replace(made, targets=[-100] * 6 + made.targets[6:])


ROW = one_row([half_learned(seed) for seed in range(4)])


@dataclass
class Cost:
    """Of one forward and backward."""

    products: Counter[tuple[int, ...]] = field(default_factory=Counter)  # by rows, inner width, columns
    made: int = 0  # bytes of all new tensors
    saved: int = 0  # bytes that backward needs, the frozen weights left out
    nodes: int = 0  # of autograd


class Kernels(TorchDispatchMode):
    """Notes every product of matrices, and the bytes of every new tensor."""

    def __init__(self, cost: Cost) -> None:
        super().__init__()
        self.cost = cost

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        known = {t.untyped_storage().data_ptr() for t in given}
        new = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in known]
        self.cost.made += sum(t.untyped_storage().nbytes() for t in new)
        if func.overloadpacket.__name__ in PRODUCTS:
            a, b = [t for t in args if isinstance(t, Tensor)][-2:]
            self.cost.products[(*a.shape, b.shape[-1])] += 1
        return out


@contextmanager
def saved_bytes(base: Base, cost: Cost) -> Iterator[None]:
    """Adds up the buffers that tensors saved for backward lie in, each once."""
    weights = {p.untyped_storage().data_ptr() for p in base.model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # holds them, so that no address is used twice

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        yield
    cost.saved = sum(storage.nbytes() for storage in kept.values())


def nodes(loss: Tensor) -> int:
    """How many functions backward calls."""
    seen, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _index in node.next_functions]
    return len(seen)


def cost_of(base: Base, parts: frozenset[str], row: Row = ROW) -> Cost:
    """One step with these parts fast."""
    use_fast_parts(base, parts)
    cost = Cost()
    with Kernels(cost):
        with saved_bytes(base, cost):
            loss = loss_sum(base, row)
        cost.nodes = nodes(loss)
        loss.backward()
    return cost


def wide_base(dtype: torch.dtype) -> Base:
    """A llama whose widths are to each other as in a real one, its fast parts linked and switched on."""
    config = LlamaConfig(**CONFIGS["llama"] | WIDE)
    model = LlamaForCausalLM(config).to(dtype).requires_grad_(False).train()
    base = Base(model, None, "llama", Path(), dtype, torch.device("cpu"))  # type: ignore[arg-type]
    recognize_modules(model)
    probe(base)
    base.adapters["default"] = inject(model, LoraConfig(r=R), base.router)
    enable_fast_parts(base, "default", IDS)
    return base


@pytest.fixture(scope="module")
def costs() -> dict[torch.dtype, tuple[Cost, Cost]]:
    """Fast and plain, of the same step."""
    bases = {dtype: wide_base(dtype) for dtype in (torch.float32, torch.bfloat16)}
    return {dtype: (cost_of(base, fast_candidates(base)), cost_of(base, PLAIN)) for dtype, base in bases.items()}


def adapted_products(inputs: int, widths: tuple[int, ...], below: bool = True) -> Counter[tuple[int, ...]]:
    """Of linear layers with one input: W once forward and once backward (where something below is trained)."""
    O, K = sum(widths), R * len(widths)
    products = [(T, inputs, O), (T, inputs, K), (T, K, O)]  # y, and its update
    products += [(T, O, K), (K, T, inputs), (K, T, O)]  # dh, dA, dB
    products += [(T, K, inputs), *((T, width, inputs) for width in widths)] if below else []  # dx
    return Counter(products)


def attention_products() -> Counter[tuple[int, ...]]:
    """S and O forward; S, dP, dQ, dK, dV backward: heads of a key head together, rows and keys filled up to 16, 32."""
    pieces, queries, keys = 4 * KV_HEADS, 16 * HEADS // KV_HEADS, 32
    assert queries == keys, "so that a transposed one has the same shape"
    return Counter({(pieces, queries, D, keys): 3, (pieces, queries, keys, D): 4})


def test_the_products_of_a_fast_step(costs: dict[torch.dtype, tuple[Cost, Cost]]) -> None:
    """Each is unavoidable, or as thin as the ranks. One more means that something is computed twice."""
    wanted = Counter({(N, H, V): 1, (N, V, H): 1})  # the head, only at labels
    for below in (False, True):  # nothing is trained below the first layer's q, k and v
        wanted += adapted_products(H, (Q, KV, KV), below) + adapted_products(Q, (H,))
        wanted += adapted_products(H, (M, M)) + adapted_products(M, (H,)) + attention_products()
        wanted += Counter([(T, H, 2 * M), (T, H, 2 * R), (T, 2 * R, 2 * M)])  # gate and up again, for backward
    for fast, _plain in costs.values():
        assert fast.products == wanted
    assert wanted.total() == 88


def test_the_products_of_a_plain_step(costs: dict[torch.dtype, tuple[Cost, Cost]]) -> None:
    """Seven linear layers of eight products, less dx of the lowest three, and the head; torch's own attention."""
    for _fast, plain in costs.values():
        assert plain.products.total() == 2 * 7 * 8 - 3 * 2 + 2 == 108


def test_no_gradient_of_a_frozen_weight_is_formed(costs: dict[torch.dtype, tuple[Cost, Cost]]) -> None:
    """It would be a product over all tokens that is wide on both sides."""
    for both in costs.values():
        over_tokens = [shape for cost in both for shape in cost.products if len(shape) == 3 and shape[1] == T]
        assert over_tokens
        assert all(min(rows, columns) <= 3 * R for rows, _tokens, columns in over_tokens)


def test_backward_keeps_less(costs: dict[torch.dtype, tuple[Cost, Cost]]) -> None:
    """Bytes a token, the frozen weights left out. Growing means that something is kept that could be computed again."""
    (fast, plain), (fast_half, plain_half) = costs[torch.float32], costs[torch.bfloat16]
    assert fast.saved / T <= 3267
    assert fast_half.saved / T <= 1646
    assert fast.saved < 0.28 * plain.saved
    assert fast_half.saved < 0.24 * plain_half.saved, "the plain norms keep float32"


def test_fewer_tensors_are_made(costs: dict[torch.dtype, tuple[Cost, Cost]]) -> None:
    """Bytes a token of all tensors made in a step: each is a pass over memory."""
    (fast, plain), (fast_half, plain_half) = costs[torch.float32], costs[torch.bfloat16]
    assert fast.made < 0.89 * plain.made
    assert fast_half.made < 0.89 * plain_half.made


def test_the_graph_is_small(costs: dict[torch.dtype, tuple[Cost, Cost]]) -> None:
    """Functions that backward calls, from Python one after the other."""
    for fast, plain in costs.values():
        assert fast.nodes <= 79
        assert fast.nodes < 0.4 * plain.nodes


def begun_alike() -> list[Example]:
    """Eight examples of 24 tokens, of which they begin with the same 16, and learn the last four."""
    begin, silent = example(16, 0), [-100] * 20
    made = []
    for seed in range(8):
        own = example(8, seed + 1, learned=1)
        targets = silent + own.targets[4:]
        made.append(Example(begin.ids + own.ids, targets, [1.0] * 24, own.source))
    return made


def test_what_is_shared_is_computed_once() -> None:
    base, shared, whole = wide_base(torch.float32), *(flatten(begun_alike(), 32.0, share=s) for s in (True, False))
    assert (shared.tokens, whole.tokens) == (16 + 8 * 8, 8 * 24)
    for row in (shared, whole):
        use_fast_parts(base, fast_candidates(base))
        products = cost_of(base, base.fast_parts, row).products
        rows = {shape[0] for shape in products if len(shape) == 3 and shape[0] > 4 * R}
        assert rows == {row.tokens, 32}, "all products have the row's tokens, and the head its labels"


def test_a_second_step_costs_what_the_first_did() -> None:
    base = wide_base(torch.float32)
    first, second = cost_of(base, base.fast_parts), cost_of(base, base.fast_parts)
    assert (first.products, first.saved, first.nodes) == (second.products, second.saved, second.nodes)


def test_evaluation_makes_no_graph() -> None:
    base = wide_base(torch.float32)
    cost = Cost()
    with saved_bytes(base, cost), Kernels(cost):
        token_losses(base, ROW)
    assert cost.saved == 0
    forward = 2 * 4 * 3 + 2 * 2 + 1  # four groups of linear layers and attention in each layer, and the head
    assert cost.products.total() == forward
