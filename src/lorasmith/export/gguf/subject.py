"""What is exported: the merged model, its encoding and its origin, and what the trained model says."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from transformers import PreTrainedModel

from lorasmith.adapters.certificate import VERSION, identity_of, sha256_of, versions
from lorasmith.adapters.folder import find_model
from lorasmith.adapters.merge import load_plain, merge_run
from lorasmith.adapters.session import Session, open_adapters
from lorasmith.config.model import ModelConfig
from lorasmith.data.template.encoding import Template
from lorasmith.data.template.golden import PROBES
from lorasmith.errors import AdapterError, ModelError
from lorasmith.export.gguf.check import Figures, compare
from lorasmith.export.gguf.families import Value, family_of, names_of
from lorasmith.export.gguf.file import ENDS, Encoding, GGUFFile, Kind, write_gguf
from lorasmith.export.gguf.tokenizer.vocabulary import vocabulary_of
from lorasmith.export.origin import origin_of
from lorasmith.export.readback.trained import Trained, measure
from lorasmith.i18n import _, listed
from lorasmith.loading.folder import read_config
from lorasmith.model.row import Example
from lorasmith.model.vocabulary import embedding_rows
from lorasmith.report import Report
from lorasmith.version import installed_version

Rows = Callable[[Session], Sequence[Example]]


def no_rows(_session: Session) -> Sequence[Example]:
    """No held-out examples, as of an adapter without its run."""
    return ()


@dataclass(frozen=True)
class Subject:
    """A run or an adapter that is exported.

    plain: the merged model in float32, or the model of a run that trained all weights. identity: of base model and
    adapter, with their hashes. origin: where it comes from, as metadata of GGUF.
    """

    plain: PreTrainedModel
    encoding: Encoding
    trained: Trained
    identity: dict[str, Any]
    origin: dict[str, Value]
    report: Report

    @classmethod
    def open(cls, path: str | Path, config: ModelConfig, report: Report, rows: Rows = no_rows) -> Self:
        """Load and merge a run or adapter folder, after asking the trained model.

        Raises ModelError if the family or the tokenizer cannot be exported, AdapterError.
        """
        wide = ModelConfig(**config.model_dump(exclude_unset=True) | {"dtype": "float32"})
        place = Path(path).expanduser()
        session = open_adapters([place], wide, report)
        names_of(read_config(session.base.folder, config.trust_remote_code))  # refuses before the work is done
        rows_of_embedding = embedding_rows(session.base)
        encoding, origin = encoding_of(session.template, rows_of_embedding), origin_of(session)
        identity = identity_of(session)
        report.say(_("Asking the trained model"))
        trained = measure(session, rows(session), report)
        del session
        return cls(_plain(place, wide, report), encoding, trained, identity, origin, report)

    def write(self, file: Path, kind: Kind, target: Path) -> dict[str, Any]:
        """Write the GGUF file and compare what is in it. Returns the content of its certificate.

        target: what the file will be called. Raises AdapterError if it is not the trained model.
        """
        write_gguf(file, self.plain, self.encoding, kind, self.metadata(target), self.report)
        return self.compare(GGUFFile(file), kind, target)

    def compare(self, file: GGUFFile, kind: Kind, target: Path) -> dict[str, Any]:
        """The content of the certificate of a file. Raises AdapterError if it is not the trained model."""
        self.report.say(_("Comparing {file} with the trained model", file=target))
        figures = compare(file, self.plain, self.trained, kind, self.report)
        if figures.problems:
            shown = figures.problems[:8]
            raise AdapterError(
                *(_("{file} is not the trained model: {problem}.", file=target, problem=text) for text in shown)
            )
        return self._certificate(file.path, kind, figures)

    def metadata(self, target: Path) -> dict[str, Value]:
        """What the file says about itself, with full keys."""
        adapter = self.identity.get("adapter")
        return {
            "general.name": self.encoding.vocabulary.name_of(target.stem),
            "general.type": "model",
            **self.origin,
            "lorasmith.version": installed_version() or "",
            "lorasmith.base.tensors": self.identity["base"]["tensors"],
            **({"lorasmith.adapter.hash": adapter["hash"]} if adapter else {}),
        }

    def _certificate(self, file: Path, kind: str, figures: Figures) -> dict[str, Any]:
        return {
            "version": VERSION,
            "target": "gguf",
            "sha256": sha256_of(file),
            "type": kind,
            "architecture": family_of(self.plain.config).architecture,
            "figures": figures.to_json(),
            "versions": versions("gguf", "transformers", "tokenizers", "torch"),
            **self.identity,
        }


def _plain(path: Path, config: ModelConfig, report: Report) -> PreTrainedModel:
    """The model in float32, without an adapter."""
    if (model := find_model(path)) is not None:
        return load_plain(model, None, torch.float32, config.trust_remote_code)
    with tempfile.TemporaryDirectory(prefix="lorasmith-merged-") as place:
        merge_run(path, Path(place) / "model", config, report=report)
        return load_plain(Path(place) / "model", None, torch.float32, config.trust_remote_code)


def encoding_of(template: Template, rows: int) -> Encoding:
    """How conversations are encoded, for a model whose embedding has so many rows.

    Raises ModelError if GGUF has no such tokenizer, or too few keys for the tokens that end an answer.
    """
    tokenizer = template.tokenizer
    ends = _ends(template)
    if len(ends) > len(ENDS):
        raise ModelError(
            _(
                "The training has {count} tokens that end an answer ({tokens}), but GGUF can name only three.",
                count=len(ends),
                tokens=listed([str(template.token(i)) for i in ends]),
            )
        )
    words = vocabulary_of(tokenizer, rows)
    return Encoding(
        words,
        template.as_jinja(),
        ends,
        tokenizer.bos_token_id,
        tokenizer.pad_token_id,
        unknown=tokenizer.unk_token_id if words.scores else None,
    )


def _ends(template: Template) -> list[int]:
    """The stop tokens; first the one that ends an answer of the training."""
    ids = template.probe_ids(PROBES[0])
    last = next((i for i in reversed(ids) if i in template.stop_ids), None)
    return sorted(template.stop_ids, key=lambda i: i != last)
