"""How often layers were computed as one."""

from typing import Any

import pytest

from lorasmith.lora.fused import linears


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
