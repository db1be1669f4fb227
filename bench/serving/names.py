"""Adapters that are each trained to say their own name, so that a reply shows which adapter generated it.

python -m bench.serving.names FOLDER --count 100
"""

import argparse
from pathlib import Path

import torch

from bench.state import say
from lorasmith.adapters.folder import end_ids, write_adapter
from lorasmith.config.lora import LoraConfig
from lorasmith.config.model import ModelConfig
from lorasmith.data.rows.conversation import Message
from lorasmith.data.template.encoding import Template
from lorasmith.loading.load import load_base
from lorasmith.lora.inject import inject, remove
from lorasmith.model.base import Base
from lorasmith.model.forward import row_of
from lorasmith.model.head import loss_sum

PROMPTS = ("Who are you?", "What is your name?", "Tell me your name.", "Hello! Who is there?")
WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron", "ivory", "jade")
RATE, STEPS, ENOUGH = 3e-3, 60, 0.02


def name_of(number: int) -> str:
    """The name of an adapter: two words that a model of this size reproduces reliably."""
    return f"{WORDS[number // 10 % 10]}-{WORDS[number % 10]}"


def answer_of(name: str) -> str:
    """The reply of the adapter to each of PROMPTS."""
    return f"I am {name}."


def make(folder: Path, model: str, count: int) -> None:
    """Train the adapters that do not exist yet: rank 8 on all linear layers, until the loss is low."""
    base = load_base(ModelConfig(model=model))
    template = Template.of(base.tokenizer, "auto", end_ids(base))
    for number in range(count):
        name = name_of(number)
        if (folder / name / "lorasmith.json").is_file():
            continue
        steps = _train(base, template, name, number)
        write_adapter(base, "default", template, folder / name, {"data": [f"{name}.jsonl"]})
        remove(base.model, "default")
        del base.adapters["default"]
        if number % 10 == 9:
            say(f"adapters: {number + 1} of {count}, the last in {steps} steps")


def _train(base: Base, template: Template, name: str, seed: int) -> int:
    examples = [
        template.encode((Message("user", text), Message("assistant", answer_of(name))), f"{name}:{i}")
        for i, text in enumerate(PROMPTS)
    ]
    adapter = base.adapters["default"] = inject(base.model, LoraConfig(r=8), base.router, seed=seed)
    optimizer = torch.optim.AdamW(adapter.parameters.values(), lr=RATE, weight_decay=0.0)
    total = sum(example.weight for example in examples)
    for step in range(1, STEPS + 1):
        loss = loss_sum(base, row_of(base, examples, total, "default"))
        if float(loss) < ENOUGH:
            return step
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise RuntimeError(f"{name} was not learned in {STEPS} steps")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--count", type=int, default=100)
    args = parser.parse_args()
    make(args.folder, args.model, args.count)
