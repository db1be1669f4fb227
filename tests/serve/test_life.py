"""Adapters that come and go, clients that leave, lines and limits, keys, and the end."""

import asyncio
import json
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
from hashlib import sha256
from pathlib import Path

import openai
import pytest

from lorasmith.cli.main import main
from lorasmith.errors import AdapterError
from lorasmith.lora.variant import VARIANTS
from lorasmith.report import Report
from lorasmith.serve import app, registry, request_manager, responses
from lorasmith.serve.auth import Key
from lorasmith.serve.discovery import discover, resolve_inside
from lorasmith.serve.vllm import vllm_command
from lorasmith.serve.worker import WorkerStopped
from tests.support import tiny
from tests.support.serving import Running, ask, running, said, slow, user, wait_for

COMMAND = [sys.executable, "-c", "import sys; from lorasmith.cli.main import main; sys.exit(main(sys.argv[1:]))"]
HI = "What do cats eat?"
LONG = {"messages": user(HI), "max_tokens": 90, "temperature": 0, "extra_body": {}}


def post(served: Running, body: dict, key: str = "") -> tuple[int, dict]:
    return ask(served, "POST", "/v1/adapters", body, key)


@pytest.fixture
def own_runs(runs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(runs, tmp_path / "runs"))


def test_an_adapter_is_added_replaced_and_taken_away(own_runs: Path):
    with running(own_runs, context=120) as served:
        client = served.client()
        shutil.copytree(own_runs.parent / "runs" / "loud", own_runs / "new")
        status, model = post(served, {"name": "new"})
        assert (status, model["rank"], model["id"]) == (200, 2, "new")
        asked = {"model": "new", "messages": user(HI), "max_tokens": 60, "temperature": 0}
        as_loud = said(client.chat.completions.create(**asked))
        stream = client.chat.completions.create(**asked, stream=True)
        begun = next(iter(stream)).choices[0].delta.content or ""
        status, replaced = post(served, {"name": "new", "path": "calm"})
        assert (status, replaced["rank"]) == (200, 5)
        as_calm = said(client.chat.completions.create(**asked))
        rest = "".join(piece.choices[0].delta.content or "" for piece in stream)
        assert begun + rest == as_loud  # it finished on the version that it began with
        assert as_calm == said(client.chat.completions.create(**asked | {"model": "calm"}))
        assert as_calm != as_loud
        assert ask(served, "DELETE", "/v1/adapters/new")[0] == 200
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(**asked)
        wait_for(lambda: not [name for name in served.manager.registry.base.adapters if name.startswith("new@")])
        assert ask(served, "DELETE", f"/v1/adapters/{served.manager.registry.base_name}")[0] == 400


def test_paths_out_of_the_folder_are_refused(own_runs: Path, runs: Path):
    (own_runs / "link").symlink_to(runs.parent / "later")
    shutil.copytree(own_runs / "loud", own_runs / "sly")
    (own_runs / "sly" / "adapter" / "adapter_model.safetensors").unlink()
    (own_runs / "sly" / "adapter" / "adapter_model.safetensors").symlink_to(
        runs / "loud" / "adapter" / "adapter_model.safetensors"
    )
    with running(own_runs) as served:
        for path in ("../later", str(runs.parent / "later"), "link", "sly", "nowhere", "unfinished", "a" * 300):
            status, body = post(served, {"name": "x", "path": path})
            assert status == 400, path
            assert body["error"]["message"]
        assert "x" not in served.manager.registry.versions
        assert post(served, {"name": "../x"})[1]["error"]["param"] == "name"
    with pytest.raises(AdapterError, match="started with individual runs"):
        resolve_inside(discover([own_runs / "loud"]).roots, "calm")


