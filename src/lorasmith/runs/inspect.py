"""What `lorasmith info` shows of a run or adapter folder: read from a few small files, without loading a model."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from lorasmith.adapters.folder import AdapterFolder, find_adapter, find_model
from lorasmith.config.files import read_json
from lorasmith.config.toml import load_config
from lorasmith.config.values import Typed, validation_messages
from lorasmith.errors import AdapterError
from lorasmith.i18n import _
from lorasmith.lora.adapter_config import ADAPTER_CONFIG, PEFT_DEFAULTS
from lorasmith.lora.files import weights_shapes
from lorasmith.lora.variant import VARIANTS
from lorasmith.training.run_files import RUN_CONFIG, SUMMARY, Summary


class _Config(Typed):
    """The part of adapter_config.json that is shown; an adapter that lorasmith cannot load can still be inspected."""

    model_config = ConfigDict(extra="allow")

    base_model_name_or_path: str | None = None
    r: int
    lora_alpha: int | float
    use_rslora: bool | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, int | float] | None = None
    target_modules: str | list[str] | None = None
    target_parameters: list[str] | None = None
    modules_to_save: list[str] | None = None


def inspect_folder(path: str | Path) -> dict[str, Any]:
    """Rank, targets, size, base model, template and losses, as plain values that can be written as JSON.

    Raises AdapterError if the folder holds no adapter, or not yet, or if one of its files is missing or malformed.
    """
    path = Path(path).expanduser()
    if (model := find_model(path)) is not None:
        return _model_facts(model)
    return facts_of(AdapterFolder.read_header(find_adapter(path)), path)


def _model_facts(model: Path) -> dict[str, Any]:
    """The facts of a model all of whose weights were trained. Raises LorasmithError if a file is missing or broken."""
    run, weights = model.absolute().parent, model / "model.safetensors"
    config, shapes = load_config(run / RUN_CONFIG, {}), weights_shapes(weights)
    return {
        "folder": str(model),
        "base": config.model.model,
        "method": config.training.method,
        "tensors": len(shapes),
        "parameters": sum(map(math.prod, shapes.values())),
        "bytes": weights.stat().st_size,
        "data": list(config.data.data),
        "summary": _summary(run / SUMMARY),
    }


def facts_of(adapter: AdapterFolder, path: Path) -> dict[str, Any]:
    """The same of an adapter that was read already; `path` is the run that holds it, or the folder itself."""
    config, about = _config(adapter), adapter.metadata
    return {
        "folder": str(adapter.path),
        "base": about["base"]["model"] if about else config.base_model_name_or_path,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "use_rslora": bool(config.use_rslora),
        "variants": [flag for flag in VARIANTS if (config.model_extra or {}).get(flag)],
        "rank_pattern": config.rank_pattern or {},
        "alpha_pattern": config.alpha_pattern or {},
        "target_modules": sorted(targets) if isinstance(targets := config.target_modules, list) else targets or [],
        "target_parameters": sorted(config.target_parameters or []),
        "modules_to_save": config.modules_to_save or [],
        "tensors": len(adapter.shapes),
        "parameters": sum(map(math.prod, adapter.shapes.values())),
        "bytes": adapter.size,
        "template": about["template"]["kind"] if about else None,
        "stop": [stop["token"] for stop in about["template"]["stop"]] if about else None,
        "system": about["template"].get("system", "") if about else None,
        "chat_template": about["template"]["chat_template"] if about else None,
        "notes": about["notes"] if about else None,
        "summary": _summary(path / SUMMARY),
        "problems": adapter.problems,
    }


def _config(adapter: AdapterFolder) -> _Config:
    try:
        return _Config.model_validate(PEFT_DEFAULTS | dict(adapter.peft_config))
    except ValidationError as error:
        raise AdapterError(
            *(f"{adapter.path / ADAPTER_CONFIG}: {text}" for text in validation_messages(error, _Config))
        ) from None


def _summary(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return asdict(TypeAdapter(Summary).validate_json(json.dumps(read_json(path, AdapterError)), strict=True))
    except ValidationError as error:
        first = error.errors()[0]
        raise AdapterError(
            _(
                "{path}: not a valid run summary ({where}{what}). Delete the file to inspect the adapter alone.",
                path=path,
                where="".join(f"{part}: " for part in first["loc"]),
                what=first["msg"],
            )
        ) from None
