"""Decode faster than with the model's own modules: by an adapter bank, a decoder stack and prepacked weights.

A base has one FastDecoder, `base.fast_decoder`. The engine makes and tests it (`decoder_of` in engine/self_test.py),
serving and scoring use it, and `close` undoes it. In the model it changes only the attributes `decoder` and `banked` of
fast modules and, while it is prepacked, the weights.
"""

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count

import torch
from torch import Tensor, nn

from lorasmith.lora.fused.bank import AdapterBank, AdapterWeights, BankedLinears, Factors
from lorasmith.lora.fused.products import prepacked
from lorasmith.lora.inject import Adapter
from lorasmith.lora.layer import LoRALayer
from lorasmith.model.base import Base
from lorasmith.model.fast.modules import FastAttention, FastGatedMLP, FastModule
from lorasmith.model.fast.stack import DecoderStack, find_stack
from lorasmith.model.head import frozen_matrix

_numbers = count()  # one per adapter; an id() may be used again


class FastDecoder:
    """The fast ways to decode a base. A new one has none, and all layers run their own modules until `group`.

    problem: why the model cannot decode in packed rows with a KV cache; None if it can. plain: why its layers are not
    in the adapter bank although it can; empty if they are. held: adapters that are not in the model, by name (see
    lora/fused/held.py). batches, caches: whether requests in padded batches are computed together, and with the
    model's own KV cache; used if there is a `problem`.
    """

    def __init__(self, base: Base, problem: str | None = None) -> None:
        self.base, self.problem, self.plain = base, problem, ""
        self.batches, self.caches = True, True
        self.bank: AdapterBank | None = None
        self.held: dict[str, AdapterWeights] = {}
        self.packed_head: Tensor | None = None  # the head's weight, prepacked; None unless the head is only that
        self.is_on, self.is_prepacked = False, False  # fast modules use the bank only while it is on, in `running`
        self.stack: DecoderStack | None = None  # what runs instead of the model's decoder, in `running`
        self.has_stack = False  # the model is built like a stack; an adapter in it may still prevent its use
        self._found_stack: DecoderStack | None = None
        self._known: dict[str, tuple[Adapter, AdapterWeights]] = {}
        self._signed: tuple[Tensor, Tensor] | None = None

    def group(self, as_stack: bool) -> None:
        """Put the linear layers of recognized attention and MLP modules into a new adapter bank.

        as_stack: also use a DecoderStack, if the model is built like one.
        """
        if self.bank is None:
            fast = {path: module for path, module in self.base.model.named_modules() if isinstance(module, FastModule)}
            whole = {path for path in fast if {"original_module", "modules_to_save"} & set(path.split("."))}
            groups = [group for path in fast if path not in whole for group in _groups(path, fast[path])]
            self.bank = AdapterBank(self.base.router, groups)
        self.has_stack = as_stack
        self.regroup()
        self.has_stack = self._found_stack is not None

    def regroup(self) -> None:
        """Choose again which modules use the bank, after adapters in the model changed.

        Left out are those with layers that an adapter trains whole or adds more than plain low rank to. A head with
        LoRA is no longer computed by its prepacked weight.
        """
        if self.bank is None:
            return
        modules = dict(self.base.model.named_modules())
        groups: dict[str, list[BankedLinears]] = {}
        for group in self.bank.groups:
            groups.setdefault(next(iter(group.layers)).rpartition(".")[0], []).append(group)
        paths: list[str] = []
        for path, module in modules.items():
            if isinstance(module, FastModule):
                own = groups.get(path, [])
                layers = {p: layer for group in own for p, layer in group.layers.items()}
                are_unchanged = all(p in modules and _plain(modules[p]) is layer for p, layer in layers.items())
                module.decoder, module.banked = self, tuple(own) if are_unchanged else ()
                paths += layers if are_unchanged else ()
        self.bank.paths = frozenset(paths)
        self._found_stack = find_stack(self.base) if self.has_stack else None
        if frozen_matrix(self.base) is None:  # the head has an adapter now
            self.packed_head = None

    def ungroup(self) -> None:
        """Let all layers run their own modules with their own weights again."""
        self._unpack()
        for module in self.base.model.modules():
            if isinstance(module, FastModule) and module.decoder is self:
                module.decoder, module.banked = None, ()
        self.bank = self.packed_head = self._found_stack = None
        self.has_stack, self._known = False, {}

    # --- decoding -----------------------------------------------------------------------------------------------------

    @contextmanager
    def running(self) -> Iterator[None]:
        """Use the bank inside the block and, in rows with a KV cache, the stack; without gradients."""
        self.is_on, self.stack = self.bank is not None, self._found_stack
        try:
            yield
        finally:
            self.is_on, self.stack, self._signed = False, None, None

    def weights(self, name: str) -> AdapterWeights:
        """The weights of an adapter for the bank, whether it is in the model or held."""
        if name in self.held:
            return self.held[name]
        adapter = self.base.adapters[name]
        if name not in self._known or self._known[name][0] is not adapter:
            known = {old: pair for old, pair in self._known.items() if self.base.adapters.get(old) is pair[0]}
            self._known = known | {name: (adapter, adapter_weights(self.base, adapter))}
            self.regroup()  # the adapter may have replaced modules of the model
        return self._known[name][1]

    def hold(self, names: Collection[str]) -> None:
        """Put these adapters into slots of the bank; others may lose theirs."""
        for name in sorted(names):
            weights = self.weights(name)
            if self.bank is not None:
                self.bank.hold(name, weights, names)

    def holds(self, names: Collection[str]) -> bool:
        """Whether all of these adapters have slots, or no bank is used."""
        return self.bank is None or self.bank.has(names)

    def drop(self, name: str) -> bool:
        """Free the slot of an adapter, and forget it if it is held. Returns whether it was held."""
        if self.bank is not None:
            self.bank.drop(name)
            self.bank.shrink()
        return self.held.pop(name, None) is not None

    def lost(self) -> list[str]:
        """The held adapters that change a layer which is not in the bank, so that they would not have their effect."""
        paths = self.bank.paths if self.bank is not None else frozenset[str]()
        return [name for name, weights in self.held.items() if not weights.read().keys() <= paths]

    def clear(self) -> None:
        """Empty all slots: a mask does not hide NaN."""
        if self.bank is not None:
            self.bank.clear()

    def signed(self, sin: Tensor) -> Tensor:
        """sin [1, T, D] with its first half negated, as [1, T, 1, D]; computed once for all layers of a row."""
        if self._signed is None or self._signed[0] is not sin:
            half = sin.shape[-1] // 2
            self._signed = sin, torch.cat([-sin[..., :half], sin[..., half:]], -1).unsqueeze(2)
        return self._signed[1]

    # --- weights ------------------------------------------------------------------------------------------------------

    def prepack(self) -> None:
        """Convert the weights of the bank and of the head to oneDNN's blocked layout, for a base that only decodes.

        Other layers and the embedding stay unchanged. The head's prepacked weight is an additional copy.
        """
        if self.bank is None:
            return
        self.regroup()
        self.is_prepacked = True
        self.bank.prepack()
        weight = frozen_matrix(self.base) if self.base.head.direct else None  # else the model computes the logits
        self.packed_head = None if weight is None else prepacked(weight)

    @contextmanager
    def unpacked(self) -> Iterator[None]:
        """Give the model its plain weights inside the block, so that its modules can be changed."""
        was_prepacked = self.is_prepacked
        self._unpack()
        try:
            yield
        finally:
            if was_prepacked:
                self.prepack()
            else:
                self.regroup()

    def _unpack(self) -> None:
        self.is_prepacked = False
        if self.bank is not None:
            self.bank.unpack()

    def close(self) -> None:
        """Restore the model bit for bit, and detach from the base. The next engine makes a new FastDecoder."""
        self.ungroup()
        self.held = {}
        if self.base.fast_decoder is self:
            self.base.fast_decoder = None