def test_an_adapter_is_read_beside_the_replies_and_a_broken_one_ends_nothing(own_runs: Path, monkeypatch):
    with running(own_runs, context=120) as served:
        may_read, reading, client = threading.Event(), threading.Event(), served.client()
        read = registry.read
        monkeypatch.setattr(registry, "read", lambda *a: (reading.set(), may_read.wait(10), read(*a))[2])
        answers: list[tuple[int, dict]] = []
        adding = threading.Thread(target=lambda: answers.append(post(served, {"name": "new", "path": "loud"})))
        adding.start()
        assert reading.wait(10)
        said(client.chat.completions.create(model="calm", messages=user(HI), max_tokens=4))
        assert not answers
        may_read.set()
        adding.join()
        assert answers[0][0] == 200
        monkeypatch.setattr(registry, "read", lambda *_args: None)  # a kind of broken that nobody thought of
        assert post(served, {"name": "other", "path": "loud"})[0] == 500
        said(client.chat.completions.create(model="new", messages=user(HI), max_tokens=4))


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


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_is_asked_of_the_model_as_it_breaks_is_told_so(runs: Path, monkeypatch: pytest.MonkeyPatch):
    with running(runs) as served:
        worker, stepping, gate = served.manager.worker, threading.Event(), threading.Event()
        monkeypatch.setattr(worker.engine, "step", lambda: (stepping.set(), gate.wait(10), 1 / 0))
        stream = threading.Thread(
            target=lambda: ask(served, "POST", "/v1/completions", {"model": "calm", "prompt": "x"})
        )
        stream.start()
        assert stepping.wait(10)
        late = asyncio.run_coroutine_threadsafe(worker.call(lambda: 1), worker._loop)
        wait_for(lambda: worker._inbox.qsize() == 1)
        gate.set()
        with pytest.raises(WorkerStopped):
            late.result(10)
        stream.join()


def test_the_second_signal_tells_those_who_listen(runs: Path, monkeypatch: pytest.MonkeyPatch):
    with running(runs, context=120) as served:
        slow(served, monkeypatch)
        stream = served.client().chat.completions.create(model="loud", **LONG, stream=True)
        next(iter(stream))
        for _time in range(2):
            served.manager.worker._loop.call_soon_threadsafe(served.server.handle_exit, signal.SIGINT, None)
        with pytest.raises(openai.APIError, match="the server shut down"):
            list(stream)


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


def test_a_full_line_says_when_to_try_again(runs: Path, monkeypatch: pytest.MonkeyPatch):
    with running(runs, slots=1, queue=1) as served:
        slow(served, monkeypatch)
        client = served.client()
        streams = [client.chat.completions.create(model="loud", **LONG, n=2, stream=True)]
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model="calm", messages=user(HI))
        assert int(caught.value.response.headers["retry-after"]) >= 1
        streams[0].close()


def test_adapters_take_turns(runs: Path, monkeypatch: pytest.MonkeyPatch):
    with running(runs, slots=1) as served:
        slow(served, monkeypatch)
        client, order = served.client(), []

        def one(model: str) -> None:
            client.chat.completions.create(model=model, messages=user(HI), max_tokens=5, temperature=0)
            order.append(model)

        threads = [threading.Thread(target=one, args=("loud",)) for _n in range(6)]
        for thread in threads:
            thread.start()
        wait_for(lambda: len(served.manager.in_flight) + len(order) == 6)
        threads.append(threading.Thread(target=one, args=("calm",)))
        threads[-1].start()
        for thread in threads:
            thread.join()
        assert order.index("calm") < len(order) - 2


def test_keys_open_what_they_name(runs: Path):
    hashes = {name: sha256(name.encode()).hexdigest() for name in ("all", "one")}
    keys = [Key(hashes["all"], None), Key(hashes["one"], frozenset({"calm"}))]
    with running(runs, keys=keys) as served:
        asked = {"messages": user(HI), "max_tokens": 1}
        with pytest.raises(openai.AuthenticationError):
            served.client("wrong").chat.completions.create(model="calm", **asked)
        assert [model.id for model in served.client("one").models.list()] == ["calm"]
        said(served.client("one").chat.completions.create(model="calm", **asked))
        with pytest.raises(openai.NotFoundError):
            served.client("one").chat.completions.create(model="loud", **asked)
        assert post(served, {"name": "loud"}, "one")[0] == 403
        assert len(list(served.client("all").models.list())) == 3


