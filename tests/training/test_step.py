"""One step: no frozen tensor moves, nothing waits for the device, and a loss that is no number moves nothing."""

import hashlib
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from lorasmith.cli.main import main
from lorasmith.config.lora import LoraConfig
from lorasmith.config.training import TrainingConfig
from lorasmith.lora.inject import Adapter, inject
from lorasmith.model import attention
from lorasmith.model.base import Base
from lorasmith.model.row import Row, Step, flatten
from lorasmith.training import assemble as assembly
from lorasmith.training.distributed import World
from lorasmith.training.optim import FlatParameters
from lorasmith.training.optimizers import make_optimizer
from lorasmith.training.run_files import read_summary
from lorasmith.training.step import Log, train_step
from tests.support.families import adapted, example, tiny_base
from tests.support.tiny import EXACT, assert_same_results, flags, model_folder, rows_file, settings, trained

FAMILIES = ["llama", "gpt2", "bloom"]


def rows() -> tuple[Row, ...]:
    """Two rows of one step."""
    parts = [[example(5, 1), example(9, 2)], [example(3, 3), example(12, 4)]]
    total = sum(e.weight for part in parts for e in part)
    return tuple(flatten(part, total) for part in parts)


def step_of(base: Base, adapter: Adapter, clip: float = 1.0, of: tuple[Row, ...] | None = None) -> Log:
    parameters = FlatParameters(adapter.parameters)
    optimizer = make_optimizer(parameters, TrainingConfig())
    return train_step(base, parameters, optimizer, Step(of or rows(), 16), clip, World())


class NoWaiting(TorchDispatchMode):
    """Fails where the host must wait for a value on the device: its number, or how many there are."""

    WAITING = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten._unique2", "aten.equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        places = tree_leaves(args[1:2]) if str(func).startswith("aten.index") else []
        by_mask = any(isinstance(t, torch.Tensor) and t.dtype == torch.bool for t in places)
        waits = by_mask or str(func).startswith(self.WAITING)
        assert not waits, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "waits",
    [
        lambda t: bool(t[0] > 0),
        lambda t: t[0].item(),
        lambda t: t[t > 0],
        lambda t: t.masked_select(t > 0),
        lambda t: t.nonzero(),
        lambda t: t.index_put((t > 0,), t[0]),
    ],
)
def test_the_watch_for_waiting_sees_it(waits):
    values = torch.ones(3)
    with NoWaiting(), pytest.raises(AssertionError, match="waits for the device"):
        waits(values)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.2}, {"bias": "all"}])
def test_a_step_never_waits_for_the_device(family, options):
    base, adapter = adapted(family, torch.float32, **options)
    parameters = FlatParameters(adapter.parameters)
    optimizer = make_optimizer(parameters, TrainingConfig())
    before = parameters.values.detach().clone()
    with NoWaiting():
        log = train_step(base, parameters, optimizer, Step(rows(), 16), 1.0, World())
    assert log.is_finite()
    assert not torch.equal(before, parameters.values)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_step_runs_on_tensors_without_values(family):
    """Shapes and Python integers decide everything: what a GPU needs, seen without one."""
    probed, real = tiny_base(family), rows()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = AutoModelForCausalLM.from_config(probed.model.config).requires_grad_(False)
        model.set_attn_implementation(attention.IMPLEMENTATION)
        base = Base(model, None, family, None, torch.float32, torch.device("cpu"), layout="packed", head=probed.head)
        log = step_of(base, inject(model, LoraConfig(r=4), base.router), of=real)
    assert isinstance(log.loss, FakeTensor)
    assert log.grad_norm.shape == ()


def test_clipping_is_that_of_torch():
    norms = {}
    for clip in (0.0, 0.5, 1e9):
        base, adapter = adapted("llama")
        norms[clip] = float(step_of(base, adapter, clip).grad_norm)
        own = [p.grad for p in adapter.parameters.values()]
        left = torch.linalg.vector_norm(torch.stack([g.norm() for g in own]))
        assert float(left) == pytest.approx(0.5 if clip == 0.5 else norms[clip], rel=1e-5)
    assert len({round(norm, 9) for norm in norms.values()}) == 1  # the norm that is logged is the one before clipping
    assert norms[0.0] > 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_run_leaves_every_tensor_of_the_base_as_it_was(tmp_path, monkeypatch, family):
    """Law 3, by hashes."""
    seen: list[tuple[Base, dict[str, str]]] = []
    load_base = assembly.load_base

    def load(*args: Any) -> Base:
        base = load_base(*args)
        seen.append((base, hashes(base)))
        return base

    monkeypatch.setattr(assembly, "load_base", load)
    trained(tmp_path / "run", model=str(model_folder(family)), lora_dropout=0.1, gradient_checkpointing=True)
    ((base, before),) = seen
    after = {key.replace(".base_layer", ""): value for key, value in hashes(base).items() if ".lora_" not in key}
    assert after == before
    adapter = base.adapters["default"].parameters
    assert {n for n, p in base.model.named_parameters() if p.grad is not None} == {
        n for n, p in base.model.named_parameters() if any(p is q for q in adapter.values())
    }


def hashes(base: Base) -> dict[str, str]:
    return {n: hashlib.sha256(p.detach().numpy().tobytes()).hexdigest() for n, p in base.model.named_parameters()}


def test_a_loss_that_is_no_number_stops_before_the_optimizer(tmp_path, capsys):
    """The first step is so long that the second one's loss overflows."""
    options = settings(learning_rate=1e30, schedule="constant", weight_decay=0.1, held_out=0)
    files, bad, good = rows_file(tmp_path / "rows.jsonl"), tmp_path / "bad", tmp_path / "good"
    assert main(["train", files, "--output", str(bad), *flags(options)]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: step 2: loss nan, gradient norm nan: not finite, so the optimizer step was skipped")
    assert len(err.splitlines()) == 1
    assert len([word for word in err.split() if "rows.jsonl" in word]) == options["batch_size"]
    assert str(bad / "checkpoints" / "step-000001") in err
    assert read_summary(bad) is None
    assert not (bad / "adapter").exists()
    assert main(["train", files, "--output", str(good), *flags(options | {"max_steps": 1})]) == 0
    assert out != ""
    kept, wanted = (load_file(r / "checkpoints" / "step-000001" / "state.safetensors") for r in (bad, good))
    assert kept.keys() == wanted.keys()
    assert all(torch.equal(kept[key], wanted[key]) and kept[key].isfinite().all() for key in wanted)


def test_a_first_step_without_a_number_says_that_nothing_was_learned(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lorasmith.training.step.loss_sum", lambda base, row, _objective: row_loss(base) * float("inf"))
    words = [rows_file(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "run"), *flags(settings())]
    assert main(["train", *words]) == 2
    err = capsys.readouterr().err
    assert "step 1: loss" in err
    assert "no earlier step was completed" in err
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def row_loss(base: Base) -> torch.Tensor:
    return torch.stack([p.sum() for p in base.adapters["default"].parameters.values()]).sum()


# --- law 4: any split of a step into rows and micro-batches is the same step


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize(
    "split",
    [{"row_tokens": 1}, {"row_tokens": 100}, {"batch_size": 1, "accumulate": 8}, {"batch_size": 2, "accumulate": 4}],
)
def test_any_split_into_rows_and_micro_batches_is_the_same_step(tmp_path, family, split):
    options = EXACT | {"model": str(model_folder(family)), "batch_size": 8}
    trained(tmp_path / "whole", **options)
    trained(tmp_path / "split", **options | split)
    assert_same_results(tmp_path / "split", tmp_path / "whole")
