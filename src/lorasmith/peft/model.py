"""PEFT's functions and classes that make a PeftModel, for our LoraConfig."""

import os
from typing import Any

import peft
from peft import get_peft_model as make_peft_model
from torch import nn

from lorasmith.lora.update import Update
from lorasmith.lora.variant import variant_of
from lorasmith.peft.config import LoraConfig, PeftConfig, core_config, own_config
from lorasmith.peft.refused import unsupported
from lorasmith.peft.tuner import LoraModel

TASKS = (
    "CausalLM", "Seq2SeqLM", "SequenceClassification", "TokenClassification", "QuestionAnswering", "FeatureExtraction",
)  # fmt: skip


class _OfOurs(type):
    """isinstance is true for every PEFT model of this task whose LoRA is ours, such as those that TRL makes."""

    def __instancecheck__(cls, instance: Any) -> bool:
        theirs = cls.__mro__[1]
        return isinstance(instance, theirs) and isinstance(getattr(instance, "base_model", None), LoraModel)


class PeftModel(peft.PeftModel, metaclass=_OfOurs):
    """PEFT's PeftModel with lorasmith's LoRA. `from_pretrained` returns the class of the adapter's task."""

    def __init__(self, model: nn.Module, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, own_config(peft_config), *args, **kwargs)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the rest of PEFT's parameters is passed on
        cls, model: nn.Module, model_id: str | os.PathLike[str], adapter_name: str = "default",
        is_trainable: bool = False, config: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Load the adapter folder `model_id` onto `model`. Raises AdapterError if tensors are missing or unknown."""
        if config is None:
            given = {key: kwargs[key] for key in ("subfolder", "revision", "cache_dir", "token") if key in kwargs}
            config = PeftConfig.from_pretrained(str(model_id), **given)
        config = own_config(config)
        if variant_of(core_config(config)) is not Update:  # what a variant starts from is computed from the weights
            kwargs["low_cpu_mem_usage"] = False
        return super().from_pretrained(model, str(model_id), adapter_name, is_trainable, config, **kwargs)


def _of_task(task: str) -> Any:
    """Our class of a task: PEFT's, with our PeftModel between it and PEFT's PeftModel."""
    theirs = getattr(peft, f"PeftModelFor{task}")
    return _OfOurs(theirs.__name__, (theirs, PeftModel), {"__doc__": theirs.__doc__, "__module__": "lorasmith.peft"})


def _auto(name: str, target: Any) -> Any:
    """The class that loads the base model that an adapter folder names, and the adapter onto it."""
    return type(name, (getattr(peft, name),), {"_target_peft_class": target, "__module__": "lorasmith.peft"})


BY_TASK: dict[str, Any] = {f"PeftModelFor{task}": _of_task(task) for task in TASKS}
BY_TASK |= {f"Auto{name}": _auto(f"Auto{name}", kind) for name, kind in (*BY_TASK.items(), ("PeftModel", PeftModel))}


def get_peft_model(model: nn.Module, peft_config: Any, adapter_name: str = "default", mixed: bool = False,
                   **kwargs: Any) -> Any:  # fmt: skip
    """Add a new adapter to `model`, which is changed in place, and return it as a PeftModel.

    Raises ConfigError or AdapterError that names everything in the config that matches nothing or is not supported.
    """
    if mixed:
        raise unsupported("get_peft_model(mixed=True)")
    return make_peft_model(model, own_config(peft_config), adapter_name, **kwargs)


def get_peft_config(config_dict: dict[str, Any]) -> LoraConfig:
    """The LoraConfig with these options."""
    config = PeftConfig.from_peft_type(**config_dict)
    config.from_file = False
    return config
