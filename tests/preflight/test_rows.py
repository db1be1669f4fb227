"""Previews: the spans of a row are its text, and which rows are shown and why."""

import pytest

from lorasmith.data.dataset.fit import truncate
from lorasmith.data.rows.conversation import Message
from lorasmith.data.template.encoding import Template
from lorasmith.model.row import IGNORED, Example
from lorasmith.preflight.rows import ends_with_stop_token, preview_rows, text_spans
from tests.support.tiny import row, tokenizer


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_pieces_are_the_row_and_say_what_is_learned(family):
    """Laid end to end they are the text; the learned ones are the targets."""
    template = Template.of(tokenizer(family))
    for i in range(10):
        (example,) = template.encode_all([*_messages(i), *_messages(i + 1)])
        pieces = text_spans(example, template.tokenizer, template.stop_ids)
        text = template.tokenizer.decode(example.ids, clean_up_tokenization_spaces=False)
        assert "".join(piece.text for piece in pieces) == text
        learned = "".join(piece.text for piece in pieces if piece.kind != "read")
        targets = [target for target in example.targets if target != IGNORED]
        assert learned == template.tokenizer.decode(targets, clean_up_tokenization_spaces=False)
        assert [piece.kind for piece in pieces].count("stop") == 2


def _messages(i: int) -> list[Message]:
    return [Message(m["role"], m["content"]) for m in row(i)["messages"]]  # type: ignore[index]


def test_the_first_the_longest_and_a_truncated_row_are_shown():
    template = Template.of(tokenizer("llama"))
    examples = [template.encode_all(_messages(i))[0] for i in range(6)]
    longest = max(range(6), key=lambda i: examples[i].useful_length)
    assert longest > 1
    examples[1] = truncate(examples[1], len(examples[1].ids) - 3)
    shown = preview_rows(examples, template)
    assert [row.why for row in shown] == ["the first row", "the longest row", "a truncated row"]
    assert [row.tokens for row in shown] == [len(examples[i].ids) for i in (0, longest, 1)]
    assert [row.stops for row in shown] == [True, True, False]
    assert shown[2].learned == examples[1].n_targets


def test_one_row_is_shown_once_with_both_reasons():
    template = Template.of(tokenizer("llama"))
    (shown,) = preview_rows(template.encode_all(_messages(0)), template)
    assert shown.why == "the first row, the longest row"


def test_a_row_without_targets_does_not_end_with_a_stop_token():
    assert not ends_with_stop_token(Example([1, 2], [IGNORED, IGNORED], [1.0, 1.0], ""), [2, IGNORED])
    assert ends_with_stop_token(Example([1, 2], [2, IGNORED], [1.0, 1.0], ""), [2])
