"""An adapter alone as a GGUF file: the base model with it is the trained model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader

from lorasmith.errors import AdapterError, ModelError, RunError
from lorasmith.export.gguf import lora
from lorasmith.export.gguf.lora import export_gguf_lora
from lorasmith.export.readback.readers import has_llama_cpp
from tests.support.exported import adapter_of, folder_of

GELU = ("gemma3_text", "gpt2")
FAMILIES = ("llama", "qwen2", "gemma3_text", "phi3", "granite", "gpt2", "mistral")


def exported(tmp_path: Path, family: str = "llama", base: dict[str, Any] | None = None, **options: Any) -> Any:
    adapter = adapter_of(folder_of(family, tmp_path / "base", **base or {}), tmp_path / "adapter", **options)
    return export_gguf_lora(adapter, tmp_path / "lora.gguf")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_model_with_the_file_is_the_trained_model(family, tmp_path):
    readings = exported(tmp_path, family).content["figures"]["readings"]
    assert [one["reader"] for one in readings] == ["gguf", *["llama.cpp"] * has_llama_cpp()]
    assert all(one["error"] < (1e-3 if family in GELU else 1e-5) for one in readings)


@pytest.mark.parametrize(
    ("options", "alpha"),
    [
        ({"r": 4, "lora_alpha": 6.0}, 6.0),
        ({"r": 4, "lora_alpha": 6.0, "use_rslora": True}, 12.0),
        ({"r": 4, "rank_pattern": {"q_proj": 2}}, 16.0),
        ({"r": 4, "rank_pattern": {"q_proj": 2}, "use_rslora": True}, 1.0),
        ({"r": 4, "alpha_pattern": {"q_proj": 3.0}}, 1.0),
    ],
)
def test_ranks_and_scalings_of_single_layers_are_in_b(options, alpha, tmp_path):
    made = exported(tmp_path, **options)
    assert made.content["figures"]["readings"][0]["error"] < 1e-5
    reader = GGUFReader(made.file)
    assert reader.get_field("adapter.lora.alpha").contents() == pytest.approx(alpha)
    assert (reader.get_field("general.type").contents(), reader.get_field("adapter.type").contents()) == (
        "adapter",
        "lora",
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True}, r"more than B A of model\.layers\.0\..* \(DoRA"),
        ({"modules_to_save": ["norm"]}, r"model\.norm"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, r"model\.embed_tokens"),
        ({"bias": "lora_only", "target_modules": ["q_proj"]}, "biases"),
    ],
)
def test_what_is_more_than_a_and_b_is_refused_by_name(options, words, tmp_path):
    with pytest.raises(AdapterError, match=f"llama.cpp --lora reads only A and B .* has also trained .*{words}"):
        exported(tmp_path, base={"attention_bias": True}, r=4, **options)
    assert not (tmp_path / "lora.gguf").exists()


def test_a_tied_head_is_refused(tmp_path):
    with pytest.raises(ModelError, match="lm_head: it shares its weight with the embedding"):
        exported(tmp_path, base={"tie_word_embeddings": True}, r=4, target_modules=["q_proj", "lm_head"])


def test_faults_are_noticed_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(lora, "folded", lambda factors, _formula: factors)
    with pytest.raises(AdapterError, match="is not the trained model: with the base model, its logits differ by"):
        exported(tmp_path, r=4, lora_alpha=6.0, alpha_pattern={"q_proj": 3.0})
    assert not (tmp_path / "lora.gguf").exists()


@pytest.mark.skipif(not has_llama_cpp(), reason="llama-cpp-python is not installed; make export-check installs it")
def test_a_wrong_permutation_is_noticed_by_llama_cpp(tmp_path, monkeypatch):
    for name in ("interleaved", "in_halves"):
        monkeypatch.setattr(lora, name, lambda _name, tensor, _config: tensor)
    with pytest.raises(AdapterError, match=r"as llama\.cpp reads it, with the base model, its logits differ"):
        exported(tmp_path)


def test_what_another_reader_makes_of_it_must_be_the_same(tmp_path, monkeypatch):
    """As of llama.cpp, whether it is installed or not."""

    class Other:
        name, version, floor = "other", "1", 1e-3

        def __init__(self, _base: Path, _context: int, lora: Path) -> None:
            assert lora.is_file()

        def logits(self, rows: list[list[int]]) -> list[torch.Tensor]:
            return [torch.zeros(len(ids), 300) for ids in rows]

        def close(self) -> None:
            pass

    monkeypatch.setattr(lora, "LlamaCpp", Other)
    monkeypatch.setattr(lora, "has_llama_cpp", lambda: True)
    with pytest.raises(AdapterError, match="as other reads it, with the base model, its logits differ by"):
        exported(tmp_path)
    assert not (tmp_path / "lora.gguf").exists()


def test_a_file_of_others_is_not_replaced(tmp_path):
    (tmp_path / "lora.gguf").write_text("mine")
    with pytest.raises(RunError, match="already exists"):
        exported(tmp_path)
    assert (tmp_path / "lora.gguf").read_text() == "mine"


def test_the_figures_are_of_float32(tmp_path):
    made = exported(tmp_path)
    assert {tensor.data.dtype for tensor in GGUFReader(made.file).tensors} == {torch.zeros(1).numpy().dtype}
