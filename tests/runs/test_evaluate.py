"""`eval` without a file repeats what the training measured, on the very same examples, or refuses."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasmith.adapters.session import open_adapters
from lorasmith.config.data import DataConfig
from lorasmith.config.model import ModelConfig
from lorasmith.config.sampling import SamplingConfig
from lorasmith.data.rows.conversation import Message
from lorasmith.errors import AdapterError, ConfigError, DataError, RunError
from lorasmith.evaluation import general_text
from lorasmith.evaluation.loss import Comparison
from lorasmith.report import Report
from lorasmith.runs import evaluate as measure
from lorasmith.runs.evaluate import EvaluationOptions, evaluate
from tests.support.families import own_logits
from tests.support.tiny import Crash, Watch, crash_at, model_folder, row, rows_file, trained

GENERAL = Path(general_text.__file__).with_name(general_text.GENERAL_TEXT)
SHORT = DataConfig(max_length=64, too_long="truncate")


def loss_of(
    run: str | Path,
    files: Sequence[str] = (),
    limits: DataConfig | None = None,
    model: ModelConfig | None = None,
    report: Report | None = None,
) -> Comparison:
    """The loss alone, of one adapter."""
    (found,) = evaluate([run], EvaluationOptions(tuple(files), limits), model, report).adapters
    return found.loss


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run in it, `run`, and its data, `rows.jsonl`; the seed is not the usual one."""
    folder = tmp_path_factory.mktemp("runs")
    trained(folder / "run", seed=3)
    return folder


@pytest.fixture
def run(runs: Path, tmp_path: Path) -> Path:
    """A copy whose data a test may change: config.toml names it by its path."""
    shutil.copytree(runs, tmp_path / "copy")
    run = tmp_path / "copy" / "run"
    text = (run / "config.toml").read_text("utf-8")
    (run / "config.toml").write_text(text.replace(str(runs), str(tmp_path / "copy")), "utf-8")
    return run


def test_eval_right_after_training_gives_the_summarys_numbers(runs):
    summary = json.loads((runs / "run" / "summary.json").read_text("utf-8"))
    found = loss_of(runs / "run", model=ModelConfig(dtype="float32"))
    assert found.examples == 3
    assert (found.before, found.after) == pytest.approx((summary["loss_before"], summary["loss_after"]), rel=1e-6)
    assert [found.low, found.high] == pytest.approx(summary["interval"], rel=1e-5)
    assert found.after < found.before


def test_the_seed_of_the_interval_is_the_runs(runs, monkeypatch):
    seeds = []
    right = measure.compare
    monkeypatch.setattr(measure, "compare", lambda *given: seeds.append(given[2]) or right(*given))
    loss_of(runs / "run")
    loss_of(runs / "run", [rows_file(runs / "other.jsonl", range(20, 24))])
    loss_of(runs / "run" / "adapter", [rows_file(runs / "other.jsonl", range(20, 24))])
    assert seeds == [3, 3, 0]


def test_the_base_model_has_its_own_biases_beside_an_adapter_that_trains_them(tmp_path):
    """In eval, in the losses of a resumed run, and in answers."""
    options = {"model": str(model_folder("qwen2")), "bias": "all", "max_steps": 6, "learning_rate": 0.05}
    trained(tmp_path / "plain", **options | {"bias": "none"})
    before = loss_of(tmp_path / "plain").before
    with pytest.raises(Crash):
        trained(tmp_path / "run", crash_at(5), save_every=2, **options)
    assert trained(tmp_path / "run", resume=True, save_every=2, **options).loss_before == pytest.approx(before, 1e-6)
    found = loss_of(tmp_path / "run")
    assert found.before == pytest.approx(before, 1e-6)
    assert found.after < before
    sessions = [open_adapters([tmp_path / name]) for name in ("plain", "run")]
    answers = [session.generate("Why is the sky blue?", adapter=None, temperature=0) for session in sessions]
    assert answers[0] == answers[1]
    assert sessions[1].generate("Why is the sky blue?", temperature=0) != answers[1]


