"""Token ids of prompts and answers are those of the whole text."""

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lorasmith.data.rows.conversation import Conversation, Message
from lorasmith.data.template.encoding import Template
from lorasmith.data.template.split import split_ids
from lorasmith.data.template.token_ids import token_spans
from lorasmith.data.template.turns import Turn

LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
CHAT = [
    Message("user", "Are you open?"),
    Message("assistant", "Until eight."),
    Message("user", "And now?"),
    Message("assistant", "Bye  now"),
]


def sentencepiece(more: str = "") -> PreTrainedTokenizerFast:
    """A tokenizer that puts a blank before each text, as those of Llama 2 and Mistral 7B v0.1 do."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    lines = ["[INST] Are you open? And now? [/INST] Until eight. Until nine. Bye  now" + more] * 9
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    core.train_from_iterator(lines, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.chat_template = LLAMA2
    return made


def test_the_first_token_of_an_answer_is_that_of_the_whole_text():
    tokenizer = sentencepiece()
    template = Template.of(tokenizer)
    example = template.encode(CHAT)
    whole = tokenizer.apply_chat_template([m._asdict() for m in CHAT], tokenize=False)
    assert example.ids == tokenizer(whole, add_special_tokens=False)["input_ids"]
    for end in (1, 3):
        prompt = template.encode_prompt(CHAT[:end])
        assert example.ids[: len(prompt)] == prompt
        assert example.targets[len(prompt) - 1] == example.ids[len(prompt)]


def test_line_breaks_before_an_answer_are_the_tokens_of_the_whole_text(make):
    tokenizer = make("chatml", lines=["\n\n\n\n user assistant system a b\n\n"] * 9)
    tokenizer.add_tokens([AddedToken("\n\n", normalized=False)])
    template = Template.of(tokenizer)
    messages = [Message("user", "a"), Message("assistant", "\nb")]
    example = template.encode(messages)
    assert example.ids == tokenizer(template.render(messages), add_special_tokens=False)["input_ids"]
    assert template.encode_prompt(messages[:1]) != example.ids[: len(template.encode_prompt(messages[:1]))]
    assert template.lost(Conversation(tuple(messages), "row")) == {"merged"}


def test_long_conversations_are_split_in_the_same_places():
    """From the spans of the tokens, and not by tokenizing every beginning."""
    tokenizer = sentencepiece()
    template = Template.of(tokenizer)
    messages = CHAT * 4
    turns = template.turns(messages)
    slow = split_ids(turns, template.tokenize)
    asked: list[int] = []

    def tokenize(texts: list[str]) -> list[list[int]]:
        asked.append(len(texts))
        return template.tokenize(texts)

    assert split_ids(turns, tokenize, lambda text: token_spans(tokenizer, text)) == slow
    assert asked == [2 * len(turns) + 1]


@pytest.mark.parametrize("cut", [True, False])
def test_the_parts_are_those_of_the_whole(cut):
    def tokenize(texts: list[str]) -> list[list[int]]:
        """One token for each letter, except that "xy" is one token of its own."""
        return [[ord(c) for c in text.replace("xy", "z")] for text in texts]

    turn = Turn("ax", "yb" if cut else "b", True, 0, 1)
    ((prompt, answer),) = split_ids([turn], tokenize)
    assert prompt + answer == tokenize([turn.prompt + (turn.answer or "")])[0]
    assert prompt == [ord(c) for c in ("a" if cut else "ax")]
