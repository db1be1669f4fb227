"""What `info` reads: adapters of runs and of PEFT, and folders that are not whole."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lorasmith.cli.main import main
from lorasmith.errors import AdapterError
from lorasmith.runs.inspect import inspect_folder
from tests.support.peft_folder import peft_folder
from tests.support.tiny import CHATML, model_folder, trained


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is only read."""
    run = tmp_path_factory.mktemp("info") / "run"
    trained(run)
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_a_run(finished):
    facts = inspect_folder(finished)
    summary = json.loads((finished / "summary.json").read_text("utf-8"))
    weights = finished / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    assert facts["folder"] == str(finished / "adapter")
    assert facts["base"] == str(model_folder())
    assert (facts["r"], facts["lora_alpha"], facts["use_rslora"]) == (8, 16, False)
    assert (facts["rank_pattern"], facts["alpha_pattern"], facts["modules_to_save"]) == ({}, {}, [])
    assert (facts["tensors"], facts["bytes"]) == (len(tensors), weights.stat().st_size)
    assert facts["parameters"] == sum(t.numel() for t in tensors.values()) == summary["trainable_parameters"]
    assert (facts["template"], facts["stop"]) == ("model", ["<eos>", "<|im_end|>"])
    assert facts["notes"]["data"] == [str(finished.parent / "rows.jsonl")]
    assert json.loads(json.dumps(facts["summary"])) == summary


def test_the_template_and_the_system_text_of_the_training(tmp_path, capsys):
    (tmp_path / "mine.jinja").write_text("{# mine #}\n" + CHATML, "utf-8")
    trained(tmp_path / "run", template=str(tmp_path / "mine.jinja"), system="Be short.\nBe kind.")
    facts = inspect_folder(tmp_path / "run")
    assert (facts["template"], facts["system"]) == ("file", "Be short.\nBe kind.")
    assert facts["chat_template"] == "{# mine #}\n" + CHATML
    assert main(["info", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert f"\n          {{# mine #}}\n          {CHATML.splitlines()[0]}" in shown
    assert "\nsystem    Be short.\n          Be kind.\n" in shown


def test_an_adapter_folder_is_the_same_without_the_run(finished):
    assert inspect_folder(finished / "adapter") == inspect_folder(finished) | {"summary": None}


def test_a_folder_that_peft_made(tmp_path):
    options = {"use_rslora": True, "rank_pattern": {"q_proj": 9}, "alpha_pattern": {"v_proj": 3}, "lora_alpha": 12}
    facts = inspect_folder(peft_folder(tmp_path, target_modules=["q_proj", "v_proj"], **options))
    assert facts | options == facts
    assert facts["r"] == 4
    assert sorted(facts["target_modules"]) == ["q_proj", "v_proj"]
    assert facts["base"] == str(model_folder())
    assert (facts["template"], facts["stop"], facts["notes"], facts["summary"]) == (None, None, None, None)
    json.dumps(facts)


def refused(path: Path) -> str:
    """What is said of it."""
    with pytest.raises(AdapterError) as caught:
        inspect_folder(path)
    assert len(caught.value.problems) == 1
    return str(caught.value)


def test_no_such_folder_and_no_adapter_in_it(tmp_path):
    assert refused(tmp_path / "x") == f"{tmp_path / 'x'}: the folder does not exist."
    assert "not a run or adapter folder" in refused(tmp_path)


def test_a_run_that_is_not_finished(run):
    shutil.rmtree(run / "adapter")
    assert refused(run) == (
        f"{run}: this run has not finished, so it has no adapter yet. Resume it with: lorasmith train "
        f"--output {run} --resume"
    )


def test_an_adapter_without_weights(run):
    weights = run / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert refused(run).startswith(f"{weights}: not a valid safetensors file")
    weights.unlink()
    assert refused(run) == f"{run / 'adapter'} does not contain adapter_model.safetensors."
    (run / "adapter" / "adapter_model.bin").touch()
    assert "is a pickle" in refused(run)


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"peft_type": "IA3"}', "\xff"])
def test_a_malformed_adapter_config(run, text):
    path = run / "adapter" / "adapter_config.json"
    path.write_bytes(text.encode("latin-1"))
    assert refused(run).startswith(f"{path}: ")


@pytest.mark.parametrize(("key", "value"), [("r", "big"), ("rank_pattern", 3), ("modules_to_save", {}), ("r", None)])
def test_an_adapter_config_with_a_wrong_value(run, key, value):
    path = run / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {key: value}), "utf-8")
    assert refused(run).startswith(f"{path}: {key}: ")


def test_a_variant_of_lora_is_named(run):
    path = run / "adapter" / "adapter_config.json"
    assert inspect_folder(run)["variants"] == []
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"use_dora": True}), "utf-8")
    assert inspect_folder(run)["variants"] == ["use_dora"]


def test_an_adapter_that_cannot_be_loaded_here_is_shown(run):
    path = run / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"use_qalora": True}), "utf-8")
    assert inspect_folder(run)["r"] == 8


@pytest.mark.parametrize("text", ["{", "[]", "null", "{}", '{"version": 3}', '{"version": true}', "\xff"])
def test_a_malformed_lorasmith_json(run, text):
    path = run / "adapter" / "lorasmith.json"
    path.write_bytes(text.encode("latin-1"))
    assert refused(run).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("base",), 3),
        (("base", "model"), None),
        (("base", "identity"), []),
        (("template", "version"), True),
        (("template", "stop"), [{"id": "3", "token": None}]),
        (("template", "kind"), "mine"),
        (("template", "stop"), [7]),
        (("template", "golden"), {}),
        (("notes",), "none"),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else "",
)
@pytest.mark.parametrize("is_there", [True, False])
def test_a_lorasmith_json_with_a_wrong_or_missing_key(run, place, value, is_there):
    path = run / "adapter" / "lorasmith.json"
    about = json.loads(path.read_text("utf-8"))
    inner = about[place[0]] if len(place) > 1 else about
    inner.pop(place[-1])
    if is_there:
        inner[place[-1]] = value
    path.write_text(json.dumps(about), "utf-8")
    assert refused(run).startswith(f"{path}: {'.'.join(place)}")


@pytest.mark.parametrize(
    "identity", [{}, {"config": "a", "tensors": "b"}, {"config": "a", "tensors": "b", "tokenizer": 3}]
)
def test_an_identity_that_would_fit_any_base_is_refused(run, identity):
    path = run / "adapter" / "lorasmith.json"
    about = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(about | {"base": about["base"] | {"identity": identity}}), "utf-8")
    with pytest.raises(AdapterError, match=r"lorasmith\.json: base\.identity\.tokenizer: "):
        inspect_folder(run)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", "\xff"])
def test_a_malformed_summary(run, text):
    path = run / "summary.json"
    path.write_bytes(text.encode("latin-1"))
    assert refused(run).startswith((f"{path}: not a valid run summary (", f"{path}: not valid JSON: "))


@pytest.mark.parametrize(("key", "value"), [("loss_after", "low"), ("interval", [1.0]), ("steps", None)])
def test_a_summary_with_a_wrong_value(run, key, value):
    path = run / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {key: value}), "utf-8")
    assert f"({key}: " in refused(run)
