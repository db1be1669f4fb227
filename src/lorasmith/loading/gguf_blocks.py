"""The quantized weights of a GGUF file as they are, for a base model that was converted from it.

The names are those of the `gguf` package. Each weight is compared with the converted one: the file may contain its rows
in another order, as llama.cpp computes rotary embeddings with other pairs, or only a part of it.
"""

from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
from torch import Tensor

from lorasmith.errors import ConfigError, first_line
from lorasmith.i18n import _
from lorasmith.lora.gguf_weight import GgufWeight, is_known


class GgufBlocks:
    """The tensors of a file by the names of the weights in the model. Holds nothing of their data."""

    def __init__(self, gguf: Path) -> None:
        """Read the tables of the file. Raises ConfigError for formats that transformers does not know."""
        reader = import_module("transformers.integrations.gguf.reader")
        try:
            metadata, _names = reader.read_gguf_metadata(str(gguf))
            header = reader.GgufHeader.from_file(str(gguf))
        except ValueError as error:
            raise ConfigError(
                _(
                    "model.quantize: gguf cannot keep the weights of {file}: {reason}. Use nf4 or int8.",
                    file=gguf,
                    reason=first_line(error).rstrip("."),
                )
            ) from error
        self._path, self._start = gguf, header.data_start
        self._tensors = {tensor.name: tensor for tensor in header.tensors}
        number = {name: number for number, name in MODEL_ARCH_NAMES.items()}.get(header.architecture)
        blocks = int(metadata.get(f"{header.architecture}.block_count", 0))
        self._names = None if number is None else get_tensor_name_map(number, blocks)

    def weight_of(self, name: str, W_OI: Tensor, dtype: torch.dtype) -> GgufWeight | None:
        """The weight with exactly the values of W, as it is in the file; None if it is not there, or not quantized."""
        found = self._names.get_name(name, try_suffixes=(".weight",)) if self._names else None
        tensor = self._tensors.get(found or "")
        if tensor is None or not is_known(tensor.ggml_type) or tensor.shape != tuple(W_OI.shape):
            return None
        # read, because what is mapped would count as memory of the process from then on
        data = np.fromfile(self._path, np.uint8, tensor.nbytes, offset=self._start + tensor.offset)
        weight = GgufWeight(torch.from_numpy(data).view(len(W_OI), -1), tensor.ggml_type, dtype)
        if weight.is_from(W_OI):
            return weight
        if (order := _order(weight.dequantized(W_OI.dtype), W_OI)) is None:
            return None
        weight.blocks = weight.blocks[order]
        return weight if weight.is_from(W_OI) else None


def _order(own_OI: Tensor, W_OI: Tensor) -> Tensor | None:
    """The number of the row of `own` that equals each row of W, or None if one equals none."""
    number = {row.tobytes(): i for i, row in enumerate(own_OI.view(torch.uint8).numpy())}
    found = [number.get(row.tobytes()) for row in W_OI.contiguous().view(torch.uint8).numpy()]
    return None if None in found else torch.tensor(found)
