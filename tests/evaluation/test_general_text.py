"""The general text: every token but the first has a loss, and long texts are truncated."""

from lorasmith.evaluation.general_text import GENERAL_TEXT, general_examples
from lorasmith.model.row import IGNORED
from tests.support.tiny import tokenizer


def test_every_token_is_a_target():
    made = tokenizer("llama")
    examples = general_examples(made)
    assert len(examples) >= 40
    assert all(example.targets == [*example.ids[1:], IGNORED] for example in examples)
    assert examples[1].source == f"{GENERAL_TEXT}:2"
    assert any("\u4e00" <= letter <= "\u9fff" for example in examples for letter in made.decode(example.ids))


def test_long_texts_are_truncated():
    whole, short = general_examples(tokenizer("llama")), general_examples(tokenizer("llama"), 10)
    assert [example.ids for example in short] == [example.ids[:10] for example in whole]
    assert all(example.targets[-1] == IGNORED for example in short)
