"""How long an example may be for the memory of this machine."""

from types import SimpleNamespace

import pytest
import torch

from lorasmith.training import memory
from lorasmith.training.memory import affordable_tokens


def base(**sizes: int) -> SimpleNamespace:
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(**sizes))
    return SimpleNamespace(model=SimpleNamespace(config=config), device=torch.device("cpu"), dtype=torch.bfloat16)


@pytest.mark.parametrize(("free", "wanted"), [(1000.0, 3034), (100.0, 303), (None, None)])
def test_half_of_the_free_memory_is_for_one_example(monkeypatch, free, wanted):
    monkeypatch.setattr(memory, "available_mib", lambda _device: free)
    assert affordable_tokens(base(hidden_size=576, num_hidden_layers=30)) == wanted


def test_a_model_without_these_sizes_has_no_bound():
    assert affordable_tokens(base(hidden_size=576)) is None
