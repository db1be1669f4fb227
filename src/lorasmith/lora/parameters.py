"""LoRA on a module's own parameters, such as the weights of all experts in one tensor (PEFT's target_parameters).

    W'_EOI = W_EOI + s B_EOR A_ERI        one update for each expert; it is transposed if the weights are W_EIO

    E = experts, O = out_features, I = in_features, R = rank of each expert

Such a module has no input of which B A x could be computed from outside, so the plain path gives the module's own
forward the sum W' in place of W.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorasmith.errors import AdapterError
from lorasmith.i18n import _
from lorasmith.lora.by_adapter import ModulesByAdapter
from lorasmith.lora.fused.experts import can_fuse, fused_experts
from lorasmith.lora.router import Router, Slice


class ParameterUpdate(nn.Module):
    """The update of one adapter for one parameter of two or three dimensions, as PEFT stores it.

    lora_A [E*R, I] holds expert after expert, and lora_B [O, R*E] has the expert as its fastest index. A parameter of
    two dimensions [O, I] is one expert.
    """

    def __init__(self, weight: Tensor, transposed: bool, r: int, scaling: float) -> None:
        super().__init__()
        self.experts: int
        self.experts, first, second = weight.shape if weight.dim() == 3 else (1, *weight.shape)
        self.transposed = transposed and weight.dim() == 3
        O, I = (second, first) if self.transposed else (first, second)
        self.r, self.scaling, dtype = r, scaling, torch.promote_types(weight.dtype, torch.float32)
        self.lora_A = nn.Parameter(torch.empty(self.experts * r, I, device=weight.device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(O, r * self.experts, device=weight.device, dtype=dtype))

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """A [E, R, I] and B [E, O, R] of each expert; views of the parameters."""
        return (
            self.lora_A.view(self.experts, self.r, -1),
            self.lora_B.view(-1, self.r, self.experts).permute(2, 0, 1),
        )

    def merged(self, weight: Tensor) -> Tensor:
        """W + s B A in the shape of `weight`, computed in the wider of the two dtypes."""
        A_ERI, B_EOR = self.factors
        left, right = (A_ERI.mT, B_EOR.mT) if self.transposed else (B_EOR, A_ERI)
        dtype = torch.promote_types(weight.dtype, A_ERI.dtype)
        whole = weight.to(dtype).reshape(self.experts, left.shape[1], right.shape[2])
        return torch.baddbmm(whole, left.to(dtype), right.to(dtype), alpha=self.scaling).view(weight.shape)


class LoRAParameters(nn.Module):
    """A frozen module with adapters on some of its own parameters. `updates` holds them by adapter and parameter."""

    def __init__(self, base_layer: nn.Module, router: Router) -> None:
        super().__init__()
        self.base_layer, self.router = base_layer, router
        self.updates: dict[str, dict[str, ParameterUpdate]] = {}
        self.lora_updates = ModulesByAdapter()  # the same, as modules
        self.register_state_dict_post_hook(_as_in_peft)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_from_peft)  # type: ignore[no-untyped-call]

    def add(self, adapter: str, ranks: Mapping[str, tuple[int, float]]) -> None:
        """Create the uninitialized A and B of `adapter`. ranks: r and scaling by the parameter's name."""
        transposed = bool(getattr(self.base_layer, "is_transposed", False))  # transformers' mark of W_EIO
        own = {name: p.detach() for name, p in self.base_layer.named_parameters(recurse=False) if name in ranks}
        self._set(adapter, {name: ParameterUpdate(p, transposed, *ranks[name]) for name, p in own.items()})

    def _set(self, adapter: str, updates: dict[str, ParameterUpdate]) -> None:
        self.updates[adapter], self.lora_updates[adapter] = updates, nn.ModuleList(updates.values())

    def remove(self, adapter: str) -> None:
        """Remove `adapter`."""
        del self.updates[adapter], self.lora_updates[adapter]

    def keep(self, adapter: str, names: Collection[str]) -> bool:
        """Remove the updates of `adapter` for all parameters but `names`. Returns whether any is left."""
        self._set(adapter, {name: update for name, update in self.updates[adapter].items() if name in names})
        return len(self.updates[adapter]) > 0

    def own_parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        """A and B by their names in PEFT's files, relative to the module."""
        updates, found = self.updates[adapter], dict[str, nn.Parameter]()
        for name, prefix in peft_prefixes(list(updates)).items():
            found[f"{prefix}lora_A.weight"] = updates[name].lora_A
            found[f"{prefix}lora_B.weight"] = updates[name].lora_B
        return found

    def __getattr__(self, name: str) -> Any:
        """Fall back to the base layer's attributes: models read the number of experts, for example."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    @property
    def splits_by_token(self) -> bool:
        """Whether each token's output depends on that token's inputs only: so it is for transformers' usual experts."""
        names = signature(type(self.base_layer).forward).parameters.keys()
        return hasattr(self.base_layer, "has_gate") or {"hidden_states", "top_k_index"} <= names

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output, each token with the adapter chosen by the router.

        With several adapters in a batch, every tensor among the arguments must have the tokens as its first dimension.
        Raises AdapterError otherwise.
        """
        router = self.router
        slices = router.slices or (Slice(router.active, 0, 0),)
        beside = () if router.slices else router.beside
        ranges: dict[tuple[str, ...], list[Tensor]] = {}
        for adapter, start, end in slices:
            known = tuple(name for name in (adapter, *beside) if name in self.updates and name)
            ranges.setdefault(known, []).append(torch.arange(start, end))
        if len(ranges) == 1:
            return self._call(next(iter(ranges)), *args, **kwargs)
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if not self.splits_by_token or any(len(value) != slices[-1].end for value in tensors):
            raise AdapterError(cannot_split(type(self.base_layer).__name__))
        tokens = {adapters: torch.cat(own).to(tensors[0].device) for adapters, own in ranges.items()}
        outputs = []
        for adapters, at in tokens.items():
            own, named = ([v[at] if isinstance(v, Tensor) else v for v in part] for part in (args, kwargs.values()))
            outputs.append(self._call(adapters, *own, **dict(zip(kwargs, named, strict=True))))
        return torch.cat(outputs)[torch.cat(list(tokens.values())).argsort()]

    def _call(self, adapters: tuple[str, ...], *args: Any, **kwargs: Any) -> Any:
        if not adapters:
            return self.base_layer(*args, **kwargs)
        updates = self.updates[adapters[0]]
        if len(adapters) == 1 and self.router.fused and can_fuse(self.base_layer, list(updates), args, kwargs):
            return fused_experts(self.base_layer, updates, *args)
        if not torch.is_grad_enabled():
            return self.unfused(adapters, *args, **kwargs)
        # backward would keep W + s B A of every layer, which is as large as the model: compute it again instead
        return checkpoint(self.unfused, adapters, *args, use_reentrant=False, **kwargs)

    def unfused(self, adapters: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        """Call the module with W + s B A of these adapters in place of W, in W's dtype."""
        changed: dict[str, Tensor] = {}
        for name, update in ((name, update) for one in adapters for name, update in self.updates[one].items()):
            weight = self.base_layer.get_parameter(name)
            changed[name] = update.merged(changed.get(name, weight)).to(weight.dtype)
        return torch.func.functional_call(self.base_layer, changed, args, kwargs)


