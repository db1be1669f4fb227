"""`import` as it is typed."""

from lorasmith.cli.main import main
from tests.support.commands import as_json, refused, said
from tests.support.exported import adapter_of, folder_of
from tests.support.foreign_folders import mlx_folder, swift_folder
from tests.support.tiny import model_folder


def test_import(capsys, tmp_path):
    theirs = adapter_of(folder_of("llama", tmp_path / "base"), tmp_path / "theirs")
    (theirs / "lorasmith.json").unlink()
    out = tmp_path / "ours"
    lines = said(capsys, "import", theirs, "--output", out, "--system", "Be kind.").splitlines()
    assert lines == [
        f"written by: PEFT ({theirs})",
        f"base model: {tmp_path / 'base'}",
        "template: model (the base model's own)",
        "system message: Be kind. (as requested)",
        f"Imported adapter: {out}; read again, its logits differ by 0.0e+00",
    ]
    assert "already exists" in refused(capsys, "import", theirs, "--output", out)
    found = as_json(capsys, "import", theirs, "--output", out, "--overwrite")
    assert (found["program"], found["template"], found["system"]) == ("PEFT", "model", "")
    assert "Be kind." not in said(capsys, "info", out)


def test_a_system_message_that_is_not_recorded_is_said(capsys, tmp_path):
    theirs = adapter_of(folder_of("llama", tmp_path / "base"), tmp_path / "theirs")
    (theirs / "lorasmith.json").unlink()
    assert main(["import", str(theirs), "--output", str(tmp_path / "ours")]) == 0
    told = "PEFT does not record the system message of a training. If there was one"
    assert f"warning: {told}" in capsys.readouterr().out


def test_a_template_that_may_differ_is_said(capsys, tmp_path):
    theirs, out = swift_folder(tmp_path / "theirs"), tmp_path / "ours"
    text = said(capsys, "import", theirs, "--output", out)
    assert "warning: ms-swift trained with its own template llama3_2, which may differ from this one" in text
    text = said(capsys, "import", theirs, "--output", out, "--overwrite", "--template", "chatml")
    assert "warning" not in text
    options = ["--overwrite", "--template-kwargs", "enable_thinking=false"]
    assert as_json(capsys, "import", theirs, "--output", out, *options)["unlike"] == "llama3_2"


def test_an_adapter_of_mlx_lm_is_pointed_to_import(capsys, tmp_path):
    theirs = mlx_folder(tmp_path / "theirs", model_folder())
    assert f"Convert it with: lorasmith import {theirs} --output NEW" in refused(capsys, "info", theirs)
