"""From a folder to a Base: what is set, and what is said where something is missing."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorasmith.config.model import ModelConfig
from lorasmith.loading import load as loading
from lorasmith.loading.load import load_base
from lorasmith.loading.weights import weights_mib
from lorasmith.report import Report
from lorasmith.system import device as machine
from tests.support.families import logits_of
from tests.support.model_folders import configure, load, said, spoil
from tests.support.tiny import Watch, model_folder
from tests.support.tokenizer_layouts import file_ids, tokenizer_folder


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_a_folder_becomes_a_frozen_base_with_the_models_logits(family: str) -> None:
    base = load(model_folder(family))
    plain = AutoModelForCausalLM.from_pretrained(model_folder(family), dtype=torch.float32)
    assert torch.equal(logits_of(base), logits_of(plain))
    assert base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())
    assert base.layout == ("padded" if family == "bloom" else "packed")
    assert (base.dtype, base.device.type, base.folder) == (torch.float32, "cpu", model_folder(family))
    assert base.source == str(model_folder(family)), "as the user named it"
    assert set(base.why) == {"device", "dtype", "head", "layout"}
    assert base.tokenizer.eos_token == "<eos>"


@pytest.mark.parametrize(
    ("family", "fields"),
    [("gpt2", ("attn_pdrop", "embd_pdrop", "resid_pdrop")), ("opt", ("dropout", "attention_dropout", "layerdrop"))],
)
def test_every_dropout_of_the_config_is_zero_in_the_base(family: str, fields: tuple[str, ...], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder(family), tmp_path / "model"))
    configure(folder, **dict.fromkeys(fields, 0.5))
    base = load(folder)
    assert [getattr(base.model.config, field) for field in fields] == [0.0] * len(fields)
    assert not any(m.p for m in base.model.modules() if isinstance(m, torch.nn.Dropout))
    training = logits_of(base)
    base.model.eval()
    assert torch.equal(logits_of(base), training)
    assert json.loads((folder / "config.json").read_text())[fields[0]] == 0.5, "the folder is not written to"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_the_dtype_that_is_asked_for(dtype: str) -> None:
    base = load(model_folder("llama"), dtype=dtype)
    assert {p.dtype for p in base.model.parameters()} == {getattr(torch, dtype)}
    assert base.why["dtype"] == "as requested"


def test_a_base_has_the_token_ids_of_its_tokenizer_json(tmp_path: Path) -> None:
    """transformers splits with the class of qwen2, whatever the file and tokenizer_config.json say."""
    folder = Path(shutil.copytree(model_folder("qwen2"), tmp_path / "model"))
    tokenizer_folder(folder, "llama3 small", "qwen2", "LlamaTokenizerFast")
    watch = Watch()
    base = load_base(ModelConfig(model=str(folder), dtype="float32", device="cpu"), watch)
    (wanted,) = file_ids(folder, ["In 2024"])
    assert AutoTokenizer.from_pretrained(folder)("In 2024")["input_ids"] != wanted
    assert base.tokenizer("In 2024")["input_ids"] == wanted
    (warned,) = watch.warned
    assert warned == (
        f"{folder / 'tokenizer.json'}: Qwen2Tokenizer, which transformers {transformers.__version__} uses for this "
        "model, splits '2024' into ['2', '0', '2', '4'] instead of ['202', '4']. The token ids of the file are used "
        "here. Other programs that load the model with transformers may use the wrong ones."
    )


def test_weights_that_are_not_all_there(folder: Path) -> None:
    spoil(folder, lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight"))
    problem = said(folder)
    assert "model.layers.0.mlp.up_proj.weight" in problem
    assert problem.startswith("MODEL: missing weights ")


def test_cut_weights(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert said(folder).startswith("MODEL: transformers cannot load this model: ")


def test_weights_that_do_not_fit_into_memory_are_foretold(monkeypatch: pytest.MonkeyPatch) -> None:
    size = weights_mib(model_folder(), torch.float32)
    config = ModelConfig(model=str(model_folder()), dtype="float32", device="cpu")
    said = {}
    shares = {"none": 1.0, "int8": 0.25, "nf4": 0.14}  # in a tiny model, NF4's tables take more than its weights
    monkeypatch.setattr(loading, "weights_mib", lambda _folder, _dtype, form="none": shares[form] * size)
    for share in (2.0, 0.6, 0.2, 0.01):
        monkeypatch.setattr(loading, "usable_mib", lambda _device, share=share: share * size)
        report = Collected()
        load_base(config, report)
        said[share] = report.warnings
    assert not said[2.0]
    assert "the weights take" in said[0.6][0]
    assert "Quantized with --quantize int8" in said[0.6][0]
    assert "Quantized with --quantize nf4" in said[0.2][0]
    assert "--quantize" not in said[0.01][0]
    monkeypatch.setattr(loading, "usable_mib", lambda _device: None)
    report = Collected()
    load_base(config, report)
    assert not report.warnings


class Collected(Report):
    """Keeps the warnings."""

    def __init__(self) -> None:
        self.warnings = list[str]()

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def test_a_large_model_is_loaded_in_bfloat16_although_float32_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(machine, "float32_is_faster", lambda: True)
    size = weights_mib(model_folder(), torch.float32)
    config = ModelConfig(model=str(model_folder()), device="cpu")
    for share, dtype in ((2.1, torch.float32), (1.9, torch.bfloat16)):
        monkeypatch.setattr(loading, "usable_mib", lambda _device, share=share: share * size)
        assert load_base(config, Collected()).dtype == dtype
