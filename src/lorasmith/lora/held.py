"""An adapter held for serving alone: nothing of it is in the model, its matrices wait until a request needs them."""

import hashlib
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorasmith.errors import AdapterError
from lorasmith.i18n import _
from lorasmith.lora.bank import Change, Ranks
from lorasmith.lora.config import LoraConfig
from lorasmith.lora.files import CONFIG, WEIGHTS, has_effect, lora_config, misfits, read_config, read_weights
from lorasmith.lora.inject import PEFT_PREFIX, plain_paths, rank_and_alpha
from lorasmith.lora.target import find_targets


def held_ranks(model: PreTrainedModel, folder: Path, paths: Collection[str], dtype: torch.dtype) -> Ranks | None:
    """The adapter of `folder` in `dtype`, in memory; None where it changes more than the linear layers at `paths`.

    Raises AdapterError as `load_adapter` does: keys missing, unknown or of another shape, no effect.
    """
    config = lora_config(read_config(folder), folder / CONFIG)
    with plain_paths(model):
        targets = find_targets(model, config, strict=False)
        layers = dict(model.named_modules())
    if targets.saved or config.bias != "none" or not set(targets.adapted) <= set(paths):
        return None
    tensors = read_weights(folder)
    wanted: dict[str, Tensor] = {}
    for path in targets.adapted:
        O, I = layers[path].weight.shape
        r, _alpha = rank_and_alpha(config, path)
        wanted |= {_key(path, "A"): torch.empty(r, I, device="meta"), _key(path, "B"): torch.empty(O, r, device="meta")}
    problems = misfits(wanted, tensors)
    if not problems and not has_effect(tensors):
        problems = [_("its B matrices are all zero, so it changes nothing: the training did not reach this file.")]
    if problems:
        raise AdapterError(*(f"{folder / WEIGHTS}: {problem}" for problem in problems))
    changes = {path: _change(config, path, tensors, dtype) for path in targets.adapted}
    version = hashlib.sha256((folder / WEIGHTS).read_bytes() + (folder / CONFIG).read_bytes()).hexdigest()
    return Ranks(lambda: changes, max(len(change.A_RI) for change in changes.values()), lambda: version)


def _key(path: str, matrix: str) -> str:
    return f"{PEFT_PREFIX}{path}.lora_{matrix}.weight"


def _change(config: LoraConfig, path: str, tensors: dict[str, Tensor], dtype: torch.dtype) -> Change:
    """Copied, also where the dtype is the file's: a mapped file that somebody shortens would end the server."""
    A, B = (tensors[_key(path, matrix)].to(dtype, copy=True) for matrix in "AB")
    return Change(A, B.mul_(config.scaling(*rank_and_alpha(config, path))).t().contiguous())
