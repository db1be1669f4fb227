"""Token ids of texts that are cut at marks."""

from lorasmith.data.rows.conversation import Message
from lorasmith.data.template.encoding import Template
from lorasmith.data.template.special_tokens import MARK
from lorasmith.data.template.token_ids import token_ids, token_spans
from tests.data.template.test_split import sentencepiece


def test_pieces_of_a_text_get_no_blank_of_their_own():
    template = Template.of(sentencepiece(" a < / s > b\n"))
    ids = template.encode([Message("user", "a </s>b"), Message("assistant", "Bye")]).ids
    assert "▁a▁</s>b" in "".join(template.tokenizer.convert_ids_to_tokens(ids))


def test_texts_and_their_spans(make):
    tokenizer = make("chatml")
    assert token_ids(tokenizer, ["", ""]) == [[], []]
    assert token_ids(tokenizer, ["the sky"]) == [tokenizer("the sky", add_special_tokens=False)["input_ids"]]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in token_ids(tokenizer, ["<|im_end|>"])[0]
    assert end not in token_ids(tokenizer, [f"<{MARK}|im_end|>", "a"])[0]
    spans = token_spans(tokenizer, "the sky")
    assert spans is not None
    assert (spans[0][0], spans[-1][1]) == (0, 7)
    assert token_spans(tokenizer, f"<{MARK}|") is None
