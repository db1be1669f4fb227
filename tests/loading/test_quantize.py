"""Bases that are quantized while they are read: against PEFT on the base that transformers quantizes."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lorasmith.config.lora import LoraConfig
from lorasmith.config.model import ModelConfig
from lorasmith.errors import ConfigError, MissingExtraError, ModelError
from lorasmith.loading import load as loading
from lorasmith.loading import quantize as quantizing
from lorasmith.loading.load import load_base
from lorasmith.loading.weights import weights_mib
from lorasmith.lora.inject import Adapter, inject
from lorasmith.lora.quantized import QuantizedEmbedding, QuantizedLinear, stored_bytes
from lorasmith.lora.target import is_tied
from lorasmith.model.base import Base
from lorasmith.model.forward import row_of
from lorasmith.model.head import loss_sum
from lorasmith.model.identity import identity
from lorasmith.model.row import Example
from lorasmith.model.verify import enable_fast_parts, use_fast_parts
from lorasmith.model.vocabulary import add_tokens, embedding_rows
from tests.support.experts import moe_folder
from tests.support.quantized_weights import FORMATS, wide_folder
from tests.support.tiny import Watch, model_folder, tokenizer

IDS = [7 * i % 290 for i in range(1, 41)]
DTYPES = ("float32", "bfloat16")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wide_folder(tmp_path_factory.mktemp("wide") / "model")


def load(folder: Path, form: Any, dtype: Any = "float32") -> Base:
    return load_base(ModelConfig(model=str(folder), quantize=form, dtype=dtype, device="cpu"))


def by_transformers(folder: Path, form: str, dtype: str) -> Any:
    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    own = {"load_in_8bit": True} if form == "int8" else {"load_in_4bit": True, **four}
    config = BitsAndBytesConfig(**own, bnb_4bit_compute_dtype=getattr(torch, dtype))
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=getattr(torch, dtype))


def with_lora(base: Base, **options: Any) -> Adapter:
    adapter = base.adapters["default"] = inject(base.model, LoraConfig(r=4, **options), base.router)
    return adapter


def ten_steps(parameters: list[nn.Parameter], loss_of: Any) -> Tensor:
    optimizer, losses = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0), []
    for _step in range(10):
        loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return torch.tensor(losses)


@pytest.mark.parametrize(
    ("form", "fast", "use_dora"),
    [
        *((form, fast, False) for form in FORMATS for fast in (True, False)),
        ("nf4", True, True),
    ],  # in PEFT 0.21, DoRA on int8 fails
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ten_steps_are_those_of_peft_on_the_same_base(
    wide: Path, form: str, dtype: str, fast: bool, use_dora: bool
) -> None:
    base = load(wide, form, dtype)
    adapter, theirs = with_lora(base, use_dora=use_dora), by_transformers(wide, form, dtype)
    theirs.model.embed_tokens.weight.data = base.model.get_input_embeddings().weight  # which only we quantize
    theirs.tie_weights()
    options = {"target_modules": "all-linear", "use_dora": use_dora}
    model = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=16, **options))
    named = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    named = {name.replace("magnitude_vector.weight", "magnitude_vector"): p for name, p in named.items()}
    assert named.keys() == adapter.parameters.keys()
    with torch.no_grad():
        for key, p in adapter.parameters.items():
            named[key].copy_(p)
    if fast:
        enable_fast_parts(base, "default", IDS[:16])
        assert {"head"} if use_dora else {"MLPs", "linear layers", "head"} <= base.fast_parts
    else:
        use_fast_parts(base, frozenset())
    targets = [*IDS[1:], -100]
    weights = [1.0] * (len(IDS) - 1) + [0.0]
    row = row_of(base, [Example(IDS, targets, weights, "")], float(len(IDS) - 1), "default")
    ours = ten_steps(list(adapter.parameters.values()), lambda: loss_sum(base, row))
    ids = torch.tensor([IDS])
    wanted = ten_steps(list(named.values()), lambda: model.train()(input_ids=ids, labels=ids).loss)
    assert wanted[0] - wanted[-1] > 0.02
    assert float(((ours - wanted) / wanted).abs().max()) < (1e-5 if dtype == "float32" else 1e-3)


def test_an_adapter_of_a_quantized_base_loads_in_peft(wide: Path, tmp_path: Path) -> None:
    from lorasmith.lora.files import save_adapter

    base = load(wide, "nf4")
    adapter = with_lora(base)
    with torch.no_grad():
        for p in adapter.parameters.values():
            p.normal_(0, 0.1)
    save_adapter(adapter, base.model, tmp_path, str(wide))
    theirs = by_transformers(wide, "nf4", "float32")
    theirs.model.embed_tokens.weight.data = base.model.get_input_embeddings().weight
    theirs.tie_weights()
    model = peft.PeftModel.from_pretrained(theirs, tmp_path).train()
    use_fast_parts(base, frozenset())
    row = row_of(base, [Example(IDS, [*IDS[1:], -100], [1.0] * len(IDS), "")], float(len(IDS) - 1), "default")
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([IDS]), labels=torch.tensor([IDS])).loss
        assert float(loss_sum(base, row)) == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_quantized(wide: Path, form: str) -> None:
    base = load(wide, form)
    modules = dict(base.model.named_modules())
    linear = {path for path, m in modules.items() if isinstance(m, QuantizedLinear)}
    theirs = by_transformers(wide, form, "float32")
    of_bitsandbytes = {
        path
        for path, m in theirs.named_modules()
        if type(m).__name__.startswith("Linear") and "bits" in type(m).__module__
    }
    assert linear == of_bitsandbytes | {"lm_head"}
    assert isinstance(modules["model.embed_tokens"], QuantizedEmbedding)
    assert modules["lm_head"].quantized is modules["model.embed_tokens"].quantized
    assert is_tied(base.model, modules["lm_head"])
    assert base.quantize == form
    assert not hasattr(base.model, "hf_quantizer")
    assert not hasattr(base.model.config, "quantization_config")
    assert base.identity == identity(wide, base.tokenizer) == load(wide, "none").identity


def test_no_unquantized_tensor_is_kept(wide: Path) -> None:
    model = load(wide, "nf4").model
    numbers = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    whole = sum(t.numel() * t.element_size() for t in load_file(wide / "model.safetensors").values())
    assert numbers < 0.35 * whole  # float32: a fourth of embedding and head, an eighth of the others, and the scales


@pytest.mark.parametrize("given", [["model.embed_tokens.weight", "lm_head.weight"], ["lm_head.weight"]])
def test_a_tied_weight_under_either_name(wide: Path, tmp_path: Path, given: list[str]) -> None:
    folder = Path(shutil.copytree(wide, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    shared = tensors.pop("model.embed_tokens.weight")
    save_file(tensors | {name: shared.clone() for name in given}, folder / "model.safetensors", {"format": "pt"})
    ends = load(folder, "nf4").model
    assert ends.lm_head.quantized is ends.model.embed_tokens.quantized
    assert torch.equal(ends.lm_head.weight, load(wide, "nf4").model.lm_head.weight)


def test_missing_weights_are_still_named(wide: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(wide, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"missing weights model\.layers\.1\.mlp\.up_proj\.weight"):
        load(folder, "nf4")


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize("form", FORMATS)
def test_families_learn(family: str, form: str) -> None:
    base = load(model_folder(family), form)
    adapter = with_lora(base)
    enable_fast_parts(base, "default", IDS[:16])
    row = row_of(base, [Example(IDS, [*IDS[1:], -100], [1.0] * len(IDS), "")], float(len(IDS)), "default")
    losses = ten_steps(list(adapter.parameters.values()), lambda: loss_sum(base, row))
    assert losses[-1] < losses[0] - 0.01


def test_added_tokens_get_rows_in_an_ordinary_embedding(wide: Path) -> None:
    base = load(wide, "nf4")
    before = base.model.get_input_embeddings().weight
    add_tokens(base, ["<new>"])
    embedding = base.model.get_input_embeddings()
    assert embedding_rows(base) == len(before) + 1
    assert torch.equal(embedding.weight[: len(before)], before)
    assert base.model.get_output_embeddings().weight is embedding.weight


@pytest.mark.parametrize("form", FORMATS)
def test_a_folder_that_transformers_quantized(wide: Path, tmp_path: Path, form: str) -> None:
    theirs = by_transformers(wide, form, "float32")
    theirs.save_pretrained(tmp_path)
    tokenizer("llama").save_pretrained(tmp_path)
    base = load(tmp_path, "none")
    own = load(wide, form)
    for path, module in base.model.named_modules():
        if isinstance(module, QuantizedLinear):
            assert torch.allclose(module.weight, own.model.get_submodule(path).weight, atol=1e-6)
    assert type(base.model.get_input_embeddings()) is nn.Embedding
    assert "lora_B" in next(iter(reversed(with_lora(base).parameters)))
    with pytest.raises(ConfigError, match=r"model\.quantize: the weights in .* are already quantized \(bitsandbytes\)"):
        load(tmp_path, "nf4")


def test_the_extra_is_named_where_it_is_missing(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda _name: None)
    with pytest.raises(MissingExtraError, match=r"model\.quantize: nf4 requires .* pip install 'lorasmith\[quant\]'\."):
        load(wide, "nf4")


def test_remove_marks_of_every_part(wide: Path) -> None:
    theirs = by_transformers(wide, "nf4", "float32")
    quantizing.convert_from_bitsandbytes(theirs, torch.float32)
    quantizing.remove_marks(theirs)
    assert theirs.config._is_quantized is False if hasattr(theirs.config, "_is_quantized") else True
    assert json.loads(theirs.config.to_json_string()).get("quantization_config") is None


def test_experts_stay_unquantized_and_that_is_told(tmp_path: Path) -> None:
    """Their weights are no linear layers. The estimate knows it, although the file has a matrix for each expert."""
    folder, watch = moe_folder(tmp_path / "moe", "mixtral"), Watch()
    base = load_base(ModelConfig(model=str(folder), quantize="nf4", dtype="float32", device="cpu"), watch)
    (text,) = watch.warned
    assert text.startswith("model.quantize: the weights of the experts stay in float32, since only linear layers are")
    stored = stored_bytes(base.model) / 2**20
    assert weights_mib(folder, torch.float32, "nf4") == pytest.approx(stored, rel=0.15)
    assert weights_mib(folder, torch.float32, "nf4") < weights_mib(folder, torch.float32)


def test_a_model_without_experts_is_loaded_without_a_warning(wide: Path) -> None:
    watch = Watch()
    load_base(ModelConfig(model=str(wide), quantize="int8", dtype="float32", device="cpu"), watch)
    assert watch.warned == []
