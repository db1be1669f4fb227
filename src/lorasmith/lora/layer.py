"""LoRA layers: wrappers around the base model's modules that add each adapter's update.

    y_BTO = W x_BTI + (lora_alpha / r) B A x_BTI        (LoRA, arXiv:2106.09685, section 4.1)

    B = batch, T = tokens, I = in_features, O = out_features, R = rank; matrices A_RI and B_OR

The base layer (Linear, Conv1D, Embedding, 4-bit) is called unchanged and the update is added to its output in place.
"""

import copy
from collections.abc import Sequence
from inspect import Parameter, signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PretrainedConfig

from lorasmith.errors import AdapterError
from lorasmith.i18n import _
from lorasmith.lora.by_adapter import ModulesByAdapter, ParametersByAdapter
from lorasmith.lora.fused.linears import FusedLinears
from lorasmith.lora.quantized import QuantizedLinear, unquantized, weight_dtype
from lorasmith.lora.router import Router, Slice
from lorasmith.lora.token_rows import TokenRows, rows_of_new_tokens
from lorasmith.lora.update import Update
from lorasmith.lora.variant import require_registered

Bounds = tuple[tuple[int, int], ...]


class LowRank(torch.autograd.Function):
    """y += s (x A^T) B^T in place, for each slice of the tokens. x [..., I] and y [..., O] in any floating dtype.

    A and B keep their own dtype (float32), in which their gradients are returned, and are cast once per forward.
    Under torch.autocast, x must have y's dtype. `plain_low_rank` computes the same in plain torch.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, bounds: Bounds, scales: tuple[float, ...], *AB: Tensor) -> Tensor:
        """Add to y; save x, h = x A^T and the cast A and B for backward."""
        x_TI, y_TO = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        saved: list[Tensor] = [x_TI]
        for (start, end), s, A, B in zip(bounds, scales, AB[0::2], AB[1::2], strict=True):
            A_RI, B_OR = A.to(x.dtype), B.to(x.dtype)
            h_TR = F.linear(x_TI[start:end], A_RI)
            y_TO[start:end].addmm_(h_TR, B_OR.t(), alpha=s)
            saved += [h_TR, A_RI, B_OR]
        ctx.mark_dirty(y)
        ctx.save_for_backward(*saved)
        ctx.bounds, ctx.scales, ctx.dtypes, ctx.shape = bounds, scales, [p.dtype for p in AB], x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of y, x (if required), A and B."""
        x_TI, *saved = ctx.saved_tensors
        dy_TO = dy.reshape(-1, dy.shape[-1])
        covered = sum(end - start for start, end in ctx.bounds) == len(x_TI)
        new = torch.empty_like if covered else torch.zeros_like
        dx_TI = new(x_TI) if ctx.needs_input_grad[1] else None
        gradients: list[Tensor | None] = []
        for i, ((start, end), s) in enumerate(zip(ctx.bounds, ctx.scales, strict=True)):
            h_TR, A_RI, B_OR = saved[3 * i : 3 * i + 3]
            dy_SO, x_SI = dy_TO[start:end], x_TI[start:end]
            dh_TR = F.linear(dy_SO, B_OR.t().contiguous()) * s
            if dx_TI is not None:
                torch.mm(dh_TR, A_RI, out=dx_TI[start:end])
            dA_RI = dh_TR.t() @ x_SI
            dB_RO = h_TR.t() @ dy_SO * s  # transposed: the product is faster with the narrow matrix first
            gradients += [dA_RI.to(ctx.dtypes[2 * i]), dB_RO.t().to(ctx.dtypes[2 * i + 1])]
        return dy, None if dx_TI is None else dx_TI.view(ctx.shape), None, None, *gradients


def plain_low_rank(y: Tensor, x: Tensor, bounds: Bounds, scales: tuple[float, ...], *AB: Tensor) -> Tensor:
    """What LowRank computes, written as in the paper. Used under torch.compile, and as the reference in tests."""
    x_TI, y_TO = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    update = torch.zeros_like(y_TO)
    for (start, end), s, A, B in zip(bounds, scales, AB[0::2], AB[1::2], strict=True):
        update[start:end] = s * (x_TI[start:end] @ A.to(x.dtype).t()) @ B.to(x.dtype).t()
    return (y_TO + update).view(y.shape)


def master_dtype(module: nn.Module) -> torch.dtype:
    """The dtype in which a module's adapters and copies are trained: float32, or float64 for a float64 base."""
    dtype = weight_dtype(module)
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else torch.float32


