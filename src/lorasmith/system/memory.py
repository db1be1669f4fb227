"""How much memory this process has taken, and how much a training will take: said before it starts."""

import sys

import torch

from lorasmith.model.base import Base
from lorasmith.model.head import LARGEST
from lorasmith.model.row import Row
from lorasmith.system.memory_limits import memory_mib

# Measured with 135M parameters in bfloat16, rows of 900 and 1,400 tokens, 32 and 16 steps: 1,540 and 1,740 MiB.
GROWTH = 1.9  # where shapes are compiled: what ever new ones add, in kernels and holes, to what the heaviest row keeps
UNSEEN = 260  # MiB that two short examples cannot tell: an evaluation's rows of 2,048 tokens, and a checkpoint
MANY = 12  # steps that add nearly all of it


def peak_memory_mib(device: torch.device) -> float:
    """The largest memory so far, in MiB: of the GPU where the model is on one, else of the whole process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 2**20
    import resource  # not on Windows, where this is not offered yet

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def expected_mib(base: Base, row: Row, trained: int) -> float | None:
    """The peak of a training on a CPU whose heaviest row is `row`, with `trained` numbers; None where it is not known.

    From what the trial step of `speed_up` kept for backward, token by token.
    """
    now = memory_mib()
    if now is None or base.device.type != "cpu" or base.layout != "packed" or not base.kept_per_token:
        return None
    optimiser = 4 * 4 * trained  # values, gradient and two moments in float32
    words = int(base.model.config.get_text_config().vocab_size)
    head = 2 * min(LARGEST, len(row.at_N)) * words * base.dtype.itemsize
    kept = row.tokens * base.kept_per_token / 2**20
    return now + UNSEEN + kept + growth_mib(base, row, MANY) + (optimiser + head) / 2**20


def growth_mib(base: Base, row: Row, steps: int) -> float:
    """What rows of ever new lengths add to the peak in `steps` more steps, `row` being the heaviest."""
    if not base.compiles_shapes:
        return 0.0
    return GROWTH * row.tokens * base.kept_per_token / 2**20 * min(1.0, max(0, steps) / MANY)
