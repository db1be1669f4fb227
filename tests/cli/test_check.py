"""lorasmith check: what it says is what a training then does, and what would go wrong is said before it starts."""

import json
from pathlib import Path
from typing import Any

import pytest

from lorasmith.cli.main import main
from lorasmith.config.toml import load_config
from lorasmith.errors import LorasmithError
from lorasmith.loading import load as loading
from lorasmith.preflight import estimate as estimating
from lorasmith.preflight.check import check
from tests.support.checks import config
from tests.support.tiny import Watch, flags, row, rows_file, settings, trained

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> str:
    return rows_file(tmp_path_factory.mktemp("check") / "rows.jsonl")


def found(capsys: Capture, files: str, **changes: Any) -> dict[str, Any]:
    code = main(["check", files, *flags(settings(**changes)), "--json"])
    (line,) = capsys.readouterr().out.splitlines()
    result: dict[str, Any] = json.loads(line)
    assert code == (2 if result["problems"] else 0)
    return result


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_steps": 10**12}, "training.max_steps: invalid value '1000000000000': must be at most 999999"),
        ({"max_steps": None, "epochs": 1e300}, "training.epochs: invalid value '1e+300': must be at most 999999"),
        ({"max_steps": None, "epochs": 999_999, "batch_size": 1}, "training.epochs: 999999 epochs are 8,999,991 steps"),
        ({"r": 10**12}, "lora.r: invalid value '1000000000000': must be at most 1000000"),
        ({"r": 10**6}, "would have rank 1000000, but the layers of this model can have at most 32"),
        ({"lora_alpha": 1e300}, "lora.lora_alpha: invalid value '1e+300': must be at most 1000000"),
    ],
)
def test_numbers_beyond_all_sense_are_refused_at_once(files, capsys, given, said):
    options = {name: value for name, value in settings(**given).items() if value is not None}
    assert main(["check", files, *flags(options)]) == 2
    assert said in "".join(capsys.readouterr())


def test_it_ends_at_once_for_the_longest_run_there_is(files):
    found = check(config(files, max_steps=999_999, eval_every=7, save_every=5))
    assert found.facts is not None
    assert found.facts.steps == 999_999
    assert min(found.facts.expected.seconds.values()) > 0


def test_what_it_says_is_what_a_training_then_does(tmp_path, capsys):
    files = rows_file(tmp_path / "rows.jsonl")
    facts = found(capsys, files, max_steps=6)["facts"]
    watch = Watch()
    summary = trained(tmp_path / "run", watch, max_steps=6)
    assert (facts["steps"], facts["trainable"]) == (summary.steps, summary.trainable_parameters)
    assert (facts["examples"], facts["held_out"]) == (9, 3)
    assert facts["expected"]["by"] == "dry step"
    assert facts["expected"]["peak_mib"] > 0
    assert facts["expected"]["seconds"].keys() == {"start", "training", "evaluation", "saving"}
    capsys.readouterr()
    assert main(["check", files, *flags(settings(max_steps=6))]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for line in watch.said[1:9]:  # the same sentences at the start of the training
        assert " ".join(line.split()) in shown or line.startswith("memory"), line
    assert "measured in an earlier identical run" in shown


def test_it_writes_nothing_but_what_it_was_asked_for(tmp_path, files, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["check", files, *flags(settings()), "--output", "run", "--html", "seen.html"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["seen.html"]


def test_the_problems_of_all_parts_come_together(tmp_path, capsys):
    lines = [json.dumps(row(0)), '{"instruction": "x"}', json.dumps(row(1)), "{broken", json.dumps({"instrction": "x"})]
    files = tmp_path / "bad.jsonl"
    files.write_text("\n".join(lines), "utf-8")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("", "utf-8")
    wrong = flags(settings(output=str(tmp_path / "used")))
    assert main(["check", str(files), *wrong, "--target-modules", "q_porj", "k_proj"]) == 2
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "line 2",
        "line 4",
        "line 5",
        "'q_porj' matches no module",
        "Did you mean 'q_proj'",
        "used already exists",
    ):
        assert part in text, part
    assert "problems found; fix them first" in text
    with pytest.raises(LorasmithError) as raised:  # a training refuses with the same sentences
        trained_on(files, tmp_path, target_modules=["q_porj", "k_proj"])
    assert all(" ".join(problem.split()) in text for problem in raised.value.problems)


def trained_on(files: Path, folder: Path, **changes: Any) -> None:
    from lorasmith import train

    train(str(files), output=folder / "run", **settings(**changes))


def test_without_a_base_the_files_are_looked_at_all_the_same(tmp_path, capsys):
    files = tmp_path / "bad.jsonl"
    files.write_text('{"instruction": "x"}\n', "utf-8")
    problems = found(capsys, str(files), model=str(tmp_path / "no-model"))["problems"]
    assert "no-model" in problems[0]
    assert any("bad.jsonl line 1" in problem for problem in problems[1:])


def test_cut_rows_are_warned_of_and_shown_without_their_stop(files, capsys):
    result = found(capsys, files, max_length=60, too_long="truncate")
    assert any("to 60 tokens; answer tokens lost" in text for text in result["warnings"])
    assert [row["stops"] for row in result["rows"]].count(False) >= 1
    assert result["lengths"][-1]["cut"] > 0
    assert sum(bar["rows"] for bar in result["lengths"]) == result["facts"]["examples"]
    assert main(["check", files, *flags(settings(max_length=60, too_long="truncate")), "--plain"]) == 0
    out = capsys.readouterr().out
    assert "it does NOT end with a stop token, because it was truncated" in out
    assert "of them truncated at 60" in out
    assert "█" not in out


def test_rows_that_are_all_cut_would_never_teach_to_stop(tmp_path, capsys):
    files = tmp_path / "long.jsonl"
    long = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No. " * 60}]}
    files.write_text("".join(json.dumps(long) + "\n" for _i in range(8)), "utf-8")
    (problem,) = found(capsys, str(files), max_length=40, too_long="truncate")["problems"]
    assert "every row is truncated before its stop token" in problem


def test_a_training_that_could_learn_nothing_is_refused_before_it_starts(tmp_path, capsys, files):
    (problem,) = found(capsys, files, max_steps=1, warmup=1)["problems"]
    assert "the learning rate is 0 at every step (1 step)" in problem
    with pytest.raises(LorasmithError, match="the learning rate is 0 at every step"):
        trained(tmp_path / "run", max_steps=1, warmup=1)
    assert not (tmp_path / "run").exists()


def test_one_pass_over_few_rows_is_warned_of_with_flags_that_end_the_warning(files):
    def about_passes(changes: dict[str, Any]) -> list[str]:
        words = {name: value for name, value in settings(**changes).items() if name != "max_steps"}
        loaded = load_config(None, {
            "data": {"data": [files], "held_out": words.pop("held_out")},
            "model": {key: words.pop(key) for key in ("model", "dtype")}, "training": words,
        })  # fmt: skip
        return [text for text in check(loaded).warnings if "the data is small" in text]

    (text,) = about_passes({})
    assert "one epoch (3 steps)" in text
    assert "Try --epochs 8; " in text
    assert about_passes({"epochs": 8}) == []


def test_without_a_base_weights_and_other_columns_are_understood(tmp_path, capsys):
    for name in ("a", "b"):
        lines = ["question,answer", *(f"{name} {i}?,{name} {i}." for i in range(4))]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines) + "\n", "utf-8")
    words = [f"{tmp_path / 'a.csv'}:0.5", f"{tmp_path / 'b.csv'}:0.5", "--map", "instruction=question", "output=answer"]
    assert main(["check", *words, "--model", str(tmp_path / "nowhere")]) == 2
    told = "".join(capsys.readouterr())
    assert "model.model" in told
    assert "1 problem" in told, told


