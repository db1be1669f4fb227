"""Options that select the same modules here and in PEFT, in both directions; PEFT itself is asked."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lorasmith.adapters.folder import AdapterFolder
from lorasmith.config.lora import LoraConfig
from lorasmith.errors import AdapterError
from lorasmith.lora.adapter_config import ADAPTER_CONFIG
from lorasmith.lora.files import save_adapter
from lorasmith.lora.inject import Adapter, inject, module_paths
from lorasmith.lora.peft_targets import (
    fitted,
    modules_to_save_of,
    saved_by_peft,
    selected_by_peft,
    target_modules_of,
)
from lorasmith.lora.router import Router
from lorasmith.lora.target import Targets
from lorasmith.model.base import Base
from tests.support.families import adapted, distance, own_logits, stir, tiny, tiny_base
from tests.support.llama_adapter import configure

pytestmark = [pytest.mark.usefixtures("exact"), pytest.mark.filterwarnings("ignore::UserWarning:peft")]

SIZES = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "max_position_embeddings": 64,
}  # fmt: skip
MAMBA = {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "conv_kernel": 4, "expand": 2, "chunk_size": 8}
UNUSUAL: dict[str, dict[str, Any]] = {  # with modules that are called like the number of a layer, and others
    "gemma3n_text": SIZES | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 99, "laurel_rank": 4,
                             "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"],
                             "activation_sparsity_pattern": [0.0, 0.0]},
    "zamba2": SIZES | {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
                       "mamba_d_state": 8, "n_mamba_heads": 4, "mamba_ngroups": 1, "adapter_rank": 4, "chunk_size": 8,
                       "use_shared_attention_adapter": True, "num_mem_blocks": 1, "attention_head_dim": 16},
    "mamba": SIZES | {"state_size": 4, "time_step_rank": 4},
    "mamba2": SIZES | MAMBA,
    "falcon_mamba": SIZES | {"state_size": 4, "time_step_rank": 4},
    "falcon_h1": SIZES | {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8,
                          "mamba_n_groups": 1, "mamba_chunk_size": 8},
    "nemotron_h": SIZES | {"hybrid_override_pattern": "M*-M", "num_hidden_layers": 4, "mamba_num_heads": 4,
                           "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8},
    "llama": SIZES,
    "mixtral": SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}  # fmt: skip
CHOICES: dict[str, dict[str, Any]] = {
    "all-linear": {"target_modules": "all-linear"},
    "last layer": {"target_modules": "all-linear", "last_layers": 1},
    "first layer": {"target_modules": "all-linear", "layers_to_transform": (0,)},
    "without some": {"target_modules": "all-linear", "exclude_modules": r".*\.1\..*"},
}


def unusual(family: str) -> PreTrainedModel:
    config = AutoConfig.for_model(family, **UNUSUAL[family])
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("family", UNUSUAL)
def test_what_is_written_selects_the_same_modules_in_peft(family: str, choice: str, tmp_path: Path) -> None:
    model = unusual(family)
    mine = copy.deepcopy(model)
    adapter = inject(mine, LoraConfig(r=2, **CHOICES[choice]), Router())
    stir(adapter)
    save_adapter(adapter, mine, tmp_path, "")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        theirs = peft.PeftModel.from_pretrained(model, tmp_path)
    kinds = (peft.tuners.lora.LoraLayer,)
    found = {p.removeprefix("base_model.model.") for p, m in theirs.named_modules() if isinstance(m, kinds)}
    found = {path.replace(".base_layer", "") for path in found} - adapter.targets.by_module.keys()
    assert found == set(adapter.targets.adapted)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "mlp.up_proj", "model.layers.1.self_attn.k_proj"]},
        {"target_modules": r".*\.1\.(self_attn|mlp)\..*_proj"},
        {"target_modules": ["up_proj", "q_proj"], "modules_to_save": ["mlp", "norm"]},
        {"target_modules": ["1", "proj"]},
    ],
)
def test_the_rule_is_pefts_own(options: dict[str, Any]) -> None:
    paths = module_paths(tiny("llama"))
    config = peft.LoraConfig(**options)
    theirs = {path for path in paths if check_target_module_exists(config, path)}  # an excluded one is false
    assert selected_by_peft(options["target_modules"], options.get("modules_to_save", ()), paths) == theirs


def test_the_end_of_another_path_is_told_apart() -> None:
    paths = ["", "own", "own.q", "deep", "deep.own", "deep.own.q"]
    adapter = Adapter("a", LoraConfig(modules_to_save=("own.q",)), Targets({"q": ["own.q"]}, {"own.q": ["own.q"]}))
    assert modules_to_save_of(adapter, paths) == ["base_model.model.own.q"]
    adapter = Adapter("a", LoraConfig(), Targets({"q": ["own.q"]}))
    assert target_modules_of(adapter, paths) == r"own\.q"
    assert selected_by_peft(r"own\.q", (), paths) == {"own.q"}
    assert modules_to_save_of(adapter, paths) is None


def stirred(config: peft.LoraConfig, family: str = "llama") -> Any:
    """PEFT's model with random weights in the adapter."""
    theirs = peft.get_peft_model(tiny(family), config)
    generator = torch.Generator().manual_seed(5)
    for p in theirs.parameters():
        if p.requires_grad:
            p.data += torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.2
    return theirs


