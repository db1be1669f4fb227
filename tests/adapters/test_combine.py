"""Combined adapter folders: what they answer here, in PEFT and merged, and that nothing half-written stays."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lorasmith.adapters.combine import Combination, combine_adapters
from lorasmith.adapters.folder import NAME, AdapterFolder, write_adapter
from lorasmith.adapters.merge import merge_run
from lorasmith.adapters.session import open_adapters
from lorasmith.config.combine import CombineConfig
from lorasmith.config.lora import LoraConfig
from lorasmith.config.model import ModelConfig
from lorasmith.data.template.encoding import Template
from lorasmith.errors import AdapterError, RunError
from lorasmith.loading.load import load_base
from lorasmith.lora.inject import inject
from lorasmith.lora.merge import merged_weights
from lorasmith.system.transformers_logging import quiet_transformers
from tests.support.families import distance, logits_of, stir
from tests.support.peft_folder import foreign, peft_folder
from tests.support.tiny import model_folder

FLOAT32 = ModelConfig(dtype="float32")


def adapter_of(folder: Path, seed: int, family: str = "llama", base_seed: int = 0, **options: Any) -> Path:
    """An adapter folder with random weights, as a training would leave it."""
    base = load_base(ModelConfig(model=str(model_folder(family, base_seed)), dtype="float32", device="cpu"))
    system = options.pop("system", "")
    adapter = inject(base.model, LoraConfig(**({"r": 4} | options)), base.router)
    stir(adapter, seed)
    base.adapters["default"] = adapter
    template = Template.of(base.tokenizer, options.pop("template", "auto"), system=system)
    write_adapter(base, "default", template, folder, {"dtype": "float32", "data": [f"{folder.name}.jsonl"]})
    return folder


def plain(family: str = "llama") -> PreTrainedModel:
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(model_folder(family), dtype=torch.float32).eval()


def by_hand(adapters: list[tuple[Path, float]], family: str = "llama") -> Tensor:
    """The logits of W + sum of w_i (W_i - W), with dense matrices in float64."""
    model = plain(family)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # LoRA of an embedding unties it
    weights = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    total = dict(weights)
    for path, weight in adapters:
        session = open_adapters([path], FLOAT32)
        for name, merged in merged_weights(session.base.model, session.base.adapters[session.names[0]]).items():
            total[name] = total[name] + weight * (merged - weights[name])
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(total[name])
    return logits_of(model)


def here(folder: Path) -> Tensor:
    return logits_of(open_adapters([folder], FLOAT32).base)


def test_the_base_is_loaded_as_in_the_training_of_the_parts(tmp_path: Path) -> None:
    """Quantized, if it was: the unquantized one may not fit into the memory."""
    one, two = adapter_of(tmp_path / "one", 1), adapter_of(tmp_path / "two", 2)
    for folder in (one, two):
        stored = json.loads((folder / NAME).read_text())
        stored["notes"]["quantize"] = "int8"
        (folder / NAME).write_text(json.dumps(stored))
    result = combine_adapters([(one, 1.0), (two, 0.5)], tmp_path / "both")
    assert AdapterFolder.read_header(Path(result.folder)).notes["quantize"] == "int8"


def in_peft(folder: Path, family: str = "llama") -> Tensor:
    return logits_of(peft.PeftModel.from_pretrained(plain(family), folder).eval())


def combined(
    adapters: list[tuple[Path, float]], output: Path, model: ModelConfig | None = None, **options: Any
) -> Combination:
    return combine_adapters(adapters, output, CombineConfig(**options), model)


CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {}, {"r": 7, "lora_alpha": 3}),
    ("llama", {"use_rslora": True}, {"target_modules": ("q_proj", "down_proj")}),
    ("llama", {"rank_pattern": {"q_proj": 9}, "alpha_pattern": {"v_proj": 3}}, {"exclude_modules": "q_proj", "r": 2}),
    ("llama", {"target_modules": ("embed_tokens", "q_proj")}, {"last_layers": 1}),
    ("gpt2", {"target_modules": ("c_attn", "c_fc")}, {"target_modules": ("wte", "c_attn"), "r": 2}),
    ("qwen2", {"use_rslora": True, "r": 6}, {}),
]


@pytest.mark.parametrize(("family", "first", "second"), CASES)
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -0.4)])
def test_cat_answers_as_the_exact_sum_here_and_in_peft(tmp_path, family, first, second, weights):
    adapters = [
        (adapter_of(tmp_path / "one", 1, family, **first), weights[0]),
        (adapter_of(tmp_path / "two", 2, family, **second), weights[1]),
    ]
    result = combined(adapters, tmp_path / "out")
    wanted = by_hand(adapters, family)
    assert distance(logits_of(plain(family)), wanted) > 0.01, "the adapters change too little"
    assert distance(here(tmp_path / "out"), wanted) < 1e-4
    assert distance(in_peft(tmp_path / "out", family), wanted) < 1e-4
    assert result.error < 1e-6
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == result.rank
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert not list(tmp_path.glob(".*"))


def test_what_the_folder_records(tmp_path):
    one, two = adapter_of(tmp_path / "one", 1), adapter_of(tmp_path / "two", 2)
    combined([(one, 0.5), (two, 2.0)], tmp_path / "out", method="svd", rank=3)
    folder, first = AdapterFolder.read(tmp_path / "out"), AdapterFolder.read(one)
    assert folder.metadata is not None
    assert first.metadata is not None
    assert folder.metadata["template"] == first.metadata["template"]
    assert folder.metadata["base"] == first.metadata["base"]
    notes = folder.notes["combined"]
    assert (notes["method"], notes["rank"]) == ("svd", 3)
    assert [(part["folder"], part["weight"]) for part in notes["adapters"]] == [(str(one), 0.5), (str(two), 2.0)]
    assert [part["sha256"] for part in notes["adapters"]] == [first.hash, AdapterFolder.read(two).hash]
    assert folder.notes["data"] == ["one.jsonl", "two.jsonl"]
    assert json.loads((tmp_path / "out" / ".lorasmith").read_text())["folder"] == "adapter"
    assert folder.config.r == 3


def test_the_combination_can_be_merged_and_combined_again(tmp_path):
    one, two = adapter_of(tmp_path / "one", 1), adapter_of(tmp_path / "two", 2)
    combined([(one, 0.5), (two, 0.5)], tmp_path / "half")
    assert merge_run(tmp_path / "half", tmp_path / "merged", FLOAT32).holds
    combined([(tmp_path / "half", 2.0), (two, -1.0)], tmp_path / "again", method="svd", rank=4)
    assert distance(here(tmp_path / "again"), here(one)) < 1e-4


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties_svd", "magnitude_prune_svd"])
def test_the_printed_error_is_that_of_the_dense_matrices(tmp_path, method):
    adapters = [(adapter_of(tmp_path / "one", 1), 1.0), (adapter_of(tmp_path / "two", 2), 0.5)]
    density = None if method == "linear" else 0.4
    result = combined(adapters, tmp_path / "out", method=method, density=density)

    def deltas(folder: Path) -> dict[str, Tensor]:
        tensors, scaling = load_file(folder / "adapter_model.safetensors"), AdapterFolder.read(folder).config
        factor = scaling.scaling(scaling.r, scaling.lora_alpha)
        pairs = {key: key.replace("lora_A", "lora_B") for key in tensors if "lora_A" in key}
        return {a: factor * tensors[b].double() @ tensors[a].double() for a, b in pairs.items()}

    parts = [(deltas(path), weight) for path, weight in adapters]
    found, wrong, size = deltas(tmp_path / "out"), 0.0, 0.0
    for layer in result.layers:
        key = f"base_model.model.{layer.path}.lora_A.weight"
        exact = sum((weight * part[key] for part, weight in parts), torch.zeros(()))
        error = float((found[key] - exact).norm())
        assert error == pytest.approx(layer.error, rel=1e-5)
        assert float(exact.norm()) == pytest.approx(layer.norm, rel=1e-6)
        wrong, size = wrong + error**2, size + float(exact.norm()) ** 2
    assert result.error == pytest.approx((wrong / size) ** 0.5, rel=1e-5)
    assert result.error > 0.05


def test_dare_draws_the_same_with_the_same_seed(tmp_path):
    adapters = [(adapter_of(tmp_path / "one", 1), 1.0), (adapter_of(tmp_path / "two", 2), 1.0)]
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        combined(adapters, tmp_path / name, method="dare_linear", density=0.5, seed=seed)
    a, b, c = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_an_embedding_that_one_of_them_trained_in_full_is_kept(tmp_path):
    one = adapter_of(tmp_path / "one", 1, modules_to_save=("lm_head",), target_modules=("q_proj",))
    two = adapter_of(tmp_path / "two", 2, target_modules=("v_proj",))
    adapters = [(one, 1.0), (two, 0.5)]
    assert not combined(adapters, tmp_path / "out").can_be_compared
    wanted = by_hand(adapters)
    assert distance(here(tmp_path / "out"), wanted) < 1e-4
    assert distance(in_peft(tmp_path / "out"), wanted) < 1e-4


@pytest.mark.parametrize(
    "options", [{"modules_to_save": ["embed_tokens", "lm_head"]}, {"trainable_token_indices": [300, 301]}]
)
def test_added_tokens_of_another_tool_are_kept(tmp_path, options):
    theirs = foreign(tmp_path / "one", "llama", **options)
    two = peft_folder(tmp_path / "two", target_modules=["v_proj"])
    combine_adapters([(tmp_path / "one", 1.0), (two, 0.5)], tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "one" / "tokenizer.json").read_bytes()
    session = open_adapters([tmp_path / "out"], FLOAT32)
    assert "<|a|>" in session.template.tokenizer.get_vocab()
    tensors = load_file(two / "adapter_model.safetensors")
    for key in [key for key in tensors if "lora_A" in key]:
        layer = theirs.get_submodule(key.removesuffix(".lora_A.weight"))
        layer.weight.data += 0.5 * 2 * tensors[key.replace("lora_A", "lora_B")] @ tensors[key]  # alpha 8, r 4
    assert distance(logits_of(session.base), logits_of(theirs)) < 1e-4


def test_folders_of_peft_alone_make_a_folder_for_peft(tmp_path):
    one = peft_folder(tmp_path / "one", target_modules=["q_proj"], use_rslora=True)
    two = peft_folder(tmp_path / "two", target_modules="all-linear", r=2)
    combine_adapters([(one, 0.5), (two, 1.0)], tmp_path / "out", model=ModelConfig(model=str(model_folder())))
    assert not (tmp_path / "out" / NAME).exists()
    config = ModelConfig(model=str(model_folder()), dtype="float32")
    session = open_adapters([tmp_path / "out"], config)
    assert distance(logits_of(session.base), in_peft(tmp_path / "out")) < 1e-5


def test_the_base_model_is_checked_if_it_is_given(tmp_path):
    one, two = adapter_of(tmp_path / "one", 1), adapter_of(tmp_path / "two", 2)
    other = ModelConfig(model=str(model_folder("llama", 1)))
    with pytest.raises(AdapterError, match="is not the base model that this adapter was trained on"):
        combine_adapters([(one, 1.0), (two, 1.0)], tmp_path / "out", model=other)
    with pytest.raises(AdapterError, match="this model has wte"):
        combine_adapters(
            [(peft_folder(tmp_path / "p"), 1.0)], tmp_path / "out", model=ModelConfig(model=str(model_folder("gpt2")))
        )
    assert not (tmp_path / "out").exists()
    combine_adapters([(one, 1.0), (two, 1.0)], tmp_path / "out", model=ModelConfig(model=str(model_folder())))
    assert (tmp_path / "out" / NAME).exists()


@pytest.mark.parametrize("options", [{}, {"method": "svd"}, {"method": "linear"}])
def test_adapters_that_cancel_each_other_out_are_refused(tmp_path, options):
    one = adapter_of(tmp_path / "one", 1)
    with pytest.raises(AdapterError, match=r"^Nothing is left of the adapters: they cancel each other out"):
        combined([(one, 1.0), (one, -1.0)], tmp_path / "out", **options)
    with pytest.raises(AdapterError, match="the density is too small"):
        combined([(one, 1.0)], tmp_path / "out", method="magnitude_prune", density=1e-6)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_combined_or_not_ours_is_not_replaced(tmp_path):
    one, two = adapter_of(tmp_path / "one", 1), adapter_of(tmp_path / "two", 2)
    with pytest.raises(RunError, match="one already exists"):
        combined([(one, 1.0), (two, 1.0)], one)
    with pytest.raises(RunError, match="was not written by lorasmith"):
        combine_adapters([(one, 1.0), (two, 1.0)], one, overwrite=True)
    combined([(one, 1.0), (two, 1.0)], tmp_path / "out")
    with pytest.raises(RunError, match="contains files that are still needed"):
        combine_adapters([(tmp_path / "out", 1.0), (two, 1.0)], tmp_path / "out", overwrite=True)
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    combine_adapters([(one, 0.3), (two, 1.0)], tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() != before
