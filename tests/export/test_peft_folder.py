"""A folder for a hub: PEFT loads it, its card says what was trained, and no file has a path of this machine."""

import ast
import json
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorasmith.adapters.merge import adapter_logits
from lorasmith.adapters.session import open_adapters
from lorasmith.config.model import ModelConfig
from lorasmith.errors import RunError
from lorasmith.export.peft_folder import export_peft
from tests.support.tiny import Watch, model_folder, trained


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("hub") / "run"
    trained(place, max_steps=2, system="Be brief.")
    return place


def test_peft_loads_it_and_its_logits_are_those_of_the_run(run, tmp_path):
    folder = export_peft(run, tmp_path / "mine", base_name="org/base").file
    session = open_adapters([run], ModelConfig(dtype="float32"))
    ids = [3, 7, 11, 250]
    (wanted,) = adapter_logits(session, [ids])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder()), folder)
    with torch.no_grad():
        assert torch.allclose(model(torch.tensor([ids])).logits[0], wanted, atol=1e-5)
    messages = [{"role": "user", "content": "Hi"}]
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    tokenizer.chat_template = (folder / "chat_template.jinja").read_text()
    assert "Be brief." in tokenizer.apply_chat_template(messages, tokenize=False)


def test_no_file_has_a_path_of_this_machine(run, tmp_path):
    folder = export_peft(run, tmp_path / "mine", base_name="org/base").file
    for path in folder.rglob("*"):
        content = path.read_bytes()
        for place in (run.parent, tmp_path, model_folder().parent, Path.home()):
            assert str(place).encode() not in content, path


def test_the_card_says_what_was_trained(run, tmp_path):
    card = (export_peft(run, tmp_path / "mine", base_name="org/base").file / "README.md").read_text()
    summary = json.loads((run / "summary.json").read_text())
    assert card.startswith("---\nbase_model: org/base\nlibrary_name: peft\n")
    assert f"{summary['loss_before']:.4f} before, {summary['loss_after']:.4f} after" in card
    assert '| system message | "Be brief." |' in card
    assert "| steps | 2 |" in card
    (python,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    ast.parse(python)
    assert "vllm serve org/base --enable-lora --max-lora-rank 8 --lora-modules mine=mine" in card


def test_what_the_card_shows_runs(run, tmp_path, monkeypatch, capsys):
    """The Python code as it is; the commands of lorasmith as far as their parsers."""
    card = (export_peft(run, tmp_path / "mine", base_name="org/base").file / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    (python,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(python.replace("org/base", str(model_folder())), {})
    assert capsys.readouterr().out.strip()
    commands = [shlex.split(line, comments=True)[1:] for line in card.splitlines() if line.startswith("lorasmith ")]
    assert [words[0] for words in commands] == ["chat", "export", "export"]
    for verb, *words in commands:
        assert import_module(f"lorasmith.cli.{verb}").parser().read(words)[1] == []


def test_an_adapter_without_its_run_has_a_shorter_card(run, tmp_path):
    watch = Watch()
    folder = export_peft(run / "adapter", tmp_path / "mine", report=watch).file
    card = (folder / "README.md").read_text()
    assert "## Results" not in card
    assert f"base_model: {model_folder().name}\n" in card
    assert any("--base-name ORG/NAME" in text for text in watch.warned)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == model_folder().name


def test_what_exists_is_kept(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "other").write_text("")
    with pytest.raises(RunError, match="already exists"):
        export_peft(run, tmp_path / "mine")
