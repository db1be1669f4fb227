"""The worker: a thread that owns the model and the engine. It receives commands and sends events to the event loop.

Waiting requests are queued per adapter and served round-robin, so that no adapter starves another. The engine gets only
as many requests as it has slots; a request of an adapter that has none running takes the place of another adapter's if
it would wait for long.
"""

import asyncio
import logging
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from lorasmith.engine.engine import Engine
from lorasmith.engine.request import Event, Request
from lorasmith.engine.scheduler import TURN
from lorasmith.errors import LorasmithError
from lorasmith.i18n import _
from lorasmith.system.memory import convert_memory_errors

T = TypeVar("T")
log = logging.getLogger("lorasmith.serve")
STUCK_SECONDS = 120.0  # a step takes some seconds at most
WARN_INTERVAL = 60.0  # minimum seconds between warnings about short memory


@dataclass(eq=False)
class PendingRequest:
    """A request to the worker, for the choice `index` of a response.

    `events` belongs to the event loop; the choices of a response share one queue. An exception is the last item.
    """

    request: Request
    index: int = 0
    events: "asyncio.Queue[tuple[PendingRequest, Event | Exception]]" = field(default_factory=asyncio.Queue)
    key: int | None = None  # its key in the engine, once submitted to it
    queued: float = 0.0  # when it was queued, in seconds of the monotonic clock
    is_over: bool = False


class WorkerStopped(Exception):
    """The worker's thread has ended, so the request cannot be completed."""


