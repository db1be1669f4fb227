"""Adapters on a model: counted, side by side, switched, taken off; the tutorial's case; ties."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BloomConfig, BloomForCausalLM

from lorasmith.config.lora import LoraConfig
from lorasmith.errors import AdapterError, ConfigError
from lorasmith.lora.inject import count, inject, remove
from lorasmith.lora.layer import LoRALayer, SavedModule
from lorasmith.lora.merge import merged_weights
from lorasmith.lora.router import Router
from lorasmith.model.head import loss_sum
from lorasmith.model.probe import native_attention
from tests.support.families import adapted, distance, examples, logits_of, one_row, stir, tiny, tiny_base


def test_a_bloom_of_the_tutorials_shape() -> None:
    with torch.device("meta"):
        model = BloomForCausalLM(BloomConfig(vocab_size=42437, hidden_size=1024, n_layer=24, n_head=16))
    config = LoraConfig(
        target_modules=r".*\.1.*query_key_value",
        r=8,
        lora_alpha=32,
        lora_dropout=0.1,
        modules_to_save=("word_embeddings",),
    )
    adapter = inject(model, config, Router())
    assert str(count(model, adapter)) == (
        "trainable params: 43,815,936 || all params: 389,584,896 || trainable%: 11.2468"
    )
    layers = [int(path.split(".")[2]) for path in adapter.targets.matched[r".*\.1.*query_key_value"]]
    assert layers == [1, *range(10, 20)]  # eleven of them; the tutorial believes one
    assert adapter.targets.saved == {"word_embeddings": ["transformer.word_embeddings"]}
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(names) == 2 * 11 + 1
    assert "transformer.word_embeddings.modules_to_save.default.weight" in names
    assert "transformer.h.19.self_attention.query_key_value.lora_A.default.weight" in names


def test_a_rank_that_no_layer_can_have_is_refused_before_anything_is_made() -> None:
    base = tiny_base("llama")
    widths = [min(m.weight.shape) for m in base.model.modules() if isinstance(m, nn.Linear)]
    for options in ({"r": 1_000_000}, {"r": max(widths) + 1}, {"rank_pattern": {"v_proj": 900_000}}):
        with pytest.raises(ConfigError, match=rf"_proj would have rank \d+, but .* can have at most {max(widths)}"):
            inject(base.model, LoraConfig(**options), base.router)
    assert not any(isinstance(module, LoRALayer) for module in base.model.modules())
    inject(base.model, LoraConfig(r=max(widths)), base.router)  # beyond some of the layers alone, as PEFT takes it


def test_the_tutorials_embedding_is_trained_in_a_copy_and_the_head_stays() -> None:
    base = tiny_base("bloom")
    adapter = inject(base.model, LoraConfig(modules_to_save=("word_embeddings",)), base.router)
    model = base.model
    embedding = model.get_submodule("transformer.word_embeddings")
    assert isinstance(embedding, SavedModule)
    copy = embedding.modules_to_save["default"].weight
    assert model.lm_head.weight is embedding.original_module.weight
    assert copy is not model.lm_head.weight
    assert copy is adapter.parameters["base_model.model.transformer.word_embeddings.weight"]
    assert (copy.requires_grad, model.lm_head.weight.requires_grad) == (True, False)
    before = model.lm_head.weight.clone()
    loss_sum(base, one_row(examples())).backward()
    torch.optim.SGD(adapter.parameters.values(), lr=0.1).step()
    assert torch.equal(model.lm_head.weight, before)
    assert not torch.equal(copy, before)
    merged = merged_weights(model, adapter)
    assert torch.equal(merged["transformer.word_embeddings.weight"], copy)
    assert "lm_head.weight" not in merged, "only one end of the tie is another now"


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_counts(family: str) -> None:
    base, adapter = adapted(family, r=4, target_modules="lm_head")
    trainable, total = count(base.model, adapter)
    assert trainable == 4 * (32 + 99) == sum(p.numel() for p in base.model.parameters() if p.requires_grad)
    assert total == trainable + sum(p.numel() for p in tiny(family).parameters())


# --- several adapters -------------------------------------------------------------------------------------------------


class NoTensors(TorchDispatchMode):
    """Fails at any operation on tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} was called")


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_several_adapters_of_different_ranks_each_as_alone_and_switched_without_touching_a_tensor(family: str) -> None:
    base, alone = tiny_base(family), {}
    settings = {"a": {"r": 2}, "b": {"r": 5, "use_rslora": True}, "c": {"target_modules": "lm_head", "lora_alpha": 3.0}}
    for seed, (name, options) in enumerate(settings.items()):
        stir(inject(base.model, LoraConfig(**options), base.router, name), seed)
        one = tiny_base(family)
        stir(inject(one.model, LoraConfig(**options), one.router), seed)
        alone[name] = logits_of(one)
    for name in ("b", "a", "c", "b"):
        with NoTensors():
            base.router.active = name
        assert distance(logits_of(base), alone[name]) < 1e-13
    with NoTensors():
        base.router.active = None
    assert torch.equal(logits_of(base), logits_of(tiny(family)))


