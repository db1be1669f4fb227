"""The tutorial's eight steps on lorasmith, in its order; docs/tutorial.md goes through them.

    python examples/tutorial/tutorial.py --data alpaca_data_zh --model bloom-389m-zh --output chatbot_lora_tuned

tutorial.toml holds the same settings for `lorasmith train --config`.
"""

# Step 1: imports
import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lorasmith import LoraConfig, load, train
from lorasmith.adapters.merge import merge_run
from lorasmith.cli.screen import Screen
from lorasmith.config.model import ModelConfig
from lorasmith.data.dataset.fit import truncate
from lorasmith.data.read.files import read_records
from lorasmith.data.rows.conversation import Message, Record
from lorasmith.data.template.encoding import Template
from lorasmith.loading.tokenizer import load_tokenizer
from lorasmith.lora.inject import count, inject
from lorasmith.lora.router import Router
from lorasmith.model.row import IGNORED

# Step 3: preprocessing
DATA: dict[str, Any] = {
    "template": "human-assistant",  # "Human: ", instruction, "\n", input, "\n\nAssistant: ", then the answer and </s>
    "max_length": 256,
    "too_long": "truncate",
    "held_out": 0,  # the tutorial measures nothing; 0.05 would hold out a twentieth and compare base and adapter on it
}

# Step 4: LoRA
LORA = LoraConfig(
    target_modules=r".*\.1.*query_key_value",  # layers 1 and 10 to 19; 1 alone is r".*\.1\..*query_key_value"
    r=8,
    lora_alpha=32,
    lora_dropout=0.1,
    modules_to_save=("word_embeddings",),
)

# Step 5: training
TRAINING: dict[str, Any] = {
    "dtype": "float32",  # what transformers 4 loaded by default
    "batch_size": 1,
    "accumulate": 8,
    "log_every": 10,
    "epochs": 1,
    "save_every": "epoch",
    "learning_rate": 1e-4,
    "warmup": 100,
    "schedule": "linear",  # Trainer's default
}

# Step 8: answers
QUESTION = "考试有哪些技巧?"
LONGEST_GREEDY = 200  # the tutorial gives no length, and transformers then stops after 20 tokens
SAMPLING: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2, "max_new_tokens": 500}


def show_row(row: Record, model: Path) -> None:
    """Step 3: one row as the model will see it, and what of it is learned."""
    tokenizer = load_tokenizer(model)
    template = Template.of(tokenizer, DATA["template"])
    example = truncate(template.encode(template.conversation(row).messages), DATA["max_length"])
    learned = [target for target in example.targets if target != IGNORED]
    print("\nrow 2")
    print("input_ids:", tokenizer.decode(example.ids))
    print("labels:", tokenizer.decode(learned))


def show_lora(model: Path) -> None:
    """Step 4: what the pattern matches and what is trained, found on a model without weights, so at once."""
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    adapter = inject(empty, LORA, Router())
    print("\nLoRA:", LORA)
    for pattern, paths in adapter.targets.matched.items():
        print(f"\n{pattern} matches {len(paths)} modules:", *paths, sep="\n")
    print("\ntrainable:")
    for name, parameter in empty.named_parameters():
        if parameter.requires_grad:
            print(name)
    print(count(empty, adapter))


def ask(run: Path) -> torch.Tensor:
    """Step 8: the adapter's greedy answer; returns the ids of the question [1, T], encoded as in training."""
    session = load(run, dtype=TRAINING["dtype"])
    print("\nadapter, greedy:", session.generate(QUESTION, max_new_tokens=LONGEST_GREEDY))
    return torch.tensor([session.template.encode_prompt([Message("user", QUESTION)])])


def ask_merged(folder: Path, question: torch.Tensor) -> None:
    """Step 8: reload the merged folder with transformers alone; a sampled answer."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    ids = model.generate(question, attention_mask=torch.ones_like(question), do_sample=True, **SAMPLING)
    print("merged, sampled:", tokenizer.decode(ids[0, question.shape[1] :], skip_special_tokens=True))


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Where the data and the model are, and where the run goes."""
    parser = argparse.ArgumentParser(description="The tutorial's eight steps on lorasmith.")
    parser.add_argument("--data", type=Path, default=Path("alpaca_data_zh"), help="alpaca rows: a `datasets` folder")
    parser.add_argument("--model", type=Path, default=Path("bloom-389m-zh"), help="folder of the base model")
    parser.add_argument("--output", type=Path, default=Path("chatbot_lora_tuned"), help="folder of the run")
    parser.add_argument("--overwrite", action="store_true", help="replace the run that is in --output")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """All eight steps."""
    args = arguments(argv)
    run = {"output": args.output, "overwrite": args.overwrite}

    # Step 2: the data set
    rows = read_records(args.data)
    print(f"{len(rows)} rows; the first: {rows[0].fields}")

    show_row(rows[1], args.model)  # step 3
    show_lora(args.model)  # step 4

    # Steps 5 to 7: the settings, the trainer, the training
    print()
    with Screen() as screen:
        train(args.data, model=str(args.model), lora=LORA, report=screen, **run, **DATA, **TRAINING)

    # Step 8: answer, merge, save, reload
    question = ask(args.output)
    merged = args.output / "merged"
    print("merged:", merge_run(args.output, merged, ModelConfig(dtype=TRAINING["dtype"])))
    ask_merged(merged, question)


if __name__ == "__main__":
    main()
