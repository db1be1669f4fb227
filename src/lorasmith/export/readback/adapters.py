"""The programs that read an exported adapter back, each on a base model that it loads itself, in float32."""

import json
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from lorasmith.adapters.merge import load_plain, plain_logits
from lorasmith.config.files import read_object
from lorasmith.errors import ModelError


def has_peft() -> bool:
    """Whether PEFT is installed."""
    return find_spec("peft") is not None


def has_mlx_lm() -> bool:
    """Whether mlx-lm is installed and runs here: on Linux, mlx needs a backend of its own, such as mlx-cpu."""
    try:
        return find_spec("mlx_lm") is not None and import_module("mlx.core") is not None
    except ImportError:
        return False


def peft_logits(folder: Path, base: Path, rows: Sequence[list[int]], trust_remote_code: bool) -> list[Tensor]:
    """What PEFT makes of an adapter folder: of each row of L ids, float32 of shape [L, V]."""
    peft: Any = import_module("peft")
    plain = load_plain(base, None, torch.float32, trust_remote_code)
    return plain_logits(peft.PeftModel.from_pretrained(plain, folder).eval(), rows)


def mlx_logits(folder: Path, base: Path, rows: Sequence[list[int]]) -> list[Tensor]:
    """What mlx-lm makes of an adapter folder: of each row of L ids, float32 of shape [L, V]."""
    core, tuner, utils = (import_module(name) for name in ("mlx.core", "mlx_lm.tuner.utils", "mlx_lm.utils"))
    with TemporaryDirectory(prefix="lorasmith-mlx-") as place:
        _copy_for_mlx(base, Path(place))
        model = tuner.load_adapters(utils.load_model(Path(place))[0], str(folder))
        model.set_dtype(core.float32)
        return [torch.tensor(model(core.array([ids]))[0].astype(core.float32).tolist()) for ids in rows]


def _copy_for_mlx(base: Path, folder: Path) -> None:
    """The base model with links to its weights, and rope_theta where mlx-lm 0.32 looks for it."""
    for path in base.iterdir():
        if path.name != "config.json":
            (folder / path.name).symlink_to(path.resolve())
    values = read_object(base / "config.json", ModelError)
    rope = values.get("rope_parameters") or {}
    if "rope_theta" in rope:
        values = {"rope_theta": rope["rope_theta"]} | values
    (folder / "config.json").write_text(json.dumps(values), "utf-8")
