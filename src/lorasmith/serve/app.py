"""The HTTP routes: OpenAI's API, loading and unloading adapters, health and metrics, and the page in the browser."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

from fastapi import FastAPI, Response
from fastapi import Request as Http
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from fastapi.sse import EventSourceResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from lorasmith.config.files import Malformed, parse_json
from lorasmith.config.sampling import SamplingConfig
from lorasmith.config.values import validation_messages
from lorasmith.engine.request import Request
from lorasmith.engine.scoring import PromptScoring
from lorasmith.errors import LorasmithError
from lorasmith.i18n import _
from lorasmith.serve.access_log import MODEL, log_requests
from lorasmith.serve.auth import authorize
from lorasmith.serve.bodies import BodyLimits
from lorasmith.serve.middleware import allow_origins, answer_head, use_language
from lorasmith.serve.page_files import add_page_routes
from lorasmith.serve.protocol import (
    AdapterRequest,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Failure,
    TokenizeRequest,
)
from lorasmith.serve.registry import ModelVersion
from lorasmith.serve.request_manager import Events, RequestManager, failure_of
from lorasmith.serve.request_parsing import ParsedRequest, detokenize, parse_chat, parse_completion, tokenize
from lorasmith.serve.responses import (
    Choice,
    Envelope,
    ScoredToken,
    chat_body,
    chat_stream,
    collect,
    completion_body,
    completion_stream,
    scored_prompt,
)
from lorasmith.serve.responses_api.reply import Answer, response_body, response_stream
from lorasmith.serve.responses_api.request import ResponsesRequest, chat_request, renamed
from lorasmith.serve.worker import WorkerStopped

MAX_MESSAGE = 2000  # maximum characters of an error message, which may quote the client's text
M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")
C = TypeVar("C", ChatRequest, CompletionRequest, ResponsesRequest)


def make_app(manager: RequestManager) -> Any:
    """The ASGI application. Starts the worker on startup and stops it on shutdown."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        manager.worker.start(asyncio.get_running_loop())
        yield
        manager.worker.stop()

    app = FastAPI(lifespan=lifespan, openapi_url=None)  # FastAPI's documentation pages load scripts from a CDN
    app.state.manager = manager
    app.add_exception_handler(Failure, _failed)
    app.add_exception_handler(LorasmithError, _failed)
    app.add_exception_handler(WorkerStopped, _failed)
    app.add_exception_handler(HTTPException, _failed)
    app.add_exception_handler(ClientDisconnect, _failed)
    app.add_exception_handler(Exception, _failed)  # uvicorn logs these too
    add_health_routes(app, manager)
    add_model_routes(app, manager)
    add_completion_routes(app, manager)
    add_tokenizer_routes(app, manager)
    add_page_routes(app)
    limited = use_language(BodyLimits(app, manager.settings.body_mib))
    return log_requests(allow_origins(answer_head(limited), manager.settings.allowed_origins))


def add_health_routes(app: FastAPI, manager: RequestManager) -> None:
    """Liveness, readiness and Prometheus metrics."""

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200 if manager.worker.is_working else 503)

    @app.get("/ready")
    async def ready() -> Response:
        return Response(status_code=503 if manager.is_draining or not manager.worker.is_working else 200)

    @app.get("/metrics")
    async def metrics(request: Http) -> Response:
        authorize(manager, request, needs_all=True)
        return Response(manager.metrics_text(), media_type=CONTENT_TYPE_LATEST)


def add_model_routes(app: FastAPI, manager: RequestManager) -> None:
    """Listing models, and loading and unloading adapters."""

    @app.get("/v1/models")
    async def models(request: Http) -> dict[str, Any]:
        names = manager.registry.names(authorize(manager, request))
        return {"object": "list", "data": [model_body(manager, manager.registry.versions[name]) for name in names]}

    @app.get("/v1/models/{name:path}")
    async def model(request: Http, name: str) -> dict[str, Any]:
        return model_body(manager, manager.registry.find(name, authorize(manager, request)))

    @app.post("/v1/adapters")
    async def register(request: Http) -> dict[str, Any]:
        authorize(manager, request, needs_all=True)
        body = await read_body(request, AdapterRequest)
        version = await manager.registry.register(body.name, body.path or body.name, manager.worker)
        return model_body(manager, version)

    @app.delete("/v1/adapters/{name}")
    async def drop(request: Http, name: str) -> dict[str, Any]:
        authorize(manager, request, needs_all=True)
        await manager.registry.drop(name, manager.worker)
        return {"id": name, "object": "model", "deleted": True}


