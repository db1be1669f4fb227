"""Text as it comes: no half characters, stop texts across tokens, spaces where the whole has them."""

import random
from collections.abc import Callable, Iterable, Sequence

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lorasmith.engine.text import HALF, Stream

TEXT = "Zwölf 考试有哪些技巧？ naïve 🙂👩‍👩‍👧 is  it?\n\tdone 𝄞!"


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


def deltas(stream: Stream, ids: Iterable[int]) -> list[str]:
    out = []
    for token in ids:
        out.append(stream.push(token))
        if stream.stopped:
            return out
    return [*out, stream.close()]


def test_deltas_join_to_the_text_and_hold_no_half_character() -> None:
    tokenizer = byte_level()
    ids = tokenizer(TEXT)["input_ids"]
    assert len(ids) > len(TEXT)  # characters of several tokens are among them
    found = deltas(Stream(tokenizer), ids)
    assert "".join(found) == TEXT
    assert not any(HALF in delta for delta in found)
    assert found[-1] == ""


def test_deltas_keep_spaces_and_bytes_of_sentence_pieces() -> None:
    tokenizer = sentence_piece()
    ids = pieces(tokenizer, "▁is", "▁it", "done", "?", "🙂", "▁", "▁done", "试", "e", "\n", "a", "▁it")
    whole = tokenizer.decode(ids)
    found = deltas(Stream(tokenizer), ids)
    assert "".join(found) == whole == "is itdone?🙂  done试e\na it"
    assert not any(HALF in delta for delta in found)


def test_half_a_character_comes_out_only_at_the_end() -> None:
    tokenizer = byte_level()
    ids = tokenizer("ab🙂")["input_ids"][:-1]
    stream = Stream(tokenizer)
    assert "".join(stream.push(token) for token in ids) == "ab"
    assert HALF in stream.close()


def test_text_goes_on_behind_broken_bytes() -> None:
    tokenizer = byte_level()
    half = tokenizer("🙂")["input_ids"][:2]
    ids = [*half, *tokenizer("is it")["input_ids"]]
    assert "".join(deltas(Stream(tokenizer), ids)) == tokenizer.decode(ids)


def test_special_tokens_are_not_shown() -> None:
    tokenizer = byte_level()
    ids = [*tokenizer("is")["input_ids"], tokenizer.eos_token_id, *tokenizer(" it")["input_ids"]]
    assert "".join(deltas(Stream(tokenizer), ids)) == "is it"


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (["有哪"], "Zwölf 考试"),  # both characters in several tokens
        (["it?\n\td"], "Zwölf 考试有哪些技巧？ naïve 🙂👩‍👩‍👧 is  "),  # across many tokens
        (["never", "f 考", "Z never"], "Zwöl"),
        (["哪", "试有"], "Zwölf 考"),  # the one that comes first, not the one that is named first
        (["Z"], ""),
        (["!!", "done 𝄞?", ""], TEXT),  # begun, not met: held back, then given out
    ],
)
def test_stops_at_a_text_across_tokens(stops: Sequence[str], expected: str) -> None:
    tokenizer = byte_level()
    ids = tokenizer(TEXT)["input_ids"]
    stream = Stream(tokenizer, stops)
    found = deltas(stream, ids)
    assert "".join(found) == expected
    assert stream.stopped == (expected != TEXT)
    assert stream.close() == ""


@pytest.mark.parametrize("make", [byte_level])
def test_any_cut_into_tokens_stops_at_the_same_place(make: Callable[[], PreTrainedTokenizerFast]) -> None:
    """Random byte-wise tokens and random stop texts, against str.find on the whole."""
    tokenizer, draw = make(), random.Random(0)
    for _ in range(60):
        text = "".join(draw.choice("ab考🙂 ") for _ in range(14))
        stops = ["".join(draw.choice("ab考🙂 ") for _ in range(draw.randint(1, 4))) for _ in range(2)]
        ids = [i for character in text for i in tokenizer(character)["input_ids"]]
        found = "".join(deltas(Stream(tokenizer, stops), ids))
        # the first whose end comes first; of those that end at one character, the one that begins first
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        assert found == (text[: min(ends)[1]] if ends else text), (text, stops)
