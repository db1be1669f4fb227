"""What the figures were measured on: processor, memory, versions."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lorasmith.system.device import choose_dtype, dtype_name

FAST = ("avx2", "avx512_f", "avx512_bf16", "amx_bf16")
# what users set to try other instructions or threads than the machine's own
VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "OMP_NUM_THREADS")


def machine(dtype: str) -> dict[str, Any]:
    """What the figures depend on. `dtype`: what lorasmith's base is held in.

    kind: bfloat16 where the instructions in use have products in it, else float32; it decides which goals hold and
    which of the peer's settings are worth a try.
    """
    chosen, fastest = (choose_dtype(wanted, torch.device("cpu"))[0] for wanted in (dtype, "auto"))
    in_use = torch.backends.cpu.get_cpu_capability()  # less than the processor's, where a variable says so
    flags = torch.cpu.get_capabilities()
    return {
        "processor": _model_name(),
        "flags": [name for name in FAST if flags.get(name)],
        "instructions": in_use,
        "dtype": dtype_name(chosen),
        "kind": "float32" if in_use in ("DEFAULT", "AVX2") else dtype_name(fastest),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20,
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide speed."""
    found = {"python": platform.python_version(), "system": platform.system()}
    for name in ("torch", "transformers", "peft", "accelerate", "lorasmith"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # lorasmith run from its folder
            found[name] = "not installed"
    return found


def _model_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    named = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
