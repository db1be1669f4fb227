"""Open-loop load on a real server: every adapter must reply with its own name.

Requests arrive at random times, at 80% of the measured capacity, through the openai package. Meanwhile some clients
disconnect, some send invalid requests, and an adapter is repeatedly loaded and unloaded.
"""

import asyncio
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import openai
import torch

from bench.serving.names import PROMPTS, answer_of, name_of
from bench.state import say

LOAD, LEAVE, BAD = 0.8, 0.03, 0.02
NAME = "temporary"
TEMPORARY = "temporary adapter (loaded, queried and unloaded again and again)"
REPLY = 12  # tokens: enough for the expected reply and the stop token


class Server:
    """`lorasmith serve` on a folder of adapters, in a process of its own."""

    def __init__(self, model: str, folder: Path) -> None:
        words = ["serve", str(folder), "--model", model, "--port", "0", "--queue", "4000", "--plain"]
        code = "import sys; from lorasmith.cli.main import main; sys.exit(main(sys.argv[1:]))"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.url = self._address()

    def _address(self) -> str:
        assert self.process.stdout is not None
        seen = []
        for line in self.process.stdout:
            seen.append(line)
            if found := re.search(r"http://[\d.]+:\d+", line):
                return found[0]
        raise RuntimeError("".join(seen))

    def resident_mib(self) -> float:
        """Resident memory of the server in MiB."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024  # type: ignore[index]

    def end(self) -> int:
        """Send SIGTERM and return the exit status."""
        self.process.terminate()
        return self.process.wait(timeout=60)


class Visitors:
    """Clients of a server, and the outcomes of their requests."""

    def __init__(self, url: str, count: int) -> None:
        self.client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
        self.count, self.random = count, random.Random(0)
        self.fates: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.first: list[float] = []
        self.whole: list[float] = []

    async def ask(self, number: int, leaves: bool = False) -> None:
        """Send a streaming request, whose reply must be the name of its adapter."""
        name, start, text, first = name_of(number), time.perf_counter(), "", None
        try:
            stream = await self.client.chat.completions.create(
                model=name,
                messages=[{"role": "user", "content": self.random.choice(PROMPTS)}],
                max_tokens=REPLY,
                temperature=0,
                stream=True,
            )
            async for chunk in stream:
                first = first or time.perf_counter() - start
                text += chunk.choices[0].delta.content or "" if chunk.choices else ""
                if leaves and text:
                    await stream.close()
                    self.fates["disconnected by the client"] += 1
                    return
        except openai.APIError as error:
            self.fates[type(error).__name__] += 1
            return
        self.first.append(first or 0.0)
        self.whole.append(time.perf_counter() - start)
        if text.startswith(answer_of(name).rstrip(".")):
            self.fates["answered"] += 1
        else:
            self.fates["answered wrongly"] += 1
            self.wrong.append(f"{name}: {text}")

    async def send_rubbish(self) -> None:
        """Send an invalid request, which must be rejected."""
        try:
            await self.client.chat.completions.create(model=name_of(0), messages=[{"role": "cat"}])  # type: ignore[list-item]
        except openai.BadRequestError:
            self.fates["invalid, rejected"] += 1
        else:
            self.fates["invalid, answered"] += 1

    async def come_and_go(self, ended: asyncio.Event) -> None:
        """Repeatedly load an adapter, send it a request and unload it."""
        while not ended.is_set():
            await self.client.post("/adapters", body={"name": NAME, "path": NAME}, cast_to=object)
            said = await self.client.chat.completions.create(
                model=NAME, messages=[{"role": "user", "content": PROMPTS[0]}], max_tokens=REPLY, temperature=0
            )
            right = (said.choices[0].message.content or "").startswith(answer_of(name_of(0)).rstrip("."))
            self.fates[f"{TEMPORARY}, answered" if right else f"{TEMPORARY}, answered wrongly"] += 1
            await self.client.delete(f"/adapters/{NAME}", cast_to=object)
            await asyncio.sleep(0.5)


async def _capacity(visitors: Visitors, at_once: int, total: int) -> float:
    """Requests per second with `at_once` concurrent clients."""
    left = iter(range(total))

    async def work() -> None:
        for i in left:
            await visitors.ask(i % visitors.count)

    start = time.perf_counter()
    await asyncio.gather(*(work() for _client in range(at_once)))
    return total / (time.perf_counter() - start)


async def _visit(server: Server, count: int, requests: int) -> dict[str, Any]:
    visitors = Visitors(server.url, count)
    await _capacity(visitors, 16, 2 * count)  # every adapter once or twice: warm
    capacity = await _capacity(visitors, 16, max(64, count))
    say(f"capacity {capacity:.1f} requests/s; {requests} come at {LOAD * capacity:.1f}/s")
    visitors = Visitors(server.url, count)
    memory, ended, tasks = [server.resident_mib()], asyncio.Event(), list[Awaitable[None]]()
    temporary = asyncio.create_task(visitors.come_and_go(ended))
    for i in range(requests):
        await asyncio.sleep(visitors.random.expovariate(LOAD * capacity))
        luck = visitors.random.random()
        one = visitors.send_rubbish() if luck < BAD else visitors.ask(i % count, luck < BAD + LEAVE)
        tasks.append(asyncio.create_task(one))
        if i % (requests // 10 or 1) == 0:
            memory.append(server.resident_mib())
            say(f"{i} of {requests}: {memory[-1]:.0f} MiB")
    await asyncio.gather(*tasks)
    ended.set()
    await temporary
    memory.append(server.resident_mib())
    accounted = sum(n for fate, n in visitors.fates.items() if TEMPORARY not in fate)
    return {
        "capacity_per_second": capacity,
        "requests": requests,
        "fates": dict(visitors.fates),
        "lost": requests - accounted,
        "wrong": visitors.wrong[:20],
        "first_token_s": _spread(visitors.first),
        "whole_reply_s": _spread(visitors.whole),
        "memory_mib": memory,
    }


def under_load(model: str, folder: Path, count: int, requests: int) -> dict[str, Any]:
    """Run the load test and return its figures."""
    temporary, server = folder / NAME, Server(model, folder)
    try:
        shutil.copytree(folder / name_of(0), temporary)  # not there at the start, so that it comes and goes
        figures = asyncio.run(_visit(server, count, requests))
    finally:
        status = server.end()
        shutil.rmtree(temporary, ignore_errors=True)
    return figures | {"exit_status": status}


def _spread(seconds: list[float]) -> dict[str, float]:
    values = torch.tensor(seconds or [0.0])
    return {"p50": float(values.quantile(0.5)), "p99": float(values.quantile(0.99)), "most": float(values.max())}
