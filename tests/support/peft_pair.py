"""The same program with PEFT and with lorasmith.peft: small models, Trainer, and what their results must share."""

import importlib
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, Trainer, TrainingArguments

from tests.support.families import WORDS, tiny
from tests.support.tiny import tokenizer

LIBRARIES = ("peft", "lorasmith.peft")


def both() -> list[Any]:
    """PEFT and lorasmith.peft."""
    return [importlib.import_module(name) for name in LIBRARIES]


def base(family: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A base model as from_pretrained gives it: in eval mode, with gradients."""
    return tiny(family, dtype).requires_grad_(True).eval()


def ids(rows: int = 3, tokens: int = 10, seed: int = 0) -> torch.Tensor:
    """Random token ids [rows, tokens]."""
    return torch.randint(3, WORDS, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def stirred(model: Any, seed: int = 5, size: float = 0.2) -> Any:
    """The model with noise on all LoRA parameters; the same for both libraries, whatever their order."""
    for name, p in model.state_dict(keep_vars=True).items():
        if "lora_" in name:
            known = name.removesuffix(".weight") if "magnitude" in name else name  # PEFT has ".weight" there
            generator = torch.Generator().manual_seed(seed + sum(map(ord, known)))
            p.data += torch.randn(p.shape, generator=generator).to(p.dtype) * size
    return model


def examples(count: int = 24) -> Dataset:
    """Tokenized rows of different lengths, with labels for the second half."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, WORDS, (6 + i % 5,), generator=generator).tolist() for i in range(count)]
    return Dataset.from_list([
        {"input_ids": row, "attention_mask": [1] * len(row), "labels": [-100] * 3 + row[3:]} for row in rows
    ])  # fmt: skip


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """Trainer's arguments for a short run on the processor, and changes to them."""
    given = {"per_device_train_batch_size": 2, "max_steps": 6, "logging_steps": 1, "learning_rate": 5e-3}
    given |= {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "seed": 3}
    return TrainingArguments(output_dir=str(folder), **given | changes)


def train(model: Any, args: TrainingArguments, resume: Any = None, **given: Any) -> Trainer:
    """Trainer after training."""
    collator = DataCollatorForSeq2Seq(tokenizer("llama"), padding=True)
    trainer = Trainer(model=model, args=args, train_dataset=examples(), data_collator=collator, **given)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer: Any) -> list[float]:
    """The losses that were logged, in order."""
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def largest_difference(one: Any, other: Any) -> float:
    """Between the parameters of two models, by name. Raises AssertionError if their names differ."""
    short = "lora_magnitude_vector.default"  # the one name of a parameter that differs
    first, second = (
        {name.replace(f"{short}.weight", short): p.detach() for name, p in model.named_parameters()}
        for model in (one, other)
    )
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


TWO = {
    "first": {"target_modules": ["q_proj", "v_proj"], "r": 4},
    "second": {"target_modules": ["q_proj", "up_proj"], "r": 2},
}


def two(library: Any, **changes: Any) -> Any:
    """A model with the adapters first and second, first active."""
    torch.manual_seed(1)
    first, second = (library.LoraConfig(task_type="CAUSAL_LM", lora_alpha=16, **o | changes) for o in TWO.values())
    model = library.get_peft_model(base(), first, adapter_name="first")
    model.add_adapter("second", second)
    return stirred(model).eval()


def trained(model: Any) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters()}


def state(model: Any) -> dict[str, Any]:
    status = model.get_model_status()
    return {
        "active": model.active_adapters,
        "trained": trained(model),
        "counts": model.get_nb_trainable_parameters(),
        "logits": logits(model),
        "status": dict(vars(status)),
        "layers": [(one.name, one.enabled, one.active_adapters, list(one.merged_adapters), one.available_adapters,
                    one.requires_grad, one.devices) for one in model.get_layer_status()],
    }  # fmt: skip


def same(program: Any, *args: Any, limit: float = 1e-5) -> Any:
    """Run `program(library, *args)` with both and compare what it returns: tensors within `limit`, all else equal.

    Returns what it gave with lorasmith.peft.
    """
    theirs, mine = (program(library, *args) for library in both())
    compare(mine, theirs, limit)
    return mine


def compare(mine: Any, theirs: Any, limit: float, place: str = "result") -> None:
    """Raise AssertionError if the two differ, in a place of nested lists and dictionaries."""
    if isinstance(theirs, torch.Tensor):
        assert mine.shape == theirs.shape, place
        assert mine.dtype == theirs.dtype, place
        apart = float((mine.detach().double() - theirs.detach().double()).abs().max()) if theirs.numel() else 0.0
        assert apart <= limit, f"{place}: {apart}"
    elif isinstance(theirs, dict):
        assert mine.keys() == theirs.keys(), place
        for key, value in theirs.items():
            compare(mine[key], value, limit, f"{place}[{key!r}]")
    elif isinstance(theirs, list | tuple):
        assert len(mine) == len(theirs), place
        for i, (one, other) in enumerate(zip(mine, theirs, strict=True)):
            compare(one, other, limit, f"{place}[{i}]")
    else:
        assert mine == theirs, place


@torch.no_grad()
def logits(model: Any, **given: Any) -> torch.Tensor:
    """Logits of three rows of ten tokens."""
    found: torch.Tensor = model(input_ids=ids(), **given).logits
    return found
