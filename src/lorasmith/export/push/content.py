"""What goes to a hub: the files of an export by their names there, and the model card."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lorasmith.adapters.certificate import CARD, INSIDE, certificate_of, hashes, require_unchanged
from lorasmith.adapters.folder import find_adapter, find_model
from lorasmith.config.model import ModelConfig
from lorasmith.errors import RunError
from lorasmith.export.card import MergedCard, of_run
from lorasmith.export.mlx import WEIGHTS as MLX_WEIGHTS
from lorasmith.export.peft_folder import export_peft
from lorasmith.export.verify import gguf_in
from lorasmith.i18n import _
from lorasmith.lora.adapter_config import ADAPTER_CONFIG
from lorasmith.report import Report

MODELFILE = "Modelfile"


@dataclass(frozen=True)
class Content:
    """Files by their names in the repository. format: as in `export --to`. card: the text of README.md."""

    format: str
    files: Mapping[str, Path]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.files.values())

    @property
    def card(self) -> str:
        """The model card."""
        return self.files[CARD].read_text("utf-8", errors="replace")


@contextmanager
def content_of(
    path: str | Path, repository: str, base_name: str | None, config: ModelConfig, report: Report
) -> Iterator[Content]:
    """What of a run, an adapter folder, or an exported file or folder goes to the repository ORG/NAME.

    An adapter is exported as `--to peft` does, to a folder that is removed at the end; the rest must be what its
    certificate was given for. A card is written where there is none.

    Raises:
        RunError: there is nothing to upload, or it has no certificate or has changed since.
        AdapterError, ModelError: as `export_peft` does.
    """
    source = Path(path).expanduser()
    if not source.exists():
        raise RunError(_("{file}: there is no such file or folder.", file=source))
    with TemporaryDirectory(prefix="lorasmith-push-") as place:
        made = Path(place) / repository.rpartition("/")[2]
        made.mkdir()
        yield _content(source, made, repository, base_name, config, report)


def _content(
    source: Path, made: Path, repository: str, base_name: str | None, config: ModelConfig, report: Report
) -> Content:
    file = source if source.is_file() else gguf_in(source)
    if file is not None:
        content = require_unchanged(file).content
        files = {file.name: file, certificate_of(file).name: certificate_of(file)}
        if (file.parent / MODELFILE).is_file() and source.is_dir():
            files[MODELFILE] = file.parent / MODELFILE
        return _with_card("gguf", files, file.parent if source.is_dir() else None, made, content, repository, base_name)
    if (model := find_model(source)) is not None:
        files = {name: model / name for name in hashes(model)}
        return _with_card("transformers", files, None, made, {}, repository, base_name, model.parent)
    if not (source / INSIDE).is_file() and _is_adapter(source):
        return _packed(source, made, repository, base_name, config, report)
    content = require_unchanged(source).content
    if content.get("target") == "peft" and base_name:
        raise RunError(
            _(
                "{folder} has its card and the name of its base model already. Leave out --base-name, or give it to "
                "lorasmith export.",
                folder=source,
            )
        )
    if content.get("target") == "peft" and not (source / CARD).is_file():
        return _packed(source, made, repository, base_name, config, report)
    files = {name: source / name for name in (*content["files"], INSIDE)}
    return _with_card(str(content.get("target")), files, source, made, content, repository, base_name)


def _is_adapter(source: Path) -> bool:
    """Whether this is a run with an adapter, or an adapter folder that is not one of mlx-lm's."""
    if (source / "config.toml").is_file():
        return True
    return (source / ADAPTER_CONFIG).is_file() and not (source / MLX_WEIGHTS).is_file()


def _packed(
    source: Path, made: Path, repository: str, base_name: str | None, config: ModelConfig, report: Report
) -> Content:
    run = source if (source / "config.toml").is_file() else find_adapter(source)
    shutil.rmtree(made)
    folder = export_peft(run, made, config, False, report, base_name, repository).file
    return Content("peft", {name: folder / name for name in (CARD, *hashes(folder), INSIDE)})


def _with_card(
    kind: str, files: Mapping[str, Path], folder: Path | None, made: Path, certificate: Mapping[str, Any],
    repository: str, base_name: str | None, run: Path | None = None,
) -> Content:  # fmt: skip
    """With the card of the folder, or a new one."""
    own = folder / CARD if folder is not None else None
    if own is not None and own.is_file() and not base_name:
        return Content(kind, {CARD: own, **files})
    card = MergedCard(repository, kind, base_name, certificate, *of_run(run) if run else (None, {}, {}))
    (made / CARD).write_text(card.text(), "utf-8")
    return Content(kind, {CARD: made / CARD, **files})
