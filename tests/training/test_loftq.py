"""LoftQ's start against PEFT's `replace_lora_weights_loftq` on the same NF4 base, and against float64; and in a run."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils import loftq_utils
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from lorasmith.config.lora import LoraConfig
from lorasmith.config.model import ModelConfig
from lorasmith.config.toml import Config
from lorasmith.errors import ConfigError
from lorasmith.loading.load import load_base
from lorasmith.lora.files import save_adapter
from lorasmith.lora.inject import inject
from lorasmith.lora.layer import LoRALayer
from lorasmith.lora.saved_values import has_moved
from lorasmith.model.base import Base
from lorasmith.training.loftq import refuse_without_error, start_from_errors, start_loftq
from tests.support.families import CONFIGS, distance, logits_of, own_logits
from tests.support.tiny import Crash, Watch, adapter_bytes, crash_at, losses, metrics, tokenizer, trained

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
WIDE = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "max_position_embeddings": 256}  # fmt: skip
IDS = torch.tensor([[7 * i % 290 for i in range(1, 41)]])
QUANTIZED = "self_attn.q_proj"


def model_of(folder: Path, family: str = "llama", **options: Any) -> Path:
    """A model whose rows are whole blocks of 64: bitsandbytes 0.50 computes others wrongly on a CPU."""
    own = {"n_embd": 64} if family == "gpt2" else WIDE
    torch.manual_seed(0)
    options = CONFIGS[family] | own | {"vocab_size": len(tokenizer(family))} | options
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options))
    for p in model.parameters():
        p.data.normal_(1.0 if p.dim() == 1 else 0.0, 0.1)
    model.save_pretrained(folder)
    tokenizer(family).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_of(tmp_path_factory.mktemp("wide") / "model", tie_word_embeddings=True)


def load(folder: Path, form: Any = "nf4") -> Base:
    return load_base(ModelConfig(model=str(folder), quantize=form, dtype="float32", device="cpu"))


def fresh(folder: Path, form: Any = "nf4", **options: Any) -> Base:
    base = load(folder, form)
    config = LoraConfig(**({"r": 8, "lora_alpha": 8, "init_lora_weights": "loftq"} | options))
    base.adapters["default"] = inject(base.model, config, base.router)
    return base


def started(folder: Path, form: Any = "nf4", **options: Any) -> Base:
    base = fresh(folder, form, **options)
    assert start_from_errors(base, "default") == []
    return base


def updates(base: Base) -> dict[str, Any]:
    return {p: m.updates["default"] for p, m in base.model.named_modules() if isinstance(m, LoRALayer)}


def product(update: Any) -> Tensor:
    A, B = update.own_matrices
    return (update.scaling * B.double() @ A.double()).detach()


def by_transformers(folder: Path, base: Base) -> Any:
    """The same NF4 base of transformers and bitsandbytes, with our embedding, which they do not quantize."""
    four = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=four, dtype=torch.float32)
    model.model.embed_tokens.weight.data = base.model.get_input_embeddings().weight
    model.tie_weights()
    return model


def test_the_products_are_those_of_peft(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = started(wide)
    theirs = peft.get_peft_model(
        by_transformers(wide, base), peft.LoraConfig(r=8, lora_alpha=8, target_modules="all-linear")
    )
    on_cpu(monkeypatch)
    peft.replace_lora_weights_loftq(theirs, model_path=str(wide / "model.safetensors"))
    ours = updates(base)
    assert len(ours) == 14
    for path, update in ours.items():
        layer = theirs.get_submodule(f"base_model.model.{path}")
        wanted = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach().double()
        assert distance(product(update), wanted) < 1e-4, path


def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT moves each weight to "cuda" for this, whatever the machine has."""
    own = Tensor.to
    monkeypatch.setattr(
        Tensor, "to", lambda self, *args, **given: own(self, *args, **given | ({"device": "cpu"} if given else {}))
    )
    monkeypatch.setattr(loftq_utils, "is_bnb_4bit_available", lambda: True)


