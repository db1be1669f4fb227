"""Containers of what each adapter adds to a module, by the adapter's name, which may be any text without dots.

nn.ModuleDict and nn.ParameterDict refuse the names of their own attributes, so that an adapter could not be called
`train`, `type` or `update`. These keep items and attributes apart: neither looks at the other.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn


class _Apart(nn.Module):
    """A module whose attributes are never its items: `train()` sets `training`, which may be an adapter's name."""

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


class ModulesByAdapter(_Apart, nn.ModuleDict):
    """A ModuleDict that takes any name."""

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Add or replace the module of an adapter."""
        self._modules[name] = module  # type: ignore[assignment]  # None is allowed


class ParametersByAdapter(_Apart):
    """A dictionary of parameters that takes any name."""

    def __setitem__(self, name: str, parameter: nn.Parameter) -> None:
        self._parameters[name] = parameter

    def __getitem__(self, name: str) -> nn.Parameter:
        parameter = self._parameters[name]
        assert parameter is not None
        return parameter

    def __delitem__(self, name: str) -> None:
        del self._parameters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)
