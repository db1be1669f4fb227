"""Sentences about what is lost between a row and its tokens."""

import copy

from lorasmith.data.rows.conversation import Conversation, Message
from lorasmith.data.template.encoding import Template
from lorasmith.data.template.findings import lost, notes_of_losses, template_notes
from tests.data.corpus.behaviors import BEHAVIORS
from tests.data.corpus.tokenizers import tokenizer_for
from tests.support import tiny


def template_of(name: str) -> Template:
    one = BEHAVIORS[name]
    return Template.of(tokenizer_for(one.text, "<s>", one.eos, one.ends))


def test_reasoning_that_the_template_cuts_out_is_told_with_the_rows():
    template = template_of("reasoning cut out of the content")
    thinking = (Message("user", "Q?"), Message("assistant", "<think>\nHm.\n</think>\n\nA."))
    apart = (Message("user", "Q?"), Message("assistant", "A.", reasoning="Hm."))
    rows = [Conversation(messages, f"a.jsonl:{i}") for i, messages in enumerate([thinking, apart, apart[:1]], 1)]
    assert [lost(template, row) for row in rows] == [{"reasoning"}, {"reasoning"}, set()]
    (text,) = notes_of_losses((row.source, lost(template, row)) for row in rows)
    assert text.startswith("In 2 rows, the chat template does not show the reasoning of an answer")
    assert "a.jsonl lines 1-2" in text or "a.jsonl lines 1, 2" in text


def test_what_the_template_does_is_told():
    (text,) = template_notes(template_of("opened thought in the prompt"))
    assert "ends with '<think>\\n', which the template does not render before answers" in text
    (text,) = template_notes(template_of("other blank lines before the prompt"))
    assert "renders '\\n\\n### Response:\\n' before every answer" in text
    assert list(template_notes(template_of("arguments as an object"))) == []
    one = BEHAVIORS["no end at all"]
    tokenizer = tokenizer_for(one.text, "<s>", one.eos, one.ends)
    (text,) = template_notes(Template.of(tokenizer, eos_ids=[tokenizer.eos_token_id]))
    assert text.startswith("The chat template does not end answers. '</s>', at which generation stops, is trained on")


def test_a_token_that_the_template_writes_and_the_tokenizer_does_not_have_is_told():
    """Only what looks like a special token: many templates write [INST] or <tools> as ordinary text."""
    tokenizer = copy.deepcopy(tiny.tokenizer("llama"))
    for name in ("<|im_start|>", "<|im_end|>"):
        written = tiny.CHATML.replace("<|im_start|>", "[INST]<tools>").replace("<|im_end|>", name)
        tokenizer.chat_template = written
        assert list(template_notes(Template.of(tokenizer))) == []
    tokenizer.chat_template = tiny.CHATML.replace("<|im_start|>", "<|turn|><｜a｜>")
    (text,) = template_notes(Template.of(tokenizer))
    assert text == (
        "The chat template writes '<|turn|>', '<｜a｜>', but the tokenizer has no such token, so the model sees it in "
        "pieces. Use the chat template that belongs to this model, or add the token with --add-tokens."
    )


def test_with_the_whole_text_learned_earlier_reasoning_that_it_lacks_is_told():
    template = template_of("reasoning of the last answer only")
    turn = (Message("user", "Q?"), Message("assistant", "A.", reasoning="Hm."))
    row = Conversation((*turn, Message("user", "R?"), Message("assistant", "B.", reasoning="So.")), "row")
    assert lost(template, row) == set()
    assert lost(template, row, "all") == {"reasoning"}
