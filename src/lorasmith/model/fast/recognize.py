"""Find modules that a fast class can stand in for: by their structure, and by comparing the results on a random input.

Attention is recognized by its structure alone; its results are compared in a row of the model, by verify.py.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.errors import LIBRARY_ERRORS
from lorasmith.lora.biases import HALF_PRECISION
from lorasmith.lora.quantized import weight_device, weight_dtype
from lorasmith.model.fast.modules import FastAttention, FastGatedMLP, FastModule, FastRMSNorm, activated, fast_class

# the largest difference of two correct computations of a module, relative to the largest value
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}

Options = dict[str, Any]  # the attributes that a fast class needs


def recognize_modules(model: nn.Module) -> None:
    """Give every module that is recognized its fast class, if both have the same output and gradient.

    All of them still run their own forward; `verify.use_fast_parts` switches them.
    """
    found: dict[tuple[type[nn.Module], Any], Options | None] = {}  # one trial for all layers
    for module in list(model.modules()):
        for mixin, options in (
            (FastRMSNorm, _norm_options),
            (FastGatedMLP, _mlp_options),
            (FastAttention, _attention_options),
        ):
            kind, candidates = (type(module), _eps(module)), options(module)
            if candidates and kind not in found:
                found[kind] = _best(module, mixin, candidates)
            if candidates and found[kind] is not None:
                module.__class__ = fast_class(mixin, kind[0])  # type: ignore[arg-type]
                module.__dict__ |= {**found[kind], "plain": True}  # type: ignore[dict-item]


def _norm_options(module: nn.Module) -> list[Options]:
    """The variants of RMSNorm that a module may be; empty if it is something else."""
    eps, weight = _eps(module), module._parameters.get("weight")  # falcon_mamba's weight is a buffer
    if not type(module).__name__.endswith("RMSNorm") or weight is None or weight.dim() != 1 or eps is None:
        return []
    return [{"variant": (eps, offset, wide)} for offset, wide in ((0.0, False), (0.0, True), (1.0, True))]


def _eps(module: nn.Module) -> float | None:
    return getattr(module, "eps", getattr(module, "variance_epsilon", None))


def _mlp_options(module: nn.Module) -> list[Options]:
    """The activation of a gated MLP; empty if a module is something else, or has another activation."""
    children = dict(module.named_children())
    layered = "down_proj" in children and ({"gate_proj", "up_proj"} <= children.keys() or "gate_up_proj" in children)
    act = getattr(module, "act_fn", getattr(module, "activation_fn", None))
    if not layered or not callable(act):
        return []
    x = torch.linspace(-8, 8, 200)  # in float32: bfloat16 cannot tell one GELU from another
    return [{"gelu": gelu} for gelu in (False, True) if torch.allclose(act(x), activated(x, gelu), atol=1e-6)]


def _attention_options(module: nn.Module) -> list[Options]:
    """One candidate without options; empty if a module is something else."""
    names = {"q_proj", "k_proj", "v_proj", "o_proj"}
    known = names <= dict(module.named_children()).keys() and hasattr(module, "head_dim") and hasattr(module, "scaling")
    return [{}] if known else []


def _difference(module: nn.Module, mixin: type[FastModule], options: Options) -> float:
    """The largest relative difference of output and gradient from those of the module; 0 for attention."""
    if mixin is FastAttention:
        return 0.0
    original, before, like = type(module), dict(module.__dict__), _input(module)
    x = torch.linspace(-3, 3, like.numel(), dtype=torch.float64).sin().mul(2).view(like.shape).to(like)
    try:
        wanted = _output_and_gradient(module, x)
        module.__class__ = fast_class(mixin, original)  # type: ignore[arg-type]
        module.__dict__ |= options | {"plain": False}
        found = _output_and_gradient(module, x)
    except LIBRARY_ERRORS:  # its forward takes more than x
        return float("inf")
    finally:
        module.__class__ = original
        module.__dict__.clear()
        module.__dict__.update(before)
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in zip(found, wanted, strict=True))


def _best(module: nn.Module, mixin: type[FastModule], candidates: list[Options]) -> Options | None:
    """The options with the smallest difference, or None if that is above the tolerance."""
    dtype = weight_dtype(module)
    if mixin is FastRMSNorm and dtype in HALF_PRECISION:  # in half precision the variants are too similar to tell apart
        wide = copy.deepcopy(module).float()
        candidates = [one for one in candidates if _difference(wide, mixin, one) <= _TOLERANCE[torch.float32]]
    differences = ((_difference(module, mixin, one), i) for i, one in enumerate(candidates))
    smallest, index = min(differences, default=(float("inf"), 0))
    return candidates[index] if smallest <= _TOLERANCE[dtype] else None


def _input(module: nn.Module) -> Tensor:
    """A tensor [1, 4, H] of the shape, dtype and device of a norm's or MLP's input."""
    first = next((m for m in module.modules() if isinstance(m, nn.Linear)), None)
    width = next(module.parameters()).shape[-1] if first is None else first.in_features
    return torch.empty(1, 4, width, dtype=weight_dtype(module), device=weight_device(module))


def _output_and_gradient(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_(True)
    with torch.enable_grad():
        y = module(leaf)
        direction = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=torch.float64).view(y.shape).to(y.dtype)
        return y.detach(), torch.autograd.grad((y * direction).sum(), leaf)[0]
