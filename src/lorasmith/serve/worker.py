"""The one thread that owns the engine: commands come in, events go out to the asyncio loop.

Requests wait here in a line for each adapter and are taken in turn, so that none starves another; the engine gets only
as many as it has places.
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
from lorasmith.errors import LorasmithError
from lorasmith.i18n import _
from lorasmith.system.memory import convert_memory_errors

T = TypeVar("T")
log = logging.getLogger("lorasmith.serve")
WARN_INTERVAL = 60.0  # seconds in which it is not said again that memory is short


@dataclass(eq=False)
class PendingRequest:
    """One request on its way, the choice `index` of an answer. `events` belongs to the loop; choices may share one.

    An exception in it is the last that comes.
    """

    request: Request
    index: int = 0
    events: "asyncio.Queue[tuple[PendingRequest, Event | Exception]]" = field(default_factory=asyncio.Queue)
    key: int | None = None  # the engine's, once it has a place
    is_over: bool = False


class WorkerStopped(Exception):
    """The model's thread has ended, so nothing more can be answered."""


class Worker:
    """Runs `engine` in a thread of its own. Every method is for the loop's thread, but for those with an underscore."""

    def __init__(self, engine: Engine, slots: int) -> None:
        self.engine, self.slots = engine, slots
        self.is_alive = False
        self.on_death: Callable[[], None] = lambda: None  # in the loop, when the thread ends unasked
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._queues: OrderedDict[str | None, deque[PendingRequest]] = OrderedDict()
        self._running: dict[int, PendingRequest] = {}
        self._is_ending = False
        self._warned_at, self._preemptions = -WARN_INTERVAL, 0

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to answer; events arrive in `loop`."""
        self._loop, self.is_alive = loop, True
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Let the thread end after the step that it is in; what still runs is told so."""
        self._inbox.put(self._end)

    def stop(self) -> None:
        """The same, and wait for it."""
        self.end()
        self._thread.join()

    def submit(self, job: PendingRequest) -> None:
        """Put the job into its adapter's line."""
        self._put(lambda: self._enqueue(job))

    def cancel(self, job: PendingRequest) -> None:
        """Forget the job: its place is free at the next step. One that is over is no error."""
        self._put(lambda: self._forget(job))

    def do(self, work: Callable[[], None]) -> None:
        """`work()` between two steps, in the model's thread, once what was asked before is done."""
        self._put(lambda: work() if self.is_alive else None)

    async def call(self, work: Callable[[], T]) -> T:
        """`work()` between two steps, in the model's thread; raises what it raises. WorkerStopped if it cannot run."""
        done: asyncio.Future[T] = self._loop.create_future()

        def run() -> None:
            try:
                if not self.is_alive:
                    raise WorkerStopped
                with convert_memory_errors():
                    settle: Callable[[], None] = partial(_succeed, done, work())
            except Exception as error:  # noqa: BLE001 (raised where it was asked; the thread goes on)
                settle = partial(_fail, done, error)
            self._loop.call_soon_threadsafe(settle)

        self._put(run)
        return await done

    def _put(self, command: Callable[[], None]) -> None:
        self._inbox.put(command)
        if not self.is_alive:  # the thread may have looked for the last time already
            self._take_commands()

    def _work(self) -> None:
        try:
            while not self._is_ending:
                if not self.engine.busy and not self._queues:
                    self._inbox.get()()
                self._take_commands()
                self._feed()
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
        """All that came since; what they are answered with may bring more, which waits for the next step."""
        for _command in range(self._inbox.qsize()):
            try:
                command = self._inbox.get_nowait()
            except queue.Empty:  # after the end the loop takes them too
                return
            command()

    def _feed(self) -> None:
        """Give free places to those that wait, one of each adapter in turn, as far as memory reaches."""
        while self._queues and len(self._running) < self.slots:
            adapter, line = next(iter(self._queues.items()))
            if not self.engine.has_room(line[0].request):
                self._warn_memory_short()
                return
            job = line.popleft()
            self._queues.move_to_end(adapter)
            if not line:
                del self._queues[adapter]
            try:
                job.key = self.engine.add(job.request)
            except LorasmithError as error:
                job.is_over = True
                self._send([(job, error)])
            else:
                self._running[job.key] = job

    def _warn_memory_short(self) -> None:
        """That memory and not --slots is what requests wait for."""
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
        except LorasmithError as error:  # whose fault it was is not known, so none of them goes on
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
        """One call into the loop for a whole step."""
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
