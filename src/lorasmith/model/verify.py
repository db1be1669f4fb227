"""Decide which fast parts run in a model: a trial step with each part is compared with the plain step before training.

A part that gives a different loss or different gradients runs its plain code, and `base.why` says which part and why.
So a model of an unknown architecture gets the results of transformers, and the speed of what is recognized in it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorasmith.errors import LIBRARY_ERRORS, ModelError, first_line
from lorasmith.i18n import _, foreign, listed
from lorasmith.lora.fused.linears import FusedLinears
from lorasmith.lora.layer import LoRALayer
from lorasmith.model.base import Base
from lorasmith.model.fast.modules import FastModule
from lorasmith.model.forward import row_of
from lorasmith.model.head import loss_sum
from lorasmith.model.row import SHARED, Example
from lorasmith.system.gc_pause import gc_paused
from lorasmith.system.memory import keep_freed_memory, release_freed_memory

# the largest relative difference of two correct steps, in the loss and in the norm of the gradients; one rounding in
# bfloat16 is 0.4%
TOLERANCE = {
    torch.float64: (1e-5, 1e-5),
    torch.float32: (1e-4, 1e-3),
    torch.bfloat16: (2e-2, 0.15),
    torch.float16: (1e-2, 0.05),
}

Result = TypeVar("Result")


def use_fast_parts(base: Base, parts: frozenset[str]) -> None:
    """Switch these parts to their fast code and all others to their plain code."""
    base.fast_parts = parts
    base.router.fused = "linear layers" in parts
    for module in base.model.modules():
        if isinstance(module, FastModule):
            module.plain = module.part not in parts


def fast_candidates(base: Base) -> frozenset[str]:
    """The parts of this model that have fast code."""
    own = {module.part for module in base.model.modules() if isinstance(module, FastModule)}
    own |= {"linear layers"} if any(isinstance(m, LoRALayer) for m in base.model.modules()) else set()
    own |= {"head"} if base.head.direct else set()
    return frozenset(own | {"attention", "prefix"} if base.layout == "packed" else own - {"rotary"})


@gc_paused()
def enable_fast_parts(base: Base, adapter: str, ids: Sequence[int]) -> None:
    """Link layers that share their input, and switch on the fast parts whose results equal those of the plain step.

    ids: tokens to try with; 16 of real text are enough. The adapter's parameters are left unchanged. Sets
    `base.saved_bytes_per_token`, and `base.why["fast"]` and `["plain"]`.
    """
    step = _trial_step(base, adapter, ids)
    with _perturbed(base, adapter):
        use_fast_parts(base, frozenset())
        wanted, candidates = link_fused_linears(base, step), fast_candidates(base)
        problems = _problem(base, step, wanted, candidates)
        if problems:
            each = {part: _problem(base, step, wanted, frozenset({part})) for part in sorted(candidates)}
            candidates = frozenset(part for part in candidates if not each[part])
            problems = "; ".join(f"{foreign(part)}: {why}" for part, why in each.items() if why) or problems
            if _problem(base, step, wanted, candidates):  # each is correct alone, but not all together
                candidates = frozenset()
                _problem(base, step, wanted, candidates)  # measures the memory of the plain step
        use_fast_parts(base, candidates)
    if base.device.type == "cpu":
        release_freed_memory()  # that the trial used
        keep_freed_memory()
    base.why["fast"] = listed(map(foreign, sorted(candidates))) or _("none")
    if problems:
        base.why["plain"] = problems


def _problem(
    base: Base, step: Callable[[], tuple[Tensor, Tensor]], wanted: tuple[Tensor, Tensor], parts: frozenset[str]
) -> str:
    """Why these parts may not run together, as a text; empty if they may."""
    use_fast_parts(base, parts)
    try:
        loss, gradient = step()
    except (ModelError, *LIBRARY_ERRORS) as error:
        return _("it fails with an error: {error}", error=first_line(error))
    plain_loss, plain_gradient = wanted
    limits = TOLERANCE[base.dtype]
    off = float((loss - plain_loss).abs() / plain_loss.abs().clamp_min(1e-30))
    turned = float((gradient - plain_gradient).norm() / plain_gradient.norm().clamp_min(1e-30))
    if off <= limits[0] and turned <= limits[1]:  # False for NaN, too
        return ""
    return _("loss differs by {off:.1e}, gradients by {turned:.1e}", off=off, turned=turned)


def _trial_step(base: Base, adapter: str, ids: Sequence[int]) -> Callable[[], tuple[Tensor, Tensor]]:
    """A function that runs a trial step and returns its loss and the adapter's gradients, as one vector."""
    parameters = list(base.adapters[adapter].trained.values())

    def step() -> tuple[Tensor, Tensor]:
        with saved_tensors(base.model) as saved:
            loss, tokens = trial_loss(base, adapter, ids)
        base.saved_bytes_per_token = sum(saved.values()) / tokens
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        return loss.detach(), torch.cat([g.flatten() for g in gradients])

    return step


