"""Trained rows of single tokens, against a full embedding and head that autograd trains."""

import pytest
import torch
from torch import Tensor, nn

from lorasmith.config.lora import LoraConfig
from lorasmith.errors import AdapterError, ConfigError
from lorasmith.lora.inject import PEFT_PREFIX, inject, remove
from lorasmith.lora.layer import SavedModule
from lorasmith.lora.merge import merged_weights
from lorasmith.lora.router import Slice
from lorasmith.lora.token_rows import ROWS
from lorasmith.model.base import Base
from lorasmith.model.head import loss_sum
from lorasmith.model.verify import use_fast_parts
from tests.support.families import (
    CONFIGS,
    IDS,
    MAIN,
    distance,
    embedding,
    example,
    gradients,
    logits_of,
    one_row,
    own_logits,
    stir,
    tiny_base,
)

NEW = [97, 98]  # the last of the tiny models' tokens
FAMILIES = [*MAIN, "cohere", "granite", "falcon"]
EXACT = 1e-11  # float64; sums in another order


def with_rows(family: str, dtype: torch.dtype = torch.float64, tokens: list[int] = NEW) -> Base:
    base = tiny_base(family, dtype)
    base.adapters["default"] = inject(base.model, LoraConfig(r=4), base.router, tokens=tokens)
    stir(base.adapters["default"])
    return base


def rows_of(base: Base) -> dict[str, Tensor]:
    """The trained rows by the path of their module."""
    parameters = base.adapters["default"].parameters
    return {key[len(PEFT_PREFIX) : -len(ROWS) - 1]: p for key, p in parameters.items() if key.endswith(ROWS)}


def in_full(family: str, ours: Base) -> tuple[Base, dict[str, nn.Parameter]]:
    """The same model with the rows written into weights that are trained as a whole; these by path."""
    base = tiny_base(family)
    base.adapters["default"] = inject(base.model, LoraConfig(r=4), base.router)
    stir(base.adapters["default"])
    weights = {}
    for path, rows in rows_of(ours).items():
        weights[path] = base.model.get_submodule(path).get_parameter("weight")
        weights[path].data[NEW] = rows.detach()
        weights[path].requires_grad_(True)
    return base, weights


