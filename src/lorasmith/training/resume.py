"""Resuming: checks that a checkpoint belongs to this training, with the same options, base model and data."""

from pathlib import Path

from lorasmith.adapters.folder import AdapterFolder
from lorasmith.config.values import read_back
from lorasmith.errors import RunError
from lorasmith.i18n import _, foreign, listed
from lorasmith.lora.adapter_config import ADAPTER_CONFIG
from lorasmith.report import Report
from lorasmith.training.checkpoint import Origin, State, best_name, read_state
from lorasmith.training.loop import Job
from lorasmith.training.run_files import ENVIRONMENT

BASE = "base_"  # prefix of the settings that hold the base model's identity
EXAMPLES = ("train_sha256", "held_out_sha256")


def restored_state(job: Job, saved: Path | None, folder: Path, report: Report) -> State:
    """The state from which the run in `folder` continues: that of its checkpoint `saved`, or the start if it is None.

    Raises RunError if a file is broken, or if the run was started with other options, another base model, other
    data or another chat template. Warns of any other difference, such as the number of threads.
    """
    state, then = (State(), _environment(folder)) if saved is None else read_state(saved)
    if saved is not None:
        _refuse_impossible(saved, state, job)
        then = Origin(_identity(saved) | then.settings, then.options)
    problems = [
        *_changed_options(saved or folder, then.options, job.origin.options),
        *_changed_base(folder, then.settings, job),
    ]
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
    start = job.origin.settings.get("start_sha256")
    if then.settings.get("start_sha256", start) != start:
        problems.append(
            _(
                "{folder}: the adapter that this run starts from has changed since ({start}). Restore it, or start "
                "again with --overwrite.",
                folder=folder,
                start=job.config.start_from,
            )
        )
    template = job.origin.settings["template_sha256"]
    if then.settings.get("template_sha256", template) != template:
        problems.append(
            _(
                "{folder}: the chat template has changed since this run started. Restore the original one, or start "
                "again with --overwrite.",
                folder=folder,
            )
        )
    if problems:
        raise RunError(*problems)
    if saved is not None:
        _warn(then.settings, job.origin.settings, report)
    return state


def _environment(folder: Path) -> Origin:
    """What a run without a checkpoint was started with, as far as its environment.json says. Raises RunError."""
    path = folder / ENVIRONMENT
    if not path.is_file():
        return Origin({}, {})
    try:
        settings = read_back(path, dict[str, str])
    except (OSError, ValueError) as error:
        raise RunError(
            _("{path}: cannot be read: {error}. Start again with --overwrite.", path=path, error=error)
        ) from None
    return Origin(settings, {})


def _identity(checkpoint: Path) -> dict[str, str]:
    """The identity of the base model, from the adapter in the checkpoint, if there is one. Raises AdapterError."""
    if not (checkpoint / ADAPTER_CONFIG).is_file():
        return {}
    metadata = AdapterFolder.read_header(checkpoint).metadata
    return {f"{BASE}{part}": value for part, value in metadata["base"]["identity"].items()} if metadata else {}


def _refuse_impossible(saved: Path, state: State, job: Job) -> None:
    """Raise RunError if the checkpoint has more steps than this training, or its best adapter is missing."""
    if state.step > len(job.plan):
        raise RunError(
            _(
                "{folder}: this checkpoint belongs to another run, because this one has only {steps} steps. "
                "Remove it, or start again with --overwrite.",
                folder=saved,
                steps=len(job.plan),
            )
        )
    best = saved.with_name(best_name(state))
    if state.best_loss is not None and not best.is_dir():
        raise RunError(
            _(
                "{folder} does not exist, but {path} refers to it as the best adapter so far. Restore it, or start "
                "again with --overwrite.",
                folder=best,
                path=saved,
            )
        )


def _changed_options(where: Path, then: dict[str, str], now: dict[str, str]) -> list[str]:
    """A message and one line per option that has changed; options that only one version knows do not count."""
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


def _changed_base(folder: Path, then: dict[str, str], job: Job) -> list[str]:
    """A message if the base model has changed, otherwise nothing."""
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
    """Warn of every other setting that has changed."""
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