def unpacked(base: Base) -> AbstractContextManager[None]:
    """Give the model its plain weights inside the block, so that its modules can be changed."""
    return base.fast_decoder.unpacked() if base.fast_decoder else nullcontext()


def scoring(base: Base, adapter: str | None) -> AbstractContextManager[None]:
    """Compute rows in the bank inside the block, those with a KV cache in the stack. The adapter may be held."""
    if base.fast_decoder is None or base.fast_decoder.bank is None:
        return nullcontext()
    if adapter is not None:
        base.fast_decoder.hold({adapter})
    return base.fast_decoder.running()


def _groups(path: str, module: FastModule) -> Iterator[dict[str, nn.Linear]]:
    """The linear layers of an attention or MLP module by path, grouped by input; none if any is of another kind.

    None either if a bias is trained: fusing would move it to other memory than that which the optimizer updates.
    """
    if isinstance(module, FastAttention):
        names = [("q_proj", "k_proj", "v_proj"), ("o_proj",)]
    elif isinstance(module, FastGatedMLP):
        names = [("gate_up_proj",) if hasattr(module, "gate_up_proj") else ("gate_proj", "up_proj"), ("down_proj",)]
    else:
        return
    layers = [{f"{path}.{name}": _plain(getattr(module, name)) for name in group} for group in names]
    linear = [{p: one for p, one in group.items() if type(one) is nn.Linear} for group in layers]
    if linear == layers and not any(
        p.requires_grad for group in linear for one in group.values() for p in one.parameters()
    ):
        yield from linear


def _plain(module: nn.Module) -> nn.Module:
    """The layer inside a LoRALayer, if its adapters are plain low rank; else the module itself."""
    return module.base_layer if isinstance(module, LoRALayer) and module.is_low_rank else module


def adapter_weights(base: Base, adapter: Adapter) -> AdapterWeights:
    """The weights of an adapter in the model, read when they are needed, without layers that are more than low rank."""
    parameters, number = list(adapter.parameters.values()), next(_numbers)

    def read() -> dict[str, Factors]:
        layers = {path: base.model.get_submodule(path) for path in adapter.targets.adapted}
        linear = {path: layer for path, layer in layers.items() if isinstance(layer, LoRALayer)}
        updates = {path: layer.updates[adapter.name] for path, layer in linear.items()}
        matrices = {path: (*update.matrices, update.scaling) for path, update in updates.items() if update.is_low_rank}
        return {path: Factors(A, B.t() * scaling) for path, (A, B, scaling) in matrices.items()}

    def version() -> tuple[int, ...]:
        return (number, *(p._version for p in parameters))

    return AdapterWeights(read, max((len(factors.A_RI) for factors in read().values()), default=0), version)
