"""The scheduler of the packed layout: decides which requests run, and how many tokens of each a step computes.

Memory is allocated as replies grow. When it runs out, the newest request of the adapter that has the most is preempted:
it returns to the front of the queue and its tokens are recomputed later, as in vLLM. Its reply does not change.
"""

import heapq
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence

from lorasmith.engine.kv_cache import KVCache
from lorasmith.engine.request import Chunk, RunningRequest

HEADROOM = 64  # tokens by which every running request must be able to grow before another one is started
TURN = 2.0  # seconds that a request runs at least before it must make way for one of another adapter
MAX_MASK = 2**21  # maximum size of a prompt chunk's attention mask: its tokens times all tokens up to its end


class Scheduler:
    """Schedules up to `slots` requests and `tokens` tokens per step, within the limit of `cache`.

    Generating requests come first, with one token each; the rest of the step is filled with prompts, oldest first.
    """

    def __init__(self, cache: KVCache, slots: int, tokens: int) -> None:
        self.cache, self.slots, self.tokens = cache, slots, max(tokens, slots)
        self.preemptions = 0
        self.running: list[RunningRequest] = []  # oldest first
        self._free = list(range(slots))  # heap of free slots

    def schedule(self, waiting: deque[RunningRequest], begin: Callable[[RunningRequest], None]) -> list[Chunk]:
        """The chunks of this step. Starts requests from `waiting` if there is room, and calls `begin` for each."""
        self._grow(waiting)
        answering = [run for run in self.running if run.pending == 1]
        room = self.tokens - len(answering)
        chunks = [Chunk(run, 1) for run in answering]
        for run in (run for run in self.running if run.pending > 1):
            chunks.append(_piece(run, room))
            room -= chunks[-1].length
            if not room:
                break
        while room and waiting and self._free and self.admits([len(waiting[0].ids)]):
            run = waiting.popleft()
            run.slot = heapq.heappop(self._free)
            run.started = time.monotonic()
            self.running.append(run)
            has_room = self.cache.reserve(run.slot, len(run.ids))
            assert has_room, "it was admitted"
            begin(run)
            chunks.append(_piece(run, room))
            room -= chunks[-1].length
        return [chunk for chunk in chunks if chunk.length]

    def admits(self, lengths: Sequence[int]) -> bool:
        """Whether new requests with these prompt lengths fit into memory, with headroom for all running requests."""
        return self._fit([*lengths, *(len(run.ids) for run in self.running)])

    def make_way(self, tokens: int, waiting: deque[RunningRequest]) -> bool:
        """Preempt requests so that another one with a prompt of this many tokens can start; they return to `waiting`.

        The oldest request of each adapter stays, and so do those that have run for less than TURN. Returns False and
        preempts none if the others do not suffice.
        """
        now = time.monotonic()
        victims = [run for run in self._surplus() if now - run.started >= TURN]
        for count in range(0 if self._free else 1, len(victims) + 1):
            chosen = victims[:count]
            if self._fit([tokens, *(len(run.ids) for run in self.running if run not in chosen)]):
                for run in chosen:
                    self._preempt(run)
                waiting.extend(reversed(chosen))
                return True
        return False

    def release(self, run: RunningRequest) -> None:
        """Free the slot and the memory of a request."""
        self.running.remove(run)
        self.cache.release(run.slot)
        heapq.heappush(self._free, run.slot)
        run.slot = -1

    def clear(self) -> None:
        """Drop all requests. Clearing the cache is up to the caller."""
        self.running, self._free = [], list(range(self.slots))

    def _grow(self, waiting: deque[RunningRequest]) -> None:
        """Reserve memory for this step's tokens, oldest request first; preempts another one if there is none left."""
        for run in list(self.running):
            while run.slot >= 0 and not self.cache.reserve(run.slot, len(run.ids)):
                victim = next(iter(self._surplus()), self.running[-1])
                self._preempt(victim)
                waiting.appendleft(victim)

    def _preempt(self, run: RunningRequest) -> None:
        """Take the slot and the memory of a request, whose tokens will be computed again."""
        self.release(run)
        run.past = 0
        self.preemptions += 1

    def _surplus(self) -> list[RunningRequest]:
        """All running requests but the oldest of each adapter; first, the newest of the adapter that has the most."""
        of_adapter = Counter[str | None]()
        ranked = []
        for age, run in enumerate(self.running):
            of_adapter[run.request.adapter] += 1
            ranked.append((of_adapter[run.request.adapter], age))
        return [self.running[age] for rank, age in sorted(ranked, reverse=True) if rank > 1]

    def _fit(self, lengths: Sequence[int]) -> bool:
        """Whether requests of these lengths fit into memory together, with headroom for each."""
        taken = sum(self.cache.capacity_of(min(length + HEADROOM, self.cache.limit)) for length in lengths)
        return len(lengths) == 1 or taken <= self.cache.limit


def _piece(run: RunningRequest, room: int) -> Chunk:
    """The next chunk of a prompt of at most `room` tokens; shorter if many tokens precede it, to bound the mask."""
    length = min(run.pending, room)
    return Chunk(run, min(length, max(1, MAX_MASK // (run.past + length))) if length else 0)
