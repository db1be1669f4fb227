"""A model all of whose weights are trained, as a folder that transformers loads."""

import copy
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from lorasmith.adapters.folder import end_ids
from lorasmith.data.template.chat_template import named_templates
from lorasmith.data.template.encoding import Template
from lorasmith.loading.folder import read_config
from lorasmith.loading.tokenizer_file import save_tokenizer
from lorasmith.model.base import Base
from lorasmith.system.transformers_logging import quiet_transformers

ONE_FILE = "100000GB"  # transformers' max_shard_size: all weights are in model.safetensors


def set_encoding(
    template: Template, tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig, ends: tuple[int, ...]
) -> None:
    """Let a model that is saved encode as in its training: with the template, system message and stop tokens.

    Where they differ from its own. ends: the tokens that end a reply according to the base model.
    """
    own = named_templates(tokenizer)
    wanted = template.named_as_jinja() if template.tool_text else {"default": template.as_jinja()}
    if any(own.get(name) != text for name, text in wanted.items()):
        tokenizer.chat_template = wanted if template.tool_text else wanted["default"]
    if set(template.stop_ids) != set(ends):
        generation.eos_token_id = list(template.stop_ids)


def write_model(base: Base, template: Template, folder: Path, trust_remote_code: bool = False) -> None:
    """Write the model of `base`, which has no adapters, with its weights as they are now and in its dtype."""
    config = read_config(base.folder, trust_remote_code)  # the loaded one has its dropouts set to 0
    config.dtype = base.dtype
    config.get_text_config().vocab_size = base.model.config.get_text_config().vocab_size  # tokens may have been added
    tokenizer, generation = copy.copy(template.tokenizer), copy.deepcopy(base.model.generation_config)
    assert generation is not None
    set_encoding(template, tokenizer, generation, end_ids(base))
    with quiet_transformers():  # it would show a progress bar
        base.model.save_pretrained(folder, max_shard_size=ONE_FILE)
        config.save_pretrained(folder)
        generation.save_pretrained(folder)
        save_tokenizer(tokenizer, folder)


@torch.no_grad()
def read_model(base: Base, folder: Path, trust_remote_code: bool = False) -> None:
    """Give the model of `base` the weights that `write_model` wrote."""
    with quiet_transformers():
        saved = AutoModelForCausalLM.from_pretrained(
            folder, dtype=base.dtype, local_files_only=True, use_safetensors=True, trust_remote_code=trust_remote_code
        )
    values = dict(saved.named_parameters())
    for name, p in base.model.named_parameters():
        p.copy_(values[name])
