"""What decodes a base faster than its own modules: the adapter bank, the decoder stack and packed weights.

A base has one Decoder, in `base.decoding`: the engine makes and tries it (decoder_of in engine/self_test.py), serving
and scoring ask it, and `close` throws it away whole. It changes nothing of the model but two attributes that Fast
modules have for it and, while it is prepacked, the weights.
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
from lorasmith.model.fast import Fast, FastAttention, FastGatedMLP
from lorasmith.model.head import frozen_matrix
from lorasmith.model.stack import DecoderStack, stack_of

_numbers = count()  # no two adapters have the same, as two of the same id() may


class Decoder:
    """As it is made it does nothing, and all layers compute by their own modules, the oracle.

    `problem`: why the model cannot decode in flat rows with a cache; None where it can. `plain`: why its layers are not
    in the adapter bank, though it can; empty where they are. `held`: adapters that are not in the model, by name (see
    lora/fused/held.py).
    """

    def __init__(self, base: Base, problem: str | None = None) -> None:
        self.base, self.problem, self.plain = base, problem, ""
        self.bank: AdapterBank | None = None
        self.held: dict[str, AdapterWeights] = {}
        self.packed_head: Tensor | None = None  # its weight as oneDNN reads it, while the head is nothing else
        self.is_on, self.is_prepacked = False, False  # on: Fast modules look here only within `running`
        self.stack: DecoderStack | None = None  # what runs instead of the decoder, within `running`
        self.has_stack = False  # all layers run as one, unless an adapter in the model makes some something else
        self._found_stack: DecoderStack | None = None
        self._known: dict[str, tuple[Adapter, AdapterWeights]] = {}
        self._signed: tuple[Tensor, Tensor] | None = None

    def group(self, as_stack: bool) -> None:
        """Put the layers of recognised modules that get the same input into the bank; other layers stay as they are.

        as_stack: run all of the decoder as one, if it is built like a stack.
        """
        if self.bank is None:
            fast = {path: module for path, module in self.base.model.named_modules() if isinstance(module, Fast)}
            whole = {path for path in fast if {"original_module", "modules_to_save"} & set(path.split("."))}
            groups = [group for path in fast if path not in whole for group in _groups(path, fast[path])]
            self.bank = AdapterBank(self.base.router, groups)
        self.has_stack = as_stack
        self.regroup()
        self.has_stack = self._found_stack is not None

    def regroup(self) -> None:
        """Let modules compute in the bank, and the head as it was prepacked, but for what adapters in the model made
        something else: they train it whole, add more than plain low rank, or the head has LoRA.
        """
        if self.bank is None:
            return
        modules = dict(self.base.model.named_modules())
        groups: dict[str, list[BankedLinears]] = {}
        for group in self.bank.groups:
            groups.setdefault(next(iter(group.layers)).rpartition(".")[0], []).append(group)
        paths: list[str] = []
        for path, module in modules.items():
            if isinstance(module, Fast):
                own = groups.get(path, [])
                layers = {p: layer for group in own for p, layer in group.layers.items()}
                are_there = all(p in modules and _plain(modules[p]) is layer for p, layer in layers.items())
                module.decoder, module.banked = self, tuple(own) if are_there else ()
                paths += layers if are_there else ()
        self.bank.paths = frozenset(paths)
        self._found_stack = stack_of(self.base) if self.has_stack else None
        if frozen_matrix(self.base) is None:  # the head has an adapter now
            self.packed_head = None

    def ungroup(self) -> None:
        """Let all layers compute by their own modules again, with their own weights."""
        self._unpack()
        for module in self.base.model.modules():
            if isinstance(module, Fast) and module.decoder is self:
                module.decoder, module.banked = None, ()
        self.bank = self.packed_head = self._found_stack = None
        self.has_stack, self._known = False, {}

    # --- decoding -----------------------------------------------------------------------------------------------------

    @contextmanager
    def running(self, as_stack: bool = True) -> Iterator[None]:
        """Within it the model computes in the bank and, with a cache, as a stack: without gradient."""
        self.is_on, self.stack = self.bank is not None, self._found_stack if as_stack else None
        try:
            yield
        finally:
            self.is_on, self.stack, self._signed = False, None, None

    def weights(self, name: str) -> AdapterWeights:
        """What an adapter adds in the bank, whether it is in the model or held."""
        if name in self.held:
            return self.held[name]
        adapter = self.base.adapters[name]
        if name not in self._known or self._known[name][0] is not adapter:
            known = {old: pair for old, pair in self._known.items() if self.base.adapters.get(old) is pair[0]}
            self._known = known | {name: (adapter, weights_of(self.base, adapter))}
            self.regroup()  # it may have put modules of its own in the model
        return self._known[name][1]

    def hold(self, names: Collection[str]) -> None:
        """Give these adapters their slots in the bank."""
        for name in sorted(names):
            weights = self.weights(name)
            if self.bank is not None:
                self.bank.hold(name, weights, names)

    def holds(self, names: Collection[str]) -> bool:
        """Whether all of them have their slots, or need none."""
        return self.bank is None or self.bank.has(names)

    def drop(self, name: str) -> bool:
        """Free the slot of an adapter, and forget it if it is held; whether it was."""
        if self.bank is not None:
            self.bank.drop(name)
        return self.held.pop(name, None) is not None

    def lost(self) -> list[str]:
        """Paths of layers that held adapters change and that are no longer in the bank: these would not be computed."""
        paths = self.bank.paths if self.bank is not None else frozenset[str]()
        return [path for weights in self.held.values() for path in weights.read() if path not in paths]

    def clear(self) -> None:
        """Empty all slots: what is no number is not hidden by a mask."""
        if self.bank is not None:
            self.bank.clear()

    def signed(self, sin: Tensor) -> Tensor:
        """[-first half, second half] of sin [1, T, D] as [1, T, 1, D], made once for all layers of a row."""
        if self._signed is None or self._signed[0] is not sin:
            half = sin.shape[-1] // 2
            self._signed = sin, torch.cat([-sin[..., :half], sin[..., half:]], -1).unsqueeze(2)
        return self._signed[1]

    # --- weights ------------------------------------------------------------------------------------------------------

    def prepack(self) -> None:
        """Keep the weights in the bank and of the head as oneDNN reads them: for a base that only decodes from now on.

        Layers outside of the bank, and the embedding, stay as they are. The head's is one matrix more in memory.
        """
        if self.bank is None:
            return
        self.regroup()
        self.is_prepacked = True
        self.bank.prepack()
        weight = frozen_matrix(self.base) if self.base.head.direct else None  # else the model computes its own logits
        self.packed_head = None if weight is None else prepacked(weight)

    @contextmanager
    def unpacked(self) -> Iterator[None]:
        """Within it the model has its plain weights, for what changes its modules."""
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
        """Give the model back as it was, bit for bit; who asks `base.decoding` next gets a new one."""
        self.ungroup()
        self.held = {}
        if self.base.decoding is self:
            self.base.decoding = None


def unpacked(base: Base) -> AbstractContextManager[None]:
    """Within it the model has its plain weights, for what changes its modules."""
    return base.decoding.unpacked() if base.decoding else nullcontext()


def scoring(base: Base, adapter: str | None) -> AbstractContextManager[None]:
    """Within it rows without a cache compute in the bank, with an adapter that need not be in the model."""
    if base.decoding is None or base.decoding.bank is None:
        return nullcontext()
    if adapter is not None:
        base.decoding.hold({adapter})
    return base.decoding.running(as_stack=False)


def _groups(path: str, module: Fast) -> Iterator[dict[str, nn.Linear]]:
    """The plain linear layers of an attention or an MLP, by path, if it has no others; q, k and v first."""
    if isinstance(module, FastAttention):
        names = [("q_proj", "k_proj", "v_proj"), ("o_proj",)]
    elif isinstance(module, FastGatedMLP):
        names = [("gate_up_proj",) if hasattr(module, "gate_up_proj") else ("gate_proj", "up_proj"), ("down_proj",)]
    else:
        return
    layers = [{f"{path}.{name}": _plain(getattr(module, name)) for name in group} for group in names]
    linear = [{p: one for p, one in group.items() if type(one) is nn.Linear} for group in layers]
    if linear == layers:
        yield from linear


def _plain(module: nn.Module) -> nn.Module:
    """What a LoRALayer wraps whose adapters are plain low rank; anything else, such as a trained copy, as it is."""
    return module.base_layer if isinstance(module, LoRALayer) and module.is_low_rank else module


def weights_of(base: Base, adapter: Adapter) -> AdapterWeights:
    """What an adapter that is on the model adds, as it is when it is read: nothing where it is more than low rank."""
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
