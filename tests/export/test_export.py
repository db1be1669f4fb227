"""Export to GGUF, of tiny models of every family: the file is the trained model, or it does not get its name."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from lorasmith.adapters.folder import write_adapter
from lorasmith.adapters.merge import load_plain
from lorasmith.config.lora import LoraConfig
from lorasmith.config.model import ModelConfig
from lorasmith.data.template.encoding import Template
from lorasmith.errors import AdapterError, ModelError, RunError
from lorasmith.export import check, gguf_file
from lorasmith.export import export as exporting
from lorasmith.export import readers as readers_of_files
from lorasmith.export.export import certificate_of, export_gguf, verify_gguf
from lorasmith.export.families import FAMILIES, Value, keys_of
from lorasmith.export.gguf_file import Encoding, tensors_of
from lorasmith.export.readers import Transformers, has_llama_cpp
from lorasmith.loading.gguf_settings import LLAMA3
from lorasmith.loading.load import load_base
from lorasmith.lora.inject import inject
from tests.support.families import CONFIGS, stir
from tests.support.model_folders import ENDS, make_folder
from tests.support.tiny_gguf import write_tiny_gguf

GELU = ("gemma3_text", "gpt2")  # llama.cpp takes it from a table in half precision
SIX = ["sliding_attention"] * 5 + ["full_attention"]
WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "max_position_embeddings": 128}
OWN: dict[str, dict[str, Any]] = {
    "llama": CONFIGS["llama"] | {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}},
    "gemma3_text": CONFIGS["gemma3_text"]
    | {"layer_types": SIX, "num_hidden_layers": 6, "query_pre_attn_scalar": 16, "sliding_window": 16},
    "smollm3": CONFIGS["llama"] | {"num_hidden_layers": 4},
    "mistral": CONFIGS["mistral"] | {"sliding_window": 100},
    "phi3": CONFIGS["phi3"] | {"original_max_position_embeddings": 128},
    "gpt2": CONFIGS["gpt2"] | {"n_embd": 64, "n_positions": 128},
}


def folder_of(family: str, path: Path, **changes: Any) -> Path:
    """A tiny random model of a family, with the tokens of the tiny tokenizer."""
    wide = {} if family == "gpt2" else WIDE
    return make_folder(path, family, OWN.get(family, CONFIGS.get(family, CONFIGS["llama"])) | wide | ENDS | changes)


def adapter_of(base_folder: Path, folder: Path) -> Path:
    """An adapter with random weights on this base."""
    base = load_base(ModelConfig(model=str(base_folder), dtype="float32", device="cpu"))
    adapter = inject(base.model, LoraConfig(r=4), base.router)
    stir(adapter, 1)
    with torch.no_grad():
        for key, parameter in adapter.parameters.items():
            if ".lora_B." in key:
                parameter *= 0.2  # as a training would: the weights change by some percent
    base.adapters["default"] = adapter
    write_adapter(base, "default", Template.of(base.tokenizer), folder, {"dtype": "float32"})
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("llama")
    return adapter_of(folder_of("llama", place / "base"), place / "adapter")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_exported_and_read_back(family, tmp_path):
    own = adapter_of(folder_of(family, tmp_path / "base"), tmp_path / "adapter")
    content = export_gguf(own, tmp_path / "model.gguf", "f32").content
    figures = content["figures"]
    assert figures["worst_tensor"] < 1e-6
    assert figures["tensors"] > 10
    assert figures["texts"] > 190
    assert [one["reader"] for one in figures["readings"]] == readers(family)
    for one in figures["readings"]:
        rough = one["reader"] == "llama.cpp" and family in GELU
        assert one["error"] < (1e-3 if rough else 1e-5)
        assert one["agreeing"] == one["positions"] > 20
        assert one["equal_replies"] >= (18 if rough else 20)
        assert one["replies"] == 20


def readers(family: str) -> list[str]:
    """The programs that read it here."""
    return ["transformers"] * FAMILIES[family].read_by_transformers + ["llama.cpp"] * has_llama_cpp()


@pytest.mark.parametrize(
    ("family", "rope"),
    [
        ("llama", {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, **LLAMA3}),
        ("granite", {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, **LLAMA3}),
        ("qwen2", {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
        ("gemma3_text", {"full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0},
                         "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}),
    ],
)  # fmt: skip
def test_scaled_positions_are_exported(family, rope, tmp_path):
    own = adapter_of(folder_of(family, tmp_path / "base", rope_parameters=rope), tmp_path / "adapter")
    readings = export_gguf(own, tmp_path / "model.gguf", "f32").content["figures"]["readings"]
    assert [one["reader"] for one in readings] == readers(family)
    assert all(one["error"] < (1e-3 if family in GELU else 1e-5) for one in readings)


def test_positions_that_are_not_scaled_are_noticed(tmp_path, monkeypatch):
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, **LLAMA3}
    own = adapter_of(folder_of("llama", tmp_path / "base", rope_parameters=rope), tmp_path / "adapter")
    monkeypatch.setattr(gguf_file, "extra_tensors", lambda _config: {})
    with pytest.raises(AdapterError, match="its logits differ from those of the trained model"):
        export_gguf(own, tmp_path / "model.gguf", "f32")


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_a_rounded_file_is_as_close_as_rounding_explains(adapter, tmp_path, kind):
    for one in export_gguf(adapter, tmp_path / "model.gguf", kind).content["figures"]["readings"]:
        assert 1e-5 < one["error"] <= one["limit"] < 0.1
        assert one["agreeing"] == one["positions"]


def permuted(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = replace(FAMILIES["llama"], change=lambda _name, tensor, _config: tensor)
    monkeypatch.setattr(gguf_file, "family_of", lambda _config: plain)


def wrong_table(monkeypatch: pytest.MonkeyPatch) -> None:
    same = replace(FAMILIES["llama"], change=lambda _n, t, _c: t, undo=lambda _n, t, _c: t)
    for module in (gguf_file, check):
        monkeypatch.setattr(module, "family_of", lambda _config: same)


def rope_base(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_file, "keys_of", lambda config: keys_of(config) | {"llama.rope.freq_base": 10000.0})


def encoded(change: Callable[[Encoding], Encoding]) -> Callable[[pytest.MonkeyPatch], None]:
    own = exporting._encoding
    return lambda monkeypatch: monkeypatch.setattr(exporting, "_encoding", lambda session: change(own(session)))


def written(change: Callable[[dict[str, Tensor]], None]) -> Callable[[pytest.MonkeyPatch], None]:
    """A writer of other tensors, by their names in GGUF."""

    def tensors(model: PreTrainedModel) -> list[tuple[str, str, Tensor]]:
        found = {name: tensor for name, _parameter, tensor in tensors_of(model)}
        change(found)
        return [(name, "", tensor) for name, tensor in found.items()]

    return lambda monkeypatch: monkeypatch.setattr(gguf_file, "tensors_of", tensors)


def other_layer(tensors: dict[str, Tensor]) -> None:
    tensors["blk.0.ffn_up.weight"] = tensors["blk.1.ffn_up.weight"]


def forgotten_head(tensors: dict[str, Tensor]) -> None:
    del tensors["output.weight"]


def extra(tensors: dict[str, Tensor]) -> None:
    tensors["blk.7.ffn_up.weight"] = tensors["blk.1.ffn_up.weight"]


def shorter(tensors: dict[str, Tensor]) -> None:
    tensors["token_embd.weight"] = tensors["token_embd.weight"][:-1]


FAULTS = {
    "permutation of q and k": (permuted, "the tensor blk.0.attn_q.weight is not model.layers.0.self_attn.q_proj"),
    "a table that is wrong both ways": (wrong_table, "as transformers reads it, its logits differ"),
    "rope base": (rope_base, "llama.rope.freq_base is 10000.0 instead of 777.0"),
    "template of another model": (
        encoded(lambda e: replace(e, chat_template="{{ messages[0].content }}")),
        "tokenizer.chat_template makes other tokens of the conversation 'Why is the sky blue?'",
    ),
    "no end token": (encoded(lambda e: replace(e, ends=())), "lack the end token <"),
    "double begin token": (encoded(lambda e: replace(e, bos=1, add_bos=True)), "tokenizer.ggml.add_bos_token puts"),
    "pre-tokenizer": (
        encoded(lambda e: replace(e, vocabulary=replace(e.vocabulary, pre="qwen2"))),
        "the tokenizer, with tokenizer.ggml.pre=qwen2, splits the text",
    ),
    "unknown pre-tokenizer": (
        encoded(lambda e: replace(e, vocabulary=replace(e.vocabulary, pre="default"))),
        "tokenizer.ggml.pre is default, which is unknown",
    ),
    "tied head forgotten": (written(forgotten_head), "the tensor output.weight (lm_head.weight) is missing"),
    "another layer": (written(other_layer), "blk.0.ffn_up.weight is not model.layers.0.mlp.up_proj.weight"),
    "a tensor too much": (written(extra), "the tensor blk.7.ffn_up.weight belongs to no weight of the model"),
    "a shape": (written(shorter), "token_embd.weight has shape [299, 64] instead of [300, 64]"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_file_gets_no_name_and_the_fault_is_named(adapter, tmp_path, monkeypatch, fault):
    inject_fault, words = FAULTS[fault]
    inject_fault(monkeypatch)
    with pytest.raises(AdapterError) as caught:
        export_gguf(adapter, tmp_path / "model.gguf", "f32")
    assert any(words in problem for problem in caught.value.problems), caught.value.problems
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_a_file_without_the_adapter_is_refused(adapter, tmp_path, monkeypatch, kind):
    base = load_plain(adapter.parent / "base", None, torch.float32, False)
    monkeypatch.setattr(exporting, "write_gguf", lambda path, _model, *rest: gguf_file.write_gguf(path, base, *rest))
    with pytest.raises(AdapterError, match=r"is not model\.layers.0\.self_attn\.q_proj\.weight of the trained model"):
        export_gguf(adapter, tmp_path / "model.gguf", kind)


def test_a_missing_scale_is_named(tmp_path, monkeypatch):
    own = adapter_of(folder_of("granite", tmp_path / "base"), tmp_path / "adapter")

    def without(config: PretrainedConfig) -> dict[str, Value]:
        return {name: value for name, value in keys_of(config).items() if name != "granite.logit_scale"}

    monkeypatch.setattr(gguf_file, "keys_of", without)
    with pytest.raises(AdapterError, match=r"granite\.logit_scale is None instead of 3\.0"):
        export_gguf(own, tmp_path / "model.gguf", "f32")


def test_verify_again_and_against_the_run(adapter, tmp_path):
    file = tmp_path / "model.gguf"
    made = export_gguf(adapter, file, "f16")
    assert verify_gguf(file).content == made.content
    certificate_of(file).unlink()
    with pytest.raises(RunError, match="has no certificate"):
        verify_gguf(file)
    assert verify_gguf(file, adapter).content == made.content
    content = bytearray(file.read_bytes())
    content[-5] ^= 64
    file.write_bytes(content)
    with pytest.raises(RunError, match="is not the file of its certificate"):
        verify_gguf(file)
    with pytest.raises(AdapterError, match=r"is not .* of the trained model"):
        verify_gguf(file, adapter)
    with pytest.raises(RunError, match="there is no such file"):
        verify_gguf(tmp_path / "other.gguf")


def test_verify_of_files_that_lorasmith_does_not_write(adapter, tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF\x03")
    with pytest.raises(RunError, match="is damaged"):
        verify_gguf(tmp_path / "broken.gguf", adapter)
    write_tiny_gguf(tmp_path / "tiny.gguf")
    with pytest.raises(RunError, match="no GGUF files of this type"):
        verify_gguf(tmp_path / "tiny.gguf", adapter)


def test_what_exists_is_replaced_only_if_an_export_wrote_it(adapter, tmp_path):
    file = tmp_path / "model.gguf"
    file.write_text("mine")
    with pytest.raises(RunError, match="already exists"):
        export_gguf(adapter, file, "f32")
    with pytest.raises(RunError, match="has no certificate of lorasmith"):
        export_gguf(adapter, file, "f32", overwrite=True)
    with pytest.raises(RunError, match="is a folder"):
        export_gguf(adapter, tmp_path, "f32")
    certificate_of(file).write_text("{}")
    export_gguf(adapter, file, "f32", overwrite=True)
    assert json.loads(certificate_of(file).read_text())["type"] == "f32"


def test_a_file_that_transformers_cannot_read(adapter, tmp_path, monkeypatch):
    def fail(*_args: object) -> None:
        raise ValueError("no such architecture")

    monkeypatch.setattr(readers_of_files, "read_model", fail)
    with pytest.raises(AdapterError, match="transformers cannot read it: no such architecture"):
        export_gguf(adapter, tmp_path / "model.gguf", "f32")


def test_other_replies_are_refused(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(Transformers, "replies", lambda _self, prompts, *_rest: [[1]] * len(prompts))
    with pytest.raises(AdapterError, match=r"as transformers reads it, it replies .* to .*sky blue.* instead of"):
        export_gguf(adapter, tmp_path / "model.gguf", "f32")


def test_too_many_end_tokens(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "_ends", lambda _template: [0, 1, 2, 3])
    with pytest.raises(ModelError, match=r"4 tokens that end an answer .* can name only three"):
        export_gguf(adapter, tmp_path / "model.gguf", "f32")
