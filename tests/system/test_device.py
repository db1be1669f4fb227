"""Device, dtype and threads follow from the machine."""

import time

import pytest
import torch

from lorasmith.errors import ConfigError, ModelError
from lorasmith.system import device as machine
from lorasmith.system.device import choose_device, choose_dtype

NONE, AVX, AMX = {"avx2": True}, {"avx512_bf16": True}, {"avx512_bf16": True, "amx_bf16": True}


@pytest.mark.parametrize(
    ("flags", "slow", "saves_memory", "dtype", "reason"),
    [
        (NONE, False, True, torch.float32, "no bfloat16 instructions"),
        (AVX, False, False, torch.bfloat16, "supports bfloat16 (avx512_bf16)"),
        (AVX, True, False, torch.float32, "supports bfloat16 (avx512_bf16), but computes faster in float32"),
        (AVX, True, True, torch.bfloat16, "supports bfloat16 (avx512_bf16)"),
        (AMX, True, False, torch.bfloat16, "supports bfloat16 (amx_bf16)"),
    ],
)
def test_dtype_follows_from_the_processor(monkeypatch, flags, slow, saves_memory, dtype, reason):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    monkeypatch.setattr(machine, "float32_is_faster", lambda: slow)
    found, why = choose_dtype("auto", torch.device("cpu"), saves_memory)
    assert found == dtype
    assert reason in why


@pytest.mark.parametrize("slow", [torch.float32, torch.bfloat16])
def test_which_dtype_is_faster_is_measured(monkeypatch, slow):
    def linear(x, weight):
        deadline = time.perf_counter() + (4e-3 if x.dtype == slow else 1e-3)
        while time.perf_counter() < deadline:
            pass

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    assert machine.float32_is_faster.__wrapped__() == (slow == torch.bfloat16)


def test_devices_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto")[0].type == "cpu"
    with pytest.raises(ModelError, match="cuda is not available on this machine"):
        choose_device("cuda")
    with pytest.raises(ConfigError, match="unknown device 'gpu'"):
        choose_device("gpu")


def test_as_many_threads_as_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _pid: {0}, raising=False)
    assert machine.use_all_cores() == 1
