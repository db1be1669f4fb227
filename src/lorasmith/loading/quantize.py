"""Quantize a base model while transformers reads it: each tensor as soon as it has been read.

So the unquantized model never exists as a whole. transformers offers registered quantizers for this.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from lorasmith.loading.gguf_blocks import GgufBlocks
from lorasmith.lora.quantized import QuantizedEmbedding, QuantizedLinear, weight_of_bitsandbytes
from lorasmith.lora.quantized_weight import Format, QuantizedWeight, quantize
from lorasmith.system.memory import release_freed_memory

METHOD = "lorasmith"


class QuantizationSettings(QuantizationConfigMixin):
    """The format of the linear layers, the dtype in which they compute, and the device that quantizes them.

    form: a format, or the GGUF file whose quantized weights stay as they are.
    """

    quant_method = METHOD  # type: ignore[assignment]

    def __init__(self, form: Format | GgufBlocks, dtype: torch.dtype, device: torch.device) -> None:
        self.form, self.dtype, self.device = form, dtype, device


@register_quantizer(METHOD)
class Quantizer(HfQuantizer):
    """Quantizes the linear layers that transformers' bitsandbytes quantizer does; embedding and head to int8.

    In a small model these are a large part of the weights. NF4 would be too coarse for them. Of a GGUF file, all these
    stay in its formats; what is not quantized there, or is not in one tensor, remains unquantized.
    """

    quantization_config: QuantizationSettings

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        fixed = self.get_modules_to_not_convert(model, None, list(model._keep_in_fp32_modules or ()))
        form = self.quantization_config.form
        linear = {
            path: form
            for path, module in model.named_modules()
            if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(path, fixed)
        }
        of_ends: Format | GgufBlocks = form if isinstance(form, GgufBlocks) else "int8"
        self.formats = linear | dict.fromkeys(_ends(model), of_ends)
        self.unquantized = list[str]()  # the weights of these that are not quantized in the GGUF file

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether this is the weight of a layer to quantize."""
        path, _dot, name = param_name.rpartition(".")
        return name == "weight" and path in self.formats

    def get_quantize_ops(self) -> ConversionOps:
        """What transformers calls with each tensor that was read."""
        return _Quantize(self)

    def is_serializable(self) -> bool:
        """It is not: lorasmith saves adapters and merged models only."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Adapters on it are."""
        return True


def _ends(model: PreTrainedModel) -> list[str]:
    """The paths of embedding and head if both can be quantized: if they only look up and multiply."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    if [type(end) for end in ends] != [nn.Embedding, nn.Linear] or ends[1]._parameters["bias"] is not None:
        return []
    return [path for path, module in model.named_modules() if any(module is end for end in ends)]


class _Quantize(ConversionOps):
    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self,
        input_dict: Mapping[str, Any],
        full_layer_name: str,
        model: PreTrainedModel,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Replace the module with a quantized one; nothing is left for transformers to set unless it stays as it is."""
        (value,) = input_dict.values()
        W = value[0] if isinstance(value, list) else value
        path = full_layer_name.removesuffix(".weight")
        module, settings = model.get_submodule(path), self.quantizer.quantization_config
        form = self.quantizer.formats[path]
        W = W.to(settings.device)
        W_OI = W.t().contiguous() if isinstance(module, Conv1D) else W
        if isinstance(form, GgufBlocks):
            kept = form.weight_of(full_layer_name, W_OI, settings.dtype)
            if kept is None:
                self.quantizer.unquantized.append(full_layer_name)
                return {full_layer_name: value}
            weight: QuantizedWeight = kept
        else:
            weight = quantize(W_OI, form, settings.dtype)
        done = {full_layer_name}
        if not _is_already(module, weight):
            replace_module(model, path, weight)
            done |= _tie(model, full_layer_name, weight)
        if missing_keys is not None:
            missing_keys -= done
        del W, W_OI, value
        if settings.device.type == "cpu":
            release_freed_memory()  # otherwise what lies between the quantized weights adds up to twice their size
        return {}


def replace_module(model: PreTrainedModel, path: str, weight: QuantizedWeight) -> None:
    """Put a quantized module in place of the linear layer or embedding at `path`."""
    module = model.get_submodule(path)
    quantized: nn.Module
    if isinstance(module, nn.Embedding | QuantizedEmbedding):
        quantized = QuantizedEmbedding(weight, module.padding_idx)
    else:
        transposed = Conv1D in (type(module), getattr(module, "source_cls", None))
        quantized = QuantizedLinear(weight, module.bias, transposed)  # type: ignore[arg-type]
    quantized._is_hf_initialized = True  # type: ignore[assignment]  # else transformers would initialize it
    model.set_submodule(path, quantized)


def _is_already(module: nn.Module, weight: QuantizedWeight) -> bool:
    """Whether the module has these values: a file may contain both of two tied weights."""
    own = getattr(module, "quantized", None)
    return own is not None and all(map(torch.equal, own.buffers(), weight.buffers()))


def _tie(model: PreTrainedModel, name: str, weight: QuantizedWeight) -> set[str]:
    """Let the modules whose weights are tied to `name` share it. Returns the names of their weights."""
    tied: dict[str, str] = model.all_tied_weights_keys
    source = tied.get(name, name)
    group = {source, *(other for other, of in tied.items() if of == source)} - {name}
    for other in group:
        replace_module(model, other.removesuffix(".weight"), weight)
        tied.pop(other, None)
    tied.pop(name, None)
    return group


def convert_from_bitsandbytes(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replace the layers of bitsandbytes, which a quantized folder is loaded into, without copying their weights."""
    for path, module in list(model.named_modules()):
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt"):
            replace_module(model, path, weight_of_bitsandbytes(module, dtype))


def remove_marks(model: PreTrainedModel) -> None:
    """Remove transformers' marks of a quantized model: it does not save, cast or train one that has them."""
    for holder, mark in (
        (model, "hf_quantizer"),
        (model, "is_quantized"),
        (model, "quantization_method"),
        *((config, mark) for config in _configs(model) for mark in ("quantization_config", "_is_quantized")),
    ):
        if mark in vars(holder):
            delattr(holder, mark)


def _configs(model: PreTrainedModel) -> list[PretrainedConfig]:
    return [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
