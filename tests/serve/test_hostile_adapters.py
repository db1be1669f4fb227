"""Adapters that come from anywhere: what they bring costs the server little time and memory, and replies go on."""

import json
import os
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import openai
import pytest

from lorasmith.adapters import folder as adapter_folder
from lorasmith.data.template import isolated
from tests.support.serving import HI, Running, ask, curl, post, running, said, user, wait_for

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def as_foreign(runs: Path, name: str, template: str) -> None:
    """A copy of the adapter 'loud' as another tool would leave it, with a chat template of its own."""
    shutil.copytree(runs / "loud" / "adapter", runs / name)
    (runs / name / "lorasmith.json").unlink()
    (runs / name / "chat_template.jinja").write_text(template)


def changed(runs: Path, name: str, **changes: Any) -> None:
    """A copy of the adapter 'loud' with other options in adapter_config.json."""
    shutil.copytree(runs / "loud", runs / name)
    path = runs / name / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def answers_soon(served: Running) -> None:
    began = time.monotonic()
    said(served.client().chat.completions.create(model="calm", messages=user(HI), max_tokens=2))
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("template", "says"), [(LOOP, "takes longer than 1 s"), ("{{ 'x' * 10 ** 10 }}", "MiB of memory|longer than 1 s")]
)
def test_a_template_that_never_ends_is_refused_and_delays_nobody(
    own_runs: Path, template: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolated, "SECONDS", 1.0)
    with running(own_runs, context=120) as served:
        as_foreign(own_runs, "endless", template)
        answers: list[tuple[int, dict]] = []
        adding = threading.Thread(target=lambda: answers.append(post(served, {"name": "endless"})))
        adding.start()
        answers_soon(served)
        assert ask(served, "GET", "/v1/models")[0] == 200
        adding.join(60)
        ((status, body),) = answers
        assert status == 400
        assert re.search(says, body["error"]["message"])
        assert "endless" not in served.manager.registry.names()


def test_a_template_that_loops_for_some_messages_delays_only_its_own_adapter(
    own_runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(own_runs, context=120) as served:
        as_foreign(own_runs, "trap", "{% if messages[0].content == 'now' %}" + LOOP + "{% endif %}" + PLAIN)
        assert post(served, {"name": "trap"})[0] == 200
        client = served.client()
        asked = {"max_tokens": 2, "temperature": 0}
        said(client.chat.completions.create(model="trap", messages=user(HI), **asked))
        monkeypatch.setattr(isolated, "SECONDS", 2.0)
        errors: list[str] = []

        def ask_trap() -> None:
            try:
                client.chat.completions.create(model="trap", messages=user("now"), **asked)
            except openai.BadRequestError as error:
                errors.append(str(error))

        threads = [threading.Thread(target=ask_trap) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        for _time in range(3):
            answers_soon(served)
        for thread in threads:
            thread.join(60)
        assert len(errors) == 4
        assert all("the chat template takes longer than 2 s" in error for error in errors)
        monkeypatch.setattr(isolated, "SECONDS", 10.0)
        said(client.chat.completions.create(model="trap", messages=user(HI), **asked))


def test_a_hundred_thousand_target_names_are_found_in_a_moment(own_runs: Path) -> None:
    names = json.loads((own_runs / "loud" / "adapter" / "adapter_config.json").read_text())["target_modules"]
    with running(own_runs, context=120) as served:
        changed(own_runs, "names", target_modules=[*names, *(f"no_module_{i}" for i in range(99_000))])
        changed(own_runs, "more", target_modules=[f"no_module_{i}" for i in range(100_001)])
        changed(own_runs, "keys", rank_pattern={f"no_module_{i}": 2 for i in range(10_001)})
        began = time.monotonic()
        assert post(served, {"name": "names"})[0] == 200
        for name, says in (("more", "target_modules has 100,001 entries"), ("keys", "rank_pattern has 10,001 entries")):
            status, body = post(served, {"name": name})
            assert status == 400
            assert says in body["error"]["message"]
        assert time.monotonic() - began < 15
        answers_soon(served)


def test_many_slow_expressions_have_two_seconds_together(own_runs: Path) -> None:
    with running(own_runs, context=120) as served:
        changed(own_runs, "slow", rank_pattern={f"(a|l|ay|[a-z.])*{i}x": 2 for i in range(2000)})
        began = time.monotonic()
        status, body = post(served, {"name": "slow"})
        assert (status, "takes longer than 2 s" in body["error"]["message"]) == (400, True)
        assert time.monotonic() - began < 15
        assert list(served.manager.registry.names())[1:] == ["calm", "loud"]
        answers_soon(served)


def test_files_that_are_pipes_or_huge_are_refused(own_runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(own_runs, context=120) as served:
        for name, file in (("weights", "adapter_model.safetensors"), ("config", "adapter_config.json")):
            shutil.copytree(own_runs / "loud", own_runs / name)
            (own_runs / name / "adapter" / file).unlink()
            os.mkfifo(own_runs / name / "adapter" / file)
            status, body = post(served, {"name": name})
            assert status == 400, body
        monkeypatch.setattr(adapter_folder, "MAX_JSON", 2**20)
        changed(own_runs, "huge", base_model_name_or_path="x" * 2**20)
        assert "the file is larger than 1 MiB" in post(served, {"name": "huge"})[1]["error"]["message"]
        answers_soon(served)


def test_errors_do_not_show_where_the_server_keeps_its_files(own_runs: Path) -> None:
    with running(own_runs, context=120) as served:
        for name in ("broken", "unfinished", "notes"):
            status, body = post(served, {"name": name})
            assert status == 400
            assert str(own_runs) not in body["error"]["message"]
            assert name in body["error"]["message"]
        changed(own_runs, "other", target_modules=["no_such"])
        path = own_runs / "other" / "adapter" / "lorasmith.json"
        metadata = json.loads(path.read_text())
        metadata["base"]["identity"]["config"] = "0" * 16
        path.write_text(json.dumps(metadata))
        message = post(served, {"name": "other"})[1]["error"]["message"]
        assert message.startswith("other/adapter: ")
        assert f"{served.manager.registry.base_name} is not the base model" in message


def test_health_tells_when_the_model_does_not_come_back(own_runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorasmith.serve.worker.STUCK_SECONDS", 0.3)
    with running(own_runs, context=120) as served:
        answers_soon(served)  # it has started
        may_end = threading.Event()
        served.manager.worker.do(lambda: may_end.wait(10))
        wait_for(lambda: status_of(served, "/health") == 503)
        assert status_of(served, "/ready") == 503
        may_end.set()
        wait_for(lambda: status_of(served, "/health") == 200)
        time.sleep(0.5)  # with nothing to do
        assert status_of(served, "/health") == 200


def status_of(served: Running, path: str) -> int:
    return curl(served.url + path)[0]
