"""What a training writes and reads again: an adapter folder, or with method "full" the folder of a whole model."""

import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasmith.adapters.folder import write_adapter
from lorasmith.adapters.whole_model import read_model, write_model
from lorasmith.data.template.encoding import Template
from lorasmith.lora.files import read_weights
from lorasmith.lora.saved_values import restore_values
from lorasmith.model.base import Base
from lorasmith.training.run_files import ADAPTER, ADAPTER_FILES, MODEL, TOKENIZER_FILES, is_model_file


@dataclass(frozen=True)
class Artifact:
    """The result of a training. `write` fills an empty folder, and `load` gives the model the values of such a folder.

    name: of its folder in the run. required: the files that it always has; is_own: whether a file belongs to it.
    in_checkpoints: whether a checkpoint contains it, too. That of a whole model would hold all weights twice.
    bytes: of its weights.
    """

    name: str
    write: Callable[[Path], None]
    load: Callable[[Path], None]
    required: Collection[str]
    is_own: Callable[[str], bool]
    in_checkpoints: bool
    bytes: int

    def copy(self, source: Path, folder: Path) -> None:
        """Copy the files of `source` into `folder`, and nothing that others put beside them."""
        own = {path.name for path in source.iterdir() if path.is_file() and self.is_own(path.name)}
        for name in sorted({*self.required, *own}):
            shutil.copyfile(source / name, folder / name)


def artifact_of(
    base: Base, adapter: str, template: Template, notes: dict[str, Any], trust_remote_code: bool = False
) -> Artifact:
    """What a training of this adapter writes. notes: what its folder records, as JSON."""
    if base.adapters[adapter].is_whole_model:
        return Artifact(
            MODEL,
            write=lambda folder: write_model(base, template, folder, trust_remote_code),
            load=lambda folder: read_model(base, folder, trust_remote_code),
            required=("config.json", "model.safetensors"),
            is_own=is_model_file,
            in_checkpoints=False,
            bytes=sum(p.nbytes for p in base.model.parameters()),
        )
    return Artifact(
        ADAPTER,
        write=lambda folder: write_adapter(base, adapter, template, folder, notes),
        load=lambda folder: restore_values(base.adapters[adapter], base.model, read_weights(folder)),
        required=ADAPTER_FILES - TOKENIZER_FILES,
        is_own=ADAPTER_FILES.__contains__,
        in_checkpoints=True,
        bytes=sum(p.nbytes for p in base.adapters[adapter].parameters.values()),
    )
