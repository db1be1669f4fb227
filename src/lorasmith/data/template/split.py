"""Token ids of a rendered conversation, split into its prompts and answers."""

from collections.abc import Callable, Sequence
from itertools import accumulate, chain, pairwise, takewhile

from lorasmith.data.template.turns import Turn

Tokenize = Callable[[list[str]], list[list[int]]]


def split_ids(turns: Sequence[Turn], tokenize: Tokenize) -> list[tuple[list[int], list[int]]]:
    """The ids of each turn's prompt and answer. Concatenated, they are the ids of the whole text of the turns.

    Where the tokenizer merges the end of a prompt and the beginning of its answer into a token, or writes the end of
    the prompt otherwise before this answer, the answer begins with the first token that the prompt alone does not have.
    """
    pieces = [text for turn in turns for text in (turn.prompt, turn.answer or "")]
    *parts, whole = tokenize([*pieces, "".join(pieces)])
    if list(chain.from_iterable(parts)) != whole:
        beginnings = tokenize(list(accumulate(pieces)))
        ends = [0, *(_common(ids, whole) for ids in beginnings[:-1]), len(whole)]
        ends = list(accumulate(ends, max))
        parts = [whole[start:end] for start, end in pairwise(ends)]
    return list(zip(parts[::2], parts[1::2], strict=True))


def merges_prompt(turn: Turn, prompt: list[int], tokenize: Tokenize) -> bool:
    """Whether the prompt alone has other tokens than it has before its answer. For the first turn of an example."""
    return tokenize([turn.prompt])[0] != prompt


def _common(one: list[int], other: list[int]) -> int:
    """The number of equal tokens at the beginning of both."""
    return sum(1 for _same in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
