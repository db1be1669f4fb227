"""The folder of an export: complete or not there, locked, and never in the place of what others wrote."""

from pathlib import Path

import pytest

from lorasmith.adapters.output import output_folder
from lorasmith.errors import RunError
from lorasmith.system.ownership import marked_files


def export(path: Path, text: str = "weights", overwrite: bool = False) -> None:
    """The smallest export there is."""

    def fill(folder: Path) -> None:
        (folder / "model.txt").write_text(text)

    with output_folder(path, overwrite) as output:
        output.write(fill)


def test_it_is_written_and_replaced_only_if_asked_for(tmp_path):
    out = tmp_path / "new" / "out"
    export(out)
    assert marked_files(out) >= {"model.txt"}
    with pytest.raises(RunError, match=r"out already exists\. Choose another --output, or replace it"):
        export(out, "other")
    assert (out / "model.txt").read_text() == "weights"
    export(out, "other", overwrite=True)
    assert (out / "model.txt").read_text() == "other"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_what_others_wrote_is_never_replaced(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "config.json").write_text("{}")
    for path, why in (("site", "site was not written by lorasmith"), ("site/config.json", "is a file, not a folder")):
        with pytest.raises(RunError, match=why):
            export(tmp_path / path, overwrite=True)
    export(tmp_path / "out")
    (tmp_path / "out" / "notes.md").write_text("mine")
    with pytest.raises(RunError, match=r"out contains notes\.md, which lorasmith did not write"):
        export(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "notes.md").read_text() == "mine"


def test_an_adapter_is_not_replaced_by_a_model(tmp_path):
    with output_folder(tmp_path / "out", False, "adapter") as output:
        output.write(lambda folder: (folder / "adapter.txt").touch())
    with pytest.raises(RunError, match="out was not written by lorasmith"):
        export(tmp_path / "out", overwrite=True)
    with output_folder(tmp_path / "out", True, "adapter") as output:
        output.write(lambda folder: (folder / "new.txt").touch())
    assert (tmp_path / "out" / "new.txt").exists()


def test_two_exports_into_one_folder(tmp_path):
    with output_folder(tmp_path / "out", False), pytest.raises(RunError, match="out is in use by process"):
        export(tmp_path / "out")


def test_what_came_while_it_was_written_stays(tmp_path):
    out = tmp_path / "out"

    def fill(folder: Path) -> None:
        (folder / "model.txt").write_text("weights")
        out.mkdir()
        (out / "notes.md").write_text("mine")

    with output_folder(out, False) as output, pytest.raises(RunError, match="out already exists"):
        output.write(fill)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "notes.md"]


def test_a_failure_leaves_the_folder_as_it_was(tmp_path):
    export(tmp_path / "out")

    def full(_folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with output_folder(tmp_path / "out", True) as output, pytest.raises(RunError, match=r"choose another --output\.$"):
        output.write(full)
    assert (tmp_path / "out" / "model.txt").read_text() == "weights"
