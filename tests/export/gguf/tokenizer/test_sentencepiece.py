"""Token ids follow from scores as they do from merges."""

import json

import pytest

from lorasmith.export.gguf.tokenizer.sentencepiece import Merging, adds_space, begin_token, is_sentencepiece, scores_of
from lorasmith.export.gguf.tokenizer.vocabulary import first_other_text, vocabulary_of
from tests.support.sentencepiece import sentencepiece
from tests.support.tiny import tokenizer


def test_the_kind_is_known_from_its_bytes():
    assert is_sentencepiece(sentencepiece().backend_tokenizer)
    assert not is_sentencepiece(tokenizer("llama").backend_tokenizer)
    assert not is_sentencepiece(None)


def test_the_first_merge_of_a_token_gives_its_score():
    parts = {"model": {"merges": ["a b", ["c", "d"], ["ab", "cd"], ["a", "bcd"]]}}
    assert scores_of(parts) == {"ab": 0.0, "cd": -1.0, "abcd": -2.0}


@pytest.mark.parametrize(("space", "after_special"), [("first", False), ("always", True), ("never", False)])
def test_a_space_before_a_text_is_noticed(space, after_special):
    assert adds_space(sentencepiece(space)) == after_special


@pytest.mark.parametrize("space", ["first", "always", "never"])
def test_ids_are_those_of_the_tokenizer(space):
    own = sentencepiece(space)
    vocabulary = vocabulary_of(own, 500)
    assert (vocabulary.model, vocabulary.pre, len(vocabulary.tokens)) == ("llama", "default", 500)
    assert begin_token(own) == "<s>"
    assert first_other_text(own, vocabulary.core) is None
    if space != "first":  # llama.cpp knows no space before the first text only
        text = "Why is the air blue? 🙂"
        assert vocabulary.core.ids(text) == own(text, add_special_tokens=False)["input_ids"]


def test_white_space_after_the_tokens_of_a_chat_is_left_out():
    own = sentencepiece("always", strips=True)
    vocabulary = vocabulary_of(own, 0)
    assert vocabulary.strips
    text = "<|im_start|>  user\n<|im_end|>\n<s> a<|endoftext|> b"
    found = vocabulary.core.ids(text)
    kept = vocabulary.core.ids("<|im_start|>user\n<|im_end|><s> a<|endoftext|> b")
    assert found == kept


def test_the_highest_score_is_merged_first_and_the_leftmost_of_equal_ones():
    tokens = ["<unk>", "a", "b", "ab", "ba", "aa", "aaa", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [2, *[1] * 6, *[6] * 256]
    scores = [0.0, 0.0, 0.0, -2.0, -1.0, -3.0, -4.0, *[0.0] * 256]
    core = Merging(tokens, types, scores, space=False)
    assert [tokens[i] for i in core.ids("aba")] == ["a", "ba"]
    assert [tokens[i] for i in core.ids("aaaa")] == ["aa", "aa"]
    assert [tokens[i] for i in core.ids("é")] == ["<0xC3>", "<0xA9>"]
    assert core.ids("") == []


def test_a_tokenizer_json_has_its_merges_as_pairs():
    parts = json.loads(sentencepiece().backend_tokenizer.to_str())
    assert len(scores_of(parts)) > 20
