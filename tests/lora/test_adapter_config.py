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
        ({"use_bdlora": True}, "use_bdlora"),
        ({"lora_bias": True, "use_qalora": True}, "lora_bias, use_qalora"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
        ({"some_option_of_2030": {"a": 1}}, "some_option_of_2030"),
    ],
)
def test_an_option_that_is_not_understood_is_refused_by_name(folder: Path, options: dict[str, Any], named: str) -> None:
    configure(folder, **options)
    (problem,) = problems(folder)
    assert problem.endswith(f"unsupported PEFT options: {named}. Ignoring them would change the model's answers.")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({}, "peft_type is null; only LoRA adapters (LORA) can be loaded."),
        (
            {"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": {"rank": 8}},
            "this is an adapter of mlx-lm, which has a format of its own. Merge it into its base model with "
            "mlx_lm.fuse, and use the result with --model.",
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
    assert str(caught.value) == f"{tmp_path / ADAPTER_CONFIG}: {says}"


@pytest.mark.parametrize(
    "options",
    [
        {"use_bdlora": False, "megatron_config": None, "loftq_config": {}, "some_option_of_2030": None},
        {"init_lora_weights": "orthogonal"},
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
