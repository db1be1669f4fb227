"""Losses on preferences: equal to TRL's trainers in value, rewards and gradients, and to plain torch in float64."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from lorasmith.lora.inject import Adapter
from lorasmith.model.base import Base
from lorasmith.model.forward import row_of
from lorasmith.model.head import loss_sum, token_losses
from lorasmith.model.preference import (
    PreferenceLoss,
    Share,
    _log1mexp,
    answer_sums,
    metrics,
    objective,
)
from lorasmith.model.row import IGNORED, Example, Row, flatten
from tests.support.families import WORDS, adapted, distance, far_apart, gradients, own_logits, tiny
from tests.support.tiny import tokenizer

PAIRS = 4
ALPHA = 8
LIMIT = 1e-5
PARAMETERS: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.3},
    "dpo-rpo": {"beta": 0.3, "rpo_alpha": 0.7},
    "orpo": {"beta": 0.4},
    "kto": {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5},
    "simpo": {"beta": 2.0, "gamma": 0.8},
    "simpo-smooth": {"beta": 2.0, "gamma": 0.8, "label_smoothing": 0.1, "rpo_alpha": 0.5},
}


def loss_of(name: str) -> PreferenceLoss:
    return PreferenceLoss(name.partition("-")[0], **PARAMETERS[name])  # type: ignore[arg-type]


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(3, WORDS, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def pairs() -> list[dict[str, list[int]]]:
    """Pairs of different lengths; the prompts are long enough to be computed once."""
    return [
        {
            "prompt_ids": tokens(9 + i % 3, i),
            "chosen_ids": tokens(3 + i % 4, 10 + i),
            "rejected_ids": tokens(5 - i % 3, 20 + i),
        }
        for i in range(PAIRS)
    ]


def answer(prompt: list[int], ids: list[int], desirable: bool) -> Example:
    whole = prompt + ids
    targets = [IGNORED] * (len(prompt) - 1) + ids
    return Example(whole[:-1], targets, [1.0] * len(targets), "test", desirable)


def answers() -> list[Example]:
    return [
        answer(pair["prompt_ids"], pair[f"{kind}_ids"], kind == "chosen")
        for pair in pairs()
        for kind in ("chosen", "rejected")
    ]


def reference_of(base: Base, batch: Sequence[Example]) -> Tensor:
    """Log-probabilities in the base model, each answer alone."""
    return torch.cat(
        [answer_sums(token_losses(base, row), row).logp_K for row in (flatten([e], 1.0, None) for e in batch)]
    )


def step_rows(loss: PreferenceLoss, base: Base, share_prefix: bool = True) -> tuple[list[Row], list[list[int]]]:
    """Two rows of one step: the first three units, and the rest."""
    batch = loss.examples(answers())
    cut = 3 * loss.unit
    members = [list(range(cut)), list(range(cut, len(batch)))]
    return [flatten([batch[i] for i in part], 1.0, "default", share_prefix) for part in members], members


def kl_of(base: Base, batch: Sequence[Example]) -> Tensor:
    """The divergence from prompts with the answer of the example before."""
    mixed = [
        answer(
            [*one.ids, one.targets[-1]][: len(one.ids) + 1 - one.n_targets],
            [t for t in batch[i - 1].targets if t != IGNORED],
            True,
        )
        for i, one in enumerate(batch)
    ]
    rows = [flatten([e], 1.0, "default") for e in mixed]
    policy = torch.cat([answer_sums(token_losses(base, row), row).logp_K for row in rows])
    return (policy - reference_of(base, mixed)).mean().clamp(min=0)


def ours(name: str, base: Base, adapter: Adapter) -> tuple[float, dict[str, float], dict[str, Tensor]]:
    """Loss, metrics and gradients of one step in two rows."""
    loss = loss_of(name)
    rows, members = step_rows(loss, base)
    batch = loss.examples(answers())
    reference = reference_of(base, answers()) if loss.has_reference else None
    kl = kl_of(base, answers()) if name == "kto" else None
    tokens_in_all = sum(float(loss.nll(answer_sums(torch.ones(len(row.at_N)), row))[1].sum()) for row in rows)
    share = Share(len(batch) // loss.unit, tokens_in_all, torch.zeros(8, dtype=torch.float64))
    total = 0.0
    for row, part in zip(rows, members, strict=True):
        of_row = objective(
            loss, row, None if reference is None else reference[part].double(),
            [batch[i].desirable for i in part], None if kl is None else kl.double(), share,
        )  # fmt: skip
        value = loss_sum(base, row, of_row)
        value.backward()
        total += float(value.detach())
    return total, metrics(share.sums_8), gradients(adapter)


Made = tuple[Any, dict[str, Tensor]]


def trainer_of(name: str, folder: Path) -> Any:
    """TRL's trainer of the same loss, with a fresh adapter of PEFT on the same base."""
    given = PARAMETERS[name]
    rows = Dataset.from_list([{"prompt": "What?", "chosen": " A", "rejected": " B"}] * 4)
    few = {"output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": [], "per_device_train_batch_size": 8}
    kind: Any
    args: Any
    if name.startswith("dpo"):
        types = (
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, given["rpo_alpha"]]} if "rpo_alpha" in given else {}
        )
        kind, args = DPOTrainer, DPOConfig(**few, beta=given["beta"], **types)
    elif name == "kto":
        kind, args = KTOTrainer, KTOConfig(**few, **given)
    elif name == "orpo":
        kind, args = ORPOTrainer, ORPOConfig(**few, **given)
    else:
        renamed = {"simpo_gamma": given["gamma"], "cpo_alpha": given.get("rpo_alpha", 0.0)}
        more = {"label_smoothing": given.get("label_smoothing", 0.0)}
        kind, args = CPOTrainer, CPOConfig(**few, loss_type="simpo", beta=given["beta"], **renamed, **more)
    config = peft.LoraConfig(r=4, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = tiny("llama", torch.float32)
    trainer = kind(model=model, args=args, train_dataset=rows, processing_class=tokenizer("llama"), peft_config=config)
    trainer.model.train()
    return trainer


def inputs_of(name: str, trainer: Any) -> dict[str, Any]:
    """A batch of the same pairs, as the trainer's collator makes it."""
    made = pairs()
    if name.startswith("dpo"):
        return dict(trainer.data_collator(made))
    if name == "kto":
        flat = [
            {"prompt_ids": pair["prompt_ids"], "completion_ids": pair[f"{kind}_ids"], "label": kind == "chosen"}
            for pair in made
            for kind in ("chosen", "rejected")
        ]
        for i, one in enumerate(flat):
            one["KL_completion_ids"] = flat[i - 1]["completion_ids"]
        return dict(trainer.data_collator(flat))
    rows = []
    for pair in made:
        row: dict[str, Any] = {
            "prompt_input_ids": pair["prompt_ids"],
            "prompt_attention_mask": [1] * len(pair["prompt_ids"]),
        }
        for kind in ("chosen", "rejected"):
            ids = pair["prompt_ids"] + pair[f"{kind}_ids"]
            row |= {f"{kind}_input_ids": ids, f"{kind}_attention_mask": [1] * len(ids)}
            row[f"{kind}_labels"] = [IGNORED] * len(pair["prompt_ids"]) + pair[f"{kind}_ids"]
        rows.append(row)
    return dict(trainer.data_collator(rows))


def theirs(name: str, adapter: Adapter, folder: Path) -> tuple[float, dict[str, float], dict[str, Tensor]]:
    """Loss, metrics and gradients of TRL with the same adapter."""
    trainer = trainer_of(name, folder)
    parameters = dict(trainer.model.named_parameters())
    keys = {key: key.removesuffix(".weight") + ".default.weight" for key in adapter.parameters}
    for key, p in adapter.parameters.items():
        parameters[keys[key]].data.copy_(p.data)
    inputs = inputs_of(name, trainer)
    if name in ("orpo", "simpo", "simpo-smooth"):
        loss, found = trainer.get_batch_loss_metrics(trainer.model, inputs)
    else:
        loss = trainer.compute_loss(trainer.model, inputs)
        found = {key: values[-1] for key, values in trainer._metrics["train"].items()}
    loss.backward()
    return float(loss), found, {key: parameters[theirs].grad for key, theirs in keys.items()}


@pytest.mark.parametrize("name", PARAMETERS)
def test_loss_metrics_and_gradients_are_those_of_trl(name: str, tmp_path: Path) -> None:
    base, adapter = adapted("llama", torch.float32, lora_alpha=ALPHA)
    loss, found, gradient = ours(name, base, adapter)
    wanted, wanted_metrics, wanted_gradient = theirs(name, adapter, tmp_path)
    assert loss == pytest.approx(wanted, rel=LIMIT, abs=LIMIT)
    shared = {key: value for key, value in wanted_metrics.items() if key.startswith(("rewards/", "logps/"))}
    assert len(shared) == (5 if name == "kto" else 6)
    for key, value in shared.items():
        assert found[key] == pytest.approx(value, rel=LIMIT, abs=LIMIT), key
    for key, value in wanted_gradient.items():
        assert distance(gradient[key], value) < LIMIT, key


def dense(loss: PreferenceLoss, base: Base, references: Tensor) -> Tensor:
    """The loss of all pairs from whole logits, each answer alone, by the formulas of the papers."""
    logp, tokens, nll = [], [], []
    for one in answers():
        ids = torch.tensor([[*one.ids, one.targets[-1]]])
        log_p = own_logits(base, ids).log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        logp.append(log_p[-one.n_targets :].sum())
        tokens.append(one.n_targets)
        nll.append(-log_p)
    chosen, rejected = torch.stack(logp[0::2]), torch.stack(logp[1::2])
    counts = torch.tensor(tokens, dtype=torch.float64)
    if loss.method == "dpo":
        margin = loss.beta * ((chosen - references[0::2]) - (rejected - references[1::2]))
        return -torch.log(1 / (1 + torch.exp(-margin))).mean()
    if loss.method == "kto":
        ratios = torch.stack(logp) - references
        good, bad = ratios[0::2], ratios[1::2]
        value = torch.cat([1 / (1 + torch.exp(loss.beta * (good - 0.3))), 1 / (1 + torch.exp(loss.beta * (0.3 - bad)))])
        return (value * torch.tensor([loss.desirable_weight, loss.undesirable_weight]).repeat_interleave(PAIRS)).mean()
    means = torch.stack(logp) / counts
    if loss.method == "orpo":
        odds = torch.exp(means) / (1 - torch.exp(means))
        ratio = torch.log(odds[0::2] / odds[1::2])
        return torch.cat(nll[0::2]).mean() - loss.beta * torch.log(torch.sigmoid(ratio)).mean()
    gap = loss.beta * (means[0::2] - means[1::2]) - loss.gamma
    return -torch.log(torch.sigmoid(gap)).mean()


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"modules_to_save": ["lm_head"]}),  # a head that is trained
        ("gemma2", {}),  # a head with a cap, and padded rows
        ("cohere", {}),  # a head with a scale
        ("bloom", {}),
    ],
)
@pytest.mark.parametrize("method", ["dpo", "orpo", "kto", "simpo"])
def test_loss_and_gradient_are_those_of_whole_logits(family: str, options: dict[str, Any], method: str) -> None:
    base, adapter = adapted(family, **options)
    base.adapters["default"] = adapter
    loss, batch = loss_of(method), loss_of(method).examples(answers())
    references = reference_of(base, answers())
    units = range(0, len(batch), loss.unit)
    tokens_in_all = sum(e.n_targets for e in batch[0::2])
    share = Share(len(units), tokens_in_all, torch.zeros(8, dtype=torch.float64))
    members = [list(range(3 * loss.unit)), list(range(3 * loss.unit, len(batch)))]
    total = 0.0
    for part in members:
        row = row_of(base, [batch[i] for i in part], 1.0, "default")
        kl = torch.tensor(0.3, dtype=torch.float64) if method == "kto" else None
        of_start = references[part] if loss.has_reference else None
        value = loss_sum(base, row, objective(loss, row, of_start, [batch[i].desirable for i in part], kl, share))
        value.backward()
        total += float(value.detach())
    ours = gradients(adapter)
    base.router.route(None)
    base.router.active = "default"
    wanted = dense(loss, base, references)
    wanted.backward()
    assert total == pytest.approx(float(wanted.detach()), rel=1e-9)
    assert not far_apart(ours, gradients(adapter), 1e-9)


def test_labels_of_a_prompt_have_weight_0_and_those_of_a_rejected_answer_stay() -> None:
    chosen, rejected = answers()[:2]
    made, same = loss_of("orpo").examples([chosen, rejected])
    assert same is rejected
    assert made.targets == [*chosen.ids[1:], chosen.targets[-1]]
    assert [w for w, t in zip(made.weights, chosen.targets, strict=True) if t == IGNORED] == [0.0] * (
        len(chosen.ids) - chosen.n_targets
    )
    assert made.weight == chosen.weight


def test_log1mexp_is_precise_near_0_and_far_from_it() -> None:
    x = torch.tensor([-1e-12, -1e-3, -0.6931, -0.7, -30.0], dtype=torch.float64)
    wanted = [-27.631021115928547, -6.908255320644, -0.69324718, -0.68632, -9.3576e-14]
    assert _log1mexp(x).tolist() == pytest.approx(wanted, rel=1e-4)
