"""Fifty steps against PEFT and torch's AdamW in plain torch; learning rates against transformers' schedules."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorasmith.config.data import DataConfig
from lorasmith.config.lora import LoraConfig
from lorasmith.config.training import TrainingConfig
from lorasmith.data.dataset.plan import plan
from lorasmith.data.dataset.prepare import prepare
from lorasmith.data.template.encoding import Template
from lorasmith.errors import TrainingError
from lorasmith.evaluation.loss import ExampleLosses, evaluate_loss
from lorasmith.lora.inject import inject
from lorasmith.lora.router import Router
from lorasmith.lora.saved_values import has_effect
from lorasmith.model.row import Example
from lorasmith.training.optim import learning_rate, warmup_steps
from lorasmith.training.run_files import read_summary
from tests.support.families import distance
from tests.support.tiny import Watch, losses, model_folder, rows_file, settings, tokenizer, trained

STEPS = 50
SCHEDULES = {
    "cosine": transformers.get_cosine_schedule_with_warmup,
    "linear": transformers.get_linear_schedule_with_warmup,
}


def scheduler(
    name: str, optimizer: torch.optim.Optimizer, warmup: int, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    if name == "constant":
        return transformers.get_constant_schedule_with_warmup(optimizer, warmup)
    return SCHEDULES[name](optimizer, warmup, steps)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(
    ("warmup", "steps", "in_steps"),
    [(0, 10, 0), (3, 10, 3), (0.25, 10, 2), (0.29, 100, 29), (10, 10, 10), (20, 10, 20)],
)
def test_schedules_equal_those_of_transformers_at_every_step(name, warmup, steps, in_steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs = scheduler(name, optimizer, in_steps, steps)
    config = TrainingConfig(learning_rate=0.3, schedule=name, warmup=warmup)
    for k in range(steps):
        assert learning_rate(config, steps, k) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-15)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize(("warmup", "steps"), [(0, 10), (3, 10), (10, 10)])
def test_a_cosine_to_a_lowest_rate_equals_that_of_transformers(warmup, steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs = transformers.get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup, steps, min_lr=0.03)
    config = TrainingConfig(learning_rate=0.3, schedule="cosine", warmup=warmup, min_learning_rate=0.03)
    for k in range(steps):
        assert learning_rate(config, steps, k) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-15)
        optimizer.step()
        theirs.step()


def test_a_linear_schedule_ends_at_the_lowest_rate():
    config = TrainingConfig(learning_rate=0.3, schedule="linear", warmup=2, min_learning_rate=0.1)
    rates = [learning_rate(config, 6, k) for k in range(7)]
    assert rates == pytest.approx([0, 0.15, 0.3, 0.25, 0.2, 0.15, 0.1])


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("more", [{}, {"loraplus_lr_ratio": 4.0}], ids=["lora", "lora+"])
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_fifty_steps_equal_peft_and_adamw_in_plain_torch(tmp_path, family, more):
    """With LoRA+, PEFT's own `create_loraplus_optimizer` makes the optimizer."""
    options = {"max_steps": STEPS, "dtype": "float64", "schedule": "cosine", "warmup": 5, "weight_decay": 0.05,
               "beta2": 0.99, "clip": 0.3, "learning_rate": 5e-3, "r": 4, "lora_alpha": 8, "held_out": 0}  # fmt: skip
    options |= more
    run = tmp_path / "run"
    trained(run, model=str(model_folder(family)), **options)
    theirs, tensors = peft_run(family, tmp_path, options)
    assert losses(run) == pytest.approx(theirs, abs=1e-8)
    assert theirs[-1] < theirs[0] - 0.5  # it learned: fifty steps of something
    ours = load_file(run / "adapter" / "adapter_model.safetensors")
    assert ours.keys() == tensors.keys()
    assert max(distance(ours[key], tensors[key]) for key in ours) < 1e-6


