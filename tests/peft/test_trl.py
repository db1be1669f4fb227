"""TRL's SFTTrainer and DPOTrainer with the models and configs of lorasmith.peft, beside PEFT's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import lorasmith.peft as ours
from lorasmith.peft.tuner import LoraModel
from tests.support.peft_pair import both, largest_difference, losses, stirred
from tests.support.tiny import ANSWERS, QUESTIONS, model_folder, tokenizer

ROWS = Dataset.from_list([
    {"prompt": q, "completion": " " + a} for q in QUESTIONS for a in ANSWERS
])  # fmt: skip
PAIRS = Dataset.from_list([
    {"prompt": q, "chosen": " " + a, "rejected": " " + ANSWERS[i - 1]} for q in QUESTIONS for i, a in enumerate(ANSWERS)
])  # fmt: skip
SHORT = {
    "max_steps": 4,
    "logging_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "save_strategy": "no",
}
EQUAL = SHORT | {"bf16": False, "learning_rate": 1e-3}


def base() -> Any:
    return AutoModelForCausalLM.from_pretrained(model_folder())


def config(library: Any, **changes: Any) -> Any:
    return library.LoraConfig(**{"target_modules": "all-linear", "r": 4, "lora_alpha": 8} | changes)


def sft(model: Any, folder: Path, given: dict[str, Any], **more: Any) -> Any:
    torch.manual_seed(2)
    args = SFTConfig(output_dir=str(folder), max_length=64, **given)
    trainer = SFTTrainer(model=model, args=args, train_dataset=ROWS, processing_class=tokenizer("llama"), **more)
    trainer.train()
    return trainer


def dpo(model: Any, folder: Path, given: dict[str, Any], **more: Any) -> Any:
    torch.manual_seed(2)
    args = DPOConfig(output_dir=str(folder), max_length=64, **given)
    trainer = DPOTrainer(model=model, args=args, train_dataset=PAIRS, processing_class=tokenizer("llama"), **more)
    trainer.train()
    return trainer


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_sft_makes_the_model_from_the_config_as_with_peft(task: str | None, tmp_path: Path) -> None:
    trainers = [sft(base(), tmp_path, EQUAL, peft_config=config(lib, task_type=task)) for lib in both()]
    assert isinstance(trainers[1].model.base_model, LoraModel)
    assert isinstance(trainers[1].model, ours.PeftModel)
    assert not isinstance(trainers[0].model, ours.PeftModel)
    assert losses(trainers[1]) == pytest.approx(losses(trainers[0]), abs=1e-5)
    assert largest_difference(trainers[0].model, trainers[1].model) < 1e-4


def test_sft_trains_with_its_defaults(tmp_path: Path) -> None:
    """bfloat16 and gradient checkpointing among them."""
    given = SHORT | {"max_steps": 8, "learning_rate": 5e-3}
    trainers = []
    for library in both():
        torch.manual_seed(3)
        model = library.get_peft_model(base(), config(library, modules_to_save=["lm_head"]))
        trainers.append(sft(model, tmp_path, given))
    assert trainers[1].args.bf16
    assert trainers[1].args.gradient_checkpointing
    found = losses(trainers[1])
    assert found == pytest.approx(losses(trainers[0]), rel=5e-3)
    assert found[-1] < found[0]


def test_dpo_on_a_fresh_adapter_starts_at_the_logarithm_of_two(tmp_path: Path) -> None:
    trainers = [dpo(base(), tmp_path, EQUAL, peft_config=config(lib)) for lib in both()]
    assert losses(trainers[1])[0] == pytest.approx(0.6931, abs=1e-4)
    assert losses(trainers[1]) == pytest.approx(losses(trainers[0]), abs=1e-5)


def test_dpo_on_a_trained_adapter_starts_at_the_logarithm_of_two(tmp_path: Path) -> None:
    found = []
    for library in both():
        torch.manual_seed(3)
        model = stirred(library.get_peft_model(base(), config(library)))
        trainer = dpo(model, tmp_path, EQUAL)
        assert set(trainer.model.peft_config) == {"default", "ref"}
        found.append(losses(trainer))
    assert found[1][0] == pytest.approx(0.6931, abs=1e-4)
    assert found[1][1] != pytest.approx(0.6931, abs=1e-4)
    assert found[1] == pytest.approx(found[0], abs=1e-5)


def test_lora_on_the_head_is_refused_by_trl_as_with_peft(tmp_path: Path) -> None:
    """Its fused loss reads the head's weight, so that LoRA there would be left out in silence."""
    for library in both():
        model = library.get_peft_model(base(), config(library, target_modules=["lm_head", "q_proj"]))
        with pytest.raises(ValueError, match="lm_head"):
            sft(model, tmp_path, EQUAL)