@pytest.mark.parametrize("form", ["nf4", "int8"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_and_b_are_the_best_approximation_of_the_error(family: str, form: str, tmp_path: Path) -> None:
    folder, name = model_of(tmp_path / "model", family), QUANTIZED if family == "llama" else "c_attn"
    base = started(folder, form, lora_alpha=24, rank_pattern={name: 3}, use_rslora=True)
    plain = load(folder, "none").model
    for path, update in updates(base).items():
        layer, original = base.model.get_submodule(path).base_layer, plain.get_submodule(path)
        W = original.weight.double()
        error = (W if isinstance(original, nn.Linear) else W.t()) - layer.quantized.dequantized(torch.float32).double()
        U, S, Vh = torch.linalg.svd(error, full_matrices=False)
        r = len(update.own_matrices[0])
        assert r == (3 if path.endswith(name) else 8)
        assert distance(product(update), U[:, :r] * S[:r] @ Vh[:r]) < 1e-4, path


def test_directions_without_error_stay_as_in_the_default_start(wide: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model = AutoModelForCausalLM.from_pretrained(wide)
    name = f"model.layers.0.{QUANTIZED}"
    model.get_submodule(name).weight.data.zero_()
    model.save_pretrained(folder)
    tokenizer("llama").save_pretrained(folder)
    base = started(folder)
    A, B = updates(base)[name].own_matrices
    A0, _B0 = updates(fresh(folder))[name].own_matrices
    assert torch.equal(A, A0)
    assert A.all()
    assert not B.any()


def test_the_logits_come_nearer_to_those_of_the_unquantized_model(wide: Path) -> None:
    whole, plain = logits_of(load(wide, "none")), logits_of(load(wide))
    wanted = [distance(logits_of(started(wide, r=r, lora_alpha=16)), whole) for r in (8, 48)]
    assert wanted[1] < wanted[0] < 0.97 * distance(plain, whole)


def test_dora_starts_at_the_same_output(wide: Path) -> None:
    assert distance(logits_of(started(wide, use_dora=True)), logits_of(started(wide))) < 1e-5


def test_it_is_saved_as_plain_lora_and_loads_in_peft(wide: Path, tmp_path: Path) -> None:
    base = started(wide, lora_alpha=16)
    assert has_moved(base.adapters["default"], base.model)
    save_adapter(base.adapters["default"], base.model, tmp_path, str(wide))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["init_lora_weights"] is True
    theirs = peft.PeftModel.from_pretrained(by_transformers(wide, base), tmp_path).train()
    assert distance(logits_of(base, IDS), own_logits(theirs, IDS).detach()) < 1e-5
    assert distance(logits_of(base, IDS), logits_of(load(wide), IDS)) > 1e-3


def test_where_it_does_not_apply_is_said(wide: Path) -> None:
    report, config = Watch(), Config(lora=LoraConfig(init_lora_weights="loftq", target_modules=("q_proj", "lm_head")))
    base = load(wide)
    base.adapters["default"] = inject(base.model, config.lora, base.router)
    start_loftq(base, "default", config, report)
    (text,) = report.warned
    assert "'loftq' does not apply to 1 layers, such as lm_head: they are not quantized, or share" in text
    assert not updates(base)["lm_head"].own_matrices[1].any()
    assert updates(base)[f"model.layers.0.{QUANTIZED}"].own_matrices[1].any()


def test_a_base_without_errors_or_without_originals_is_refused(wide: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'loftq' starts from the error of quantizing.*--quantize nf4, or use 'pis"):
        trained(tmp_path / "run", init_lora_weights="loftq")
    by_transformers(wide, load(wide)).save_pretrained(tmp_path / "small")
    tokenizer("llama").save_pretrained(tmp_path / "small")
    base = load(tmp_path / "small", "none")
    with pytest.raises(
        ConfigError, match=r"'loftq' needs the original weights, but those in .* \(bitsandbytes\)\. Use"
    ):
        refuse_without_error(base, LoraConfig(init_lora_weights="loftq"))
    refuse_without_error(base, LoraConfig())


def test_a_run_resumes_bit_for_bit_and_is_continued(wide: Path, tmp_path: Path) -> None:
    changes = {"model": str(wide), "quantize": "nf4", "init_lora_weights": "loftq", "save_every": 1, "r": 4}
    trained(tmp_path / "whole", **changes)
    trained(tmp_path / "plain", **changes | {"init_lora_weights": "default"})
    assert losses(tmp_path / "whole")[0] != losses(tmp_path / "plain")[0], "B A is not zero"
    with pytest.raises(Crash):
        trained(tmp_path / "run", crash_at(3), **changes)
    trained(tmp_path / "run", resume=True, **changes)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")
    more = {key: value for key, value in changes.items() if key not in ("r", "init_lora_weights")}
    trained(tmp_path / "more", start_from=str(tmp_path / "whole"), learning_rate=1e-9, **more)
    before, after = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("whole", "more"))
    assert max(distance(after[key], before[key]) for key in before) < 1e-5, "nothing starts anew"
