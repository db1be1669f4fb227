"""A batch whose rows use different adapters: `adapter_names=` of forward and generate."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
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
    handles = []
    try:
        for path, module in tuner.model.named_modules():
            if isinstance(module, LAYERS):
                handles.append(module.register_forward_pre_hook(partial(_route, tuner.router, names, path)))
            elif isinstance(module, AuxiliaryTrainingWrapper):
                handles.append(module.register_forward_pre_hook(partial(_name, names, path), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        tuner.router.route(None)


def _refuse(tuner: Any, names: Sequence[str]) -> None:
    layers = dict(layers_of(tuner.model))
    known = {name for layer in layers.values() for name in adapters_of(layer)}
    if tuner.training:
        raise ValueError(_("adapter_names is for inference. Call model.eval() first."))
    if unknown := sorted(set(names) - known - {BASE}):
        raise ValueError(_("adapter_names: there is no adapter {names}.", names=listed(unknown)))
    if tuner.merged_names:
        raise ValueError(_("adapter_names: an adapter is merged. Call unmerge_adapter first."))
    if experts := [path for path in layers if "experts" in path.split(".")]:
        raise ConfigError(
            _(
                "adapter_names: {path} belongs to experts, which see the tokens of all rows in one. Compute the rows "
                "of one adapter at a time.",
                path=experts[0],
            )
        )


def _route(router: Router, names: Sequence[str], path: str, layer: Any, args: tuple[Any, ...]) -> None:
    """Before a LoRA layer: set the slices of its input."""
    x = args[0]
    tokens = (x.numel() // x.shape[-1] if x.is_floating_point() else x.numel()) // len(x)
    slices: list[tuple[str | None, int, int]] = []
    for i, name in enumerate(_per_row(names, len(x), path)):
        adapter = None if name == BASE else name
        start = slices.pop()[1] if slices and slices[-1][0] == adapter else i * tokens
        slices.append((adapter, start, (i + 1) * tokens))
    router.route(slices, stacked=tokens == 1 and not torch.is_grad_enabled())


def _name(names: Sequence[str], path: str, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Before a module that PEFT trains in full: name the adapters of its rows."""
    return args, kwargs | {"adapter_names": _per_row(names, len(args[0]), path)}


def _per_row(names: Sequence[str], rows: int, path: str) -> list[str]:
    """The adapter of each of these rows, which are `names` with each repeated equally often."""
    if rows % len(names):
        raise ValueError(
            _(
                "adapter_names: {path} gets {rows} rows, but {count} adapters are named. Name one for each row.",
                path=path,
                rows=rows,
                count=len(names),
            )
        )
    return [name for name in names for _copy in range(rows // len(names))]
