"""Adapter folders: what is refused, with a text that names it, and the model left as it was."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasmith.adapters.folder import AdapterFolder
from lorasmith.errors import AdapterError
from lorasmith.lora.adapter_config import ADAPTER_CONFIG
from lorasmith.lora.files import ADAPTER_WEIGHTS, save_adapter
from lorasmith.lora.fused.held import held_weights
from lorasmith.lora.saved_values import has_effect
from tests.support.families import adapted, logits_of, tiny, tiny_base

KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound adapter for llama's q_proj."""
    base, adapter = adapted("llama", target_modules="q_proj")
    save_adapter(adapter, base.model, tmp_path / "adapter", "the/base")
    return tmp_path / "adapter"


def problems(folder: Path, family: str = "llama") -> tuple[str, ...]:
    """The messages when the folder is loaded; the model and its router stay as they were."""
    base = tiny_base(family)
    base.router.active = "before"
    with pytest.raises(AdapterError) as caught:
        AdapterFolder.read(folder).load_into(base, "default")
    assert base.router.active == "before"
    base.router.active = None
    assert [n for n, _m in base.model.named_modules()] == [n for n, _m in tiny(family).named_modules()]
    assert torch.equal(logits_of(base), logits_of(tiny(family)))
    return tuple(
        problem.removeprefix(f"{folder}/").removeprefix(f"{ADAPTER_WEIGHTS}: ") for problem in caught.value.problems
    )


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Set tensors of layer 0's q_proj, A= or B=; None takes it out; other names are whole keys."""
    found = load_file(folder / ADAPTER_WEIGHTS)
    for name, value in tensors.items():
        key = KEY.format(name) if name in "AB" else name
        found.pop(key, None)
        if value is not None:
            found[key] = value
    save_file(found, folder / ADAPTER_WEIGHTS)


def configure(folder: Path, **options: Any) -> None:
    path = folder / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