class Worker:
    """Runs `engine` in its own thread. Public methods are called from the event loop's thread."""

    def __init__(self, engine: Engine, slots: int) -> None:
        self.engine, self.slots = engine, slots
        self.is_alive = False
        self._began: float | None = None  # when it began the current step or command; None if it waits for one
        self.on_death: Callable[[], None] = lambda: None  # called in the event loop if the thread fails
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._queues: OrderedDict[str | None, deque[PendingRequest]] = OrderedDict()
        self._running: dict[int, PendingRequest] = {}
        self._is_ending = False
        self._warned_at, self._preemptions = -WARN_INTERVAL, 0

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the thread; events are delivered in `loop`."""
        self._loop, self.is_alive = loop, True
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Make the thread end after its current step; unfinished requests get WorkerStopped."""
        self._inbox.put(self._end)

    def stop(self) -> None:
        """End the thread and wait for it."""
        self.end()
        self._thread.join()

    @property
    def is_working(self) -> bool:
        """Whether the thread is alive, and has not been in the same step or command for STUCK_SECONDS."""
        began = self._began
        return self.is_alive and (began is None or time.monotonic() - began < STUCK_SECONDS)

    def submit(self, job: PendingRequest) -> None:
        """Queue a request."""
        self._put(lambda: self._enqueue(job))

    def cancel(self, job: PendingRequest) -> None:
        """Cancel a request. Does nothing if it has ended."""
        self._put(lambda: self._forget(job))

    def do(self, work: Callable[[], None]) -> None:
        """Run `work` in the worker's thread between two steps, after earlier commands."""
        self._put(lambda: work() if self.is_alive else None)

    async def call(self, work: Callable[[], T]) -> T:
        """Run `work` in the worker's thread between two steps, and return its result.

        Raises what `work` raises, or WorkerStopped if the thread has ended.
        """
        done: asyncio.Future[T] = self._loop.create_future()

        def run() -> None:
            try:
                if not self.is_alive:
                    raise WorkerStopped
                with convert_memory_errors():
                    settle: Callable[[], None] = partial(_succeed, done, work())
            except Exception as error:  # noqa: BLE001 (raised in the caller; the thread goes on)
                settle = partial(_fail, done, error)
            self._loop.call_soon_threadsafe(settle)

        self._put(run)
        return await done

    def _put(self, command: Callable[[], None]) -> None:
        self._inbox.put(command)
        if not self.is_alive:  # the thread may never look into the inbox again
            self._take_commands()

    def _work(self) -> None:
        try:
            while not self._is_ending:
                if not self.engine.busy and not self._queues:
                    self._began = None
                    command = self._inbox.get()
                    self._began = time.monotonic()
                    command()
                self._take_commands()
                self._feed()
                self._began = time.monotonic()
                if self.engine.busy and not self._is_ending:
                    self._step()
        finally:  # also after an exception, which threading prints with its traceback
            self.is_alive = False
            waiting = [job for line in self._queues.values() for job in line]
            self._send([(job, WorkerStopped()) for job in (*self._running.values(), *waiting)])
            self._take_commands()
            if not self._is_ending:
                self._loop.call_soon_threadsafe(self.on_death)

    def _take_commands(self) -> None:
        """Run the commands in the inbox; those that arrive meanwhile wait for the next step."""
        for _command in range(self._inbox.qsize()):
            self._began = time.monotonic()
            try:
                command = self._inbox.get_nowait()
            except queue.Empty:  # once the thread ends, the event loop's thread takes commands too
                return
            command()

    def _feed(self) -> None:
        """Pass waiting requests to the engine, round-robin over adapters, while there are free slots and memory."""
        while self._queues:
            adapter, line = next(iter(self._queues.items()))
            has_slot = len(self._running) < self.slots
            if has_slot and self.engine.has_room(line[0].request):
                self._submit(adapter, self.engine.add)
                continue
            if has_slot:
                self._warn_memory_short()
            starved = self._starved()
            if starved is None or not self._submit(starved.request.adapter, self.engine.add_first):
                return
            self._preemptions = self.engine.preemptions

    def _starved(self) -> PendingRequest | None:
        """A request that has waited for TURN while none of its adapter is running."""
        served = {job.request.adapter for job in self._running.values()}
        first = (line[0] for adapter, line in self._queues.items() if adapter not in served)
        return next((job for job in first if time.monotonic() - job.queued >= TURN), None)

    def _submit(self, adapter: str | None, add: Callable[[Request], int | None]) -> bool:
        """Pass the first waiting request of an adapter to the engine; False if that does not take it yet."""
        job = self._queues[adapter][0]
        try:
            job.key = add(job.request)
        except LorasmithError as error:
            job.is_over = True
            self._send([(job, error)])
        if job.key is None and not job.is_over:
            return False
        self._queues[adapter].popleft()
        self._queues.move_to_end(adapter)
        if not self._queues[adapter]:
            del self._queues[adapter]
        if job.key is not None:
            self._running[job.key] = job
        return True

    def _warn_memory_short(self) -> None:
        """Log that requests wait for memory rather than for slots."""
        now = time.monotonic()
        if now - self._warned_at >= WARN_INTERVAL:
            self._warned_at = now
            log.warning("%s", _(
                "Requests wait for memory, not for slots: {running} of {slots} slots are in use and the KV cache is "
                "full. A larger --cache-tokens, a smaller --context or shorter replies let more run at once.",
                running=sum(map(self.engine.is_running, self._running)), slots=self.slots,
            ))  # fmt: skip

    def _step(self) -> None:
        try:
            events = self.engine.step()
        except LorasmithError as error:  # it is unknown which request caused it, so all of them fail
            log.warning("%s", error)
            failed = list(self._running.values())
            for job in failed:
                self._forget(job)
            self._send([(job, error) for job in failed])
            return
        if self.engine.preemptions > self._preemptions:
            self._preemptions = self.engine.preemptions
            self._warn_memory_short()
        told: list[tuple[PendingRequest, Event | Exception]] = [(self._running[event.key], event) for event in events]
        for event in events:
            if event.finish:
                self._running.pop(event.key).is_over = True
        self._send(told)

    def _enqueue(self, job: PendingRequest) -> None:
        if not self.is_alive:
            self._send([(job, WorkerStopped())])
        elif not job.is_over:
            job.queued = time.monotonic()
            self._queues.setdefault(job.request.adapter, deque()).append(job)

    def _forget(self, job: PendingRequest) -> None:
        if job.is_over or not self.is_alive:
            return
        job.is_over = True
        line = self._queues.get(job.request.adapter)
        if job.key is not None:
            self.engine.cancel(job.key)
            del self._running[job.key]
        elif line is not None and job in line:
            line.remove(job)
            if not line:
                del self._queues[job.request.adapter]

    def _end(self) -> None:
        self._is_ending = True

    def _send(self, events: "list[tuple[PendingRequest, Event | Exception]]") -> None:
        """Deliver the events of a step with a single call into the event loop."""
        if events and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_deliver, events)


def _deliver(events: "list[tuple[PendingRequest, Event | Exception]]") -> None:
    for job, event in events:
        job.events.put_nowait((job, event))


def _succeed(done: "asyncio.Future[T]", result: T) -> None:
    if not done.cancelled():
        done.set_result(result)


def _fail(done: "asyncio.Future[T]", error: Exception) -> None:
    if not done.cancelled():
        done.set_exception(error)
