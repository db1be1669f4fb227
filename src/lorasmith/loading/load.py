"""Load a base model from a folder, a GGUF file, the demo's package or a hub.

Only safetensors are loaded, never pickled weights. The network is used only for models on a hub that are not cached.
"""

from contextlib import nullcontext
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from lorasmith.config.model import ModelConfig
from lorasmith.errors import ModelError
from lorasmith.i18n import _, listed
from lorasmith.loading.folder import check_folder, find_folder, read_config
from lorasmith.loading.tokenizer import load_tokenizer
from lorasmith.loading.validate import LOAD_ERRORS, load_error, unexpected_weights
from lorasmith.loading.weights import is_stored_as, tensor_by_tensor
from lorasmith.model.base import Base
from lorasmith.model.fast.recognize import recognize_modules
from lorasmith.model.probe import probe
from lorasmith.model.vocabulary import surplus_tokens
from lorasmith.report import Report
from lorasmith.system.autograd import autograd_on
from lorasmith.system.device import choose_device, choose_dtype, use_all_cores
from lorasmith.system.gc_pause import gc_paused
from lorasmith.system.memory import keep_freed_memory
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
    dtype, why_dtype = choose_dtype(config.dtype, device)
    use_all_cores()
    if device.type == "cpu":
        keep_freed_memory()
    settings = _without_dropout(read_config(folder, config.trust_remote_code))
    tokenizer = load_tokenizer(folder, config.trust_remote_code, report)
    try:
        mapped = is_stored_as(folder, dtype)
        with quiet_transformers(), nullcontext() if mapped else tensor_by_tensor():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, config=settings, dtype=dtype, use_safetensors=True, local_files_only=True,
                trust_remote_code=config.trust_remote_code, output_loading_info=True,
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
    model.requires_grad_(False)
    nn.Module.to(model, device)
    base = Base(model.train(), tokenizer, config.model, folder, dtype, device)
    base.why |= {"device": why_device, "dtype": why_dtype}
    with quiet_transformers():  # it warns if a model's attention cannot be changed; `probe` reports that itself
        recognize_modules(base.model)
        probe(base)
    if text := surplus_tokens(base):
        report.warn(text)
    return base


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
