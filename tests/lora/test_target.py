"""Which modules a pattern matches, what is said where it matches none, and ties."""

import re
from typing import Any

import pytest
from transformers import PreTrainedModel

from lorasmith.config.lora import LoraConfig, is_name
from lorasmith.config.toml import load_config
from lorasmith.errors import ConfigError
from lorasmith.lora.expressions import ends_with
from lorasmith.lora.target import _in_last_layers, _too_many_layers, find_targets, is_tied
from tests.support.families import MAIN, tiny


def matched(model: PreTrainedModel, **options: Any) -> dict[str, list[str]]:
    return find_targets(model, LoraConfig(**options)).matched


def problems(family: str, **options: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        find_targets(tiny(family), LoraConfig(**options))
    return caught.value.problems


@pytest.mark.parametrize(
    ("family", "per_layer"), zip(MAIN, (7, 7, 7, 7, 4, 6, 4), strict=True)
)  # q k v o gate up down; c_attn c_proj c_fc c_proj; q k v out fc1 fc2; query_key_value dense and two more
def test_all_linear_is_every_linear_module_but_the_head(family: str, per_layer: int) -> None:
    paths = matched(tiny(family))["all-linear"]
    assert len(paths) == len(set(paths)) == 2 * per_layer
    assert not any("head" in path or "embed" in path for path in paths)


def test_names_match_the_end_of_paths_by_whole_parts() -> None:
    model = tiny("gpt2")
    found = matched(model, target_modules=("c_proj", "mlp.c_fc", "h.1.attn.c_attn"))
    assert {name: len(paths) for name, paths in found.items()} == {"c_proj": 4, "mlp.c_fc": 2, "h.1.attn.c_attn": 1}
    assert not ends_with("model.xq_proj", "q_proj")
    assert ends_with("lm_head", "lm_head")


def test_one_value_is_a_name_or_an_expression_for_the_whole_path() -> None:
    model = tiny("llama")
    assert len(matched(model, target_modules="q_proj")["q_proj"]) == 2
    expression = r"model\.layers\.1\..*_proj"
    assert len(matched(model, target_modules=expression)[expression]) == 7
    assert [is_name(p) for p in ("q_proj", "mlp.up_proj", ".*q_proj", "q_proj|v_proj")] == [True, True, False, False]


@pytest.mark.parametrize("option", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize("item", ["*.v_proj", ".*v_proj", "q_proj|v_proj"])
def test_several_names_are_never_expressions(option: str, item: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, {"lora": {option: ("q_proj", item)}})
    assert caught.value.problems == (
        f"lora.{option}: {item!r} is not a module name, and a list may only contain names; give a regular expression "
        "as a single value, such as '.*(q_proj|v_proj)'",
    )


def test_exclude_and_layers() -> None:
    model = tiny("llama")
    found = matched(model, exclude_modules=("q_proj", "mlp.up_proj"), layers_to_transform=(1,))["all-linear"]
    assert [path.rpartition(".")[2] for path in found] == ["k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    assert all(".layers.1." in path for path in found)
    by_expression = matched(model, exclude_modules=r".*\.mlp\..*")["all-linear"]
    assert not any("mlp" in path for path in by_expression)
    assert len(by_expression) == 8


def test_a_module_trained_whole_gets_no_lora_and_neither_does_what_is_in_it() -> None:
    targets = find_targets(tiny("llama"), LoraConfig(modules_to_save=("layers.0.mlp", "v_proj")))
    assert targets.saved == {
        "layers.0.mlp": ["model.layers.0.mlp"],
        "v_proj": ["model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"],
    }
    assert len(targets.adapted) == 14 - 3 - 2


def test_a_module_named_twice_is_adapted_once() -> None:
    targets = find_targets(tiny("llama"), LoraConfig(target_modules=("q_proj", "self_attn.q_proj")))
    assert len(targets.adapted) == 2
    assert len(targets.matched) == 2


# --- what is said -----------------------------------------------------------------------------------------------------


def test_a_misspelt_name_is_answered_with_the_nearest() -> None:
    assert problems("llama", target_modules=("q_porj",)) == (
        "lora.target_modules: 'q_porj' matches no module; this model has embed_tokens, q_proj, k_proj, v_proj, o_proj, "
        "gate_proj, up_proj, down_proj, lm_head. Did you mean 'q_proj'?",
    )


def test_an_expression_without_a_match_shows_a_path() -> None:
    (problem,) = problems("llama", target_modules=r"layers\.1")
    assert "matches no module" in problem
    assert "must match the whole path, such as 'model.layers.0.self_attn.q_proj'" in problem


def test_every_problem_comes_at_once() -> None:
    found = problems("llama", target_modules=("q_porj", "mlp", "v_proj"), modules_to_save=("lm_haed",))
    assert [re.split(r" matches ", p)[0] for p in found] == [
        "lora.modules_to_save: 'lm_haed'",
        "lora.target_modules: 'q_porj'",
        "lora.target_modules: 'mlp'",
    ]
    assert "Did you mean 'lm_head'?" in found[0]
    assert found[2] == (
        "lora.target_modules: 'mlp' matches model.layers.0.mlp, a LlamaMLP, but LoRA supports only "
        "Linear, Conv1D and Embedding. Name the modules inside it."
    )


def test_layers_that_are_not_there() -> None:
    (problem,) = problems("llama", layers_to_transform=(1, 2, 7))
    assert problem == "lora.layers_to_transform: layer 2, 7 does not exist; this model has layers 0 to 1."


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_last_layers(family: str) -> None:
    """The same modules as by number, in a model of two layers."""
    model = tiny(family)
    every = matched(model)["all-linear"]
    assert matched(model, last_layers=1)["all-linear"] == [
        path for path in every if re.search(r"\.(layers|h)\.1\.", path)
    ]
    assert matched(model, last_layers=2)["all-linear"] == every


def test_numbered_experts_are_no_layers() -> None:
    """The number of a layer is the first one in a path, and each stack counts for itself."""
    paths = [f"model.layers.{layer}.mlp.experts.{expert}.up" for layer in range(3) for expert in range(8)]
    paths += ["vision.blocks.0.fc", "vision.blocks.1.fc", "lm_head"]
    assert _in_last_layers(paths, 1, paths) == [*paths[16:24], "vision.blocks.1.fc"]
    assert _too_many_layers(3, paths) == []
    assert _too_many_layers(4, paths) == ["lora.last_layers: 4 layers are asked for, but this model has only 3."]


def test_the_last_layers_of_a_model_whose_last_ones_are_excluded() -> None:
    (problem,) = problems("llama", last_layers=1, exclude_modules=r".*layers\.1\..*")
    assert problem.startswith("lora.exclude_modules, lora.layers_to_transform and lora.last_layers exclude everything")


def test_more_layers_than_there_are() -> None:
    assert problems("llama", last_layers=3) == ("lora.last_layers: 3 layers are asked for, but this model has only 2.",)


def test_nothing_left() -> None:
    (problem,) = problems("llama", target_modules="q_proj", exclude_modules=("self_attn.q_proj",))
    assert problem.startswith("lora.exclude_modules, lora.layers_to_transform and lora.last_layers exclude everything")
    (problem,) = problems("llama", target_modules="lm_head", modules_to_save=("lm_head",))
    assert problem == "lora.target_modules: everything that 'lm_head' matches is already in modules_to_save"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"exclude_modules": ("q_porj",)},
            "lora.exclude_modules: 'q_porj' matches no module; .* Did you mean 'q_proj'",
        ),
        ({"exclude_modules": r"model\.layers\.0"}, "lora.exclude_modules: .* must match the whole path"),
        ({"rank_pattern": {"v_porj": 4}}, "lora.rank_pattern: 'v_porj' matches no module; .* Did you mean 'v_proj'"),
        ({"alpha_pattern": {"v_porj": 4}}, "lora.alpha_pattern: 'v_porj' matches no module; .* Did you mean 'v_proj'"),
        ({"rank_pattern": {"v_proj": 4}}, "lora.rank_pattern: 'v_proj' matches none of the modules in target_modules"),
    ],
)
def test_a_pattern_that_changes_nothing_is_said_unless_the_adapter_is_there_already(
    options: dict[str, Any], said: str
) -> None:
    (problem,) = problems("llama", target_modules="q_proj", **options)
    assert re.match(said, problem)
    assert find_targets(tiny("llama"), LoraConfig(target_modules="q_proj", **options), strict=False).adapted
    found = problems("llama", target_modules="k_porj", **options)
    assert len(found) == (1 if "none of the modules" in said else 2), "all problems come together"


