"""The request manager, between the HTTP routes and the worker: admits requests, tracks and measures them."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence

from lorasmith.config.serving import ServeConfig
from lorasmith.engine.kv_cache import bytes_per_token
from lorasmith.engine.request import Event
from lorasmith.errors import LorasmithError, ModelError, OutOfMemoryError
from lorasmith.i18n import _
from lorasmith.serve.auth import Key, KeyFile
from lorasmith.serve.metrics import ServerMetrics
from lorasmith.serve.protocol import Failure
from lorasmith.serve.registry import ModelVersion, Registry
from lorasmith.serve.request_parsing import ParsedRequest, ParsingThreads
from lorasmith.serve.worker import PendingRequest, Worker, WorkerStopped

DEFAULT_CONTEXT = 4096  # context length of models that do not specify it
# Seconds of silence after which a stream sends a comment, because proxies close connections that are silent for longer.
HEARTBEAT = 15.0

Events = AsyncGenerator[tuple[PendingRequest, Event] | None]  # None: no event for HEARTBEAT seconds


class RequestManager:
    """The state shared by all routes. `keys` None: clients need no API key."""

    def __init__(
        self, registry: Registry, worker: Worker, settings: ServeConfig, keys: KeyFile | list[Key] | None
    ) -> None:
        self.registry, self.worker, self.settings, self._keys = registry, worker, settings, keys
        limit = registry.base.max_positions or settings.context or DEFAULT_CONTEXT
        self.context = min(limit, settings.context or limit)
        if (cache := worker.engine.cache) is not None:
            self.context = min(self.context, cache.limit)
        self.max_requests = settings.slots + settings.queue
        self.metrics = ServerMetrics(worker.engine, self.max_concurrency)
        self.in_flight: dict[PendingRequest, str] = {}  # request -> name of its model
        self.parsing = ParsingThreads()
        self.is_draining = False
        self._seconds = 1.0  # moving average of the duration of requests

    def open(self, parsed: ParsedRequest, version: ModelVersion) -> Events:
        """Submit the requests and return an iterator over their events. Closing it cancels unfinished requests.

        Raises Failure 503 if the server is shutting down, and 429 if the queue is full.
        """
        room = self.max_requests - len(self.in_flight)
        if self.is_draining or not self.worker.is_alive:
            raise Failure(503, _("the server is shutting down and accepts no new requests."), retry=10)
        if len(parsed.requests) > room:
            text = _("the queue has no room for this request: {waiting} requests are running or waiting. Try again "
                    "later.",
                     waiting=len(self.in_flight))  # fmt: skip
            raise Failure(429, text, code="queue_full", retry=self._retry_after())
        jobs = [PendingRequest(request, index) for index, request in enumerate(parsed.requests)]
        for job in jobs:
            job.events = jobs[0].events
            self.in_flight[job] = version.name
        version.users += 1
        self.metrics.prompt_tokens.labels(version.name).inc(parsed.prompt_tokens)
        return self._events(jobs, version)

    @property
    def keys(self) -> list[Key] | None:
        """The API keys that are valid now; None if clients need none."""
        return self._keys.keys if isinstance(self._keys, KeyFile) else self._keys

    @property
    def max_concurrency(self) -> int:
        """The number of requests of maximum length that can run at once."""
        slots, cache = self.settings.slots, self.worker.engine.cache
        return slots if cache is None else min(slots, cache.limit // cache.capacity_of(self.context))

    @property
    def cache_mib(self) -> float:
        """The maximum size of the KV cache in MiB."""
        base, cache = self.registry.base, self.worker.engine.cache
        return cache.limit * bytes_per_token(base.model.config, base.dtype) / 2**20 if cache else 0.0

    def metrics_text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        running, waiting = list[str](), list[str]()
        for job, name in self.in_flight.items():
            has_place = job.key is not None and self.worker.engine.is_running(job.key)
            (running if has_place else waiting).append(name)
        return self.metrics.text(running, waiting, self.registry.names())

    async def _events(self, jobs: Sequence[PendingRequest], version: ModelVersion) -> Events:
        left, began = set(jobs), time.monotonic()
        last: dict[PendingRequest, float] = {}
        try:
            for job in jobs:
                self.worker.submit(job)
            while left:
                try:
                    async with asyncio.timeout(HEARTBEAT):
                        job, event = await jobs[0].events.get()
                except TimeoutError:
                    yield None
                    continue
                if isinstance(event, Exception):
                    raise failure_of(event)
                if event.finish == "error":
                    text = _("the grammar of the requested format is too complex. Use a simpler schema.")
                    raise Failure(400, text, "response_format")
                self._measure(version.name, event, began, last.get(job))
                last[job] = time.monotonic()
                if event.finish:
                    left.discard(job)
                    self.in_flight.pop(job, None)
                yield job, event
        finally:
            for job in left:
                self.worker.cancel(job)
            for job in jobs:
                self.in_flight.pop(job, None)
            version.users -= 1
            self.registry.detach_if_idle(version, self.worker)

    def _measure(self, name: str, event: Event, began: float, last: float | None) -> None:
        now, metrics = time.monotonic(), self.metrics
        metrics.generation_tokens.labels(name).inc()
        if last is None:
            metrics.first.labels(name).observe(now - began)
        else:
            metrics.between.labels(name).observe(now - last)
        if event.finish:
            metrics.whole.labels(name).observe(now - began)
            metrics.success.labels(name, event.finish).inc()
            self._seconds += 0.2 * (now - began - self._seconds)

    def _retry_after(self) -> int:
        """Estimated seconds until there is room in the queue."""
        return max(1, min(60, round(self._seconds / self.settings.slots)))


def failure_of(error: Exception) -> Failure:
    """The response for an error that was raised in the model's thread. Unexpected errors are not described."""
    if isinstance(error, Failure):
        return error
    if isinstance(error, WorkerStopped):
        return Failure(503, _("the server shut down before the reply was complete."))
    if isinstance(error, (OutOfMemoryError, MemoryError)):
        return Failure(503, str(error) or _("There is not enough memory for this request."), retry=10)
    status = 500 if isinstance(error, ModelError) or not isinstance(error, LorasmithError) else 400
    return Failure(status, str(error) if isinstance(error, LorasmithError) else _("internal server error."))
