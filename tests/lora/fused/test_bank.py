"""Layers in groups and as a stack, with adapters in columns, give what the model's own modules give."""

import copy
import gc
import weakref
from functools import partial

import pytest
import torch

from lorasmith.config.lora import LoraConfig
from lorasmith.engine.engine import Engine
from lorasmith.engine.runner import Packed
from lorasmith.engine.scoring import prompt_logprobs
from lorasmith.engine.self_test import decoder_of
from lorasmith.errors import ModelError
from lorasmith.lora.fused.bank import COLUMN_STEP, AdapterWeights, Factors
from lorasmith.lora.fused.products import FEW_TOKENS
from lorasmith.lora.inject import inject
from lorasmith.model.base import Base
from lorasmith.model.fast.decoder import FastDecoder, adapter_weights
from lorasmith.model.forward import hidden
from lorasmith.model.row import Example, flatten
from lorasmith.serve.registry import detach
from tests.support.decoding import base_of, logits_of_steps, prompts, request, run
from tests.support.families import no_casts_down, stir

STACKED = ("llama", "qwen2", "qwen3", "mistral")  # in groups only: gemma3_text, olmo2, granite
GROUPED = (*STACKED, "gemma3_text", "olmo2", "granite")


def plainly(base: Base) -> Packed:
    """A layout that runs the model's own modules with the adapters that are in them."""
    return Packed(base, 16, 512, 2**15, FastDecoder(base))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("family", GROUPED)
def test_groups_and_stack_equal_modules(family: str, dtype: torch.dtype) -> None:
    """Few tokens and many, one adapter and several, of other ranks; a rank pattern; layers without it."""
    base = base_of(family, dtype, adapters=3)
    pattern = LoraConfig(r=4, target_modules=("q_proj", "down_proj"), rank_pattern={"q_proj": 2}, use_rslora=True)
    base.adapters["p"] = inject(base.model, pattern, base.router, "p")
    stir(base.adapters["p"], seed=5)
    names = ("a1", None, "p", "a2", "a0", "a1")
    for lengths in ((5, 1, 3, 7, 2, 4), (FEW_TOKENS - 8, 9, 30, 31, 40, 33)):
        asked = [
            request(ids, name, stop=False, max_new_tokens=5) for ids, name in zip(prompts(*lengths), names, strict=True)
        ]
        with no_casts_down():
            fast, plain = Engine(base), Engine(base)
            plain._layout = plainly(base)
            found, expected = (logits_of_steps(engine, partial(run, engine, asked)) for engine in (fast, plain))
        limit = 1e-9 if dtype == torch.float64 else 0.06
        for key, rows in expected.items():
            torch.testing.assert_close(found[key][0], rows[0], rtol=limit, atol=limit * float(rows.abs().max()))
            if dtype == torch.float64:  # in bfloat16 the answers may go apart
                torch.testing.assert_close(found[key], rows, rtol=limit, atol=limit * float(rows.abs().max()))


def test_columns_are_used_again_and_grow() -> None:
    base = base_of("llama", torch.float64)
    decoder = FastDecoder(base)
    decoder.group(as_stack=False)
    bank = decoder.bank
    assert bank is not None
    path = next(iter(bank.groups[0].layers))
    layer = bank.groups[0].layers[path]

    def ranks(r: int, version: int = 0) -> AdapterWeights:
        change = Factors(torch.full((r, layer.in_features), 0.1 * r), torch.full((r, layer.out_features), 0.5))
        return AdapterWeights(lambda: {path: change}, r, lambda: version)

    assert bank.hold("a", ranks(8), {"a"})
    assert not bank.hold("a", ranks(8), {"a"})  # it is there
    assert bank.hold("a", ranks(8, version=1), {"a"})  # it is another one now
    for i in range(7):
        bank.hold(f"b{i}", ranks(8), {"a", f"b{i}"})
    assert bank.columns == COLUMN_STEP
    bank.hold("c", ranks(8), {"a", "c"})  # over the least recently used that nobody needs: b0
    assert bank.columns == COLUMN_STEP
    assert bank.hold("b0", ranks(8), {"b0"})
    bank.hold("wide", ranks(COLUMN_STEP), {"wide", "b0"})
    assert bank.columns == 2 * COLUMN_STEP


def test_an_adapter_that_was_trained_on_answers_anew() -> None:
    """Columns and blocks of prompts follow what the adapter is now, within one engine."""
    base, ids = base_of("llama", adapters=1), prompts(40)[0]
    engine = Engine(base)
    asked = request(ids, "a0", stop=False)
    before = run(engine, [asked])
    assert run(engine, [asked]) == before
    with torch.no_grad():
        for parameter in base.adapters["a0"].parameters.values():
            parameter.mul_(-3)
    after = run(engine, [asked])
    assert after == run(Engine(base), [asked]) != before


def test_weights_are_still_those_of_the_model() -> None:
    """Moved into the groups' buffers, and the same to who reads them; training still finds them next to each other."""
    base = base_of("llama", torch.float64, adapters=1)
    before = {name: p.detach().clone() for name, p in base.model.named_parameters()}
    engine = Engine(base)
    run(engine, [request(prompts(5)[0], "a0")])
    for name, parameter in base.model.named_parameters():
        assert torch.equal(parameter, before[name])
    group = engine._layout.decoder.bank.groups[0]  # type: ignore[attr-defined]
    assert {layer.weight.untyped_storage().data_ptr() for layer in group.layers.values()} == {
        group.W_OI.untyped_storage().data_ptr()
    }


