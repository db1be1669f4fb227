"""Training on preference pairs beside TRL: python -m bench.preference [--method dpo] [--json FILE]

Whole runs of `lorasmith train --method` and of TRL's trainer with PEFT in turn, each on few and on many pairs of the
demo's model, in float32, with eight pairs to a step, so that neither start nor loading is in a rate. Tokens are those
of both texts of each pair, as they stand in the data. TRL runs as it is by default, without recomputing activations,
and with the reference computed beforehand as well; the ratio is to its fastest setting.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench import commands
from bench.machine import machine, versions
from bench.programs import Ran, run
from bench.rates import OURS, Measured
from bench.rows import CHAT, Kind, records_of
from bench.state import Book, say
from lorasmith.config.data import DataConfig
from lorasmith.data.dataset.prepare import prepare
from lorasmith.data.template.encoding import Template
from lorasmith.loading.folder import eos_ids
from lorasmith.loading.gguf import packaged_model
from lorasmith.loading.tokenizer import load_tokenizer
from lorasmith.report import Report

PAIRS = Kind("pairs", "auto", 256)
COUNTS = (16, 48)
NEEDED = 2.0  # times TRL's rate
TRL = "TRL"
SETTINGS: dict[str, dict[str, Any]] = {  # of TRL
    "default": {},
    "no recomputation": {"gradient_checkpointing": False},
    "no recomputation, 2 x 4": {
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
    },
    "no recomputation, reference beforehand": {"gradient_checkpointing": False, "precompute_ref_log_probs": True},
}
OWN = ["--batch-size", "8", "--learning-rate", "2e-5", "--warmup", "0", "--save-every", "0", "--held-out", "0"]


def main(words: Sequence[str] | None = None) -> int:
    """Measure, write after every round, and print; with --peer, be the peer."""
    parser = argparse.ArgumentParser(prog="python -m bench.preference", description=__doc__)
    parser.add_argument("--method", choices=("dpo", "orpo", "kto", "simpo"), default="dpo")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, nargs=2, default=COUNTS, help="of the two runs")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="of TRL")
    parser.add_argument("--json", type=Path, default=Path("bench-preference.json"))
    parser.add_argument("--peer", nargs=3, metavar=("SETTING", "DATA", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.peer:
        setting, data, folder = args.peer
        train_with_trl(args.method, json.loads(setting), Path(data), args.model, folder)
        return 0
    head = {
        "command": " ".join(["python -m bench.preference", *sys.argv[1:]]),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": machine("float32"),
        "versions": versions(),
    }
    model = packaged_model("smollm2-135m-instruct", Report())
    with tempfile.TemporaryDirectory(prefix="lorasmith-bench-") as scratch:
        book = Book(args.json.absolute(), head)
        measure(book, args.method, model, args.rounds, tuple(args.pairs), Path(scratch), args.settings)
    return 0


def measure(
    book: Book,
    method: str,
    model: Path,
    rounds: int,
    counts: tuple[int, int],
    scratch: Path,
    names: Sequence[str],
) -> None:
    """Rounds of both programs in turn; the figures so far are in the book after each run."""
    files = [_pairs_file(scratch, count) for count in counts]
    tokens = _tokens(files[1], model) - _tokens(files[0], model)
    has_reference = method in ("dpo", "kto")
    settings = {name: SETTINGS[name] for name in names if has_reference or "precompute" not in str(SETTINGS[name])}
    runs = list[Measured]()
    for number in range(rounds):
        for program, setting in ((OURS, "default"), *((TRL, name) for name in settings)):
            few, many = (_ran(program, method, settings.get(setting, {}), file, model, scratch) for file in files)
            runs.append(Measured(program, setting, counts, tokens, few, many))
            say(
                f"  round {number + 1}  {program:<10} {setting:<40} {runs[-1].tokens_per_second:7.1f} tokens/s, "
                f"{_per_cpu_second(runs[-1]):7.1f} by CPU time {many.peak_mib:7.0f} MiB"
            )
            book.put("preference", method, figures(runs))
    found = figures(runs)
    say(f"{method}: {found.get('ratio', 0):.2f} x TRL's rate, {found.get('ratio_by_cpu', 0):.2f} x by CPU time")


def figures(runs: Sequence[Measured]) -> dict[str, Any]:
    """Medians of each program and setting, and the ratios of ours to the fastest of TRL's settings."""
    medians = dict[str, dict[str, Any]]()
    for name in dict.fromkeys(f"{one.program}, {one.setting}" for one in runs):
        some = [one for one in runs if f"{one.program}, {one.setting}" == name]
        medians[name] = {
            "tokens_per_second": statistics.median(one.tokens_per_second for one in some),
            "tokens_per_cpu_second": statistics.median(map(_per_cpu_second, some)),
            "seconds": statistics.median(one.many.seconds for one in some),
            "peak_mib": statistics.median(one.many.peak_mib for one in some),
            "runs": [one.as_json() for one in some],
        }
    ours = medians.get(f"{OURS}, default")
    theirs = [one for name, one in medians.items() if name.startswith(TRL)]
    if ours is None or not theirs:
        return {"needed": NEEDED, **medians}
    best = max(theirs, key=lambda one: one["tokens_per_second"])
    ratios = {
        "ratio": ours["tokens_per_second"] / best["tokens_per_second"],
        "ratio_by_cpu": ours["tokens_per_cpu_second"] / best["tokens_per_cpu_second"],
        "ratio_of_whole_runs": best["seconds"] / ours["seconds"],
    }
    return {"needed": NEEDED, **ratios, **medians}


