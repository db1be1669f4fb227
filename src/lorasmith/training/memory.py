"""How much memory this process has taken at most."""

import sys

import torch


def peak_memory_mib(device: torch.device) -> float:
    """The largest memory so far, in MiB: of the GPU where the model is on one, else of the whole process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 2**20
    import resource  # not on Windows, where this is not offered yet

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
