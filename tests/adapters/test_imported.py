"""Import: the adapter of another program is the same adapter here, encoded as that program's folder says."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorasmith.adapters import imported as importing
from lorasmith.adapters.imported import import_adapter
from lorasmith.adapters.merge import adapter_logits, certify
from lorasmith.adapters.session import open_adapters
from lorasmith.config.data import DataConfig
from lorasmith.config.model import ModelConfig
from lorasmith.data.rows.conversation import Message
from lorasmith.errors import AdapterError, RunError
from lorasmith.export.mlx import export_mlx
from tests.adapters.test_foreign import CASES
from tests.adapters.test_other_programs import AXOLOTL, card
from tests.support.exported import adapter_of, folder_of
from tests.support.families import distance, logits_of
from tests.support.foreign_folders import factory_folder, swift_folder
from tests.support.peft_folder import foreign
from tests.support.tiny import model_folder, tokenizer

IDS = [3, 7, 11, 250, 8, 9]
OWN = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """An adapter in PEFT's two files."""
    path = adapter_of(folder_of("llama", tmp_path / "base"), tmp_path / "theirs", use_rslora=True)
    return without_ours(path)


def without_ours(path: Path) -> Path:
    for name in ("lorasmith.json", ".lorasmith"):
        (path / name).unlink(missing_ok=True)
    return path


def logits(path: Path) -> torch.Tensor:
    return adapter_logits(open_adapters([path], ModelConfig(dtype="float32")), [IDS])[0]


def metadata(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "lorasmith.json").read_text())
    return found


def test_the_logits_are_those_of_peft(theirs, tmp_path):
    found = import_adapter(theirs, tmp_path / "ours")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), theirs)
    wanted = model(input_ids=torch.tensor([IDS])).logits[0]
    assert torch.allclose(logits(tmp_path / "ours"), wanted, atol=1e-5)
    assert (found.program, found.error, found.base) == ("PEFT", 0.0, str(tmp_path / "base"))
    assert metadata(tmp_path / "ours")["notes"] == {"imported": {"program": "PEFT", "template": ""}}


def test_from_lorasmith_to_mlx_lm_and_back(tmp_path):
    own = adapter_of(folder_of("llama", tmp_path / "base"), tmp_path / "own", rank_pattern={"q_proj": 2})
    export_mlx(own, tmp_path / "mlx")
    found = import_adapter(tmp_path / "mlx", tmp_path / "back", model=ModelConfig(model=str(tmp_path / "base")))
    assert (found.program, found.template_from, found.system_from) == ("mlx-lm", "the base model's own", "")
    assert torch.allclose(logits(tmp_path / "back"), logits(own), atol=1e-5)
    export_mlx(tmp_path / "back", tmp_path / "again")
    first, second = ((tmp_path / name / "adapters.safetensors").read_bytes() for name in ("mlx", "again"))
    assert first == second


def test_template_and_system_text_of_the_folder(theirs, tmp_path):
    (theirs / "chat_template.jinja").write_text(OWN)
    (theirs / "args.json").write_text(json.dumps({"template": "qwen2_5", "system": "Be kind."}))
    found = import_adapter(theirs, tmp_path / "ours")
    assert (found.program, found.template_from) == ("ms-swift", "chat_template.jinja in the folder")
    assert (found.system, found.system_from) == ("Be kind.", "args.json in the folder")
    template = metadata(tmp_path / "ours")["template"]
    assert (template["chat_template"], template["system"]) == (OWN, "Be kind.")


def test_a_named_template_that_means_the_same_here(theirs, tmp_path):
    (theirs / "README.md").write_text(AXOLOTL.replace("TYPE", "chat_template"))
    found = import_adapter(theirs, tmp_path / "ours")
    assert (found.program, found.template, found.template_from) == ("Axolotl", "chatml", "README.md in the folder")
    asked = import_adapter(theirs, tmp_path / "other", DataConfig(template="alpaca", system=""))
    assert (asked.template, asked.template_from, asked.system) == ("alpaca", "as requested", "")


