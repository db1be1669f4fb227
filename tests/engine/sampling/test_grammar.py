"""JSON mode through real vocabularies: whatever is drawn, the whole reply is one JSON object."""

import json
import random
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lorasmith.config.sampling import SamplingConfig
from lorasmith.engine.detokenizer import Detokenizer
from lorasmith.engine.engine import Engine
from lorasmith.engine.request import Event, Request, RunningRequest
from lorasmith.engine.sampling.grammar import Derivation, Grammar
from lorasmith.engine.sampling.next_token import next_tokens
from lorasmith.errors import ConfigError, MissingExtraError
from tests.support.decoding import Letters, base_of, request
from tests.support.spellers import byte_level, sentence_piece

REAL = Path("~/.cache/lorasmith/models/smollm2-135m-instruct").expanduser()
CLOSERS = ('"', "}", "]", ":", "0")  # the first that is admitted brings an object nearer to its end
BLANK = " \n\t\r"


@cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerBase:
    """The demo's where it was fetched already; else a tiny one of its kind."""
    if kind == "sentence pieces":
        return sentence_piece()
    return AutoTokenizer.from_pretrained(REAL) if REAL.exists() else byte_level()


@cache
def signs_of(kind: str) -> tuple[list[int], set[int]]:
    """The tokens that are CLOSERS, in their order, and all that hold a sign or a letter of JSON's own."""
    vocab = tokenizer_of(kind).get_vocab()
    closers = [vocab.get(sign, vocab.get(f"<0x{ord(sign):02X}>", -1)) for sign in CLOSERS]
    return closers, {i for word, i in vocab.items() if set(word) & set('{}[]",:\\-.0123456789truefalsn')}


def admitted(state: Derivation, words: int) -> list[int]:
    logits = torch.zeros(words + 3)  # a head is often wider than its vocabulary
    state.restrict(logits)
    assert logits[words:].isinf().all()
    found: list[int] = logits.isfinite().nonzero()[:, 0].tolist()
    assert found
    return found


def walk(tokenizer: PreTrainedTokenizerBase, choose: Callable[[list[int], int], int], most: int) -> list[int]:
    """Tokens as `choose` takes them from those that are admitted, until the object is whole; at most `most`."""
    state, ids = Derivation(Grammar.json_object(tokenizer)), []
    for step in range(most):
        ids.append(choose(admitted(state, len(tokenizer)), step))
        if state.push(ids[-1]):
            break
    return ids


@pytest.mark.parametrize("kind", ["bytes", "sentence pieces"])
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), steps=st.integers(0, 40), bias=st.floats(0, 1))
@example(seed=0, steps=0, bias=0.0)
def test_every_walk_that_ends_is_one_json_object(kind: str, seed: int, steps: int, bias: float) -> None:
    """Some steps at random, with a `bias` to the signs of JSON, then the nearest way out."""
    tokenizer, draw, (closers, signs) = tokenizer_of(kind), random.Random(seed), signs_of(kind)

    def choose(tokens: list[int], step: int) -> int:
        assert tokenizer.eos_token_id not in tokens
        if step >= steps:
            return next((token for token in closers if token in tokens), draw.choice(tokens))
        likely = [token for token in tokens if token in signs] if draw.random() < bias else []
        return draw.choice(likely or tokens)

    ids = walk(tokenizer, choose, steps + 400)
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(json.loads(text), dict), text


def test_blanks_end() -> None:
    """A model that says blanks wherever it may: a line and its indent, no more."""
    tokenizer = tokenizer_of("bytes")
    blank = {i for i in range(len(tokenizer)) if not tokenizer.decode([i]).strip(BLANK)}

    def choose(tokens: list[int], step: int) -> int:
        found = sorted(set(tokens) & blank)
        return random.Random(step).choice(found) if found else tokens[0]

    text = tokenizer.decode(walk(tokenizer, choose, 30))
    assert text.startswith("{")
    inner = text[1:]
    assert 0 < len(inner) - len(inner.lstrip(BLANK)) <= 21


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_reply_is_whole_or_cut(temperature: float) -> None:
    """Chosen by the engine's own rules from random logits that favor the signs; stop tokens favored most."""
    tokenizer = tokenizer_of("bytes")
    closers = [tokenizer.get_vocab()[sign] for sign in CLOSERS]
    ends = []
    for seed in range(8):
        settings = SamplingConfig(temperature=temperature, json_object=True, seed=seed, presence_penalty=0.5)
        stop = frozenset([tokenizer.eos_token_id])
        one = RunningRequest(0, Request([5], settings), [5], 61, stop, Detokenizer(tokenizer))
        free = RunningRequest(1, Request([5], SamplingConfig()), [5], 61, stop, Detokenizer(tokenizer))
        texts: list[str] = []
        event: Event | None = None
        generator = torch.Generator().manual_seed(seed)
        while event is None or event.finish is None:
            logits = torch.randn(2, len(tokenizer), generator=generator)
            logits[:, closers] += 9
            logits[:, tokenizer.eos_token_id] += 20
            token, own = next_tokens(logits, [one, free])
            assert own == tokenizer.eos_token_id  # the row beside it is not held to JSON
            event = one.accept(token)
            texts.append(event.text)
        ends.append(event.finish)
        if event.finish == "stop":
            assert isinstance(json.loads("".join(texts)), dict)
        else:
            assert one.replied == 60
    assert "stop" in ends


def test_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'lorasmith\[serve\]'"):
        Grammar.json_object(byte_level())


def test_a_tokenizer_that_cannot_spell_it_is_refused_before_anything_runs() -> None:
    engine = Engine(base_of("llama"))
    assert isinstance(engine.base.tokenizer, Letters)
    with pytest.raises(ConfigError, match="tokenizer cannot represent every JSON text"):
        engine.add(request([4], json_object=True))
    assert not engine.busy