@pytest.mark.parametrize("rows", [range(1, 13), range(13), range(11, -1, -1)], ids=["others", "more", "reordered"])
def test_data_that_changed_since_the_training_is_refused(run, rows):
    file = rows_file(run.parent / "rows.jsonl", rows)
    with pytest.raises(RunError, match="the data has changed since training") as caught:
        loss_of(run)
    assert file in str(caught.value)
    assert "lorasmith eval RUN FILE" in str(caught.value)
    assert loss_of(run, [file]).examples == len(rows)


def test_data_that_is_gone_is_named(run):
    (run.parent / "rows.jsonl").unlink()
    with pytest.raises(DataError, match=r"rows\.jsonl"):
        loss_of(run)


@pytest.mark.parametrize("text", [None, "{", "\0\xff", "[]", "{}"])
def test_a_run_that_does_not_say_what_it_held_out(run, text):
    path = run / "environment.json"
    path.unlink() if text is None else path.write_bytes(text.encode("latin-1"))
    with pytest.raises(RunError, match=r"held[ -]out"):
        loss_of(run)


def test_files_are_measured_whole_and_nothing_of_a_training_is_said(runs):
    report = Watch()
    assert loss_of(runs / "run", [rows_file(runs / "own.jsonl", range(30, 37))], report=report).examples == 7
    assert not any("held out" in text or "to train on" in text for text in report.said)
    assert report.tasks[-1] == "held-out loss of the adapter"
    with pytest.raises(DataError, match="longer than 64 tokens"):
        loss_of(runs / "run", [rows_file(runs / "own.jsonl")], limits=DataConfig(max_length=64))
    report = Watch()
    loss_of(runs / "run", [rows_file(runs / "own.jsonl")], limits=SHORT, report=report)
    assert any("to 64 tokens" in text for text in report.warned)


def test_limits_without_a_file_are_refused(runs):
    with pytest.raises(ConfigError, match=r"data\.max_length and data\.too_long only apply to files that you give"):
        loss_of(runs / "run", limits=SHORT)


def test_nothing_held_out(tmp_path):
    trained(tmp_path / "run", held_out=0)
    with pytest.raises(DataError, match="this run held out no examples"):
        loss_of(tmp_path / "run")


def test_an_adapter_folder_names_no_examples(runs):
    with pytest.raises(DataError, match="not a run folder, so it records no held-out examples"):
        loss_of(runs / "run" / "adapter")


