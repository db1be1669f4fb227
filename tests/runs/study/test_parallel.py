"""Cells in several processes: the same results, and as many processes as cores and memory allow."""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lorasmith.config.study import load_study
from lorasmith.errors import ConfigError
from lorasmith.runs.study import parallel
from lorasmith.runs.study.parallel import processes_for
from lorasmith.runs.study.run import run_study
from tests.support.commands import COMMAND
from tests.support.studies import small_study, study_file
from tests.support.tiny import Watch, adapter_bytes


@pytest.fixture
def machine(monkeypatch):
    """A machine with four cores and 10 GiB."""
    monkeypatch.setattr(parallel, "_cores", lambda: 4)
    monkeypatch.setattr(parallel, "available_mib", lambda _device: 10_240.0)
    return monkeypatch


@pytest.mark.slow
def test_cells_in_processes_are_those_of_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "_cores", lambda: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    grid = '"training.learning_rate" = [1e-3, 1e-2, 1e30]'
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    alone, together = (small_study(tmp_path / name, grid) for name in ("one", "two"))
    watch = Watch()
    one, two = run_study(alone), run_study(together, watch, parallel=2)
    assert [cell.state for cell in two.cells] == ["finished", "finished", "failed"]
    assert [cell.loss for cell in two.cells] == [cell.loss for cell in one.cells]
    for cell in alone.cells[:2]:
        assert adapter_bytes(alone.folder / cell.name) == adapter_bytes(together.folder / cell.name)
    assert "[3/3] lr1e+30 failed: step 2: loss nan" in watch.warned[-1]
    assert os.environ["OMP_NUM_THREADS"] == str(torch.get_num_threads())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="the processes are found in /proc")
def test_no_process_goes_on_after_a_study_was_killed(tmp_path):
    """Each saves what it has trained, so that the same command continues it."""
    file = study_file(tmp_path, '"lora.r" = [1, 4]', training="eval_every = 1").read_text()
    (tmp_path / "long.toml").write_text(file.replace("max_steps = 3", "max_steps = 20000"))
    command = [*COMMAND, "study", str(tmp_path / "long.toml"), "--parallel", "2"]
    study = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    runs = [tmp_path / "out" / name / "metrics.jsonl" for name in ("r1", "r4")]
    wait_until(lambda: all(path.is_file() and path.read_text().count("\n") > 3 for path in runs))
    workers = [pid for pid in children_of(study.pid) if "spawn_main" in command_of(pid)]
    assert len(workers) == 2
    study.kill()
    study.wait()
    wait_until(lambda: not any("spawn_main" in command_of(pid) for pid in workers))
    assert all(list((path.parent / "checkpoints").iterdir()) for path in runs)


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 90
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def command_of(pid: int) -> str:
    """Empty for a process that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def test_more_processes_than_cores_are_not_started(tmp_path, machine):
    watch, study = Watch(), small_study(tmp_path)
    assert processes_for(study, 3, watch) == 3
    assert watch.warned == []
    assert processes_for(study, 8, watch) == 4
    assert watch.warned == ["--parallel 8: limited to the 4 cores of this machine."]


def test_the_memory_limits_the_processes(tmp_path, machine):
    machine.setattr(parallel, "available_mib", lambda _device: 3_200.0)
    watch, study = Watch(), small_study(tmp_path)
    assert processes_for(study, 3, watch) == 2
    assert "--parallel 3: limited to 2, because each process needs about 1,50" in watch.warned[0]
    machine.setattr(parallel, "available_mib", lambda _device: 100.0)
    assert processes_for(study, 3, watch) == 1


@pytest.mark.parametrize(
    ("dtype", "optimizer", "needed"),
    [("float32", "adamw", "5,500"), ("float32", "adafactor", "3,525"), ("bfloat16", "adamw", "10,500")],
)
def test_full_fine_tuning_needs_more_memory(tmp_path, machine, dtype, optimizer, needed):
    machine.setattr(parallel, "weights_mib", lambda *_args: 1000.0)
    file = study_file(tmp_path, '"training.method" = ["lora", "full"]', training=f'optimizer = "{optimizer}"')
    file.write_text(file.read_text("utf-8").replace("float32", dtype), "utf-8")
    watch = Watch()
    processes_for(load_study(file), 4, watch)
    assert f"each process needs about {needed} MiB" in watch.warned[0]


def test_a_gpu_is_not_shared(tmp_path, machine):
    machine.setattr(parallel, "choose_device", lambda _wanted: (torch.device("cuda"), ""))
    with pytest.raises(ConfigError, match="--parallel works on a CPU only, and this study is trained on cuda"):
        processes_for(small_study(tmp_path), 2, Watch())
    assert processes_for(small_study(tmp_path), 1, Watch()) == 1


def test_the_threads_of_processes_are_their_share(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with parallel._threads(3):
        assert os.environ["OMP_NUM_THREADS"] == "3"
    assert "OMP_NUM_THREADS" not in os.environ
