"""adapter_config.json: which options and values are read, and which are refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from lorasmith.adapters.folder import AdapterFolder
from lorasmith.errors import AdapterError
from lorasmith.lora.adapter_config import ADAPTER_CONFIG
from tests.support.llama_adapter import configure, problems


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"arrow_config": {"a": 1}, "use_qalora": True}, "arrow_config, use_qalora"),
        ({"megatron_config": {"tensor_model_parallel_size": 2}}, "megatron_config"),
        ({"some_option_of_2030": {"a": 1}}, "some_option_of_2030"),
    ],
)
def test_an_option_that_is_not_understood_is_refused_by_name(folder: Path, options: dict[str, Any], named: str) -> None:
    configure(folder, **options)
    (problem,) = problems(folder)
    assert problem.endswith(f"unsupported PEFT options: {named}. Ignoring them would change the model's answers.")


@pytest.mark.parametrize(
    "options",
    [
        {"use_bdlora": {"match_strict": True}},
        {"layer_replication": [[0, 2], [1, 3]]},
        {"kasa_config": {"beta": 1e-4}},
        {"monteclora_config": {"a": 1}},
        {"ensure_weight_tying": True, "target_modules": ["embed_tokens"]},
        {"ensure_weight_tying": True, "target_modules": ".*"},
        {"ensure_weight_tying": True, "modules_to_save": ["lm_head"]},
    ],
)
def test_an_option_with_which_peft_can_merge_says_so(folder: Path, options: dict[str, Any]) -> None:
    configure(folder, **options)
    (problem,) = problems(folder)
    key = next(iter(options))
    assert f"unsupported PEFT options: {key}. Ignoring them would change the model's answers. Merge the" in problem
    assert "with PEFT (merge_and_unload), and use the result with --model." in problem


def test_loftq_of_peft_belongs_to_weights_that_peft_replaced(folder: Path) -> None:
    configure(folder, init_lora_weights="loftq")
    (problem,) = problems(folder)
    assert "init_lora_weights is 'loftq', so PEFT replaced the weights of the base model" in problem
    assert "Merge the adapter in the program that trained it (merge_and_unload)" in problem


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({}, "peft_type is null; only LoRA adapters (LORA) can be loaded."),
        (
            {"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": {"rank": 8}},
            "this is an adapter of mlx-lm, which has a format of its own. Convert it with: lorasmith import "
            "FOLDER --output NEW",
        ),
        (
            {"peft_type": "LORA", "task_type": "SEQ_CLS", "target_modules": ["q_proj"], "modules_to_save": ["score"]},
            "task_type is SEQ_CLS, so the adapter belongs to a model that does not generate text. Only adapters of "
            "causal language models (CAUSAL_LM) can be loaded.",
        ),
    ],
)
def test_what_is_no_adapter_of_ours_is_said(tmp_path: Path, content: dict[str, Any], says: str) -> None:
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(content))
    with pytest.raises(AdapterError) as caught:
        AdapterFolder.read(tmp_path)
    assert str(caught.value) == f"{tmp_path / ADAPTER_CONFIG}: {says.replace('FOLDER', str(tmp_path))}"


@pytest.mark.parametrize(
    "options",
    [
        {"use_bdlora": False, "megatron_config": None, "loftq_config": {}, "some_option_of_2030": None},
        {"init_lora_weights": "orthogonal"},
        {"ensure_weight_tying": True},
        {"velora_config": {"num_groups": 2}, "loftq_config": {"loftq_bits": 4}, "corda_config": {"a": 1}},
        {"init_lora_weights": False},
        {"layers_to_transform": 1, "target_modules": "q_proj"},
    ],
)
def test_options_that_change_nothing_are_not_refused(folder: Path, options: dict[str, Any]) -> None:
    configure(folder, **options)
    assert AdapterFolder.read(folder).config.r == 4


def test_a_wrong_value_names_the_file(folder: Path) -> None:
    configure(folder, r="eight")
    (problem,) = problems(folder)
    assert ADAPTER_CONFIG in problem
    assert "r: " in problem


@pytest.mark.parametrize("key", ["r", "lora_alpha", "lora_dropout", "bias"])
def test_null_is_no_value_of_a_number(folder: Path, key: str) -> None:
    configure(folder, **{key: None})
    (problem,) = problems(folder)
    assert f"{ADAPTER_CONFIG}: {key}: " in problem