def _names_in_peft(layer: LoRAParameters, prefix: str) -> Iterator[tuple[str, str]]:
    """The name of each A and B in this model's state dict, and in PEFT's."""
    for adapter, updates in layer.updates.items():
        for i, outer in enumerate(peft_prefixes(list(updates)).values()):
            for matrix in ("lora_A", "lora_B"):
                yield f"{prefix}lora_updates.{adapter}.{i}.{matrix}", f"{prefix}{outer}{matrix}.{adapter}.weight"


def _as_in_peft(layer: nn.Module, state: dict[str, Any], prefix: str, _local: Any) -> None:
    """Name A and B in a state dict as PEFT does."""
    assert isinstance(layer, LoRAParameters)
    for own, peft in _names_in_peft(layer, prefix):
        state[peft] = state.pop(own)


def _from_peft(layer: nn.Module, state: dict[str, Any], prefix: str, *_others: Any) -> None:
    """Find A and B in a state dict by PEFT's names."""
    assert isinstance(layer, LoRAParameters)
    for own, peft in _names_in_peft(layer, prefix):
        if peft in state:
            state[own] = state.pop(peft)


def peft_prefixes(names: Sequence[str]) -> dict[str, str]:
    """Where PEFT has the A and B of each adapted parameter of one module: it wraps the module once for each.

    names: of the parameters, in the order in which the module has them. The first is wrapped innermost.
    """
    return {name: "base_layer." * depth for depth, name in zip(range(len(names) - 1, -1, -1), names, strict=True)}


def cannot_split(kind: str) -> str:
    """The text for a module that cannot compute several adapters in one batch."""
    return _(
        "target_parameters: a {kind} cannot compute several adapters in one batch, because it does not get its input "
        "token by token. Use one adapter at a time, or merge it.",
        kind=kind,
    )
