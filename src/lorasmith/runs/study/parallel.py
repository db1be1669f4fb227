"""Several cells of a study at the same time, each in a process of its own with its share of the cores."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from lorasmith.config.study import Cell, Study
from lorasmith.errors import ConfigError, LorasmithError
from lorasmith.i18n import _
from lorasmith.loading.folder import find_folder
from lorasmith.loading.shared import SharedBase
from lorasmith.loading.weights import weights_mib
from lorasmith.report import Report
from lorasmith.runs.study.cells import BaseModel, train_cells
from lorasmith.system.device import choose_device, choose_dtype
from lorasmith.system.memory import available_mib
from lorasmith.training.full import bytes_per_weight

OVERHEAD_MIB = 1500  # of a process that trains, beside the weights of its base model


def processes_for(study: Study, wanted: int, report: Report) -> int:
    """How many processes train at once: `wanted`, or fewer, with the reason, where cores or memory do not allow it.

    Raises ConfigError if the cells are trained on a GPU, which one process fills.
    """
    if wanted == 1:
        return 1
    config = study.cells[0].config.model
    device, _why = choose_device(config.device)
    if device.type != "cpu":
        raise ConfigError(_("--parallel works on a CPU only, and this study is trained on {device}.", device=device))
    cores = _cores()
    if wanted > cores:
        report.warn(_("--parallel {wanted}: limited to the {cores} cores of this machine.", wanted=wanted, cores=cores))
    dtype, _why = choose_dtype(config.dtype, device)
    weights = weights_mib(find_folder(config.model, report), dtype, config.quantize)
    optimizers = {cell.config.training.optimizer for cell in study.cells if cell.config.training.method == "full"}
    times = max([1.0, *(bytes_per_weight(dtype, name) / dtype.itemsize for name in optimizers)])
    needed, free = weights * times + OVERHEAD_MIB, available_mib(device)
    fitting = max(1, int(free / needed)) if free is not None else wanted
    if fitting < min(wanted, cores):
        report.warn(
            _(
                "--parallel {wanted}: limited to {fitting}, because each process needs about {needed:,.0f} MiB and "
                "{free:,.0f} MiB are free.",
                wanted=wanted,
                fitting=fitting,
                needed=needed,
                free=free,
            )
        )
    return min(wanted, cores, fitting)


def train_in_parallel(
    study: Study, cells: Sequence[Cell], processes: int, done: Callable[[Cell, tuple[str, ...]], None]
) -> None:
    """As `train_cells`, in several processes. A problem of one cell never ends the others."""
    spawn = multiprocessing.get_context("spawn")
    with (
        _threads(max(1, _cores() // processes)),
        ProcessPoolExecutor(processes, spawn, initializer=end_with_parent) as pool,
    ):
        running = {pool.submit(_train, study.folder, cell, study.forget): cell for cell in cells}
        try:
            for future in as_completed(running):
                done(running[future], future.result())
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _train(folder: Path, cell: Cell, forget: bool) -> tuple[str, ...]:
    """Train a cell in this process; its problems."""
    problems = list[str]()
    _idle.clear()
    try:
        train_cells(
            folder, [cell], _shared_base(), _base_model(forget), lambda _cell: Report(),
            lambda _cell, found: problems.extend(found),
        )  # fmt: skip
    except LorasmithError as error:
        problems.extend(error.problems)
    finally:
        _idle.set()
    return tuple(problems)


_idle = threading.Event()  # set while this process trains nothing
_idle.set()


def end_with_parent() -> None:
    """Let this process save what it trains and end once the process that started it is gone, even if it was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        if not _idle.is_set():
            os.kill(os.getpid(), signal.SIGTERM)  # the step is finished and a checkpoint saved
            _idle.wait()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@cache
def _shared_base() -> SharedBase:
    """The base model of this process."""
    return SharedBase()


@cache
def _base_model(forget: bool) -> BaseModel:
    """What this process has measured of it."""
    return BaseModel(forget)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let processes that are started inside the block compute with `count` threads, unless the user says otherwise."""
    if "OMP_NUM_THREADS" in os.environ:
        yield
        return
    os.environ["OMP_NUM_THREADS"] = str(count)
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
