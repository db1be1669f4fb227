"""Helpers for downloads of models and data sets with huggingface_hub: failures in words, progress reports."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from lorasmith.errors import first_line
from lorasmith.i18n import _
from lorasmith.report import Report


def failure_reason(error: Exception, page: str) -> str:
    """Why a download failed, as part of a sentence. page: URL of the repository's web page."""
    hub: Any = import_module("huggingface_hub")
    if isinstance(error, hub.errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # the client falls back on its cache; this is why
    if isinstance(error, hub.errors.GatedRepoError):
        return _("access is restricted: request access at {page}, then set HF_TOKEN", page=page)
    if isinstance(error, hub.errors.RepositoryNotFoundError):
        return _("it does not exist, or it is private and HF_TOKEN gives no access to it")
    if isinstance(error, hub.errors.OfflineModeIsEnabled):
        return _("HF_HUB_OFFLINE is set")
    said = getattr(error, "server_message", None)
    return ": ".join(filter(None, (first_line(error).rstrip(".:"), str(said or "").rstrip("."))))


@contextmanager
def offline() -> Iterator[None]:
    """Let the client use only its cache inside the block."""
    hub: Any = import_module("huggingface_hub")
    before = hub.constants.HF_HUB_OFFLINE
    hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.constants.HF_HUB_OFFLINE = before


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Silence the client's progress bars and its warnings about retries inside the block."""
    hub: Any = import_module("huggingface_hub")
    bars, verbosity = hub.utils.are_progress_bars_disabled(), hub.utils.logging.get_verbosity()
    hub.utils.disable_progress_bars()
    hub.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        hub.utils.logging.set_verbosity(verbosity)
        if not bars:
            hub.utils.enable_progress_bars()


def progress_bar_class(report: Report, task: str, total: int) -> Any:
    """A tqdm class for snapshot_download that reports to `report` instead of drawing.

    Progress is in megabytes of all files, out of `total`.
    """
    tqdm: Any = import_module("tqdm")

    class Bar(tqdm.tqdm):  # type: ignore[misc]
        def __init__(self, *words: Any, **named: Any) -> None:
            super().__init__(*words, **named, file=io.StringIO())

        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            if self.unit == "B" and pos is None:  # other bars count files; a bar with a position is being closed
                report.progress(task, min(int(self.n / 1e6), total - 1), total)

    return Bar
