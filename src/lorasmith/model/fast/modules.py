"""Fast classes for RMSNorm, gated MLP and attention, with hand-written forward and backward passes.

They read memory fewer times and save less for backward. A recognized module gets a class that derives from a fast class
and its own (as with FSDP's fully_shard), so names, weights and children stay. Where `plain` is set, the module's own
forward runs. recognize.py finds the modules, verify.py sets `plain`.

    T = tokens, H = hidden size, I = intermediate size, D = head size
"""

from collections.abc import Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorasmith.lora.fused.bank import BankedLinears
from lorasmith.lora.fused.linears import FusedWeights, Recompute, mark_recomputable, recompute_of
from lorasmith.lora.layer import LoRALayer
from lorasmith.model.attention import RemembersOptions, attend

if TYPE_CHECKING:
    from lorasmith.model.fast.decoder import FastDecoder


class FastModule(nn.Module):
    """Base of the fast classes."""

    part: str  # the name in `base.fast_parts`
    plain: bool  # run the module's own forward
    decoder: "FastDecoder | None" = None  # while it is on, the engine runs, without gradients
    banked: Sequence[BankedLinears] = ()  # this module's layers in the adapter bank of `decoder`

    def __getstate__(self) -> dict[str, Any]:
        """The state without the decoder: a copy does not belong to it, and would copy all of its weights."""
        return {key: value for key, value in self.__dict__.items() if key not in ("decoder", "banked")}

    @property
    def infers(self) -> bool:
        """Whether the engine runs this call."""
        return self.decoder is not None and self.decoder.is_on

    def layer(self, name: str, x: Tensor) -> Tensor:
        """The output of the child `name`."""
        y: Tensor = getattr(self, name)(x)
        return y


class FastRMSNorm(FastModule):
    """x / sqrt(mean(x^2) + eps) * w (RMSNorm, arXiv:1910.07467, section 3)."""

    part = "norms"
    variant: tuple[float, float, bool]  # eps; an offset added to w; whether to multiply by w before the cast down

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """x [..., H] -> [..., H]."""
        weight: nn.Parameter = self.weight  # type: ignore[assignment]
        if self.plain or weight.requires_grad or len(args) != 1 or kwargs:
            return super().forward(*args, **kwargs)
        (x,) = args
        eps, offset, wide = self.variant
        w = weight.to(torch.promote_types(x.dtype, torch.float32)) + offset if wide else weight
        y, r = _RMSNorm.apply(x, w, eps, wide)  # type: ignore[no-untyped-call]
        mark_recomputable(y, partial(_normed, w=w, wide=wide), x, r)
        return y


class FastGatedMLP(FastModule):
    """down(act(gate(x)) * up(x)) (GLU variants, arXiv:2002.05202, section 2), with gate and up as two layers or one.

    If all layers have plain LoRA, gate and up are recomputed in backward, since they are more than half of what a
    decoder layer would save.
    """

    part = "MLPs"
    gelu: bool  # the activation: GELU (tanh approximation) if True, else SiLU

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """x [..., H] -> [..., H]."""
        if self.infers and self.banked and len(args) == 1 and not kwargs:
            gate, up = self.banked[0](args[0].flatten(0, -2)).chunk(2, -1)
            return self.banked[1](gated(gate, up, self.gelu)).view(args[0].shape)
        if self.plain or len(args) != 1 or kwargs:
            return super().forward(*args, **kwargs)
        (x,) = args
        first = ("gate_up_proj",) if hasattr(self, "gate_up_proj") else ("gate_proj", "up_proj")
        wide, down = self._fused(first, x), self._fused(("down_proj",), x)
        if wide and down:
            AB = *wide[1], *down[1]
            return _GatedMLP.apply(x, recompute_of(x), self.gelu, wide[0], down[0], *AB)  # type: ignore[no-untyped-call]
        parts = [self.layer(name, x) for name in first]
        gate, up = parts if len(parts) == 2 else parts[0].chunk(2, -1)
        out: Tensor = _Gated.apply(gate, up, self.gelu)  # type: ignore[no-untyped-call]
        mark_recomputable(out, partial(gated, gelu=self.gelu), gate, up)
        return self.layer("down_proj", out)

    def _fused(self, names: Sequence[str], x: Tensor) -> tuple[FusedWeights, list[Tensor]] | None:
        """The layers as one product and their LoRA matrices, or None if one pass is not possible for this x."""
        layers = [getattr(self, name) for name in names]
        together = isinstance(layers[0], LoRALayer) and layers[0].fused_linears.layers == layers
        return layers[0].fused_linears.weights_for(x) if together and not any(map(_is_watched, layers)) else None


