"""Tiny real tokenizers of the two kinds that there are."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


def byte_level() -> PreTrainedTokenizerFast:
    """Every byte is a token, and some pairs: as in GPT-2's, a character may stand in several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, special_tokens=["<eos>"])
    tokenizer.train_from_iterator(["is it done? 考试有"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def sentence_piece() -> PreTrainedTokenizerFast:
    """Words carry their space in front, and a text loses its first one, as in Llama 2's."""
    vocab = {"<unk>": 0, "<eos>": 1} | {f"<0x{i:02X}>": 2 + i for i in range(256)}
    for piece in ("▁", "▁is", "▁it", "?", "done", "▁done", "e", "a", "o", "s"):
        vocab[piece] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


def pieces(tokenizer: PreTrainedTokenizerBase, *words: str) -> list[int]:
    """Ids of pieces; a word that is none in bytes."""
    vocab, ids = tokenizer.get_vocab(), []
    for word in words:
        ids += [vocab[word]] if word in vocab else [vocab[f"<0x{byte:02X}>"] for byte in word.encode()]
    return ids
