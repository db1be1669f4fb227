"""The least of what machine, control groups and card leave; an allocation that fails is one sentence."""

import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lorasmith.cli.main import main
from lorasmith.errors import OutOfMemoryError
from lorasmith.system import memory as memory
from lorasmith.system.memory import available_mib, convert_memory_errors, usable_mib

MIB, NONE = 2**20, 9223372036854771712  # the second: what version 1 shows without a limit


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`machine(files)`: the system's files as they are on some machine with 8,000 MiB free, by path."""

    def machine(files: dict[str, str]) -> None:
        meminfo, status = f"MemTotal: 1\nMemAvailable:    {8000 * 1024} kB\n", f"VmRSS:\t{50 * 1024} kB\n"
        for name, text in ({"proc/meminfo": meminfo, "proc/self/status": status} | files).items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        monkeypatch.setattr(memory, "ROOT", tmp_path)

    return machine


def second(group: str, limit: object, used: int, **more: object) -> dict[str, str]:
    """Files of a group of version 2; sizes in MiB."""
    own = {"memory.max": limit, "memory.current": used * MIB, "memory.stat": "anon 1\ninactive_file 0\n"} | more
    return {f"sys/fs/cgroup{group}/{name}": f"{text}\n" for name, text in own.items()}


SECOND = {
    "proc/self/cgroup": "0::/user.slice/job.scope\n",
    "proc/self/mountinfo": "25 1 0:22 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n",
}


def test_without_groups_the_machine_decides(machine):
    machine({})
    assert available_mib() == 8000
    assert usable_mib(torch.device("cpu")) == 8050


def test_the_tightest_of_nested_groups_decides(machine):
    """Where its page cache that nobody uses counts as free."""
    machine(
        SECOND
        | second("/user.slice/job.scope", "max", 300)
        | second("/user.slice", 2000 * MIB, 900, **{"memory.stat": f"inactive_file {400 * MIB}\n"})
    )
    assert available_mib() == 1500


def test_the_limit_of_the_group_itself(machine):
    machine(SECOND | second("/user.slice/job.scope", 700 * MIB, 300) | second("/user.slice", 2000 * MIB, 900))
    assert available_mib() == 400
    assert usable_mib(torch.device("cpu")) == 450


def test_the_limit_at_which_the_kernel_slows_a_group_down(machine):
    machine(SECOND | second("/user.slice/job.scope", "max", 300, **{"memory.high": 500 * MIB}))
    assert available_mib() == 200


def test_a_group_beyond_its_limit_leaves_nothing(machine):
    machine(SECOND | second("/user.slice/job.scope", 200 * MIB, 300))
    assert available_mib() == 0


def test_the_first_version_of_groups_as_a_container_sees_it(machine):
    """The mount shows the container's own part of the tree, while /proc/self/cgroup names the whole path."""
    folder = "sys/fs/cgroup/memory"
    machine(
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n1:name=systemd:/x:y\n0::/\n",
            "proc/self/mountinfo": (
                "24 1 0:21 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
                "25 1 0:22 /docker/abc /sys/fs/cgroup/memory ro shared:9 master:1 - cgroup cgroup rw,memory\n"
                "26 1 0:23 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
            ),
            f"{folder}/memory.limit_in_bytes": f"{1024 * MIB}\n",
            f"{folder}/memory.usage_in_bytes": f"{600 * MIB}\n",
            f"{folder}/memory.stat": f"cache 1\ntotal_inactive_file {100 * MIB}\n",
        }
    )
    assert available_mib() == 524


def test_no_limit_in_the_first_version_is_none(machine):
    machine(
        {
            "proc/self/cgroup": "4:memory:/\n",
            "proc/self/mountinfo": "25 1 0:22 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{NONE}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{600 * MIB}\n",
        }
    )
    assert available_mib() == 8000


def test_on_a_card_its_own_memory_decides(machine, monkeypatch: pytest.MonkeyPatch):
    machine({})
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (500 * MIB, 2000 * MIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: 300 * MIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _device: 100 * MIB)
    assert available_mib(torch.device("cuda")) == 700
    assert usable_mib(torch.device("cuda")) == 800


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")]
)
def test_an_allocation_that_fails_is_one_sentence(error):
    with pytest.raises(OutOfMemoryError, match="not enough memory"), convert_memory_errors():
        raise error


def test_what_torch_says_on_this_machine_is_known():
    with pytest.raises(OutOfMemoryError), convert_memory_errors():
        torch.empty(2**60, dtype=torch.uint8)


def test_another_error_stays_as_it_is():
    with pytest.raises(RuntimeError, match="shapes"), convert_memory_errors():
        raise RuntimeError("shapes do not match")


def test_the_command_line_says_it_without_a_traceback(monkeypatch: pytest.MonkeyPatch, capsys):
    def run(_args: object) -> int:
        raise MemoryError

    module = SimpleNamespace(parser=lambda: SimpleNamespace(read=lambda _words: (None, [])), run=run)
    monkeypatch.setattr("lorasmith.cli.main.import_module", lambda _name: module)
    assert main(["info", "x"]) == 2
    assert "not enough memory" in capsys.readouterr().err


def test_freed_memory_is_kept_and_can_be_returned():
    """In a process of its own, because these settings of the allocator last."""
    code = """
import ctypes
from lorasmith.system.memory import keep_freed_memory, memory_mib, release_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
before = memory_mib()
keep_freed_memory()
assert memory_mib() - before < 50, "only address space is reserved"
block = libc.malloc(200 * 2**20)
ctypes.memset(block, 1, 200 * 2**20)
libc.free(block)
assert memory_mib() - before > 150, "freed memory stays for the next step"
release_freed_memory()
assert memory_mib() - before < 50, "and goes back when asked"
"""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("these settings are glibc's")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_this_process_uses_is_at_most_its_peak():
    used = memory.memory_mib()
    if used is None:
        pytest.skip("this system does not tell")
    assert 0 < used <= memory.peak_memory_mib(torch.device("cpu")) + 1


def test_the_peak_can_begin_again():
    """In a process of its own, whose memory no other test has."""
    code = """
import torch
from lorasmith.system.memory import peak_memory_mib, reset_peak_memory
block = torch.ones(300 * 2**20, dtype=torch.uint8)
before = peak_memory_mib(torch.device("cpu"))
del block
reset_peak_memory()
assert peak_memory_mib(torch.device("cpu")) < before - 250
"""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system does not offer it")
    subprocess.run([sys.executable, "-c", code], check=True)