def test_patterns_see_the_paths_of_the_base_beside_another_adapter() -> None:
    base, first = adapted("llama", modules_to_save=("lm_head",))
    second = inject(base.model, LoraConfig(modules_to_save=("lm_head",)), base.router, "second")
    assert second.targets == first.targets
    assert second.parameters.keys() == first.parameters.keys()
    assert not {id(p) for p in first.parameters.values()} & {id(p) for p in second.parameters.values()}
    assert all(p.requires_grad for p in first.parameters.values())
    expression = inject(
        base.model, LoraConfig(target_modules=r"model\.layers\.0\.mlp\.[a-z]+_proj"), base.router, "third"
    )
    assert len(expression.targets.adapted) == 3


def test_a_removed_adapter_leaves_the_others_and_the_base() -> None:
    base, _first = adapted("llama", modules_to_save=("lm_head",), target_modules=("q_proj", "embed_tokens"))
    before = logits_of(base)
    stir(inject(base.model, LoraConfig(modules_to_save=("lm_head",)), base.router, "second"), 3)
    remove(base.model, "second")
    base.router.active = "default"
    assert torch.equal(logits_of(base), before)
    remove(base.model, "default")
    assert torch.equal(logits_of(base), logits_of(tiny("llama")))
    assert [type(m) for m in base.model.modules()] == [type(m) for m in tiny("llama").modules()]
    assert not any(p.requires_grad for p in base.model.parameters())
    again = inject(base.model, LoraConfig(r=2), base.router)
    assert len(again.parameters) == 28


def test_an_adapter_has_one_name_and_no_dot_in_it() -> None:
    base, _first = adapted("llama")
    with pytest.raises(AdapterError, match="'default' is already in use or contains a dot"):
        inject(base.model, LoraConfig(), base.router)
    with pytest.raises(AdapterError, match=r"'v1\.2' is already in use or contains a dot"):
        inject(base.model, LoraConfig(), base.router, "v1.2")


def test_a_module_is_not_trained_whole_by_one_and_adapted_by_another() -> None:
    for first, second, said in (
        ({"modules_to_save": ("lm_head",)}, {"target_modules": "lm_head"}, "trains this module in full"),
        ({"target_modules": "lm_head"}, {"modules_to_save": ("lm_head",)}, "has LoRA on this module"),
        (
            {"target_modules": "up_proj"},
            {"target_modules": "q_proj", "modules_to_save": ("layers.1.mlp",)},
            "has LoRA on this module",
        ),
        ({"modules_to_save": ("layers.1.mlp",)}, {"target_modules": "up_proj"}, "trains this module in full"),
    ):
        base, _first = adapted("llama", **first)
        before = logits_of(base)
        with pytest.raises(AdapterError, match=f"^[a-z_1.]+: another adapter {said}, [^\n]*$"):
            inject(base.model, LoraConfig(**second), base.router, "second")
        assert torch.equal(logits_of(base), before)
        assert not [n for n, _p in base.model.named_parameters() if ".second." in n], "half an adapter stayed"


def test_wrappers_keep_the_mode_of_what_they_wrap() -> None:
    base = tiny_base("llama")
    base.model.eval()
    inject(base.model, LoraConfig(lora_dropout=0.5, modules_to_save=("lm_head",)), base.router)
    assert not any(module.training for module in base.model.modules())
    base.model.train()
    inject(base.model, LoraConfig(lora_dropout=0.5), base.router, "second")
    assert all(module.training for module in base.model.modules())


def test_adapters_lie_where_their_layer_lies_and_in_its_master_dtype() -> None:
    _base, adapter = adapted(
        "llama", torch.bfloat16, modules_to_save=("lm_head",), target_modules=("q_proj", "embed_tokens")
    )
    assert {p.dtype for p in adapter.parameters.values()} == {torch.float32}
    assert {p.device.type for p in adapter.parameters.values()} == {"cpu"}
    with torch.device("meta"):
        layer = nn.Linear(4, 4)
    wrapped = LoRALayer(layer, 4, 4, Router())
    wrapped.add("a", 2, 1.0, 0.0, next(layer.parameters()).device)
    assert wrapped.lora_A["a"].weight.is_meta


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_transformers_own_generate_uses_the_active_adapter(family: str) -> None:
    base, _adapter = adapted(family, modules_to_save=("lm_head",))
    prompt = torch.tensor([[5, 17, 60]])
    with native_attention(base), torch.no_grad():
        settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        out = base.model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    for length in range(3, 7):
        assert out[0, length] == logits_of(base, out[:, :length])[0, -1].argmax()
