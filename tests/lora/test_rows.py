"""Rows with different adapters in a call of the model itself, beside each row alone."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorasmith.errors import ConfigError
from lorasmith.lora.layer import LoRAEmbedding, LoRALayer
from lorasmith.lora.router import Router
from lorasmith.lora.rows import ALL, RowRouting, check_rows

T, H = 5, 4


class Model(nn.Module):
    """An embedding and a linear layer, which may get its input flattened, or three copies of each row."""

    def __init__(self, flat: bool = False, copies: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router, self.flat, self.copies = Router(), flat, copies
        self.embedding = LoRAEmbedding(nn.Embedding(20, H).double(), self.router)
        self.linear = LoRALayer(nn.Linear(H, H).double(), H, H, self.router)
        for i, name in enumerate(("a", "b")):
            self.embedding.add(name, 2, 0.5 + i, torch.device("cpu"))
            self.linear.add(name, 2, 0.7 + i, 0.0, torch.device("cpu"))
        for p in self.parameters():
            nn.init.normal_(p)

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.embedding(ids).repeat_interleave(self.copies, dim=0)
        return self.linear(x.flatten(0, 1)).view(x.shape) if self.flat else self.linear(x)


def ids(rows: int) -> Tensor:
    return torch.randint(20, (rows, T), generator=torch.Generator().manual_seed(1))


def alone(model: Model, name: str | None, x: Tensor) -> Tensor:
    model.router.activate([] if name is None else [name])
    return model(x)


@pytest.mark.parametrize(("flat", "copies"), [(False, 1), (True, 1), (False, 3)])
@pytest.mark.parametrize("names", [("a", None, "b"), ("a", "a", "b"), ("b", "b", "b"), (None, None, None)])
def test_each_row_is_computed_as_alone(names: Sequence[Any], flat: bool, copies: int) -> None:
    model, x = Model(flat, copies), ids(3)
    with RowRouting(model, model.router).block(names, [ALL] * 3):
        mixed = model(x)
    assert model.router.slices is None
    for i, name in enumerate(names):
        wanted = alone(model, name, x[i : i + 1])
        torch.testing.assert_close(mixed[i * copies : (i + 1) * copies], wanted)


@pytest.mark.parametrize("last", [(0, 2, T), (T + 4, 1, 0)])
def test_an_adapter_may_be_active_in_the_last_tokens_only(last: tuple[int, ...]) -> None:
    model, x = Model(), ids(3)
    with RowRouting(model, model.router).block(["a", "b", "a"], last):
        mixed = model(x)
    for i, (name, active) in enumerate(zip(("a", "b", "a"), last, strict=True)):
        first = max(T - active, 0)
        torch.testing.assert_close(mixed[i, :first], alone(model, None, x[i : i + 1])[0, :first])
        torch.testing.assert_close(mixed[i, first:], alone(model, name, x[i : i + 1])[0, first:])


def test_an_adapter_that_no_token_uses_gets_zeros() -> None:
    model = Model().requires_grad_(False)
    for p in (model.linear.lora_A["a"].weight, model.embedding.lora_embedding_B["a"]):
        p.requires_grad_(True)
    with RowRouting(model, model.router).block(["a", "a"], [0, 0]):
        out = model(ids(2))
    torch.testing.assert_close(out, alone(model, None, ids(2)))
    out.sum().backward()
    assert model.linear.lora_A["a"].weight.grad is not None
    assert not model.linear.lora_A["a"].weight.grad.any()


def test_backward_may_compute_again_what_was_routed() -> None:
    model, x = Model().train(), ids(2)
    routing = RowRouting(model, model.router)
    model.gradient_checkpointing = True  # as in transformers
    with routing.block(["a", "b"], [1, 3]):
        first = model(x)
    torch.testing.assert_close(model(x), first)  # as backward does
    with routing.block(["b", "a"], [ALL, ALL]):
        assert not torch.allclose(model(x), first)
    with pytest.raises(ValueError, match="a backward pass after each forward pass"), routing.block(["b"], [ALL]):
        pass
    with torch.no_grad(), routing.block(["b", "a"], [ALL, ALL]):
        model(x)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_experts_and_odd_numbers_of_rows_are_refused() -> None:
    model = Model()
    with pytest.raises(ValueError, match="linear gets 3 rows, but 2 adapters are named"):
        check_rows(3, 2, "linear")
    with pytest.raises(ValueError, match="3 rows"), RowRouting(model, model.router).block(["a", "b"], [ALL, ALL]):
        model(ids(3))
    assert not any(module._forward_pre_hooks for module in model.modules())
    outer = nn.ModuleDict({"experts": model})
    with (
        pytest.raises(ConfigError, match=r"experts\.embedding belongs to experts"),
        RowRouting(outer, model.router).block(["a"], [ALL]),
    ):
        pass
