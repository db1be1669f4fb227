"""An adapter on a tiny llama."""

from pathlib import Path

import pytest
import torch

from tests.support.exported import adapter_of, folder_of


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("llama")
    return adapter_of(folder_of("llama", place / "base"), place / "adapter")
