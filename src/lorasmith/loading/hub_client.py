"""huggingface_hub, as models and data sets are fetched with it: why it gave nothing, in words; its progress as ours."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from lorasmith.errors import first_line
from lorasmith.i18n import _
from lorasmith.report import Report


def why_refused(error: Exception, page: str) -> str:
    """Why nothing came, as a part of a sentence; `page` is where a person sees the repository."""
    hub: Any = import_module("huggingface_hub")
    if isinstance(error, hub.errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # why it had to look into its cache
    if isinstance(error, hub.errors.GatedRepoError):
        return _("access is restricted: request it at {page}, then set HF_TOKEN", page=page)
    if isinstance(error, hub.errors.RepositoryNotFoundError):
        return _("it does not exist, or it is private and HF_TOKEN gives no access to it")
    if isinstance(error, hub.errors.OfflineModeIsEnabled):
        return _("HF_HUB_OFFLINE is set")
    said = getattr(error, "server_message", None)
    return ": ".join(filter(None, (first_line(error).rstrip(".:"), str(said or "").rstrip("."))))


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Within it the client shows no bar and no warning of its own: that it tries again is no news."""
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


def bar_of(report: Report, task: str, total: int) -> Any:
    """The class of bars that snapshot_download is to make: the bytes of all files, in megabytes of `total`."""
    tqdm: Any = import_module("tqdm")

    class Bar(tqdm.tqdm):  # type: ignore[misc]
        def __init__(self, *words: Any, **named: Any) -> None:
            super().__init__(*words, **named, file=io.StringIO())

        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            if self.unit == "B" and pos is None:  # others count files; with a position, the bar is being closed
                report.progress(task, min(int(self.n / 1e6), total - 1), total)

    return Bar
