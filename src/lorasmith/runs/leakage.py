"""Whether an adapter is measured on rows that it learned from: as far as its run's folder and files still tell."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from lorasmith.adapters.session import Session
from lorasmith.config.toml import load_config
from lorasmith.data.dataset.fit import NAMED, in_rows
from lorasmith.data.dataset.prepare import alike, prepare
from lorasmith.data.rows.conversation import places
from lorasmith.errors import LorasmithError
from lorasmith.i18n import _
from lorasmith.model.row import Example
from lorasmith.report import Report, Warnings
from lorasmith.training.run_folder import CONFIG, ENVIRONMENT


def seen_in_training(session: Session, examples: Sequence[Example], report: Report) -> Iterator[str]:
    """A sentence for each adapter whose run learned from some of `examples`.

    Nothing of an adapter without a run, or whose files are gone or changed: then nobody can tell.
    """
    for name, folder in session.folders.items():
        learned = _learned(folder.path, session, _Progress(report))
        if both := alike(learned, examples):
            yield _(
                "{name} was trained on {rows} of the evaluation data, so its results look better than they "
                "are: {places}.",
                rows=in_rows(len(both)),
                name=name,
                places=places(both, NAMED),
            )


class _Progress(Warnings):
    """What the training's own rows were warned of is no news."""

    def warn(self, text: str) -> None:
        """Nobody is told."""


def _learned(folder: Path, session: Session, report: Report) -> list[Example]:
    """What the run of an adapter folder (or of a checkpoint) learned from, proved to be the same; else nothing."""
    runs = [place for place in list(folder.absolute().parents)[:2] if (place / ENVIRONMENT).is_file()]
    if not runs:
        return []
    try:
        config = load_config(runs[0] / CONFIG, {})
        then = json.loads((runs[0] / ENVIRONMENT).read_text("utf-8"))
        now = prepare(config.data, session.template, session.base.max_positions, report, config.training.seed)
    except (LorasmithError, OSError, ValueError):
        return []
    is_same = isinstance(then, dict) and then.get("train_sha256") == now.train_sha256
    return now.train if is_same else []
