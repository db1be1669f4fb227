"""EVA (arXiv:2410.07170): A starts at the main directions of the inputs that its layer gets from the first examples.

    X = the layer's inputs at the labels of one row [N, I], centered;  X = U S V^T;  A = the first R rows of V^T

So the directions along which the layer's inputs vary most on this very data are those that LoRA sees first. This is
PEFT's EVA with rho = 1: every layer keeps its rank.

    T = tokens of the row, N = its labels, I = in_features, R = rank
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lorasmith.config.toml import Config
from lorasmith.i18n import _
from lorasmith.lora.layer import LoRALayer
from lorasmith.model.base import Base
from lorasmith.model.forward import hidden, padded_inputs, row_of
from lorasmith.model.row import Example
from lorasmith.report import Report

NITER, OVERSAMPLED = 4, 2  # as in PEFT: power iterations, and computed directions per needed one
SEED = 42  # of the approximate decomposition


def start_eva(base: Base, name: str, examples: Sequence[Example], config: Config, report: Report) -> None:
    """Give the new adapter `name` this start, if `config` asks for it; says which layers keep the default one."""
    if config.lora.init_lora_weights != "eva":
        return
    left = start_from_inputs(base, name, shuffled(examples, config.training.seed), config.training.row_tokens)
    if left:
        report.warn(
            _(
                "lora.init_lora_weights: the first examples have too few tokens for 'eva' in {count} layers, such as "
                "{path}; A starts at random there. Raise training.row_tokens to use more of them.",
                count=len(left),
                path=left[0],
            )
        )


@torch.no_grad()
def start_from_inputs(base: Base, name: str, examples: Sequence[Example], tokens: int) -> list[str]:
    """Set A of the new adapter `name` from the inputs of its layers on the first `examples`, up to `tokens` tokens.

    Returns the paths of layers that got fewer than R inputs, such as experts that were not chosen: A is as it was.
    """
    chosen = _first(examples, tokens)
    row = row_of(base, chosen, float(len(chosen)), name)
    total, at_N = row.tokens, row.at_N
    if base.layout == "padded":
        inputs, at_T = padded_inputs(row)
        total, at_N = inputs["input_ids"].numel(), at_T.index_select(0, at_N)
    layers = {path: base.model.get_submodule(path) for path in base.adapters[name].targets.adapted}
    started: set[str] = set()
    known: dict[int, tuple[Tensor, Tensor]] = {}  # by the identity of the input, which q, k and v share

    def record(path: str, layer: LoRALayer, x: Tensor) -> None:
        A, _B = layer.updates[name].own_matrices
        rows = x.reshape(-1, x.shape[-1])
        X_NI = rows.index_select(0, at_N) if len(rows) == total else rows  # else an expert's
        if len(X_NI) < len(A):
            return
        if id(x) not in known or len(known[id(x)][1]) < len(A):
            known[id(x)] = x, _directions(X_NI.to(A.dtype), len(A))
        A.copy_(known[id(x)][1][: len(A)])
        started.add(path)

    linear = {path: layer for path, layer in layers.items() if isinstance(layer, LoRALayer)}
    handles = [
        layer.register_forward_pre_hook(lambda module, args, path=path: record(path, module, args[0]))
        for path, layer in linear.items()
    ]
    try:
        hidden(base, row)
    finally:
        for handle in handles:
            handle.remove()
        base.router.route(None)
    return [path for path in linear if path not in started]


def shuffled(examples: Sequence[Example], seed: int) -> list[Example]:
    """The examples in random order, since files are often sorted."""
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    return [examples[i] for i in order]


def _first(examples: Sequence[Example], tokens: int) -> list[Example]:
    """As many of the first examples as have at most `tokens` tokens together; at least one."""
    chosen, total = [examples[0]], examples[0].useful_length
    for example in examples[1:]:
        total += example.useful_length
        if total > tokens:
            break
        chosen.append(example)
    return chosen


def _directions(X_NI: Tensor, r: int) -> Tensor:
    """The first r principal directions [R, I] of X, each with its largest component positive."""
    centered_NI = X_NI - X_NI.mean(0)
    with torch.random.fork_rng([X_NI.device] if X_NI.device.type == "cuda" else []):
        torch.manual_seed(SEED)
        _U, _S, V = torch.svd_lowrank(centered_NI, min(OVERSAMPLED * r, *X_NI.shape), niter=NITER)
    directions_RI = V[:, :r].t()
    largest_R1 = directions_RI.abs().argmax(dim=1, keepdim=True)
    return directions_RI * directions_RI.gather(1, largest_R1).sign()
