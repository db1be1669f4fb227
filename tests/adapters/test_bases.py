"""PEFT's adapters over bases of all kinds: in several files, with tied embeddings, and quantised in training."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lorasmith.adapters.folder import AdapterFolder
from lorasmith.config.model import ModelConfig
from lorasmith.errors import AdapterError
from lorasmith.loading.load import load_base
from lorasmith.lora.files import ADAPTER_WEIGHTS
from lorasmith.system.transformers_logging import quiet_transformers
from tests.support.families import distance, logits_of
from tests.support.tiny import model_folder

IDS = torch.tensor([[5, 17, 60, 3, 8, 44]])
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


def plain(family: str, **options: Any) -> Any:
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(model_folder(family), dtype=torch.float32, **options).eval()


def stirred(model: Any, folder: Path, **options: Any) -> Any:
    """PEFT's model with random weights in the adapter, saved in `folder`."""
    theirs = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, **options)).eval()
    for p in theirs.parameters():
        if p.requires_grad:
            p.data += torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.2
    theirs.save_pretrained(folder)
    return theirs


def ours(folder: Path, base: Path) -> torch.Tensor:
    loaded = load_base(ModelConfig(model=str(base), dtype="float32"))
    AdapterFolder.read(folder).load_into(loaded, "a")
    loaded.model.eval()
    return logits_of(loaded, IDS)


def test_a_base_in_several_files(tmp_path: Path) -> None:
    theirs = stirred(plain("llama"), tmp_path / "adapter", target_modules="all-linear", modules_to_save=["lm_head"])
    with quiet_transformers():
        plain("llama").save_pretrained(tmp_path / "base", max_shard_size="20KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "base" / name).write_bytes((model_folder("llama") / name).read_bytes())
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    assert distance(ours(tmp_path / "adapter", tmp_path / "base"), logits_of(theirs, IDS)) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 8]},
    ],
    ids=str,
)
def test_a_base_with_tied_embeddings(options: dict[str, Any], tmp_path: Path) -> None:
    theirs = stirred(plain("qwen2"), tmp_path, **options)
    assert distance(ours(tmp_path, model_folder("qwen2")), logits_of(theirs, IDS)) < 1e-5


@pytest.mark.parametrize("save_embedding", [False, True])
def test_an_adapter_of_a_quantised_base_over_the_base_itself(save_embedding: bool, tmp_path: Path) -> None:
    quantised = plain("llama", quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    stirred(quantised, tmp_path, target_modules="all-linear").save_pretrained(
        tmp_path, save_embedding_layers=save_embedding
    )
    theirs = peft.PeftModel.from_pretrained(plain("llama"), tmp_path)
    assert distance(ours(tmp_path, model_folder("llama")), logits_of(theirs, IDS)) < 1e-5


def test_the_quantised_weights_of_a_base_in_the_file_are_refused_by_name(tmp_path: Path) -> None:
    """The state dict of the whole model: 4-bit weights say nothing about the base that they came from."""
    quantised = plain("llama", quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    theirs = stirred(quantised, tmp_path, target_modules=["q_proj"])
    save_file({key: tensor.clone() for key, tensor in theirs.state_dict().items()}, tmp_path / ADAPTER_WEIGHTS)
    with pytest.raises(AdapterError) as caught:
        ours(tmp_path, model_folder("llama"))
    assert "q_proj.base_layer.weight.absmax" in str(caught.value)
