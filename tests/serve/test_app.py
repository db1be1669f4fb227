"""The routes, through the openai package and curl: models, completions, errors, health, and the page's files."""

import json
from pathlib import Path

import openai
import pytest
import torch

from lorasmith.adapters.folder import AdapterFolder
from lorasmith.config.model import ModelConfig
from lorasmith.loading.load import load_base
from lorasmith.model.probe import native_attention
from tests.support.serving import HI, LONG, Running, ask, curl, running, said, slow, user, wait_for


def test_models_say_what_they_are(served: Running):
    models = {model.id: model.model_dump() for model in served.client().models.list()}
    assert list(models)[1:] == ["calm", "loud"]  # the base stands first
    assert (models["calm"]["rank"], models["loud"]["rank"]) == (5, 2)
    assert models["calm"]["data"] == ["chats.jsonl"]
    assert models["calm"]["effect"] > 0
    assert models["calm"]["hash"] != models["loud"]["hash"]
    assert served.client().models.retrieve("calm").id == "calm"


def test_echo_with_logprobs_scores_the_prompt_as_lm_eval_asks(served: Running):
    base, ids = served.manager.registry.base, [5, 9, 40, 41, 60]
    reply = served.client().completions.create(
        model="loud", prompt=[ids, ids[:3]], max_tokens=1, logprobs=1, echo=True, temperature=0, seed=1
    )
    first, second = (choice.logprobs for choice in reply.choices)
    other = load_base(ModelConfig(model=str(base.folder), dtype="float32", device="cpu"))
    AdapterFolder.read(served.manager.registry.versions["loud"].discovered.folder).load_into(other, "default")
    with torch.no_grad(), native_attention(other):
        logits = other.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    wanted = [float(logits[i, ids[i + 1]]) for i in range(len(ids) - 1)]
    assert first.token_logprobs[0] is None
    assert first.token_logprobs[1:5] == pytest.approx(wanted, abs=1e-5)
    assert second.token_logprobs[1:3] == pytest.approx(wanted[:2], abs=1e-5)
    best = base.tokenizer.decode([int(logits[0].argmax())])
    assert first.top_logprobs[1] == pytest.approx({best: float(logits[0].max())}, abs=1e-5)
    assert "".join(first.tokens[:5]) == base.tokenizer.decode(ids)


TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
CALLED = [
    {"role": "user", "content": HI},
    {
        "role": "assistant",
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    },
    {"role": "tool", "content": "1", "tool_call_id": "1"},
    {"role": "user", "content": HI},
]


