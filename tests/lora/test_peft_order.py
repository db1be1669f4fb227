"""What PEFT selects, and in which order."""

from lorasmith.config.lora import LoraConfig
from lorasmith.lora.peft_order import in_order, present
from tests.support.families import tiny_base


def test_the_paths_are_in_the_models_order_and_not_inside_what_is_trained_in_full() -> None:
    model = tiny_base("llama").model
    config = LoraConfig(target_modules=("up_proj", "q_proj", "embed_tokens"))
    core, targets = in_order(model, config, True, ["model.layers.1.mlp"])
    assert core.target_modules == (
        "model.embed_tokens", "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
    )  # fmt: skip
    assert "model.layers.1.mlp.up_proj" in targets.adapted
    assert core.target_parameters is None


def test_the_names_that_peft_adds_for_classifiers_need_not_be_there() -> None:
    model = tiny_base("llama").model
    assert present(model, ["classifier", "score", "lm_head"]) == ("lm_head",)
    assert present(model, ["score", "lm_head"]) == ("score", "lm_head")
