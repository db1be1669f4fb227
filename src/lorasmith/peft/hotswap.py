"""Replacing the weights of an adapter by those of another one, without adding layers: PEFT's own functions."""

from peft import PeftType
from peft.utils.hotswap import CONFIG_KEYS_TO_CHECK, hotswap_adapter, hotswap_adapter_from_state_dict

from lorasmith.peft.config import Kind

__all__ = ["hotswap_adapter", "hotswap_adapter_from_state_dict"]

CONFIG_KEYS_TO_CHECK[Kind.LORA] = CONFIG_KEYS_TO_CHECK[PeftType.LORA]
