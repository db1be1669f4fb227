"""Who may come in, and how much they may carry."""

import re

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorasmith.i18n import _
from lorasmith.serve.desk import Desk
from lorasmith.serve.failure import Failure
from lorasmith.serve.keys import find_key


def allowed(desk: Desk, request: Request, needs_all: bool = False) -> frozenset[str] | None:
    """The models that this client may use; None: all. `needs_all`: only who may use all of them comes in.

    Raises Failure 401 without a key that is known, 403 where it does not reach so far, or a foreign page asks.
    """
    if desk.keys is None:
        refuse_foreign_page(desk, request)
        return None
    kind, _space, given = request.headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer" or not given:
        raise Failure(
            401, _("an API key is required: send the header 'Authorization: Bearer KEY'."), code="invalid_api_key"
        )
    key = find_key(desk.keys, given.strip())
    if key is None:
        raise Failure(401, _("this API key is not valid."), code="invalid_api_key")
    if needs_all and key.models is not None:
        raise Failure(403, _("this API key is limited to some models, but this request concerns all of them."))
    return key.models


def refuse_foreign_page(desk: Desk, request: Request) -> None:
    """Without keys the address is this machine's own: a page from elsewhere in its browser must not use it.

    Its Origin tells it, or the Host where its name was bound to this address (DNS rebinding). Raises Failure 403.
    """
    own = {"localhost", "127.0.0.1", "::1", desk.settings.host}
    scheme, _to, page = request.headers.get("origin", "").partition("://")
    asked = [request.headers.get("host", "")] + ([page] if scheme in ("http", "https", "null") else [])
    for address in asked:
        if re.sub(r":\d+$", "", address).strip("[]").lower() not in own:
            text = _("requests from or to {address!r} are not allowed: without --keys, the server only accepts "
                    "pages and host names of this machine.",
                     address=address)  # fmt: skip
            raise Failure(403, text)


def limited(app: ASGIApp, mib: float) -> ASGIApp:
    """`app` behind a guard that reads no more than `mib` MiB of a request."""
    limit = int(mib * 2**20)
    text = _("the request is larger than {mib:g} MiB.", mib=mib)

    async def guard(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await app(scope, receive, send)
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > limit:
            failure = Failure(413, text, code="request_too_large")
            return await JSONResponse(failure.body, 413, {"Connection": "close"})(scope, receive, send)
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > limit:
                raise HTTPException(413, text)
            return message

        return await app(scope, counted, send)

    return guard