class FastAttention(FastModule, RemembersOptions):
    """Attention with rotary position embedding (RoPE, arXiv:2104.09864, section 3.2) in a packed row.

    Padded input takes the module's own forward. Scaling and window are those that its own forward used before.
    """

    part = "rotary"
    head_dim: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """hidden_states [1, T, H] -> ([1, T, H], None)."""
        how, rotation = self.attention_options, kwargs.get("position_embeddings")
        unusual = args or not {"hidden_states", "row"} <= kwargs.keys()
        if self.infers and self.banked and not unusual and how is not None and rotation is not None:
            return self._infer(how, **kwargs)
        if self.plain or how is None or rotation is None or unusual:
            return super().forward(*args, **kwargs)
        del kwargs["position_embeddings"]
        x = kwargs.pop("hidden_states")
        shape = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = (self.layer(name, x).view(shape) for name in ("q_proj", "k_proj", "v_proj"))
        if hasattr(self, "q_norm"):
            q, k = self._normed("q_norm", q), self._normed("k_norm", k)
        if getattr(self, "use_rope", True):
            if any(_is_watched(child) for child in self.children()):
                q, k = q.clone(), k.clone()
            q, k = (_Rotary.apply(t, *rotation) for t in (q, k))  # type: ignore[no-untyped-call]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out, _none = attend(self, q, k, v, kwargs.pop("attention_mask", None), **how, **kwargs)
        return self.layer("o_proj", out.flatten(2)), None

    def _infer(
        self, how: dict[str, Any], hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any
    ) -> tuple[Tensor, None]:
        """The same without gradient. q and k are rotated in one pass unless they are normed first."""
        assert self.decoder is not None
        (wide, o_proj), (cos, sin) = self.banked, position_embeddings
        rotation = cos.unsqueeze(2), self.decoder.signed(sin)
        widths = [wide.widths[0] + wide.widths[1], wide.widths[2]]
        qk, v = (part[None].unflatten(2, (-1, self.head_dim)) for part in wide(hidden_states[0]).split(widths, dim=1))
        q, k = qk.split([wide.widths[0] // self.head_dim, wide.widths[1] // self.head_dim], dim=2)
        rotates = getattr(self, "use_rope", True)
        if hasattr(self, "q_norm"):
            q, k = self._normed("q_norm", q), self._normed("k_norm", k)
            q, k = (_turned(t, *rotation) for t in (q, k)) if rotates else (q, k)
        elif rotates:
            q, k = _turned(qk, *rotation).split([q.shape[2], k.shape[2]], dim=2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out, _none = attend(self, q, k, v, kwargs.pop("attention_mask", None), **how, **kwargs)
        return o_proj(out[0].flatten(1))[None], None

    def _normed(self, name: str, x: Tensor) -> Tensor:
        """Norm each head by itself (Qwen3), or all heads together (OLMo 2)."""
        each = getattr(self, name).weight.shape[-1] == self.head_dim
        return self.layer(name, x) if each else self.layer(name, x.flatten(2)).view(x.shape)


def _is_watched(module: nn.Module) -> bool:
    """Whether it has hooks: then it has to be called, and its output must not be overwritten."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


@cache
def fast_class(mixin: type[FastModule], original: type[nn.Module]) -> type[nn.Module]:
    """A class that derives from the mixin and `original`."""
    return type(f"Fast{original.__name__}", (mixin, original), {})


class _RMSNorm(torch.autograd.Function):
    """RMSNorm with a frozen weight, in at least float32 inside. Saves x and one number per token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, eps: float, wide: bool) -> tuple[Tensor, Tensor]:
        """x [..., H] -> normed x [..., H], and r = 1 / sqrt(mean(x^2) + eps) [..., 1]."""
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
    """act(gate) * up. Saves only its two inputs."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
        """Two tensors [..., I] -> [..., I]."""
        ctx.save_for_backward(gate, up)
        ctx.gelu = gelu
        return gated(gate, up, gelu)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        """Both gradients, in one buffer: the fused layers before need them side by side."""
        gate, up = ctx.saved_tensors
        return *_gated_gradients(gate, up, activated(gate, ctx.gelu), d_out, ctx.gelu).chunk(2, -1), None


class _GatedMLP(torch.autograd.Function):
    """The whole MLP. Saves its input, or what that can be recomputed from, and the product x A^T of the down layer."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        recompute: Recompute | None,
        gelu: bool,
        wide: FusedWeights,
        down: FusedWeights,
        *AB: Tensor,
    ) -> Tensor:
        """x [..., H] -> [..., H]. wide: gate and up; AB: the LoRA matrices of gate, up and down, in this order."""
        x_TH, (of_wide, of_down) = x.reshape(-1, x.shape[-1]), wide.split_AB(AB)
        both_TI, _thin = wide.forward(x_TH, of_wide)
        gate, up = both_TI.chunk(2, -1)
        y_TH, h_TK = down.forward(gated(gate, up, gelu), of_down)
        ctx.compute, kept = recompute or (None, [x_TH])
        ctx.save_for_backward(h_TK, *AB, *kept)
        ctx.gelu, ctx.wide, ctx.down, ctx.shape = gelu, wide, down, x.shape
        return y_TH.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, if it needs one, and of each A and B."""
        h_TK, *saved = ctx.saved_tensors
        of_wide, saved = ctx.wide.split_AB(saved)
        of_down, kept = ctx.down.split_AB(saved)
        x_TH = ctx.compute(*kept).reshape(-1, ctx.shape[-1]) if ctx.compute else kept[0]
        both_TI, thin_TK = ctx.wide.forward(x_TH, of_wide)
        gate, up = both_TI.chunk(2, -1)
        act_TI = activated(gate, ctx.gelu)
        d_TI, d_down = ctx.down.backward(dy.reshape(len(x_TH), -1), act_TI * up, h_TK, of_down, True)
        d_both = _gated_gradients(gate, up, act_TI, d_TI, ctx.gelu)
        dx_TH, d_wide = ctx.wide.backward(d_both, x_TH, thin_TK, of_wide, ctx.needs_input_grad[0])
        return None if dx_TH is None else dx_TH.view(ctx.shape), None, None, None, None, *d_wide, *d_down


def _gated_gradients(gate: Tensor, up: Tensor, act: Tensor, d_out: Tensor, gelu: bool) -> Tensor:
    """Gradients of gate and up side by side, [..., 2 I]. Overwrites `act`, which is act(gate)."""
    both = d_out.new_empty(*gate.shape[:-1], 2 * gate.shape[-1])
    d_gate, d_up = both.chunk(2, -1)
    torch.mul(act, d_out, out=d_up)
    d_act = torch.mul(up, d_out, out=act)
    if gelu:
        torch.ops.aten.gelu_backward.grad_input(d_act, gate, approximate="tanh", grad_input=d_gate)
    else:
        torch.ops.aten.silu_backward.grad_input(d_act, gate, grad_input=d_gate)
    return both


@torch.no_grad()
def gated(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    """act(gate) * up."""
    return activated(gate, gelu).mul_(up)


@torch.no_grad()
def activated(gate: Tensor, gelu: bool) -> Tensor:
    """GELU (tanh approximation) if `gelu`, else SiLU."""
    return F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)


class _Rotary(torch.autograd.Function):
    """x cos + rotate_half(x) sin, where rotate_half([a, b]) = [-b, a]. Overwrites x.

    In a model that uses x elsewhere, the trial step has other gradients, so that this part runs its plain code.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [1, T, heads, D], cos and sin [1, T, D]."""
        ctx.save_for_backward(cos, sin)
        over: Tensor = x.data  # autograd does not allow in-place changes of x, one of several views of a buffer
        return over.copy_(_rotated(over, cos, sin, -1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The transposed map: the same with the halves of sin swapped and the opposite sign."""
        cos, sin = ctx.saved_tensors
        return _rotated(dy, cos, sin.roll(sin.shape[-1] // 2, -1), 1), None, None


def _turned(x: Tensor, cos: Tensor, signed: Tensor) -> Tensor:
    """`_rotated` with fewer operators, for few tokens. x [1, T, heads, D], signed: sin with a negated first half."""
    x = x.contiguous()
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), signed).to(x.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    half = x.shape[-1] // 2
    c, s = cos.unsqueeze(2), sin.unsqueeze(2)
    out = x * c
    out[..., :half].addcmul_(x[..., half:], s[..., :half], value=sign)
    out[..., half:].addcmul_(x[..., :half], s[..., half:], value=-sign)
    return out.to(x.dtype)  # cos and sin may have a wider dtype
