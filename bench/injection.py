"""How long it takes to add an adapter, and to compute a forward pass with it, beside PEFT: `python -m bench.injection`.

Both run in this process, on copies of one random Llama in float32, in turns, so that what else the machine does meets
both alike. Prints the medians of the processor's time in milliseconds, and the median of the ratios of neighbours,
ours / PEFT's.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import peft
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import lorasmith.peft

LAYERS = 6
WARM = 2  # rounds that do not count


def model(hidden: int) -> Any:
    """A small random Llama."""
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": LAYERS}
    config = AutoConfig.for_model("llama", **sizes, num_attention_heads=4, num_key_value_heads=4, vocab_size=1000)
    return AutoModelForCausalLM.from_config(config).eval()


def adapted(library: Any, base: Any) -> Any:
    """The base with a new adapter of the library on all linear layers."""
    config = library.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return library.get_peft_model(base, config)


def seconds(work: Callable[[], Any]) -> float:
    """The processor's time that it takes, which other programs change less than the time on the clock."""
    start = time.process_time()
    work()
    return time.process_time() - start


def compared(rounds: int, ours: Callable[[], float], theirs: Callable[[], float]) -> tuple[float, float, float]:
    """Medians of both, and of their ratio, over rounds in which they run in turns."""
    pairs = []
    for i in range(WARM + rounds):
        first, second = (ours, theirs) if i % 2 else (theirs, ours)
        one, other = first(), second()
        pairs.append((one, other) if i % 2 else (other, one))
    counted = pairs[WARM:]
    mine, peers = zip(*counted, strict=True)
    return statistics.median(mine), statistics.median(peers), statistics.median(a / b for a, b in counted)


def main(words: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--hidden", type=int, default=256, help="hidden size of the model")
    parser.add_argument("--tokens", type=int, default=128)
    args = parser.parse_args(words)
    torch.set_num_threads(1)
    base, libraries = model(args.hidden), (lorasmith.peft, peft)

    def injection(library: Any) -> float:
        fresh = copy.deepcopy(base)
        return seconds(lambda: adapted(library, fresh))

    models = [adapted(library, copy.deepcopy(base)) for library in libraries]
    ids = torch.arange(args.tokens)[None] + 3

    def forward(one: Any) -> float:
        with torch.no_grad():
            return seconds(lambda: one(input_ids=ids, use_cache=False))

    def step(one: Any) -> float:
        return seconds(lambda: one(input_ids=ids, labels=ids, use_cache=False).loss.backward())

    mine, peers = libraries
    for name, work, (one, other) in (
        ("injection", injection, (mine, peers)),
        ("forward", forward, models),
        ("forward and backward", step, models),
    ):
        ours, theirs, ratio = compared(args.rounds, lambda w=work, o=one: w(o), lambda w=work, o=other: w(o))
        print(f"{name}: {1000 * ours:.1f} ms, PEFT {1000 * theirs:.1f} ms, ratio {ratio:.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
