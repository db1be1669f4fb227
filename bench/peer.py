"""The peer as a whole program: PEFT and transformers' Trainer on the demo's rows. Prints nothing that is measured.

python -m bench.peer --rows 64 --dtype float32 --batch 1 --accumulate 8 [--autocast]
"""

import argparse
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from bench.rows import encoded_rows
from lorasmith.model.gguf import packaged_model
from lorasmith.model.load import load_tokenizer
from lorasmith.model.machine import use_all_cores
from lorasmith.report import Report


def main() -> None:
    """Train on `--rows` rows, once, as the usual recipe does it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--accumulate", type=int, default=8)
    parser.add_argument("--autocast", action="store_true")
    parser.add_argument("--output", required=True)
    args = parser.parse_args()
    use_all_cores()
    folder = packaged_model("smollm2-135m-instruct", Report())
    tokenizer = load_tokenizer(folder)
    rows = [_for_trainer(example) for example in encoded_rows(tokenizer, args.rows)]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype))
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    settings = TrainingArguments(
        output_dir=args.output,
        per_device_train_batch_size=args.batch,
        gradient_accumulation_steps=args.accumulate,
        learning_rate=2e-3,
        num_train_epochs=1,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=args.autocast,
        disable_tqdm=True,
    )
    collator = DataCollatorForSeq2Seq(tokenizer=tokenizer, padding=True)
    Trainer(model=model, args=settings, train_dataset=rows, data_collator=collator).train()


def _for_trainer(example):  # type: ignore[no-untyped-def]
    labels = [-100, *example.targets[:-1]]
    return {"input_ids": example.ids, "attention_mask": [1] * len(example.ids), "labels": labels}


if __name__ == "__main__":
    main()
