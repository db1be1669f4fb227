"""What makes a base the same base."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from lorasmith.model.identity import identity
from tests.support.tiny import model_folder

OWN = model_folder("llama")


def of(folder: Path) -> dict[str, str]:
    return identity(folder, AutoTokenizer.from_pretrained(folder))


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OWN, tmp_path / "copy"))


def differing(folder: Path) -> set[str]:
    before, after = of(OWN), of(folder)
    assert before.keys() == after.keys()
    return {part for part in before if before[part] != after[part]}


def test_a_copy_elsewhere_is_the_same(copied: Path) -> None:
    assert not differing(copied)
    assert all(len(digest) == 16 for digest in of(copied).values())


def test_what_another_program_writes_into_the_config_changes_nothing(copied: Path) -> None:
    path = copied / "config.json"
    config = json.loads(path.read_text())
    changed = {
        "transformers_version": "9.9",
        "_name_or_path": "elsewhere",
        "use_cache": False,
        "torch_dtype": "float16",
    }
    path.write_text(json.dumps(dict(reversed((config | changed).items()))))
    assert not differing(copied)


def test_another_shape_in_the_config(copied: Path) -> None:
    path = copied / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.1}))
    assert differing(copied) == {"config"}


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"]
)
def test_one_tensor_is_another(copied: Path, name: str) -> None:
    tensors = load_file(copied / "model.safetensors")
    tensors[name] += 0.01
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    assert differing(copied) == {"tensors"}


def test_a_tensor_more(copied: Path) -> None:
    save_file({"extra": torch.zeros(2)}, copied / "more.safetensors")
    assert differing(copied) == {"tensors"}


def test_one_word_is_another(copied: Path) -> None:
    path = copied / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    first, second = sorted(vocab, key=vocab.get)[-2:]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    path.write_text(json.dumps(content))
    assert differing(copied) == {"tokenizer"}


def test_another_seed_is_another_base() -> None:
    assert differing(model_folder("llama", 1)) == {"tensors"}