@pytest.mark.parametrize(
    ("changes", "param", "says"),
    [
        ({"temperature": -1}, "temperature", "at least 0"),
        ({"extra_body": {"temprature": 1}}, "temprature", "Did you mean 'temperature'"),
        ({"messages": user("word " * 300)}, None, "tokens"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages", "role 'user'"),
        ({"messages": []}, "messages", "messages"),
        ({"extra_body": {"tool_choice": "required"}}, "tool_choice", "none"),
        ({"tools": TOOLS}, "messages", "the template has no place for 'tools'"),
        ({"messages": CALLED}, "messages", "the template does not show 'tool_calls'"),
        ({"extra_body": {"temperature": True}}, "temperature", "a number"),
        ({"extra_body": {"max_tokens": "5"}}, "max_tokens", "a whole number"),
        ({"extra_body": {"seed": 1.0}}, "seed", "a whole number"),
    ],
)
def test_a_wrong_field_is_named(served: Running, changes, param, says):
    with pytest.raises(openai.BadRequestError, match=says) as caught:
        served.client().chat.completions.create(**{"model": "calm", "messages": user(HI)} | changes)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


def test_curl_is_told_what_is_wrong_with_a_body(served: Running):
    chat = f"{served.url}/v1/chat/completions"
    assert curl(chat, "-d", "{")[0] == 400
    assert curl(chat, "-d", "[]")[0] == 400
    assert curl(chat, "-d", "[" * 100_000)[0] == 400
    assert (
        curl(chat, "-d", json.dumps({"model": "calm", "messages": user(HI)})[:-1] + ', "seed": ' + "9" * 5000 + "}")[0]
        == 400
    )
    called = {"type": "function", "function": {"name": "f", "arguments": "[" * 100_000}}
    messages = [*user(HI), {"role": "assistant", "tool_calls": [called]}, *user(HI)]
    assert curl(chat, "-d", json.dumps({"model": "calm", "messages": messages}))[0] == 400
    for opening, closing in ('{"a":', "}"), ("[", "]"):
        tool = {"type": "function", "function": {"name": "f", "parameters": {"a": "DEEP"}}}
        asked = json.dumps({"model": "calm", "messages": user(HI), "tools": [tool]})
        deep = opening * 900 + "1" + closing * 900
        assert curl(chat, "-d", asked.replace('"DEEP"', deep))[0] == 400
    half = json.dumps({"model": "calm", "messages": user("\ud800")})  # of a pair of surrogates
    assert curl(chat, "-d", half)[0] == 400
    status, body = curl(chat, "-X", "PUT")
    assert (status, json.loads(body)["error"]["type"]) == (405, "invalid_request_error")
    status, body = curl(chat, "-d", "x" * (5 * 2**20 // 100), "-H", f"Content-Length: {2**30}")
    assert (status, json.loads(body)["error"]["code"]) == (413, "request_too_large")
    assert curl(f"{served.url}/v1/nothing") == (404, curl(f"{served.url}/v1/nothing")[1])
    assert json.loads(curl(f"{served.url}/v1/nothing")[1])["error"]["type"] == "not_found_error"


def test_no_message_is_said_in_words(served: Running):
    with pytest.raises(openai.BadRequestError, match="messages: invalid value \\[\\]: must be a non-empty list"):
        served.client().chat.completions.create(model="calm", messages=[])


def test_null_asks_for_nothing(served: Running):
    nulls = {"logit_bias": None, "reasoning_effort": None, "functions": None, "stop": None, "max_tokens": None}
    assert said(served.client().chat.completions.create(model="calm", messages=user(HI), seed=1, **nulls))


def test_more_replies_than_can_ever_wait_are_refused_before_they_are_made(served: Running):
    with pytest.raises(openai.BadRequestError, match="300 replies were requested, but this server returns at most 272"):
        served.client().completions.create(model="calm", prompt=[[5]] * 150, n=2)


def test_an_error_of_our_own_has_openais_form(served: Running, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lorasmith.serve.app.parse_chat", lambda *_args: 1 / 0)
    with pytest.raises(openai.InternalServerError) as caught:
        served.client().chat.completions.create(model="calm", messages=user(HI))
    assert caught.value.type == "server_error"


def test_a_client_that_leaves_frees_its_place(runs: Path, monkeypatch: pytest.MonkeyPatch):
    with running(runs, slots=1, queue=1) as served:
        slow(served, monkeypatch)
        engine, client, cancelled = served.manager.worker.engine, served.client(), []
        cancel = engine.cancel
        monkeypatch.setattr(engine, "cancel", lambda key: (cancelled.append(key), cancel(key)))
        with client.chat.completions.create(model="loud", **LONG, stream=True) as pieces:
            next(iter(pieces))
        wait_for(lambda: not served.manager.in_flight and not engine.busy)
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.2).chat.completions.create(model="loud", **LONG)
        wait_for(lambda: not served.manager.in_flight and not engine.busy)
        assert len(cancelled) == 2


@pytest.mark.parametrize(
    ("base", "says"),
    [
        (
            "",
            "Its name begins with /v1: set the base URL of the client to {url}/v1",
        ),
        ("/v1/v1", "/v1/v1/chat/completions: no such address. /v1 stands in it twice"),
        ("/api", "This server has /v1/chat/completions"),
    ],
)
def test_a_wrong_base_url_is_told_what_is_right(served: Running, base: str, says: str):
    client = served.client().with_options(base_url=served.url + base)
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="calm", messages=user(HI))
    assert says.format(url=served.url) in caught.value.body["message"]


def test_what_openai_has_and_this_server_has_not_is_refused_by_name(served: Running):
    with pytest.raises(openai.NotFoundError, match="no embeddings"):
        served.client().embeddings.create(model="calm", input=HI)
    for field, value in (("best_of", 2), ("suffix", "end")):
        with pytest.raises(openai.BadRequestError, match="not supported") as caught:
            served.client().completions.create(model="calm", prompt=HI, **{field: value})
        assert caught.value.param == field
    assert served.client().completions.create(model="calm", prompt=HI, best_of=1, suffix="").choices


def test_tokens_of_a_text_and_a_chat(served: Running):
    client, tokenizer = served.client(), served.manager.registry.base.tokenizer
    status, body = ask(served, "POST", "/tokenize", {"prompt": HI, "return_token_strs": True, "model": "calm"})
    wanted = tokenizer(HI)["input_ids"]
    assert (status, body["tokens"], body["count"]) == (200, wanted, len(wanted))
    assert body["token_strs"] == tokenizer.convert_ids_to_tokens(wanted)
    assert body["max_model_len"] == served.manager.context
    bare = ask(served, "POST", "/tokenize", {"prompt": HI, "add_special_tokens": False})[1]
    assert bare["tokens"] == tokenizer(HI, add_special_tokens=False)["input_ids"]
    assert ask(served, "POST", "/detokenize", {"tokens": bare["tokens"]}) == (200, {"prompt": HI})
    chat = ask(served, "POST", "/tokenize", {"messages": user(HI), "add_generation_prompt": True, "model": "calm"})[1]
    reply = client.chat.completions.create(model="calm", messages=user(HI), max_tokens=1)
    assert chat["count"] == reply.usage.prompt_tokens


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/tokenize", {"prompt": HI, "messages": user(HI)}, 400, "give either prompt or messages"),
        ("/tokenize", {"prompt": HI, "model": "lout"}, 404, "Did you mean 'loud'"),
        ("/tokenize", {"prompt": HI, "mesages": 1}, 400, "Did you mean 'messages'"),
        ("/tokenize", {"messages": user(HI), "add_generation_prompt": False}, 400, "not supported"),
        ("/tokenize", {"prompt": "word " * 2000}, 400, "tokens"),
        ("/detokenize", {"tokens": [10**6]}, 400, "tokens: token ids must be in the vocabulary"),
        ("/detokenize", {}, 400, "tokens: required key is missing"),
    ],
)
def test_what_cannot_be_tokenized_is_named(served: Running, path: str, body: dict, status: int, says: str):
    found, told = ask(served, "POST", path, body)
    assert found == status
    assert says in told["error"]["message"]
