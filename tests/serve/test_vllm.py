"""The command for vLLM, and the adapters that vLLM cannot serve."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasmith.cli.main import main
from lorasmith.lora.adapter_config import ADAPTER_CONFIG
from lorasmith.lora.variant import VARIANTS
from lorasmith.report import Report
from lorasmith.serve.discovery import discover
from lorasmith.serve.vllm import vllm_command
from tests.support import tiny


def test_the_command_for_vllm(runs: Path, capsys):
    assert main(["serve", str(runs), "--print-vllm"]) == 0
    base, line = tiny.model_folder(), capsys.readouterr().out.splitlines()[-1]
    flags = f"--served-model-name {base.name} --enable-lora --max-lora-rank 8 --max-loras 2 --lora-modules "
    assert line.startswith(f"vllm serve {base} {flags}")
    assert f"calm={runs}/calm/adapter" in line


def test_vllm_is_told_the_folder_of_a_packaged_base(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "lorasmith" / "models" / "smollm2-135m-instruct"
    shutil.copytree(tiny.model_folder(), folder)
    command, _problems = vllm_command(discover([runs]), "smollm2-135m-instruct", Report())
    assert command.startswith(f"vllm serve {folder} --served-model-name smollm2-135m-instruct --enable-lora ")


def test_vllm_is_told_whole_paths(runs: Path, monkeypatch: pytest.MonkeyPatch):
    base = tiny.model_folder()
    monkeypatch.setenv("HOME", str(base.parent))
    command, _problems = vllm_command(discover([runs]), f"~/{base.name}", Report())
    assert command.startswith(f"vllm serve {base} --served-model-name {base.name} ")


def test_vllm_takes_a_folder_with_a_comma_for_json(runs: Path, tmp_path: Path):
    own = Path(shutil.copytree(runs, tmp_path / "a,b"))
    command, _problems = vllm_command(discover([own]), "org/base", Report())
    _before, _flag, modules = command.partition(" --lora-modules ")
    told = [json.loads(word) for word in shlex.split(modules)]
    assert {"name": "calm", "path": f"{own}/calm/adapter"} in told
    assert command.startswith("vllm serve org/base --served-model-name base ")


def test_vllm_takes_patterns_of_ranks_from_a_version_on(own_runs: Path):
    path = own_runs / "loud" / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rank_pattern": {"q_proj": 20}}))
    command, problems = vllm_command(discover([own_runs]), "base", Report())
    assert "loud=" in command
    assert "--max-lora-rank 32" in command
    assert any(problem.startswith("loud: requires vLLM 0.32 or later") for problem in problems)


def test_vllm_needs_both_weights_of_the_experts(own_runs: Path):
    path = own_runs / "loud" / "adapter" / "adapter_model.safetensors"
    key = "base_model.model.model.layers.0.mlp.experts.{}lora_{}.weight"
    outer = {key.format("", matrix): torch.ones(4, 4) for matrix in "AB"}
    save_file(load_file(path) | outer, path)
    _command, problems = vllm_command(discover([own_runs]), "base", Report())
    assert "vLLM cannot serve loud: it adapts only one of the two weights of the experts" in problems
    both = {key.format("base_layer.", matrix): torch.ones(4, 4) for matrix in "AB"}
    save_file(load_file(path) | both, path)
    command, problems = vllm_command(discover([own_runs]), "base", Report())
    assert "loud=" in command
    assert not [problem for problem in problems if "experts" in problem]


def test_what_vllm_refuses_is_named(own_runs: Path):
    path = own_runs / "loud" / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"modules_to_save": ["lm_head"], "bias": "all"}))
    command, problems = vllm_command(discover([own_runs]), "base", Report())
    assert "loud=" not in command
    assert sum("vLLM cannot serve loud" in problem for problem in problems) == 2


def test_nothing_that_vllm_could_serve(runs: Path, tmp_path: Path, refused):
    for name in ("unfinished", "loud"):
        shutil.copytree(runs / name, tmp_path / "mine" / name)
    config = tmp_path / "mine" / "loud" / "adapter" / ADAPTER_CONFIG
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    unfinished, *refusals = refused(tmp_path / "mine", "--print-vllm")
    assert unfinished.startswith("skipped: mine/unfinished: ")
    assert refusals == ["vLLM cannot serve loud: use_dora is set", "no adapters are left that vLLM can serve."]


def test_vllm_is_given_no_adapter_of_a_changed_base(own_runs: Path):
    path = own_runs / "loud" / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": "pissa"}))
    _command, problems = vllm_command(discover([own_runs]), "base", Report())
    assert [text for text in problems if "init_lora_weights is 'pissa', which belongs to a changed base model" in text]


def test_vllm_is_given_no_variant_of_lora_whatever_comes_into_the_table(own_runs: Path, monkeypatch):
    monkeypatch.setitem(VARIANTS, "use_gain", VARIANTS["use_dora"])
    path = own_runs / "loud" / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_gain": True}))
    command, problems = vllm_command(discover([own_runs]), "base", Report())
    assert "loud=" not in command
    assert "vLLM cannot serve loud: use_gain is set" in problems
