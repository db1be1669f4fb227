"""The API's schema: its sampling parameters are the engine's, and errors have OpenAI's form."""

from types import SimpleNamespace

import pytest
from pydantic import BaseModel, ValidationError

from lorasmith.config.sampling import Sampling, SamplingConfig
from lorasmith.config.values import validation_messages
from lorasmith.data.rows.conversation import Message
from lorasmith.data.rows.messages import parse_messages
from lorasmith.serve.protocol import UNSUPPORTED, ChatRequest, CompletionRequest, Failure, FunctionName
from lorasmith.serve.request_parsing import requests

VERSION = SimpleNamespace(adapter=None, template=SimpleNamespace(stop_ids=(1,)))
TOOL: dict = {"type": "function", "function": {"name": "f"}}
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


@pytest.mark.parametrize(("kind", "asked"), REQUESTS)
@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in UNSUPPORTED.items() for value in values],
)
def test_an_unsupported_field_at_the_value_that_changes_nothing_is_accepted(
    name: str, value: object, kind: type[BaseModel], asked: dict
) -> None:
    (made,) = requests(kind.model_validate(asked | {name: value}), VERSION, [[5]], [7], {})
    assert made.sampling == SamplingConfig(temperature=1.0, max_new_tokens=7, seed=made.sampling.seed)


def problems(kind: type[BaseModel], values: dict) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(values)
    return validation_messages(caught.value, kind)


@pytest.mark.parametrize(("kind", "asked"), REQUESTS)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("min_tokens", 3),
        ("min_tokens", False),
        ("use_beam_search", True),
        ("use_beam_search", 0),
        ("chat_template_kwargs", {"enable_thinking": False}),
        ("modalities", ["text", "audio"]),
        ("guided_json", {}),
    ],
)
def test_an_unsupported_field_is_no_typing_error(name: str, value: object, kind: type[BaseModel], asked: dict) -> None:
    assert problems(kind, asked | {name: value}) == [f"{name}: not supported here. Leave it out."]
    assert problems(kind, asked | {"temprature": 0}) == ["temprature: unknown key. Did you mean 'temperature'?"]


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"type": "image_url", "image_url": {"url": "x"}}, "a message has a part of type 'image_url', but only text"),
        ({"type": "input_audio", "input_audio": {}}, "a message has a part of type 'input_audio', but only text"),
        ({"text": "?"}, "a message has a part of type None, but only text"),
        ({"type": "text"}, "a message has a part of type 'text' without a text. Add"),
    ],
)
def test_a_part_that_is_no_text_is_named(part: dict, says: str) -> None:
    parts = [{"type": "text", "text": "What is this?"}, part]
    (problem,) = problems(ChatRequest, {"model": "m", "messages": [{"role": "user", "content": parts}]})
    assert problem.startswith(f"messages: {says}")


@pytest.mark.parametrize(("kind", "asked"), REQUESTS)
@pytest.mark.parametrize(
    "hint",
    [
        {"reasoning_effort": "low"},
        {"verbosity": "low"},
        {"prediction": {"type": "content", "content": "x"}},
        {"prompt_cache_retention": "24h"},
        {"service_tier": "flex"},
        {"max_tokens": -1},  # llama.cpp and LM Studio
    ],
)
def test_hints_that_a_model_may_ignore_change_nothing(hint: dict, kind: type[BaseModel], asked: dict) -> None:
    (made,) = requests(kind.model_validate(asked | hint), VERSION, [[5]], [7], {})
    assert made.sampling == SamplingConfig(temperature=1.0, max_new_tokens=7, seed=made.sampling.seed)


@pytest.mark.parametrize(("kind", "asked"), REQUESTS)
def test_top_p_of_0_is_greedy_and_ignore_eos_keeps_going(kind: type[BaseModel], asked: dict) -> None:
    (made,) = requests(kind.model_validate(asked | {"top_p": 0, "ignore_eos": True}), VERSION, [[5]], [7], {})
    assert (made.sampling.temperature, made.sampling.top_p, made.stop_ids) == (0, 1, ())
    (made,) = requests(kind.model_validate(asked | {"logit_bias": {"5": -100}}), VERSION, [[5]], [7], {})
    assert (made.sampling.logit_bias, made.stop_ids) == ({5: -100.0}, (1,))


@pytest.mark.parametrize(
    ("form", "problem"),
    [
        ({"type": "json_schema"}, "json_schema is missing. It must be an object with `name` and `schema`."),
        ({"type": "grammar"}, "invalid value 'grammar': must be 'text', 'json_object' or 'json_schema'"),
    ],
)
def test_a_format_that_says_nothing_is_refused(form: dict, problem: str) -> None:
    assert problems(ChatRequest, REQUESTS[0][1] | {"response_format": form}) == [f"response_format: {problem}"]


@pytest.mark.parametrize(
    ("fields", "offered", "choice"),
    [
        ({"tools": [TOOL]}, [TOOL], "auto"),
        ({"tools": [TOOL], "tool_choice": "none"}, [], "none"),
        ({"tools": [TOOL], "tool_choice": "required"}, [TOOL], "required"),
        ({"tools": [TOOL], "tool_choice": TOOL}, [TOOL], FunctionName(name="f")),
        ({"functions": [TOOL["function"]], "function_call": {"name": "f"}}, [TOOL], FunctionName(name="f")),
        ({"functions": [TOOL["function"]], "function_call": "none"}, [], "none"),
    ],
)
def test_tools_in_both_forms(fields: dict, offered: list, choice: object) -> None:
    body = ChatRequest.model_validate(REQUESTS[0][1] | fields)
    assert (body.offered, body.choice) == (offered, choice)
    assert body.must_call == (choice not in ("none", "auto"))


def test_whether_special_tokens_are_added_is_as_vllm_has_it() -> None:
    for (kind, asked), usual in zip(REQUESTS, (False, True), strict=True):
        assert kind.model_validate(asked | {"add_special_tokens": usual})
        assert problems(kind, asked | {"add_special_tokens": not usual}) == [
            "add_special_tokens: not supported here. Leave it out."
        ]


def test_an_earlier_call_in_openais_older_form_is_read() -> None:
    """As data/rows/messages.py reads it in a row: what the adapter was trained with is what it is asked with."""
    call = {"name": "look", "arguments": '{"at": "sky"}'}
    older = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": None, "function_call": call, "tool_calls": None, "refusal": None},
        {"role": "function", "name": "look", "content": "blue"},
    ]
    body = ChatRequest.model_validate({"model": "m", "messages": older})
    made = parse_messages([message.model_dump(exclude_none=True) for message in body.messages])
    assert made == parse_messages(older)
    assert made[1].tool_calls[0]["function"] == {"name": "look", "arguments": {"at": "sky"}}
    assert made[2] == Message("tool", "blue", name="look")


@pytest.mark.parametrize(("key", "value"), [("refusal", "No."), ("audio", {"id": "a"}), ("prefix", True)])
def test_a_key_of_a_message_that_would_change_the_reply_is_refused(key: str, value: object) -> None:
    message = {"role": "assistant", "content": "!", key: value}
    assert problems(ChatRequest, {"model": "m", "messages": [message]}) == [
        f"messages: a message has '{key}', which is not supported. Leave it out."
    ]
    body = ChatRequest.model_validate({"model": "m", "messages": [message | {key: None, "id": "x"}]})
    assert body.messages[0].content == "!"
