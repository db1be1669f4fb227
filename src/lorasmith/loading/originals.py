"""The unquantized weights of a quantized base, read from its folder a second time.

transformers reads and renames them as it did for the base itself, and keeps none of them.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lorasmith.loading.folder import read_config
from lorasmith.loading.validate import LOAD_ERRORS, load_error
from lorasmith.loading.weights import tensor_by_tensor
from lorasmith.system.transformers_logging import quiet_transformers

METHOD = "lorasmith-originals"
Use = Callable[[str, Tensor], None]


class _Settings(QuantizationConfigMixin):
    quant_method = METHOD  # type: ignore[assignment]

    def __init__(self, use: Use) -> None:
        self.use = use


@register_quantizer(METHOD)
class _Reader(HfQuantizer):
    """A quantizer that transformers gives every tensor to, and that gives none back."""

    quantization_config: _Settings

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return True

    def get_quantize_ops(self) -> ConversionOps:
        return _Give(self.quantization_config.use)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


class _Give(ConversionOps):
    def __init__(self, use: Use) -> None:
        self.use = use

    def convert(  # type: ignore[override]
        self, input_dict: Mapping[str, Any], missing_keys: set[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Give the tensors away; nothing is left for transformers to set."""
        for name, value in input_dict.items():
            self.use(name, value[0] if isinstance(value, list) else value)
        if missing_keys is not None:
            missing_keys.difference_update(input_dict)
        return {}


@torch.no_grad()
def each_original(folder: Path, trust_remote_code: bool, use: Use) -> None:
    """Call `use` with the name and the value, in float32, of each parameter of the model in `folder`, one at a time.

    Names are those in the loaded model. Of tied weights, only the one in the file is given. Raises ModelError.
    """
    settings = read_config(folder, trust_remote_code)
    try:
        with quiet_transformers(), tensor_by_tensor():
            AutoModelForCausalLM.from_pretrained(
                folder, config=settings, dtype=torch.float32, use_safetensors=True, local_files_only=True,
                trust_remote_code=trust_remote_code, quantization_config=_Settings(use),
            )  # fmt: skip
    except LOAD_ERRORS as error:
        raise load_error(folder, error, settings) from error
