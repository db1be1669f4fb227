"""Each optimizer against an independent one on the parameters one by one; its state; and a run that resumes."""

import sys

import pytest
import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor

from lorasmith.config.training import TrainingConfig
from lorasmith.errors import ConfigError, MissingExtraError
from lorasmith.training.optim import FlatParameters
from lorasmith.training.optimizers import Optimizer, in_groups, make_optimizer
from tests.support.tiny import Crash, adapter_bytes, crash_at, metrics, trained

NAMES = ("adamw", "adafactor", "lion", "muon")
SHAPES = {"q.lora_A.weight": (4, 12), "q.lora_B.weight": (8, 4), "q.lora_magnitude_vector": (8,), "head.weight": (9, 8)}
OPTIONS = {"learning_rate": 0.01, "weight_decay": 0.1, "beta2": 0.99}
STEPS = 6


def tensors(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in SHAPES.items()}


def options(name: str) -> TrainingConfig:
    betas = {} if name in ("adafactor", "muon") else {"beta2": OPTIONS["beta2"]}
    return TrainingConfig(optimizer=name, **{k: v for k, v in OPTIONS.items() if k != "beta2"} | betas)


def step(parameters: FlatParameters, optimizer: Optimizer, k: int, is_finite: bool = True) -> None:
    """Step `k`, with gradients that depend on it alone and a learning rate that falls."""
    parameters.zero()
    for p, gradient in zip(parameters.tensors, tensors(k).values(), strict=True):
        p.grad.copy_(gradient)
    optimizer.lr = 0.01 / k
    optimizer.step(torch.tensor(is_finite))


def ours(name: str, steps: int = STEPS) -> tuple[FlatParameters, Optimizer]:
    parameters = FlatParameters({key: nn.Parameter(value) for key, value in tensors(0).items()})
    optimizer = make_optimizer(parameters, options(name))
    for k in range(1, steps + 1):
        step(parameters, optimizer, k)
    return parameters, optimizer


def lion(values: list[nn.Parameter], **_options: object) -> dict[str, list[Tensor]]:
    """Algorithm 2 of arXiv:2302.06675, as it is written there."""
    averages = [torch.zeros_like(p) for p in values]
    for k in range(1, STEPS + 1):
        for p, g, m in zip(values, tensors(k).values(), averages, strict=True):
            c = 0.9 * m + (1 - 0.9) * g
            p.data -= 0.01 / k * (torch.sign(c) + 0.1 * p.data)
            m.copy_(0.99 * m + (1 - 0.99) * g)
    return {}


