"""Which tokens an example trains on, and templates whose own tags say otherwise."""

import pytest

from lorasmith.data.rows.conversation import Message
from lorasmith.data.template.encoding import Template
from lorasmith.data.template.loss_mask import ExampleBuilder
from lorasmith.data.template.turns import Turn
from lorasmith.errors import DataError
from lorasmith.model.row import IGNORED, Example
from tests.data.corpus.behaviors import BEHAVIORS
from tests.data.corpus.tokenizers import tokenizer_for


def test_turns_become_targets_shifted_by_one():
    builder = ExampleBuilder(1, 1)
    builder.add(Turn("ab", "cd", True, 0, 1), [1, 2], 0.0, [3, 4, 5], 0.5, 2)
    builder.add(Turn("e", "f", False, 2, 3), [6], 2.0, [7], 1.0, 1)
    assert (builder.first, builder.last, builder.text, builder.answers) == (1, 3, "abcdef", [(2, 4), (5, 6)])
    assert builder.build("x:1") == Example(
        [1, 2, 3, 4, 5, 6, 7],
        [IGNORED, 3, 4, IGNORED, 6, 7, IGNORED],
        [1.0, 0.5, 0.5, 1.0, 2.0, 1.0, 1.0],
        "x:1",
    )


def test_marks_that_agree_are_accepted_and_others_refused_with_the_token(make):
    chat = [Message("user", "what is the sky?"), Message("assistant", "考试")] * 2
    assert Template.of(make("marked")).encode(chat) == Template.of(make("marked")).encode(chat)
    with pytest.raises(DataError) as caught:
        Template.of(make("mismarked")).encode(chat, "a.jsonl:2")
    text = str(caught.value)
    assert text.startswith("a.jsonl line 2: token ")
    assert "('<|im_end|>') is trained on according to the text that the template adds" in text
    assert "not trained on according to its {% generation %} tags" in text


@pytest.mark.parametrize(
    "contents",
    [("Qq", "Qa", "a much longer question than the answer", "Qb"), ("is", "no", "is", "no"), ("", "x", "", "y")],
)
def test_tags_around_the_role_and_any_contents(contents):
    one = BEHAVIORS["generation tags around the role"]
    template = Template.of(tokenizer_for(one.text, "<s>", one.eos))
    roles = ("user", "assistant") * 2
    example = template.encode([Message(role, text) for role, text in zip(roles, contents, strict=True)])
    learned = template.tokenizer.decode([t for t in example.targets if t != IGNORED])
    assert learned == "".join(f"<|im_start|>assistant\n{text}<|im_end|>" for text in contents[1::2])
