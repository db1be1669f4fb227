"""Exporting an adapter to a folder for a hub: PEFT's files, the chat template and a model card, without own paths."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from lorasmith.adapters.certificate import CARD, Export, certify_folder, identity_of
from lorasmith.adapters.folder import NAME, AdapterFolder, find_adapter
from lorasmith.adapters.merge import adapter_logits, probe_rows
from lorasmith.adapters.output import output_folder
from lorasmith.adapters.public_names import without_folders, without_paths
from lorasmith.adapters.session import open_adapters
from lorasmith.config.model import ModelConfig
from lorasmith.data.template.encoding import Template
from lorasmith.export.card import Card, of_run
from lorasmith.export.plain_lora import require_same_logits
from lorasmith.export.readback.adapters import has_peft, peft_logits
from lorasmith.export.vllm import vllm_findings
from lorasmith.i18n import _
from lorasmith.loading.license import license_of
from lorasmith.lora.adapter_config import ADAPTER_CONFIG
from lorasmith.lora.files import ADAPTER_WEIGHTS
from lorasmith.report import Report
from lorasmith.version import installed_version

TEMPLATE = "chat_template.jinja"
COPIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def export_peft(
    path: str | Path,
    output: str | Path,
    config: ModelConfig | None = None,
    overwrite: bool = False,
    report: Report | None = None,
    base_name: str | None = None,
    repository: str | None = None,
) -> Export:
    """Write the adapter of a run or adapter folder to the folder `output`, with its certificate.

    repository: where the folder will be on the hub, for the card.
    base_name: the base model's name on the hub; by default the name that the adapter has for it, without folders.

    Raises:
        RunError: `output` exists and is not to be replaced, or cannot be written.
        AdapterError: there is no adapter, it does not fit the base model, or its logits are others when read back.
    """
    report, run = report or Report(), Path(path).expanduser()
    with output_folder(output, overwrite, "adapter") as folder:
        source = AdapterFolder.read_header(find_adapter(run))
        folder.spare([source.path])
        asked = _Asked.of(source.path, config or ModelConfig(), report)
        card = Card(
            folder.path.resolve().name, base_name or without_folders(source.base), source,
            asked.template.system, license_of(asked.base), *of_run(run), repository,
        )  # fmt: skip
        if "/" not in card.base:
            report.warn(
                _(
                    "the card names the base model {name}. On a hub, other programs look it up: give its name there "
                    "with --base-name ORG/NAME.",
                    name=card.base,
                )
            )

        for text in vllm_findings(source):
            report.warn(text)
        made: list[Export] = []

        def fill(staging: Path) -> None:
            shutil.copyfile(source.path / ADAPTER_WEIGHTS, staging / ADAPTER_WEIGHTS)
            for name in COPIED:
                if (source.path / name).is_file():
                    shutil.copyfile(source.path / name, staging / name)
            settings = dict(source.peft_config) | {"base_model_name_or_path": card.base}
            _write_json(staging / ADAPTER_CONFIG, settings)
            if source.metadata is not None:
                _write_json(staging / NAME, _public(source.metadata, card.base))
            (staging / TEMPLATE).write_text(asked.template.as_jinja(), "utf-8")
            (staging / CARD).write_text(card.text(), "utf-8")
            made.append(asked.compare(staging, folder.path))

        folder.write(fill)
    return Export(folder.path, folder.path / made[0].certificate.name, made[0].content)


def compare_peft(path: str | Path, folder: Path, config: ModelConfig, report: Report) -> Export:
    """Compare an exported folder with a run or adapter folder, and write its certificate anew.

    Raises AdapterError if it is not the trained adapter.
    """
    asked = _Asked.of(find_adapter(Path(path).expanduser()), config, report)
    report.say(_("Comparing {file} with the trained model", file=folder))
    return asked.compare(folder, folder)


@dataclass(frozen=True)
class _Asked:
    """An adapter that was asked for its logits on the probes, in float32. base: the folder of its base model.

    settings: how the base model was loaded. has_peft: whether PEFT can be asked as well.
    """

    base: Path
    settings: ModelConfig
    template: Template
    identity: Mapping[str, Any]
    probes: Sequence[list[int]]
    logits: Sequence[Tensor]
    has_peft: bool

    @classmethod
    def of(cls, adapter: Path, config: ModelConfig, report: Report) -> Self:
        """Raises AdapterError or ModelError if the adapter or its base model cannot be loaded."""
        given = config.model_dump(exclude_unset=True)
        settings = ModelConfig(**{"quantize": "none"} | given | {"dtype": "float32"})
        session = open_adapters([adapter], settings, report)
        probes = probe_rows(session)
        grows = any(folder.added_tokens for folder in session.folders.values())
        readable = settings.quantize == "none" and not grows and any(session.base.folder.glob("*.safetensors"))
        named = ModelConfig(**settings.model_dump(exclude_unset=True) | {"model": session.base.source})
        return cls(
            session.base.folder, named, session.template, identity_of(session), probes,
            adapter_logits(session, probes), readable and has_peft(),
        )  # fmt: skip

    def compare(self, folder: Path, name: Path) -> Export:
        """Read the folder back and write its certificate. name: what it is or will be called. Raises AdapterError."""
        if self.has_peft:
            reader = {"reader": "peft", "version": version("peft")}
            found = peft_logits(folder, self.base, self.probes, self.settings.trust_remote_code)
        else:
            reader = {"reader": "lorasmith", "version": installed_version() or ""}
            found = adapter_logits(open_adapters([folder], self.settings), self.probes)
        result = require_same_logits(name, self.logits, found)
        return certify_folder(folder, "peft", self.identity, [reader | {"error": result.error}])


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _public(metadata: Mapping[str, Any], base: str) -> dict[str, Any]:
    """lorasmith.json with names instead of paths."""
    notes = {key: without_paths(value) for key, value in dict(metadata.get("notes") or {}).items()}
    return dict(metadata) | {"base": dict(metadata["base"]) | {"model": base}, "notes": notes}