def theirs(name: str) -> list[nn.Parameter]:
    """The same steps with optimizers of torch and transformers that get the parameters one by one."""
    values = [nn.Parameter(value) for value in tensors(0).values()]
    if name == "lion":
        lion(values)
        return values
    adamw = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    parts: list[torch.optim.Optimizer] = {
        "adamw": lambda: [torch.optim.AdamW(values, **adamw)],
        "adafactor": lambda: [
            Adafactor([p], lr=0.01, scale_parameter=False, relative_step=False, weight_decay=0.1) for p in values
        ],
        "muon": lambda: [
            torch.optim.Muon(values[:2], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(values[2:], **adamw | {"betas": (0.9, 0.999)}),
        ],
    }[name]()
    for k in range(1, STEPS + 1):
        for p, gradient in zip(values, tensors(k).values(), strict=True):
            p.grad = gradient
        for part in parts:
            part.param_groups[0]["lr"] = 0.01 / k
            part.step()
    return values


@pytest.mark.parametrize("name", NAMES)
def test_steps_equal_those_of_an_independent_optimizer(name):
    parameters, _optimizer = ours(name)
    for p, other in zip(parameters.tensors, theirs(name), strict=True):
        torch.testing.assert_close(p.detach(), other.detach(), rtol=1e-9, atol=1e-12)
    start = torch.cat([value.flatten() for value in tensors(0).values()])
    assert (parameters.values - start).abs().min() > 1e-5, "every parameter has moved"


@pytest.mark.parametrize("name", NAMES)
def test_no_step_is_made_if_the_loss_or_gradient_is_not_finite(name):
    parameters, optimizer = ours(name)
    before = parameters.values.detach().clone()
    step(parameters, optimizer, STEPS + 1, is_finite=False)
    assert torch.equal(parameters.values, before)


@pytest.mark.parametrize("name", NAMES)
def test_a_restored_state_goes_on_as_if_nothing_had_happened(name):
    parameters, optimizer = ours(name, steps=3)
    saved = {key: value.clone() for key, value in optimizer.tensors().items()}
    values = parameters.values.detach().clone()
    others, again = ours(name, steps=0)
    again.restore(saved, 3)
    others.values.data.copy_(values)
    assert {key: value.tolist() for key, value in again.tensors().items()} == {
        key: value.tolist() for key, value in saved.items()
    }
    for k in range(4, STEPS + 1):
        step(parameters, optimizer, k)
        step(others, again, k)
    assert torch.equal(parameters.values, others.values)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_that_does_not_fit_is_refused(name):
    _parameters, optimizer = ours(name, steps=2)
    saved = optimizer.tensors()
    key = next(iter(saved))
    with pytest.raises(KeyError, match=key):
        ours(name, steps=0)[1].restore({k: v for k, v in saved.items() if k != key}, 2)
    with pytest.raises(ValueError, match=key):
        ours(name, steps=0)[1].restore(saved | {key: saved[key].half()}, 2)


def test_adamw_keeps_the_names_that_earlier_checkpoints_have():
    assert ours("adamw")[1].tensors().keys() == {"exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_run_resumes_bit_for_bit(tmp_path, name):
    """With DoRA, so that not all parameters are matrices."""
    changes = {"optimizer": name, "use_dora": True, "save_every": 1, "eval_every": 1, "lora_dropout": 0.1}
    trained(tmp_path / "whole", **changes)
    with pytest.raises(Crash):
        trained(tmp_path / "run", crash_at(3), **changes)
    trained(tmp_path / "run", resume=True, **changes)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")


@pytest.mark.parametrize("name", NAMES[1:])
def test_every_optimizer_learns(tmp_path, name):
    rate = 4e-3 if name == "lion" else 1e-2
    summary = trained(tmp_path / "run", optimizer=name, learning_rate=rate, max_steps=12)
    assert summary.loss_after < summary.loss_before - 0.3


# --- LoRA+

RATIO = 8.0


@pytest.mark.parametrize("name", NAMES)
def test_lora_plus_moves_b_and_vectors_by_the_ratio(name):
    """One step of each optimizer without weight decay is proportional to the learning rate."""
    moved = []
    for ratio in (1.0, RATIO):
        config = TrainingConfig(optimizer=name, loraplus_lr_ratio=ratio)
        named = in_groups({key: nn.Parameter(value) for key, value in tensors(0).items()}, config)
        parameters = FlatParameters(named)
        optimizer = make_optimizer(parameters, config)
        for key, p in named.items():
            p.grad.copy_(tensors(1)[key])
        optimizer.lr = 0.01
        assert optimizer.lr == 0.01, "the learning rate that is reported is that of A"
        optimizer.step(torch.tensor(True))
        moved.append({key: p.detach() - tensors(0)[key] for key, p in named.items()})
    for key, plain in moved[0].items():
        factor = RATIO if ".lora_B." in key or plain.dim() == 1 else 1
        torch.testing.assert_close(moved[1][key], factor * plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_with_lora_plus_is_another_one_and_resumes_bit_for_bit(tmp_path, name):
    changes = {"optimizer": name, "use_dora": True, "save_every": 1, "loraplus_lr_ratio": RATIO}
    trained(tmp_path / "whole", **changes)
    trained(tmp_path / "plain", **changes | {"loraplus_lr_ratio": 1.0})
    assert metrics(tmp_path / "plain") != metrics(tmp_path / "whole")
    with pytest.raises(Crash):
        trained(tmp_path / "run", crash_at(3), **changes)
    trained(tmp_path / "run", resume=True, **changes)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")


# --- AdamW in 8 bits


def test_a_run_with_8_bit_moments_resumes_bit_for_bit(tmp_path):
    changes = {"optimizer": "adamw8bit", "save_every": 1, "weight_decay": 0.1, "beta2": 0.99, "eps": 1e-6}
    trained(tmp_path / "whole", **changes)
    with pytest.raises(Crash):
        trained(tmp_path / "run", crash_at(3), **changes)
    trained(tmp_path / "run", resume=True, **changes)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")


def test_8_bit_moments_update_nearly_as_others_do():
    """Of the real package: a flat buffer of more than 4,096 numbers, below which it keeps 32 bits."""
    moved = {}
    for name in ("adamw", "adamw8bit"):
        values = nn.Parameter(torch.linspace(-1, 1, 8192))
        parameters = FlatParameters({"lora_A": values})
        optimizer = make_optimizer(parameters, TrainingConfig(optimizer=name, learning_rate=0.1, weight_decay=0.1))
        for step in range(5):
            parameters.values.grad = torch.sin(torch.arange(8192.0) + step)
            optimizer.step(torch.tensor(True))
        moved[name] = parameters.values.detach() - torch.linspace(-1, 1, 8192)
        if name == "adamw8bit":
            assert {t.dtype for key, t in optimizer.tensors().items() if key.startswith("state")} == {torch.uint8}
    difference = moved["adamw8bit"] - moved["adamw"]
    assert 0 < float(difference.norm() / moved["adamw"].norm()) < 0.1


def test_8_bit_moments_of_parameters_in_float64_are_refused():
    with pytest.raises(ConfigError, match="adamw8bit does not support parameters in float64"):
        ours("adamw8bit", steps=0)


def test_without_bitsandbytes_the_extra_is_named_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'lorasmith\[quant\]', or use adamw"):
        trained(tmp_path / "run", optimizer="adamw8bit")
    assert not (tmp_path / "run").exists()
