"""The choice of device, dtype and number of threads, with the reason for each choice."""

import os

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


def choose_dtype(wanted: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of the frozen weights and the reason for it; `wanted` is auto or the name of a torch dtype."""
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
