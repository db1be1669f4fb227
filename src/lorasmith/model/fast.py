"""Modules of a recognised structure with forward and backward by hand: fewer passes over memory, less kept.

    T = tokens, H = width, I = intermediate width, D = head size

A module takes such a class beside its own (as FSDP's fully_shard does), so that names, weights and children stay; its
own forward remains the plain path, which runs where `plain` is set. See verify.py, which decides.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorasmith.lora.siblings import can_be_made_again
from lorasmith.model.attention import SEEN, attend


class Fast(nn.Module):
    """What the classes below have in common."""

    part: str
    plain: bool

    def layer(self, name: str, x: Tensor) -> Tensor:
        """The child `name` of x."""
        y: Tensor = getattr(self, name)(x)
        return y


class FastRMSNorm(Fast):
    """x / sqrt(mean(x^2) + eps) * w (arXiv:1910.07467)."""

    part = "norms"
    variant: tuple[float, float, bool]  # eps; what is added to w; whether w is multiplied before the cast down

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """x [..., H] -> [..., H]."""
        weight: nn.Parameter = self.weight  # type: ignore[assignment]
        if self.plain or weight.requires_grad or len(args) != 1 or kwargs:
            return super().forward(*args, **kwargs)
        (x,) = args
        eps, offset, wide = self.variant
        w = weight.to(torch.promote_types(x.dtype, torch.float32)) + offset if wide else weight
        y, r = _RMSNorm.apply(x, w, eps, wide)  # type: ignore[no-untyped-call]
        can_be_made_again(y, lambda: _normed(x, r, w, wide))
        return y


class FastGatedMLP(Fast):
    """down(act(gate(x)) * up(x)) (arXiv:2002.05202), gate and up as two layers or as one."""

    part = "MLPs"
    gelu: bool  # the activation: GELU by tanh, or SiLU

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """x [..., H] -> [..., H]."""
        if self.plain or len(args) != 1 or kwargs:
            return super().forward(*args, **kwargs)
        (x,) = args
        if hasattr(self, "gate_up_proj"):
            gate, up = self.layer("gate_up_proj", x).chunk(2, -1)
        else:
            gate, up = self.layer("gate_proj", x), self.layer("up_proj", x)
        out: Tensor = _Gated.apply(gate, up, self.gelu)  # type: ignore[no-untyped-call]
        can_be_made_again(out, lambda: activated(gate, self.gelu).mul_(up))
        return self.layer("down_proj", out)


class FastAttention(Fast):
    """Attention with rotary embedding (arXiv:2104.09864) in a packed row; elsewhere its own forward.

    Scaling and window are those that its own forward was seen to ask for.
    """

    part = "rotary"
    head_dim: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """hidden_states [1, T, H] -> ([1, T, H], None)."""
        how, rotation = self.__dict__.get(SEEN), kwargs.get("position_embeddings")
        unusual = args or not {"hidden_states", "row"} <= kwargs.keys()
        if self.plain or how is None or rotation is None or unusual:
            return super().forward(*args, **kwargs)
        del kwargs["position_embeddings"]
        x = kwargs.pop("hidden_states")
        shape = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = (self.layer(name, x).view(shape) for name in ("q_proj", "k_proj", "v_proj"))
        if hasattr(self, "q_norm"):
            q, k = self._normed("q_norm", q), self._normed("k_norm", k)
        if getattr(self, "use_rope", True):
            q, k = (_Rotary.apply(t, *rotation) for t in (q, k))  # type: ignore[no-untyped-call]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out, _none = attend(self, q, k, v, kwargs.pop("attention_mask", None), **how, **kwargs)
        return self.layer("o_proj", out.flatten(2)), None

    def _normed(self, name: str, x: Tensor) -> Tensor:
        """Each head by itself (Qwen3), or all of them together (OLMo 2)."""
        each = getattr(self, name).weight.shape[-1] == self.head_dim
        return self.layer(name, x) if each else self.layer(name, x.flatten(2)).view(x.shape)


@cache
def fast_class(mixin: type[Fast], original: type[nn.Module]) -> type[nn.Module]:
    """`original` with the mixin before it."""
    return type(f"Fast{original.__name__}", (mixin, original), {})


class _RMSNorm(torch.autograd.Function):
    """In float32 inside; keeps x and one number a token. The weight is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, eps: float, wide: bool) -> tuple[Tensor, Tensor]:
        """x [..., H] -> the same, normed, and r = 1 / sqrt(mean(x^2) + eps) [..., 1]."""
        n = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
        r = torch.linalg.vector_norm(n, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, r, w)
        ctx.mark_non_differentiable(r)
        return _weighted(n.mul_(r), w, x.dtype, wide), r

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, _dr: Tensor) -> tuple[Tensor | None, ...]:
        """dx = r (g - n mean(g n)), where g = dy w and n = r x."""
        x, r, w = ctx.saved_tensors
        g, n = dy.to(r.dtype, copy=True).mul_(w), x.to(r.dtype, copy=True).mul_(r)
        inner = (g * n).mean(-1, keepdim=True)
        return g.addcmul_(n, inner, value=-1).mul_(r).to(x.dtype), None, None, None


@torch.no_grad()
def _normed(x: Tensor, r: Tensor, w: Tensor, wide: bool) -> Tensor:
    return _weighted(x.to(r.dtype, copy=True).mul_(r), w, x.dtype, wide)


def _weighted(n: Tensor, w: Tensor, dtype: torch.dtype, wide: bool) -> Tensor:
    return n.mul_(w).to(dtype) if wide else n.to(dtype).mul_(w)


class _Gated(torch.autograd.Function):
    """act(gate) * up; keeps its two inputs and nothing else."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
        """Two tensors [..., I] -> [..., I]."""
        ctx.save_for_backward(gate, up)
        ctx.gelu = gelu
        return activated(gate, gelu).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        """Both gradients in one buffer, as the layers before want them."""
        gate, up = ctx.saved_tensors
        d_gate, d_up = d_out.new_empty(*gate.shape[:-1], 2 * gate.shape[-1]).chunk(2, -1)
        act = activated(gate, ctx.gelu)
        torch.mul(act, d_out, out=d_up)
        d_act = torch.mul(up, d_out, out=act)
        if ctx.gelu:
            torch.ops.aten.gelu_backward.grad_input(d_act, gate, approximate="tanh", grad_input=d_gate)
        else:
            torch.ops.aten.silu_backward.grad_input(d_act, gate, grad_input=d_gate)
        return d_gate, d_up, None


@torch.no_grad()
def activated(gate: Tensor, gelu: bool) -> Tensor:
    """GELU by tanh, or SiLU."""
    return F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)


class _Rotary(torch.autograd.Function):
    """x cos + rotate_half(x) sin, where rotate_half([a, b]) = [-b, a]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [1, T, heads, D], cos and sin [1, T, D]."""
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The same with the halves of sin exchanged and the other sign: the transposed map."""
        cos, sin = ctx.saved_tensors
        return _rotated(dy, cos, sin.roll(sin.shape[-1] // 2, -1), 1), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    half = x.shape[-1] // 2
    c, s = cos.unsqueeze(2), sin.unsqueeze(2)
    out = x * c
    out[..., :half].addcmul_(x[..., half:], s[..., :half], value=sign)
    out[..., half:].addcmul_(x[..., :half], s[..., half:], value=-sign)
    return out.to(x.dtype)  # cos and sin may be wider
