"""Token ids of a rendered conversation, split into its prompts and answers."""

from collections.abc import Callable, Sequence
from itertools import accumulate, chain, pairwise, takewhile

from lorasmith.data.template.turns import Turn

Tokenize = Callable[[list[str]], list[list[int]]]
Spans = Sequence[tuple[int, int]]  # start and end of each token in the text, in characters
FEW = 4  # pieces whose beginnings are tokenized one by one; for more, that takes too long


def split_ids(
    turns: Sequence[Turn], tokenize: Tokenize, spans_of: Callable[[str], Spans | None] = lambda _text: None
) -> list[tuple[list[int], list[int]]]:
    """The ids of each turn's prompt and answer. Concatenated, they are the ids of the whole text of the turns.

    Where the tokenizer merges the end of a prompt and the beginning of its answer into a token, or writes the end of
    the prompt otherwise before this answer, the answer begins with the first token that the prompt alone does not have.
    spans_of: the spans of the tokens of a text, if they are known.
    """
    pieces = [text for turn in turns for text in (turn.prompt, turn.answer or "")]
    *parts, whole = tokenize([*pieces, "".join(pieces)])
    if list(chain.from_iterable(parts)) != whole:
        spans = spans_of("".join(pieces)) if len(pieces) > FEW else None
        ends = _ends_by_spans(pieces, spans) if spans is not None else _ends_by_beginnings(pieces, whole, tokenize)
        ends = list(accumulate([0, *ends, len(whole)], max))
        parts = [whole[start:end] for start, end in pairwise(ends)]
    return list(zip(parts[::2], parts[1::2], strict=True))


def _ends_by_beginnings(pieces: Sequence[str], whole: list[int], tokenize: Tokenize) -> list[int]:
    """Where each piece but the last ends in the ids of the whole text: as far as the text up to there has the same."""
    beginnings = tokenize(list(accumulate(pieces))[:-1])
    return [
        sum(1 for _same in takewhile(lambda pair: pair[0] == pair[1], zip(ids, whole, strict=False)))
        for ids in beginnings
    ]


def _ends_by_spans(pieces: Sequence[str], spans: Spans) -> list[int]:
    """The same from where the tokens stand: a token that a piece shares with the next one is the next one's."""
    ends, at, length = list[int](), 0, 0
    for piece in pieces[:-1]:
        length += len(piece)
        while at < len(spans) and spans[at][1] <= length:
            at += 1
        ends.append(at)
    return ends
