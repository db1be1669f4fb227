"""PEFT's names with lorasmith's LoRA: `from lorasmith.peft import ...` in place of `from peft import ...`.

Needs PEFT (the extra `lorasmith[peft]`), whose classes these are subclasses of, so that transformers' Trainer and TRL
accept them. What PEFT has besides LoRA raises by its name when it is used.
"""

from typing import Any

try:
    from peft.utils.hotswap import hotswap_adapter
except ImportError:
    raise ImportError("lorasmith.peft needs PEFT. Install it with: pip install 'lorasmith[peft]'") from None

from lorasmith.peft.config import LoraConfig, PeftConfig
from lorasmith.peft.model import BY_TASK, PeftModel, get_peft_config, get_peft_model
from lorasmith.peft.refused import AS_IN_PEFT, as_in_peft
from lorasmith.peft.starts import get_eva_state_dict, initialize_lora_eva_weights, replace_lora_weights_loftq
from lorasmith.peft.tuner import LoraModel

__all__ = [
    "LoraConfig", "LoraModel", "PeftConfig", "PeftModel", "get_eva_state_dict", "get_peft_config", "get_peft_model",
    "hotswap_adapter", "initialize_lora_eva_weights", "replace_lora_weights_loftq", *BY_TASK, *AS_IN_PEFT,
]  # fmt: skip


def __getattr__(name: str) -> Any:
    return BY_TASK[name] if name in BY_TASK else as_in_peft(name)
