"""Folders of other programs, in the shape in which these write them: who it was, and what is known of the encoding."""

import json
from pathlib import Path
from typing import Any

import pytest

from lorasmith.adapters.other_programs import Recorded, recorded
from lorasmith.errors import AdapterError
from tests.support.foreign_folders import factory_folder, swift_folder
from tests.support.peft_folder import peft_folder

PEFT = {"peft_type": "LORA", "r": 8, "base_model_name_or_path": "org/base"}
AXOLOTL = """---
library_name: peft
tags:
- axolotl
- base_model:adapter:org/base
- lora
- transformers
---
<details><summary>See axolotl config</summary>

axolotl version: `0.16.1`
```yaml
base_model: org/base
chat_template: chatml
default_system_message: Be brief.
datasets:
  - path: rows.jsonl
    type: TYPE
```

</details><br>
"""


def folder(path: Path, config: dict[str, Any] | None = None, **files: str) -> Path:
    """An adapter folder of PEFT's two files and of `files`, whose names have _ for the dot."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(config or PEFT))
    (path / "adapter_model.safetensors").write_bytes(b"")
    for name, text in files.items():
        (path / ".".join(name.rsplit("_", 1))).write_text(text)
    return path


def card(*tags: str) -> str:
    return "---\nbase_model: org/base\ntags:\n" + "".join(f"- {tag}\n" for tag in tags) + "---\n# sft\n"


SWIFT = json.dumps({"model": "org/base", "template": "qwen2_5", "system": "Be kind.", "swift_version": "4.1.0"})


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, ("PEFT", "", "", None)),
        ({"README_md": card("lora", "trl", "sft")}, ("TRL", "README.md", "", None)),
        ({"README_md": card("llama-factory", "lora")}, ("LLaMA-Factory", "README.md", "", None)),
        ({"README_md": card("unsloth", "trl")}, ("Unsloth", "README.md", "", None)),
        ({"README_md": AXOLOTL.replace("TYPE", "chat_template")}, ("Axolotl", "README.md", "chatml", "Be brief.")),
        ({"README_md": AXOLOTL.replace("TYPE", "alpaca")}, ("Axolotl", "README.md", "alpaca", "Be brief.")),
        ({"args_json": SWIFT}, ("ms-swift", "args.json", "qwen2_5", "Be kind.")),
        ({"args_json": '{"template": "chatml", "system": null}'}, ("ms-swift", "args.json", "chatml", None)),
        ({"README_md": card("llama-factory"), "training_args_yaml": "template: qwen\ndefault_system: Be good.\n"},
         ("LLaMA-Factory", "training_args.yaml", "qwen", "Be good.")),
        ({"README_md": "---\ntags: [a\n---\n"}, ("PEFT", "", "", None)),
    ],
)  # fmt: skip
def test_the_program_and_its_template_are_found(files, expected, tmp_path):
    path = folder(tmp_path / "out", **files)
    assert recorded(path) == Recorded(path, *expected)


def test_unsloth_is_known_by_its_classes(tmp_path):
    path = folder(tmp_path, PEFT | {"auto_mapping": {"unsloth_fixed": True}})
    assert recorded(path).program == "Unsloth"


def test_mlx_lm_is_known_by_its_keys(tmp_path):
    path = folder(tmp_path, {"fine_tune_type": "lora", "lora_parameters": {"rank": 8, "scale": 20.0}})
    assert recorded(path) == Recorded(path, "mlx-lm", "adapter_config.json")


def test_the_newest_checkpoint_is_taken(tmp_path):
    for number in (9, 100):
        folder(tmp_path / f"checkpoint-{number}")
    (tmp_path / "checkpoint-200").mkdir()  # begun, but without an adapter
    assert recorded(tmp_path).folder == tmp_path / "checkpoint-100"


def test_folders_without_an_adapter_are_refused_by_name(tmp_path):
    with pytest.raises(AdapterError, match="the folder does not exist"):
        recorded(tmp_path / "none")
    with pytest.raises(AdapterError, match=r"adapter_config\.json is missing"):
        recorded(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(AdapterError, match="this is a whole model, not an adapter"):
        recorded(tmp_path)
    path = folder(tmp_path / "pickled", adapter_model_bin="x")
    (path / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"adapter_model\.bin: weights in pickle format can run code"):
        recorded(path)
    broken = folder(tmp_path / "broken", README_md=AXOLOTL.replace("chatml", "[chatml"))
    with pytest.raises(AdapterError, match=r"README\.md: the configuration in it is not valid YAML"):
        recorded(broken)


def test_ms_swift_on_another_hub_with_a_system_message_in_a_file(tmp_path):
    swift = recorded(swift_folder(tmp_path / "a", model="org/tiny", use_hf=False, system="system.txt"))
    assert (swift.base, swift.system, swift.is_plain) == ("modelscope:org/tiny", None, False)
    assert recorded(swift_folder(tmp_path / "b", model="org/tiny", enable_thinking=True)).thinking is True
    (tmp_path / "b" / "args.json").write_text('{"epochs": 3}')  # of some script
    assert recorded(tmp_path / "b").program == "PEFT"


def test_the_files_of_a_training_may_be_beside_its_checkpoint(tmp_path):
    factory_folder(tmp_path / "out", "template: qwen\ndefault_system: Be kind.\n")
    found = recorded(peft_folder(tmp_path / "out" / "checkpoint-20"))
    assert (found.program, found.template, found.system) == ("LLaMA-Factory", "qwen", "Be kind.")
    assert recorded(peft_folder(tmp_path / "out" / "other")).program == "PEFT"
