"""The files of a run: which names are ours, what recovery cleans up, and the summary."""

import json
from dataclasses import asdict
from pathlib import PurePath

import pytest

from lorasmith.errors import RunError
from lorasmith.system.ownership import mark
from lorasmith.training.checkpoint import latest
from lorasmith.training.run_files import (
    Summary,
    checkpoint_name,
    checkpoints_in,
    is_leftover,
    is_run,
    is_run_file,
    read_summary,
    recover_run,
)

SUMMARY = Summary("runs/one", 2.5, 2.0, (-0.6, -0.4), 100.0, 500.0, 60.0, 4, 800, 1000, 4000, 10_000, 4)


@pytest.mark.parametrize(
    "name",
    ["step-000004-mine", "step-000004.bak", "step-notes", "step-4", "step-0000005", "step-٠٠٠٠٠٤", "step-000004 keep"],
)
def test_another_name_is_no_checkpoint(tmp_path, name):
    for each in ("step-000002", name):
        (tmp_path / each).mkdir()
    assert latest(tmp_path) == tmp_path / "step-000002"


def test_neither_a_link_nor_a_file_is_one_and_a_long_training_has_longer_names(tmp_path):
    for step in (999_999, 1_000_000):
        (tmp_path / checkpoint_name(step)).mkdir()
    (tmp_path / "step-000003").symlink_to(tmp_path)
    (tmp_path / "step-000004").write_text("")
    assert [step for step, _path in checkpoints_in(tmp_path)] == [999_999, 1_000_000]
    assert latest(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("path", "is_ours"),
    [
        ("config.toml", True),
        (".lorasmith.lock", True),
        ("adapter/adapter_config.json", True),
        ("adapter/notes.txt", False),
        ("tensorboard/events.out.tfevents.1", True),
        ("tensorboard/notes", False),
        ("checkpoints/best-000002", True),
        ("checkpoints/best-000002/state.json", True),
        ("checkpoints/step-2", False),
        ("checkpoints/step-000002/a/b", False),
        (".config.toml.lorasmith-new-abcd1234", True),
        ("checkpoints/.step-000002.lorasmith-old", True),
        (".notes.lorasmith-old", False),
        ("config.toml.bak", False),
        (".git", False),
    ],
)
def test_names_that_training_writes(path, is_ours):
    assert is_run_file(PurePath(path)) is is_ours


def test_what_version_0_1_0_left_half_written_is_a_leftover_too():
    assert is_leftover(".config.toml.4242")
    assert is_leftover(".step-000002.old.4242")
    assert not is_leftover(".notes.4242")


def test_a_run_has_a_marker_or_several_of_our_files(tmp_path):
    (tmp_path / "config.toml").touch()
    assert not is_run(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    assert is_run(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    mark(tmp_path, "run")
    assert is_run(tmp_path)
    (tmp_path / "config.toml").unlink()
    assert not is_run(tmp_path)


def test_recovery_restores_an_old_folder_and_removes_incomplete_ones(tmp_path):
    for name in ("checkpoints/.step-000002.lorasmith-old", "checkpoints/.step-000002.lorasmith-new-abcd1234", ".git"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / ".step-000002.lorasmith-old" / "state.json").write_text("{}")
    recover_run(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]
    assert (tmp_path / "checkpoints" / "step-000002" / "state.json").exists()
    assert (tmp_path / ".git").is_dir()


def test_a_summary_is_read_back_and_says_what_came_out(tmp_path):
    assert read_summary(tmp_path) is None
    (tmp_path / "summary.json").write_text(json.dumps(asdict(SUMMARY)))
    assert read_summary(tmp_path) == SUMMARY
    assert str(SUMMARY) == "4 steps, held-out loss 2.5000 -> 2.0000"


@pytest.mark.parametrize("change", [{"steps": "4"}, {"interval": [1.0]}, {"seconds": None}])
def test_a_summary_with_a_value_of_another_type_is_refused(tmp_path, change):
    (tmp_path / "summary.json").write_text(json.dumps(asdict(SUMMARY) | change))
    with pytest.raises(RunError, match=rf"summary\.json: not in the format that training writes: {next(iter(change))}"):
        read_summary(tmp_path)
