"""The matrices of the adapters in a model."""

from typing import Any

import pytest
import torch

from lorasmith.errors import AdapterError
from lorasmith.lora.factors import factors_in, factors_of, largest_rank, set_factors
from tests.lora.test_merge import adapted


def test_factors_are_those_of_plain_lora() -> None:
    base, _adapter = adapted("llama", target_modules=("q_proj", "embed_tokens"))
    for path in ("model.layers.0.self_attn.q_proj", "model.embed_tokens"):
        layer: Any = base.model.get_submodule(path)
        found = factors_of(path, layer, "default")
        assert (found.A_RI.shape[0], found.scaling) == (4, 4.0)
    base, _adapter = adapted("llama", use_dora=True)
    layer = base.model.get_submodule("model.layers.0.self_attn.q_proj")
    with pytest.raises(AdapterError, match="q_proj: adapter default is no plain LoRA"):
        factors_of("q_proj", layer, "default")


def test_matrices_are_filled_up_with_zeros() -> None:
    base, _adapter = adapted("llama", target_modules=("q_proj", "embed_tokens"))
    before = factors_in(base.model, "default")
    assert largest_rank([before]) == 32
    found = {path: type(own)(own.A_RI[:2] + 1, own.B_OR[:, :2] + 1) for path, own in before.items()}
    wanted = {path: own.delta() for path, own in found.items()}
    set_factors(base.model, "default", found, 4)
    for path, own in factors_in(base.model, "default").items():
        assert own.rank == 4
        assert torch.equal(own.delta(), wanted[path] * own.scaling)
