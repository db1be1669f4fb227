"""A checkpoint is mapped where it has the dtype, else read tensor by tensor; the surroundings are as before."""

import os
from pathlib import Path

import pytest
import torch
import transformers.modeling_utils
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lorasmith.config.model import ModelConfig
from lorasmith.loading.load import load_base
from lorasmith.loading.weights import is_stored_as, tensor_by_tensor, weights_mib
from lorasmith.lora.quantized import stored_bytes
from tests.support.tiny import model_folder


def copied(folder: Path) -> Path:
    """The tiny model, to be spoiled."""
    folder.mkdir()
    for file in model_folder().iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_the_largest_tensor_decides(tmp_path: Path) -> None:
    folder = copied(tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    mixed = {name: t if t.dim() == 1 else t.to(torch.bfloat16) for name, t in weights.items()}
    save_file(mixed, folder / "model.safetensors", {"format": "pt"})
    assert is_stored_as(folder, torch.bfloat16)
    assert not is_stored_as(folder, torch.float32)


def test_files_that_belong_to_no_checkpoint_are_left_alone(tmp_path: Path) -> None:
    folder = copied(tmp_path / "m")
    (folder / "consolidated.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    base = load_base(ModelConfig(model=str(folder), dtype="bfloat16", device="cpu"))
    assert base.dtype == torch.bfloat16


def test_shards_are_read_in_another_dtype_as_they_are_mapped(tmp_path: Path) -> None:
    whole = load_base(ModelConfig(model=str(model_folder()), dtype="float32", device="cpu")).model
    whole.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    for file in model_folder().glob("tok*"):
        (tmp_path / "m" / file.name).write_bytes(file.read_bytes())
    read = load_base(ModelConfig(model=str(tmp_path / "m"), dtype="bfloat16", device="cpu")).model
    for name, tensor in whole.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor.to(torch.bfloat16)), name


@pytest.mark.parametrize("before", [None, "0"])
def test_what_was_around_is_put_back(monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    monkeypatch.delenv("HF_DEACTIVATE_ASYNC_LOAD", raising=False)
    if before is not None:
        monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", before)

    def load() -> None:
        with tensor_by_tensor():
            monkeypatch.setenv("SET_MEANWHILE", "1")
            assert transformers.modeling_utils.safe_open is not safe_open
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        load()
    assert transformers.modeling_utils.safe_open is safe_open
    assert os.environ.get("HF_DEACTIVATE_ASYNC_LOAD") == before
    assert os.environ["SET_MEANWHILE"] == "1"


def test_the_memory_of_the_weights_is_foretold(tmp_path: Path) -> None:
    def found(form: str) -> float:
        model = load_base(ModelConfig(model=str(model_folder()), dtype="bfloat16", device="cpu", quantize=form)).model
        return stored_bytes(model) / 2**20

    for form in ("none", "nf4", "int8"):
        told = weights_mib(model_folder(), torch.bfloat16, form)
        assert found(form) == pytest.approx(told, rel=0.15), form  # of rows of 32, the scales are no small part
    assert weights_mib(tmp_path_with_broken_file(tmp_path), torch.bfloat16) == 0


def tmp_path_with_broken_file(folder: Path) -> Path:
    copied(folder / "m")
    (folder / "m" / "model.safetensors").write_bytes(b"broken")
    return folder / "m"
