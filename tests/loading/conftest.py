"""A model folder that a test may change."""

import shutil
from pathlib import Path

import pytest

from tests.support.tiny import model_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a llama's folder, to spoil."""
    return Path(shutil.copytree(model_folder("llama"), tmp_path / "model"))
