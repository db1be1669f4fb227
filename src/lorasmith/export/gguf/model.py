"""Exporting a run to a GGUF file, which gets its name only once it is shown to be the trained model."""

from pathlib import Path

from lorasmith.adapters.certificate import Export, certificate_of, require_unchanged, write_certificate
from lorasmith.config.model import ModelConfig
from lorasmith.errors import RunError
from lorasmith.export.gguf.families import names_of
from lorasmith.export.gguf.file import GGUFFile, Kind
from lorasmith.export.gguf.subject import Rows, Subject, no_rows
from lorasmith.export.gguf.tokenizer.vocabulary import vocabulary_of
from lorasmith.i18n import _
from lorasmith.loading.folder import check_folder, find_folder, read_config
from lorasmith.loading.tokenizer import load_tokenizer
from lorasmith.report import Report
from lorasmith.system.locking import locked
from lorasmith.system.writing import new_file, writing


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
        require_free(target, overwrite)
        subject = Subject.open(path, config, report, rows)
        report.say(_("Writing {file} ({kind})", file=target, kind=kind))
        with new_file(target) as staging:
            content = subject.write(staging, kind, target)
    return write_certificate(target, content)


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
        return require_unchanged(target)
    try:
        found = GGUFFile(target)
        kind = found.kind
    except (ValueError, IndexError, OSError) as error:
        raise RunError(_("{file}: this GGUF file is damaged ({reason}).", file=target, reason=error)) from error
    if kind is None:
        raise RunError(_("{file}: lorasmith writes no GGUF files of this type, and cannot compare it.", file=target))
    subject = Subject.open(against, config or ModelConfig(), report or Report(), rows)
    return write_certificate(target, subject.compare(found, kind, target))


def require_exportable(config: ModelConfig, report: Report | None = None) -> None:
    """Find out before a training whether what it makes could be exported: family, settings and tokenizer.

    Raises ModelError if not, or if the base model cannot be found.
    """
    folder = find_folder(config.model, report or Report())
    check_folder(folder, config.trust_remote_code)
    names_of(read_config(folder, config.trust_remote_code))
    vocabulary_of(load_tokenizer(folder, config.trust_remote_code, report or Report()), 0)


def require_free(target: Path, overwrite: bool) -> None:
    """Raise RunError if the file exists and must not be replaced, because no export wrote it or nobody asked for it."""
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
