"""The registry of LoRA variants, by the flag in PEFT's LoraConfig that selects each.

To add a variant, write a subclass of Update in its own file, register it here, and add the flag to config/lora.py.
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
    """The flags in VARIANTS that `config` sets."""
    return [flag for flag in VARIANTS if getattr(config, flag, False)]


def variant_of(config: LoraConfig) -> type[Update]:
    """The Update class that `config` selects. Raises ConfigError if it selects more than one variant."""
    flags = flags_of(config)
    if len(flags) > 1:
        raise ConfigError(
            _("lora.{first} and lora.{second} are mutually exclusive. Choose one.", first=flags[0], second=flags[1])
        )
    return VARIANTS[flags[0]] if flags else Update


def variant_problems(config: LoraConfig, layers: dict[str, nn.Module]) -> list[str]:
    """A message for each of these layers, by path, that the selected variant does not support."""
    variant, problems = variant_of(config), []
    if variant is Update:
        return []
    for path, layer in layers.items():
        if isinstance(layer, nn.Embedding):
            problems.append(
                _(
                    "lora.{flag}: {path} is an embedding, and this variant supports linear layers only. Leave it out.",
                    flag=flags_of(config)[0],
                    path=path,
                )
            )
        elif problem := variant.problem(layer):
            problems.append(f"lora.{flags_of(config)[0]}: {path}: {problem}")
    return problems


def require_registered(kind: type[Update]) -> None:
    """Raise AdapterError if `kind` is not registered: such an update could not be saved or merged correctly."""
    if kind is not Update and kind not in VARIANTS.values():
        raise AdapterError(
            _("{kind} is not a registered variant of LoRA: add it to VARIANTS in lora/variant.py.", kind=kind.__name__)
        )