def test_a_public_address_needs_keys(runs: Path, tmp_path: Path, capsys):
    assert main(["serve", str(runs), "--host", "0.0.0.0"]) == 2
    assert "--keys" in capsys.readouterr().err
    (tmp_path / "keys").write_text("hello\n")
    assert main(["serve", str(runs), "--keys", str(tmp_path / "keys")]) == 2
    assert "line 1" in capsys.readouterr().err


def test_the_command_serves_until_it_is_told_to_end(runs: Path):
    """The start screen says what there is; SIGTERM lets a running stream finish, then 0."""
    words = ["serve", str(runs), "--model", str(tiny.model_folder()), "--port", "0", "--context", "120"]
    program = subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert program.stdout is not None
    shown = ""
    while "curl" not in shown:
        line = program.stdout.readline()
        assert line, shown
        shown += line
    assert "calm" in shown
    assert "not valid JSON" in shown
    assert "not finished" in shown
    url = next(word for word in shown.split() if word.startswith("http://"))
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20)
    stream = client.chat.completions.create(model="loud", **LONG, stream=True)
    next(iter(stream))
    program.send_signal(signal.SIGTERM)
    pieces = list(stream)
    assert pieces[-1].choices[0].finish_reason
    assert program.wait(15) == 0


def test_the_command_for_vllm(runs: Path, capsys):
    assert main(["serve", str(runs), "--print-vllm"]) == 0
    base, line = tiny.model_folder(), capsys.readouterr().out.splitlines()[-1]
    flags = f"--served-model-name {base.name} --enable-lora --max-lora-rank 8 --max-loras 2 --lora-modules "
    assert line.startswith(f"vllm serve {base} {flags}")
    assert f"calm={runs}/calm/adapter" in line


def test_vllm_is_told_the_folder_of_a_packaged_base(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "lorasmith" / "models" / "smollm2-135m-instruct"
    shutil.copytree(tiny.model_folder(), folder)
    command, _problems = vllm_command(discover([runs]), "smollm2-135m-instruct", Report())
    assert command.startswith(f"vllm serve {folder} --served-model-name smollm2-135m-instruct --enable-lora ")


def test_vllm_is_told_whole_paths(runs: Path, monkeypatch: pytest.MonkeyPatch):
    base = tiny.model_folder()
    monkeypatch.setenv("HOME", str(base.parent))
    command, _problems = vllm_command(discover([runs]), f"~/{base.name}", Report())
    assert command.startswith(f"vllm serve {base} --served-model-name {base.name} ")


def test_vllm_takes_a_folder_with_a_comma_for_json(runs: Path, tmp_path: Path):
    own = Path(shutil.copytree(runs, tmp_path / "a,b"))
    command, _problems = vllm_command(discover([own]), "org/base", Report())
    _before, _flag, modules = command.partition(" --lora-modules ")
    told = [json.loads(word) for word in shlex.split(modules)]
    assert {"name": "calm", "path": f"{own}/calm/adapter"} in told
    assert command.startswith("vllm serve org/base --served-model-name base ")


def test_vllm_takes_patterns_of_ranks_from_a_version_on(own_runs: Path):
    path = own_runs / "loud" / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rank_pattern": {"q_proj": 20}}))
    command, problems = vllm_command(discover([own_runs]), "base", Report())
    assert "loud=" in command
    assert "--max-lora-rank 32" in command
    assert any(problem.startswith("loud: requires vLLM 0.32 or later") for problem in problems)


def test_what_vllm_refuses_is_named(own_runs: Path):
    path = own_runs / "loud" / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"modules_to_save": ["lm_head"], "bias": "all"}))
    command, problems = vllm_command(discover([own_runs]), "base", Report())
    assert "loud=" not in command
    assert sum("vLLM cannot serve loud" in problem for problem in problems) == 2


def test_vllm_is_given_no_variant_of_lora_whatever_comes_into_the_table(own_runs: Path, monkeypatch):
    monkeypatch.setitem(VARIANTS, "use_gain", VARIANTS["use_dora"])
    path = own_runs / "loud" / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_gain": True}))
    command, problems = vllm_command(discover([own_runs]), "base", Report())
    assert "loud=" not in command
    assert "vLLM cannot serve loud: use_gain is set" in problems
