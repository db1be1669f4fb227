"""Exporting a run to a folder for Ollama: the GGUF file with its certificate, and a Modelfile.

The chat template is in the GGUF file, from which Ollama takes it (0.34 and later); it needs no TEMPLATE.
"""

from pathlib import Path

from lorasmith.adapters.certificate import Export, certificate_of, write_certificate
from lorasmith.adapters.output import output_folder
from lorasmith.config.model import ModelConfig
from lorasmith.config.sampling import SamplingConfig
from lorasmith.config.toml import load_config
from lorasmith.export.gguf.file import Kind
from lorasmith.export.gguf.subject import Rows, Subject, no_rows
from lorasmith.i18n import _
from lorasmith.report import Report

CONTEXT = 4096  # Ollama's context length unless the Modelfile says another
RUN_CONFIG = "config.toml"
OTHER_QUOTES = "'" * 3
QUOTES = '"""'


def export_ollama(
    path: str | Path,
    output: str | Path,
    kind: Kind = "f16",
    config: ModelConfig | None = None,
    overwrite: bool = False,
    report: Report | None = None,
    rows: Rows = no_rows,
) -> Export:
    """Merge the adapter of a run or adapter folder, and write the model with a Modelfile to the folder `output`.

    Arguments and errors are those of `export_gguf`.
    """
    report, run = report or Report(), Path(path).expanduser()
    with output_folder(output, overwrite) as folder:
        subject = Subject.open(run, config or ModelConfig(), report, rows)
        target = folder.path / f"{folder.path.resolve().name}.gguf"
        report.say(_("Writing {file} ({kind})", file=target, kind=kind))
        made: list[Export] = []

        def fill(staging: Path) -> None:
            file = staging / target.name
            made.append(write_certificate(file, subject.write(file, kind, target)))
            (staging / "Modelfile").write_text(modelfile(subject, file.name, _max_length(run)), "utf-8")

        folder.write(fill)
    return Export(target, certificate_of(target), made[0].content)


def modelfile(subject: Subject, file: str, max_length: int = 0) -> str:
    """The Modelfile. Sampling is lorasmith's, and the system message that of the training.

    max_length: tokens of the longest row in the training, as far as it is known.
    """
    template = subject.trained.template
    lines = [f"FROM ./{file}", f"PARAMETER temperature {SamplingConfig().temperature:g}"]
    lines += [f'PARAMETER stop "{template.token(i)}"' for i in subject.encoding.ends]
    if max_length > CONTEXT:
        lines.append(f"PARAMETER num_ctx {min(max_length, subject.trained.context)}")
    if template.system:
        lines.append(f"SYSTEM {QUOTES}{template.system.replace(QUOTES, OTHER_QUOTES)}{QUOTES}")
    return "\n".join(lines) + "\n"


def _max_length(run: Path) -> int:
    """The longest rows that a run was trained on; 0 if that is not known."""
    path = run / RUN_CONFIG
    return (load_config(path, {}).data.max_length or 0) if path.is_file() else 0
