"""What a run or adapter folder says of itself. Reads a few small files and loads no model."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from lorasmith.adapter_folder import find_adapter, read_about
from lorasmith.lora.files import WEIGHTS, read_config


def inspect_folder(path: str | Path) -> dict[str, Any]:
    """Rank, targets, size, base, template, losses: as plain values, for the reader or as JSON. Raises AdapterError."""
    path = Path(path).expanduser()
    folder = find_adapter(path)
    config, about = read_config(folder), read_about(folder)
    with safe_open(folder / WEIGHTS, framework="np") as file:
        shapes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118 (not a dict)
    summary = path / "summary.json"
    return {
        "folder": str(folder),
        "base": about["base"]["model"] if about else config.get("base_model_name_or_path"),
        "r": config["r"],
        "lora_alpha": config["lora_alpha"],
        "use_rslora": bool(config.get("use_rslora")),
        "target_modules": config["target_modules"],
        "modules_to_save": config.get("modules_to_save") or [],
        "tensors": len(shapes),
        "parameters": sum(_product(shape) for shape in shapes),
        "bytes": (folder / WEIGHTS).stat().st_size,
        "template": about["template"]["kind"] if about else None,
        "stop": [stop["token"] for stop in about["template"]["stop"]] if about else None,
        "notes": about["notes"] if about else None,
        "summary": json.loads(summary.read_text("utf-8")) if summary.is_file() else None,
    }


def _product(shape: list[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
