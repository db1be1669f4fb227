"""A folder for Ollama: the file, its certificate and a Modelfile."""

from dataclasses import replace

import pytest

from lorasmith.config.model import ModelConfig
from lorasmith.errors import RunError
from lorasmith.export.gguf.model import verify_gguf
from lorasmith.export.gguf.ollama import export_ollama, modelfile
from lorasmith.export.gguf.subject import Subject
from lorasmith.report import Report


@pytest.fixture(scope="module")
def subject(adapter):
    return Subject.open(adapter, ModelConfig(), Report())


def test_the_folder_has_all_that_ollama_needs(adapter, tmp_path):
    found = export_ollama(adapter, tmp_path / "chat", "f32")
    assert found.file == tmp_path / "chat" / "chat.gguf"
    assert verify_gguf(found.file).content == found.content
    names = {path.name for path in (tmp_path / "chat").iterdir() if not path.name.startswith(".")}
    assert names >= {"chat.gguf", "chat.gguf.certificate.json", "Modelfile"}
    with pytest.raises(RunError, match="already exists"):
        export_ollama(adapter, tmp_path / "chat", "f32")
    (tmp_path / "chat" / "mine.txt").write_text("mine")
    with pytest.raises(RunError, match=r"contains mine\.txt, which lorasmith did not write"):
        export_ollama(adapter, tmp_path / "chat", "f32", overwrite=True)


def test_the_modelfile_says_how_the_training_encoded(subject):
    token = subject.trained.template.token
    assert modelfile(subject, "chat.gguf").splitlines() == [
        "FROM ./chat.gguf",
        "PARAMETER temperature 0",
        *(f'PARAMETER stop "{token(i)}"' for i in subject.encoding.ends),
    ]


def test_the_modelfile_has_the_system_message_and_the_length(subject):
    template = replace(subject.trained.template, system='Say "no".\nAlways.')
    changed = replace(subject, trained=replace(subject.trained, template=template, context=8192))
    text = modelfile(changed, "chat.gguf", 6000)
    assert 'SYSTEM """Say "no".\nAlways."""\n' in text
    assert "PARAMETER num_ctx 6000" in text
    assert "num_ctx 8192" in modelfile(changed, "chat.gguf", 60_000)
    assert "num_ctx" not in modelfile(changed, "chat.gguf", 4096)
