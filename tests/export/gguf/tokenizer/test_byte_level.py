"""The name of a byte-level tokenizer's rules is found, and ids follow from it."""

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lorasmith.errors import ModelError
from lorasmith.export.gguf.tokenizer.byte_level import LLAMA3, QWEN2, TEKKEN
from lorasmith.export.gguf.tokenizer.vocabulary import first_other_text, vocabulary_of
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
    assert (vocabulary.model, vocabulary.pre) == ("gpt2", name)
    assert vocabulary.tokens[256:] == [f"[PAD{i}]" for i in range(256, 260)]
    assert first_other_text(own, vocabulary.core) is None


def test_added_tokens_stay_whole():
    own = tokenizer("llama")
    core = vocabulary_of(own, 300).core
    assert core.ids("<|im_start|>user")[0] == own.convert_tokens_to_ids("<|im_start|>")


def test_other_splits_are_noticed_even_without_other_ids():
    own = splitting(*by(QWEN2))
    other = vocabulary_of(splitting(*by(LLAMA3)), 256).core
    assert own("12")["input_ids"] == other.ids("12")
    assert first_other_text(own, other) is not None


def test_other_rules_are_refused():
    with pytest.raises(ModelError, match="rules for which GGUF has no name"):
        vocabulary_of(splitting(*by(r"\d|a")), 256)