def test_two_files_a_small_one_and_a_readable_one(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == [ADAPTER_CONFIG, ADAPTER_WEIGHTS]
    assert set(load_file(folder / ADAPTER_WEIGHTS)) == {
        KEY.format(m).replace("s.0", f"s.{i}") for m in "AB" for i in (0, 1)
    }
    assert (folder / ADAPTER_CONFIG).read_text().startswith("{\n  ")


def test_no_folder_or_no_adapter_in_it(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"is not an adapter folder: it does not contain adapter_config\.json"):
        AdapterFolder.read(tmp_path)
    (tmp_path / ADAPTER_CONFIG).write_text("{")
    with pytest.raises(AdapterError, match="not valid JSON"):
        AdapterFolder.read(tmp_path)
    for text, why in (
        ('{"peft_type": "IA3"}', 'peft_type is "IA3"; only'),
        ("[]", r"must be a JSON object, found \[\]"),
    ):
        (tmp_path / ADAPTER_CONFIG).write_text(text)
        with pytest.raises(AdapterError, match=why):
            AdapterFolder.read(tmp_path)


def test_missing_keys(folder: Path) -> None:
    change(folder, B=None)
    assert problems(folder) == (
        f"missing {KEY.format('B')}: the adapter belongs to another base model, or the file is incomplete.",
    )
    change(folder, A=None)
    assert problems(folder) == (
        (
            f"missing {KEY.format('A')} and 1 more keys: the adapter belongs to another base model, or the file "
            "is incomplete."
        ),
    )


def test_unknown_keys_and_wrong_shapes_come_together(folder: Path) -> None:
    change(folder, A=torch.zeros(4, 33, dtype=torch.float64), other=torch.zeros(1))
    assert problems(folder) == (
        "unexpected other: this base model has no such modules.",
        f"{KEY.format('A')} has the shape (4, 33), but this base model needs (4, 32).",
    )


def test_an_adapter_of_another_family(folder: Path) -> None:
    with pytest.raises(Exception, match="'q_proj' matches no module; this model has wte"):
        AdapterFolder.read(folder).load_into(tiny_base("gpt2"), "default")
    found = problems(folder, "opt")
    assert len(found) == 2
    assert found[0].startswith("missing base_model.model.model.decoder.layers.0")
    assert found[1].startswith("unexpected base_model.model.model.layers.0")


def test_an_adapter_without_effect(folder: Path) -> None:
    for key in (KEY.format("B"), KEY.format("B").replace("s.0", "s.1")):
        change(folder, **{key: torch.zeros(32, 4, dtype=torch.float64)})
    assert problems(folder) == (
        "all B matrices are zero, so the adapter changes nothing: this file contains no trained weights.",
    )


def test_an_adapter_that_holds_no_numbers(folder: Path) -> None:
    change(folder, **{KEY.format("B"): torch.full((32, 4), torch.nan, dtype=torch.float64)})
    (problem,) = problems(folder)
    assert problem == f"{KEY.format('B')} contains NaN or infinity: the training diverged, or the file is damaged."


def test_a_pickle_is_not_read(folder: Path) -> None:
    (folder / ADAPTER_WEIGHTS).rename(folder / "adapter_model.bin")
    (problem,) = problems(folder)
    assert "adapter_model.bin is a pickle file, which can run code when it is loaded" in problem
    (folder / "adapter_model.bin").unlink()
    (problem,) = problems(folder)
    assert problem.endswith(f"{folder} does not contain {ADAPTER_WEIGHTS}.")


def test_a_broken_file(folder: Path) -> None:
    data = (folder / ADAPTER_WEIGHTS).read_bytes()
    (folder / ADAPTER_WEIGHTS).write_bytes(data[: len(data) // 2])
    (problem,) = problems(folder)
    assert "not a valid safetensors file" in problem


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


def test_an_adapter_of_tensors_is_refused_by_their_names(folder: Path) -> None:
    configure(folder, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    (problem,) = problems(folder)
    assert "target_parameters adapts mlp.experts.gate_up_proj, mlp.experts.down_proj, which are not linear" in problem
    configure(folder, target_parameters=3)
    assert "target_parameters adapts 3, which" in problems(folder)[0]
    configure(folder, target_parameters=[])
    assert AdapterFolder.read(folder).config.r == 4


def test_an_adapter_with_a_pair_for_each_expert_is_refused_by_name(folder: Path) -> None:
    keys = [f"base_model.model.model.layers.0.mlp.experts.{i}.w1.lora_{m}.weight" for i in (0, 1) for m in "AB"]
    change(folder, **{key: torch.ones(4, 4) for key in keys})
    configure(folder, target_modules=["q_proj", "w1"])
    (problem,) = problems(folder)
    assert problem.startswith("the adapter has LoRA on each expert by itself (model.layers.0.mlp.experts.0.w1), but")
    base = tiny_base("llama")
    one = AdapterFolder.read(folder)
    with pytest.raises(AdapterError, match="on each expert by itself"):
        held_weights(base.model, one.config, one.tensors, folder, frozenset({"model.layers.0.self_attn.q_proj"}), "")


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


def test_a_base_with_another_embedding_is_refused(tmp_path: Path) -> None:
    base, adapter = adapted("llama", target_modules=("embed_tokens",))
    save_adapter(adapter, base.model, tmp_path, "")
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    own = tiny("llama").model.embed_tokens.weight
    change(tmp_path, **{key: own.detach().bfloat16()})
    again = tiny_base("llama")
    AdapterFolder.read(tmp_path).load_into(again, "default")  # its own embedding, rounded: PEFT saves it
    assert torch.equal(logits_of(again), logits_of(base))
    for other in (own + 1, torch.cat([own, own[:2]])):
        change(tmp_path, **{key: other.detach()})
        assert problems(tmp_path) == (
            f"{key} differs from that of this base model: the adapter belongs to another one.",
        )


def test_several_folders_on_one_base(folder: Path, tmp_path: Path) -> None:
    other, adapter = adapted("llama", modules_to_save=("lm_head",), r=2)
    save_adapter(adapter, other.model, tmp_path / "other", "")
    base = tiny_base("llama")
    AdapterFolder.read(folder).load_into(base, "one")
    AdapterFolder.read(tmp_path / "other").load_into(base, "two")
    assert base.router.active == "two"
    assert torch.equal(logits_of(base), logits_of(other))
    base.router.active = "one"
    assert not torch.allclose(logits_of(base), logits_of(other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtypes_of_the_file_are_taken_into_the_masters(folder: Path, dtype: torch.dtype) -> None:
    save_file({key: t.to(dtype) for key, t in load_file(folder / ADAPTER_WEIGHTS).items()}, folder / ADAPTER_WEIGHTS)
    base = tiny_base("llama", torch.bfloat16)
    AdapterFolder.read(folder).load_into(base, "default")
    adapter = base.adapters["default"]
    assert {p.dtype for p in adapter.parameters.values()} == {torch.float32}
    assert torch.equal(
        adapter.parameters[KEY.format("A")], load_file(folder / ADAPTER_WEIGHTS)[KEY.format("A")].float()
    )


@pytest.mark.parametrize("dtype", [torch.bool, torch.float8_e4m3fn])
def test_weights_of_odd_kinds_are_looked_at_too(dtype):
    assert has_effect({"q.lora_A.weight": torch.ones(2, 2).to(dtype), "q.lora_B.weight": torch.ones(2, 2).to(dtype)})


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.uint8])
def test_matrices_that_are_no_real_numbers_are_refused_by_name(folder: Path, dtype: torch.dtype) -> None:
    change(folder, A=torch.ones(4, 32).to(dtype), B=torch.ones(32, 4).to(dtype))
    name = str(dtype).removeprefix("torch.")
    assert problems(folder) == (
        f"{KEY.format('A')} contains {name}; "
        "an adapter's matrices must contain floating-point numbers, such as float32.",
    )


@pytest.mark.parametrize("key", ["r", "lora_alpha", "lora_dropout", "bias"])
def test_null_is_no_value_of_a_number(folder: Path, key: str) -> None:
    configure(folder, **{key: None})
    (problem,) = problems(folder)
    assert f"{ADAPTER_CONFIG}: {key}: " in problem