class LoRALayer(nn.Module):
    """A frozen linear layer with its adapters, in PEFT's structure: base_layer, lora_A.<adapter>, lora_B.<adapter>.

    `updates` maps each adapter to the Update that computes it; the parameters are in this module.
    """

    def __init__(self, base_layer: nn.Module, in_features: int, out_features: int, router: Router) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A, self.lora_B, self.lora_dropout = (ModulesByAdapter() for _part in range(3))
        self.updates, self.scaling = dict[str, Update](), dict[str, float]()
        self.in_features, self.out_features, self.router = in_features, out_features, router
        self.fused_linears = FusedLinears(router, [self])

    def add(
        self,
        adapter: str,
        r: int,
        scaling: float,
        dropout: float,
        device: torch.device,
        variant: type[Update] = Update,
    ) -> None:
        """Create the uninitialized parameters of `adapter` in `master_dtype`: A [r, I], B [O, r], those of `variant`.

        Raises AdapterError if `variant` is not registered.
        """
        require_registered(variant)
        dtype = master_dtype(self.base_layer)
        self.lora_A[adapter] = nn.Linear(self.in_features, r, bias=False, device=device, dtype=dtype)
        self.lora_B[adapter] = nn.Linear(r, self.out_features, bias=variant.B_HAS_BIAS, device=device, dtype=dtype)
        self.lora_dropout[adapter] = nn.Dropout(dropout) if dropout else nn.Identity()
        for name, shape in variant.parts(self).items():
            if not hasattr(self, name):
                setattr(self, name, ParametersByAdapter())
            getattr(self, name)[adapter] = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.updates[adapter] = variant(self, adapter, scaling)

    def remove(self, adapter: str) -> None:
        """Remove `adapter`."""
        parts = [getattr(self, name) for name in self.updates[adapter].parts(self)]
        for store in (self.lora_A, self.lora_B, self.lora_dropout, self.updates, self.scaling, *parts):
            del store[adapter]

    @property
    def weight(self) -> Tensor:
        """The base layer's weight: models read its dtype. For those that compute with it, see model/target_check.py."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base_layer.bias  # type: ignore[return-value]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """W x + (lora_alpha / r) B A x, each token with the adapter chosen by the router. x [..., I] -> [..., O]."""
        fused = None if args or kwargs else self.fused_linears.output(self, x)
        return self.unfused(x, *args, **kwargs) if fused is None else fused

    @property
    def is_low_rank(self) -> bool:
        """Whether all adapters of this layer are plain low rank. False for a subclass, which may compute anything."""
        return type(self) is LoRALayer and all(update.is_low_rank for update in self.updates.values())

    def fusable(self, adapter: str | None) -> Update | None:
        """The update of `adapter` if this layer can be fused with others, else None.

        It can if the update is plain low rank without dropout and the base layer is a frozen nn.Linear or
        QuantizedLinear.
        """
        update, base = self.updates.get(adapter or ""), self.base_layer
        if update is None or type(base) not in (nn.Linear, QuantizedLinear) or torch.compiler.is_compiling():
            return None
        if type(self) is not LoRALayer or not update.is_low_rank or update.drops:
            return None
        return None if any(p.requires_grad for p in base.parameters()) else update

    def unfused(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The same as `forward` for any base layer and any adapters, without fusing: call the base, add the updates."""
        y: Tensor = self.base_layer(x, *args, **kwargs)
        for slices in self.router.passes(x.numel() // x.shape[-1]):
            y = self._add_updates(y, x, self._active_slices(slices))
        return y

    def _add_updates(self, y: Tensor, x: Tensor, slices: list[tuple[str, int, int]]) -> Tensor:
        """Add to y, in place if they are plain low rank, the updates of slices that do not overlap."""
        if others := [s for s in slices if not self.updates[s[0]].is_low_rank]:
            y = self._add_variants(y, x, others)
            slices = [s for s in slices if s not in others]
        if not slices:
            return y
        if self.router.stacked and len(slices) > 1:
            return self._add_stacked(y, x, slices)
        dropped: dict[str, Tensor] = {}
        for adapter, start, end in slices:
            update = self.updates[adapter]
            if update.drops:
                # dropout gives each adapter its own x, so such slices are added one by one
                y = self._add(y, dropped.setdefault(adapter, update.dropout(x)), [(adapter, start, end)])
        return self._add(y, x, [s for s in slices if s[0] not in dropped])

    def _active_slices(self, slices: Sequence[Slice]) -> list[tuple[str, int, int]]:
        return [(adapter, start, end) for adapter, start, end in slices if adapter in self.updates and adapter]

    def _add_variants(self, y: Tensor, x: Tensor, slices: Sequence[tuple[str, int, int]]) -> Tensor:
        """Compute each slice with its update's own forward. Returns a new tensor, as variants may save their output."""
        x_TI, y_TO = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        pieces: list[Tensor] = []
        done = 0
        for adapter, start, end in slices:
            pieces += [y_TO[done:start], self.updates[adapter].forward(x_TI[start:end], y_TO[start:end])]
            done = end
        return torch.cat([*pieces, y_TO[done:]]).view(y.shape)

    def _add(self, y: Tensor, x: Tensor, slices: Sequence[tuple[str, int, int]]) -> Tensor:
        if not slices:
            return y
        updates = [self.updates[s[0]] for s in slices]
        AB = [matrix for update in updates for matrix in update.matrices]
        bounds, scales = tuple((s[1], s[2]) for s in slices), tuple(update.scaling for update in updates)
        if torch.compiler.is_compiling():  # torch.compile miscompiles in-place functions (pytorch issue 180642)
            return plain_low_rank(y, x, bounds, scales, *AB)
        if not torch.is_autocast_enabled(x.device.type):
            return self._low_rank(y, x, bounds, scales, AB)
        # autocast casts the input and output of matrix products, but nothing that is added in place
        with torch.autocast(x.device.type, enabled=False):
            return self._low_rank(y, x.to(y.dtype), bounds, scales, AB)

    def _low_rank(
        self, y: Tensor, x: Tensor, bounds: Bounds, scales: tuple[float, ...], AB: Sequence[Tensor]
    ) -> Tensor:
        added: Tensor = LowRank.apply(y, x, bounds, scales, *AB)  # type: ignore[no-untyped-call]
        return added

    @torch.no_grad()
    def _add_stacked(self, y: Tensor, x: Tensor, slices: Sequence[tuple[str, int, int]]) -> Tensor:
        """Add all adapters with one masked low-rank product. Faster in decoding, with few tokens per adapter."""
        updates = [self.updates[adapter] for adapter, _start, _end in slices]
        A, B = zip(*(update.matrices for update in updates), strict=True)
        A_KI = torch.cat(A).to(y.dtype)
        B_OK = torch.cat([b * update.scaling for b, update in zip(B, updates, strict=True)], dim=1).to(y.dtype)
        x_TI, y_TO = x.reshape(-1, x.shape[-1]).to(y.dtype), y.view(-1, y.shape[-1])
        mask_TK, column = y.new_zeros(len(x_TI), len(A_KI)), 0
        for a, (_adapter, start, end) in zip(A, slices, strict=True):
            mask_TK[start:end, column : column + len(a)] = 1
            column += len(a)
        y_TO.addmm_(F.linear(x_TI, A_KI) * mask_TK, B_OK.t())
        return y


def registered_update(layer: LoRALayer, adapter: str) -> Update:
    """The update of `adapter` in `layer`, to save or merge it. Raises AdapterError if its class is not registered."""
    if type(layer) is not LoRALayer:
        raise AdapterError(
            _(
                "{kind} is a subclass of LoRALayer, so it can be neither saved nor merged: make it a variant "
                "(lora/variant.py).",
                kind=type(layer).__name__,
            )
        )
    require_registered(type(layer.updates[adapter]))
    return layer.updates[adapter]


class LoRAEmbedding(nn.Module):
    """A frozen embedding with its adapters, in PEFT's structure: lora_embedding_A.<adapter> [R, V], _B [O, R]."""

    def __init__(self, base_layer: nn.Embedding, router: Router) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_embedding_A, self.lora_embedding_B = ParametersByAdapter(), ParametersByAdapter()
        self.scaling: dict[str, float] = {}
        self.router = router

    def add(self, adapter: str, r: int, scaling: float, device: torch.device) -> None:
        """Create A [r, V] and B [O, r] of `adapter` in `master_dtype`, uninitialized. No dropout, as in PEFT."""
        dtype = master_dtype(self.base_layer)
        V, O = self.base_layer.num_embeddings, self.base_layer.embedding_dim
        self.lora_embedding_A[adapter] = nn.Parameter(torch.empty(r, V, device=device, dtype=dtype))
        self.lora_embedding_B[adapter] = nn.Parameter(torch.empty(O, r, device=device, dtype=dtype))
        self.scaling[adapter] = scaling

    def remove(self, adapter: str) -> None:
        """Remove `adapter`."""
        for store in (self.lora_embedding_A, self.lora_embedding_B, self.scaling):
            del store[adapter]

    @property
    def weight(self) -> Tensor:
        """The base layer's weight."""
        return self.base_layer.weight

    def forward(self, ids: Tensor) -> Tensor:
        """E[ids] + (lora_alpha / r) B A[:, ids], multiplied by the embedding's scale if it has one (Gemma)."""
        y: Tensor = self.base_layer(ids)
        for slices in self.router.passes(ids.numel()):
            y = self._add_updates(y, ids, slices)
        return y

    def _add_updates(self, y: Tensor, ids: Tensor, slices: Sequence[Slice]) -> Tensor:
        ids_T, y_TO = ids.reshape(-1), y.reshape(-1, y.shape[-1])
        pieces = []
        for adapter, start, end in slices:
            piece = y_TO[start:end]
            if adapter in self.scaling:
                A_VR = self.lora_embedding_A[adapter].t()
                h_TR = F.embedding(ids_T[start:end], A_VR, padding_idx=self.base_layer.padding_idx)
                update = h_TR @ self.lora_embedding_B[adapter].t() * self.scaling[adapter]
                piece = piece + update.to(y.dtype) * getattr(self.base_layer, "embed_scale", 1.0)
            pieces.append(piece)
        return torch.cat(pieces).view(y.shape)


class SavedModule(nn.Module):
    """A fully trained module, with one copy per adapter (PEFT's modules_to_save); the original stays frozen.

    Of an embedding or head, an adapter may also train the rows of some tokens only; its copy is then a TokenRows.
    """

    def __init__(self, original_module: nn.Module, router: Router) -> None:
        super().__init__()
        self.original_module = original_module
        self.modules_to_save = ModulesByAdapter()
        self.router = router

    def add(self, adapter: str) -> nn.Module:
        """Create a trainable copy of the original in `master_dtype` for `adapter`, and return it."""
        kept = [v for m in self.original_module.modules() for v in vars(m).values() if isinstance(v, PretrainedConfig)]
        # configs are shared rather than copied, because they select the attention implementation
        own = unquantized(copy.deepcopy(self.original_module, {id(config): config for config in kept}))
        module = own.to(master_dtype(self.original_module)).requires_grad_(True)
        self.modules_to_save[adapter] = module
        return module

    def add_rows(self, adapter: str, ids: Sequence[int]) -> TokenRows:
        """Train only the rows of the tokens `ids` for `adapter`, in `master_dtype`.

        The original is an embedding or head. See `rows_of_new_tokens` for their first values.
        """
        return self.share_rows(
            adapter, TokenRows(ids, rows_of_new_tokens(self.original_module, ids, master_dtype(self.original_module)))
        )

    def share_rows(self, adapter: str, rows: TokenRows) -> TokenRows:
        """Use `rows` for `adapter`, which may be those of the embedding that this head is tied to."""
        self.modules_to_save[adapter] = rows
        return rows

    def remove(self, adapter: str) -> None:
        """Remove `adapter`."""
        del self.modules_to_save[adapter]

    def __getattr__(self, name: str) -> Any:
        """Fall back to the original's attributes: models read a layer's attention type or a head's weight."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("original_module"), name)

    @property
    def takes_several_inputs(self) -> bool:
        """Whether its forward has more than one parameter, as those of attention and of decoder layers do."""
        kinds = type(self.original_module).__mro__  # all classes, since a fast subclass accepts and forwards anything
        forwards = [signature(kind.__dict__["forward"]).parameters for kind in kinds if "forward" in kind.__dict__]
        several = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
        named = [[p for p in parameters.values() if p.kind not in several] for parameters in forwards]
        return any(len(parameters) > 2 for parameters in named)  # more than self and one input

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run each token through its adapter's copy.

        With several adapters in a batch, the only argument must be ids [B, T] or states [B, T, I], which can be split.
        Raises AdapterError otherwise: the tokens of an attention layer, for example, depend on each other.
        """
        slices = self.router.slices or (Slice(self.router.active, 0, 0),)
        if len(slices) == 1:
            return self._call(slices[0].adapter, *args, **kwargs)
        if kwargs or len(args) > 1:
            raise AdapterError(
                _(
                    "modules_to_save: a {kind} that is trained in full cannot compute several adapters "
                    "in one batch, because it uses more than one token at a time. "
                    "Use one adapter at a time, or merge it.",
                    kind=type(self.original_module).__name__,
                )
            )
        return self._split_by_adapter(*args)

    def _split_by_adapter(self, x: Tensor) -> Tensor:
        ids = not x.is_floating_point()
        slices = self.router.slices_of(x.numel() if ids else x.numel() // x.shape[-1])
        x_T = x.reshape(-1) if ids else x.reshape(-1, x.shape[-1])
        y_TO = torch.cat([self._call(s.adapter, x_T[s.start : s.end]) for s in slices])
        return y_TO.view(*(x.shape if ids else x.shape[:-1]), y_TO.shape[-1])

    def _call(self, adapter: str | None, *args: Any, **kwargs: Any) -> Any:
        """Call the copy of `adapter`, or the original if there is none, in the original's dtype."""
        if adapter is None or adapter not in self.modules_to_save:
            return self.original_module(*args, **kwargs)
        module, dtype = self.modules_to_save[adapter], weight_dtype(self.original_module)
        if isinstance(module, TokenRows):
            return module.output(self.original_module, *args, **kwargs)
        if isinstance(module, nn.Embedding):
            return module(*args, **kwargs).to(dtype)
        cast = {name: p.to(dtype) for name, p in module.named_parameters()}
        return torch.func.functional_call(module, cast, args, kwargs)
