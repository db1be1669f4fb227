"""The API's schema: its sampling parameters are the engine's, and errors have OpenAI's form."""

from types import SimpleNamespace

import pytest
from pydantic import BaseModel, ValidationError

from lorasmith.config.sampling import Sampling, SamplingConfig
from lorasmith.serve.protocol import ChatRequest, CompletionRequest, Failure
from lorasmith.serve.request_parsing import requests

VERSION = SimpleNamespace(adapter=None, template=SimpleNamespace(stop_ids=(1,)))
OWN = {"top_k", "temperature"}  # vLLM's -1; OpenAI's default
REQUESTS: list[tuple[type[BaseModel], dict[str, object]]] = [
    (ChatRequest, {"model": "m", "messages": [{"role": "user", "content": "?"}]}),
    (CompletionRequest, {"model": "m", "prompt": "?"}),
]


@pytest.mark.parametrize(("kind", "asked"), REQUESTS)
@pytest.mark.parametrize("name", list(Sampling.model_fields))
def test_a_sampling_parameter_is_the_engines_and_reaches_it(name: str, kind: type[BaseModel], asked: dict) -> None:
    field, own = Sampling.model_fields[name], kind.model_fields[name]
    assert own.description == field.description
    assert name in OWN or (own.metadata, own.default) == (field.metadata, field.default)
    value = 1 if field.annotation is int else 0.5
    (made,) = requests(kind.model_validate(asked | {name: value}), VERSION, [[5]], [7], {})
    assert getattr(made.sampling, name) == value != field.default


@pytest.mark.parametrize(("kind", "asked"), REQUESTS)
def test_what_is_not_given_is_as_openai_has_it(kind: type[BaseModel], asked: dict) -> None:
    (made,) = requests(kind.model_validate(asked), VERSION, [[5]], [7], {})
    assert made.sampling == SamplingConfig(temperature=1.0, max_new_tokens=7, seed=made.sampling.seed)


@pytest.mark.parametrize(("kind", "asked"), REQUESTS)
def test_the_engines_own_words_are_not_the_apis(kind: type[BaseModel], asked: dict) -> None:
    for word in ({"max_new_tokens": 5}, {"json_object": True}):
        with pytest.raises(ValidationError, match="Extra inputs"):
            kind.model_validate(asked | word)
    assert kind.model_validate(asked | {"top_k": -1}).sampling["top_k"] == 0
    with pytest.raises(ValidationError):
        kind.model_validate(asked | {"top_k": -2})


@pytest.mark.parametrize(
    ("status", "kind", "headers"),
    [
        (400, "invalid_request_error", {}),
        (401, "authentication_error", {"WWW-Authenticate": "Bearer"}),
        (404, "not_found_error", {}),
        (418, "invalid_request_error", {}),
        (500, "server_error", {}),
        (503, "service_unavailable_error", {}),
    ],
)
def test_an_error_has_openais_form(status: int, kind: str, headers: dict[str, str]) -> None:
    failure = Failure(status, "why", "n", "some_code")
    assert failure.body == {"error": {"message": "why", "type": kind, "param": "n", "code": "some_code"}}
    assert failure.headers == headers
    assert Failure(status, "why", retry=7).headers == headers | {"Retry-After": "7"}


@pytest.mark.parametrize(
    ("prompt", "n", "choices"),
    [("?", None, 1), ("?", 3, 3), (["?", "!"], 2, 4), ([5, 9], None, 1), ([[5], [9]], None, 2)],
)
def test_choices_are_counted_for_each_prompt(prompt: object, n: int | None, choices: int) -> None:
    assert CompletionRequest.model_validate({"model": "m", "prompt": prompt, "n": n}).choices == choices
