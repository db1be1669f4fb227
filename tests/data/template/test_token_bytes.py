"""The bound holds for every text, and there is none where a tokenizer leaves text out."""

import random
import time
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lorasmith.data.template.token_bytes import least_tokens, max_bytes_per_token
from tests.support import tiny

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
FALLBACK = [f"<0x{byte:02X}>" for byte in range(256)]


def made(vocab: list[str], merges: tuple[tuple[str, str], ...] = (), **parts: Any) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, list(merges), **parts.pop("model", {})))
    for name, part in parts.items():
        setattr(core, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=core)


BYTES = {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False), "decoder": decoders.ByteLevel()}


@pytest.mark.parametrize(
    ("tokenizer", "wanted"),
    [
        (made([*ALPHABET, "ab", "abab"], (("a", "b"), ("ab", "ab")), **BYTES), 4),
        (made(ALPHABET, **BYTES, normalizer=normalizers.NFC()), 3),
        (
            made(
                [*FALLBACK, "▁"],
                model={"byte_fallback": True},
                normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
            ),
            6,  # the name of a byte
        ),
        (made(ALPHABET[1:], **BYTES), None),  # a byte that it does not know it leaves out
        (made(ALPHABET, **BYTES, normalizer=normalizers.Strip()), None),
        (made(ALPHABET, pre_tokenizer=pre_tokenizers.WhitespaceSplit()), None),
        (
            made(
                ALPHABET,
                pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), BYTES["pre_tokenizer"]]),
            ),
            None,
        ),
    ],
)
def test_the_bound_is_known_where_nothing_is_left_out(tokenizer: PreTrainedTokenizerFast, wanted: int | None):
    assert max_bytes_per_token(tokenizer) == wanted


def test_a_special_token_that_takes_blanks_with_it_has_no_bound():
    tokenizer = made(ALPHABET, **BYTES)
    tokenizer.add_tokens([AddedToken("<longer than any>")])
    assert max_bytes_per_token(made(ALPHABET, **BYTES)) == 1
    assert max_bytes_per_token(tokenizer) == len("<longer than any>")
    eating = made(ALPHABET, **BYTES)
    eating.add_tokens([AddedToken("<mask>", lstrip=True)])
    assert max_bytes_per_token(eating) is None


def test_no_text_has_fewer_tokens():
    tokenizer = tiny.tokenizer("llama")
    most = max_bytes_per_token(tokenizer)
    assert most is not None
    draw = random.Random(1)
    pieces = [*tiny.LINES, "<|im_start|>", " ", "\n\n", "🙂", "ế", "각", "\u0301", "\x00"]
    for _time in range(300):
        text = "".join(draw.choices(pieces, k=draw.randint(1, 9)))
        text = text[draw.randint(0, len(text) // 2) :]
        assert len(text.encode()) <= most * len(tokenizer(text, add_special_tokens=False)["input_ids"]), repr(text)


def test_very_long_texts_are_counted_by_words() -> None:
    """Also where the vocabulary lacks bytes, so that nothing is known of the length of a token."""
    letters = [letter for letter in ALPHABET if letter not in "xyz"]
    tokenizer = made([*letters, "ab", "abab"], (("a", "b"), ("ab", "ab")), **BYTES)
    tokenizer.add_tokens([AddedToken("<end>")])
    assert max_bytes_per_token(tokenizer) is None
    rng = random.Random(1)
    for _time in range(200):
        words = rng.choices(["abab", "xy", "ab.a", "1<end>", "<end>", "\n", "  ", "é", "xa"], k=200)
        texts = [rng.choice(["", " "]).join(words)]
        found = len(tokenizer(texts[0])["input_ids"])
        assert 0 <= least_tokens(tokenizer, texts, 10) <= found
    assert least_tokens(tokenizer, ["ab " * 200], 40) > 40 >= least_tokens(tokenizer, ["ab " * 100], 299) == 0
    assert least_tokens(tokenizer, ["xy" * 1000], 40) == 0
    began = time.monotonic()
    assert 8000 < least_tokens(tokenizer, ["a b " * 10**6], 8000) < 200_000
    assert time.monotonic() - began < 2
