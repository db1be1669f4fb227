"""Reasons of failed downloads in words, and progress of the client as ours."""

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from lorasmith.loading.hub_client import failure_reason, progress_bar_class, quiet_hub
from lorasmith.report import Report

PAGE = "https://hub.example/org/name"


def test_the_reason_is_the_cause_of_a_look_into_the_cache():
    error = LocalEntryNotFoundError("nothing in the cache")
    error.__cause__ = OfflineModeIsEnabled("offline")
    assert failure_reason(error, PAGE) == "HF_HUB_OFFLINE is set"


def test_what_the_server_said_is_part_of_the_reason():
    error = OSError("503 Server Error.\nmore")
    error.server_message = "Down for maintenance."  # type: ignore[attr-defined]
    assert failure_reason(error, PAGE) == "503 Server Error: Down for maintenance"
    assert failure_reason(OSError("503 Server Error."), PAGE) == "503 Server Error"


def test_the_client_is_quiet_inside_the_block_only():
    verbosity = huggingface_hub.utils.logging.get_verbosity()
    assert not huggingface_hub.utils.are_progress_bars_disabled()

    def fetch() -> None:
        with quiet_hub():
            assert huggingface_hub.utils.are_progress_bars_disabled()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch()
    assert not huggingface_hub.utils.are_progress_bars_disabled()
    assert huggingface_hub.utils.logging.get_verbosity() == verbosity


def test_bytes_are_progress_in_megabytes_and_files_are_not(capfd):
    class Progress(Report):
        def __init__(self) -> None:
            self.seen: list[tuple[str, int, int]] = []

        def progress(self, task: str, done: int, total: int, **_numbers: float) -> None:
            self.seen.append((task, done, total))

    report = Progress()
    bar_class = progress_bar_class(report, "downloading x", 4)
    with bar_class(total=4_000_000, unit="B", mininterval=0, miniters=1) as bar:
        for arrived in (2_500_000, 1_500_000):
            bar.update(arrived)
            bar.refresh()
    with bar_class(total=3, unit="it", mininterval=0, miniters=1) as files:
        files.update(3)
    assert ("downloading x", 2, 4) in report.seen
    assert max(done for _task, done, _total in report.seen) <= 3  # the last one is said once all files are there
    assert capfd.readouterr() == ("", "")
