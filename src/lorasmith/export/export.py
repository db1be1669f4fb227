"""Exporting a run to a GGUF file, which gets its name only once it is shown to be the trained model.

The certificate is a JSON file beside it, with hashes of file, base model and adapter, versions, and what was compared.
"""

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import file_digest
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from lorasmith.adapters.folder import AdapterFolder, find_adapter
from lorasmith.adapters.merge import load_plain, merge_run
from lorasmith.adapters.session import Session, open_adapters
from lorasmith.config.files import read_object
from lorasmith.config.model import ModelConfig
from lorasmith.data.template.encoding import Template
from lorasmith.data.template.golden import PROBES
from lorasmith.errors import AdapterError, ModelError, RunError
from lorasmith.export.check import Figures, compare
from lorasmith.export.families import Value, family_of, names_of
from lorasmith.export.gguf_file import ENDS, Encoding, GGUFFile, write_gguf
from lorasmith.export.tokenizer import vocabulary_of
from lorasmith.export.trained import Trained, measure
from lorasmith.i18n import _, listed
from lorasmith.loading.folder import read_config
from lorasmith.model.row import Example
from lorasmith.model.vocabulary import embedding_rows
from lorasmith.report import Report
from lorasmith.system.locking import locked
from lorasmith.system.writing import new_file, write_file, writing
from lorasmith.version import installed_version

Kind = Literal["f32", "f16", "bf16", "q8_0"]
VERSION = 2  # of the certificate


Rows = Callable[[Session], Sequence[Example]]


def no_rows(_session: Session) -> Sequence[Example]:
    """No held-out examples, as of an adapter without its run."""
    return ()


@dataclass(frozen=True)
class Export:
    """A finished file, the certificate beside it, and what the certificate says."""

    file: Path
    certificate: Path
    content: dict[str, Any]


def export_gguf(
    path: str | Path,
    output: str | Path,
    kind: Kind = "f16",
    config: ModelConfig | None = None,
    overwrite: bool = False,
    report: Report | None = None,
    rows: Rows = no_rows,
) -> Export:
    """Merge the adapter of a run or adapter folder, and write the model to the GGUF file `output`.

    kind: the type of the matrices; vectors stay in float32. The merged weights are rounded to it once.
    rows: gives held-out examples, whose log probabilities are compared too.

    Raises:
        RunError: `output` exists and is not to be replaced, or cannot be written.
        ModelError: the family or the tokenizer cannot be exported.
        AdapterError: there is no adapter, it does not fit, or the file is not the trained model.
    """
    report, config, target = report or Report(), config or ModelConfig(), Path(output).expanduser()
    with writing(target, is_run=False), locked(target.parent / f".{target.name}.lorasmith-lock", target):
        _require_free(target, overwrite)
        subject = _Subject.open(path, config, report, rows)
        report.say(_("Writing {file} ({kind})", file=target, kind=kind))
        with new_file(target) as staging:
            write_gguf(staging, subject.plain, subject.encoding, kind, subject.about(target))
            figures = compare(GGUFFile(staging), subject.plain, subject.trained, kind)
            _refuse_other(target, figures)
            content = subject.certificate(staging, kind, figures)
    return Export(target, _write_certificate(target, content), content)


def verify_gguf(
    file: str | Path, against: str | Path | None = None, config: ModelConfig | None = None,
    report: Report | None = None, rows: Rows = no_rows,
) -> Export:  # fmt: skip
    """Check a file against its certificate; with `against`, a run, compare both anew and write a new certificate.

    rows: as in `export_gguf`.

    Raises:
        RunError: there is no file or certificate, or the file is not the one of the certificate.
        AdapterError: the file is not the model of the run.
    """
    target = Path(file).expanduser()
    if not target.is_file():
        raise RunError(_("{file}: there is no such file.", file=target))
    if against is None:
        content = read_certificate(target)
        if content.get("sha256") != sha256_of(target):
            raise RunError(
                _(
                    "{file} is not the file of its certificate: its SHA-256 has changed. Export it again, or compare "
                    "it with its run: lorasmith verify {file} --against RUN.",
                    file=target,
                )
            )
        return Export(target, certificate_of(target), content)
    try:
        found = GGUFFile(target)
        kind = found.kind
    except (ValueError, IndexError, OSError) as error:
        raise RunError(_("{file}: this GGUF file is damaged ({reason}).", file=target, reason=error)) from error
    if kind is None:
        raise RunError(_("{file}: lorasmith writes no GGUF files of this type, and cannot compare it.", file=target))
    subject = _Subject.open(against, config or ModelConfig(), report or Report(), rows)
    figures = compare(found, subject.plain, subject.trained, kind)
    _refuse_other(target, figures)
    content = subject.certificate(target, kind, figures)
    return Export(target, _write_certificate(target, content), content)


