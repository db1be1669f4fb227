"""The choice of device, dtype and number of threads, with the reason for each choice."""

import os
import time
from functools import cache

import torch

from lorasmith.errors import ConfigError, ModelError
from lorasmith.i18n import _


def choose_device(wanted: str) -> tuple[torch.device, str]:
    """The device and the reason for it.

    Raises:
        ConfigError: `wanted` is not the name of a device.
        ModelError: this machine does not have the device.
    """
    if wanted == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda"), _("a CUDA device is available")
        if torch.backends.mps.is_available():
            return torch.device("mps"), _("an Apple GPU is available")
        return torch.device("cpu"), _("no GPU is available")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise ConfigError(
            _("model.device: unknown device {wanted!r}. Use auto, cpu, cuda or mps.", wanted=wanted)
        ) from None
    missing = (device.type == "cuda" and not torch.cuda.is_available()) or (
        device.type == "mps" and not torch.backends.mps.is_available()
    )
    if missing:
        raise ModelError(_("model.device: {wanted} is not available on this machine. Use auto or cpu.", wanted=wanted))
    return device, _("as requested")


def choose_dtype(wanted: str, device: torch.device, saves_memory: bool = False) -> tuple[torch.dtype, str]:
    """The dtype of the frozen weights and the reason for it; `wanted` is auto or the name of a torch dtype.

    saves_memory: auto also takes bfloat16 where the processor computes it, but more slowly than float32.
    """
    if wanted != "auto":
        dtype: torch.dtype = getattr(torch, wanted)
        return dtype, _("as requested")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, _("this GPU supports bfloat16")
        return torch.float32, _("this GPU does not support bfloat16")
    if device.type == "cpu":
        flags = torch.cpu.get_capabilities()
        fast = next((flag for flag in ("amx_bf16", "avx512_bf16") if flags.get(flag)), None)
        if fast is None:
            why = _("this processor has no bfloat16 instructions, so bfloat16 would be slower than float32")
            return torch.float32, why
        if fast == "avx512_bf16" and not saves_memory and float32_is_faster():
            return torch.float32, _(
                "this processor supports bfloat16 ({flag}), but computes faster in float32", flag=fast
            )
        return torch.bfloat16, _("this processor supports bfloat16 ({flag})", flag=fast)
    return torch.float32, _("the safe choice on this device")


@cache
def float32_is_faster() -> bool:
    """Whether this processor computes products in float32 clearly faster than in bfloat16, measured in 30 ms.

    On an AMD EPYC, AVX512-BF16 is faster than float32; on an Intel Xeon whose AMX is switched off, it takes 1.7 times
    as long.
    """
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x_TD, weight_OD = torch.ones(128, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
        rounds = []
        for _round in range(6):  # the first one of which prepares the product
            started = time.perf_counter()
            torch.nn.functional.linear(x_TD, weight_OD)
            rounds.append(time.perf_counter() - started)
        seconds[dtype] = min(rounds)
    return seconds[torch.bfloat16] > 1.25 * seconds[torch.float32]


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype as options and files spell it: float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def use_all_cores() -> int:
    """Let torch use as many threads as this process may use cores, unless OMP_NUM_THREADS is set.

    Returns the number of threads. In a container it can be smaller than the number of cores of the machine.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(cores, torch.get_num_threads()))
    return torch.get_num_threads()
