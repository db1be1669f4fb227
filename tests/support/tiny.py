"""Complete tiny model folders on disk, with a real tokenizer, and files of rows that they can learn from."""

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from lorasmith import train
from lorasmith.report import Report
from lorasmith.system.transformers_logging import quiet_transformers
from lorasmith.training.run_files import Summary
from tests.support.families import CONFIGS, distance

LINES = (
    "Why is the sky blue? Because the air scatters blue light most. user assistant Human: Assistant:",
    "What do cats eat? Cats eat mice, fish and what they find in the kitchen.",
    "考试有哪些技巧？先做会做的题，再检查一遍。早睡早起身体好。",
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<eos>", "<|im_start|>", "<|im_end|>"]
TEMPLATES = {"llama": CHATML, "gpt2": CHATML}  # bloom has none, so it gets Human: / Assistant:
POSITIONS = 128
QUESTIONS = ("Why is the sky blue?", "What do cats eat?", "考试有哪些技巧？", "Who are you?", "Say something short.")
ANSWERS = (
    "The air scatters blue light.",
    "Mice.",
    "先做会做的题，再检查一遍。",
    "A small model, and still learning.",
    "No.",
)


@functools.cache
def tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE; pad is eos, as in most folders."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    core.train_from_iterator(LINES, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>")
    made.chat_template = TEMPLATES.get(family)
    return made


@functools.cache
def model_folder(family: str = "llama", seed: int = 0) -> Path:
    """A folder in the Hugging Face layout, float32, made once per process and removed when it ends.

    Another seed is another base: the same shapes, other weights. Its config asks for dropout where the family has it.
    """
    folder = Path(tempfile.mkdtemp(prefix="lorasmith-tiny-")) / f"{family}-{seed}"
    atexit.register(shutil.rmtree, folder.parent, ignore_errors=True)
    positions = {"n_positions": POSITIONS} if family == "gpt2" else {"max_position_embeddings": POSITIONS}
    own = CONFIGS[family] | {"vocab_size": len(tokenizer(family)), "eos_token_id": 0, "pad_token_id": 0}
    config = AutoConfig.for_model(family, **own | {"bos_token_id": 0} | ({} if family == "bloom" else positions))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for p in model.parameters():
            p.data.normal_(1.0 if p.dim() == 1 else 0.0, 0.2)
    with quiet_transformers():  # a bar on stderr, which tests read
        model.save_pretrained(folder)
    tokenizer(family).save_pretrained(folder)
    return folder


def row(i: int) -> dict[str, object]:
    """Chat messages, different for every i and of many lengths."""
    question = f"{QUESTIONS[i % 5]} {'Really? ' * (i % 4)}({i})"
    answer = f"{ANSWERS[(i + i // 5) % 5]} {i * 7}"
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def rows_file(path: Path, rows: Sequence[int] = range(12)) -> str:
    """A JSONL file of these rows; its name as a flag has it."""
    path.write_text("".join(json.dumps(row(i), ensure_ascii=False) + "\n" for i in rows), "utf-8")
    return str(path)


def settings(**changes: Any) -> dict[str, Any]:
    """Options of `lorasmith.train` for a run that takes a fifth of a second, and changes to them."""
    few = {"held_out": 3, "batch_size": 4, "max_steps": 4, "learning_rate": 1e-2, "warmup": 0, "dtype": "float32"}
    return {"model": str(model_folder())} | few | changes


def trained(run: Path, report: Report | None = None, *, resume: bool = False, **changes: Any) -> Summary:
    """One run of `settings` on twelve rows, in the folder `run`."""
    files = rows_file(run.with_name("rows.jsonl"))
    return train(files, report=report, resume=resume, **{"output": run} | settings(**changes))


def flags(options: dict[str, Any]) -> list[str]:
    """The same options as words of a command line."""
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def metrics(run: Path) -> list[dict[str, float]]:
    """Lines of metrics.jsonl without what the clock and the machine decide."""
    volatile = ("tokens_per_second", "seconds", "peak_memory_mib")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in volatile} for line in lines]


def losses(run: Path) -> list[float]:
    """Training losses, a step each."""
    return [line["loss"] for line in metrics(run) if "loss" in line]


def adapter_bytes(run: Path) -> bytes:
    """The adapter that a run came to."""
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


EXACT = {"dtype": "float64", "max_steps": 3}  # for `assert_same_results`
LIMIT = 2e-11  # relative; sums in another order


def assert_same_results(run: Path, other: Path) -> None:
    """Losses and adapters, or whole models, of two runs in float64 are the same within rounding."""
    ours, theirs = losses(run), losses(other)
    assert len(ours) == len(theirs)
    assert all(abs(a - b) <= LIMIT * abs(b) for a, b in zip(ours, theirs, strict=True))
    name = "model/model.safetensors" if (other / "model").is_dir() else "adapter/adapter_model.safetensors"
    tensors, wanted = (load_file(r / name) for r in (run, other))
    assert tensors.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert distance(tensors[key], tensor) < LIMIT, key


class Watch(Report):
    """Keeps what was said, and calls `at_step` after each step of training."""

    def __init__(self, at_step: Callable[[int], None] = lambda step: None) -> None:
        self.said: list[str] = []
        self.warned: list[str] = []
        self.tasks: list[str] = []
        self.at_step = at_step

    def say(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.warned.append(text)

    def progress(self, task: str, done: int, total: int, **numbers: float) -> None:
        self.tasks.append(task)
        if task == "training":
            self.at_step(done)


class Crash(Exception):
    """A training dies here, without saving."""


def crash_at(step: int) -> Watch:
    """A report that crashes the training after `step` steps."""

    def at_step(done: int) -> None:
        if done == step:
            raise Crash

    return Watch(at_step)
