"""Log probabilities of tokens in the two forms that OpenAI has for them."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from lorasmith.engine.logprobs import TokenLogprobs
from lorasmith.engine.request import Event

Scored = tuple[
    int, float | None, Sequence[tuple[int, float]]
]  # a token, its log probability, the likeliest with theirs


def scored(event: Event) -> Scored | None:
    """What the engine says of a new token, if it was asked to."""
    found = event.logprobs
    return None if found is None else (event.token, found.logprob, found.top)


def chat_form(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[Scored]) -> dict[str, Any]:
    """{"content": [{"token", "logprob", "bytes", "top_logprobs"}]}."""

    def one(token: int, value: float | None) -> dict[str, Any]:
        text = str(tokenizer.decode([token]))
        return {"token": text, "logprob": value, "bytes": list(text.encode())}

    content = [one(token, own) | {"top_logprobs": [one(*pair) for pair in top]} for token, own, top in tokens]
    return {"content": content, "refusal": None}


def completion_form(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[Scored], offset: int = 0) -> dict[str, Any]:
    """{"tokens", "token_logprobs", "top_logprobs", "text_offset"}; the first token of an echo has no probability."""
    texts, offsets, tops = [], [], []
    for token, own, top in tokens:
        texts.append(str(tokenizer.decode([token])))
        offsets.append(offset)
        offset += len(texts[-1])
        likeliest: dict[str, float] = {}
        for other, value in top:  # the likeliest first: of two with one text it stays
            likeliest.setdefault(str(tokenizer.decode([other])), value)
        tops.append(None if own is None else likeliest)
    own_values = [own for _token, own, _top in tokens]
    return {"tokens": texts, "token_logprobs": own_values, "top_logprobs": tops, "text_offset": offsets}


def scored_prompt(ids: Sequence[int], found: Sequence[TokenLogprobs | None]) -> list[Scored]:
    """What engine.score says of a prompt's tokens."""
    pairs = zip(ids, found, strict=True)
    return [(token, None, ()) if told is None else (token, told.logprob, told.top) for token, told in pairs]