def batch() -> list:
    made = [example(length, seed) for seed, length in enumerate((5, 9, 3, 12))]
    for number, one in enumerate(made):
        one.ids[1], one.ids[-1], one.targets[0] = NEW[number % 2], NEW[1], NEW[number % 2]
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_rows_of_the_gradient_of_the_whole_weight(family: str) -> None:
    base = with_rows(family)
    full, weights = in_full(family, base)
    ids = torch.tensor([[5, 97, 60, 3, 98, 44, 92, 31]])
    assert distance(logits_of(base, ids), logits_of(full, ids)) < EXACT
    loss, wanted = (loss_sum(one, one_row(batch())) for one in (base, full))
    assert distance(loss, wanted) < EXACT
    loss.backward()
    wanted.backward()
    of_all, of_lora = gradients(base.adapters["default"]), gradients(full.adapters["default"])
    assert len(weights) == (1 if CONFIGS[family].get("tie_word_embeddings", family != "gpt_neox") else 2)
    for path, weight in weights.items():
        assert weight.grad is not None
        assert weight.grad[NEW].abs().min() > 0
        assert distance(of_all.pop(f"{PEFT_PREFIX}{path}.{ROWS}"), weight.grad[NEW]) < EXACT
    assert all(distance(of_all[key], gradient) < EXACT for key, gradient in of_lora.items())


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_fast_and_plain_steps_agree(family: str) -> None:
    base, found = with_rows(family), []
    for parts in (base.fast_parts, frozenset[str]()):
        use_fast_parts(base, parts)
        loss_sum(base, one_row(batch())).backward()
        found.append(gradients(base.adapters["default"]))
    assert all(distance(found[0][key], found[1][key]) < EXACT for key in found[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_all_else_is_frozen_and_comes_back(family: str) -> None:
    plain, base = tiny_base(family), with_rows(family)
    assert not torch.equal(logits_of(base)[..., :97], logits_of(plain)[..., :97])
    mine = {id(p) for p in base.adapters["default"].parameters.values()}
    assert {id(p) for p in base.model.parameters() if p.requires_grad} == mine
    base.router.active = None
    assert torch.equal(logits_of(base), logits_of(plain))
    remove(base.model, "default")
    assert not any(isinstance(module, SavedModule) for module in base.model.modules())
    kept, own = base.model.state_dict(), plain.model.state_dict()
    assert all(torch.equal(kept[name], own[name]) for name in own)


def test_new_rows_begin_as_the_mean_of_the_known_ones() -> None:
    base = tiny_base("llama")
    adapter = inject(base.model, LoraConfig(r=4), base.router, tokens=NEW)
    for path, rows in {
        k[len(PEFT_PREFIX) : -len(ROWS) - 1]: p for k, p in adapter.parameters.items() if ROWS in k
    }.items():
        weight = tiny_base("llama").model.get_submodule(path).get_parameter("weight")
        assert distance(rows, weight[:97].mean(0).expand(2, -1)) < EXACT
    assert adapter.tokens == {"model.embed_tokens": NEW, "lm_head": NEW}


def test_rows_of_a_half_precision_base_are_float32() -> None:
    base = with_rows("llama", torch.bfloat16)
    assert {p.dtype for p in rows_of(base).values()} == {torch.float32}
    assert own_logits(base).dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_merged_weights_have_the_rows_and_stay_tied(family: str) -> None:
    base = with_rows(family)
    merged, rows = merged_weights(base.model, base.adapters["default"]), rows_of(base)
    own = tiny_base(family).model
    ends = {path for path, m in own.named_modules() if m in (own.get_input_embeddings(), own.get_output_embeddings())}
    assert len(ends) == 2
    for path in ends:
        wanted = own.get_submodule(path).get_parameter("weight").clone()
        wanted[NEW] = rows[path if path in rows else next(iter(rows))].detach()
        assert torch.equal(merged[f"{path}.weight"], wanted)


def test_each_token_of_a_batch_has_the_rows_of_its_adapter() -> None:
    """Two adapters in one batch, each with rows of its own, give what each gives alone."""
    base = with_rows("llama")
    base.adapters["other"] = inject(base.model, LoraConfig(r=2), base.router, "other", tokens=[7])
    stir(base.adapters["other"], 5)
    ids = torch.cat([IDS[:1], torch.tensor([[7, 97, 5, 98, 7, 1, 2, 3]])])
    alone = []
    for name in ("default", "other"):
        base.router.route([Slice(name, 0, 16)])
        alone.append(logits_of(base, ids))
    base.router.route([Slice("default", 0, 8), Slice("other", 8, 16)])
    both = logits_of(base, ids)
    assert distance(both[0], alone[0][0]) < EXACT
    assert distance(both[1], alone[1][1]) < EXACT


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"target_modules": ("q_proj", "embed_tokens")},
            r"model\.embed_tokens has LoRA, so the rows of single tokens ",
        ),
        (
            {"modules_to_save": ("lm_head",)},
            r"data\.add_tokens: lora\.modules_to_save trains lm_head in full\. Name all ",
        ),
    ],
)
def test_embeddings_that_are_trained_otherwise_are_refused(options: dict, text: str) -> None:
    base = tiny_base("llama")
    with pytest.raises(ConfigError, match=text):
        inject(base.model, LoraConfig(**options), base.router, tokens=NEW)
    assert not any(isinstance(module, SavedModule) for module in base.model.modules())


def test_embedding_and_head_that_are_trained_in_full_have_the_rows_already() -> None:
    base = tiny_base("llama")
    adapter = inject(base.model, LoraConfig(modules_to_save=("embed_tokens", "lm_head")), base.router, tokens=NEW)
    assert adapter.tokens == {}
    assert not any(ROWS in key for key in adapter.parameters)


def test_another_adapter_cannot_have_lora_there() -> None:
    base = with_rows("gpt2")
    with pytest.raises(AdapterError, match=r"transformer\.wte: another adapter trains this module in full"):
        inject(base.model, LoraConfig(target_modules=(embedding("gpt2"), "c_attn")), base.router, "other")