def test_the_home_folder_is_known(run, monkeypatch):
    monkeypatch.setenv("HOME", str(run.parent))
    assert loss_of("~/run").examples == 3


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs on the same rows that held out the same ones."""
    folder = tmp_path_factory.mktemp("pair")
    trained(folder / "one", max_steps=3)
    trained(folder / "two", max_steps=6)
    return folder / "one", folder / "two"


def test_several_adapters_are_each_measured_as_alone(pair):
    found = evaluate(pair, model=ModelConfig(dtype="float32"))
    assert [adapter.name for adapter in found.adapters] == ["one", "two"]
    for adapter, run in zip(found.adapters, pair, strict=True):
        alone = loss_of(run, model=ModelConfig(dtype="float32"))
        assert (adapter.loss.before, adapter.loss.after) == pytest.approx((alone.before, alone.after), rel=1e-6)
        assert (adapter.loss.low, adapter.loss.high) == pytest.approx((alone.low, alone.high), rel=1e-5)
    assert found.adapters[0].loss.after != found.adapters[1].loss.after


def test_adapters_that_held_out_different_rows_need_a_file(runs, pair, tmp_path):
    with pytest.raises(RunError, match="its held-out examples differ from those of") as caught:
        evaluate([pair[0], runs / "run", pair[1] / "adapter"])
    assert len(caught.value.problems) == 2
    assert "lorasmith eval RUN RUN FILE" in str(caught.value)
    file = rows_file(tmp_path / "own.jsonl", range(40, 44))
    assert len(evaluate([pair[0], runs / "run"], EvaluationOptions((file,))).adapters) == 2


def test_what_was_forgotten_is_the_loss_on_another_text(runs):
    file = rows_file(runs / "second.jsonl", range(50, 62))
    (found,) = evaluate([runs / "run"], EvaluationOptions(forget=file)).adapters
    assert found.forgotten is not None
    asked = loss_of(runs / "run", [file])
    assert astuple(found.forgotten) == astuple(asked)
    assert found.loss.examples == 3


def test_without_a_name_it_is_the_text_of_the_package(runs):
    found = evaluate([runs / "run"], EvaluationOptions(forget=""))
    (adapter,) = found.adapters
    session = open_adapters([runs / "run"])
    texts = [json.loads(line)["text"] for line in GENERAL.read_text("utf-8").splitlines()]
    assert len(texts) >= 40
    losses, tokens = 0.0, 0
    for text in texts:
        ids = session.base.tokenizer(text)["input_ids"][: session.base.max_positions]
        with torch.no_grad():
            logits = own_logits(session.base, torch.tensor([ids]))[0, :-1].double()
        losses += float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"))
        tokens += len(ids) - 1
    assert adapter.forgotten is not None
    assert adapter.forgotten.after == pytest.approx(losses / tokens, rel=1e-5)
    assert (adapter.forgotten.examples, found.forget_data) == (len(texts), "general.jsonl")


@pytest.mark.parametrize(("factor", "words"), [(0.0, "all B matrices are zero"), (1e-30, "has no effect")])
def test_an_adapter_without_effect_is_refused(run, factor, words):
    weights = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({key: t * factor if ".lora_B." in key else t for key, t in tensors.items()}, weights)
    with pytest.raises(AdapterError, match=words):
        evaluate([run])


def test_answers_are_compared_with_the_rows(runs, tmp_path):
    judge = tmp_path / "judge.py"
    judge.write_text("def length(prediction, reference):\n    return len(prediction) - len(reference)\n", "utf-8")
    wanted = EvaluationOptions(answers=2, sampling=SamplingConfig(max_new_tokens=8), metrics=(f"{judge}:length",))
    found = evaluate([runs / "run"], wanted)
    (adapter,) = found.adapters
    assert [score.key for score in adapter.scores] == [
        "exact", "f1", "chrf", "bleu", "rouge_l", "ended", f"{judge}:length",
    ]  # fmt: skip
    assert len(found.samples) == 2
    session = open_adapters([runs / "run"])
    rows = {f"{runs / 'rows.jsonl'}:{i + 1}": row(i)["messages"] for i in range(12)}
    for sample in found.samples:
        asked, answer = rows[sample.source]
        assert (sample.prompt, sample.reference) == (asked["content"].strip(), answer["content"])
        messages, sampling = [(Message("user", asked["content"]),)], SamplingConfig(max_new_tokens=8)
        assert session.reply(messages, None, sampling) == [sample.base.text]
        assert session.reply(messages, "run", sampling) == [sample.adapters[0].text]
    lengths = [len(s.adapters[0].text) - len(s.reference) for s in found.samples]
    assert adapter.scores[-1].after == pytest.approx(sum(lengths) / 2)


def test_what_cannot_be_asked_is_said_together_before_anything_is_loaded(tmp_path):
    with pytest.raises(ConfigError) as caught:
        evaluate([tmp_path / "no-run"], EvaluationOptions(limits=SHORT, metrics=("x.py",)))
    assert len(caught.value.problems) == 3


def test_in_bfloat16_the_figures_are_those_of_the_training_to_the_last_bit(tmp_path: Path) -> None:
    summary = trained(tmp_path / "run", dtype="bfloat16", held_out=5)
    found = loss_of(tmp_path / "run")
    assert (found.before, found.after) == (summary.loss_before, summary.loss_after)