def test_outside_of_a_step_the_model_is_its_own() -> None:
    """Training after decoding goes through its own modules, and finds gradients."""
    base = base_of("llama", torch.float64, adapters=1)
    row = flatten([Example(ids := prompts(6)[0], ids, [1.0] * 6, "x")], 6.0, "a0")
    expected = hidden(base, row).detach()
    run(Engine(base), [request(ids, "a0")])
    states = hidden(base, row)
    torch.testing.assert_close(states.detach(), expected)
    states.sum().backward()
    assert any(p.grad is not None for p in base.adapters["a0"].parameters.values())


def test_ranks_of_an_adapter_know_its_changes() -> None:
    base = base_of("llama", adapters=2)
    first, second = (adapter_weights(base, base.adapters[name]) for name in ("a0", "a1"))
    assert (first.r, second.r) == (2, 5)
    assert first.version() != second.version()
    before = first.version()
    next(iter(base.adapters["a0"].parameters.values())).data.add_(0)  # what .data hides, an optimizer's step does not
    with torch.no_grad():
        next(iter(base.adapters["a0"].parameters.values())).add_(0)
    assert first.version() != before


@pytest.mark.parametrize("whole", ["q_proj", "down_proj", "mlp", "input_layernorm"])
def test_what_an_adapter_trains_whole_is_its_own_in_rows_with_others(whole: str) -> None:
    """It came when the layers were in groups already; they are again when it is gone."""
    base = base_of("llama", torch.float64)
    bank = decoder_of(base).bank
    assert bank is not None
    paths = bank.paths
    target = "k_proj" if whole == "mlp" else "up_proj"
    configs = {
        "plain": LoraConfig(r=2, target_modules=(target,)),
        "whole": LoraConfig(r=2, target_modules=("v_proj",), modules_to_save=(whole,)),
    }
    for name, config in configs.items():
        base.adapters[name] = inject(base.model, config, base.router, name)
        stir(base.adapters[name])
    base.router.active = None
    names = (None, "whole", "plain", "whole")
    asked = [request(ids, name, stop=False) for ids, name in zip(prompts(3, 5, 4, 6), names, strict=True)]
    with no_casts_down():
        engine, plain = Engine(base), Engine(base)
        plain._layout = plainly(base)
        found, expected = (logits_of_steps(one, partial(run, one, asked)) for one in (engine, plain))
    for key, rows in expected.items():
        torch.testing.assert_close(found[key], rows, rtol=1e-9, atol=1e-9)
    assert (bank.paths < paths) == (whole != "input_layernorm")
    detach(base, "whole")
    assert bank.paths == paths


def test_what_came_whole_after_the_layers_were_in_groups_is_scored_as_it_is() -> None:
    """Prompts are scored in groups too, and no request of the engine has told them of it."""
    config, scores = LoraConfig(r=2, target_modules=("v_proj",), modules_to_save=("q_proj",)), []
    for is_late in (False, True):
        base = base_of("llama", torch.float64)
        if is_late:
            decoder_of(base)
        base.adapters["w"] = inject(base.model, config, base.router, "w")
        stir(base.adapters["w"])
        (told,) = prompt_logprobs(base, [request(prompts(7)[0], "w")])
        scores.append([one.logprob for one in told if one])
    assert scores[1] == pytest.approx(scores[0], abs=1e-9)


def test_a_model_with_something_trained_whole_groups_the_rest() -> None:
    base = base_of("llama", torch.bfloat16)
    base.adapters["s"] = inject(base.model, LoraConfig(r=2, modules_to_save=("mlp",)), base.router, "s")
    stir(base.adapters["s"])
    asked = [request(ids, name) for ids, name in zip(prompts(3, 5), (None, "s"), strict=True)]
    assert run(Engine(base), asked) == [run(Engine(base), [one])[0] for one in asked]
    assert base.fast_decoder is not None
    assert base.fast_decoder.bank is not None
    assert {path.split(".")[3] for path in base.fast_decoder.bank.paths} == {"self_attn"}


def test_a_copy_of_a_module_copies_no_bank() -> None:
    """Not a norm that an adapter trains whole: the bank holds the weights of all layers."""
    base = base_of("llama")
    decoder_of(base)
    norm = base.model.get_submodule("model.norm")
    assert norm.decoder is base.fast_decoder
    twin = copy.deepcopy(norm)
    assert (twin.decoder, twin.banked) == (None, ())


def test_columns_of_no_numbers_disturb_nobody_once_they_are_free() -> None:
    base = base_of("llama", adapters=1)
    (ids,), engine = prompts(9), Engine(base)
    expected = run(engine, [request(ids, "a0")])
    assert base.fast_decoder is not None
    assert base.fast_decoder.bank is not None
    path, layer = next(iter(base.fast_decoder.bank.groups[0].layers.items()))
    broken = Factors(torch.full((4, layer.in_features), torch.nan), torch.ones(4, layer.out_features))
    base.fast_decoder.held["broken"] = AdapterWeights(lambda: {path: broken}, 4, lambda: 0)
    with pytest.raises(ModelError, match="NaN"):  # which empties the bank
        run(engine, [request(ids, "broken")])
    assert run(engine, [request(ids, "a0")]) == expected
    prompt_logprobs(base, [request(ids, "broken")])  # as a server tries what it loads
    detach(base, "broken")
    assert run(engine, [request(ids, "a0")]) == expected


def test_an_adapter_that_is_gone_is_not_kept() -> None:
    base = base_of("llama")
    engine = Engine(base)
    kept: list[weakref.ref[object]] = []
    for name in ("x", "y", "z"):
        base.adapters[name] = inject(base.model, LoraConfig(r=2), base.router, name)
        kept.append(weakref.ref(next(iter(base.adapters[name].parameters.values()))))
        run(engine, [request(prompts(4)[0], name)])
        if name != "z":
            detach(base, name)
    gc.collect()
    assert [one() is None for one in kept] == [True, True, False]
