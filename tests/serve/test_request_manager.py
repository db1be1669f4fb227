"""Limits on what is under way, and what a client is told of an error in the model's thread."""

from pathlib import Path

import openai
import pytest

from lorasmith.errors import AdapterError, ModelError, OutOfMemoryError
from lorasmith.serve.protocol import Failure
from lorasmith.serve.request_manager import failure_of
from lorasmith.serve.worker import WorkerStopped
from tests.support.serving import HI, LONG, running, slow, user


def test_a_full_line_says_when_to_try_again(runs: Path, monkeypatch: pytest.MonkeyPatch):
    with running(runs, slots=1, queue=1) as served:
        slow(served, monkeypatch)
        client = served.client()
        streams = [client.chat.completions.create(model="loud", **LONG, n=2, stream=True)]
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model="calm", messages=user(HI))
        assert int(caught.value.response.headers["retry-after"]) >= 1
        streams[0].close()


def test_the_context_is_no_longer_than_the_cache(runs: Path) -> None:
    with running(runs, cache_tokens=40) as served:
        (model, *_rest) = served.client().models.list()
        assert model.max_model_len == 40
        with pytest.raises(openai.BadRequestError, match="together have at most 40 tokens"):
            served.client().completions.create(model="calm", prompt=[5] * 40, max_tokens=1)
        reply = served.client().completions.create(model="calm", prompt=[5] * 38, max_tokens=4)
        assert reply.usage.completion_tokens <= 2  # as many as there is room for


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (Failure(418, "as it is"), 418, "as it is"),
        (WorkerStopped(), 503, "shut down"),
        (MemoryError(), 503, "not enough memory"),
        (OutOfMemoryError("9 GiB"), 503, "9 GiB"),
        (ModelError("NaN"), 500, "NaN"),
        (AdapterError("its adapter"), 400, "its adapter"),
        (ZeroDivisionError("secret"), 500, "internal server error"),
    ],
)
def test_what_a_client_is_told_of_an_error(error: Exception, status: int, says: str) -> None:
    failure = failure_of(error)
    assert failure.status == status
    assert says in failure.text
    assert "secret" not in failure.text
    assert (failure.retry is not None) == isinstance(error, MemoryError | OutOfMemoryError)
