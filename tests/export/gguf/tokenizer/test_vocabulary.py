"""The kinds of tokenizers that GGUF stores, and names of models that llama.cpp treats in a way of its own."""

import pytest
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from lorasmith.errors import ModelError
from lorasmith.export.gguf.tokenizer.vocabulary import Vocabulary, vocabulary_of
from tests.support.sentencepiece import sentencepiece


def test_other_kinds_are_refused():
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")), unk_token="a")
    with pytest.raises(ModelError, match="neither byte-level BPE nor of SentencePiece's kind"):
        vocabulary_of(words, 1)


def test_types_of_tokens():
    own = sentencepiece()
    own.add_tokens([AddedToken("<tool>", special=False)])
    vocabulary = vocabulary_of(own, 0)
    kinds = dict(zip(vocabulary.tokens, vocabulary.types, strict=True))
    found = [kinds[token] for token in ("<unk>", "<s>", "<0x41>", "▁a" if "▁a" in kinds else "a", "<tool>")]
    assert found == [2, 3, 6, 1, 4]


@pytest.mark.parametrize(
    ("stem", "strips", "name"),
    [
        ("chat", False, "chat"),
        ("my-Phi-3-chat", False, "my-Phi.3-chat"),
        ("phi3", False, "phi.3"),
        ("modern-BERT", False, "modern.BERT"),
        ("chat", True, "phi-3 chat"),
        ("Phi-3-mine", True, "Phi-3-mine"),
    ],
)
def test_the_name_says_how_llama_cpp_treats_special_tokens(stem, strips, name):
    assert Vocabulary([], [], strips=strips).name_of(stem) == name


def test_stripping_that_llama_cpp_does_not_know_is_refused():
    own = sentencepiece("always", strips=True)
    core = Tokenizer.from_str(own.backend_tokenizer.to_str().replace("<|endoftext|>", "<|end|>"))
    other = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="<unk>")
    with pytest.raises(ModelError, match=r"only for tokenizers with the tokens <\|endoftext\|>"):
        vocabulary_of(other, 0)
