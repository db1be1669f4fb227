"""The registry of LoRA variants, by the flag in PEFT's LoraConfig that selects each, or the start of A and B.

To add a variant, write a subclass of Update in its own file, register it here, and add the flag to config/lora.py.
"""

from torch import nn

from lorasmith.config.lora import LoraConfig
from lorasmith.errors import AdapterError, ConfigError
from lorasmith.i18n import _
from lorasmith.lora.alora import ALoRA
from lorasmith.lora.dora import DoRA
from lorasmith.lora.lora_bias import LoraBias
from lorasmith.lora.start_values import MOVING, FromStart
from lorasmith.lora.update import Update

VARIANTS: dict[str, type[Update]] = {
    "use_dora": DoRA,
    "lora_bias": LoraBias,
    "alora_invocation_tokens": ALoRA,
}


STARTS: dict[str, type[Update]] = dict.fromkeys(MOVING, FromStart)  # by the beginning of init_lora_weights
NOT_WITH_MICA = ("use_dora", "alora_invocation_tokens")  # PEFT has no variant that is both


def flags_of(config: LoraConfig) -> list[str]:
    """The flags in VARIANTS that `config` sets."""
    return [flag for flag in VARIANTS if getattr(config, flag, False)]


def _selected(config: LoraConfig) -> dict[str, type[Update]]:
    """The variants that `config` selects, by the name of the option."""
    chosen = {flag: VARIANTS[flag] for flag in flags_of(config)}
    starts = [kind for name, kind in STARTS.items() if config.init_lora_weights.startswith(name)]
    if config.init_lora_weights == "mica" and not chosen.keys().isdisjoint(NOT_WITH_MICA):
        starts = [Update]
    return chosen | {f"init_lora_weights={config.init_lora_weights}": kind for kind in starts}


def variant_of(config: LoraConfig) -> type[Update]:
    """The Update class that `config` selects. Raises ConfigError if it selects more than one variant."""
    names = list(chosen := _selected(config))
    if len(names) > 1:
        raise ConfigError(
            _("lora.{first} and lora.{second} are mutually exclusive. Choose one.", first=names[0], second=names[1])
        )
    return chosen[names[0]] if names else Update


def variant_problems(config: LoraConfig, layers: dict[str, nn.Module]) -> list[str]:
    """A message for each of these layers, by path, that the selected variant does not support."""
    variant, problems = variant_of(config), []
    if variant is Update:
        return []
    (name,) = _selected(config)
    for path, layer in layers.items():
        if isinstance(layer, nn.Embedding):
            problems.append(
                _(
                    "lora.{flag}: {path} is an embedding, and this variant supports linear layers only. Leave it out.",
                    flag=name,
                    path=path,
                )
            )
        elif problem := variant.problem(layer):
            problems.append(f"lora.{name}: {path}: {problem}")
    return problems


def require_registered(kind: type[Update]) -> None:
    """Raise AdapterError if `kind` is not registered: such an update could not be saved or merged correctly."""
    if kind is not Update and kind not in (*VARIANTS.values(), *STARTS.values()):
        raise AdapterError(
            _("{kind} is not a registered variant of LoRA: add it to VARIANTS in lora/variant.py.", kind=kind.__name__)
        )
