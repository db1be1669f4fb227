"""What a run or adapter folder says of itself. Reads a few small files and loads no model."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from lorasmith.adapter_folder import find_adapter, read_about
from lorasmith.errors import AdapterError
from lorasmith.i18n import _
from lorasmith.lora.files import WEIGHTS, read_config, read_weights
from lorasmith.run_folder import SUMMARY, Summary


def inspect_folder(path: str | Path) -> dict[str, Any]:
    """Rank, targets, size, base, template, losses: as plain values, for the reader or as JSON.

    Raises AdapterError: no adapter there, none yet, no weights, or a file whose content is not what it should be.
    """
    path = Path(path).expanduser()
    folder = find_adapter(path)
    config, about = read_config(folder), read_about(folder)
    shapes, targets = _shapes(folder), config.get("target_modules") or []
    return {
        "folder": str(folder),
        "base": about["base"]["model"] if about else config.get("base_model_name_or_path"),
        "r": config.get("r"),
        "lora_alpha": config.get("lora_alpha"),
        "use_rslora": bool(config.get("use_rslora")),
        "rank_pattern": config.get("rank_pattern") or {},
        "alpha_pattern": config.get("alpha_pattern") or {},
        "target_modules": targets if isinstance(targets, str) else sorted(targets),  # PEFT writes a set
        "modules_to_save": config.get("modules_to_save") or [],
        "tensors": len(shapes),
        "parameters": sum(math.prod(shape) for shape in shapes),
        "bytes": (folder / WEIGHTS).stat().st_size,
        "template": about["template"]["kind"] if about else None,
        "stop": [stop["token"] for stop in about["template"]["stop"]] if about else None,
        "notes": about["notes"] if about else None,
        "summary": _summary(path / SUMMARY),
    }


def _shapes(folder: Path) -> list[list[int]]:
    try:
        with safe_open(folder / WEIGHTS, framework="np") as file:
            return [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError):
        read_weights(folder)  # says what is wrong with it
        raise


def _summary(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return asdict(TypeAdapter(Summary).validate_json(path.read_bytes()))
    except ValidationError as error:
        first = error.errors()[0]
        raise AdapterError(
            _(
                "{path}: not what a training writes there ({where}{what}). Remove it to see the adapter alone.",
                path=path,
                where="".join(f"{part}: " for part in first["loc"]),
                what=first["msg"],
            )
        ) from None
