"""Rows of a batch that use different adapters, when the model itself is called: each layer routes its own input.

    x [B, T, I], or flattened [B*T, I]: row b uses `adapters[b]`, in its last `last[b]` tokens

The encoder, the decoder and the head may see different numbers of tokens of a row, and beam search several copies of
it. So each layer counts the tokens that it gets; there may be any number of them for each named row.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lorasmith.errors import ConfigError
from lorasmith.i18n import _
from lorasmith.lora.inject import Wrapper
from lorasmith.lora.router import Router

ALL = -1  # in `last`: all tokens of the row


class RowRouting:
    """Routes the rows of each forward pass inside `block`, and of its layers that backward computes again."""

    def __init__(self, model: nn.Module, router: Router) -> None:
        self.model, self.router = model, router
        self._handles: list[RemovableHandle] = []
        self._inside = self._recomputed = False

    @contextmanager
    def block(self, adapters: Sequence[str | None], last: Sequence[int]) -> Iterator[None]:
        """Compute row b with adapters[b] in its last last[b] tokens; None is the base model.

        Raises ConfigError if LoRA is on experts, which see the tokens of all rows in one. Raises ValueError if a layer
        gets a number of rows that is no multiple of that of the adapters, or if an earlier forward pass with gradient
        checkpointing still waits for its backward pass, which would use these rows too.
        """
        if self._handles and not self._recomputed:
            self.close()
            raise ValueError(
                _(
                    "with gradient checkpointing, rows of an aLoRA need a backward pass after each forward pass. Turn "
                    "gradient checkpointing off, or evaluate under torch.no_grad()."
                )
            )
        self.close()
        layers = {path: module for path, module in self.model.named_modules() if isinstance(module, Wrapper)}
        if experts := [path for path in layers if "experts" in path.split(".")]:
            raise ConfigError(
                _(
                    "{path} belongs to experts, which see the tokens of all rows in one, so rows cannot use different "
                    "adapters or an aLoRA. Leave it out, or compute the rows of one adapter at a time.",
                    path=experts[0],
                )
            )
        self._inside, self._recomputed = True, False
        for path, layer in layers.items():
            hook = partial(self._route, adapters, last, path)
            self._handles.append(layer.register_forward_pre_hook(hook))
        kept = False
        try:
            yield
            kept = torch.is_grad_enabled() and self.model.training and self._checkpoints
        finally:
            self._inside = False
            self.router.route(None)
            if not kept:
                self.close()

    def close(self) -> None:
        """Stop routing."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @property
    def _checkpoints(self) -> bool:
        return any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules())

    def _route(
        self, adapters: Sequence[str | None], last: Sequence[int], path: str, _layer: nn.Module, args: tuple[Any, ...]
    ) -> None:
        """Before a layer: set the slices of its input."""
        self._recomputed |= not self._inside
        x = args[0]
        total = x.numel() // x.shape[-1] if x.is_floating_point() else x.numel()
        check_rows(len(x), len(adapters), path)
        tokens = total // len(adapters)
        slices: list[tuple[str | None, int, int]] = []
        for row, (adapter, active) in enumerate(zip(adapters, last, strict=True)):
            end = (row + 1) * tokens
            first = row * tokens if active == ALL else max(row * tokens, end - active)
            for name, start, stop in ((None, row * tokens, first), (adapter, first, end)):
                if slices and slices[-1][0] == name:
                    start = slices.pop()[1]
                slices += [(name, start, stop)] if start < stop else []
        if torch.is_grad_enabled():  # an adapter that no token uses gets a gradient of zeros, as in PEFT
            slices += [(name, total, total) for name in dict.fromkeys(adapters) if name not in {s[0] for s in slices}]
        self.router.route(slices, stacked=total == len(x) and not torch.is_grad_enabled())


def check_rows(rows: int, names: int, path: str) -> None:
    """Raise ValueError unless each of the named adapters can have equally many of these rows."""
    if rows % names:
        raise ValueError(
            _(
                "adapter_names: {path} gets {rows} rows, but {count} adapters are named. Name one for each row.",
                path=path,
                rows=rows,
                count=names,
            )
        )
