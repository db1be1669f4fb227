"""Finding a model's folder, and what is said of one that must not or cannot be loaded."""

from pathlib import Path

import pytest

from lorasmith.errors import ModelError
from lorasmith.loading.folder import find_folder, max_positions
from lorasmith.report import Report
from tests.support.model_folders import configure, said


def test_nothing_under_that_name(tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    with pytest.raises(
        ModelError, match=r"'.*/my-modle' is not a folder or GGUF file on this machine\. Did you mean '.*/my-model'\?"
    ):
        find_folder(str(tmp_path / "my-modle"), Report())
    with pytest.raises(ModelError, match=r"Did you mean 'smollm2-135m-instruct'\?"):
        find_folder("smollm2-135m-instruc", Report())
    file = tmp_path / "weights.bin"
    file.touch()
    with pytest.raises(ModelError, match=r"weights\.bin is a file\. Give the model's folder, or a \.gguf file"):
        find_folder(str(file), Report())


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert said(folder) == "MODEL is not a model folder: it does not contain config.json."


def test_broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    assert said(folder).startswith("MODEL/config.json: not valid JSON: ")


def test_a_config_that_is_no_object(folder: Path) -> None:
    (folder / "config.json").write_text("[1]")
    assert said(folder) == "MODEL/config.json: must be a JSON object, found [1]."


def test_pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert said(folder) == (
        "MODEL: the weights are pickle files, which can run code when they are loaded. Save the model as safetensors."
    )
    (folder / "pytorch_model.bin").unlink()
    assert said(folder) == "MODEL: no weights found (model.safetensors)."


def test_code_of_its_own(folder: Path) -> None:
    configure(folder, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    (folder / "modeling_evil.py").write_text("raise SystemExit('ran')")
    assert said(folder) == "MODEL: this model comes with its own Python code. If you trust it, use --trust-remote-code."


def test_the_context_length_needs_the_config_alone(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    configure(folder, max_position_embeddings=48)
    assert max_positions(folder) == 48


@pytest.mark.parametrize("content", ["{", "[1]", '{"model_type": ' + "9" * 5000 + "}", "[" * 10**5])
def test_a_broken_config_is_told_where_the_context_length_is_asked_for(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json: (not valid JSON|must be a JSON object)"):
        max_positions(folder)
