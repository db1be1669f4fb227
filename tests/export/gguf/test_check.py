"""Each fault that is injected into a file is named, and the file does not get its name."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from lorasmith.adapters.merge import load_plain
from lorasmith.errors import AdapterError
from lorasmith.export.gguf import check
from lorasmith.export.gguf import file as gguf_file
from lorasmith.export.gguf import subject as exporting
from lorasmith.export.gguf.families import FAMILIES, Value, keys_of
from lorasmith.export.gguf.file import Encoding, tensors_of
from lorasmith.export.gguf.model import export_gguf
from lorasmith.export.readback import readers
from lorasmith.export.readback.readers import Transformers
from tests.support.exported import adapter_of, folder_of


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
    own = exporting.encoding_of
    return lambda monkeypatch: monkeypatch.setattr(exporting, "encoding_of", lambda *given: change(own(*given)))


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


def test_a_file_that_transformers_cannot_read(adapter, tmp_path, monkeypatch):
    def fail(*_args: object) -> None:
        raise ValueError("no such architecture")

    monkeypatch.setattr(readers, "read_model", fail)
    with pytest.raises(AdapterError, match="transformers cannot read it: no such architecture"):
        export_gguf(adapter, tmp_path / "model.gguf", "f32")


def test_other_replies_are_refused(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(Transformers, "replies", lambda _self, prompts, *_rest: [[1]] * len(prompts))
    with pytest.raises(AdapterError, match=r"as transformers reads it, it replies .* to .*sky blue.* instead of"):
        export_gguf(adapter, tmp_path / "model.gguf", "f32")
