"""A line per request in the log, without anything of prompts and replies."""

import logging
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

MODEL = "lorasmith.model"  # key of an ASGI scope: the name of the model that the request uses
UNLOGGED = frozenset({"/health", "/ready", "/metrics"})  # which other programs ask for all the time
MAX_PATH = 200  # characters
log = logging.getLogger("lorasmith.access")


def log_requests(app: ASGIApp) -> ASGIApp:
    """Wrap the ASGI application `app` to log its HTTP requests once they have ended."""

    async def logged(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in UNLOGGED:
            return await app(scope, receive, send)
        began, status = time.monotonic(), 499  # the client left before there was an answer

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await app(scope, receive, noted)
        except BaseException:
            status = 500
            raise
        finally:
            log.info("%s", _line(scope, status, time.monotonic() - began))

    return logged


def _line(scope: Any, status: int, seconds: float) -> str:
    client = (scope.get("client") or ("-",))[0]
    path = bytes(scope["raw_path"]).decode("latin-1")  # percent-encoded: no path can begin a new line
    words = [client, scope["method"], path[:MAX_PATH], str(status), f"{seconds:.2f} s", scope.get(MODEL, "")]
    return " ".join([time.strftime("%Y-%m-%d %H:%M:%S"), *filter(None, words)])


def show_log() -> None:
    """Write the log to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
