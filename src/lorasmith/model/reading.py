"""How transformers reads a checkpoint whose dtype is not the wanted one: tensor by tensor, each converted and let go.

It maps the file and converts in threads: until all is converted the whole file counts as this program's memory (a base
of 135 million numbers took 1,122 MiB, and takes 615 so), and what threads allocate lies in heaps of their own.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors import safe_open
from transformers import modeling_utils

_STORED = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def is_stored_as(folder: Path, dtype: torch.dtype) -> bool:
    """Whether the first tensor of each safetensors file in `folder` has `dtype`: then it can stay mapped, uncopied."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            first = next(iter(file.keys()), None)
            if first is not None and file.get_slice(first).get_dtype() != _STORED.get(dtype):
                return False
    return True


@contextmanager
def tensor_by_tensor() -> Iterator[None]:
    """Within it transformers reads instead of mapping, as it does on Windows, and without threads."""

    def read(path: Any, **options: Any) -> Any:
        return safe_open(path, **(options | {"backend": "pread"}))

    with (
        patch.object(modeling_utils, "safe_open", read, create=True),
        patch.dict(os.environ, {"HF_DEACTIVATE_ASYNC_LOAD": "1"}),
    ):
        yield