# --- ties -------------------------------------------------------------------------------------------------------------


def test_ties_are_seen() -> None:
    tied, untied = tiny("gpt2"), tiny("llama")
    assert is_tied(tied, tied.transformer.wte)
    assert is_tied(tied, tied.lm_head)
    assert not is_tied(tied, tied.transformer.wpe)
    assert not is_tied(untied, untied.lm_head)


@pytest.mark.parametrize("family", ["gpt2", "opt", "bloom", "qwen2", "gemma3_text"])
def test_an_expression_that_also_hits_a_tied_end_is_refused_and_a_name_is_not(family: str) -> None:
    (problem,) = problems(family, target_modules=r"lm_h.*")
    assert problem == (
        "lora.target_modules: the expression 'lm_h.*' also matches lm_head, whose weight is tied to that "
        "of another module. To adapt it, give it in a list of names; otherwise exclude it."
    )
    assert matched(tiny(family), target_modules="lm_head") == {"lm_head": ["lm_head"]}
    assert matched(tiny(family), target_modules=("lm_head",)) == {"lm_head": ["lm_head"]}


def test_an_expression_may_hit_a_head_that_is_not_tied() -> None:
    assert matched(tiny("llama"), target_modules=r"lm_h.*") == {"lm_h.*": ["lm_head"]}


def test_an_expression_that_excludes_the_tied_end_is_fine() -> None:
    found = matched(tiny("bloom"), target_modules=r".*(dense|embeddings)", exclude_modules=("word_embeddings",))
    assert [path.rpartition(".")[2] for paths in found.values() for path in paths] == ["dense", "dense"]
