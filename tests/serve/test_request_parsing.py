"""From API requests to engine requests; long texts are read one at a time, far too long ones are refused unread."""

import shutil
import threading
from pathlib import Path

import openai
import pytest
from transformers import AutoTokenizer

from lorasmith.data.template.encoding import Template
from lorasmith.serve import app, request_parsing
from tests.support import tiny
from tests.support.serving import HI, Running, ask, running, said, user, wait_for

LONG_TEXT = "cats eat mice " * (3_600_000 // 14)


class Gate:
    """Tokenizing of long prompts waits at it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.inside, self.most, self.total = threading.Event(), 0, 0, 0
        ids_of, lock = Template.ids_of, threading.Lock()

        def waits(template: Template, texts: list[str]) -> list[int]:
            if sum(map(len, texts)) < 2**16:
                return ids_of(template, texts)
            with lock:
                self.inside, self.total = self.inside + 1, self.total + 1
                self.most = max(self.most, self.inside)
            assert self.open.wait(20)
            with lock:
                self.inside -= 1
            return [5] * 1000

        monkeypatch.setattr(Template, "ids_of", waits)


def ask_in_thread(served: Running, text: str, codes: list[str]) -> threading.Thread:
    body = {"model": "calm", "messages": user(text), "max_tokens": 2}
    work = lambda: codes.append(ask(served, "POST", "/v1/chat/completions", body)[1]["error"]["code"])  # noqa: E731
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_a_text_that_is_too_long_however_it_is_read_is_not_tokenized(served: Running, monkeypatch) -> None:
    gate = Gate(monkeypatch)
    with pytest.raises(openai.BadRequestError, match=r"at least \d+ tokens; .* at most 120") as caught:
        served.client().chat.completions.create(model="calm", messages=user(LONG_TEXT))
    assert caught.value.code == "context_length_exceeded"
    for prompt in (LONG_TEXT, [HI, LONG_TEXT]):
        with pytest.raises(openai.BadRequestError, match="at least"):
            served.client().completions.create(model="calm", prompt=prompt)
    assert gate.total == 0


def test_a_short_chat_passes_long_ones(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a tokenizer says nothing of how long a text may be."""
    monkeypatch.setattr(request_parsing, "least_tokens", lambda *_args: 0)
    gate, codes = Gate(monkeypatch), list[str]()
    with running(runs, context=120) as served:
        threads = [ask_in_thread(served, LONG_TEXT, codes) for _n in range(12)]
        wait_for(lambda: gate.inside and served.manager.parsing._waiting == 12)
        assert said(
            served.client().chat.completions.create(model="calm", messages=user(HI), max_tokens=2, temperature=0)
        )
        gate.open.set()
        for thread in threads:
            thread.join()
    assert (gate.most, gate.total) == (1, 12)
    assert set(codes) == {"context_length_exceeded"}


def test_more_long_texts_than_may_wait_are_told_to_come_later(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_parsing, "least_tokens", lambda *_args: 0)
    monkeypatch.setattr(request_parsing, "MAX_LONG_WAITING", 2)
    gate, codes = Gate(monkeypatch), list[str]()
    with running(runs, context=120) as served:
        threads = [ask_in_thread(served, LONG_TEXT, codes) for _n in range(2)]
        wait_for(lambda: served.manager.parsing._waiting == 2)
        with pytest.raises(openai.RateLimitError) as caught:
            served.client().chat.completions.create(model="calm", messages=user(LONG_TEXT))
        assert int(caught.value.response.headers["retry-after"]) == 10
        gate.open.set()
        for thread in threads:
            thread.join()


def test_who_leaves_is_not_read_any_more(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_parsing, "least_tokens", lambda *_args: 0)
    gate, codes = Gate(monkeypatch), list[str]()
    with running(runs, context=120) as served:
        first = ask_in_thread(served, LONG_TEXT, codes)
        wait_for(lambda: gate.inside == 1)
        with pytest.raises(openai.APITimeoutError):
            served.client().with_options(timeout=0.5).chat.completions.create(model="calm", messages=user(LONG_TEXT))
        wait_for(lambda: served.manager.parsing._waiting == 1)
        gate.open.set()
        first.join()
    assert gate.total == 1


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


def test_a_long_text_holds_nobody_up_and_keeps_its_adapter(own_runs: Path, monkeypatch: pytest.MonkeyPatch):
    with running(own_runs, context=120) as served:
        may_go, begun, parse_chat = threading.Event(), threading.Event(), app.parse_chat
        monkeypatch.setattr(app, "parse_chat", lambda *a: (begun.set(), may_go.wait(30), parse_chat(*a))[2])
        answers: list[str] = []
        asked = {"model": "loud", "messages": user(HI), "max_tokens": 4}
        asking = threading.Thread(
            target=lambda: answers.append(said(served.client().chat.completions.create(**asked, seed=1)))
        )
        asking.start()
        assert begun.wait(10)
        assert ask(served, "DELETE", "/v1/adapters/loud")[0] == 200
        may_go.set()
        asking.join()
        assert len(answers) == 1


def test_a_token_that_the_model_has_no_embedding_for_is_refused_and_the_server_goes_on(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny.model_folder(), tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens("<|extra|>")
    tokenizer.save_pretrained(folder)
    (tmp_path / "runs").mkdir()
    with running(tmp_path / "runs", folder=folder, context=120) as served:
        client, extra = served.client(), len(tokenizer) - 1
        for prompt in ([5, extra], "a <|extra|>"):
            for more in ({}, {"echo": True, "logprobs": 1, "max_tokens": 0}):
                with pytest.raises(openai.BadRequestError, match=r"contains the token '<\|extra\|>', whose id is 300"):
                    client.completions.create(model="model", prompt=prompt, **more)
        with pytest.raises(openai.BadRequestError, match="contains the token"):
            client.chat.completions.create(model="model", messages=user("Is it <|extra|>?"), stream=True)
        assert said(client.chat.completions.create(model="model", messages=user(HI), max_tokens=2, seed=1)) is not None
        assert served.manager.worker.is_alive
