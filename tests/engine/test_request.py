"""What a token adds to a request, and when its reply is complete."""

import pytest

from lorasmith.config.sampling import SamplingConfig
from lorasmith.engine.detokenizer import Detokenizer
from lorasmith.engine.request import Chunk, Request, RunningRequest
from tests.support.decoding import Letters


def running(limit: int = 9, **sampling: object) -> RunningRequest:
    one = Request([4, 5], SamplingConfig.model_validate(sampling))
    stops = Detokenizer(Letters(), one.sampling.stop)  # type: ignore[arg-type]
    return RunningRequest(3, one, list(one.ids), limit, frozenset({1}), stops)


@pytest.mark.parametrize(
    ("tokens", "finish", "text"),
    [
        ([7, 8], None, "ćĈ"),
        ([7, 1], "stop", "ć"),  # the stop token is shown in no text
        ([7, 8, 9, 10, 11, 12, 13], "length", "ćĈĉĊċČč"),
    ],
)
def test_a_reply_ends_with_a_stop_token_or_at_its_limit(tokens: list[int], finish: str | None, text: str) -> None:
    one = running()
    events = [one.accept(token) for token in tokens]
    assert [event.finish for event in events] == [None] * (len(tokens) - 1) + [finish]
    assert [(event.key, event.token) for event in events] == [(3, token) for token in tokens]
    assert "".join(event.text for event in events) == text
    assert (one.replied, one.ids) == (len(tokens), [4, 5, *tokens])


def test_a_stop_text_ends_it_too_and_is_not_shown() -> None:
    one = running(stop=("Ĉĉ",))
    events = [one.accept(token) for token in (7, 8, 9)]
    assert [event.finish for event in events] == [None, None, "stop"]
    assert "".join(event.text for event in events) == "ć"


def test_tokens_that_are_not_cached_are_pending() -> None:
    one = running()
    assert (one.pending, Chunk(one, 2).is_last, Chunk(one, 1).is_last) == (2, True, False)
    one.past = 2
    one.accept(7)
    assert (one.pending, Chunk(one, 1).is_last) == (1, True)


@pytest.mark.parametrize("penalty", [{}, {"repetition_penalty": 1.1}, {"presence_penalty": 0.1}])
def test_tokens_are_counted_only_where_a_penalty_needs_them(penalty: dict[str, float]) -> None:
    one = running(**penalty)
    one.accept(5)
    assert (one.token_counts is None) == (not penalty)
    if one.token_counts is not None:
        assert one.token_counts.ids_I.tolist() == [4, 5]
        assert one.token_counts.counts_I.tolist() == [0.0, 1.0]
