"""Device, dtype and threads follow from the machine."""

import pytest
import torch

from lorasmith.errors import ConfigError, ModelError
from lorasmith.system import device as machine
from lorasmith.system.device import choose_device, choose_dtype


def test_dtype_follows_from_the_processors_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for flags, dtype, reason in (
        ({"avx2": True}, torch.float32, "no bfloat16 instructions"),
        ({"avx512_bf16": True}, torch.bfloat16, "avx512_bf16"),
        ({"avx512_bf16": True, "amx_bf16": True}, torch.bfloat16, "amx_bf16"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: flags)
        found, why = choose_dtype("auto", cpu)
        assert found == dtype
        assert reason in why


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