def test_nf4_is_suggested_where_the_base_model_does_not_fit(files, capsys, monkeypatch):
    """A model of 3 billion parameters in float32 on a machine of 8 GB: before it is loaded, and beside the estimate."""
    mib = {"none": 12_000.0, "int8": 9_000.0, "nf4": 1_900.0}
    for module in (loading, estimating):
        monkeypatch.setattr(module, "weights_mib", lambda _folder, _dtype, form="none": mib[form])
    monkeypatch.setattr(loading, "usable_mib", lambda _device: 8_000.0)
    monkeypatch.setattr(estimating, "usable_mib", lambda _device: 100.0)  # less than this process has already
    assert main(["check", files, *flags(settings())]) == 0
    out, err = (" ".join(text.split()) for text in capsys.readouterr())
    assert (
        "the weights take 12,000 MiB in float32, and 8,000 MiB are available to this process. Quantized with"
        in out + err
    )
    assert "--quantize nf4 they take 1,900 MiB" in out + err
    assert "loading the base model with --quantize nf4 would save about 10,100 MiB" in out + err
    monkeypatch.setattr(estimating, "usable_mib", lambda _device: 100_000.0)
    monkeypatch.setattr(loading, "usable_mib", lambda _device: 100_000.0)
    assert main(["check", files, *flags(settings())]) == 0
    assert "--quantize" not in "".join(capsys.readouterr())


def test_several_adapters_are_checked_each(tmp_path, capsys):
    """What is wrong with one is said under its name, and the others are checked all the same."""
    good = rows_file(tmp_path / "good.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"instruction": "a"}\n', "utf-8")
    words = [f"a={good}", f"b={tmp_path / 'bad.jsonl'}", *flags(settings())]
    assert main(["check", *words]) == 2
    out, err = (" ".join(text.split()) for text in capsys.readouterr())
    assert out.index("Adapter a") < out.index("12 rows") < out.index("Adapter b") < out.index("error: ")
    assert "Trained at once, all together usually need less time" in out + err
    assert main(["check", *words, "--json"]) == 2
    result = json.loads(capsys.readouterr().out)
    assert [len(one["problems"]) for one in result.values()] == [0, 1]
    assert main(["check", *words, "--html", str(tmp_path / "page.html")]) == 2
    assert "--html shows one training" in capsys.readouterr().err


def test_the_files_of_a_folder_are_checked_each(tmp_path, capsys):
    for name in ("a", "b"):
        rows_file(tmp_path / f"{name}.jsonl")
    assert main(["check", str(tmp_path), "--each", *flags(settings()), "--json"]) == 0
    assert [*json.loads(capsys.readouterr().out)] == ["a", "b"]
