"""Load a base model from a folder, a GGUF file, the demo's package or a hub.

Only safetensors are loaded, never pickled weights. The network is used only for models on a hub that are not cached.
"""

from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from lorasmith.config.files import read_object
from lorasmith.config.model import ModelConfig
from lorasmith.errors import ConfigError, MissingExtraError, ModelError
from lorasmith.i18n import _, listed
from lorasmith.loading.folder import check_folder, find_folder, read_config
from lorasmith.loading.gguf import gguf_file
from lorasmith.loading.gguf_blocks import GgufBlocks
from lorasmith.loading.quantize import QuantizationSettings, convert_from_bitsandbytes, remove_marks
from lorasmith.loading.tokenizer import load_tokenizer
from lorasmith.loading.validate import LOAD_ERRORS, load_error, quant_method, unexpected_weights
from lorasmith.loading.weights import is_stored_as, tensor_by_tensor, weights_mib
from lorasmith.lora.gguf_weight import has_formats
from lorasmith.lora.quantized import count_parameters
from lorasmith.lora.target_parameters import expert_parameters
from lorasmith.model.base import Base
from lorasmith.model.fast.recognize import recognize_modules
from lorasmith.model.probe import probe
from lorasmith.model.vocabulary import surplus_tokens
from lorasmith.report import Report
from lorasmith.system.autograd import autograd_on
from lorasmith.system.device import choose_device, choose_dtype, dtype_name, use_all_cores
from lorasmith.system.gc_pause import gc_paused
from lorasmith.system.memory import keep_freed_memory, usable_mib
from lorasmith.system.transformers_logging import quiet_transformers


@gc_paused()
@autograd_on()
def load_base(config: ModelConfig, report: Report | None = None) -> Base:
    """Load and probe a base model, with all parameters frozen and all dropout set to zero.

    Raises:
        ModelError: the model does not exist or is incomplete, has only pickled weights, needs code of its own that
            the user does not trust, or has an unknown architecture.
    """
    report = report or Report()
    folder = find_folder(config.model, report)
    check_folder(folder, config.trust_remote_code)
    device, why_device = choose_device(config.device)
    saves_memory = config.quantize != "none" or _is_large(folder)
    dtype, why_dtype = choose_dtype(config.dtype, device, saves_memory)
    use_all_cores()
    if device.type == "cpu" and config.quantize == "none":
        keep_freed_memory()
    settings = _without_dropout(read_config(folder, config.trust_remote_code))
    tokenizer = load_tokenizer(folder, config.trust_remote_code, report)
    quantization = _quantization(config, folder, dtype, device, report)
    if device.type == "cpu" and config.quantize != "gguf" and (text := _too_large(folder, dtype, config.quantize)):
        report.warn(text)
    try:
        mapped = config.quantize == "none" and is_stored_as(folder, dtype)
        with quiet_transformers(), nullcontext() if mapped else tensor_by_tensor():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, config=settings, dtype=dtype, use_safetensors=True, local_files_only=True,
                trust_remote_code=config.trust_remote_code, output_loading_info=True,
                **quantization,
            )  # fmt: skip
    except LOAD_ERRORS as error:
        raise load_error(folder, error, settings) from error
    model, info = loaded
    if info["missing_keys"]:  # transformers would fill them with random numbers
        keys = listed(sorted(info["missing_keys"])[:3])
        raise ModelError(
            _("{folder}: missing weights {keys}; the model's files are incomplete.", folder=folder, keys=keys)
        )
    if problems := unexpected_weights(folder, model, info["unexpected_keys"]):
        raise ModelError(*problems)
    if hasattr(model, "hf_quantizer"):
        if left := getattr(model.hf_quantizer, "unquantized", None):
            report.warn(_unquantized_weights(left, dtype))
        convert_from_bitsandbytes(model, dtype)
        remove_marks(model)
    model.requires_grad_(False)
    nn.Module.to(model, device)
    base = Base(model.train(), tokenizer, config.model, folder, dtype, device, config.quantize)
    base.why |= {"device": why_device, "dtype": why_dtype}
    with quiet_transformers():  # it warns if a model's attention cannot be changed; `probe` reports that itself
        recognize_modules(base.model)
        probe(base)
    if device.type == "cpu" and config.quantize != "none":
        keep_freed_memory()  # only now, because quantizing frees more than is needed afterwards
    if text := surplus_tokens(base):
        report.warn(text)
    if text := _unquantized_experts(base):
        report.warn(text)
    return base


