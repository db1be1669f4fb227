"""A trained adapter against its base on held-out examples: its run's own, or others."""

from collections.abc import Sequence
from pathlib import Path

from lorasmith.config import load_config
from lorasmith.data.config import DataConfig
from lorasmith.data.prepare import prepare
from lorasmith.errors import DataError
from lorasmith.evaluate import Comparison, compare, held_out
from lorasmith.i18n import _
from lorasmith.model.config import ModelConfig
from lorasmith.model.row import Example
from lorasmith.report import Report
from lorasmith.session import Session, open_adapters


def evaluate_run(
    path: str | Path,
    files: Sequence[str] = (),
    model: ModelConfig | None = None,
    limits: DataConfig | None = None,
    report: Report | None = None,
) -> Comparison:
    """Held-out loss of base and adapter, paired over examples.

    `files`: examples of the user's own, all of them measured, under the adapter's template; `limits` says how long.
    Without files, the ones that the run held out.

    Raises:
        DataError: no files are given and the run held nothing out; or what `prepare` raises.
        AdapterError, ModelError: see `open_adapters`.
    """
    report = report or Report()
    session = open_adapters([path], model, report)
    if files:
        examples = _of_files(session, files, limits or DataConfig(), report)
    else:
        examples = _of_run(session, Path(path), report)
    before = held_out(session.base, examples, None, report, _("held-out loss of the base"))
    after = held_out(session.base, examples, session.names[0], report, _("held-out loss of the adapter"))
    return compare(before, after)


def _of_files(session: Session, files: Sequence[str], limits: DataConfig, report: Report) -> list[Example]:
    config = limits.model_copy(update={"data": tuple(files), "held_out": 0.0})
    return prepare(config, session.template, session.base.max_positions, report).train


def _of_run(session: Session, run: Path, report: Report) -> list[Example]:
    file = run / "config.toml"
    if not file.is_file():
        raise DataError(
            _(
                "{run}: not a run folder, so it names no held-out examples. Give a file: lorasmith eval RUN FILE",
                run=run,
            )
        )
    config = load_config(file, {})
    examples = prepare(config.data, session.template, session.base.max_positions, report, config.training.seed).held_out
    if not examples:
        raise DataError(_("{run}: nothing was held out in this run. Give a file: lorasmith eval RUN FILE", run=run))
    return examples
