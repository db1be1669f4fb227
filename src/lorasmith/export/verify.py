"""Checking what an export wrote: against its certificate, or against the run once more."""

from collections.abc import Callable
from pathlib import Path

from lorasmith.adapters.certificate import Export, require_unchanged
from lorasmith.adapters.merge import compare_merged
from lorasmith.config.model import ModelConfig
from lorasmith.errors import RunError
from lorasmith.export.gguf.model import verify_gguf
from lorasmith.export.gguf.subject import Rows, no_rows
from lorasmith.export.mlx import WEIGHTS, compare_mlx
from lorasmith.export.peft_folder import compare_peft
from lorasmith.i18n import _, listed
from lorasmith.lora.adapter_config import ADAPTER_CONFIG
from lorasmith.report import Report

Compare = Callable[[str | Path, Path, ModelConfig, Report], Export]
FOLDERS: dict[str, tuple[str, Compare]] = {
    WEIGHTS: ("mlx", compare_mlx),
    ADAPTER_CONFIG: ("peft", compare_peft),
    "config.json": ("transformers", compare_merged),
}  # by a file of theirs; the first that is there


def verify(
    path: str | Path, against: str | Path | None = None, config: ModelConfig | None = None,
    report: Report | None = None, rows: Rows = no_rows,
) -> Export:  # fmt: skip
    """Check a file or folder against its certificate; with `against`, a run, compare both anew and certify again.

    rows: as in `export_gguf`, for GGUF files.

    Raises:
        RunError: there is no such file or certificate, or something else than what the certificate was given for.
        AdapterError: it is not the model or adapter of the run.
    """
    target = Path(path).expanduser()
    if not target.is_dir():
        return verify_gguf(target, against, config, report, rows)
    if (file := gguf_in(target)) is not None:
        return verify_gguf(file, against, config, report, rows)
    if against is None:
        return require_unchanged(target)
    _format, compare = format_of(target)
    return compare(against, target, config or ModelConfig(), report or Report())


def gguf_in(folder: Path) -> Path | None:
    """The GGUF file of a folder for Ollama; None in another folder."""
    found = sorted(folder.glob("*.gguf"))
    return found[0] if len(found) == 1 else None


def format_of(folder: Path) -> tuple[str, Compare]:
    """The format of an exported folder, as in `export --to`. Raises RunError for a folder of something else."""
    for name, found in FOLDERS.items():
        if (folder / name).is_file():
            return found
    raise RunError(
        _(
            "{folder}: lorasmith did not export this folder: it has neither a GGUF file nor {names}.",
            folder=folder,
            names=listed(FOLDERS),
        )
    )
