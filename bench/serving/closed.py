"""Closed-loop throughput: 16 concurrent requests of 32 tokens, over eight adapters or none, compared with peers.

Decoding is greedy and no reply ends early, so all contestants generate the same number of tokens. They take turns,
after a warm-up. Prompts differ in every round, so that only the beginning of the chat template is in the prefix cache.
"""

import resource
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from bench.serving.llamacpp import KINDS, LlamaCpp, about, why_not
from bench.serving.peers import Peers, generate_batch
from bench.state import say
from lorasmith.adapters.folder import AdapterFolder, end_ids
from lorasmith.config.model import ModelConfig
from lorasmith.config.sampling import SamplingConfig
from lorasmith.data.rows.conversation import Message
from lorasmith.data.template.encoding import Template
from lorasmith.engine.engine import Engine
from lorasmith.engine.request import Request
from lorasmith.loading.load import load_base
from lorasmith.serve.registry import attach

REQUESTS, NEW, ADAPTERS = 16, 32, 8
AGREEMENT = 0.8  # minimum share of llama.cpp's tokens that transformers would choose too
QUESTIONS = (
    "Who are you?", "What is your name?", "How do I boil an egg?", "Name three colors.", "Why is the sky blue?",
    "Tell me a short story about a fox.", "What is the capital of France?", "How many legs has a spider?",
    "Write a line about the sea.", "What do bees make?", "Explain gravity to a child.", "Say hello in Spanish.",
    "What is two plus two?", "Give me a tip for good sleep.", "Who wrote Hamlet?", "What is a lighthouse for?",
)  # fmt: skip


class Ours:
    """One engine with the adapters of a folder."""

    def __init__(self, model: str, dtype: str, folders: Sequence[Path]) -> None:
        self.base = load_base(ModelConfig(model=model, dtype=dtype))  # type: ignore[arg-type]
        self.engine = Engine(self.base, slots=REQUESTS, prepack=True)
        before, start = resident(), time.perf_counter()
        for folder in folders:
            adapter = AdapterFolder.read(folder)
            attach(self.base, folder.name, adapter, adapter.tensors_in(self.base.dtype))
        size = sum((folder / "adapter_model.safetensors").stat().st_size for folder in folders)
        self.registered = {
            "adapters": len(folders),
            "seconds_each": (time.perf_counter() - start) / len(folders),
            "grown_mib": (resident() - before) / 2**20,
            "files_mib": size / 2**20,
        }
        self.names = [folder.name for folder in folders]
        self.template = Template.of(self.base.tokenizer, "auto", end_ids(self.base))
        self.number = 0

    def prompts(self) -> list[list[int]]:
        """The encoded prompts, which differ in each call."""
        self.number += 1
        requests = [f"{self.number}. {text}" for text in QUESTIONS[:REQUESTS]]
        return [self.template.encode_prompt((Message("user", text),)) for text in requests]

    def round(self, names: Sequence[str | None]) -> dict[str, Any]:
        """The duration of one round, and when each token arrived."""
        requests = [
            Request(ids, SamplingConfig(max_new_tokens=NEW), names[i % len(names)])
            for i, ids in enumerate(self.prompts())
        ]
        start = time.perf_counter()
        came: dict[int, list[float]] = {self.engine.add(one): [] for one in requests}
        while self.engine.busy:
            for event in self.engine.step():
                came[event.key].append(time.perf_counter() - start)
        assert all(len(times) == NEW for times in came.values())
        return {"seconds": time.perf_counter() - start, "came": list(came.values())}

    def switches(self) -> dict[str, float]:
        """Median milliseconds to switch to an adapter that is held in memory, and to one in the bank."""
        decoder = self.base.fast_decoder
        assert decoder is not None
        assert decoder.bank is not None
        bank = decoder.bank
        cold, hot = [], []
        for name in [*self.names[: 2 * ADAPTERS]] * 4:
            for times in (cold, hot):
                start = time.perf_counter()
                moved = bank.hold(name, decoder.held[name], {name})
                times.append((time.perf_counter() - start) * 1e3)
                assert moved == (times is cold) or times is cold
            if times is hot:
                bank.drop(name)
        return {"from_memory_ms": statistics.median(cold), "in_columns_ms": statistics.median(hot)}


def closed(model: str, dtype: str, folders: Sequence[Path], rounds: int) -> dict[str, Any]:
    """Throughput in tokens/s, ratios, and latencies."""
    say(f"closed loop in {dtype}: {len(folders)} adapters")
    ours, few = Ours(model, dtype, folders), folders[:ADAPTERS]
    peers = Peers(model, dtype, few, ours.prompts(), NEW)
    absent = why_not(model)
    theirs = {} if absent else {kind: LlamaCpp(model, kind, few, ours.prompts(), NEW) for kind in KINDS}
    agreement = {kind: one.agreement(peers.choices) for kind, one in theirs.items()}
    say(f"llama.cpp: {absent or agreement}")
    shares = [share for parts in agreement.values() for share in parts.values()]
    assert all(share > AGREEMENT for share in shares), "llama.cpp has another model"
    names = [folder.name for folder in few]
    rounds_of: dict[str, Callable[[], dict[str, Any]]] = {
        "base": lambda: ours.round([None]),
        "mixed": lambda: ours.round(names),
        "one adapter": lambda: ours.round(names[:1]),
        "generate": peers.base,
        "peft mixed": peers.mixed,
        "set_adapter one by one": peers.serial,
        **{f"llama.cpp {kind} one by one": one.serial for kind, one in theirs.items()},
    }
    for act in rounds_of.values():  # warm-up
        act()
    seconds: dict[str, list[float]] = {name: [] for name in rounds_of}
    came: dict[str, list[list[float]]] = {}
    for number in range(rounds):
        for name, act in rounds_of.items():
            result = act()
            seconds[name].append(result["seconds"])
            came[name] = result.get("came", [])
        say(f"round {number + 1}: " + ", ".join(f"{n} {_rate(s[-1]):.0f}" for n, s in seconds.items()))
    for one in theirs.values():
        one.close()
    rates = {name: statistics.median(map(_rate, times)) for name, times in seconds.items()}
    return {
        "tokens_per_second": rates,
        "of_rounds": {name: [_rate(s) for s in times] for name, times in seconds.items()},
        "base_over_generate": rates["base"] / rates["generate"],
        "mixed_over_base": rates["mixed"] / rates["base"],
        "mixed_over_peft": rates["mixed"] / rates["peft mixed"],
        "mixed_over_serial": rates["mixed"] / rates["set_adapter one by one"],
        "generate_batch": generate_batch(peers, NEW),
        "llamacpp": {"absent": absent} if absent else {"agreement": agreement, **about()},
        "mixed_over_llamacpp": {kind: rates["mixed"] / rates[f"llama.cpp {kind} one by one"] for kind in theirs}
        or None,
        "first_token_ms": _spread([times[0] for times in came["mixed"]]),
        "between_tokens_ms": _spread([b - a for times in came["mixed"] for a, b in pairwise(times)]),
        "switch": ours.switches(),
        "registered": ours.registered,
        "rounds": rounds,
    }


def resident() -> int:
    """Resident memory of this process in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _rate(seconds: float) -> float:
    return REQUESTS * NEW / seconds


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    ms = torch.tensor(seconds) * 1e3
    return {"p50": float(ms.quantile(0.5)), "p99": float(ms.quantile(0.99))}