def loaded(folder: Path, family: str = "llama") -> Base:
    base = tiny_base(family)
    AdapterFolder.read(folder).load_into(base, "default")
    return base


@pytest.mark.parametrize("names", [["norm"], ["layernorm", "head"], ["1.input_layernorm"], ["model.norm"]])
def test_modules_to_save_match_the_end_of_a_name_as_in_peft(names: list[str], tmp_path: Path) -> None:
    theirs = stirred(peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=names))
    theirs.save_pretrained(tmp_path)
    base = loaded(tmp_path)
    assert distance(own_logits(base), own_logits(theirs)) < 1e-12
    saved = [path for found in base.adapters["default"].targets.saved.values() for path in found]
    assert saved == saved_by_peft(names, module_paths(base.model))
    save_adapter(base.adapters["default"], base.model, tmp_path, "")
    again = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path)
    assert distance(own_logits(again), own_logits(theirs)) < 1e-12


def test_our_names_in_modules_to_save_are_whole_and_so_is_what_is_written(tmp_path: Path) -> None:
    base, adapter = adapted("llama", target_modules=("q_proj",), modules_to_save=("norm",))
    assert adapter.targets.saved == {"norm": ["model.norm"]}
    save_adapter(adapter, base.model, tmp_path, "")
    assert json.loads((tmp_path / ADAPTER_CONFIG).read_text())["modules_to_save"] == ["model.norm"]
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path)
    assert distance(own_logits(base), own_logits(theirs)) < 1e-12
    configure(tmp_path, modules_to_save=["norm"])  # as earlier versions of lorasmith wrote it
    assert torch.equal(own_logits(loaded(tmp_path)), own_logits(base))


@pytest.mark.parametrize(
    "extra",
    [
        {"target_modules": ["q_proj", "c_attn", "k_proj"], "modules_to_save": ["lm_head", "score"]},
        {"target_modules": ["q_proj", "k_proj", "lm_head"]},
        {"target_modules": ["q_proj", "k_proj"], "modules_to_save": ["lm_head"], "exclude_modules": ["fc1", "fc2"]},
        {"target_modules": ["q_proj", "k_proj"], "modules_to_save": ["lm_head"], "layers_to_transform": [0, 1, 2, 31]},
    ],
)
def test_names_that_this_model_lacks_do_not_matter_if_the_tensors_fit(extra: dict[str, Any], tmp_path: Path) -> None:
    given = {"target_modules": ["q_proj", "k_proj"], "modules_to_save": ["lm_head"]}
    theirs = stirred(peft.LoraConfig(task_type="CAUSAL_LM", **given))
    theirs.save_pretrained(tmp_path)
    configure(tmp_path, **given | extra)
    base = loaded(tmp_path)
    assert distance(own_logits(base), own_logits(theirs)) < 1e-12


def test_if_nothing_is_left_every_name_is_told(folder: Path) -> None:
    configure(folder, target_modules=["c_attn", "c_fc"], modules_to_save=["score"])
    with pytest.raises(AdapterError) as caught:
        loaded(folder)
    texts = [problem.partition(": ")[2] for problem in caught.value.problems]
    assert [text.partition(" matches")[0] for text in texts] == [
        "lora.modules_to_save: 'score'", "lora.target_modules: 'c_attn'", "lora.target_modules: 'c_fc'",
    ]  # fmt: skip


@pytest.mark.parametrize("pattern", ["layers", ["layers", "h"], ["nothing", "layers"]])
def test_layers_pattern_says_which_number_is_that_of_the_layer(pattern: str | list[str], tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": pattern}
    theirs = stirred(peft.LoraConfig(task_type="CAUSAL_LM", **options))
    theirs.save_pretrained(tmp_path)
    base = loaded(tmp_path)
    assert base.adapters["default"].targets.adapted == ["model.layers.1.self_attn.q_proj"]
    assert distance(own_logits(base), own_logits(theirs)) < 1e-12


def test_layers_pattern_in_a_model_with_experts() -> None:
    paths = [f"model.layers.{i}.experts.{j}.w1" for i in (0, 1) for j in (0, 1)]
    config, raw = LoraConfig(target_modules=("w1",), layers_to_transform=(1,)), {"layers_pattern": "experts"}
    assert fitted(config, raw, paths, ()).target_modules == tuple(path for path in paths if ".experts.1." in path)
    assert fitted(config, {}, paths, ()) == config
