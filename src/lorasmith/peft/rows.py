"""A batch whose rows use different adapters: `adapter_names=` of forward and generate."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper

from lorasmith.errors import ConfigError
from lorasmith.i18n import _, listed
from lorasmith.lora.inject import adapters_of
from lorasmith.lora.router import Router
from lorasmith.peft.layers import LAYERS, layers_of

BASE = "__base__"  # PEFT's name of the base model in adapter_names


@contextmanager
def route_rows(tuner: Any, names: Sequence[str]) -> Iterator[None]:
    """Compute each row with its adapter inside the block.

    Each LoRA layer sets the slices for its own input, as the encoder, the decoder and the head may see different
    numbers of tokens of a row, and beam search several copies of it.

    Raises ValueError for unknown adapters and in training, ConfigError if a layer does not see the rows apart.
    """
    _refuse(tuner, names)
    router, handles = tuner.router, []
    try:
        for path, module in tuner.model.named_modules():
            if isinstance(module, LAYERS):
                handles.append(module.register_forward_pre_hook(_Slices(router, names, path)))
            elif isinstance(module, AuxiliaryTrainingWrapper):
                handles.append(module.register_forward_pre_hook(_Names(names), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        router.route(None)


def _refuse(tuner: Any, names: Sequence[str]) -> None:
    if tuner.training:
        raise ValueError(_("adapter_names is for inference. Call model.eval() first."))
    layers = dict(layers_of(tuner.model))
    known = {name for layer in layers.values() for name in adapters_of(layer)}
    if unknown := sorted(set(names) - known - {BASE}):
        raise ValueError(_("adapter_names: there is no adapter {names}.", names=listed(unknown)))
    if tuner.merged_names:
        raise ValueError(_("adapter_names: an adapter is merged. Call unmerge_adapter first."))
    if experts := [path for path in layers if "experts" in path.split(".")]:
        raise ConfigError(
            _(
                "adapter_names: {path} is an expert, which sees the tokens of all rows in one. Compute the rows of one "
                "adapter at a time.",
                path=experts[0],
            )
        )


class _Slices:
    """A hook that sets the slices of one layer's input."""

    def __init__(self, router: Router, names: Sequence[str], path: str) -> None:
        self.router, self.names, self.path = router, names, path

    def __call__(self, layer: Any, args: tuple[Any, ...]) -> None:
        x = args[0]
        names = _per_row(self.names, len(x), self.path)
        tokens = (x.numel() // x.shape[-1] if x.is_floating_point() else x.numel()) // len(x)
        slices: list[tuple[str | None, int, int]] = []
        for i, name in enumerate(names):
            adapter = None if name == BASE else name
            if slices and slices[-1][0] == adapter:
                slices[-1] = (adapter, slices[-1][1], (i + 1) * tokens)
            else:
                slices.append((adapter, i * tokens, (i + 1) * tokens))
        self.router.route(slices, stacked=tokens == 1 and not torch.is_grad_enabled())


class _Names:
    """A hook that passes the rows' adapters to a module that PEFT trains in full."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        rows = len(args[0]) if args else len(self.names)
        return args, kwargs | {"adapter_names": _per_row(self.names, rows, type(module).__name__)}


def _per_row(names: Sequence[str], rows: int, place: str) -> list[str]:
    """The adapter of each of these rows, which are `names` with each repeated equally often."""
    if rows % len(names):
        raise ValueError(
            _(
                "adapter_names: {place} gets {rows} rows, but {count} adapters are named, which must be one for each "
                "row.",
                place=place,
                rows=rows,
                count=len(names),
            )
        )
    return [name for name in names for _copy in range(rows // len(names))]
