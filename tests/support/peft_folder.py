"""Adapter folders as PEFT writes them."""

from pathlib import Path
from typing import Any

import peft
from transformers import AutoModelForCausalLM

from lorasmith.system.transformers_logging import quiet_transformers
from tests.support.tiny import model_folder


def peft_folder(folder: Path, **options: Any) -> Path:
    """An adapter of the tiny base with random weights, in `folder`."""
    with quiet_transformers():  # a bar on stderr, which tests read
        model = AutoModelForCausalLM.from_pretrained(model_folder())
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **({"r": 4} | options))
    peft.get_peft_model(model, config).save_pretrained(folder)
    return folder