def add_completion_routes(app: FastAPI, manager: RequestManager) -> None:
    """Chat completions and completions."""

    @app.post("/v1/chat/completions")
    async def chat(request: Http) -> Response:
        body, version = await parse_body(manager, request, ChatRequest)
        with manager.registry.using(version, manager.worker):
            parsed = await parse_in_thread(
                manager, request, partial(parse_chat, body, version, manager.context), version
            )
            events = manager.open(parsed, version)
        fingerprint = manager.registry.fingerprint(version)
        envelope = Envelope("chat.completion", body.model, version.template.tokenizer, fingerprint, body)
        if body.stream:
            shown = await after_first(request, events)
            return StreamingReply(chat_stream(shown, envelope, parsed, body.stream_options), events)
        choices = await cancel_on_disconnect(request, collect(events, len(parsed.requests)))
        return JSONResponse(chat_body(envelope, choices, parsed))

    @app.post("/v1/responses")
    async def responses(request: Http) -> Response:
        body, version = await parse_body(manager, request, ResponsesRequest)
        try:
            asked = chat_request(body)
            with manager.registry.using(version, manager.worker):
                work = partial(parse_chat, asked, version, manager.context)
                parsed = await parse_in_thread(manager, request, work, version)
                events = manager.open(parsed, version)
            fingerprint = manager.registry.fingerprint(version)
            answer = Answer(
                body, Envelope("response", body.model, version.template.tokenizer, fingerprint, asked), parsed
            )
            if body.stream:
                return StreamingReply(response_stream(await after_first(request, events), answer), events)
            [choice] = await cancel_on_disconnect(request, collect(events, 1))
            return JSONResponse(response_body(answer, choice))
        except Failure as failure:
            raise renamed(failure) from None

    @app.get("/v1/responses/{name:path}")
    @app.delete("/v1/responses/{name:path}")
    @app.post("/v1/responses/{name:path}")
    async def stored(request: Http, name: str) -> Response:
        authorize(manager, request)
        raise Failure(404, _("{name}: this server stores no responses.", name=name), "response_id")

    @app.post("/v1/completions")
    async def completions(request: Http) -> Response:
        body, version = await parse_body(manager, request, CompletionRequest)
        with manager.registry.using(version, manager.worker):
            parsed = await parse_in_thread(
                manager, request, partial(parse_completion, body, version, manager.context), version
            )
            fingerprint = manager.registry.fingerprint(version)
            envelope = Envelope("text_completion", body.model, version.template.tokenizer, fingerprint)
            echo = echo_texts(body, parsed, version)
            if not body.stream:
                choices, scores = await cancel_on_disconnect(request, complete(manager, body, parsed, version))
                return JSONResponse(completion_body(envelope, choices, parsed, echo, scores))
            if body.echo and body.logprobs is not None:
                raise Failure(400, _("echo with logprobs cannot be streamed. Set stream to false."), "stream")
            if not parsed.requests:
                raise Failure(400, _("max_tokens: 0 is only allowed with echo."), "max_tokens")
            events = manager.open(parsed, version)
        shown = await after_first(request, events)
        return StreamingReply(completion_stream(shown, envelope, parsed, body.stream_options, echo), events)


def add_tokenizer_routes(app: FastAPI, manager: RequestManager) -> None:
    """Tokens of texts and chats, and texts of tokens, at vLLM's addresses."""

    @app.post("/tokenize")
    async def tokens(request: Http) -> dict[str, Any]:
        names = authorize(manager, request)
        body = await read_body(request, TokenizeRequest)
        version = manager.registry.find(body.model or manager.registry.base_name, names)
        with manager.registry.using(version, manager.worker):
            work = partial(tokenize, body, version, manager.context)
            return await parse_in_thread(manager, request, work, version)

    @app.post("/detokenize")
    async def text(request: Http) -> dict[str, Any]:
        names = authorize(manager, request)
        body = await read_body(request, DetokenizeRequest)
        version = manager.registry.find(body.model or manager.registry.base_name, names)
        with manager.registry.using(version, manager.worker):
            return await parse_in_thread(manager, request, partial(detokenize, body, version), version)


async def parse_in_thread(manager: RequestManager, request: Http, work: Callable[[], T], version: ModelVersion) -> T:
    """Run `work`, which parses the request's body, in a thread; abandoned if the client disconnects."""
    size = len(await request.body())
    return await cancel_on_disconnect(request, manager.parsing.run(size, version.template, work))


async def complete(
    manager: RequestManager, body: CompletionRequest, parsed: ParsedRequest, version: ModelVersion
) -> tuple[list[Choice], list[list[ScoredToken]]]:
    """The choices, and the logprobs of the prompts' tokens if `echo` and `logprobs` are set."""
    scores: list[list[ScoredToken]] = []
    if body.echo and body.logprobs is not None:
        settings = SamplingConfig(logprobs=body.logprobs)
        requests = [Request(prompt, settings, version.adapter) for prompt in parsed.prompts]
        scoring = PromptScoring(manager.registry.base, requests)
        while await manager.worker.call(scoring.step):  # running requests continue in between
            pass
        scores += map(scored_prompt, parsed.prompts, scoring.scores)
    if not parsed.requests:
        return [Choice() for _choice in range(len(parsed.prompts) * parsed.n)], scores
    return await collect(manager.open(parsed, version), len(parsed.requests)), scores


