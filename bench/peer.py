"""The peer as a whole program: PEFT and transformers' Trainer. Prints nothing that is measured.

python -m bench.peer --data rows.jsonl --model FOLDER --output FOLDER --dtype float32 --batch 1 --accumulate 8
"""

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

from bench.rows import Kind, examples, for_trainer
from lorasmith.loading.tokenizer import load_tokenizer
from lorasmith.system.device import use_all_cores

LORA: dict[str, dict[str, Any]] = {
    "demo": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    "tutorial": {
        "r": 8, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": r".*\.1.*query_key_value",
        "modules_to_save": ["word_embeddings"],
    },
}  # fmt: skip


class Marker(TrainerCallback):
    """Writes a file when the first step begins."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Before the first row of a step is computed."""
        if state.global_step == 0:
            self.path.touch()


def arguments(words: list[str] | None) -> argparse.Namespace:
    """One run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--template", default="auto")
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--lora", choices=LORA, default="demo")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--accumulate", type=int, default=8)
    parser.add_argument("--autocast", action="store_true")
    parser.add_argument("--evaluate", action="store_true", help="measure the rows instead of learning from them")
    parser.add_argument("--marker", type=Path, help="file to write when the first step begins")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    """Train on all rows once, as the usual recipe does it, or evaluate on them."""
    args = arguments(words)
    use_all_cores()
    tokenizer = load_tokenizer(args.model)
    kind = Kind("rows", args.template, args.max_length)
    rows: Any = [for_trainer(example) for example in examples(args.data, kind, args.model, tokenizer)]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    trainer = Trainer(
        model=get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA[args.lora])),
        args=_settings(args),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer=tokenizer, padding=True),
        callbacks=[Marker(args.marker)] if args.marker else None,
    )
    if args.evaluate:
        trainer.evaluate()
    else:
        trainer.train()


def _settings(args: argparse.Namespace) -> TrainingArguments:
    return TrainingArguments(
        output_dir=args.output,
        per_device_train_batch_size=args.batch,
        per_device_eval_batch_size=args.batch,
        gradient_accumulation_steps=args.accumulate,
        prediction_loss_only=True,
        learning_rate=2e-3 if args.lora == "demo" else 1e-4,
        num_train_epochs=1,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=args.autocast,
        disable_tqdm=True,
    )


if __name__ == "__main__":
    main()
