"""From a folder to a Base: what is set, and what is said where something is missing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorasmith.config.model import ModelConfig
from lorasmith.errors import ConfigError, ModelError
from lorasmith.loading.load import find_folder, load_base
from lorasmith.model.base import Base
from lorasmith.report import Report
from lorasmith.system import device as machine
from lorasmith.system.device import choose_device, choose_dtype
from tests.support.families import logits_of
from tests.support.tiny import model_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a llama's folder, to spoil."""
    return Path(shutil.copytree(model_folder("llama"), tmp_path / "model"))


def load(folder: Path, **options: object) -> Base:
    return load_base(ModelConfig(**({"model": str(folder), "dtype": "float32", "device": "cpu"} | options)))


def said(folder: Path, **options: object) -> str:
    with pytest.raises(ModelError) as caught:
        load(folder, **options)
    (problem,) = caught.value.problems
    return problem.replace(str(folder), "MODEL")


def configure(folder: Path, **keys: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


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


# --- what is said -----------------------------------------------------------------------------------------------------


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


def test_no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert said(folder) == (
        "MODEL: no tokenizer found (tokenizer.json). Copy the tokenizer files of the same model there."
    )


def test_broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    assert said(folder).startswith("MODEL: the tokenizer cannot be read: ")


def test_a_tokenizer_without_an_end(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    kept = {key: value for key, value in json.loads(path.read_text()).items() if key != "eos_token"}
    path.write_text(json.dumps(kept))
    assert said(folder) == (
        "MODEL: the tokenizer has no eos_token, so a reply would never end. Set eos_token in its tokenizer_config.json."
    )


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


def test_an_unknown_architecture(folder: Path) -> None:
    configure(folder, model_type="nextyear")
    assert said(folder).startswith("MODEL: transformers does not support this model: ")


def test_an_architecture_that_is_no_causal_model(folder: Path) -> None:
    configure(folder, model_type="vit")
    assert said(folder).startswith("MODEL: transformers cannot load this model: ")


def spoil(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_weights_that_are_not_all_there(folder: Path) -> None:
    spoil(folder, lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight"))
    problem = said(folder)
    assert "model.layers.0.mlp.up_proj.weight" in problem
    assert problem.startswith("MODEL: missing weights ")


def test_weights_of_another_shape(folder: Path) -> None:
    spoil(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))
    assert said(folder) == (
        "MODEL/model.safetensors: model.norm.weight has the shape (31,); a model of this config.json needs (32,)."
    )


def test_cut_weights(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert said(folder).startswith("MODEL: transformers cannot load this model: ")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"hidden_size": "big"}, "Field 'hidden_size' expected int, got str (value: 'big')."),
        ({"rms_norm_eps": "x"}, "Field 'rms_norm_eps' expected float, got str (value: 'x')."),
        ({"num_attention_heads": 5}, "its values do not go together: The hidden size (32) is not a multiple of"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; it must be a whole number of at least 1."),
        ({"dtype": "floaty"}, 'dtype is "floaty"; it must be a dtype of torch, such as "bfloat16".'),
        ({"hidden_act": "foo"}, 'hidden_act is "foo", which this version of transformers does not know.'),
        ({"rope_scaling": {"type": "foo"}}, 'rope_scaling.type is "foo", which this version of transformers does not'),
        (
            {"attn_implementation": "flash_attention_2"},
            "attn_implementation asks for a package that cannot be imported",
        ),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config asks for a package that"),
        ({"quantization_config": "yes"}, 'quantization_config is "yes"; it must be an object whose quant_method'),
        ({"quantization_config": {"quant_method": "mine"}}, "it must be an object whose quant_method is one that"),
    ],
)
def test_a_wrong_value_in_the_config_is_named(folder: Path, keys: dict[str, object], words: str) -> None:
    configure(folder, **keys)
    problem = said(folder)
    assert problem.startswith("MODEL/config.json: ")
    assert words in problem


def test_a_config_that_is_no_object(folder: Path) -> None:
    (folder / "config.json").write_text("[1]")
    assert said(folder) == "MODEL/config.json: must be a JSON object, found [1]."


def test_sizes_that_the_weights_do_not_have_are_named(folder: Path) -> None:
    configure(folder, vocab_size=100)
    with pytest.raises(ModelError) as caught:
        load(folder)
    assert caught.value.problems[0] == (
        f"{folder}/model.safetensors: lm_head.weight has the shape (300, 32); "
        "a model of this config.json needs (100, 32)."
    )


def test_fewer_layers_than_the_weights_hold(folder: Path) -> None:
    configure(folder, num_hidden_layers=1)
    assert said(folder) == (
        "MODEL: its weights hold 2 layers (model.layers.1.input_layernorm.weight), and its config.json asks for 1. "
        "Use the config.json that belongs to these weights."
    )


def test_a_bias_that_the_config_says_nothing_of(folder: Path) -> None:
    spoil(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}))
    assert said(folder) == (
        "MODEL: its weights hold model.layers.0.self_attn.q_proj.bias, which a model of its config.json does not have. "
        "Use the config.json that belongs to these weights."
    )


def test_parts_of_which_transformers_knows_nothing_are_left_out(folder: Path) -> None:
    """An encoder for images beside a language model, or a layer with parts of its own that predicts another token."""
    more = {"vision.layers.0.weight": torch.ones(2, 2), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    more |= {"model.layers.2.eh_proj.weight": torch.ones(2, 2), "model.layers.2.mlp.up_proj.weight": torch.ones(2, 2)}
    spoil(folder, lambda tensors: tensors.update(more))
    assert load(folder).layout == "packed"


# --- the machine ------------------------------------------------------------------------------------------------------


def test_dtype_follows_from_the_processors_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for flags, dtype, reason in (
        ({"avx2": True}, torch.float32, "no bfloat16 instructions"),
        ({"avx512_bf16": True}, torch.bfloat16, "avx512_bf16"),
        ({"avx512_bf16": True, "amx_bf16": True}, torch.bfloat16, "amx_bf16"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: flags)
        found, why = choose_dtype("auto", cpu)
        assert found == dtype
        assert reason in why


def test_devices_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto")[0].type == "cpu"
    with pytest.raises(ModelError, match="cuda is not available on this machine"):
        choose_device("cuda")
    with pytest.raises(ConfigError, match="unknown device 'gpu'"):
        choose_device("gpu")


def test_as_many_threads_as_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _pid: {0}, raising=False)
    assert machine.use_all_cores() == 1
