"""The name of a tokenizer's rules is found, and ids follow from it."""

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lorasmith.errors import ModelError
from lorasmith.export.tokenizer import LLAMA3, QWEN2, TEKKEN, first_other_text, from_file, vocabulary_of
from tests.support.tiny import tokenizer

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def splitting(*rules: pre_tokenizers.PreTokenizer, whole_words: bool = False) -> PreTrainedTokenizerFast:
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(letters, [], ignore_merges=whole_words))
    core.pre_tokenizer = pre_tokenizers.Sequence(list(rules))
    return PreTrainedTokenizerFast(tokenizer_object=core)


def by(pattern: str) -> list[pre_tokenizers.PreTokenizer]:
    return [pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES]


@pytest.mark.parametrize(
    ("rules", "whole_words", "name"),
    [
        ([pre_tokenizers.ByteLevel(add_prefix_space=False)], False, "gpt-2"),
        ([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)], False, "smollm"),
        (by(LLAMA3), True, "llama-bpe"),
        (by(LLAMA3), False, "dbrx"),
        (by(QWEN2), False, "qwen2"),
        (by(TEKKEN), True, "tekken"),
    ],
)
def test_the_name_follows_from_the_rules(rules, whole_words, name):
    own = splitting(*rules, whole_words=whole_words)
    vocabulary = vocabulary_of(own, 260)
    assert (vocabulary.pre, vocabulary.tokens[256:]) == (name, [f"[PAD{i}]" for i in range(256, 260)])
    assert first_other_text(own, from_file(vocabulary)) is None


def test_added_tokens_stay_whole():
    own = tokenizer("llama")
    core = from_file(vocabulary_of(own, 300))
    assert core.encode("<|im_start|>user", add_special_tokens=False).ids[0] == own.convert_tokens_to_ids("<|im_start|>")


def test_other_rules_and_other_tokenizers_are_refused():
    with pytest.raises(ModelError, match="rules for which GGUF has no name"):
        vocabulary_of(splitting(*by(r"\d|a")), 256)
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")), unk_token="a")
    with pytest.raises(ModelError, match="is not byte-level BPE"):
        vocabulary_of(words, 1)
