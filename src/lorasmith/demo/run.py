"""The demo: fine-tune a small model on conversations between people and compare it with the base model, in minutes."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lorasmith.adapters.session import open_adapters
from lorasmith.config.files import read_json
from lorasmith.config.sampling import SamplingConfig
from lorasmith.config.toml import Config, load_config
from lorasmith.data.read.files import read_records
from lorasmith.data.rows.conversation import Message, Record
from lorasmith.data.template.encoding import Template
from lorasmith.demo.conversations import demo_split
from lorasmith.errors import RunError
from lorasmith.i18n import _
from lorasmith.loading.gguf import packaged_model
from lorasmith.loading.packages import CHITCHAT, fetch_package
from lorasmith.loading.tokenizer import load_tokenizer
from lorasmith.report import Report
from lorasmith.runs.plot import smooth
from lorasmith.runs.train import train
from lorasmith.system.cache import cache_folder
from lorasmith.system.writing import write_file
from lorasmith.training.history import read_losses
from lorasmith.training.run_files import Summary, read_summary
from lorasmith.training.run_folder import resumed_config

MODEL, RUN, SAMPLES = "smollm2-135m-instruct", "runs/demo", "samples.json"
MAX_LENGTH, STEPS, BATCH = 128, 32, 8
SAMPLING = SamplingConfig(temperature=0.7, top_p=0.9, repetition_penalty=1.1, max_new_tokens=48)
LEARNING_RATE = 2e-3  # ends with a lower held-out loss than 1e-3 on this data, with a linear decay


@dataclass(frozen=True)
class BeforeAfter:
    """A held-out prompt, and the replies of base model and adapter, sampled with the same seed."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class DemoResult:
    """What the demo shows."""

    summary: Summary
    samples: list[BeforeAfter]
    training: list[tuple[int, float]]  # step and smoothed loss


def demo(report: Report, steps: int = STEPS, output: str = RUN, overwrite: bool = False) -> DemoResult:
    """Download what is missing, train, evaluate and generate replies. A finished run is shown, not repeated.

    Raises LorasmithError.
    """
    folder = Path(output)
    summary = None if overwrite else read_summary(folder)
    if summary is not None and (folder / SAMPLES).is_file():
        text = _("{run} has already finished after {steps} steps; showing its results. Use --overwrite to train again.")
        report.say(text.format(run=folder, steps=summary.steps))
    else:
        report.say(
            _(
                "Fine-tuning SmolLM2-135M on 256 conversations between people, {steps} steps of {examples} "
                "conversations, and evaluating on 64 others. After downloads this takes one to two minutes on "
                "a CPU with bfloat16 instructions, up to six on an older one.",
                steps=steps,
                examples=BATCH,
            )
        )
        train_file, held_out_file = demo_files(report)
        config = demo_config(steps, output, train_file, held_out_file)
        resume = resumed_config(folder) is not None and not overwrite
        if resume and summary is None:
            report.say(_("{run} has not finished; resuming it.", run=folder))
        summary = train(config, report, resume=resume, overwrite=overwrite)
        replies = [asdict(reply) for reply in _replies(folder, held_out_file, report)]
        write_file(folder / SAMPLES, json.dumps(replies, indent=2, ensure_ascii=False) + "\n")
    samples = _saved_replies(folder / SAMPLES)
    steps_done, losses = zip(*read_losses(folder)[0], strict=True)
    return DemoResult(summary, samples, list(zip(steps_done, smooth(losses), strict=True)))


def _saved_replies(path: Path) -> list[BeforeAfter]:
    """The replies that were saved with the run. Raises RunError if the file contains something else."""
    try:
        return [BeforeAfter(**reply) for reply in read_json(path, RunError)]
    except TypeError as error:
        raise RunError(_("{path}: not a valid file of samples: {error}", path=path, error=error)) from None


def _replies(run: Path, held_out_file: Path, report: Report) -> list[BeforeAfter]:
    """Replies of base model and adapter to three held-out first messages that say more than hello."""
    openings = [record.fields["messages"][0]["content"] for record in read_records(str(held_out_file))]  # type: ignore[index]
    prompts = [text for text in openings if len(text.split()) >= 6][:3]
    report.say(_("Generating replies to three held-out prompts with the base model and the adapter"))
    session = open_adapters([run], report=report)
    conversations = [(Message("user", prompt),) for prompt in prompts]
    before, after = (session.reply(conversations, name, SAMPLING) for name in (None, session.names[0]))
    return [BeforeAfter(*texts) for texts in zip(prompts, before, after, strict=True)]


def demo_config(steps: int, output: str, train_file: Path, held_out_file: Path) -> Config:
    """The demo's training as a configuration, as for `lorasmith train`."""
    flags = {
        "model": {"model": MODEL},
        "data": {
            "data": (str(train_file),),
            "held_out": str(held_out_file),
            "max_length": MAX_LENGTH,
            "too_long": "truncate",
        },
        "lora": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
        "training": {
            "batch_size": BATCH,
            "max_steps": steps,
            "learning_rate": LEARNING_RATE,
            "schedule": "linear",
            "warmup": 0,
        },
        "output": output,
    }
    return load_config(None, flags)


def demo_files(report: Report) -> tuple[Path, Path]:
    """The demo's rows as two JSONL files in the cache: the training data and the held-out data."""
    folder = cache_folder() / "data" / "chitchat"
    files = folder / "train.jsonl", folder / "held_out.jsonl"
    if not all(file.is_file() for file in files):
        tokenizer = load_tokenizer(packaged_model(MODEL, report), report=report)
        template = Template.of(tokenizer)
        split = demo_split(fetch_package(CHITCHAT, report), template.encode, MAX_LENGTH)
        folder.mkdir(parents=True, exist_ok=True)
        for file, records in zip(files, (split.train, split.held_out), strict=True):
            write_file(file, _lines(records))
    return files


def _lines(records: Sequence[Record]) -> str:
    return "".join(json.dumps(record.fields, ensure_ascii=False) + "\n" for record in records)
