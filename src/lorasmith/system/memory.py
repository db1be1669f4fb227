"""Memory: how much this process uses and can still get, errors when it runs out, and settings of the C allocator.

Limits of control groups, such as a container's, count too. Importing this module loads no torch.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lorasmith.errors import OutOfMemoryError, first_line
from lorasmith.i18n import _

if TYPE_CHECKING:
    import ctypes

    import torch

ROOT = Path("/")  # a test replaces it
# In torch's messages on a CPU (Linux, Windows), on CUDA and on MPS; only GPUs have an exception type of their own.
OUT_OF_MEMORY_TEXTS = ("not enough memory", "can't allocate memory", "out of memory")
_UNLIMITED = 2**60  # bytes; a group of version 1 without a limit reports a little less than 2**63
# from malloc.h and sys/mman.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _MADV_HUGEPAGE = -1, -3, 14
_LARGE_PAGE, _RESERVED = 2**21, 3 * 2**29


class _Hierarchy(NamedTuple):
    """The file names of one version's memory controller, and the key of reclaimable file pages in memory.stat."""

    limits: tuple[str, ...]
    usage: str
    reclaimable: str


_VERSION_1 = _Hierarchy(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = _Hierarchy(("memory.max", "memory.high"), "memory.current", "inactive_file")


def peak_memory_mib(device: "torch.device") -> float:
    """The peak memory so far, in MiB: of the GPU if `device` is one, otherwise of the whole process."""
    if device.type == "cuda":
        import torch

        return float(torch.cuda.max_memory_allocated(device)) / 2**20
    if (peak_mib := _kib(ROOT / "proc/self/status", "VmHWM:")) is not None:
        return peak_mib  # getrusage counts what the parent process used before it started this one, too
    import resource  # not on Windows, where this is not offered yet

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def reset_peak_memory() -> None:
    """Let `peak_memory_mib` begin again, where the system can: on Linux, and on a GPU. Returns freed memory before."""
    import gc

    import torch

    gc.collect()
    release_freed_memory()
    with suppress(OSError):
        (ROOT / "proc/self/clear_refs").write_text("5")  # see man 5 proc
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def memory_mib() -> float | None:
    """The memory that this process uses now, in MiB; None if the system does not tell."""
    return _kib(ROOT / "proc/self/status", "VmRSS:")


def available_mib(device: "torch.device | None" = None) -> float | None:
    """The memory that this process can still get, in MiB; None if the system does not tell.

    On a GPU its free memory; otherwise the minimum of what the machine has free and what the limit of each enclosing
    control group, such as a container, leaves.
    """
    if device is not None and device.type == "cuda":
        import torch

        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + unused) / 2**20
    known = [free for free in (_kib(ROOT / "proc/meminfo", "MemAvailable:"), _groups_mib()) if free is not None]
    return min(known, default=None)


def usable_mib(device: "torch.device") -> float | None:
    """The memory that this process uses on `device` plus what it can still get, in MiB; None if unknown."""
    free = available_mib(device)
    if device.type == "cuda":
        import torch

        taken: float | None = torch.cuda.memory_allocated(device) / 2**20
    else:
        taken = memory_mib()
    return None if free is None or taken is None else free + taken


@contextmanager
def convert_memory_errors() -> Iterator[None]:
    """A context in which any failed allocation, of Python, torch or another library, raises OutOfMemoryError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(text in str(error).lower() for text in OUT_OF_MEMORY_TEXTS):
            raise
        why = first_line(error)
        text = _("There is not enough memory for this ({why}). Close other programs, or use a smaller model, shorter "
                 "texts or fewer requests at once.", why=why)  # fmt: skip
        raise OutOfMemoryError(text) from error


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next training step, which needs as much again, and use large pages for it.

    Touching a new page of 4 KiB costs up to 12 microseconds on a virtual machine, which was a third of the time of a
    short training. This reserves address space, not memory. Does nothing with other C libraries.
    """
    import ctypes  # here, because --help imports this module

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


def release_freed_memory() -> None:
    """Return freed memory to the system once, at the end of a phase that needed much of it. Does nothing off glibc."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> "ctypes.CDLL | None":
    import ctypes
    import platform

    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def _groups_mib() -> float | None:
    """The minimum over all control groups around this process of what their memory limit leaves, in MiB."""
    free = [
        left
        for hierarchy, folder, top in _groups()
        for group in (folder, *folder.parents)
        if group.is_relative_to(top) and (left := _left(group, hierarchy)) is not None
    ]
    return max(0.0, min(free)) / 2**20 if free else None


def _groups() -> Iterator[tuple[_Hierarchy, Path, Path]]:
    """(hierarchy, folder, top) of each group that this process is in; `top` is the outermost visible group's folder.

    See man 7 cgroups for the files that are parsed here.
    """
    own: dict[str, str] = {}  # controller ("" in version 2) -> group
    for line in _lines(ROOT / "proc/self/cgroup"):
        _number, controllers, group = line.split(":", 2)
        own |= dict.fromkeys(controllers.split(","), group)
    for line in _lines(ROOT / "proc/self/mountinfo"):
        before, _dash, after = line.partition(" - ")
        fields, (kind, _source, options) = before.split(), after.split()[:3]
        is_first = kind == "cgroup" and "memory" in options.split(",")
        name = "memory" if is_first else ""
        if name not in own or not (is_first or kind == "cgroup2"):
            continue
        top, root = ROOT / fields[4].lstrip("/"), Path(fields[3])
        inner = Path(own[name])
        below = inner.relative_to(root) if inner.is_relative_to(root) else Path()  # the mount may show only a part
        yield (_VERSION_1 if is_first else _VERSION_2), top / below, top


def _left(group: Path, hierarchy: _Hierarchy) -> float | None:
    """The bytes between a group's usage, without reclaimable pages, and its limit; None if it has no limit."""
    limits = [int(text) for name in hierarchy.limits if (text := "".join(_lines(group / name))).isdecimal()]
    usage = "".join(_lines(group / hierarchy.usage))
    limit = min(limits, default=_UNLIMITED)
    if limit >= _UNLIMITED or not usage.isdecimal():
        return None
    stat = dict(line.split() for line in _lines(group / "memory.stat") if line.count(" ") == 1)
    return limit - (int(usage) - int(stat.get(hierarchy.reclaimable, 0)))


def _kib(path: Path, key: str) -> float | None:
    line = next((line for line in _lines(path) if line.startswith(key)), None)
    return None if line is None else int(line.split()[1]) / 2**10


def _lines(path: Path) -> list[str]:
    """The lines of a system file, or none if it does not exist or is not readable."""
    try:
        return path.read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return []
