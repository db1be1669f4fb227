"""A small tokenizer of SentencePiece's kind: its merges are all pairs of tokens that form a token, best token first."""

from typing import Literal

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.support.tiny import CHATML, LINES

SPECIAL = ["<unk>", "<s>", "</s>"]
CHAT = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
Space = Literal["first", "always", "never"]


def sentencepiece(space: Space = "first", strips: bool = False) -> PreTrainedTokenizerFast:
    """space: where a space is put before a text. strips: whether white space after the tokens of chats is left out."""
    words = _words()
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    ids = {token: i for i, token in enumerate(tokens)}
    merges = [(w[:i], w[i:]) for w in words for i in range(1, len(w)) if w[:i] in ids and w[i:] in ids]
    core = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if space == "first":
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        prepended = [normalizers.Prepend("▁")] if space == "always" else []
        core.normalizer = normalizers.Sequence([*prepended, normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    core.add_special_tokens([AddedToken(token, special=True, normalized=False, rstrip=strips) for token in CHAT])
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    made.chat_template = CHATML
    return made


def _words() -> list[str]:
    """Characters and the words that a training makes of them, in its order."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    core.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    return [token for token, _id in sorted(core.get_vocab().items(), key=lambda pair: pair[1])]
