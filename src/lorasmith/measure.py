"""A trained adapter against its base on held-out examples: its run's own, or others."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorasmith.config import Config, load_config
from lorasmith.data.config import DataConfig
from lorasmith.data.prepare import prepare
from lorasmith.errors import ConfigError, DataError, RunError
from lorasmith.evaluate import Comparison, compare, held_out
from lorasmith.i18n import _
from lorasmith.model.config import ModelConfig
from lorasmith.model.row import Example
from lorasmith.report import Report, Warnings
from lorasmith.run_folder import CONFIG, ENVIRONMENT
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
    Without files, the ones that the run held out, and with the seed of its training the interval of its summary.

    Raises:
        ConfigError: `limits` without files.
        DataError: no files are given and the run held nothing out; or what `prepare` raises.
        RunError: the run's data changed since its training.
        AdapterError, ModelError: see `open_adapters`.
    """
    if limits is not None and not files:
        raise ConfigError(
            _(
                "data.max_length and data.too_long are for files of your own: the run's held-out examples are as long "
                "as in its training. Leave them out, or give a file: lorasmith eval RUN FILE"
            )
        )
    report, run = report or Report(), Path(path).expanduser()
    session = open_adapters([run], model, report)
    config = load_config(run / CONFIG, {}) if (run / CONFIG).is_file() else None
    if files:
        examples = _of_files(session, files, limits or DataConfig(), report)
    else:
        examples = _of_run(session, run, config, report)
    before = held_out(session.base, examples, None, report, _("held-out loss of the base"))
    after = held_out(session.base, examples, session.names[0], report, _("held-out loss of the adapter"))
    return compare(before, after, config.training.seed if config else 0)


def _of_files(session: Session, files: Sequence[str], limits: DataConfig, report: Report) -> list[Example]:
    config = limits.model_copy(update={"data": tuple(files), "held_out": 0.0})
    return prepare(config, session.template, session.base.max_positions, Warnings(report)).train


def _of_run(session: Session, run: Path, config: Config | None, report: Report) -> list[Example]:
    """The run's held-out examples, drawn again from its files and proved to be the same."""
    if config is None:
        raise DataError(
            _(
                "{run}: not a run folder, so it names no held-out examples. Give a file: lorasmith eval RUN FILE",
                run=run,
            )
        )
    then = _environment(run)
    now = prepare(config.data, session.template, session.base.max_positions, Warnings(report), config.training.seed)
    if then.get("held_out_sha256") != now.held_out_sha256:
        raise RunError(
            _(
                "{run}: the data changed since the training ({files}), so the examples drawn from it are not the ones "
                "that were held out. Put the old files back, or give one: lorasmith eval RUN FILE",
                run=run,
                files=", ".join(config.data.data),
            )
        )
    if not now.held_out:
        raise DataError(_("{run}: nothing was held out in this run. Give a file: lorasmith eval RUN FILE", run=run))
    return now.held_out


def _environment(run: Path) -> dict[str, Any]:
    path = run / ENVIRONMENT
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(
            _(
                "{path}: not readable ({error}), and it says which examples were held out. "
                "Give a file: lorasmith eval RUN FILE",
                path=path,
                error=error,
            )
        ) from None
    return found if isinstance(found, dict) else {}
