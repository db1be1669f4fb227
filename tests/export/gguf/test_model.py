"""Export to GGUF, of tiny models of every family: the file is the trained model, or it does not get its name."""

import json

import pytest

from lorasmith.adapters.certificate import certificate_of
from lorasmith.errors import AdapterError, ModelError, RunError
from lorasmith.export.gguf import file as gguf_file
from lorasmith.export.gguf import subject as exporting
from lorasmith.export.gguf.families import FAMILIES
from lorasmith.export.gguf.model import export_gguf, verify_gguf
from lorasmith.export.readback.readers import has_llama_cpp
from lorasmith.loading.gguf_settings import LLAMA3
from tests.support.exported import adapter_of, folder_of
from tests.support.sentencepiece import sentencepiece
from tests.support.tiny_gguf import write_tiny_gguf

GELU = ("gemma3_text", "gpt2")  # llama.cpp takes it from a table in half precision

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}


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
        ("llama", YARN), ("qwen3", YARN), ("olmo2", YARN), ("smollm3", YARN),
        ("phi3", {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 256,
                  "short_factor": [1.0 + i / 4 for i in range(8)], "long_factor": [2.0 * i + 1 for i in range(8)]}),
        ("gemma3_text", {"full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0},
                         "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}),
    ],
)  # fmt: skip
def test_scaled_positions_are_exported(family, rope, tmp_path):
    longer = {"max_position_embeddings": 512, "original_max_position_embeddings": 256} if family == "phi3" else {}
    own = adapter_of(folder_of(family, tmp_path / "base", rope_parameters=rope, **longer), tmp_path / "adapter")
    readings = export_gguf(own, tmp_path / "model.gguf", "f32").content["figures"]["readings"]
    assert [one["reader"] for one in readings] == readers(family)
    assert all(one["error"] < (1e-3 if family in GELU else 1e-5) for one in readings)


@pytest.mark.parametrize(("family", "space", "strips"), [
    ("llama", "first", False), ("llama", "always", False), ("gemma3_text", "never", False), ("phi3", "always", True),
])  # fmt: skip
def test_tokenizers_of_sentencepiece(family, space, strips, tmp_path):
    own = sentencepiece(space, strips)
    base = folder_of(family, tmp_path / "base", vocab_size=len(own), eos_token_id=2, pad_token_id=2, bos_token_id=1)
    own.save_pretrained(base)
    figures = export_gguf(adapter_of(base, tmp_path / "adapter"), tmp_path / "model.gguf", "f32").content["figures"]
    assert figures["texts"] > 190
    assert [one["reader"] for one in figures["readings"]] == readers(family)
    assert all(one["error"] < (1e-3 if family in GELU else 1e-5) for one in figures["readings"])


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


def test_too_many_end_tokens(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "_ends", lambda _template: [0, 1, 2, 3])
    with pytest.raises(ModelError, match=r"4 tokens that end an answer .* can name only three"):
        export_gguf(adapter, tmp_path / "model.gguf", "f32")
