"""PEFT's names with lorasmith's LoRA: `from lorasmith.peft import ...` in place of `from peft import ...`.

Needs PEFT (the extra `lorasmith[peft]`), whose classes these are subclasses of, so that transformers' Trainer and TRL
accept them. What PEFT has besides LoRA raises by its name when it is used.
"""

try:
    import peft
except ImportError:
    raise ImportError("lorasmith.peft needs PEFT: pip install 'lorasmith[peft]'") from None

from peft import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    EvaConfig,
    LoftQConfig,
    LoraRuntimeConfig,
    NoMatchingPeftModuleError,
    PeftType,
    PeftWarning,
    TaskType,
    cast_mixed_precision_params,
    get_layer_status,
    get_model_status,
    get_peft_model_state_dict,
    load_peft_weights,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)

from lorasmith.peft.config import LoraConfig, PeftConfig
from lorasmith.peft.hotswap import hotswap_adapter
from lorasmith.peft.model import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    get_peft_config,
    get_peft_model,
)
from lorasmith.peft.refused import refused
from lorasmith.peft.tuner import LoraModel

__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING", "AutoPeftModel", "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction", "AutoPeftModelForQuestionAnswering", "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification", "AutoPeftModelForTokenClassification", "EvaConfig", "LoftQConfig",
    "LoraConfig", "LoraModel", "LoraRuntimeConfig", "NoMatchingPeftModuleError", "PeftConfig", "PeftModel",
    "PeftModelForCausalLM", "PeftModelForFeatureExtraction", "PeftModelForQuestionAnswering", "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification", "PeftModelForTokenClassification", "PeftType", "PeftWarning", "TaskType",
    "cast_mixed_precision_params", "get_layer_status", "get_model_status", "get_peft_config", "get_peft_model",
    "get_peft_model_state_dict", "hotswap_adapter", "load_peft_weights", "prepare_model_for_kbit_training",
    "set_peft_model_state_dict",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name in peft.__all__:
        return refused(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