def peft_run(family: str, folder: Path, options: dict) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same training by PEFT's layers: one example a forward, the loss summed over the step's tokens."""
    model = AutoModelForCausalLM.from_pretrained(model_folder(family), dtype=torch.float64).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    named = {n.replace(".default", ""): p for n, p in wrapped.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for key, p in start(family).items():
            named[key].copy_(p)
    batches = batches_of(family, folder, options)
    trainable = [p for p in wrapped.parameters() if p.requires_grad]
    given = {"lr": options["learning_rate"], "betas": (0.9, options["beta2"])}
    optimizer: torch.optim.Optimizer
    if "loraplus_lr_ratio" in options:
        optimizer = create_loraplus_optimizer(
            wrapped, torch.optim.AdamW, loraplus_lr_ratio=options["loraplus_lr_ratio"],
            loraplus_weight_decay=options["weight_decay"], **given,
        )  # fmt: skip
    else:
        optimizer = torch.optim.AdamW(trainable, **given, weight_decay=options["weight_decay"])
    rates = scheduler(options["schedule"], optimizer, options["warmup"], STEPS)
    out = []
    for batch in batches:
        optimizer.zero_grad()
        total = sum(e.n_targets for e in batch)
        step_losses = [loss_of(wrapped, e) / total for e in batch]
        for loss in step_losses:
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, options["clip"])
        optimizer.step()
        rates.step()
        out.append(float(sum(step_losses).detach()))
    return out, {key: p.detach() for key, p in named.items()}


def loss_of(model: torch.nn.Module, e: Example) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([e.ids]), use_cache=False).logits[0]
    return F.cross_entropy(logits, torch.tensor(e.targets), reduction="sum")


def start(family: str) -> dict[str, torch.Tensor]:
    """Our initial A, and B at zero."""
    model = AutoModelForCausalLM.from_pretrained(model_folder(family), dtype=torch.float64)
    return dict(inject(model, LoraConfig(r=4, lora_alpha=8), Router()).parameters)


def batches_of(family: str, folder: Path, options: dict) -> list[list[Example]]:
    """The examples of every step, in the plan's order."""
    files = (rows_file(folder / "rows.jsonl"),)
    examples = prepare(DataConfig(data=files, held_out=0), Template.of(tokenizer(family)), None).train
    config = TrainingConfig(batch_size=settings()["batch_size"], max_steps=STEPS)
    steps = plan([len(e.ids) for e in examples], [e.n_targets for e in examples], config, 0, "packed")
    return [[examples[i] for i in steps.members(k)] for k in range(STEPS)]


def test_a_run_of_few_steps_has_no_warm_up_at_the_defaults_and_learns(tmp_path):
    """The first step of a warm-up has a learning rate of 0: in a run of one step it would be the only one."""
    assert [warmup_steps(TrainingConfig(), steps) for steps in (1, 10, 33, 34, 100)] == [0, 0, 0, 1, 3]
    watch = Watch()
    summary = trained(tmp_path / "run", watch, max_steps=None, batch_size=8, warmup=TrainingConfig().warmup, held_out=4)
    assert summary.steps == 1
    assert summary.loss_after != summary.loss_before
    assert watch.warned == []


def test_a_run_that_taught_nothing_is_not_finished(tmp_path):
    watch, run = Watch(), tmp_path / "run"
    with pytest.raises(TrainingError, match=r"after 1 steps the adapter has no effect: its B matrices are all"):
        trained(run, watch, max_steps=1, learning_rate=1e-60)
    assert read_summary(run) is None
    assert not (run / "adapter").exists()


def test_the_best_is_no_adapter_without_effect(tmp_path, monkeypatch):
    """After the first step of a warm-up the adapter is still the base, which every later step may be worse than."""
    run, measured = tmp_path / "run", iter((1.0, 2.0, 3.0))

    def measure(*args: Any) -> Any:
        loss = next(measured, None)
        return (
            evaluate_loss(*args) if loss is None else ExampleLosses(torch.tensor([loss]), torch.ones(1))
        )  # the last one is real

    monkeypatch.setattr("lorasmith.training.evaluator.evaluate_loss", measure)
    trained(run, max_steps=4, warmup=1, eval_every=1)
    assert [path.name for path in (run / "checkpoints").glob("best-*")] == ["best-000002"]
    assert has_effect(load_file(run / "adapter" / "adapter_model.safetensors"))