def test_a_template_that_is_not_known_is_asked_for(theirs, tmp_path):
    base = tmp_path / "base"
    (base / "chat_template.jinja").unlink(missing_ok=True)
    plain = copy.deepcopy(tokenizer("llama"))
    plain.chat_template = None
    plain.save_pretrained(base)
    (theirs / "args.json").write_text('{"template": "qwen2_5"}')
    with pytest.raises(AdapterError, match=r"not in it \(ms-swift qwen2_5\), and the base model has none"):
        import_adapter(theirs, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    assert import_adapter(theirs, tmp_path / "ours", DataConfig(template="chatml")).template == "chatml"


@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::peft.utils.warning.PeftWarning")
@pytest.mark.parametrize("case", ["copies", "resized", "rows"])
def test_tokens_that_the_training_added(case, tmp_path):
    """As LLaMA-Factory and Unsloth save them: beside a tokenizer, with embedding and head in full or by rows."""
    theirs = foreign(tmp_path / "theirs", "llama", **CASES[case])
    (tmp_path / "theirs" / "README.md").write_text(card("llama-factory"))
    found = import_adapter(tmp_path / "theirs", tmp_path / "ours", model=ModelConfig(model=str(model_folder("llama"))))
    assert found.program == "LLaMA-Factory"
    assert found.error < 1e-4
    assert [one["id"] for one in metadata(tmp_path / "ours")["tokens"]] == [300, 301]
    ids = torch.tensor([[5, 17, 301, 3, 8, 300, 92, 31]])
    base = open_adapters([tmp_path / "ours"], ModelConfig(dtype="float32")).base
    assert distance(logits_of(base, ids), logits_of(theirs, ids)) < 1e-4


def test_what_is_ours_and_what_is_in_the_way(theirs, tmp_path):
    import_adapter(theirs, tmp_path / "ours")
    with pytest.raises(AdapterError, match="lorasmith wrote this adapter"):
        import_adapter(tmp_path / "ours", tmp_path / "again")
    with pytest.raises(RunError, match="already exists"):
        import_adapter(theirs, tmp_path / "ours")
    import_adapter(theirs, tmp_path / "ours", overwrite=True)
    with pytest.raises(RunError, match="was not written by lorasmith"):
        import_adapter(theirs, theirs, overwrite=True)


def test_another_base_is_refused(theirs, tmp_path):
    other = folder_of("llama", tmp_path / "other", hidden_size=32, head_dim=8)
    with pytest.raises(AdapterError):
        import_adapter(theirs, tmp_path / "ours", model=ModelConfig(model=str(other)))
    assert not (tmp_path / "ours").exists()


def test_an_import_that_changes_the_adapter_is_not_written(theirs, tmp_path, monkeypatch):
    monkeypatch.setattr(importing, "certify", lambda *given, **more: replace(certify(*given, **more), error=0.1))
    with pytest.raises(AdapterError, match="read again, the imported adapter differs from the one of PEFT"):
        import_adapter(theirs, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_the_newest_checkpoint_of_a_training(theirs, tmp_path):
    shutil.copytree(theirs, tmp_path / "out" / "checkpoint-20")
    assert import_adapter(tmp_path / "out", tmp_path / "ours").source == str(tmp_path / "out" / "checkpoint-20")


def test_the_tensors_stay_as_they_are(theirs, tmp_path):
    import_adapter(theirs, tmp_path / "ours")
    before, after = (load_file(path / "adapter_model.safetensors") for path in (theirs, tmp_path / "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_another_end_of_text_than_that_of_the_base_is_kept(tmp_path):
    folder = factory_folder(tmp_path / "theirs")
    words = AutoTokenizer.from_pretrained(folder)
    assert words.eos_token != "<|im_end|>"
    words.eos_token = "<|im_end|>"
    words.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    words.save_pretrained(folder)
    import_adapter(folder, tmp_path / "ours")
    text = open_adapters([tmp_path / "ours"]).template.render([Message("user", "Hello")])
    assert text.startswith("user: Hello<|im_end|>")


def test_a_program_with_templates_of_its_own_may_have_had_another(tmp_path):
    swift = swift_folder(tmp_path / "swift")
    assert import_adapter(swift, tmp_path / "a").unlike == "llama3_2"
    assert import_adapter(swift, tmp_path / "b", DataConfig(template="chatml")).unlike == ""
    assert import_adapter(factory_folder(tmp_path / "factory", "template: qwen\n"), tmp_path / "c").unlike == "qwen"
    with pytest.raises(AdapterError, match=r"args\.json: the adapter was trained without a chat template"):
        import_adapter(swift_folder(tmp_path / "plain", use_chat_template=False), tmp_path / "d")


def test_a_path_of_another_machine_gives_way_to_a_name(tmp_path):
    folder = swift_folder(tmp_path / "theirs")
    values = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(values | {"base_model_name_or_path": "/of/another/machine"}))
    assert import_adapter(folder, tmp_path / "ours").base == str(model_folder())


def test_thinking_is_a_variable_of_templates_that_have_it(tmp_path):
    folder = swift_folder(tmp_path / "theirs", enable_thinking=False)
    text = OWN + "{{ eos_token }}{{ enable_thinking is defined and not enable_thinking }}"
    (folder / "chat_template.jinja").write_text(text)
    import_adapter(folder, tmp_path / "ours")
    assert metadata(tmp_path / "ours")["template"]["kwargs"] == {"enable_thinking": False}
