"""What the server loads when it starts, what it leaves out with which reason, and the size of the KV cache."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasmith.config.model import ModelConfig
from lorasmith.config.serving import ServeConfig
from lorasmith.engine import kv_cache
from lorasmith.loading.load import load_base
from lorasmith.lora.files import ADAPTER_WEIGHTS
from lorasmith.report import Report
from lorasmith.serve import startup
from lorasmith.serve.discovery import discover
from lorasmith.serve.startup import cache_tokens, open_manager
from lorasmith.system import memory
from tests.support import tiny
from tests.support.peft_folder import SHOUTED, foreign


def test_nothing_to_serve(runs: Path, tmp_path: Path, refused):
    shutil.copytree(runs / "unfinished", tmp_path / "mine" / "unfinished")
    unfinished, why = refused(tmp_path / "mine", "--port", "0")
    assert unfinished.startswith("mine/unfinished: this run has not finished")
    assert why.endswith(
        ": no adapter can be served, and no base model is given. Train an adapter with lorasmith train, give the "
        "folder that holds your runs, or give a base model with --model."
    )


def test_the_extra_is_named(runs: Path, monkeypatch: pytest.MonkeyPatch, refused):
    monkeypatch.delitem(sys.modules, "lorasmith.serve.app")
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert refused(runs) == ["lorasmith serve requires fastapi. Install it with: pip install 'lorasmith[serve]'"]


def test_adapters_that_break_the_answers_or_have_the_name_of_the_base_are_left_out(runs: Path, tmp_path: Path):
    base = tiny.model_folder()
    for name in ("torn", base.name, "loud"):
        shutil.copytree(runs / "loud", tmp_path / name)
    file = tmp_path / "torn" / "adapter" / ADAPTER_WEIGHTS
    save_file({key: weight * 1e30 for key, weight in load_file(file).items()}, file)
    model = ModelConfig(model=str(base), dtype="float32", device="cpu")
    discovery = discover([tmp_path])
    manager = open_manager(discovery, model, ServeConfig(), None, Report())
    assert manager.registry.names() == [base.name, "loud"]
    held = manager.registry.base.fast_decoder.held
    assert [name.partition("@")[0] for name in held] == ["loud"]  # and none of the others is loaded
    assert sorted(text.replace(f"{tmp_path}/", "") for text in discovery.problems) == [
        f"{base.name!r} is the name of the base model. Choose another name for the adapter.",
        "torn/adapter: the adapter has no effect on the model's output, or makes it NaN or infinite.",
    ]


def test_which_template_an_adapter_of_another_tool_is_served_with_is_said(tmp_path: Path):
    for name in ("own", "none", "more"):
        foreign(tmp_path / name, "llama", added=("<|a|>",) if name == "more" else (), modules_to_save=["lm_head"])
    for file in (*(tmp_path / "none").glob("tokenizer*"), tmp_path / "none" / "chat_template.jinja"):
        file.unlink()
    (tmp_path / "own" / "chat_template.jinja").write_text(SHOUTED)
    model, watch = ModelConfig(model=str(tiny.model_folder()), dtype="float32", device="cpu"), tiny.Watch()
    discovery = discover([tmp_path])
    versions = open_manager(discovery, model, ServeConfig(), None, watch).registry.versions
    assert list(versions)[1:] == ["none", "own"]
    assert (versions["own"].template.text, versions["none"].template.text) == (SHOUTED, tiny.CHATML)
    used = "the tokenizer and chat template in its folder are used."
    assert [text for text in watch.said if "another tool" in text] == [
        f"{tmp_path / 'own'}: the adapter was made by another tool; {used}"
    ]
    assert [text.partition(":")[0] for text in watch.warned] == [str(tmp_path / "none")]
    (problem,) = discovery.problems
    assert problem.startswith(f"{tmp_path / 'more'}: the adapter adds tokens (1) to the vocabulary of ")


def test_the_cache_is_a_quarter_of_what_is_free_where_the_base_is(monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base(ModelConfig(model=str(tiny.model_folder()), dtype="float32", device="cpu"))
    asked: list[torch.device] = []
    monkeypatch.setattr(startup, "available_mib", lambda device: asked.append(device) or 64.0)
    per_token = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, their size, bytes
    assert cache_tokens(base) == 64 * 2**20 // 4 // per_token
    assert asked == [base.device]


def test_memory_is_the_least_of_all_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base(ModelConfig(model=str(tiny.model_folder()), dtype="float32", device="cpu"))
    monkeypatch.setattr(memory, "_groups_mib", lambda: 0.0)
    assert cache_tokens(base) == kv_cache.FIRST_CAPACITY
