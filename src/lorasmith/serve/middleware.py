"""Wrappers of the ASGI application: HEAD requests, the client's language, and pages of other addresses (CORS)."""

from collections.abc import Sequence
from contextlib import nullcontext

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorasmith.i18n import LANGUAGES, using_language


def answer_head(app: ASGIApp) -> ASGIApp:
    """Wrap `app` to answer HEAD as GET, without the body."""

    async def answered(scope: Scope, receive: Receive, send: Send) -> None:
        async def without_body(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        is_head = scope["type"] == "http" and scope["method"] == "HEAD"
        await app({**scope, "method": "GET"} if is_head else scope, receive, without_body if is_head else send)

    return answered


def use_language(app: ASGIApp) -> ASGIApp:
    """Wrap `app` to answer in the first language of the header Accept-Language that there is."""

    async def translated(scope: Scope, receive: Receive, send: Send) -> None:
        wanted = Headers(scope=scope).get("accept-language", "") if scope["type"] == "http" else ""
        codes = (word.strip()[:2].lower() for word in wanted.split(","))
        found = next((code for code in codes if code in LANGUAGES), None)
        with using_language(found) if found else nullcontext():
            await app(scope, receive, send)

    return translated


def allow_origins(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """Wrap `app` so that browsers let pages of these origins use it; `*` stands for all."""
    if not origins:
        return app
    methods, exposed = ("GET", "POST", "DELETE"), ("Retry-After",)
    return CORSMiddleware(app, tuple(origins), methods, allow_headers=("*",), expose_headers=exposed)
