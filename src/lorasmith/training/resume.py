"""Whether a checkpoint is of the training that is to go on: of its options, its base and its examples."""

from pathlib import Path

from lorasmith.adapters.folder import AdapterFolder
from lorasmith.config.values import read_back
from lorasmith.errors import RunError
from lorasmith.i18n import _, foreign, listed
from lorasmith.report import Report
from lorasmith.training.checkpoint import Origin, State, best_name, read_state
from lorasmith.training.files import ENVIRONMENT
from lorasmith.training.loop import Job

BASE = "base_"  # begins the names of the parts of a base's identity among the settings
EXAMPLES = ("train_sha256", "held_out_sha256")


def restored_state(job: Job, found: Path | None, folder: Path, report: Report) -> State:
    """How far the run in `folder` is, by its checkpoint `found`, or by nothing but its environment.json.

    Raises RunError: a broken file, or another training, base or examples than those it began with.
    """
    state, then = (State(), _environment(folder)) if found is None else read_state(found)
    if found is not None:
        _refuse_beyond(found, state, job)
        then = Origin(_identity(found) | then.settings, then.options)
    problems = [*_of_options(found or folder, then.options, job.origin.options), *_of_base(folder, then.settings, job)]
    for key in EXAMPLES:
        if then.settings.get(key, job.origin.settings[key]) != job.origin.settings[key]:
            problems.append(
                _(
                    "{folder}: the training data has changed since this run started. Restore the original data, or "
                    "start again with --overwrite.",
                    folder=folder,
                )
            )
            break
    if problems:
        raise RunError(*problems)
    if found is not None:
        _warn(then.settings, job.origin.settings, report)
    return state


def _environment(folder: Path) -> Origin:
    """What a run without a checkpoint began with. Raises RunError."""
    path = folder / ENVIRONMENT
    if not path.is_file():
        return Origin({}, {})
    try:
        found = read_back(path, dict[str, str])
    except (OSError, ValueError) as error:
        raise RunError(
            _("{path}: cannot be read: {error}. Start again with --overwrite.", path=path, error=error)
        ) from None
    return Origin(found, {})


def _identity(checkpoint: Path) -> dict[str, str]:
    """The base's identity, as the checkpoint's adapter names it. Raises AdapterError."""
    about = AdapterFolder.glance(checkpoint).about
    return {f"{BASE}{part}": value for part, value in about["base"]["identity"].items()} if about else {}


def _refuse_beyond(found: Path, state: State, job: Job) -> None:
    """Raise RunError where a checkpoint is of no step of this training, or its best adapter is gone."""
    if state.step > len(job.plan):
        raise RunError(
            _(
                "{folder}: this checkpoint belongs to another training, because this one has only {steps} steps. "
                "Remove it, or start again with --overwrite.",
                folder=found,
                steps=len(job.plan),
            )
        )
    best = found.with_name(best_name(state))
    if state.best_loss is not None and not best.is_dir():
        raise RunError(
            _(
                "{folder} does not exist, but {path} refers to it as the best adapter so far. Restore it, or start "
                "again with --overwrite.",
                folder=best,
                path=found,
            )
        )


def _of_options(where: Path, then: dict[str, str], now: dict[str, str]) -> list[str]:
    """A sentence and a line for each option that was another one; of those alone that both know."""
    differing = [
        _("{key}: was {before}, now {now}", key=key, before=value, now=now[key])
        for key, value in then.items()
        if key in now and now[key] != value
    ]
    if not differing:
        return []
    text = _(
        "{folder}: this checkpoint was saved with options that differ from those in config.toml. Restore them, or "
        "start again with --overwrite.",
        folder=where,
    )
    return [text, *differing]


def _of_base(folder: Path, then: dict[str, str], job: Job) -> list[str]:
    """A sentence where the base is another one."""
    now = job.origin.settings
    parts = [
        key.removeprefix(BASE) for key, value in now.items() if key.startswith(BASE) and then.get(key, value) != value
    ]
    if not parts:
        return []
    return [
        _(
            "{folder}: the base model {base} has changed since this run began (in its {parts}). Restore it, or start "
            "again with --overwrite.",
            folder=folder,
            base=job.base.source,
            parts=listed(map(foreign, parts)),
        )
    ]


def _warn(then: dict[str, str], now: dict[str, str], report: Report) -> None:
    """Say what else is not as it was."""
    for key, value in now.items():
        if then.get(key, value) != value:
            report.warn(
                _(
                    "{key} was {then} and is now {now}; the remaining steps will not be bit-for-bit reproducible",
                    key=key,
                    then=then[key],
                    now=value,
                )
            )
