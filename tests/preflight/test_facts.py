"""The training plan in lines, with what it warns of."""

import pytest

from lorasmith.config.training import TrainingConfig
from lorasmith.preflight.check import check
from lorasmith.preflight.estimate import Estimate
from lorasmith.preflight.facts import LABEL, collect_facts, fact_lines, labeled_facts
from tests.support.checks import config, job_of
from tests.support.tiny import rows_file


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return rows_file(tmp_path_factory.mktemp("facts") / "rows.jsonl")


def test_layers_without_an_adapter_are_named(files):
    facts = check(config(files, target_modules=["q_proj"])).facts
    kinds = {path.rpartition(".")[2] for path in facts.without_adapter}
    assert kinds == {"k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}
    assert all(path.endswith("q_proj") for path in facts.targets["q_proj"])
    assert check(config(files, target_modules="all-linear")).facts.without_adapter == ["lm_head"]


def test_the_default_learning_rate_is_too_high_for_lion(files):
    asked = config(files)

    def said(**training):
        changed = asked.model_copy(update={"training": TrainingConfig(max_steps=4, batch_size=4, **training)})
        return [text for text in check(changed).warnings if "Lion" in text]

    (warning,) = said(optimizer="lion")
    assert "is for AdamW. Lion needs about a tenth of it: set --learning-rate 0.0001, for example." in warning
    assert said(optimizer="lion", learning_rate=2e-4) == said(optimizer="muon") == []


def test_many_target_modules_are_one_line(files):
    """Such as those of an adapter by their whole paths."""
    paths = check(config(files)).facts.targets["all-linear"]
    assert len(paths) > 8
    facts = check(config(files, target_modules=paths)).facts
    lines = [text for label, text in labeled_facts(facts) if label == "target"]
    assert len(lines) == 1
    assert lines[0].startswith("14 names match 14 modules: 2 x q_proj, ")
    few = check(config(files, target_modules=paths[:8])).facts
    assert sum(label == "target" for label, _text in labeled_facts(few)) == 8


def test_a_warm_up_longer_than_the_run_is_a_warning(files):
    result = check(config(files, warmup=10))
    assert any("the learning rate never reaches its peak" in text for text in result.warnings)
    assert result.problems == []


def test_lines_have_their_labels_in_one_column(files, tmp_path):
    facts = collect_facts(job_of(files, tmp_path, generate=2, max_new_tokens=8), Estimate())
    labels = [label for label, _text in labeled_facts(facts)]
    assert labels[:2] == ["base", "layout"]
    assert labels[-4:] == ["params", "steps", "rate", "answers"]
    assert (facts.answered, facts.answer_tokens) == (2, 8)
    for line, (label, text) in zip(fact_lines(facts), labeled_facts(facts), strict=True):
        assert (line[:LABEL].rstrip(), line[LABEL:]) == (label, text)


def test_a_rate_that_a_race_will_choose_is_not_a_number(files, tmp_path):
    facts = collect_facts(job_of(files, tmp_path, learning_rate="auto"), Estimate())
    (text,) = [text for label, text in labeled_facts(facts) if label == "rate"]
    assert facts.learning_rate is None
    assert text.startswith("learning rate chosen by a race of several (linear, ")


def test_a_learning_rate_of_zero_throughout_is_a_problem(files, tmp_path):
    facts = collect_facts(job_of(files, tmp_path, max_steps=1, warmup=1), Estimate(problems=["no memory"]))
    assert len(facts.problems) == 2
    assert facts.problems[1] == "no memory"
    assert "nothing would be learned" in facts.problems[0]


@pytest.mark.parametrize(("option", "value"), [("eval_every", 2), ("generate", 3), ("patience", 1)])
def test_options_without_held_out_rows_are_warned_of(files, tmp_path, option, value):
    more = {"eval_every": 2} if option == "patience" else {}
    facts = collect_facts(job_of(files, tmp_path, held_out=0, **{option: value}, **more), Estimate())
    assert any(text.startswith(f"training.{option}: no examples are held out") for text in facts.warnings)