def certificate_of(file: Path) -> Path:
    """The path of a file's certificate."""
    return file.with_name(file.name + ".certificate.json")


def read_certificate(file: Path) -> dict[str, Any]:
    """The certificate beside a file. Raises RunError if there is none."""
    path = certificate_of(file)
    if not path.is_file():
        raise RunError(
            _(
                "{file} has no certificate ({path} is missing). Compare the file with its run: lorasmith verify {file} "
                "--against RUN.",
                file=file,
                path=path.name,
            )
        )
    return read_object(path, RunError)


def sha256_of(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with file.open("rb") as stream:
        return file_digest(stream, "sha256").hexdigest()


@dataclass(frozen=True)
class _Subject:
    """What is exported: the merged model in float32, its encoding, and what the trained model says."""

    plain: PreTrainedModel
    encoding: Encoding
    trained: Trained
    names: dict[str, Any]  # of base model and adapter, with their hashes

    @classmethod
    def open(cls, path: str | Path, config: ModelConfig, report: Report, rows: Rows) -> "_Subject":
        wide = ModelConfig(**config.model_dump(exclude_unset=True) | {"dtype": "float32"})
        folder = find_adapter(Path(path).expanduser())
        session = open_adapters([folder], wide, report)
        names_of(read_config(session.base.folder, config.trust_remote_code))  # refuses before the work is done
        encoding = _encoding(session)
        names = {
            "base": {"model": session.base.source, **session.base.identity},
            "adapter": {"hash": AdapterFolder.read(folder).hash},
        }
        report.say(_("Asking the trained model"))
        trained = measure(session, rows(session))
        del session
        with tempfile.TemporaryDirectory(prefix="lorasmith-merged-") as place:
            merge_run(path, Path(place) / "model", wide, report=report)
            plain = load_plain(Path(place) / "model", None, torch.float32, config.trust_remote_code)
        return cls(plain, encoding, trained, names)

    def about(self, target: Path) -> dict[str, Value]:
        """Where the file comes from, as metadata of GGUF."""
        base, adapter = self.names["base"], self.names["adapter"]
        return {
            "general.name": self.encoding.vocabulary.name_of(target.stem),
            "general.type": "model",
            "lorasmith.version": installed_version() or "",
            "lorasmith.base.tensors": base["tensors"],
            "lorasmith.adapter.hash": adapter["hash"],
        }

    def certificate(self, file: Path, kind: str, figures: Figures) -> dict[str, Any]:
        """The content of the certificate."""
        packages = {name: version(name) for name in ("gguf", "transformers", "tokenizers", "torch")}
        return {
            "version": VERSION,
            "sha256": sha256_of(file),
            "type": kind,
            "architecture": family_of(self.plain.config).architecture,
            "figures": figures.to_json(),
            "versions": {"lorasmith": installed_version() or "", **packages},
            **self.names,
        }


def _encoding(session: Session) -> Encoding:
    template, tokenizer = session.template, session.template.tokenizer
    ends = _ends(template)
    if len(ends) > len(ENDS):
        raise ModelError(
            _(
                "The training has {count} tokens that end an answer ({tokens}), but GGUF can name only three.",
                count=len(ends),
                tokens=listed([str(template.token(i)) for i in ends]),
            )
        )
    words = vocabulary_of(tokenizer, embedding_rows(session.base))
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


def _require_free(target: Path, overwrite: bool) -> None:
    if target.is_dir():
        raise RunError(_("{file} is a folder. Give the name of a file to --output.", file=target))
    if not target.exists():
        return
    if not overwrite:
        text = _("{file} already exists. Choose another --output, or replace it with --overwrite.", file=target)
        raise RunError(text)
    if not certificate_of(target).is_file():
        raise RunError(
            _(
                "{file} has no certificate of lorasmith, so --overwrite does not replace it. Choose another --output, "
                "or remove the file yourself.",
                file=target,
            )
        )


def _refuse_other(target: Path, figures: Figures) -> None:
    if not figures.problems:
        return
    shown = [_("{file} is not the trained model: {problem}.", file=target, problem=p) for p in figures.problems[:8]]
    raise AdapterError(*shown)


def _write_certificate(target: Path, content: dict[str, Any]) -> Path:
    path = certificate_of(target)
    write_file(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n", is_run=False)
    return path
