"""PEFT's LoraConfig, whose options are checked when it is made instead of being ignored later."""

import dataclasses
from enum import Enum
from pathlib import Path
from typing import Any, cast

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils.hotswap import CONFIG_KEYS_TO_CHECK

from lorasmith.config.lora import LoraConfig as CoreConfig
from lorasmith.errors import ConfigError
from lorasmith.i18n import _, listed
from lorasmith.lora.adapter_config import lora_config
from lorasmith.lora.start_values import NITER
from lorasmith.lora.target import ALL_LINEAR
from lorasmith.peft.refused import unsupported

# Options that PEFT's own code carries out, around the LoRA layers. See LoraModel.inject_adapter.
AROUND = ("modules_to_save", "trainable_token_indices", "ensure_weight_tying")
_STARTS = ("gaussian", "orthogonal", "pissa", "olora", "mica", "eva")
_SELECTED_BY = Path("LoraConfig")  # in place of the path of a file, in messages


class Kind(str, Enum):  # noqa: UP042 (a StrEnum has another str than PEFT's)
    """The peft_type of our configs: it equals and is written as PEFT's LORA, but is a key of its own in PEFT's tables.

    In these tables PEFT finds the class that adds the adapter, also where TRL calls PEFT with our config.
    """

    LORA = "LORA"

    def __hash__(self) -> int:
        return hash((type(self).__qualname__, self.value))


@dataclasses.dataclass
class PeftConfig(peft.PeftConfig):
    """The base class of LoraConfig; `from_pretrained` reads an adapter_config.json and returns a LoraConfig."""

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> "LoraConfig":
        """The config with these options. Raises ConfigError if it is not LoRA, or has options of a newer PEFT."""
        kind = kwargs.pop("peft_type", "LORA")
        if kind != "LORA":
            raise unsupported(f"peft_type={getattr(kind, 'value', kind)}")
        known = {field.name for field in dataclasses.fields(LoraConfig)}
        if unknown := sorted(key for key, value in kwargs.items() if value and key not in known):
            raise ConfigError(_("LoraConfig: the installed PEFT {version} does not know {keys}. Install a newer one.",
                                version=peft.__version__, keys=listed(unknown)))  # fmt: skip
        config = LoraConfig.__new__(LoraConfig)
        config.from_file = True
        config.__init__(**{key: value for key, value in kwargs.items() if key in known})  # type: ignore[misc]
        return config


@dataclasses.dataclass
class LoraConfig(peft.LoraConfig, PeftConfig):
    """PEFT's LoraConfig, with its names and defaults: r and lora_alpha are 8.

    Raises ConfigError or AdapterError that names every option that would have no effect here.
    """

    from_file = False  # of a file, which may have patterns that match nothing; no option, as it has no annotation

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = Kind.LORA
        core_config(self)

    def _register_custom_module(self, mapping: dict[Any, Any]) -> None:
        raise unsupported("_register_custom_module")


def own_config(config: peft.PeftConfig) -> LoraConfig:
    """The same config as ours. Raises ConfigError if it is not LoRA."""
    if isinstance(config, LoraConfig):
        return config
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return PeftConfig.from_peft_type(**values)


def core_config(config: LoraConfig) -> CoreConfig:
    """The options of the LoRA layers, without those in AROUND; all-linear if neither modules nor parameters are given.

    Raises AdapterError or ConfigError that names every option that has no effect here, or an invalid value.
    """
    raw = {key: sorted(v, key=str) if isinstance(v, set) else v for key, v in dataclasses.asdict(config).items()}
    raw = {key: value for key, value in raw.items() if key not in AROUND}
    raw["target_modules"] = raw["target_modules"] or ([] if raw["target_parameters"] else ALL_LINEAR)
    if isinstance(raw["target_modules"], str) and raw["target_modules"].lower() == ALL_LINEAR:
        raw["target_modules"] = ALL_LINEAR
    start = config.init_lora_weights  # of a file, it is over, so that the core does not look at it
    if config.from_file or not isinstance(start, str):
        return lora_config(raw, _SELECTED_BY)
    if start not in _STARTS and not NITER.fullmatch(start):
        raise unsupported(f"init_lora_weights={start!r}")
    checked = lora_config(raw | {"init_lora_weights": True}, _SELECTED_BY)
    return CoreConfig.model_validate(checked.model_dump() | {"init_lora_weights": start})


cast(dict[Any, Any], CONFIG_KEYS_TO_CHECK)[Kind.LORA] = CONFIG_KEYS_TO_CHECK[peft.PeftType.LORA]  # of hotswap
cast(dict[Any, Any], PEFT_TYPE_TO_CONFIG_MAPPING)[Kind.LORA] = LoraConfig
cast(dict[Any, Any], PEFT_TYPE_TO_PREFIX_MAPPING)[Kind.LORA] = "lora_"
