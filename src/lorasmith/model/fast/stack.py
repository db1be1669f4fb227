"""The decoder layers that most model families share, computed for the engine without the overhead of modules.

    x += o_proj(attention(norm(x)))
    x += down(act(gate) * up), gate and up of norm(x)        (LLaMA, arXiv:2302.13971, section 2.2)

`find_stack` recognizes the structure. The engine compares the results with those of the model before it uses a stack.

    T = tokens of the row, H = hidden size, D = head size, Hq and Hkv = query and key heads
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorasmith.lora.fused.bank import BankedLinears
from lorasmith.model.attention import Cache, attend_cached
from lorasmith.model.base import Base
from lorasmith.model.fast.modules import FastAttention, FastGatedMLP, FastRMSNorm, gated
from lorasmith.model.groups import AttentionGroup

_CHILDREN = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}


@dataclass(frozen=True)
class Norm:
    """RMSNorm (arXiv:1910.07467, section 3)."""

    weight: Tensor
    eps: Tensor  # [1, 1]
    scale: float  # 1 / H
    late: bool  # multiply by the weight after the cast down

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., H] -> [..., H]."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=self.eps.dtype)
        n = x * torch.addcmul(self.eps, length, length, value=self.scale).rsqrt_()
        return n.to(x.dtype).mul_(self.weight) if self.late else n.mul_(self.weight).to(x.dtype)


@dataclass(frozen=True)
class DecoderLayer:
    """One decoder layer."""

    index: int
    norms: tuple[Norm, Norm]
    qkv: BankedLinears
    o_proj: BankedLinears
    gate_up: BankedLinears
    down: BankedLinears
    head_norms: tuple[Norm, ...]  # of q and k (Qwen3), or empty
    head_dim: int
    attention_options: dict[str, Any]  # scaling and sliding_window
    gelu: bool  # the activation, as in FastGatedMLP

    def __call__(
        self, x_TH: Tensor, rotation: tuple[Tensor, Tensor], groups: Sequence[AttentionGroup], kv: Cache
    ) -> Tensor:
        """x [T, H] -> [T, H]."""
        heads_THD = self.qkv(self.norms[0](x_TH)).contiguous().view(len(x_TH), -1, self.head_dim)
        n_q, n_k = (width // self.head_dim for width in self.qkv.widths[:2])
        qk, v = heads_THD[:, : n_q + n_k], heads_THD[:, n_q + n_k :]
        if self.head_norms:
            qk = torch.cat([norm(part) for norm, part in zip(self.head_norms, qk.split([n_q, n_k], 1), strict=True)], 1)
        cos, sin = rotation
        qk = torch.addcmul(qk * cos, qk.roll(self.head_dim // 2, -1), sin).to(x_TH.dtype)
        out_TD = attend_cached(qk[:, :n_q], qk[:, n_q:], v, groups, kv, self.index, **self.attention_options).flatten(1)
        x_TH = x_TH + self.o_proj(out_TD)
        gate, up = self.gate_up(self.norms[1](x_TH)).chunk(2, -1)
        return x_TH + self.down(gated(gate, up, self.gelu))


@dataclass(frozen=True)
class DecoderStack:
    """The whole decoder: embedding, layers and last norm."""

    model: PreTrainedModel
    rotary: nn.Module
    layers: Sequence[DecoderLayer]
    norm: Norm

    @torch.no_grad()
    def __call__(self, ids_T: Tensor, position_T: Tensor, groups: Sequence[AttentionGroup], kv: Cache) -> Tensor:
        """The last hidden states, [T, H]. The router must be set, and `kv.begin` called: groups are its result."""
        x_TH: Tensor = self.model.get_input_embeddings()(ids_T[None])[0]
        cos, sin = (t[0].unsqueeze(1) for t in self.rotary(x_TH[None], position_T[None]))
        half = sin.shape[-1] // 2
        rotation = cos, torch.cat([-sin[..., :half], sin[..., half:]], -1)
        for layer in self.layers:
            x_TH = layer(x_TH, rotation, groups, kv)
        return self.norm(x_TH)


def find_stack(base: Base) -> DecoderStack | None:
    """The model's decoder as a stack, or None if it has another structure. Its attention must have run before."""
    decoder = base.decoder
    children = dict(decoder.named_children())
    if children.keys() != {"embed_tokens", "layers", "norm", "rotary_emb"}:
        return None
    modules = list(children["layers"].children())
    layers = [layer for layer in map(_layer, modules) if layer is not None]
    norm = _norm(children["norm"])
    if norm is None or len(layers) < len(modules):
        return None
    return DecoderStack(base.model, children["rotary_emb"], layers, norm)


def _layer(module: nn.Module) -> DecoderLayer | None:
    parts = dict(module.named_children())
    if parts.keys() != _CHILDREN:
        return None
    attention, mlp = parts["self_attn"], parts["mlp"]
    if not isinstance(attention, FastAttention) or not isinstance(mlp, FastGatedMLP):
        return None
    is_banked = len(attention.banked) == len(mlp.banked) == 2 and attention.attention_options is not None
    norms = [_norm(parts[name]) for name in ("input_layernorm", "post_attention_layernorm")]
    head_norms = [_norm(getattr(attention, name)) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
    found = [norm for norm in (*norms, *head_norms) if norm is not None]
    per_head = all(len(norm.weight) == attention.head_dim for norm in found[2:])
    if len(found) < len(norms) + len(head_norms) or not is_banked or not per_head:
        return None
    return DecoderLayer(
        index=int(attention.layer_idx),  # type: ignore[arg-type]
        norms=(found[0], found[1]),
        qkv=attention.banked[0],
        o_proj=attention.banked[1],
        gate_up=mlp.banked[0],
        down=mlp.banked[1],
        head_norms=tuple(found[2:]),
        head_dim=attention.head_dim,
        attention_options=attention.attention_options or {},
        gelu=mlp.gelu,
    )


def _norm(module: nn.Module) -> Norm | None:
    if not isinstance(module, FastRMSNorm):
        return None
    eps, offset, wide = module.variant
    weight: Tensor = module.weight  # type: ignore[assignment]
    inner = torch.promote_types(weight.dtype, torch.float32)
    scaled = weight.detach().to(inner) + offset if wide else weight.detach()
    return Norm(scaled, torch.tensor([[eps]], dtype=inner, device=weight.device), 1 / len(weight), not wide)
