"""How much memory this process has taken, and how much it can have."""

import sys
from pathlib import Path

import torch


def peak_memory_mib(device: torch.device) -> float:
    """The largest memory so far, in MiB: of the GPU where the model is on one, else of the whole process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 2**20
    import resource  # not on Windows, where this is not offered yet

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def memory_mib() -> float | None:
    """What this process takes now, in MiB; None where the system does not say."""
    return _proc("/proc/self/status", "VmRSS:")


def available_mib() -> float | None:
    """What the machine could still give, in MiB; None where the system does not say."""
    return _proc("/proc/meminfo", "MemAvailable:")


def room_mib(device: torch.device) -> float | None:
    """What this process can have in all on `device`, in MiB: what it has and what is free; None where nobody says."""
    if device.type == "cuda":
        return (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)) / 2**20
    free, taken = available_mib(), memory_mib()
    return None if free is None or taken is None else free + taken


def _proc(path: str, key: str) -> float | None:
    try:
        lines = Path(path).read_text("ascii").splitlines()
        line = next((line for line in lines if line.startswith(key)), None)
    except OSError:
        return None
    return None if line is None else int(line.split()[1]) / 2**10
