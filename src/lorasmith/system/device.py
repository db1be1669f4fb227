"""Which device and which dtype: decided by what the machine says it can, with the reason beside the answer."""

import ctypes
import os
import platform

import torch

from lorasmith.errors import ConfigError, ModelError
from lorasmith.i18n import _

# of malloc.h and sys/mman.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _MADV_HUGEPAGE = -1, -3, 14
_LARGE_PAGE, _RESERVED = 2**21, 3 * 2**29


def choose_device(wanted: str) -> tuple[torch.device, str]:
    """The device and why. Raises ConfigError for a name that is no device, ModelError for one that is not here."""
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


def choose_dtype(wanted: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of the frozen weights and why."""
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
        if fast:
            return torch.bfloat16, _("this processor supports bfloat16 ({flag})", flag=fast)
        return torch.float32, _("this processor has no bfloat16 instructions, so bfloat16 would be slower than float32")
    return torch.float32, _("the safe choice on this device")


def dtype_name(dtype: torch.dtype) -> str:
    """float32 for torch.float32: how options and files write it."""
    return str(dtype).removeprefix("torch.")


def use_all_cores() -> int:
    """As many threads as cores that this process may use: containers report other numbers. Returns it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(cores, torch.get_num_threads()))
    return torch.get_num_threads()


def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory for the next step, which takes the same again, and to have it in large pages.

    A page of 4 KiB that a program touches for the first time costs up to 12 microseconds on a virtual machine: a third
    of a short training went into that. Address space is reserved here, no memory; other C libraries are left alone.
    """
    libc = _glibc()
    if libc is None:
        return
    libc.mallopt(_M_MMAP_THRESHOLD, 2**31 - 1)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    start = libc.malloc(_RESERVED)
    if start:
        libc.free(start)  # untouched, it stays at the end of the heap
        aligned = -(-start // _LARGE_PAGE) * _LARGE_PAGE
        libc.madvise(aligned, start + _RESERVED - aligned, _MADV_HUGEPAGE)


def give_back_memory() -> None:
    """Hand freed memory back to the system once, where a part of the program has ended."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
