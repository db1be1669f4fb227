"""Every option of adapter_config.json that PEFT 0.2 to 0.21.2 wrote, at its default and set.

peft_options.json says since when PEFT has an option, its default, and what comes of other values: "equal" means that
the adapter has PEFT's logits here, "refused" that the message names the option.
"""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from lorasmith.adapters.folder import AdapterFolder
from lorasmith.errors import AdapterError
from lorasmith.lora.adapter_config import ADAPTER_CONFIG, PEFT_DEFAULTS
from tests.support.families import distance, own_logits, tiny, tiny_base
from tests.support.llama_adapter import configure

TABLE = json.loads(Path(__file__).with_name("peft_options.json").read_text("utf-8"))
OPTIONS = {option["key"]: option for option in TABLE["options"]}
CASES = [  # of others, "result" names the file that tests them, because they need another dtype or the engine
    (option["key"], case)
    for option in TABLE["options"]
    for case in option["set"]
    if not case["result"].startswith("see ")
]
NOT_OF_PEFT = {"merge_weights", "enable_lora", "runtime_config", "option_of_a_later_version"}  # not in its file today
# What trains nothing by itself, is computed from data, or does not change what the tensors mean.
ONLY_IN_THE_FILE = NOT_OF_PEFT | {"auto_mapping", "revision", "peft_version", "eva_config", "megatron_core"}
ONLY_IN_THE_FILE |= {"inference_mode"}
pytestmark = [pytest.mark.usefixtures("exact"), pytest.mark.filterwarnings("ignore::UserWarning:peft")]


def number(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def written_by(version: str) -> dict[str, Any]:
    """All options of this version at their defaults."""
    removed = {key for key, at in TABLE["removed"].items() if number(at) <= number(version)}
    return {
        key: option["default"]
        for key, option in OPTIONS.items()
        if number(option["since"]) <= number(version) and key not in removed
    }


def stirred(folder: Path, **options: Any) -> Any:
    """PEFT's model with these options and random weights in the adapter, saved in `folder`."""
    given = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]} | options
    if given.get("init_lora_weights") in ("eva", "mica"):
        given["init_lora_weights"] = True  # they differ in the start alone, which needs data or float32
    theirs = peft.get_peft_model(tiny("llama"), peft.LoraConfig(**given))
    generator = torch.Generator().manual_seed(5)
    for p in theirs.parameters():
        if p.requires_grad:
            p.data += torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.2
    theirs.save_pretrained(folder)
    return theirs.eval()


def ours(folder: Path) -> torch.Tensor:
    """The logits here."""
    base = tiny_base("llama")
    base.model.eval()
    AdapterFolder.read(folder).load_into(base, "default")
    return own_logits(base)


def test_the_table_has_every_option_of_the_installed_version() -> None:
    assert peft.LoraConfig().to_dict().keys() == OPTIONS.keys() - NOT_OF_PEFT
    for key, value in peft.LoraConfig().to_dict().items():
        if key not in ("task_type", "peft_version"):
            assert OPTIONS[key]["default"] == value, key


@pytest.mark.parametrize("version", TABLE["versions"])
def test_a_file_of_each_version_with_all_its_defaults_is_read(version: str, tmp_path: Path) -> None:
    theirs = stirred(tmp_path)
    whole = written_by(version) | {"target_modules": ["q_proj", "v_proj"]}
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(whole))
    assert distance(ours(tmp_path), own_logits(theirs)) < 1e-12


@pytest.mark.parametrize("key", [key for key in OPTIONS if key not in ("peft_type", "target_modules")])
def test_a_file_without_the_option_means_pefts_default(key: str, tmp_path: Path) -> None:
    theirs = stirred(tmp_path)
    whole = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps({k: value for k, value in whole.items() if k != key}))
    assert distance(ours(tmp_path), own_logits(theirs)) < 1e-12
    assert distance(ours(tmp_path), own_logits(peft.PeftModel.from_pretrained(tiny("llama"), tmp_path))) < 1e-12
    assert PEFT_DEFAULTS.get(key, OPTIONS[key]["default"]) == OPTIONS[key]["default"]


@pytest.mark.parametrize("missing", [None, "no key"])
def test_a_file_without_target_modules_means_what_has_tensors(missing: str | None, tmp_path: Path) -> None:
    """PEFT takes its own list for the model then, q_proj and v_proj for llama."""
    theirs = stirred(tmp_path)
    whole = json.loads((tmp_path / ADAPTER_CONFIG).read_text()) | {"target_modules": None}
    if missing:
        del whole["target_modules"]
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(whole))
    assert distance(ours(tmp_path), own_logits(theirs)) < 1e-12
    assert distance(ours(tmp_path), own_logits(peft.PeftModel.from_pretrained(tiny("llama"), tmp_path))) < 1e-12


@pytest.mark.parametrize(("key", "case"), CASES, ids=str)
def test_an_option_that_is_set_has_pefts_effect_or_is_refused_by_name(
    key: str, case: dict[str, Any], tmp_path: Path
) -> None:
    if case["result"] == "refused":
        stirred(tmp_path)
        configure(tmp_path, **{key: case["value"]})
        with pytest.raises(AdapterError, match=key):
            ours(tmp_path)
        return
    options = {key: case["value"]} | case.get("with", {})
    theirs = stirred(tmp_path, **({} if key in ONLY_IN_THE_FILE else options))
    configure(tmp_path, **options)
    assert distance(ours(tmp_path), own_logits(theirs)) < 1e-12
