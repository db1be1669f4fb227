"""Weights in oneDNN's own order give what plain weights give, and can be had back."""

from functools import partial
from pathlib import Path

import pytest
import torch

from lorasmith.adapters.folder import AdapterFolder, write_adapter
from lorasmith.config.lora import LoraConfig
from lorasmith.config.model import ModelConfig
from lorasmith.data.template.encoding import Template
from lorasmith.engine.engine import Engine
from lorasmith.engine.scoring import prompt_logprobs
from lorasmith.loading.load import load_base
from lorasmith.lora.fused.products import FEW_TOKENS, prepacked
from lorasmith.lora.inject import inject
from lorasmith.model.base import Base, Head
from lorasmith.model.forward import hidden
from lorasmith.model.row import Example, flatten
from lorasmith.serve.registry import attach, detach
from tests.support import tiny
from tests.support.decoding import base_of, logits_of_steps, prompts, request, run
from tests.support.families import stir

pytestmark = pytest.mark.skipif(prepacked(torch.eye(64)) is None, reason="oneDNN has no prepacked product here")
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text", "olmo2", "granite")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_prepacked_weights_equal_plain_ones(family: str, dtype: torch.dtype) -> None:
    """Few tokens and many, one adapter, several and none: the logits of every step, and the scores of a prompt."""
    if prepacked(torch.eye(64, dtype=dtype)) is None:
        pytest.skip(f"this processor has no product in {dtype}")
    names = ("a1", None, "a0", "a2", "a0", "a1")
    found = {}
    for prepack in (False, True):
        base = base_of(family, dtype, adapters=3)
        engine = Engine(base, prepack=prepack)
        assert base.fast_decoder is not None
        assert base.fast_decoder.bank is not None
        assert base.fast_decoder.is_prepacked == prepack
        assert all((group.packed is not None) == prepack for group in base.fast_decoder.bank.groups)
        for lengths in ((5, 1, 3, 7, 2, 4), (FEW_TOKENS - 8, 9, 30, 31, 40, 33)):
            asked = [
                request(ids, name, stop=False, max_new_tokens=1 if dtype == torch.bfloat16 else 5)
                for ids, name in zip(prompts(*lengths), names, strict=True)
            ]
            rows = list(logits_of_steps(engine, partial(run, engine, asked)).values())
            scores = [[told.logprob for told in one if told] for one in prompt_logprobs(base, asked)]
            found[prepack, lengths] = *rows, torch.tensor([value for one in scores for value in one])
    limit = 1e-5 if dtype == torch.float32 else 0.06
    for (prepack, lengths), rows in found.items():
        for row, expected in zip(rows, found[False, lengths], strict=True):
            if prepack:
                torch.testing.assert_close(row, expected, rtol=limit, atol=limit * float(expected.abs().max()))


def test_the_model_has_its_weights_back() -> None:
    """Bit for bit; meanwhile the model by itself fails, and computes nothing."""
    base = base_of("llama", adapters=1)
    before = {name: p.detach().clone() for name, p in base.model.named_parameters()}
    Engine(base, prepack=True)
    assert base.fast_decoder is not None
    assert base.fast_decoder.bank is not None
    with pytest.raises((RuntimeError, ZeroDivisionError)):
        hidden(base, flatten([Example(ids := prompts(6)[0], ids, [1.0] * 6, "x")], 6.0, None))
    base.fast_decoder.close()
    for name, parameter in base.model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_an_adapter_with_modules_of_its_own_joins_and_leaves(tmp_path: Path) -> None:
    """A module trained whole, and a head: put into a model whose weights were prepacked, they answer as elsewhere."""
    saved = LoraConfig(r=2, target_modules=("up_proj",), modules_to_save=("q_proj", "lm_head"))
    own = _base()
    own.adapters["saved"] = inject(own.model, saved, own.router, "saved")
    stir(own.adapters["saved"])
    write_adapter(own, "saved", Template.of(own.tokenizer), tmp_path, {"data": []})
    ids, asked = own.tokenizer("Why is the sky blue?")["input_ids"], {}
    for prepack in (False, True):
        base = _base()
        engine = Engine(base, prepack=prepack)
        adapter = AdapterFolder.read(tmp_path)
        attach(base, "saved", adapter, adapter.tensors_in(base.dtype))
        asked[prepack] = run(engine, [request(ids, name, stop=False) for name in ("saved", None)])
        assert base.fast_decoder.packed_head is None
        detach(base, "saved")
        asked[prepack] += run(engine, [request(ids, None, stop=False)])
        assert (base.fast_decoder.packed_head is not None) == prepack
    assert asked[True] == asked[False]
    assert asked[True][0] != asked[True][1] == asked[True][2]


def test_a_head_that_gets_an_adapter_later_is_no_longer_the_prepacked_one() -> None:
    (ids,), found = prompts(7), {}
    for prepack in (False, True):
        base = base_of("llama")
        engine = Engine(base, prepack=prepack)
        config = LoraConfig(r=4, target_modules=("q_proj", "lm_head"))
        base.adapters["h"] = inject(base.model, config, base.router, "h")
        stir(base.adapters["h"])
        found[prepack] = run(engine, [request(ids, "h", stop=False)])
    assert found[True] == found[False]


def test_a_head_that_the_model_calls_itself_is_not_prepacked() -> None:
    base = base_of("llama")
    base.head = Head(direct=False)
    assert run(Engine(base, prepack=True), [request(prompts(7)[0])]) == run(
        Engine(base_of("llama")), [request(prompts(7)[0])]
    )
    assert base.fast_decoder.packed_head is None


def _base() -> Base:
    return load_base(ModelConfig(model=str(tiny.model_folder()), dtype="float32", device="cpu"))
