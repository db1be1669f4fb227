"""Adapter folders of mlx-lm, as PEFT's two files. I = inputs, O = outputs of a layer, R = rank.

mlx-lm computes y + scale (x a) b, where a [I, R] and b [R, O] are PEFT's A and B, transposed, and `scale` stands for
alpha / r. Its DoRA is that of PEFT, with the magnitudes m [O].
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lorasmith.adapters.other_programs import MLX_WEIGHTS
from lorasmith.config.files import read_object
from lorasmith.errors import AdapterError
from lorasmith.i18n import _
from lorasmith.lora.adapter_config import ADAPTER_CONFIG
from lorasmith.lora.files import write_files
from lorasmith.lora.inject import PEFT_PREFIX

PARTS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}
KINDS = ("lora", "dora")


def write_as_peft(source: Path, folder: Path) -> None:
    """Write the adapter in `source` to the empty folder `folder` in PEFT's form. Raises AdapterError."""
    config = read_object(source / ADAPTER_CONFIG, AdapterError)
    kind = config.get("fine_tune_type", "lora")
    if kind not in KINDS:
        raise AdapterError(
            _(
                "{file}: fine_tune_type is {kind}: these are trained weights of the model itself, not an adapter. "
                "Fuse them into a model with mlx_lm.fuse, and use that as a base model.",
                file=source / ADAPTER_CONFIG,
                kind=kind,
            )
        )
    scale = _scale(config, source)
    tensors = _tensors(source)
    ranks = {key: tensor.shape[1] for key, tensor in tensors.items() if key.endswith(".lora_a")}
    if not ranks:
        raise AdapterError(_("{file}: there is no lora_a in it, so it is no adapter.", file=source / MLX_WEIGHTS))
    rank = max(ranks.values())
    paths = [key.removesuffix(".lora_a") for key in ranks]
    differing = {path: ranks[f"{path}.lora_a"] for path in paths if ranks[f"{path}.lora_a"] != rank}
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.get("model"),
        "r": rank,
        "lora_alpha": alpha_of(scale, rank),
        "target_modules": paths,
        "use_dora": kind == "dora",
        "rank_pattern": {f"^{re.escape(path)}": r for path, r in differing.items()},
        "alpha_pattern": {f"^{re.escape(path)}": alpha_of(scale, r) for path, r in differing.items()},
    }
    write_files(folder, {_peft_key(key): _peft_tensor(key, one) for key, one in tensors.items()}, settings, {})


def alpha_of(scale: float, rank: int) -> float:
    """The lora_alpha for which lora_alpha / rank is `scale`, or the closest to it."""
    near = scale * rank
    candidates = (near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf))
    return min(candidates, key=lambda alpha: abs(alpha / rank - scale))


def _scale(config: Mapping[str, Any], source: Path) -> float:
    parameters = config.get("lora_parameters")
    if isinstance(parameters, dict) and "alpha" in parameters:
        raise AdapterError(
            _(
                "{file}: lora_parameters contains alpha, which versions of mlx-lm read differently: older ones "
                "multiply the update by scale * alpha / rank, newer ones by scale alone. Remove alpha, and set scale "
                "to the number that the version used.",
                file=source / ADAPTER_CONFIG,
            )
        )
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if isinstance(scale, int | float) and not isinstance(scale, bool):
        return float(scale)
    raise AdapterError(
        _(
            "{file}: lora_parameters.scale must be a number, but is {value}. Without it, the size of the adapter's "
            "change is not known.",
            file=source / ADAPTER_CONFIG,
            value=repr(scale),
        )
    )


def _tensors(source: Path) -> dict[str, Tensor]:
    """All tensors by their names. Raises AdapterError if they cannot be read, or for other things than A and B."""
    file = source / MLX_WEIGHTS
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise AdapterError(_("{path}: cannot be read: {why}", path=file, why=error)) from error
    for key, tensor in tensors.items():
        part = key.rpartition(".")[2]
        if part not in PARTS or tensor.dim() != (1 if part == "m" else 2):
            raise AdapterError(
                _(
                    "{file}: {key} of shape {shape} is no matrix of a linear layer (lora_a, lora_b), and nothing else "
                    "can be imported. Fuse the adapter into a model with mlx_lm.fuse, and use that as a base model.",
                    file=file,
                    key=key,
                    shape=tuple(tensor.shape),
                )
            )
    return tensors


def _peft_key(key: str) -> str:
    path, _dot, part = key.rpartition(".")
    return f"{PEFT_PREFIX}{path}.{PARTS[part]}"


def _peft_tensor(key: str, tensor: Tensor) -> Tensor:
    return tensor.contiguous() if key.endswith(".m") else tensor.t().contiguous()
