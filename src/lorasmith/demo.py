"""The main job on a real model: conversations between people in, a tested adapter out, in minutes."""

import json
from collections.abc import Sequence
from pathlib import Path

from lorasmith.config import Config, load_config
from lorasmith.data.chitchat import demo_split
from lorasmith.data.conversation import Record
from lorasmith.data.template import Template
from lorasmith.i18n import _
from lorasmith.model.cache import cache_folder
from lorasmith.model.fetch import CHITCHAT, fetch_package
from lorasmith.model.gguf import packaged_model
from lorasmith.model.load import load_tokenizer
from lorasmith.report import Report
from lorasmith.run import Summary, read_summary, train
from lorasmith.training.checkpoint import write_file

MODEL, RUN = "smollm2-135m-instruct", "runs/demo"
MAX_LENGTH, STEPS, BATCH = 128, 32, 8
LEARNING_RATE = 2e-3  # of 1e-3 and 2e-3 the one that ends lower on these rows, with a linear decay


def demo(report: Report, steps: int = STEPS, output: str = RUN, overwrite: bool = False) -> Summary:
    """Fetch what is missing, train, measure. A finished run is shown, not repeated. Raises LorasmithError."""
    folder = Path(output)
    finished = None if overwrite else read_summary(folder)
    if finished is not None:
        report.say(_("{run} is finished already; --overwrite trains it again.", run=folder))
        return finished
    train_file, held_out_file = demo_files(report)
    config = demo_config(steps, output, train_file, held_out_file)
    resume = (folder / "config.toml").is_file() and not overwrite
    if resume:
        report.say(_("{run} is not finished: going on with it.", run=folder))
    return train(config, report, resume=resume, overwrite=overwrite)


def demo_config(steps: int, output: str, train_file: Path, held_out_file: Path) -> Config:
    """The demo as a configuration: what `lorasmith train` would be given."""
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
    """The demo's rows as two JSONL files in the cache: those to learn from, those held out."""
    folder = cache_folder() / "data" / "chitchat"
    files = folder / "train.jsonl", folder / "held_out.jsonl"
    if not all(file.is_file() for file in files):
        tokenizer = load_tokenizer(packaged_model(MODEL, report))
        template = Template.of(tokenizer)
        split = demo_split(fetch_package(CHITCHAT, report), template.encode, MAX_LENGTH)
        folder.mkdir(parents=True, exist_ok=True)
        for file, records in zip(files, (split.train, split.held_out), strict=True):
            write_file(file, _lines(records))
    return files


def _lines(records: Sequence[Record]) -> str:
    return "".join(json.dumps(record.fields, ensure_ascii=False) + "\n" for record in records)
