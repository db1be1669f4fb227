"""One object decodes a base, made once, and thrown away whole."""

from typing import Any

import pytest
import torch
from torch import nn

from lorasmith.engine import self_test
from lorasmith.engine.engine import Engine
from lorasmith.engine.scoring import prompt_logprobs
from lorasmith.engine.self_test import decoder_of
from lorasmith.errors import AdapterError
from lorasmith.lora.fused.bank import AdapterWeights, Factors
from lorasmith.model.base import Base
from lorasmith.model.forward import hidden
from lorasmith.model.row import Example, flatten
from tests.support.decoding import base_of, prompts, request, run


def state(model: nn.Module) -> dict[str, Any]:
    """Every parameter and buffer, the object and its bits, and what modules have as attributes."""
    found: dict[str, Any] = {f"id of {name}": id(p) for name, p in model.named_parameters()}
    found |= {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}
    return found | {f"keys of {name}": {*module.__dict__} for name, module in model.named_modules()}


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for key, value in before.items():
        same = torch.equal(value, after[key]) if isinstance(value, torch.Tensor) else value == after[key]
        assert same, key


def states(base: Base, adapter: str) -> torch.Tensor:
    row = flatten([Example(ids := prompts(6)[0], ids, [1.0] * 6, "x")], 6.0, adapter)
    return hidden(base, row).detach()


@pytest.mark.parametrize("prepack", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "gpt2", "bloom"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_thrown_away_whole(family: str, prepack: bool, dtype: torch.dtype) -> None:
    base, ids = base_of(family, dtype, adapters=2), prompts(7, 30)
    base.model.eval()
    expected = states(base, "a1")
    before = state(base.model)
    asked = [request(one, name) for one, name in zip(ids, ("a1", None), strict=True)]
    engine = Engine(base, prepack=prepack)
    answers = run(engine, asked)
    prompt_logprobs(base, asked)
    decoder = base.fast_decoder
    assert decoder is not None
    decoder.close()
    after = state(base.model)
    for name, module in base.model.named_modules():  # what a class has, an instance may have too
        after[f"keys of {name}"] -= {"decoder", "banked"}
        assert getattr(module, "decoder", None) is None or isinstance(module.decoder, nn.Module)
        assert not getattr(module, "banked", ())
    assert_same(before, after)
    assert torch.equal(states(base, "a1"), expected)
    assert base.fast_decoder is None
    assert run(Engine(base, prepack=prepack), asked) == answers
    assert base.fast_decoder not in (None, decoder)


def test_it_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    base, tried = base_of("llama"), []
    right = self_test._self_test
    monkeypatch.setattr(self_test, "_self_test", lambda decoder: tried.append(decoder) or right(decoder))
    Engine(base)
    Engine(base)
    assert tried == [base.fast_decoder] == [decoder_of(base)]
    other = base_of("llama")
    assert decoder_of(other) is not base.fast_decoder


def test_one_that_could_not_be_tried_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_args: object) -> bool:
        raise KeyboardInterrupt

    base = base_of("llama")
    before = state(base.model)
    monkeypatch.setattr(self_test, "_is_close", interrupt)
    with pytest.raises(KeyboardInterrupt):
        decoder_of(base)
    assert base.fast_decoder is None
    monkeypatch.undo()
    after = state(base.model)
    for name, _module in base.model.named_modules():
        after[f"keys of {name}"] = before[f"keys of {name}"]
    assert_same(before, after)
    assert decoder_of(base).plain == ""


def test_an_engine_whose_decoder_is_closed_goes_on_plainly() -> None:
    base = base_of("llama", torch.float64, adapters=1)
    engine, asked = Engine(base, prepack=True), [request(prompts(9)[0], "a0", stop=False)]
    expected = run(engine, asked)
    assert base.fast_decoder is not None
    path = next(iter(base.fast_decoder.bank.paths))  # type: ignore[union-attr]
    factors = Factors(torch.ones(1, 32), torch.ones(1, 32))
    base.fast_decoder.held["held"] = AdapterWeights(lambda: {path: factors}, 1, lambda: 0)
    base.fast_decoder.close()
    assert run(engine, asked) == expected
    with pytest.raises(AdapterError, match="held"):
        engine.add(request(prompts(9)[0], "held"))


def test_families_that_are_padded_say_why() -> None:
    base = base_of("bloom")
    base.why["layout"] = "padded: it is Bloom"
    assert Engine(base).why == decoder_of(base).problem == "padded: it is Bloom"
    assert decoder_of(base).bank is None
