"""merge, eval and info as they are typed: exit codes, what people read, and the line that programs read."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lorasmith.cli.main import main
from lorasmith.system.transformers_logging import quiet_transformers
from tests.support.peft_folder import peft_folder
from tests.support.tiny import model_folder, rows_file, trained

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    run = tmp_path_factory.mktemp("verbs") / "run"
    trained(run)
    return run


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that PEFT made, and options that have lines of their own."""
    options = {"use_rslora": True, "rank_pattern": {"q_proj": 9}, "alpha_pattern": {"v_proj": 3}}
    return peft_folder(tmp_path_factory.mktemp("theirs"), target_modules="all-linear", **options)


@pytest.fixture
def own(tmp_path: Path) -> str:
    """A file of seven rows that no training saw."""
    return rows_file(tmp_path / "own.jsonl", range(30, 37))


def said(capsys: Capture, *argv: object) -> str:
    """What people read of a verb that succeeds."""
    assert main([str(word) for word in argv]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def as_json(capsys: Capture, *argv: object) -> dict[str, object]:
    """The one line on stdout; what people read is on stderr then."""
    assert main([*map(str, argv), "--json"]) == 0
    out, err = capsys.readouterr()
    assert err
    (line,) = out.splitlines()
    found: dict[str, object] = json.loads(line)
    return found


def refused(capsys: Capture, *argv: object) -> str:
    """The one sentence of a verb that the user can mend."""
    assert main([str(word) for word in argv]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1, err
    assert "Traceback" not in out + err
    return err.removeprefix("error: ").strip()


def test_eval_of_the_runs_own_examples(capsys, run):
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    text = said(capsys, "eval", run, "--dtype", "float32")
    wanted = f"held-out loss {summary['loss_before']:.4f} -> {summary['loss_after']:.4f} (perplexity "
    assert any(line.startswith(wanted) for line in text.splitlines())
    found = as_json(capsys, "eval", run, "--dtype", "float32")
    assert found.keys() >= {"before", "after", "low", "high", "examples", "difference"}
    assert [found["low"], found["high"]] == pytest.approx(summary["interval"], rel=1e-5)
    assert found["difference"] == pytest.approx(summary["loss_after"] - summary["loss_before"], rel=1e-5)


def test_eval_of_files(capsys, run, own):
    assert as_json(capsys, "eval", run, own)["examples"] == 7
    assert as_json(capsys, "eval", "--max-length", 64, "--too-long", "drop", run, own)["examples"] in range(1, 7)


def test_eval_of_a_folder_that_peft_made(capsys, theirs, own, run):
    assert main(["eval", str(theirs), own, "--model", str(model_folder()), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["examples"] == 7
    assert "the adapter was made by another tool, so the model's own chat template is used" in err


@pytest.mark.parametrize("flag", [["--max-length", "64"], ["--too-long", "drop"]])
def test_eval_refuses_limits_of_files_that_are_not_given(capsys, run, flag):
    assert "only apply to files that you give" in refused(capsys, "eval", run, *flag)


def test_eval_refuses_data_that_changed(capsys, tmp_path):
    trained(tmp_path / "run")
    rows_file(tmp_path / "rows.jsonl", range(1, 13))
    assert "the data has changed since training" in refused(capsys, "eval", tmp_path / "run")


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
    assert "cannot be written: Not a directory" in text
    assert "--resume" not in text
