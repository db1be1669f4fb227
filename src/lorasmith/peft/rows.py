"""A batch whose rows use different adapters (`adapter_names=`), or an aLoRA from some token on (`alora_offsets=`)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper

from lorasmith.i18n import _, listed
from lorasmith.lora.adapted import layers_of
from lorasmith.lora.inject import adapters_of
from lorasmith.lora.rows import ALL, check_rows

BASE = "__base__"  # PEFT's name of the base model in adapter_names


@contextmanager
def route_rows(tuner: Any, names: Sequence[str] | None, offsets: Sequence[int | None] | None) -> Iterator[None]:
    """Compute each row with its adapter inside the block; without names, with the active one.

    offsets: the number of tokens at the end of each row in which an aLoRA is active; None is none of them.

    Raises ValueError for unknown adapters and in training; see `RowRouting.block` for others.
    """
    if names is not None:
        _refuse(tuner, names)
    rows: list[str | None] = list(names or [tuner.router.active] * len(offsets or [None]))
    last = [(n or 0) if name in tuner.router.partial else ALL
            for name, n in zip(rows, offsets or [None] * len(rows), strict=True)]  # fmt: skip
    handles = [module.register_forward_pre_hook(partial(_name, names, path), with_kwargs=True)
               for path, module in tuner.model.named_modules()
               if isinstance(module, AuxiliaryTrainingWrapper) and names is not None]  # fmt: skip
    try:
        with tuner.rows.block([None if name == BASE else name for name in rows], last):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _refuse(tuner: Any, names: Sequence[str]) -> None:
    known = {name for _path, layer in layers_of(tuner.model) for name in adapters_of(layer)}
    if tuner.training:
        raise ValueError(_("adapter_names is for inference. Call model.eval() first."))
    if unknown := sorted(set(names) - known - {BASE}):
        raise ValueError(_("adapter_names: there is no adapter {names}.", names=listed(unknown)))
    if tuner.merged_names:
        raise ValueError(_("adapter_names: an adapter is merged. Call unmerge_adapter first."))


def _name(names: Sequence[str], path: str, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Before a module that PEFT trains in full: name the adapters of its rows."""
    check_rows(len(args[0]), len(names), path)
    return args, kwargs | {"adapter_names": [name for name in names for _copy in range(len(args[0]) // len(names))]}
