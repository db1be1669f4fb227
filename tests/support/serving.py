"""A server on a free port over a tiny model with three adapters that answer differently."""

import json
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from lorasmith.adapters.folder import write_adapter
from lorasmith.config.lora import LoraConfig
from lorasmith.config.model import ModelConfig
from lorasmith.config.serving import ServeConfig
from lorasmith.data.template.encoding import Template
from lorasmith.loading.load import load_base
from lorasmith.lora.inject import inject
from lorasmith.report import Report
from lorasmith.serve.app import make_app
from lorasmith.serve.auth import Key, KeyFile
from lorasmith.serve.discovery import discover
from lorasmith.serve.request_manager import RequestManager
from lorasmith.serve.server import DrainingServer, listen
from lorasmith.serve.startup import open_manager
from tests.support import tiny
from tests.support.families import stir

HI = "What do cats eat?"
LONG = {"messages": [{"role": "user", "content": HI}], "max_tokens": 90, "temperature": 0, "extra_body": {}}


@dataclass
class Running:
    """A server in a thread of this process."""

    manager: RequestManager
    server: DrainingServer
    url: str
    runs: Path

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=20)


def make_runs(folder: Path) -> Path:
    """A folder of runs: 'loud' (rank 2), 'calm' (rank 5), 'later' (outside, to be added), and two that are broken."""
    torch.set_num_threads(1)
    base = load_base(ModelConfig(model=str(tiny.model_folder()), dtype="float32", device="cpu"))
    template = Template.of(base.tokenizer)
    for seed, (name, rank) in enumerate((("loud", 2), ("calm", 5), ("later", 3))):
        base.adapters[name] = inject(base.model, LoraConfig(r=rank), base.router, name)
        stir(base.adapters[name], seed)
        run = folder / "runs" / name if name != "later" else folder / name
        write_adapter(base, name, template, run / "adapter", {"data": ["/data/chats.jsonl"]})
    (folder / "runs" / "unfinished").mkdir()
    (folder / "runs" / "unfinished" / "config.toml").write_text("")
    shutil.copytree(folder / "runs" / "loud", folder / "runs" / "broken")
    (folder / "runs" / "broken" / "adapter" / "adapter_config.json").write_text("{")
    (folder / "runs" / "notes").mkdir()
    return folder / "runs"


@contextmanager
def running(
    runs: Path, keys: KeyFile | list[Key] | None = None, folder: Path | None = None, **settings: Any
) -> Iterator[Running]:
    """A server until the caller is through. `folder`: of the base model, if it is not the tiny one."""
    options = ServeConfig(port=0, **settings)
    model = ModelConfig(model=str(folder or tiny.model_folder()), dtype="float32", device="cpu")
    with listen(options) as socket:
        manager = open_manager(discover([runs]), model, options, keys, Report())
        torch.set_num_threads(1)
        server = DrainingServer(make_app(manager), manager)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]}, daemon=True)
        thread.start()
        try:
            yield Running(manager, server, f"http://127.0.0.1:{socket.getsockname()[1]}", runs)
        finally:
            server.should_exit = True
            thread.join(10)
        assert not thread.is_alive()


def said(reply: Any) -> str:
    return str(reply.choices[0].message.content)


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def ask(served: Running, method: str, path: str, body: dict | None = None, key: str = "") -> tuple[int, dict]:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(served.url + path, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=20) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def wait_for(true) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def slow(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes so long that what happens meanwhile can be seen."""
    step = served.manager.worker.engine.step
    monkeypatch.setattr(served.manager.worker.engine, "step", lambda: (time.sleep(0.02), step())[1])


def post(served: Running, body: dict, key: str = "") -> tuple[int, dict]:
    """Load an adapter."""
    return ask(served, "POST", "/v1/adapters", body, key)


def curl(*words: str) -> tuple[int, str]:
    """Status and body."""
    done = subprocess.run(["curl", "-s", "-m", "20", "-w", "\n%{http_code}", *words], capture_output=True, text=True)
    body, _line, status = done.stdout.rpartition("\n")
    return int(status), body
