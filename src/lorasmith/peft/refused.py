"""The names of PEFT that lorasmith.peft does not implement: they can be imported, and raise when they are used."""

from enum import Enum
from typing import Any

import peft

from lorasmith.errors import ConfigError
from lorasmith.i18n import _


class _Refused:
    """In place of a class or function of PEFT. No object is an instance of it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        raise ConfigError(
            _("{name} is not supported by lorasmith.peft. Import it from peft itself.", name=cls.__name__)
        )

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Raise ConfigError, like the constructor."""
        return cls()


def refused(name: str) -> Any:
    """What stands for `name`: PEFT's own constant, enumeration or exception, or a class that raises ConfigError."""
    theirs = getattr(peft, name)
    if isinstance(theirs, dict) or (isinstance(theirs, type) and issubclass(theirs, Enum | BaseException)):
        return theirs
    return type(name, (_Refused,), {"__doc__": theirs.__doc__})
