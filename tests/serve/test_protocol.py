"""The engine's sampling is the API's: a field of it needs no second definition."""

from types import SimpleNamespace

import pytest
from pydantic import BaseModel, ValidationError

from lorasmith.config.sampling import Sampling, SamplingConfig
from lorasmith.serve.protocol import ChatRequest, CompletionRequest
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
