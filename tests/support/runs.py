"""A folder with runs in several states."""

import shutil
from pathlib import Path

import pytest

from tests.support.tiny import Crash, crash_at, trained


def runs_in_all_states(folder: Path) -> Path:
    """A finished run, one that died after step 3 of 4, and a broken one; the finished one is the oldest."""
    folder.mkdir()
    trained(folder / "first")
    with pytest.raises(Crash):
        trained(folder / "second-20261124-101500", crash_at(3), save_every=2, eval_every=2)
    shutil.copytree(folder / "first", folder / "broken")
    (folder / "broken" / "summary.json").write_text("{", "utf-8")
    (folder / "no run").mkdir()
    return folder
