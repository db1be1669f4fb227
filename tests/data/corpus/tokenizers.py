"""A small tokenizer that knows the special tokens of a chat template."""

import functools
import re
from copy import deepcopy

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CONTROL = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|<｜[^｜<>]{1,40}｜>|\[/?[A-Z][A-Z_]+\]|<(?:start|end)_of_turn>|<\|?turn\|?>|<\|?channel\|?>"
    r"|<\|/?\w+\|?>|</?s>|<(?:AI|用户)>|\]<\]\w+\[>\[|\[e~\[|\]~[!b]\w*\]|</?\w+_[a-f0-9]{8}>"
)
PLAIN = re.compile(r"</?(?:think|tool_call|tool_response|tools|tool_calls)>")  # added tokens that are not special
LINES = [
    "user assistant system model what is the stock of lamps? Twelve.\n\nHuman: Assistant: tool",
    "考试有哪些技巧？先做会做的题。",
]


@functools.cache
def _core() -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    return core


def tokenizer_for(text: str, bos: str, eos: str, ends: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer for the chat template `text`."""
    core = deepcopy(_core())
    special = dict.fromkeys([bos, eos, *ends, *CONTROL.findall(text)])
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    core.add_tokens([AddedToken(token, normalized=False) for token in dict.fromkeys(PLAIN.findall(text))])
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos, pad_token=eos)
    made.chat_template = text
    return made
