"""Check that an aLoRA learns from the training examples: each must contain its invocation sequence before a label."""

from collections.abc import Sequence

from lorasmith.config.lora import LoraConfig
from lorasmith.errors import ConfigError
from lorasmith.i18n import _
from lorasmith.lora.alora import first_active
from lorasmith.model.row import Example
from lorasmith.report import Report


def check_invocation(examples: Sequence[Example], config: LoraConfig, report: Report) -> None:
    """Warn about examples from which an aLoRA learns nothing. Raises ConfigError if that is all of them."""
    if config.alora_invocation_tokens is None:
        return
    starts = [first_active(one.whole_ids, config) for one in examples]
    silent = [one for one, start in zip(examples, starts, strict=True) if start >= one.useful_length]
    if len(silent) == len(examples):
        raise ConfigError(
            _(
                "lora.alora_invocation_tokens: no example has the tokens {tokens} before what is trained on, so "
                "there is nothing to learn. Give the ids of a sequence that each prompt ends with, such as the "
                "beginning of the answer in the chat template: tokenizer.encode(text, add_special_tokens=False).",
                tokens=list(config.alora_invocation_tokens),
            )
        )
    if silent:
        report.warn(
            _(
                "lora.alora_invocation_tokens: {count} of {total} examples do not have these tokens before what is "
                "trained on, such as {source}; the adapter learns nothing from them.",
                count=len(silent),
                total=len(examples),
                source=silent[0].source,
            )
        )
