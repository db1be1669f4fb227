"""LoftQ (arXiv:2310.08659): A and B of a quantized base start at the error that quantizing its weights made.

    s B A = the best approximation of W - Q of rank R, where Q is what the layer computes with

That is one iteration of LoftQ. Q stays as it is, as in PEFT's `replace_lora_weights_loftq`, so the adapter is plain
LoRA for the same quantized base as any other. PEFT leaves s out, and is right only for s = 1.

    R = rank
"""

from torch import Tensor

from lorasmith.config.files import read_object
from lorasmith.config.lora import LoraConfig
from lorasmith.config.toml import Config
from lorasmith.errors import ConfigError, ModelError
from lorasmith.i18n import _
from lorasmith.loading.originals import each_original
from lorasmith.loading.validate import quant_method
from lorasmith.lora.given_start import start_from_error
from lorasmith.lora.layer import LoRALayer
from lorasmith.lora.quantized import QuantizedLinear
from lorasmith.model.base import Base
from lorasmith.report import Report


def refuse_without_error(base: Base, config: LoraConfig) -> None:
    """Raise ConfigError if `config` asks for this start and `base` has no errors, or no weights to find them."""
    if config.init_lora_weights != "loftq" or base.quantize in ("nf4", "int8"):
        return
    if base.quantize == "gguf":
        raise ConfigError(
            _(
                "lora.init_lora_weights: 'loftq' starts from the error of quantizing the weights, which a GGUF file "
                "does not contain. Use the unquantized model with --quantize nf4, or another initialization."
            )
        )
    if method := quant_method(read_object(base.folder / "config.json", ModelError)):
        raise ConfigError(
            _(
                "lora.init_lora_weights: 'loftq' needs the original weights, but those in {folder} are already "
                "quantized ({method}). Use the unquantized model with --quantize nf4, or another initialization.",
                folder=base.folder,
                method=method,
            )
        )
    raise ConfigError(
        _(
            "lora.init_lora_weights: 'loftq' starts from the error of quantizing the weights, but {base} is not "
            "quantized. Load it with --quantize nf4, or use 'pissa' or 'default'.",
            base=base.source,
        )
    )


def start_loftq(base: Base, name: str, config: Config, report: Report) -> None:
    """Give the new adapter `name` this start, if `config` asks for it; says which layers keep the default one."""
    if config.lora.init_lora_weights != "loftq":
        return
    left = start_from_errors(base, name, config.model.trust_remote_code)
    if left:
        report.warn(
            _(
                "lora.init_lora_weights: 'loftq' does not apply to {count} layers, such as {path}: they are not "
                "quantized, or share their weight with another layer. A and B start there as with 'default'.",
                count=len(left),
                path=left[0],
            )
        )


def start_from_errors(base: Base, name: str, trust_remote_code: bool = False) -> list[str]:
    """Set A and B of the new adapter `name` from the weights in the base's folder, one after the other.

    Returns the paths of layers to which this does not apply: A and B are as they were.
    """
    left = dict.fromkeys(base.adapters[name].targets.adapted)

    def use(weight: str, W: Tensor) -> None:
        path = weight.removesuffix(".weight")
        layer = base.model.get_submodule(path) if path in left else None
        if isinstance(layer, LoRALayer) and isinstance(layer.base_layer, QuantizedLinear):
            start_from_error(layer, name, W.t() if layer.base_layer.transposed else W)
            del left[path]

    each_original(base.folder, trust_remote_code, use)
    return list(left)
