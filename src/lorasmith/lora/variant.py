"""The variants of LoRA, by the flag of PEFT's LoraConfig that asks for each.

To add one: a subclass of Update in a file of its own, a line here, and the flag among the options of config/lora.py.
"""

from torch import nn

from lorasmith.config.lora import LoraConfig
from lorasmith.errors import AdapterError, ConfigError
from lorasmith.i18n import _
from lorasmith.lora.dora import DoRA
from lorasmith.lora.update import Update

VARIANTS: dict[str, type[Update]] = {
    "use_dora": DoRA,
}


def flags_of(config: LoraConfig) -> list[str]:
    """The flags of VARIANTS that are set."""
    return [flag for flag in VARIANTS if getattr(config, flag, False)]


def variant_of(config: LoraConfig) -> type[Update]:
    """What an adapter with this config adds to a layer. Raises ConfigError where it asks for two variants at once."""
    flags = flags_of(config)
    if len(flags) > 1:
        raise ConfigError(
            _("lora.{first} and lora.{second} exclude each other. Choose one.", first=flags[0], second=flags[1])
        )
    return VARIANTS[flags[0]] if flags else Update


def misplaced(config: LoraConfig, layers: dict[str, nn.Module]) -> list[str]:
    """Why the variant cannot go on some of these layers, by path; plain LoRA goes on all of them."""
    variant, problems = variant_of(config), []
    if variant is Update:
        return []
    for path, layer in layers.items():
        if isinstance(layer, nn.Embedding):
            problems.append(
                _(
                    "lora.{flag}: {path} is an embedding, and this variant goes on linear layers only. Leave it out.",
                    flag=flags_of(config)[0],
                    path=path,
                )
            )
        elif problem := variant.problem(layer):
            problems.append(f"lora.{flags_of(config)[0]}: {path}: {problem}")
    return problems


def refuse_unknown(kind: type[Update]) -> None:
    """Raises AdapterError for a class that is not in the table: nobody would know what it does to a file or a merge."""
    if kind is not Update and kind not in VARIANTS.values():
        raise AdapterError(
            _("{kind} is not a registered variant of LoRA: add it to VARIANTS in lora/variant.py.", kind=kind.__name__)
        )
