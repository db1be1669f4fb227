"""Leakage: whether an adapter is evaluated on rows that it was trained on, as far as its run folder can tell."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from lorasmith.adapters.folder import AdapterFolder
from lorasmith.adapters.session import Session
from lorasmith.config.files import read_object
from lorasmith.config.toml import load_config
from lorasmith.data.dataset.fit import rows_text
from lorasmith.data.dataset.prepare import leaked_sources, prepare
from lorasmith.data.rows.conversation import MAX_PLACES, places
from lorasmith.errors import LorasmithError, RunError
from lorasmith.i18n import _
from lorasmith.model.row import Example
from lorasmith.report import Report, WarningsOnly
from lorasmith.training.run_files import ENVIRONMENT, RUN_CONFIG


def leakage_warnings(session: Session, examples: Sequence[Example], report: Report) -> Iterator[str]:
    """A warning for each adapter whose run was trained on some of `examples`.

    Nothing can be told, and nothing is said, of an adapter without a run folder, or whose training data was changed or
    removed since.
    """
    made_of = {name: _made_of(folder) for name, folder in session.folders.items()}
    if session.model is not None:  # all weights were trained
        made_of = {session.model.absolute().parent.name: [session.model]}
    for name, places_ in made_of.items():
        quiet = _ProgressOnly(report)
        trained_on = [example for place in places_ for example in _training_examples(place, session, quiet)]
        if leaked := leaked_sources(trained_on, examples):
            yield _(
                "{name} was trained on {rows} of the evaluation data, so its results look better than they "
                "are: {places}.",
                rows=rows_text(len(leaked)),
                name=name,
                places=places(leaked, MAX_PLACES),
            )


def _made_of(folder: AdapterFolder) -> list[Path]:
    """The adapter folder, and those of the adapters that were combined to it, as far as they are still there."""
    found = [folder.path]
    for part in folder.notes.get("combined", {}).get("adapters", []):
        try:
            found += _made_of(AdapterFolder.read_header(Path(part["folder"])))
        except LorasmithError:
            continue
    return found


class _ProgressOnly(WarningsOnly):
    """Drops the warnings about the training data: they were given when the adapter was trained."""

    def warn(self, text: str) -> None:
        """Say nothing."""


def _training_examples(folder: Path, session: Session, report: Report) -> list[Example]:
    """What the run of an adapter folder, or of a checkpoint, was trained on, if its fingerprint is the same."""
    runs = [place for place in list(folder.absolute().parents)[:2] if (place / ENVIRONMENT).is_file()]
    if not runs:
        return []
    try:
        config = load_config(runs[0] / RUN_CONFIG, {})
        then = read_object(runs[0] / ENVIRONMENT, RunError)
        now = prepare(
            config.data, session.template, session.base.max_positions, report, config.training.seed,
            method=config.training.method,
        )  # fmt: skip
    except LorasmithError:
        return []
    return now.train if then.get("train_sha256") == now.train_sha256 else []
