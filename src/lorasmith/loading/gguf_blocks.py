"""The quantized weights of a GGUF file as they are, for a base model that was converted from it.

The names are those of the `gguf` package. Each weight is compared with the converted one: the file may contain its rows
in another order, as llama.cpp computes rotary embeddings with other pairs, or only a part of it.
"""

from pathlib import Path

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map
from torch import Tensor

from lorasmith.lora.gguf_weight import GgufWeight, is_known


class GgufBlocks:
    """The tensors of a file by the names of the weights in the model."""

    def __init__(self, gguf: Path) -> None:
        self._path, reader = gguf, GGUFReader(gguf)
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        own = str(reader.fields["general.architecture"].contents())
        architecture = next((number for number, name in MODEL_ARCH_NAMES.items() if name == own), None)
        blocks = int(reader.fields[f"{own}.block_count"].contents())
        self._names = get_tensor_name_map(architecture, blocks) if architecture is not None else None

    def weight_of(self, name: str, W_OI: Tensor, dtype: torch.dtype) -> GgufWeight | None:
        """The weight with exactly the values of W, as it is in the file; None if it is not there, or not quantized."""
        found = self._names.get_name(name, try_suffixes=(".weight",)) if self._names else None
        tensor = self._tensors.get(found or "")
        if tensor is None or not is_known(int(tensor.tensor_type)):
            return None
        # read, because what the reader has mapped would count as memory of the process from then on
        data = np.fromfile(self._path, np.uint8, tensor.n_bytes, offset=tensor.data_offset).reshape(tensor.data.shape)
        weight = GgufWeight(torch.from_numpy(data), int(tensor.tensor_type), dtype)
        if weight.is_from(W_OI):
            return weight
        if weight.shape != W_OI.shape or (order := _order(weight.dequantized(W_OI.dtype), W_OI)) is None:
            return None
        weight.blocks = weight.blocks[order]
        return weight if weight.is_from(W_OI) else None


def _order(own_OI: Tensor, W_OI: Tensor) -> Tensor | None:
    """The number of the row of `own` that equals each row of W, or None if one equals none."""
    number = {row.tobytes(): i for i, row in enumerate(own_OI.view(torch.uint8).numpy())}
    found = [number.get(row.tobytes()) for row in W_OI.contiguous().view(torch.uint8).numpy()]
    return None if None in found else torch.tensor(found)
