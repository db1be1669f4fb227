"""What a run or adapter folder says of itself. Reads a few small files and loads no model."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from lorasmith.adapters.folder import AdapterFolder, find_adapter
from lorasmith.config.values import wrong_values
from lorasmith.errors import AdapterError
from lorasmith.i18n import _
from lorasmith.lora.files import CONFIG, PEFT_DEFAULTS
from lorasmith.training.run_folder import SUMMARY, Summary


class _Config(BaseModel):
    """What is shown of adapter_config.json: also of an adapter whose other options lorasmith cannot load."""

    base_model_name_or_path: str | None = None
    r: int
    lora_alpha: int | float
    use_rslora: bool | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, int | float] | None = None
    target_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None


def inspect_folder(path: str | Path) -> dict[str, Any]:
    """Rank, targets, size, base, template, losses: as plain values, for the reader or as JSON.

    Raises AdapterError: no adapter there, none yet, no weights, or a file whose content is not what it should be.
    """
    path = Path(path).expanduser()
    return facts_of(AdapterFolder.glance(find_adapter(path)), path)


def facts_of(adapter: AdapterFolder, path: Path) -> dict[str, Any]:
    """The same of an adapter that was read already; `path` is the run that holds it, or the folder itself."""
    config, about = _config(adapter), adapter.about
    return {
        "folder": str(adapter.path),
        "base": about["base"]["model"] if about else config.base_model_name_or_path,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "use_rslora": bool(config.use_rslora),
        "rank_pattern": config.rank_pattern or {},
        "alpha_pattern": config.alpha_pattern or {},
        "target_modules": sorted(targets) if isinstance(targets := config.target_modules, list) else targets or [],
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
    }


def _config(adapter: AdapterFolder) -> _Config:
    try:
        return _Config.model_validate(PEFT_DEFAULTS | dict(adapter.raw))
    except ValidationError as error:
        raise AdapterError(*(f"{adapter.path / CONFIG}: {text}" for text in wrong_values(error, _Config))) from None


def _summary(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return asdict(TypeAdapter(Summary).validate_json(path.read_bytes()))
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
