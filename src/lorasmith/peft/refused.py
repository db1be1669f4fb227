"""PEFT's other names: those that work as they are, and those that can be imported but raise when they are used."""

from enum import Enum
from typing import Any

import peft

from lorasmith.errors import ConfigError
from lorasmith.i18n import _

AS_IN_PEFT = (
    "EvaConfig", "LoftQConfig", "LoraRuntimeConfig", "NoMatchingPeftModuleError", "PeftType", "PeftWarning", "TaskType",
    "cast_mixed_precision_params", "get_layer_status", "get_model_status", "get_peft_model_state_dict",
    "load_peft_weights", "prepare_model_for_kbit_training", "set_peft_model_state_dict",
)  # fmt: skip


class _Refused:
    """In place of a class or function of PEFT. No object is an instance of it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        raise unsupported(cls.__name__)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Raise ConfigError, like the constructor."""
        return cls()


def unsupported(name: str) -> ConfigError:
    """The error for a name or option of PEFT that lorasmith.peft does not have."""
    return ConfigError(_("{name} is not supported by lorasmith.peft. Use peft itself for it.", name=name))


def as_in_peft(name: str) -> Any:
    """PEFT's own object of this name, or a class that raises ConfigError if it is used."""
    theirs = getattr(peft, name, None)
    if theirs is None or name.startswith("_"):
        raise AttributeError(f"module 'lorasmith.peft' has no attribute {name!r}")
    is_constant = isinstance(theirs, dict) or (isinstance(theirs, type) and issubclass(theirs, Enum | BaseException))
    return theirs if name in AS_IN_PEFT or is_constant else type(name, (_Refused,), {"__doc__": theirs.__doc__})