def trial_loss(base: Base, adapter: str, ids: Sequence[int]) -> tuple[Tensor, int]:
    """The loss of a step on two short examples with a common prefix, and the number of tokens in its row."""
    invocation = base.adapters[adapter].config.alora_invocation_tokens or ()
    others = [i for i in ids if i not in invocation] or [min(set(range(len(invocation) + 1)).difference(invocation))]
    n, first = len(invocation), [*invocation, *(others * 16)[:16]]  # an aLoRA is active from the last occurrence on
    texts = first, [*first[: max(SHARED, n)], *reversed(first[n : n + SHARED])]
    examples = [Example(text, [*text[1:], first[n]], [1.0] * len(text), "trial") for text in texts]
    row = row_of(base, examples, float(sum(len(e.ids) for e in examples)), adapter)
    return loss_sum(base, row), row.tokens


@contextmanager
def saved_tensors(model: nn.Module) -> Iterator[dict[int, int]]:
    """Record what autograd saves for backward inside the block: bytes by storage, without the model's own weights.

    Nor the gradient of a trained head, which the loss has computed already: it does not grow with the tokens.
    """
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    constant = {p.shape for p in head.parameters() if p.requires_grad} if head is not None else set()
    found: dict[int, int] = {}

    def record(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in weights and t.shape not in constant:
            found[storage._cdata] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(record, lambda t: t):
        yield found


@contextmanager
def _perturbed(base: Base, adapter: str) -> Iterator[None]:
    """Change the adapter to look trained inside the block, without dropout: while B = 0, A has no gradient.

    All weights of the model need no change: they have been trained.
    """
    parameters = [] if base.adapters[adapter].is_whole_model else list(base.adapters[adapter].trained.values())
    saved, training = [p.detach().clone() for p in parameters], base.model.training
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in parameters:
            p.add_(0.02 * torch.randn(p.shape, generator=generator).to(p))
    base.model.eval()
    try:
        yield
    finally:
        base.model.train(training)
        with torch.no_grad():
            for p, before in zip(parameters, saved, strict=True):
                p.copy_(before)


def link_fused_linears(base: Base, forward: Callable[[], Result]) -> Result:
    """Find the LoRA layers that get the same input tensor in one `forward`, and let those compute in one pass.

    Returns the result of `forward`.
    """
    inputs: list[tuple[LoRALayer, Tensor]] = []
    layers = [module for module in base.model.modules() if isinstance(module, LoRALayer)]
    record = lambda module, args: inputs.append((module, args[0]))  # noqa: E731
    handles = [layer.register_forward_pre_hook(record) for layer in layers]
    try:
        result = forward()
    finally:
        for handle in handles:
            handle.remove()
    together: dict[tuple[int, bool], list[LoRALayer]] = {}
    for layer, x in inputs:  # `inputs` keeps the tensors alive, so that no two have the same id
        together.setdefault((id(x), getattr(layer.base_layer, "bias", None) is None), []).append(layer)
    for group in together.values():
        fused_linears = FusedLinears(base.router, group)
        fused_linears.fuse()  # one group at a time, so that each reuses the memory that the last one freed
        for layer in group:
            layer.fused_linears = fused_linears
    return result
