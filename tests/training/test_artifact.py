"""What a training writes: its folder is copied without the files of others."""

from pathlib import Path

import pytest

from lorasmith.config.lora import LoraConfig
from lorasmith.config.model import ModelConfig
from lorasmith.config.training import TrainingConfig
from lorasmith.data.template.encoding import Template
from lorasmith.loading.load import load_base
from lorasmith.lora.inject import inject
from lorasmith.model.base import Base
from lorasmith.report import Report
from lorasmith.training.artifact import artifact_of
from lorasmith.training.full import whole_model
from lorasmith.training.run_files import ADAPTER_FILES, MODEL_FILES
from tests.support.tiny import model_folder


@pytest.fixture
def base() -> Base:
    return load_base(ModelConfig(model=str(model_folder()), dtype="float32", device="cpu"), Report())


def copied(base: Base, tmp_path: Path, names: set[str]) -> set[str]:
    source, folder = tmp_path / "best-000002", tmp_path / "copy"
    source.mkdir()
    folder.mkdir()
    for name in (*names, "notes.txt"):
        (source / name).write_text(name)
    artifact_of(base, "a", Template.of(base.tokenizer), {}).copy(source, folder)
    return {path.name for path in folder.iterdir()}


def test_an_adapter_is_copied_without_the_files_of_others(base, tmp_path):
    """With these, --overwrite would refuse to replace adapter/."""
    base.adapters["a"] = inject(base.model, LoraConfig(), base.router, "a")
    assert copied(base, tmp_path, set(ADAPTER_FILES)) == ADAPTER_FILES


def test_a_whole_model_is_copied_with_its_code(base, tmp_path):
    base.adapters["a"] = whole_model(base, "a", TrainingConfig(method="full"))
    assert copied(base, tmp_path, {*MODEL_FILES, "modeling_own.py"}) == {*MODEL_FILES, "modeling_own.py"}


def test_a_missing_file_is_not_passed_over(base, tmp_path):
    base.adapters["a"] = inject(base.model, LoraConfig(), base.router, "a")
    with pytest.raises(FileNotFoundError):
        copied(base, tmp_path, set(ADAPTER_FILES) - {"adapter_config.json"})
