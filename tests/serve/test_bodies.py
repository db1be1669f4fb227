"""Request bodies that are too large, too slow or too many, and clients that leave before theirs has arrived."""

import asyncio
import json
import logging
import socket
import threading
import time
from typing import Any
from urllib.parse import urlsplit

import pytest
from starlette.exceptions import HTTPException

from lorasmith.serve import bodies
from lorasmith.serve.bodies import BodyLimits
from tests.support.serving import HI, Running, said, user, wait_for

HEAD = (
    "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    "Content-Length: {length}\r\n\r\n"
)


def half_body(served: Running, length: int = 100_000) -> socket.socket:
    """A connection over which half of a body was sent."""
    parts = urlsplit(served.url)
    client = socket.create_connection((str(parts.hostname), int(parts.port or 0)), timeout=20)
    client.sendall(HEAD.format(length=length).encode() + b" " * (length // 2))
    return client


@pytest.mark.parametrize(("declared", "sent", "status"), [(None, 900, 200), (None, 2000, 413), (2000, 0, 413)])
def test_a_body_is_limited_whatever_it_declares(declared: int | None, sent: int, status: int) -> None:
    """Also one that comes in pieces, without a length."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200})

    pieces = [{"type": "http.request", "body": b"x" * (sent // 2), "more_body": more} for more in (True, False)]
    replies: list[dict[str, Any]] = []

    async def call() -> int:
        async def receive() -> Any:
            return pieces.pop(0)

        async def send(message: Any) -> None:
            replies.append(message)

        headers = [] if declared is None else [(b"content-length", str(declared).encode())]
        try:
            await BodyLimits(app, 1000 / 2**20)({"type": "http", "headers": headers}, receive, send)
        except HTTPException as error:
            return error.status_code
        return int(replies[0]["status"])

    assert asyncio.run(call()) == status


def test_a_client_that_leaves_in_the_middle_of_a_body_is_no_error_of_the_server(
    served: Running, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        half_body(served).close()
        wait_for(lambda: "POST /v1/chat/completions 499" in caplog.text)
    assert "Traceback" not in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_body_that_does_not_arrive_is_refused(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.3)
    with half_body(served) as client:
        reply = client.makefile("rb").read()  # until the server closes the connection
    assert reply.startswith(b"HTTP/1.1 408")
    assert b"did not arrive within 0.3 s" in reply


def test_only_so_many_large_bodies_arrive_at_once_and_short_ones_always_may(
    served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "MAX_LARGE", 2)
    first, second = half_body(served), half_body(served)
    time.sleep(0.3)
    with half_body(served) as third:
        reply = third.makefile("rb").read()
    assert reply.startswith(b"HTTP/1.1 429")
    assert b"retry-after: 10" in reply.lower()
    assert b"2 large requests are arriving" in reply
    said(served.client().chat.completions.create(model="loud", messages=user(HI), max_tokens=2))
    first.close()
    time.sleep(0.3)
    with half_body(served) as fourth:  # one has left
        fourth.settimeout(0.5)
        with pytest.raises(TimeoutError):
            fourth.recv(1)
    second.close()


def test_long_bodies_are_refused_by_their_size_and_delay_no_chat(served: Running) -> None:
    """Twelve bodies of 3.6 MiB beside a chat of two tokens."""
    body = json.dumps({"model": "loud", "messages": user("a b " * 940_000), "max_tokens": 2}).encode()
    answers: list[bytes] = []

    def send() -> None:
        parts = urlsplit(served.url)
        with socket.create_connection((str(parts.hostname), int(parts.port or 0)), timeout=60) as client:
            client.sendall(HEAD.format(length=len(body)).encode() + body)
            answers.append(client.recv(2000))

    threads = [threading.Thread(target=send) for _ in range(12)]
    for thread in threads:
        thread.start()
    began = time.monotonic()
    said(served.client().chat.completions.create(model="loud", messages=user(HI), max_tokens=2))
    assert time.monotonic() - began < 10
    for thread in threads:
        thread.join()
    assert len(answers) == 12
    assert all(answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 429")) for answer in answers)
    assert any(b"the prompt has at least" in answer for answer in answers)
