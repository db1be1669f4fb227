"""How much memory this process can have: the machine's, its control groups' and a card's. Loads no torch by itself."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lorasmith.errors import OutOfMemoryError, first_line
from lorasmith.i18n import _

if TYPE_CHECKING:
    import torch

ROOT = Path("/")  # where /proc and the control groups are
# What torch says on a processor (Linux, Windows), on CUDA and on MPS: it has a type of its own for cards alone.
SHORT = ("not enough memory", "can't allocate memory", "out of memory")
_UNLIMITED = 2**60  # bytes: what a version 1 group without a limit says is a little under 2**63


class _Hierarchy(NamedTuple):
    """Names of the files of a memory controller, and the key of file pages in memory.stat that make room for others."""

    limits: tuple[str, ...]
    usage: str
    reclaimable: str


_VERSION_1 = _Hierarchy(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = _Hierarchy(("memory.max", "memory.high"), "memory.current", "inactive_file")


def peak_memory_mib(device: "torch.device") -> float:
    """The largest memory so far, in MiB: of the GPU where the model is on one, else of the whole process."""
    if device.type == "cuda":
        import torch

        return float(torch.cuda.max_memory_allocated(device)) / 2**20
    import resource  # not on Windows, where this is not offered yet

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def memory_mib() -> float | None:
    """What this process takes now, in MiB; None where the system does not say."""
    return _kib(ROOT / "proc/self/status", "VmRSS:")


def available_mib(device: "torch.device | None" = None) -> float | None:
    """What this process can still get, in MiB; None where the system does not say.

    On a card its free memory. Else the least of what the machine has and what any of the process's control groups
    leaves it: a container's limit is such a group's.
    """
    if device is not None and device.type == "cuda":
        import torch

        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + unused) / 2**20
    known = [free for free in (_kib(ROOT / "proc/meminfo", "MemAvailable:"), _groups_mib()) if free is not None]
    return min(known, default=None)


def room_mib(device: "torch.device") -> float | None:
    """What this process can have in all on `device`, in MiB: what it has and what is free; None where nobody says."""
    free = available_mib(device)
    if device.type == "cuda":
        import torch

        taken: float | None = torch.cuda.memory_allocated(device) / 2**20
    else:
        taken = memory_mib()
    return None if free is None or taken is None else free + taken


@contextmanager
def enough_memory() -> Iterator[None]:
    """Within it an allocation that fails raises OutOfMemoryError, whichever library made it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(text in str(error).lower() for text in SHORT):
            raise
        why = first_line(error)
        text = _("There is not enough memory for this ({why}). Close other programs, or use a smaller model, shorter "
                 "texts or fewer requests at once.", why=why)  # fmt: skip
        raise OutOfMemoryError(text) from error


def _groups_mib() -> float | None:
    """The least that a memory limit of this process's control groups and of those around them leaves free."""
    free = [
        left
        for hierarchy, folder, top in _groups()
        for group in (folder, *folder.parents)
        if group.is_relative_to(top) and (left := _left(group, hierarchy)) is not None
    ]
    return max(0.0, min(free)) / 2**20 if free else None


def _groups() -> Iterator[tuple[_Hierarchy, Path, Path]]:
    """Folders of the groups that this process is in, with that of the outermost one to be seen (man 7 cgroups)."""
    own: dict[str, str] = {}  # controllers, "" in version 2 -> the group
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
        below = inner.relative_to(root) if inner.is_relative_to(root) else Path()  # the mount shows a part of the tree
        yield (_VERSION_1 if is_first else _VERSION_2), top / below, top


def _left(group: Path, hierarchy: _Hierarchy) -> float | None:
    """Bytes between a group's usage and its limit; None where it has no limit."""
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
    """Of a file that the system may not have, or not show."""
    try:
        return path.read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return []
