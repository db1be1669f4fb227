"""What is exported: also a run that trained all weights, and what the file says about itself."""

from lorasmith.config.model import ModelConfig
from lorasmith.export.gguf.file import GGUFFile
from lorasmith.export.gguf.model import export_gguf
from lorasmith.export.gguf.subject import Subject
from lorasmith.report import Report
from tests.support.tiny import trained


def test_a_file_says_where_it_comes_from(adapter, tmp_path):
    subject = Subject.open(adapter, ModelConfig(), Report())
    found = subject.metadata(tmp_path / "mine.gguf")
    assert found["general.name"] == "mine"
    assert found["lorasmith.adapter.hash"] == subject.identity["adapter"]["hash"]
    assert not any(str(tmp_path.parent.parent) in str(value) for value in found.values())


def test_a_run_of_all_weights_is_exported(tmp_path):
    trained(tmp_path / "run", method="full", max_steps=2)
    made = export_gguf(tmp_path / "run", tmp_path / "model.gguf", "f32")
    assert made.content["figures"]["readings"][0]["error"] < 1e-5
    assert "adapter" not in made.content
    assert GGUFFile(made.file).key("lorasmith.base.tensors") == made.content["base"]["tensors"]
    assert GGUFFile(made.file).key("general.base_model.count") is None
