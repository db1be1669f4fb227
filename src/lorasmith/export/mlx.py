"""Exporting an adapter to a folder that mlx-lm reads: `mlx_lm.generate --adapter-path`.

mlx-lm adds scale (x a) b, with one rank and one scale for all layers, where a is A and b is B, both transposed. Ranks
are filled up with zeros.
"""

import json
import math
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from lorasmith.adapters.certificate import Export, certify_folder
from lorasmith.adapters.output import output_folder
from lorasmith.adapters.public_names import without_folders
from lorasmith.config.model import ModelConfig
from lorasmith.errors import AdapterError, ModelError
from lorasmith.export.plain_lora import PlainLora, folded, require_same_logits
from lorasmith.export.readback.adapters import has_mlx_lm, mlx_logits
from lorasmith.i18n import _, listed
from lorasmith.lora.combine import Factors, padded
from lorasmith.report import Report

PROGRAM = "mlx-lm"
INSTEAD = "lorasmith merge RUN"
LAYER = re.compile(r"model\.layers\.\d+\.(.+)")
HEAD = "lm_head"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3", "olmo2", "granite", "gemma3_text")
CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"


def export_mlx(
    path: str | Path,
    output: str | Path,
    config: ModelConfig | None = None,
    overwrite: bool = False,
    report: Report | None = None,
) -> Export:
    """Write the adapter of a run or adapter folder to the folder `output`, in float32, with its certificate.

    Raises:
        RunError: `output` exists and is not to be replaced, or cannot be written.
        ModelError: mlx-lm's names of the layers are not known for this family.
        AdapterError: the adapter is more than A and B of linear layers, or the files are not the trained adapter.
    """
    with output_folder(output, overwrite, "adapter") as folder:
        own = PlainLora.open(path, config or ModelConfig(), report or Report(), PROGRAM, INSTEAD)
        _require_known(own)
        made: list[Export] = []

        def fill(staging: Path) -> None:
            _write(staging, own)
            made.append(_compare(staging, folder.path, own))

        folder.write(fill)
    return Export(folder.path, folder.path / made[0].certificate.name, made[0].content)


def compare_mlx(path: str | Path, folder: Path, config: ModelConfig, report: Report) -> Export:
    """Compare an exported folder with a run or adapter folder, and write its certificate anew.

    Raises AdapterError if it is not the trained adapter.
    """
    own = PlainLora.open(path, config, report, PROGRAM, INSTEAD)
    report.say(_("Comparing {file} with the trained model", file=folder))
    return _compare(folder, folder, own)


def _compare(folder: Path, name: Path, own: PlainLora) -> Export:
    """name: what the folder is or will be called."""
    error = own.require_same(name, read_factors(folder))
    readings: list[dict[str, Any]] = [
        {"reader": "safetensors", "version": version("safetensors"), "error": error},
    ]
    if has_mlx_lm():
        found = require_same_logits(name, own.logits, mlx_logits(folder, own.base, own.probes))
        readings.append({"reader": PROGRAM, "version": version(PROGRAM), "error": found.error})
    return certify_folder(folder, "mlx", own.identity, readings)


def read_factors(folder: Path) -> dict[str, Factors]:
    """The matrices in a folder, by the paths of the layers."""
    scale = float(json.loads((folder / CONFIG).read_text("utf-8"))["lora_parameters"]["scale"])
    tensors = load_file(folder / WEIGHTS)
    paths = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    return {path: Factors(tensors[f"{path}.lora_a"].t(), tensors[f"{path}.lora_b"].t(), scale) for path in paths}


def _require_known(own: PlainLora) -> None:
    odd = [path for path in own.factors if not LAYER.fullmatch(path) and path != HEAD]
    if own.config.model_type not in FAMILIES or odd:
        raise ModelError(
            _(
                "{name}: lorasmith does not know what mlx-lm calls this layer in models of type {kind}; it knows "
                "{known}. Merge the adapter instead: {instead}",
                name=(odd or [next(iter(own.factors))])[0],
                kind=own.config.model_type,
                known=listed(FAMILIES),
                instead=INSTEAD,
            )
        )
    if HEAD in own.factors and own.config.tie_word_embeddings:
        raise AdapterError(
            _(
                "lm_head: it shares its weight with the embedding, and mlx-lm then has no such layer. Merge the "
                "adapter instead: {instead}",
                instead=INSTEAD,
            )
        )


def _write(folder: Path, own: PlainLora) -> None:
    """One scale: that of all layers if it is the same, else 1, and B has the rest."""
    scales = {factors.scaling for factors in own.factors.values()}
    scale = scales.pop() if len(scales) == 1 else 1.0
    rank = max(factors.rank for factors in own.factors.values())
    tensors = {}
    for path, factors in folded(own.factors, lambda _one: scale).items():
        whole = padded(factors, rank)
        tensors[f"{path}.lora_a"] = whole.A_RI.t().contiguous()
        tensors[f"{path}.lora_b"] = whole.B_OR.t().contiguous()
    save_file(tensors, folder / WEIGHTS, {"format": "mlx"})
    (folder / CONFIG).write_text(json.dumps(_config(own, rank, scale), indent=2) + "\n", "utf-8")


def _config(own: PlainLora, rank: int, scale: float) -> dict[str, Any]:
    matched = (LAYER.fullmatch(path) for path in own.factors)
    keys = dict.fromkeys(found[1] if found else HEAD for found in matched)
    return {
        "fine_tune_type": "lora",
        "num_layers": own.config.num_hidden_layers,
        "lora_parameters": {"rank": rank, "scale": _short(scale), "dropout": 0.0, "keys": sorted(keys)},
        "model": without_folders(own.folder.base),
    }


def _short(scale: float) -> float:
    """The decimal fraction that was meant, such as 0.1, if lora_alpha / r is this up to its last bits."""
    short = float(f"{scale:.15g}")
    return short if abs(short - scale) <= 2 * math.ulp(scale) else scale
