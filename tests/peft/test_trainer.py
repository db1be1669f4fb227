"""transformers' Trainer on the models of lorasmith.peft, beside PEFT's."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import lorasmith.peft as ours
from tests.support.peft_pair import arguments, base, both, examples, ids, largest_difference, losses, train

OPTIONS = {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4, "lora_alpha": 16, "task_type": "CAUSAL_LM"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fifty steps with dropout": ({"lora_dropout": 0.1, "modules_to_save": ["embed_tokens"]}, {"max_steps": 50}),
    "label smoothing": ({}, {"label_smoothing_factor": 0.2}),
    "gradient checkpointing": ({}, {"gradient_checkpointing": True}),
    "accumulation, clipping": ({"use_rslora": True}, {"gradient_accumulation_steps": 3, "max_grad_norm": 0.1}),
    "all-linear, DoRA": ({"target_modules": "all-linear", "use_dora": True}, {}),
    "biases": ({"bias": "lora_only"}, {}),
    "gaussian": ({"init_lora_weights": "gaussian"}, {}),
}


def adapted(library: Any, **changes: Any) -> Any:
    torch.manual_seed(11)
    return library.get_peft_model(base(), library.LoraConfig(**OPTIONS | changes))


@pytest.mark.parametrize("case", CASES)
def test_losses_weights_and_files_are_pefts(case: str, tmp_path: Path) -> None:
    changes, given = CASES[case]
    models = [adapted(library, **changes) for library in both()]
    assert largest_difference(*models) == 0  # from the same seed, the same numbers
    results = []
    for i, model in enumerate(models):
        trainer = train(model, arguments(tmp_path / str(i), **given))
        trainer.save_model(str(tmp_path / str(i)))
        results.append(losses(trainer))
    assert len(results[0]) == given.get("max_steps", 6)
    assert results[0][0] != results[0][-1]
    assert results[1] == pytest.approx(results[0], abs=1e-5)
    assert largest_difference(*models) < 2e-4  # Adam divides by small gradients
    theirs, mine = (json.loads((tmp_path / str(i) / "adapter_config.json").read_text()) for i in range(2))
    for config in (theirs, mine):
        config["target_modules"].sort()
    assert mine == theirs
    tensors = [load_file(tmp_path / str(i) / "adapter_model.safetensors") for i in range(2)]
    assert tensors[0].keys() == tensors[1].keys()
    read = peft.PeftModel.from_pretrained(base(), tmp_path / "1")
    again = ours.PeftModel.from_pretrained(base(), tmp_path / "1")
    with torch.no_grad():
        wanted = models[1].eval()(ids()).logits
        assert torch.allclose(read(ids()).logits, wanted, atol=1e-5)
        assert torch.equal(again(ids()).logits, wanted)


def test_bf16_trains_as_peft_does(tmp_path: Path) -> None:
    found = [losses(train(adapted(library), arguments(tmp_path, bf16=True, max_steps=10))) for library in both()]
    assert found[1] == pytest.approx(found[0], rel=5e-3)  # bfloat16 has 8 bits: ours rounds the update once less
    assert found[1][-1] < found[1][0]


def test_a_run_is_resumed_and_the_best_model_loaded(tmp_path: Path) -> None:
    given = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": "constant"}
    whole = train(adapted(ours), arguments(tmp_path / "whole", **given))
    train(adapted(ours), arguments(tmp_path / "parts", **given | {"max_steps": 4}))
    resumed = train(adapted(ours), arguments(tmp_path / "parts", **given), resume=True)
    assert losses(resumed)[-4:] == losses(whole)[-4:]
    assert largest_difference(resumed.model, whole.model) == 0

    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 4}
    best |= {"metric_for_best_model": "loss", "greater_is_better": True}  # so that the first one is the best
    trainer = train(adapted(ours), arguments(tmp_path / "best", **given | best), eval_dataset=examples(4))
    scores = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert scores[0] > scores[1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(scores[0])


def test_trainer_takes_a_copied_model(tmp_path: Path) -> None:
    model = adapted(ours)
    twin = copy.deepcopy(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = train(twin, arguments(tmp_path))
    assert losses(trainer) == losses(train(adapted(ours), arguments(tmp_path)))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert twin.base_model.router is not model.base_model.router
    assert {id(layer.router) for _path, layer in ours.tuner.layers_of(twin)} == {id(twin.base_model.router)}
