"""Hashes by which a base model is recognized: of its config, of a sample of its tensors, and of its tokenizer."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedTokenizerBase

from lorasmith.config.files import read_object
from lorasmith.errors import ModelError

# keys of config.json that may differ between copies of the same model
_VOLATILE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "quantization_config"}
_TENSORS, _VALUES = 24, 64  # that are sampled: about so many tensors, so many values of each


def identity(folder: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Hashes of the config, tensors and tokenizer of a model folder, of 16 hex digits each.

    Reads a few kilobytes of the weights. Raises ModelError if config.json cannot be read.
    """
    config = read_object(folder / "config.json", ModelError)
    stable = {key: value for key, value in config.items() if key not in _VOLATILE}
    return {
        "config": _digest(json.dumps(stable, sort_keys=True)),
        "tensors": _digest(_tensor_sample(folder)),
        "tokenizer": _digest(json.dumps(sorted(tokenizer.get_vocab().items()))),
    }


def _tensor_sample(folder: Path) -> str:
    """Names and shapes of all tensors, and the first values of some from all over the model, one per line."""
    lines: list[str] = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = sorted(file.keys())
            lines += [f"{name} {file.get_slice(name).get_shape()}" for name in names]
            for name in names[:: max(1, len(names) // _TENSORS)]:
                part = file.get_slice(name)
                rows = part[:1] if len(part.get_shape()) else part[:]
                lines.append(str(rows.flatten()[:_VALUES].to(torch.float64).tolist()))
    return "\n".join(lines)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
