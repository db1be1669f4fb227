"""Limits on request bodies: their size, the time that they take to arrive, and the number of large ones at once."""

import asyncio

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorasmith.i18n import _
from lorasmith.serve.protocol import Failure

BODY_SECONDS = 60.0  # until the whole body must have arrived
SHORT_BODY = 2**16  # bytes; larger bodies, and those without a length, are counted
MAX_LARGE = 16  # maximum number of such bodies that arrive at the same time
CLOSE = {"Connection": "close"}  # the rest of the body is not read


class BodyLimits:
    """An ASGI application around `app` with these limits; `mib` is the maximum size of a body in MiB."""

    def __init__(self, app: ASGIApp, mib: float) -> None:
        self.app, self._limit = app, int(mib * 2**20)
        self._too_large = _("the request is larger than {mib:g} MiB.", mib=mib)
        self._arriving = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, as an ASGI application."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        declared = headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared) > self._limit:
            failure = Failure(413, self._too_large, code="request_too_large")
            return await JSONResponse(failure.body, 413, CLOSE)(scope, receive, send)
        is_large = b"transfer-encoding" in headers or (declared.isdigit() and int(declared) > SHORT_BODY)
        body = _Body(self, receive, is_large)
        try:
            await self.app(scope, body.receive, send)
        finally:
            body.end()

    def admit(self) -> None:
        """Count a large body that begins to arrive. Raises HTTPException 429 if there are too many."""
        if self._arriving >= MAX_LARGE:
            text = _("{count} large requests are arriving, and no more can at the same time. Try again later.",
                     count=self._arriving)  # fmt: skip
            raise HTTPException(429, text, CLOSE | {"Retry-After": "10"})
        self._arriving += 1

    def release(self) -> None:
        """A counted body has arrived, or its request has ended."""
        self._arriving -= 1

    def check_size(self, size: int) -> None:
        """Raise HTTPException 413 if so many bytes are too many."""
        if size > self._limit:
            raise HTTPException(413, self._too_large, CLOSE)


class _Body:
    """The body of one request: its `receive` raises HTTPException if it exceeds a limit."""

    def __init__(self, limits: BodyLimits, receive: Receive, is_large: bool) -> None:
        self._limits, self._receive, self._is_large = limits, receive, is_large
        self._size, self._end_at = 0, 0.0
        self._is_counted = self._is_complete = False

    async def receive(self) -> Message:
        """The next message, as ASGI's receive."""
        if self._is_complete:  # what comes now is that the client disconnects
            return await self._receive()
        if not self._end_at:
            self._end_at = asyncio.get_running_loop().time() + BODY_SECONDS
            if self._is_large:
                self._limits.admit()
                self._is_counted = True
        try:
            async with asyncio.timeout_at(self._end_at):
                message = await self._receive()
        except TimeoutError:
            text = _("the body of the request did not arrive within {seconds:g} s.", seconds=BODY_SECONDS)
            raise HTTPException(408, text, CLOSE) from None
        self._size += len(message.get("body", b""))
        self._limits.check_size(self._size)
        if not message.get("more_body"):
            self._is_complete = True
            self.end()
        return message

    def end(self) -> None:
        """Stop counting the body."""
        if self._is_counted:
            self._is_counted = False
            self._limits.release()
