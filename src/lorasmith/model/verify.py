"""Which fast parts run in this very model: each is compared with the plain path before anything is trained.

A part whose numbers differ runs plainly, and `base.why` says which and why. So an architecture that nobody has seen is
as right as transformers has it, and as fast as what could be recognised in it.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lorasmith.errors import LIBRARY_ERRORS, ModelError, first_line
from lorasmith.i18n import _, foreign, listed
from lorasmith.lora.fused.linears import FusedLinears
from lorasmith.lora.inject import HALF_PRECISION
from lorasmith.lora.layer import LoRALayer
from lorasmith.model.base import Base
from lorasmith.model.fast import Fast, FastAttention, FastGatedMLP, FastRMSNorm, activated, fast_class
from lorasmith.model.forward import row_of
from lorasmith.model.head import loss_sum
from lorasmith.model.kept import counted
from lorasmith.model.row import SHARED, Example
from lorasmith.system.gc_pause import gc_paused
from lorasmith.system.memory import keep_freed_memory, release_freed_memory

# two right ways of computing one module: the largest difference, relative to the largest value
_MODULE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
# two right ways of computing a step: the loss, and the gradients in norm; each rounding in bfloat16 is 0.4%
_STEP = {
    torch.float64: (1e-5, 1e-5),
    torch.float32: (1e-4, 1e-3),
    torch.bfloat16: (2e-2, 0.15),
    torch.float16: (1e-2, 0.05),
}

Result = TypeVar("Result")
Known = dict[tuple[type[nn.Module], Any], dict[str, Any] | None]


def recognise(model: nn.Module) -> None:
    """Give modules of a known structure their fast class where a random input finds it equal; all stay plain so far."""
    known: Known = {}
    for module in list(model.modules()):
        for mixin, options in ((FastRMSNorm, _norm), (FastGatedMLP, _mlp), (FastAttention, _attention)):
            kind, tries = (type(module), _eps(module)), options(module)
            if tries and kind not in known:
                known[kind] = _best(module, mixin, tries)
            if tries and known[kind] is not None:
                module.__class__ = fast_class(mixin, kind[0])  # type: ignore[arg-type]
                module.__dict__ |= {**known[kind], "plain": True}  # type: ignore[dict-item]


def _norm(module: nn.Module) -> list[dict[str, Any]]:
    """The variants of RMSNorm that this may be; none where it is something else."""
    eps, weight = _eps(module), getattr(module, "weight", None)
    is_norm = type(module).__name__.endswith("RMSNorm") and isinstance(weight, nn.Parameter) and weight.dim() == 1
    if not is_norm or eps is None:  # falcon_mamba's weight is a buffer
        return []
    return [{"variant": (eps, offset, wide)} for offset, wide in ((0.0, False), (0.0, True), (1.0, True))]


def _eps(module: nn.Module) -> float | None:
    return getattr(module, "eps", getattr(module, "variance_epsilon", None))


def _mlp(module: nn.Module) -> list[dict[str, Any]]:
    children = dict(module.named_children())
    layered = "down_proj" in children and ({"gate_proj", "up_proj"} <= children.keys() or "gate_up_proj" in children)
    act = getattr(module, "act_fn", getattr(module, "activation_fn", None))
    if not layered or not callable(act):
        return []
    x = torch.linspace(-8, 8, 200)  # in float32: bfloat16 cannot tell one GELU from another
    return [{"gelu": gelu} for gelu in (False, True) if torch.allclose(act(x), activated(x, gelu), atol=1e-6)]


def _attention(module: nn.Module) -> list[dict[str, Any]]:
    names = {"q_proj", "k_proj", "v_proj", "o_proj"}
    known = names <= dict(module.named_children()).keys() and hasattr(module, "head_dim") and hasattr(module, "scaling")
    return [{}] if known else []


def _difference(module: nn.Module, mixin: type[Fast], options: dict[str, Any]) -> float:
    """How far the fast class is from the module, forward and backward. Attention is tried in a row later."""
    if mixin is FastAttention:
        return 0.0
    original, before, p = type(module), dict(module.__dict__), next(module.parameters())
    x = torch.linspace(-3, 3, 4 * p.shape[-1], dtype=torch.float64).sin().mul(2).view(1, 4, -1).to(p.device, p.dtype)
    try:
        wanted = _output_and_gradient(module, x)
        module.__class__ = fast_class(mixin, original)  # type: ignore[arg-type]
        module.__dict__ |= options | {"plain": False}
        found = _output_and_gradient(module, x)
    except LIBRARY_ERRORS:  # it wants more than x
        return float("inf")
    finally:
        module.__class__ = original
        module.__dict__.clear()
        module.__dict__.update(before)
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in zip(found, wanted, strict=True))


def _best(module: nn.Module, mixin: type[Fast], tries: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The options with which the fast class is nearest, where that is near enough."""
    dtype = next(module.parameters()).dtype
    if mixin is FastRMSNorm and dtype in HALF_PRECISION:  # small enough to look closely
        wide = copy.deepcopy(module).float()
        tries = [options for options in tries if _difference(wide, mixin, options) <= _MODULE[torch.float32]]
    off, number = min(((_difference(module, mixin, o), i) for i, o in enumerate(tries)), default=(float("inf"), 0))
    return tries[number] if off <= _MODULE[dtype] else None


