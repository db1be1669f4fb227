"""A server on a free port over a tiny model with three adapters that answer differently."""

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
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
from lorasmith.serve.desk import Desk
from lorasmith.serve.found import look
from lorasmith.serve.keys import Key
from lorasmith.serve.server import DrainingServer, listen
from lorasmith.serve.start import open_desk
from tests.support import tiny
from tests.support.families import stir


@dataclass
class Running:
    """A server in a thread of this process."""

    desk: Desk
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
def running(runs: Path, keys: list[Key] | None = None, **settings: Any) -> Iterator[Running]:
    """A server until the caller is through."""
    options = ServeConfig(port=0, **settings)
    model = ModelConfig(model=str(tiny.model_folder()), dtype="float32", device="cpu")
    with listen(options) as socket:
        desk = open_desk(look([runs]), model, options, keys, Report())
        torch.set_num_threads(1)
        server = DrainingServer(make_app(desk), desk)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]}, daemon=True)
        thread.start()
        try:
            yield Running(desk, server, f"http://127.0.0.1:{socket.getsockname()[1]}", runs)
        finally:
            server.should_exit = True
            thread.join(10)
        assert not thread.is_alive()


def said(reply: Any) -> str:
    return str(reply.choices[0].message.content)


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]
