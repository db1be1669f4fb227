"""Text as it comes: no half characters, stop texts across tokens, spaces where the whole has them."""

import random
from collections.abc import Callable, Iterable, Sequence

import pytest
from transformers import PreTrainedTokenizerFast

from lorasmith.engine.detokenizer import REPLACEMENT, Detokenizer
from tests.support.spellers import byte_level, pieces, sentence_piece

TEXT = "Zwölf 考试有哪些技巧？ naïve 🙂👩‍👩‍👧 is  it?\n\tdone 𝄞!"


def deltas(stream: Detokenizer, ids: Iterable[int]) -> list[str]:
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
    found = deltas(Detokenizer(tokenizer), ids)
    assert "".join(found) == TEXT
    assert not any(REPLACEMENT in delta for delta in found)
    assert found[-1] == ""


def test_deltas_keep_spaces_and_bytes_of_sentence_pieces() -> None:
    tokenizer = sentence_piece()
    ids = pieces(tokenizer, "▁is", "▁it", "done", "?", "🙂", "▁", "▁done", "试", "e", "\n", "a", "▁it")
    whole = tokenizer.decode(ids)
    found = deltas(Detokenizer(tokenizer), ids)
    assert "".join(found) == whole == "is itdone?🙂  done试e\na it"
    assert not any(REPLACEMENT in delta for delta in found)


@pytest.mark.parametrize("cut", [1, 2])
@pytest.mark.parametrize("make", [byte_level, sentence_piece])
def test_half_a_character_is_never_sent(make: Callable[[], PreTrainedTokenizerFast], cut: int) -> None:
    """A reply that ends at its longest inside one loses the half."""
    tokenizer = make()
    stream = Detokenizer(tokenizer, ["ox"])
    assert "".join(stream.push(token) for token in pieces(tokenizer, "a", "o")) == "a"
    ids = pieces(tokenizer, "试")[:-cut] if make is sentence_piece else tokenizer("🙂")["input_ids"][:-cut]
    assert "".join(stream.push(token) for token in ids) + stream.close() == "o"


def test_text_goes_on_behind_broken_bytes() -> None:
    tokenizer = byte_level()
    half = tokenizer("🙂")["input_ids"][:2]
    ids = [*half, *tokenizer("is it")["input_ids"]]
    assert "".join(deltas(Detokenizer(tokenizer), ids)) == tokenizer.decode(ids)


def test_special_tokens_are_not_shown() -> None:
    tokenizer = byte_level()
    ids = [*tokenizer("is")["input_ids"], tokenizer.eos_token_id, *tokenizer(" it")["input_ids"]]
    assert "".join(deltas(Detokenizer(tokenizer), ids)) == "is it"


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
    stream = Detokenizer(tokenizer, stops)
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
        found = "".join(deltas(Detokenizer(tokenizer, stops), ids))
        # the first whose end comes first; of those that end at one character, the one that begins first
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        assert found == (text[: min(ends)[1]] if ends else text), (text, stops)
