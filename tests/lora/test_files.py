"""Adapter folders: what is refused, with a text that names it, and the model left as it was."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasmith.adapters.folder import AdapterFolder
from lorasmith.errors import AdapterError
from lorasmith.lora.adapter_config import ADAPTER_CONFIG
from lorasmith.lora.files import ADAPTER_WEIGHTS, conversion_of, mismatches, save_adapter
from lorasmith.lora.fused.held import held_weights
from lorasmith.lora.saved_values import has_effect
from tests.support.families import adapted, logits_of, tiny, tiny_base
from tests.support.llama_adapter import KEY, change, configure, problems


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
    lacks = "the adapter belongs to another base model, or the file is incomplete. It lacks "
    change(folder, B=None)
    assert problems(folder) == (lacks + KEY.format("B"),)
    change(folder, A=None)
    assert problems(folder) == (f"{lacks}2 tensors:\n  {KEY.format('A')}\n  {KEY.format('B')}",)


def test_unknown_keys_and_wrong_shapes_come_together(folder: Path) -> None:
    change(folder, A=torch.zeros(4, 33, dtype=torch.float64), other=torch.zeros(1))
    assert problems(folder) == (
        "this base model has no modules for other",
        f"the shape is (4, 33), but this base model needs (4, 32) for {KEY.format('A')}",
    )


def test_all_mismatches_are_listed_by_kind_with_the_layers_as_ranges() -> None:
    key = "base_model.model.model.layers.{}.mlp.experts.{}.{}.lora_A.weight"
    all_keys = {
        key.format(i, j, name): torch.zeros(2, 3) for i in range(12) for j in (0, 1, 5) for name in ("w1", "w2")
    }
    wanted = dict.fromkeys(all_keys, torch.zeros(2, 4)) | {key.format(12, 0, "w1"): torch.zeros(2, 4)}
    found = all_keys | {key.format(10, 0, "w2"): torch.zeros(4, 2), "lm_head.bias": torch.zeros(2)}
    rest = [key.format("0-11", "0-1, 5", "w1"), key.format("0-9, 11", "0-1, 5", "w2"), key.format(10, "1, 5", "w2")]
    assert mismatches(wanted, found) == [
        "the adapter belongs to another base model, or the file is incomplete. It lacks " + key.format(12, 0, "w1"),
        "this base model has no modules for lm_head.bias",
        "the shape is (2, 3), but this base model needs (2, 4) for 71 tensors:\n  " + "\n  ".join(rest),
        "the shape is (4, 2), but this base model needs (2, 4) for " + key.format(10, 0, "w2"),
    ]


def test_an_adapter_of_another_family(folder: Path) -> None:
    with pytest.raises(Exception, match="'q_proj' matches no module; this model has wte"):
        AdapterFolder.read(folder).load_into(tiny_base("gpt2"), "default")
    missing, unknown = problems(folder, "opt")
    where = "{}.layers.0-1.self_attn.q_proj.lora_{}.weight"
    for problem, prefix in ((missing, "base_model.model.model.decoder"), (unknown, "base_model.model.model")):
        assert problem.endswith(" 4 tensors:\n  " + "\n  ".join(where.format(prefix, m) for m in "AB"))


def test_an_adapter_without_effect(folder: Path) -> None:
    for key in (KEY.format("B"), KEY.format("B").replace("s.0", "s.1")):
        change(folder, **{key: torch.zeros(32, 4, dtype=torch.float64)})
    assert problems(folder) == (
        "all B matrices are zero, so the adapter changes nothing: this file contains no trained weights.",
    )


def test_an_adapter_that_holds_no_numbers(folder: Path) -> None:
    change(folder, **{KEY.format("B"): torch.full((32, 4), torch.nan, dtype=torch.float64)})
    (problem,) = problems(folder)
    assert problem == f"the training diverged, or the file is damaged: NaN or infinity in {KEY.format('B')}"


def test_a_pickle_is_not_read(folder: Path) -> None:
    (folder / ADAPTER_WEIGHTS).rename(folder / "adapter_model.bin")
    (problem,) = problems(folder)
    assert "adapter_model.bin is a pickle file, which can run code when it is loaded. Convert it with:\n" in problem
    assert problem.splitlines()[1:] == [conversion_of(folder)]
    (folder / "adapter_model.bin").unlink()
    (problem,) = problems(folder)
    assert problem.endswith(f"{folder} does not contain {ADAPTER_WEIGHTS}.")


def test_the_command_that_converts_a_pickle_runs_as_it_is_printed(tmp_path: Path) -> None:
    """PEFT wrote adapter_model.bin up to 0.6; the tensors may share memory, as those of tied copies do."""
    theirs = peft.get_peft_model(
        tiny("qwen2"), peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"])
    )
    for p in theirs.parameters():
        if p.requires_grad:
            p.data += 0.1
    folder = tmp_path / "it's my adapter"
    theirs.save_pretrained(folder, safe_serialization=False)
    with pytest.raises(AdapterError) as caught:
        AdapterFolder.read(folder)
    command = str(caught.value).splitlines()[-1]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(command, shell=True, check=True, env=environment)
    base = tiny_base("qwen2")
    AdapterFolder.read(folder).load_into(base, "default")
    assert torch.allclose(logits_of(base), logits_of(theirs.eval()), rtol=0, atol=1e-6)


def test_the_command_that_converts_a_pickle_runs_no_code_of_it(tmp_path: Path) -> None:
    torch.save({"x": Malicious(tmp_path / "was here")}, tmp_path / "adapter_model.bin")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    ran = subprocess.run(conversion_of(tmp_path), shell=True, check=False, capture_output=True, env=environment)
    assert ran.returncode
    assert b"Weights only load failed" in ran.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_model.bin"]


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.path,)


def test_a_broken_file(folder: Path) -> None:
    data = (folder / ADAPTER_WEIGHTS).read_bytes()
    (folder / ADAPTER_WEIGHTS).write_bytes(data[: len(data) // 2])
    (problem,) = problems(folder)
    assert "not a valid safetensors file" in problem


def test_parameters_that_this_base_lacks_are_refused_by_their_names(folder: Path) -> None:
    configure(folder, target_parameters=["mlp.experts.gate_up_proj"])
    (problem,) = problems(folder)
    assert problem == (
        "adapter_config.json: lora.target_parameters: 'mlp.experts.gate_up_proj' matches no parameter of this model. "
        "It has no experts; use lora.target_modules to adapt its layers."
    )
    configure(folder, target_parameters=3)
    with pytest.raises(AdapterError, match="target_parameters: invalid value 3: must be a list"):
        _config = AdapterFolder.read(folder).config
    configure(folder, target_parameters=[])
    assert AdapterFolder.read(folder).config.target_parameters == ()


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
        f"an adapter's matrices must contain floating-point numbers, such as float32, but {name} is in 2 tensors:\n"
        f"  {KEY.format('A')}\n  {KEY.format('B')}",
    )
