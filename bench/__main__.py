"""lorasmith's training beside PEFT with transformers' Trainer: `make bench`, or `python -m bench [--quick]`.

Both are whole programs, run in turn, alone on the machine. A rate is the difference of two whole runs (few and many
rows), so that no figure is taken from what either prints. The peer runs at the best of its settings, found in one
round; then come rounds of both, and medians. Prints a table and writes JSON.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer

from bench.rows import encoded_rows
from lorasmith.demo import demo_files
from lorasmith.model.gguf import packaged_model
from lorasmith.report import Report

Command = Callable[[int, Path], list[str]]  # rows and a folder to write in -> the words of a program
FEW, MANY = 32, 128
PEER_SETTINGS = {
    "float32, 1 x 8": ["--dtype", "float32", "--batch", "1", "--accumulate", "8"],
    "float32, 8 x 1": ["--dtype", "float32", "--batch", "8", "--accumulate", "1"],
    "bfloat16 weights, 1 x 8": ["--dtype", "bfloat16", "--batch", "1", "--accumulate", "8"],
    "bfloat16 weights and autocast, 1 x 8": ["--dtype", "bfloat16", "--batch", "1", "--accumulate", "8", "--autocast"],
}


@dataclass(frozen=True)
class Measured:
    """One program at one setting: tokens a second from the difference of two runs, and the larger run's memory."""

    program: str
    setting: str
    tokens_per_second: float
    seconds_few: float
    seconds_many: float
    peak_memory_mib: float


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round, and the peer's recipe alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", default="bench.json", help="file that gets the figures")
    args = parser.parse_args()
    folder = packaged_model("smollm2-135m-instruct", Report())
    rows = encoded_rows(AutoTokenizer.from_pretrained(folder), MANY)
    tokens = sum(len(row.ids) for row in rows[FEW:])
    settings = dict(list(PEER_SETTINGS.items())[:1]) if args.quick else PEER_SETTINGS
    print(f"{tokens:,} tokens between {FEW} and {MANY} rows; {os.cpu_count()} cores, {_processor()}", flush=True)
    tried = [_measure("PEFT + Trainer", name, _peer(flags), tokens) for name, flags in settings.items()]
    best = max(tried, key=lambda m: m.tokens_per_second).setting
    ours: list[Measured] = []
    peer = [m for m in tried if m.setting == best]
    for _round in range(1 if args.quick else args.rounds):
        ours.append(_measure("lorasmith", "default", _ours, tokens))
        if not args.quick:
            peer.append(_measure("PEFT + Trainer", best, _peer(settings[best]), tokens))
    _report(ours, peer, tried, Path(args.json))


def _measure(program: str, setting: str, command: Command, tokens: int) -> Measured:
    few, _memory = _seconds(command, FEW)
    many, memory = _seconds(command, MANY)
    measured = Measured(program, setting, tokens / (many - few), few, many, memory)
    print(f"  {program:<15} {setting:<38} {measured.tokens_per_second:7.1f} tokens/s {memory:7.0f} MiB", flush=True)
    return measured


def _seconds(command: Command, rows: int) -> tuple[float, float]:
    """Wall time of a whole program on `rows` rows, and its peak memory in MiB."""
    with tempfile.TemporaryDirectory() as scratch:
        words, log = command(rows, Path(scratch)), Path(scratch) / "stderr"
        with log.open("w") as errors:
            started = time.perf_counter()
            process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=errors)
            _pid, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - started
        if status:
            raise SystemExit(f"failed: {' '.join(words)}\n{log.read_text()}")
    return seconds, usage.ru_maxrss / 1024


def _peer(flags: list[str]) -> Command:
    def command(rows: int, scratch: Path) -> list[str]:
        return [sys.executable, "-m", "bench.peer", "--rows", str(rows), "--output", str(scratch), *flags]

    return command


def _ours(rows: int, scratch: Path) -> list[str]:
    """`lorasmith train` from the command line, on the first rows of the same file."""
    source, _held_out = demo_files(Report())
    data = scratch / "rows.jsonl"
    data.write_text("".join(source.read_text("utf-8").splitlines(keepends=True)[:rows]), "utf-8")
    flags = "--max-length 128 --too-long truncate --held-out 0 --learning-rate 2e-3 --save-every 0 --warmup 0"
    program = "import sys; from lorasmith.cli.main import main; sys.exit(main())"
    return [sys.executable, "-c", program, "train", str(data), "--output", str(scratch / "run"), *flags.split()]


def _report(ours: list[Measured], peer: list[Measured], tried: list[Measured], file: Path) -> None:
    rate, peer_rate = (statistics.median(m.tokens_per_second for m in side) for side in (ours, peer))
    memory, peer_memory = (statistics.median(m.peak_memory_mib for m in side) for side in (ours, peer))
    figures = {
        "processor": _processor(),
        "torch": torch.__version__,
        "tokens_per_second": rate,
        "peer_tokens_per_second": peer_rate,
        "ratio": rate / peer_rate,
        "memory_ratio": memory / peer_memory,
        "peer_setting": peer[0].setting,
        "runs": [asdict(m) for m in [*tried, *ours, *peer[1:]]],
    }
    file.write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
    print(f"lorasmith {rate:.0f} tokens/s, PEFT + Trainer at its best {peer_rate:.0f}: {rate / peer_rate:.2f} x")
    print(f"  its best setting: {peer[0].setting}")
    print(f"peak memory {memory:.0f} MiB against {peer_memory:.0f}: {memory / peer_memory:.2f} x; figures in {file}")


def _processor() -> str:
    model = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor()
    )
    flags = torch.cpu.get_capabilities()
    fast = [name for name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if flags.get(name)]
    return f"{model} ({', '.join(fast)})"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


if __name__ == "__main__":
    main()