def _per_cpu_second(one: Measured) -> float:
    """The rate where other programs run too."""
    return one.tokens / (one.many.cpu_seconds - one.few.cpu_seconds)


def _ran(program: str, method: str, setting: dict[str, Any], file: Path, model: Path, scratch: Path) -> Ran:
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        if program == TRL:
            peer = ["--peer", json.dumps(setting), str(file), folder, "--model", str(model), "--method", method]
            return run([sys.executable, "-m", "bench.preference", *peer])
        words = ["--data", str(file), "--model", str(model), "--output", f"{folder}/run", "--dtype", "float32"]
        return run(commands.ours("train", *words, "--method", method, *PAIRS.flags, "--too-long", "truncate", *OWN))


def _pairs_file(folder: Path, count: int) -> Path:
    """The first rows of the demo as pairs: the answer of the next row is the rejected one."""
    rows = [_until_answer(row["messages"]) for row in records_of(CHAT) or []][: count + 1]
    lines = [
        json.dumps({"prompt": row[:-1], "chosen": row[-1:], "rejected": after[-1:]}, ensure_ascii=False) + "\n"
        for row, after in pairwise(rows)
    ]
    path = folder / f"pairs-{count}.jsonl"
    path.write_text("".join(lines), "utf-8")
    return path


def _until_answer(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The messages up to the last answer."""
    return messages[: max(i for i, message in enumerate(messages) if message["role"] == "assistant") + 1]


def _tokens(file: Path, model: Path) -> int:
    """Tokens of both texts of all pairs."""
    config = DataConfig(data=(str(file),), held_out=0, max_length=PAIRS.max_length, too_long="truncate")
    template = Template.of(load_tokenizer(model), PAIRS.template, eos_ids(model))
    return sum(len(example.ids) for example in prepare(config, template, None, method="dpo").train)


def train_with_trl(method: str, setting: dict[str, Any], data: Path, model: Path, folder: str) -> None:
    """The peer as a whole program, on all pairs once."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    from bench.peer import LORA
    from lorasmith.system.device import use_all_cores

    use_all_cores()
    kinds: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "dpo": (DPOTrainer, DPOConfig, {}),
        "kto": (KTOTrainer, KTOConfig, {}),
        "orpo": (ORPOTrainer, ORPOConfig, {}),
        "simpo": (CPOTrainer, CPOConfig, {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0}),
    }
    kind, config, own = kinds[method]
    usual = {
        "output_dir": folder, "per_device_train_batch_size": 8 if method != "kto" else 16, "num_train_epochs": 1,
        "learning_rate": 2e-5, "max_length": PAIRS.max_length, "bf16": False, "use_cpu": True, "save_strategy": "no",
        "logging_steps": 10, "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    args = config(**usual | own | setting)
    rows = [json.loads(line) for line in data.read_text("utf-8").splitlines()]
    trainer = kind(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(model),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA["demo"]),
    )
    trainer.train()


if __name__ == "__main__":
    sys.exit(main())
