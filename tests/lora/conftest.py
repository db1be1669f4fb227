"""How often layers were computed as one, and a sound adapter folder."""

from pathlib import Path
from typing import Any

import pytest

from lorasmith.lora.fused import linears
from tests.support.llama_adapter import sound_folder


class Passes:
    """Counts how often layers were computed as one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        right = linears.AdaptedLinear.apply

        def apply(*args: Any) -> Any:
            self.count += 1
            return right(*args)

        monkeypatch.setattr(linears.AdaptedLinear, "apply", apply)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    """How often layers were computed as one so far."""
    return Passes(monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound adapter for llama's q_proj."""
    return sound_folder(tmp_path / "adapter")
