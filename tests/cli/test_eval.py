"""`eval` as it is typed, with answers, several adapters and a page to send."""

import json
from pathlib import Path

import pytest

from lorasmith.cli.main import main
from lorasmith.runs.evaluate import EvaluationOptions, evaluate
from tests.support.commands import as_json, refused, said
from tests.support.tiny import model_folder, rows_file, trained

SPOILED = "<script>alert('&')</script> 你好"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two runs that held out the same rows."""
    folder = tmp_path_factory.mktemp("runs")
    for name, steps in (("short", 3), ("long", 6)):
        trained(folder / name, max_steps=steps)
    return [str(folder / "short"), str(folder / "long")]


@pytest.fixture
def own(tmp_path: Path) -> str:
    """Rows of the user's, whose texts would be tags if nobody took care."""
    file = tmp_path / "own.jsonl"
    rows_file(file, range(30, 41))
    row = {"messages": [{"role": "user", "content": SPOILED}, {"role": "assistant", "content": SPOILED}]}
    file.write_text(json.dumps(row) + "\n" + file.read_text("utf-8"), "utf-8")
    return str(file)


def test_several_adapters_in_a_table_of_80_columns(capsys, runs, own):
    assert main(["eval", runs[0], own, runs[1], "--generate", "7", "--max-new-tokens", "8"]) == 0
    out, _err = capsys.readouterr()
    lines = out.splitlines()
    assert all(len(line) <= 80 for line in lines if ": " not in line)  # sentences are left whole in a pipe
    for measure in (
        "held-out loss",
        "perplexity",
        "exact match",
        "F1",
        "chrF",
        "BLEU",
        "ROUGE-L",
        "reached stop token",
    ):
        at = next(i for i, line in enumerate(lines) if line.startswith(f"{measure} (base)"))
        assert [line.split()[0] for line in lines[at + 1 : at + 3]] == ["short", "long"]
    assert "short: exact match, " in out
    assert "too few answers to tell; request more with --generate" in out
    assert "answers not shown: 2" in out
    assert out.count("reference answer") == 5


def test_one_adapter_beside_what_it_forgot(capsys, runs, own):
    assert main(["eval", runs[0], "--forget", own]) == 0
    out, _err = capsys.readouterr()
    (line,) = [line for line in out.splitlines() if line.startswith("loss on own.jsonl (base)")]
    (words,) = [line for line in out.splitlines() if line.startswith("short: loss on own.jsonl: ")]
    assert "forgetting" in words.casefold()
    assert line.split()[-1] == f"{evaluated(runs[0], own):.4f}"


def evaluated(run: str, file: str) -> float:
    """The base's loss on a file."""
    return evaluate([run], EvaluationOptions((file,))).adapters[0].loss.before


def test_programs_get_every_figure(capsys, runs, own, tmp_path):
    (tmp_path / "my.py").write_text("def half(prediction, reference):\n    return 0.5\n", "utf-8")
    metric = f"{tmp_path / 'my.py'}:half"
    assert main(["eval", runs[0], own, "--generate", "3", "--max-new-tokens", "8", "--metric", metric, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (adapter,) = found["adapters"]
    assert {key: found[key] for key in ("before", "after", "low", "high")}.items() <= adapter["loss"].items()
    assert found["examples"] == 12
    assert adapter["scores"][metric] == {
        "before": 0.5, "after": 0.5, "low": 0, "high": 0, "examples": 3, "name": "half",
        "difference": 0, "is_real": False, "verdict": "too few answers to tell; request more with --generate",
    }  # fmt: skip
    assert found["samples"][0]["reference"] == SPOILED


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--metric", "my.py:score"], "--metric scores generated answers, but none are requested"),
        (["--html", "no-folder/page.html"], "must be a file in an existing folder"),
        (["--generate", "0"], "must be a whole number above 0"),
        (["no-such-file.jsonl"], "does not exist"),
        (["--forget", "no-such-file.jsonl"], "does not exist"),
    ],
)
def test_what_cannot_be_is_refused_with_code_2(capsys, runs, words, text):
    assert main(["eval", runs[0], *words]) == 2
    assert text in capsys.readouterr().err


def test_columns_of_other_names_are_read(capsys, runs, tmp_path):
    file = tmp_path / "own.csv"
    file.write_text("question,answer\n" + "".join(f"Is it {i}?,It is {i}.\n" for i in range(20, 32)), "utf-8")
    assert main(["eval", runs[0], str(file), "--map", "instruction=question", "output=answer"]) == 0
    assert "on 12 held-out examples" in capsys.readouterr().out


# --- one adapter, of its own examples and of files


@pytest.fixture
def seven(tmp_path: Path) -> str:
    """A file of seven rows that no training saw."""
    return rows_file(tmp_path / "seven.jsonl", range(30, 37))


def test_eval_of_the_runs_own_examples(capsys, run):
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    text = said(capsys, "eval", run, "--dtype", "float32")
    wanted = f"held-out loss {summary['loss_before']:.4f} -> {summary['loss_after']:.4f} (perplexity "
    assert any(line.startswith(wanted) for line in text.splitlines())
    found = as_json(capsys, "eval", run, "--dtype", "float32")
    assert found.keys() >= {"before", "after", "low", "high", "examples", "difference"}
    assert [found["low"], found["high"]] == pytest.approx(summary["interval"], rel=1e-5)
    assert found["difference"] == pytest.approx(summary["loss_after"] - summary["loss_before"], rel=1e-5)


def test_eval_of_files(capsys, run, seven):
    assert as_json(capsys, "eval", run, seven)["examples"] == 7
    assert as_json(capsys, "eval", "--max-length", 64, "--too-long", "drop", run, seven)["examples"] in range(1, 7)


def test_eval_of_a_folder_that_peft_made(capsys, theirs, seven):
    assert main(["eval", str(theirs), seven, "--model", str(model_folder()), "--json"]) == 0
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
