"""Adapter folders as PEFT writes them."""

import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from lorasmith.system.transformers_logging import quiet_transformers
from tests.support.tiny import model_folder

SHOUTED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role | upper + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>ASSISTANT\n' }}{% endif %}"
)


def peft_folder(folder: Path, **options: Any) -> Path:
    """An adapter of the tiny base with random weights, in `folder`."""
    with quiet_transformers():  # a bar on stderr, which tests read
        model = AutoModelForCausalLM.from_pretrained(model_folder())
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **({"r": 4} | options))
    peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


def tokenizer_with(family: str, *added: str) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model_folder(family))
    tokenizer.add_tokens(list(added), special_tokens=True)
    return tokenizer


def foreign(folder: Path, family: str, added: tuple[str, ...] = ("<|a|>", "<|b|>"), **options: Any) -> Any:
    """A model of PEFT with added tokens, with random weights; it is saved in `folder` beside its tokenizer."""
    tokenizer = tokenizer_with(family, *added)
    with quiet_transformers(), torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_pretrained(model_folder(family), dtype=torch.float32)
        if added:
            model.resize_token_embeddings(len(tokenizer))
        config = peft.LoraConfig(task_type="CAUSAL_LM", **({"r": 4, "target_modules": ["q_proj"]} | options))
        theirs = peft.get_peft_model(model, config)
        for p in theirs.parameters():
            if p.requires_grad:
                p.data += torch.randn(p.shape) * 0.2
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return theirs.eval()
