"""Completions, limits, errors and watching, through the openai package and curl."""

import json
import subprocess

import openai
import pytest
import torch

from lorasmith.adapters.folder import AdapterFolder
from lorasmith.config.model import ModelConfig
from lorasmith.engine.scoring import BATCH_TOKENS, prompt_batches
from lorasmith.loading.load import load_base
from lorasmith.model.probe import native_attention
from lorasmith.serve.tool_calls import ToolCallStream, parse_tool_calls
from tests.support.serving import Running, said, user

HI = "What do cats eat?"


def curl(*words: str) -> tuple[int, str]:
    """Status and body."""
    done = subprocess.run(["curl", "-s", "-m", "20", "-w", "\n%{http_code}", *words], capture_output=True, text=True)
    body, _line, status = done.stdout.rpartition("\n")
    return int(status), body


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


def test_logprobs_and_json_of_a_chat(served: Running):
    asked = {"model": "calm", "messages": user(HI), "temperature": 0}
    told = served.client().chat.completions.create(**asked, max_tokens=4, logprobs=True, top_logprobs=2)
    content = told.choices[0].logprobs.content
    assert content[0].logprob == content[0].top_logprobs[0].logprob  # greedy: the likeliest
    assert "".join(one.token for one in content).startswith(said(told)[:1])


def test_json_where_it_is_asked_for(served: Running):
    pytest.importorskip("llguidance")
    form = {"type": "json_object"}
    client = served.client()
    reply = client.chat.completions.create(model="calm", messages=user(HI), max_tokens=8, response_format=form)
    assert said(reply).startswith("{")


@pytest.mark.parametrize("prompt", ["What do", ["What do", "cats"], [5, 9, 40], [[5, 9], [40]]])
def test_prompts_in_all_four_forms(served: Running, prompt):
    reply = served.client().completions.create(model="calm", prompt=prompt, max_tokens=3, n=2)
    assert reply.id.startswith("cmpl-")
    many = isinstance(prompt, list) and not isinstance(prompt[0], int)
    assert [choice.index for choice in reply.choices] == list(range(2 * (len(prompt) if many else 1)))


def test_seeds_repeat_and_choices_differ(served: Running):
    client = served.client()
    asked = {"model": "loud", "messages": user(HI), "max_tokens": 8, "seed": 7, "n": 3, "temperature": 1.5}
    first, second = (client.chat.completions.create(**asked) for _time in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in second.choices]
    assert len(set(texts)) == 3


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
        ({"max_tokens": 5000}, "max_tokens", "context length of 120 tokens"),
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
    deep = {"type": "function", "function": {"name": "f", "arguments": "[" * 100_000}}
    called = [*user(HI), {"role": "assistant", "tool_calls": [deep]}, *user(HI)]
    assert curl(chat, "-d", json.dumps({"model": "calm", "messages": called}))[0] == 400
    half = json.dumps({"model": "calm", "messages": user("\ud800")})  # of a pair of surrogates
    assert curl(chat, "-d", half)[0] == 400
    status, body = curl(chat, "-X", "PUT")
    assert (status, json.loads(body)["error"]["type"]) == (405, "invalid_request_error")
    status, body = curl(chat, "-d", "x" * (5 * 2**20 // 100), "-H", f"Content-Length: {2**30}")
    assert (status, json.loads(body)["error"]["code"]) == (413, "request_too_large")
    assert curl(f"{served.url}/v1/nothing") == (404, curl(f"{served.url}/v1/nothing")[1])
    assert json.loads(curl(f"{served.url}/v1/nothing")[1])["error"]["type"] == "not_found_error"


def test_health_ready_and_metrics(served: Running):
    assert curl(f"{served.url}/health")[0] == curl(f"{served.url}/ready")[0] == 200
    said(served.client().chat.completions.create(model="calm", messages=user(HI), max_tokens=2, temperature=0))
    text = curl(f"{served.url}/metrics")[1]
    for name in ("num_requests_running", "generation_tokens_total", "time_to_first_token_seconds_count"):
        assert f'lorasmith:{name}{{model_name="calm"}}' in text
    assert "lorasmith:kv_cache_usage_perc" in text


def test_calls_of_tools_are_read_where_they_are_json():
    text = 'Well.\n<tool_call>\n{"name": "find", "arguments": {"word": "猫"}}\n</tool_call>'
    content, calls = parse_tool_calls(text)
    assert content == "Well."
    assert calls[0]["function"] == {"name": "find", "arguments": '{"word": "猫"}'}
    assert parse_tool_calls("<tool_call>find</tool_call>") == ("<tool_call>find</tool_call>", [])
    held = ToolCallStream()
    assert "".join(map(held.push, text)) == "Well.\n"
    assert held.close()[1][0]["function"]["name"] == "find"


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


def test_prompts_are_scored_in_rows():
    long, short = [1] * (BATCH_TOKENS - 1), [1, 2]
    assert list(prompt_batches(list(map(len, [short, short, long, short])))) == [[0, 1], [2], [3]]


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("Host: evil.example", 403),
        ("Host: 127.0.0.1.evil.example:8000", 403),
        ("Host: [evil", 403),
        ("Host: LOCALHOST:9", 200),
        ("Host: [::1]:9", 200),
        ("Origin: https://evil.example", 403),
        ("Origin: null", 403),
        ("Origin: http://localhost:3000", 200),
        ("Origin: app://notes", 200),
    ],
)
def test_pages_from_elsewhere_are_refused_where_no_key_is_asked_for(served: Running, header, status):
    assert curl(f"{served.url}/v1/models", "-H", header)[0] == status
