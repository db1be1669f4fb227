"""`merge` as it is typed."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lorasmith.system.transformers_logging import quiet_transformers
from tests.support.commands import as_json, refused, said
from tests.support.tiny import model_folder


def test_merge(capsys, run, tmp_path):
    out = tmp_path / "merged"
    lines = said(capsys, "merge", run, "--output", out).splitlines()
    assert lines[-1] == f"Merged model: {out}"
    assert lines[-2].startswith("float32: relative logit error ")
    with quiet_transformers():
        assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.float32
    assert "already exists" in refused(capsys, "merge", run, "--output", out)
    found = as_json(capsys, "merge", run, "--output", out, "--overwrite", "--dtype", "bfloat16")
    assert (found["folder"], found["dtype"], found["untied"]) == (str(out), "bfloat16", False)
    assert found["agreeing"] == found["positions"]


def test_merge_of_a_folder_that_peft_made(capsys, theirs, tmp_path):
    found = as_json(capsys, "merge", theirs, "--output", tmp_path / "merged", "--model", model_folder())
    assert found["dtype"] == "float32"


@pytest.mark.parametrize("verb", ["eval", "merge"])
def test_another_base_is_refused(capsys, run, tmp_path, verb):
    more = ["--output", tmp_path / "merged"] if verb == "merge" else []
    text = refused(capsys, verb, run, "--model", model_folder("llama", 1), *more)
    assert "is not the base model that this adapter was trained on" in text
    assert text.endswith("Specify the right one with --model.")
    assert not (tmp_path / "merged").exists()


def test_merge_on_a_disk_that_cannot_be_written(capsys, run, tmp_path):
    (tmp_path / "file").touch()
    text = refused(capsys, "merge", run, "--output", tmp_path / "file" / "merged")
    assert "file/merged: cannot be written: " in text
    assert "--resume" not in text
