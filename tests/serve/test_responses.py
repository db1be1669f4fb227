"""Replies as JSON and as streams, through the openai package."""

import json
import urllib.request
from pathlib import Path

import openai
import pytest

from lorasmith.adapters.session import open_adapters
from lorasmith.config.model import ModelConfig
from lorasmith.config.sampling import SamplingConfig
from lorasmith.data.rows.conversation import Message
from lorasmith.serve import request_manager, responses
from tests.support import tiny
from tests.support.serving import HI, LONG, Running, running, said, slow, user


def test_answers_are_those_of_the_library(served: Running):
    client = served.client()
    for name in ("loud", "calm"):
        model = ModelConfig(model=str(tiny.model_folder()), dtype="float32", device="cpu")
        session = open_adapters([served.runs / name], model)
        wanted = session.reply([[Message("user", HI)]], session.names[0], SamplingConfig(max_new_tokens=12))[0]
        reply = client.chat.completions.create(model=name, messages=user(HI), max_tokens=12, temperature=0)
        assert said(reply) == wanted
        assert reply.usage.completion_tokens <= 12
        assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_a_stream_says_the_same(served: Running):
    client = served.client()
    asked = {"messages": user(HI), "max_tokens": 12, "temperature": 0, "model": "calm"}
    whole = client.chat.completions.create(**asked)
    pieces = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == said(whole)
    assert pieces[0].choices[0].delta.role == "assistant"
    assert {one.id.partition("-")[0] for one in (whole, *pieces)} == {"chatcmpl"}  # as OpenAI's
    assert pieces[-1].usage == whole.usage
    assert pieces[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_usage_is_counted_in_each_chunk_where_that_is_asked_for(served: Running):
    options = {"include_usage": True, "continuous_usage_stats": True}
    asked = {"model": "calm", "prompt": HI, "max_tokens": 6, "temperature": 0, "stream": True}
    pieces = list(served.client().completions.create(**asked, stream_options=options))
    counts = [piece.usage.completion_tokens for piece in pieces]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] == counts[-2]
    assert all(piece.usage.prompt_tokens == pieces[-1].usage.prompt_tokens > 0 for piece in pieces)
    assert pieces[-1].choices == []
    only = list(served.client().completions.create(**asked, stream_options={"include_usage": True}))
    assert [piece.usage is None for piece in only] == [True] * (len(only) - 1) + [False]


def test_an_unknown_model_names_the_nearest(served: Running):
    with pytest.raises(openai.NotFoundError, match="Did you mean 'loud'") as caught:
        served.client().chat.completions.create(model="lout", messages=user(HI))
    assert caught.value.code == "model_not_found"


def test_logprobs_and_json_of_a_chat(served: Running):
    asked = {"model": "calm", "messages": user(HI), "temperature": 0}
    told = served.client().chat.completions.create(**asked, max_tokens=4, logprobs=True, top_logprobs=2)
    content = told.choices[0].logprobs.content
    assert content[0].logprob == content[0].top_logprobs[0].logprob  # greedy: the likeliest
    assert "".join(one.token for one in content).startswith(said(told)[:1])


def test_a_stream_that_waits_is_kept_alive(runs: Path, monkeypatch: pytest.MonkeyPatch):
    for module in (request_manager, responses):
        monkeypatch.setattr(module, "HEARTBEAT", 0.1)
    with running(runs, slots=1) as served:
        slow(served, monkeypatch)
        first = served.client().chat.completions.create(model="loud", **LONG, stream=True)
        next(iter(first))
        body = {"model": "calm", "messages": user(HI), "max_tokens": 2, "stream": True}
        request = urllib.request.Request(f"{served.url}/v1/chat/completions", json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=20) as reply:
            text = reply.read().decode()
        assert "\n\n: still at it\n\n" in text
        assert text.endswith("data: [DONE]\n\n")
