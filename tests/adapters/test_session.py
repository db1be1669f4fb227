"""Adapters opened on their base model: names, templates, and the dtype of the base model."""

import shutil
from pathlib import Path

import pytest
import torch

from lorasmith.adapters.folder import AdapterFolder
from lorasmith.adapters.merge import merge_run
from lorasmith.adapters.session import Session, base_settings, open_adapters
from lorasmith.config.model import ModelConfig
from lorasmith.config.toml import load_config
from lorasmith.data.rows.conversation import Message
from lorasmith.errors import AdapterError, ConfigError, RunError
from lorasmith.report import Report
from lorasmith.runs.evaluate import evaluate
from lorasmith.training.run_files import RUN_CONFIG
from tests.support.peft_folder import peft_folder
from tests.support.tiny import Watch, model_folder, trained

JINJA = (
    "{% for m in messages %}<|im_start|>{{ m.role | upper }}: {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>ASSISTANT: {% endif %}"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("session") / "run"
    trained(run)
    return run


@pytest.fixture(scope="module")
def session(run: Path) -> Session:
    return open_adapters([run, run / "adapter"])


def test_adapters_of_one_name_get_numbers(session):
    assert session.names == ["run", "run-2"]
    assert session.base.router.active == "run"
    assert not session.base.model.training
    assert all(folder.tensors == {} for folder in session.folders.values()), "their memory is the model's"


@pytest.mark.parametrize("name", ["train", "training", "update", "half", "T_destination", "lora_A"])
def test_a_run_may_have_any_name(run, session, name, tmp_path):
    folder = Path(shutil.copytree(run, tmp_path / name))
    opened = open_adapters([folder])
    assert opened.names == [name]
    asked = {"prompt": "Why?", "max_new_tokens": 4}
    assert opened.generate(**asked) == opened.generate(**asked, adapter=name) == session.generate(**asked)
    assert evaluate([folder]).adapters[0].loss.after == evaluate([run]).adapters[0].loss.after
    assert merge_run(folder, tmp_path / "merged").holds


def test_one_prompt_or_several(session):
    one = session.generate("Why?", max_new_tokens=4)
    assert isinstance(one, str)
    assert session.generate(["Why?", "Who are you?"], max_new_tokens=4)[0] == one
    assert session.generate("Why?", "run-2", max_new_tokens=4) == one
    assert isinstance(session.generate("Why?", None, max_new_tokens=4), str)


def test_an_unknown_option_is_refused(session):
    with pytest.raises(ConfigError, match=r"^sampling\.tokens: unknown key\."):
        session.generate("Why?", tokens=4)


def test_different_templates_are_refused(run, tmp_path):
    trained(tmp_path / "other", system="Be kind.")
    with pytest.raises(AdapterError, match=r"^run and other were trained with different templates"):
        open_adapters([run, tmp_path / "other"])


def test_an_adapter_of_another_tool_uses_the_models_template(tmp_path):
    watch = Watch()
    open_adapters(
        [peft_folder(tmp_path / "theirs", target_modules=["q_proj"])], ModelConfig(model=str(model_folder())), watch
    )
    assert [text for text in watch.warned if "made by another tool" in text]


@pytest.mark.parametrize(
    ("trained_in", "given", "fast_here", "wanted"),
    [
        ("float32", {}, torch.bfloat16, "float32"),
        ("bfloat16", {}, torch.bfloat16, "bfloat16"),
        ("bfloat16", {}, torch.float32, "auto"),
        ("bfloat16", {"dtype": "float64"}, torch.float32, "float64"),
    ],
)
def test_the_base_has_the_dtype_of_the_training_unless_that_is_slow_here(
    run, monkeypatch, trained_in, given, fast_here, wanted
):
    monkeypatch.setattr("lorasmith.adapters.session.choose_dtype", lambda *_args, **_more: (fast_here, "in this test"))
    folder = AdapterFolder.read_header(run / "adapter")
    assert folder.metadata is not None
    folder.metadata["notes"]["dtype"] = trained_in
    settings = base_settings(folder, ModelConfig(**given), Report())
    assert (settings.model, settings.dtype) == (str(model_folder()), wanted)


def test_without_an_adapter_the_options_alone_count():
    assert base_settings(None, ModelConfig(model="x"), Report()) == ModelConfig(model="x")


def test_a_template_file_and_a_system_text_are_needed_for_training_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "chat.jinja"
    file.write_text(JINJA, "utf-8")
    summary = trained(tmp_path / "run", template="./chat.jinja", system="Be kind.", learn="last-answer")
    config = load_config(tmp_path / "run" / RUN_CONFIG, {}).data
    assert (config.template, config.system, config.learn) == (str(file), "Be kind.", "last-answer")
    assert trained(tmp_path / "run", resume=True, template="./chat.jinja", system="Be kind.", learn="last-answer")
    with pytest.raises(RunError, match=r"data\.system: was 'Be kind\.', now 'Be brief\.'"):
        trained(tmp_path / "run", resume=True, system="Be brief.")
    file.unlink()
    session = open_adapters([tmp_path / "run"])
    prompt = session.base.tokenizer.decode(session.template.encode_prompt([Message("user", "Why?")]))
    assert prompt == "<|im_start|>SYSTEM: Be kind.<|im_end|><|im_start|>USER: Why?<|im_end|><|im_start|>ASSISTANT:"
    loss = evaluate([tmp_path / "run"]).adapters[0].loss
    assert (loss.before, loss.after) == pytest.approx((summary.loss_before, summary.loss_after), rel=1e-6)
