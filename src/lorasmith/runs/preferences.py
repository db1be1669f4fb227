"""Evaluate adapters on the held-out preferences of a run: by its loss, beside the model as it stood at its start."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from lorasmith.adapters.session import Session
from lorasmith.config.toml import Config
from lorasmith.evaluation.preference import PreferenceComparison, compare_preferences
from lorasmith.i18n import _
from lorasmith.model.row import Example
from lorasmith.report import Report
from lorasmith.training.distributed import World
from lorasmith.training.preference import Preference, Reference, loss_of
from lorasmith.training.run_files import REFERENCE


def preference_comparisons(
    session: Session, run: Path, config: Config, held_out: Sequence[Example], report: Report
) -> Iterator[PreferenceComparison]:
    """Each adapter of the session on the examples that `run`, whose configuration is `config`, held out.

    Raises RunError if the run does not have what its starting model said of them.
    """
    loss = loss_of(config)
    assert loss is not None
    assert config.data.max_length is not None  # which config.toml always says
    preference = Preference(loss, [], held_out, config.data.max_length)
    preference.reference = Reference.load(run / REFERENCE)
    before = preference.losses_before()
    for name in session.names:
        of = _("the adapter") if len(session.names) == 1 else name
        task = _("{what} of {name}", what=_("held-out loss"), name=of)
        after = preference.losses(session.base, name, report, task, World())
        yield compare_preferences(before, after, config.training.seed)