def echo_texts(body: CompletionRequest, parsed: ParsedRequest, version: ModelVersion) -> list[str]:
    """The texts of the prompts if `echo` is set, else an empty list."""
    return [str(version.template.tokenizer.decode(prompt)) for prompt in parsed.prompts] if body.echo else []


def model_body(manager: RequestManager, version: ModelVersion) -> dict[str, Any]:
    """A model as an item of /v1/models."""
    common = {"id": version.name, "object": "model", "created": version.created, "owned_by": "lorasmith"}
    common |= {"max_model_len": manager.context, "root": manager.registry.base_name}
    adapter = version.discovered
    if adapter is None:
        return common | {"parent": None}
    return common | {
        "parent": manager.registry.base_name,
        "hash": adapter.hash,
        "rank": adapter.rank,
        "bytes": adapter.adapter.size,
        "data": adapter.data,
        "held_out_loss": adapter.loss,
        "effect": version.effect,
    }


async def parse_body(manager: RequestManager, request: Http, kind: type[C]) -> tuple[C, ModelVersion]:
    """The request's body, and the current version of the model it names. Raises Failure."""
    names = authorize(manager, request)
    body = await read_body(request, kind)
    if body.choices > manager.max_requests:
        text = _("{wanted} replies were requested, but this server returns at most {most} per request.",
                 wanted=body.choices, most=manager.max_requests)  # fmt: skip
        raise Failure(400, text, "n")
    version = manager.registry.find(body.model, names)
    request.scope[MODEL] = version.name
    return body, version


async def read_body(request: Http, model: type[M]) -> M:
    """Parse the request's JSON body. Raises Failure 400, which names the invalid field."""
    try:
        raw = parse_json(await request.body())
    except Malformed as error:
        raise Failure(400, _("the request body is not valid JSON: {error}", error=error)) from None
    if not isinstance(raw, dict):
        raise Failure(400, _("the request body must be a JSON object."))
    try:  # some clients send null for fields that are not set
        return model.model_validate({key: value for key, value in raw.items() if value is not None})
    except ValidationError as error:
        param = str((error.errors(include_url=False)[0]["loc"] or ("",))[0])
        raise Failure(400, "\n".join(validation_messages(error, model)), param or None) from None


class StreamingReply(EventSourceResponse):
    """A response of server-sent events. However it ends, it closes `events`, which frees the requests' slots."""

    def __init__(self, lines: AsyncIterator[str], events: AsyncGenerator[Any]) -> None:
        super().__init__(lines, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response, as an ASGI application."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.events.aclose()


async def after_first(request: Http, events: Events) -> Events:
    """`events`, after waiting for the first one: an error before that gets a response with its own status code."""
    first = await cancel_on_disconnect(request, anext(events))

    async def chained() -> Events:
        yield first
        async for event in events:
            yield event

    return chained()


async def cancel_on_disconnect(request: Http, work: Awaitable[T]) -> T:
    """Await `work`, but cancel it and raise Failure 499 if the client disconnects."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Failure(499, _("the client disconnected."))
    finally:
        leaving.cancel()
        working.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _failed(request: Http, error: Exception) -> Response:
    """The response for an exception, in OpenAI's format. Paths of this machine are left out of its text."""
    headers = dict[str, str]()
    if isinstance(error, HTTPException) and error.status_code == 404:
        failure = Failure(404, not_found(request))
    elif isinstance(error, HTTPException):
        failure, headers = Failure(error.status_code, str(error.detail)), dict(error.headers or {})
    elif isinstance(error, ClientDisconnect):
        failure = Failure(499, _("the client disconnected."))
    elif isinstance(error, Failure):
        failure = error
    else:
        failure = failure_of(error)
    body, text = failure.body, request.app.state.manager.registry.without_paths(failure.text)
    body["error"]["message"] = text if len(text) <= MAX_MESSAGE else text[:MAX_MESSAGE] + " ..."
    return JSONResponse(body, failure.status, headers | failure.headers)


def not_found(request: Http) -> str:
    """The text for an address that the server does not have; says so if only the base URL is wrong."""
    path, root = request.url.path, str(request.base_url).rstrip("/")
    right = "/v1" + path.removeprefix("/v1")
    if right != path and _has_route(request, right):
        return _("{path}: no such address. Its name begins with /v1: set the base URL of the client to {root}/v1",
                 path=path, root=root)  # fmt: skip
    if path.startswith("/v1/v1/") and _has_route(request, path.removeprefix("/v1")):
        return _(
            "{path}: no such address. /v1 stands in it twice: leave it out of the base URL of the client.", path=path
        )
    return _("{path}: no such address. This server has {known}, but no embeddings, images, audio or files.",
             path=path, known="/v1/chat/completions, /v1/completions, /v1/responses, /v1/models")  # fmt: skip


def _has_route(request: Http, path: str) -> bool:
    routes = (route for route in request.app.routes if isinstance(route, APIRoute))
    return any(route.path_regex.match(path) for route in routes)
