"""Containers of what each adapter adds to a module, by the adapter's name, which may be any text without dots.

nn.ModuleDict and nn.ParameterDict refuse the names of their own attributes, so that an adapter could not be called
`train`, `type` or `update`. These store their items without looking at attributes, and never make them one.
"""

from collections.abc import Iterator

from torch import nn


class ModulesByAdapter(nn.ModuleDict):
    """A ModuleDict that takes any name."""

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Add or replace the module of an adapter."""
        self._modules[name] = module


class ParametersByAdapter(nn.Module):
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
