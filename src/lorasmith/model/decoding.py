"""What the engine needs of a model beside its own forward: layers in groups, and columns for the adapters in use."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

from torch import nn

from lorasmith.lora.fused.bank import AdapterBank, AdapterWeights, BankedLinears, Factors
from lorasmith.lora.fused.products import prepacked
from lorasmith.lora.inject import Adapter
from lorasmith.lora.layer import LoRALayer
from lorasmith.model.base import Base
from lorasmith.model.fast import Fast, FastAttention, FastGatedMLP
from lorasmith.model.head import frozen_matrix
from lorasmith.model.stack import Stack

_numbers = count()  # no two adapters have the same, as two of the same id() may


@contextmanager
def decoding(base: Base, bank: AdapterBank | None, stack: Stack | None) -> Iterator[None]:
    """Within it the model computes in groups of layers, or as a stack: without gradient."""
    if bank is not None:
        bank.on = True
    base.stack = stack
    try:
        yield
    finally:
        base.stack = None
        if bank is not None:
            bank.on = False


@contextmanager
def held(base: Base, adapter: str | None) -> Iterator[None]:
    """Within it rows without a cache compute in groups of layers, with an adapter that need not be in the model."""
    if base.bank is None:
        yield
        return
    if adapter is not None:
        if adapter not in base.ranks:
            regroup(base, base.bank)  # it may have put modules of its own in the model
        ranks = base.ranks.get(adapter) or weights_of(base, base.adapters[adapter])
        base.bank.hold(adapter, ranks, {adapter})
    with decoding(base, base.bank, None):
        yield


def prepack(base: Base) -> None:
    """Keep the weights of the groups and of the head as oneDNN reads them: for a base that only decodes from now on.

    Layers outside of groups, and the embedding, stay as they are. The head's is one matrix more in memory.
    """
    if base.bank is not None:
        regroup(base, base.bank)
        base.bank.prepack()
        weight = frozen_matrix(base) if base.head.direct else None  # else the model computes its logits itself
        base.packed_head = None if weight is None else prepacked(weight)


@contextmanager
def unpacked(base: Base) -> Iterator[None]:
    """Within it the model has its plain weights, for what changes its modules."""
    was_prepacked = base.bank is not None and base.bank.is_prepacked
    if base.bank is not None:
        base.bank.unpack()
    try:
        yield
    finally:
        if was_prepacked:
            prepack(base)
        elif base.bank is not None:
            regroup(base, base.bank)


def bank_of(base: Base) -> AdapterBank:
    """Group the layers of recognised modules that get the same input. Other layers stay as they are."""
    fast = {path: module for path, module in base.model.named_modules() if isinstance(module, Fast)}
    whole = {path for path in fast if {"original_module", "modules_to_save"} & set(path.split("."))}
    bank = AdapterBank(
        base.router, [group for path in fast if path not in whole for group in _groups(path, fast[path])]
    )
    regroup(base, bank)
    return bank


def regroup(base: Base, bank: AdapterBank) -> None:
    """Let modules compute in their groups, and the head as it was prepacked, but for what adapters in the model made
    something else: they train it whole, or the head has LoRA.
    """
    modules = dict(base.model.named_modules())
    groups: dict[str, list[BankedLinears]] = {}
    for group in bank.groups:
        groups.setdefault(next(iter(group.layers)).rpartition(".")[0], []).append(group)
    paths: list[str] = []
    for path, module in modules.items():
        if isinstance(module, Fast):
            own = groups.get(path, [])
            layers = {p: layer for group in own for p, layer in group.layers.items()}
            are_there = all(p in modules and _plain(modules[p]) is layer for p, layer in layers.items())
            module.bank, module.banked = bank, tuple(own) if are_there else ()
            paths += layers if are_there else ()
    bank.paths = frozenset(paths)
    if frozen_matrix(base) is None:  # the head has an adapter now
        base.packed_head = None


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
    """The changes of an adapter that is on the model; as they are when they are read."""
    parameters, number = list(adapter.parameters.values()), next(_numbers)

    def read() -> dict[str, Factors]:
        layers = {path: base.model.get_submodule(path) for path in adapter.targets.adapted}
        linear = {path: layer for path, layer in layers.items() if isinstance(layer, LoRALayer)}
        updates = {path: layer.updates[adapter.name] for path, layer in linear.items()}
        matrices = {path: (*update.matrices, update.scaling) for path, update in updates.items() if update.is_low_rank}
        return {path: Factors(A, B.t() * scaling) for path, (A, B, scaling) in matrices.items()}

    def version() -> tuple[int, ...]:
        return (number, *(p._version for p in parameters))

    return AdapterWeights(read, max((len(change.A_RI) for change in read().values()), default=0), version)