def _unquantized_weights(names: list[str], dtype: torch.dtype) -> str:
    """The warning that not all weights could stay as they are in the GGUF file."""
    return _(
        "model.quantize: {count} weights, such as {name}, stay in {dtype}: in the GGUF file they are not quantized, or "
        "not in one tensor.",
        count=len(names),
        name=names[0],
        dtype=dtype_name(dtype),
    )


def _unquantized_experts(base: Base) -> str:
    """A warning if the base is quantized, but not its experts, which are most of a model that has any."""
    stacks = [m.get_parameter(name) for m in base.model.modules() for name in expert_parameters(m)]
    if base.quantize == "none" or not stacks:
        return ""
    return _(
        "model.quantize: the weights of the experts stay in {dtype}, since only linear layers are quantized. They are "
        "{share:.0%} of all parameters, and take {mib:,.0f} MiB.",
        dtype=dtype_name(base.dtype),
        share=sum(stack.numel() for stack in stacks) / count_parameters(base.model),
        mib=sum(stack.numel() * stack.element_size() for stack in stacks) / 2**20,
    )


def _is_large(folder: Path) -> bool:
    """Whether the weights in float32 would take more than half of the memory that there is."""
    room = usable_mib(torch.device("cpu"))
    return room is not None and weights_mib(folder, torch.float32) > room / 2


def _too_large(folder: Path, dtype: torch.dtype, quantize: str) -> str:
    """A warning if the weights alone take more memory than there is; empty if they do not, or if that is unknown."""
    size, room = weights_mib(folder, dtype, quantize), usable_mib(torch.device("cpu"))
    if room is None or size < room:
        return ""
    text = _(
        "{folder}: the weights take {size:,.0f} MiB in {dtype}, and {room:,.0f} MiB are available to this process.",
        folder=folder,
        size=size,
        dtype=dtype_name(dtype) if quantize == "none" else quantize,
        room=room,
    )
    smaller = {form: weights_mib(folder, dtype, form) for form in ("int8", "nf4") if form != quantize}
    fitting = [(form, mib) for form, mib in smaller.items() if mib < min(size, room)]
    if not fitting:
        return text
    form, mib = fitting[0]
    return text + " " + _("Quantized with --quantize {form} they take {mib:,.0f} MiB.", form=form, mib=mib)


def _quantization(
    config: ModelConfig, folder: Path, dtype: torch.dtype, device: torch.device, report: Report
) -> dict[str, Any]:
    """What transformers needs to be told to quantize the weights while it reads them, on the device of the model.

    Raises MissingExtraError without bitsandbytes, ConfigError for weights that are quantized on disk, or are not in a
    GGUF file but should stay as they are there.
    """
    if config.quantize == "none":
        return {}
    if config.quantize == "gguf":
        return {"quantization_config": QuantizationSettings(_blocks(config.model, report), dtype, device)}
    if find_spec("bitsandbytes") is None:
        raise MissingExtraError(
            _(
                "model.quantize: {form} requires the bitsandbytes package, which is not installed. Install it with pip "
                "install 'lorasmith[quant]'.",
                form=config.quantize,
            )
        )
    if method := quant_method(read_object(folder / "config.json", ModelError)):
        raise ConfigError(
            _(
                "model.quantize: the weights in {folder} are already quantized ({method}). Leave --quantize out, or "
                "use the unquantized model.",
                folder=folder,
                method=method,
            )
        )
    return {"quantization_config": QuantizationSettings(config.quantize, dtype, device)}


def _blocks(name: str, report: Report) -> GgufBlocks:
    """The quantized weights of the model's GGUF file. Raises ConfigError if it is in no such file."""
    gguf = gguf_file(name, report)
    if gguf is None:
        raise ConfigError(
            _(
                "model.quantize: gguf keeps the quantized weights of a GGUF file, but {model} is not one. Use nf4 or "
                "int8.",
                model=name,
            )
        )
    if not has_formats():
        raise ConfigError(
            _(
                "model.quantize: gguf needs transformers 5.23 or newer, but {version} is installed. Update it, or use "
                "nf4 or int8.",
                version=transformers.__version__,
            )
        )
    return GgufBlocks(gguf)


def _without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """Set every dropout of a config and its sub-configs to zero: a frozen base must compute the same in train()."""
    parts: list[Any] = [config, *(v for v in vars(config).values() if isinstance(v, PretrainedConfig))]
    for part in parts:
        for key, value in vars(part).items():
            if (
                ("drop" in key or key.endswith("pdrop"))
                and isinstance(value, int | float)
                and not isinstance(value, bool)
            ):
                setattr(part, key, type(value)(0))
    return config