def _output_and_gradient(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_(True)
    with torch.enable_grad():
        y = module(leaf)
        direction = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=torch.float64).view(y.shape).to(y.dtype)
        return y.detach(), torch.autograd.grad((y * direction).sum(), leaf)[0]


def use(base: Base, parts: frozenset[str]) -> None:
    """Run `parts` fast and the rest plainly."""
    base.fast = parts
    base.router.fused = "linear layers" in parts
    for module in base.model.modules():
        if isinstance(module, Fast):
            module.plain = module.part not in parts


def parts_of(base: Base) -> frozenset[str]:
    """What could run fast in this model."""
    own = {module.part for module in base.model.modules() if isinstance(module, Fast)}
    own |= {"linear layers"} if any(isinstance(m, LoRALayer) for m in base.model.modules()) else set()
    own |= {"head"} if base.head.direct else set()
    return frozenset(own | {"attention", "prefix"} if base.layout == "packed" else own - {"rotary"})


@gc_paused()
def speed_up(base: Base, adapter: str, ids: Sequence[int]) -> None:
    """Before a training: link layers that share their input, and run fast what gives the plain step's numbers.

    ids: tokens to try with, 16 of real text if possible. The adapter's parameters are as before afterwards.
    """
    step = _step_of(base, adapter, ids)
    with _stirred(base, adapter):
        use(base, frozenset())
        wanted, candidates = link_fused_linears(base, step), parts_of(base)
        problems = _problems(base, step, wanted, candidates)
        if problems:
            each = {part: _problems(base, step, wanted, frozenset({part})) for part in sorted(candidates)}
            candidates = frozenset(part for part in candidates if not each[part])
            problems = "; ".join(f"{foreign(part)}: {why}" for part, why in each.items() if why) or problems
            if _problems(base, step, wanted, candidates):  # each alone is right, and not all together
                candidates = frozenset()
                _problems(base, step, wanted, candidates)  # for what it keeps
        use(base, candidates)
    if base.device.type == "cpu":
        release_freed_memory()  # of the trial
        keep_freed_memory()
    base.why["fast"] = listed(map(foreign, sorted(candidates))) or _("none")
    if problems:
        base.why["plain"] = problems


def _problems(
    base: Base, step: Callable[[], tuple[Tensor, Tensor]], wanted: tuple[Tensor, Tensor], parts: frozenset[str]
) -> str:
    """Why `parts` may not run, or an empty text."""
    use(base, parts)
    try:
        loss, gradient = step()
    except (ModelError, *LIBRARY_ERRORS) as error:
        return _("it fails with an error: {error}", error=first_line(error))
    right, right_gradient = wanted
    limits = _STEP[base.dtype]
    off = float((loss - right).abs() / right.abs().clamp_min(1e-30))
    turned = float((gradient - right_gradient).norm() / right_gradient.norm().clamp_min(1e-30))
    if off <= limits[0] and turned <= limits[1]:  # false for NaN, too
        return ""
    return _("loss differs by {off:.1e}, gradients by {turned:.1e}", off=off, turned=turned)


def _step_of(base: Base, adapter: str, ids: Sequence[int]) -> Callable[[], tuple[Tensor, Tensor]]:
    """A trial step: its loss, and all gradients of the adapter as one vector."""
    parameters = list(base.adapters[adapter].parameters.values())

    def step() -> tuple[Tensor, Tensor]:
        with counted(base.model) as kept:
            loss, tokens = trial_loss(base, adapter, ids)
        base.kept_per_token = sum(kept.values()) / tokens
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        return loss.detach(), torch.cat([g.flatten() for g in gradients])

    return step


def trial_loss(base: Base, adapter: str, ids: Sequence[int]) -> tuple[Tensor, int]:
    """The loss of a step on two short examples that begin alike, and the tokens of its row."""
    begin = (list(ids) * 16)[:16]
    texts = begin, [*begin[:SHARED], *reversed(begin[:SHARED])]
    examples = [Example(text, [*text[1:], text[0]], [1.0] * len(text), "trial") for text in texts]
    row = row_of(base, examples, float(sum(len(e.ids) for e in examples)), adapter)
    return loss_sum(base, row), row.tokens


@contextmanager
def _stirred(base: Base, adapter: str) -> Iterator[None]:
    """Within it the adapter is one that was trained, without dropout: at B = 0 half of its gradients would be zero."""
    parameters = list(base.adapters[adapter].parameters.values())
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
    """Find out, in one forward, which LoRA layers get the same tensor, and let those compute in one pass."""
    inputs: list[tuple[LoRALayer, Tensor]] = []
    layers = [module for module in base.model.modules() if isinstance(module, LoRALayer)]
    note = lambda module, args: inputs.append((module, args[0]))  # noqa: E731
    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        result = forward()
    finally:
        for handle in handles:
            handle.remove()
    together: dict[tuple[int, bool], list[LoRALayer]] = {}
    for layer, x in inputs:  # `inputs` keeps the tensors, so that an id is one of them
        together.setdefault((id(x), getattr(layer.base_layer, "bias", None) is None), []).append(layer)
    for group in together.values():
        fused_linears = FusedLinears(base.router, group)
        fused_linears.fuse()  # now, so that what the old weights leave free is taken by the next ones
        for layer in group:
            layer.fused_linears = fused_linears
    return result
