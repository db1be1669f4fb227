"""The run folder: absolute paths in its configuration, its lock, and a disk that is full."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lorasmith import train
from lorasmith.cli.main import main
from lorasmith.config.toml import Config, load_config
from lorasmith.errors import RunError
from lorasmith.report import Report
from lorasmith.runs import train as run_module
from lorasmith.system.locking import is_locked
from lorasmith.training.distributed import World
from lorasmith.training.run_files import read_summary
from lorasmith.training.run_folder import (
    check_folder,
    check_space,
    resumed_config,
    run_lock,
    start_run,
    with_absolute_paths,
)
from tests.support.tiny import adapter_bytes, flags, rows_file, settings, trained


def test_too_little_space_is_said_before_anything_is_written(tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)._replace(free=300_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    files = rows_file(tmp_path / "rows.jsonl")
    assert main(["train", files, "--output", str(tmp_path / "a" / "run"), *flags(settings())]) == 2
    err = capsys.readouterr().err
    assert "this run may write 1.3 MiB, but only 0.3 MiB are free" in err
    assert len(err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


CHILD = """
import resource, sys
from lorasmith.cli.main import main
from lorasmith.training import loop
one_step = loop.one_step
def limited(job, k, stop=False):
    if k == int(sys.argv[1]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
    return one_step(job, k, stop)
loop.one_step = limited
sys.exit(main(sys.argv[3:]))
"""


def test_a_file_that_cannot_grow_is_one_message_and_the_last_checkpoint_stays(tmp_path):
    """The limit on a file's size stands in for a full disk: writes fail in the same places."""
    run = tmp_path / "run"
    words = [rows_file(tmp_path / "rows.jsonl"), "--output", str(run), *flags(settings(save_every=2))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, "3", "20000", "train", *words]
    work = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert work.returncode == 2
    error = [line for line in work.stderr.splitlines() if line.startswith("error: ")]
    assert error[0].startswith(f"error: {run / 'checkpoints' / 'step-000004'}: cannot be written: ")
    assert len(error) == 1
    assert "Traceback" not in work.stderr
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000002"]
    assert read_summary(run) is None
    assert main(["train", "--output", str(run), "--resume"]) == 0
    trained(tmp_path / "whole", save_every=2)
    assert adapter_bytes(run) == adapter_bytes(tmp_path / "whole")


DISK_KIB = 1200


@pytest.fixture
def small_disk(tmp_path, monkeypatch) -> Iterator[Path]:
    """A disk of its own that is nearly full, though the check before the run saw room enough."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_KIB}k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this needs the right to mount a small disk")
    monkeypatch.setattr(run_module, "check_space", lambda *_args: None)
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def assert_full_disk_is_one_message(run: Path, capsys: pytest.CaptureFixture[str], **changes: Any) -> None:
    options = settings(save_every=1, eval_every=1, max_steps=6, **changes)
    files = rows_file(run.parent.parent / "rows.jsonl")
    assert main(["train", files, "--output", str(run), *flags(options)]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert "cannot be written: " in err
    assert "No space left on device" in err
    assert not (run / "summary.json").exists()
    for path in run.glob("checkpoints/step-*"):  # whatever has this name is whole
        assert json.loads((path / "state.json").read_text("utf-8"))["step"] == int(path.name[-6:])


@pytest.mark.parametrize("left", [0, 3_000, 40_000, 100_000, 200_000])
def test_a_full_disk_is_one_message(small_disk, capsys, left):
    """From the first file on, or at a checkpoint."""
    (small_disk / "other files").write_bytes(b"x" * (DISK_KIB * 1024 - left))
    assert_full_disk_is_one_message(small_disk / "run", capsys)


def test_a_run_that_is_a_disk_of_its_own(small_disk, capsys):
    """Its folder cannot be renamed."""
    assert_full_disk_is_one_message(small_disk, capsys, r=32, target_modules="all-linear")
    train(rows_file(small_disk.parent / "rows.jsonl"), output=small_disk, overwrite=True, **settings())


def test_a_disk_needs_room_for_the_run(tmp_path, monkeypatch):
    """And 1 MiB for what is neither weights nor checkpoints."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=21 * 2**30 + 2**20))
    check_space(tmp_path, 21 * 2**30)
    with pytest.raises(RunError, match=r"may write 26,625\.0 MiB, but only 21,505\.0 MiB are free"):
        check_space(tmp_path, 26 * 2**30)


# --- paths


def test_a_packaged_name_stays_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert with_absolute_paths(Config()).model.model == "smollm2-135m-instruct"


def test_the_files_of_a_run_keep_their_weights_and_hubs_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").touch()
    config = load_config(None, {"data": {"data": ["a.jsonl:0.7", "org/name:0.3"]}})
    assert with_absolute_paths(config).data.data == (f"{tmp_path}/a.jsonl:0.7", "org/name:0.3")


def test_one_training_at_a_time_uses_a_folder(tmp_path):
    run = tmp_path / "run"
    with run_lock(run, World(), Report(), resume=False):
        assert is_locked(run / ".lorasmith.lock")
        with pytest.raises(RunError, match="is in use by process"), run_lock(run, World(), Report(), resume=False):
            pass
    assert not run.exists(), "a folder that stayed empty is removed again"


def test_a_run_that_appeared_meanwhile_is_replaced_only_with_overwrite(tmp_path):
    """As without locks, where another training can start in this folder while the base model is loading."""
    run = tmp_path / "run"
    start_run(run, load_config(None, {"lora": {"r": 4}}), {}, {"torch": "2"})
    (run / "metrics.jsonl").touch()
    with pytest.raises(RunError, match="already exists"):
        start_run(run, load_config(None, {"lora": {"r": 8}}), {}, {"torch": "2"})
    assert load_config(run / "config.toml", {}).lora.r == 4
    start_run(run, load_config(None, {"lora": {"r": 8}}), {}, {"torch": "2"}, overwrite=True)
    assert load_config(run / "config.toml", {}).lora.r == 8
    assert not (run / "metrics.jsonl").exists()


def test_a_resumed_run_is_trained_with_its_own_configuration(tmp_path):
    run = tmp_path / "run"
    start_run(run, load_config(None, {"lora": {"r": 4}}), {}, {"torch": "2"})
    (run / "metrics.jsonl").touch()
    assert resumed_config(run) == run / "config.toml"
    same = load_config(run / "config.toml", {})
    assert check_folder(run, same, resume=True, overwrite=False) == same
    with pytest.raises(RunError, match=r"(?s)settings it was started with.*lora\.r: was 4, now 8"):
        check_folder(run, Config(), resume=True, overwrite=False)
    with pytest.raises(RunError, match="already exists"):
        check_folder(run, same, resume=False, overwrite=False)
    assert check_folder(run, Config(), resume=False, overwrite=True) == Config()
