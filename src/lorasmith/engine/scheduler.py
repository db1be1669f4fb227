"""Which requests go through the model in the next step: places, memory, and who waits when either is short.

Memory is taken as replies grow. When it is short, the newest request loses its place, waits before all others, and is
computed again from its tokens (as vLLM preempts by recomputation): what it has said stays, and what it will say.
"""

import heapq
from collections import deque
from collections.abc import Callable, Sequence

from lorasmith.engine.kv_cache import KVCache
from lorasmith.engine.request import Chunk, RunningRequest

HEADROOM = 64  # tokens that all running requests can grow by before one that joins would have to leave again
MAX_MASK = 2**21  # new tokens x earlier ones of a piece of a prompt: what attention's mask holds for each head


class Scheduler:
    """At most `slots` requests, `tokens` tokens a step, as much as `cache` holds.

    Requests that already answer come first, one token each; the rest of the step goes to prompts, the oldest first.
    """

    def __init__(self, cache: KVCache, slots: int, tokens: int) -> None:
        self.cache, self.slots, self.tokens = cache, slots, max(tokens, slots)
        self.preemptions = 0  # how often one lost its place
        self.running: list[RunningRequest] = []  # the oldest first
        self._free = list(range(slots))  # a heap

    def schedule(self, waiting: deque[RunningRequest], begin: Callable[[RunningRequest], None]) -> list[Chunk]:
        """This step's pieces; takes from `waiting` what finds a place, and tells `begin` of it."""
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
            self.running.append(run)
            has_room = self.cache.reserve(run.slot, len(run.ids))
            assert has_room, "it was admitted"
            begin(run)
            chunks.append(_piece(run, room))
            room -= chunks[-1].length
        return [chunk for chunk in chunks if chunk.length]

    def admits(self, lengths: Sequence[int]) -> bool:
        """Whether there is memory for requests of so many tokens beside those that run, all of which go on a while."""
        wanted = [*lengths, *(len(run.ids) for run in self.running)]
        taken = sum(self.cache.capacity_of(min(length + HEADROOM, self.cache.limit)) for length in wanted)
        return len(wanted) == 1 or taken <= self.cache.limit

    def release(self, run: RunningRequest) -> None:
        """It needs its place no more."""
        self.running.remove(run)
        self.cache.release(run.slot)
        heapq.heappush(self._free, run.slot)
        run.slot = -1

    def clear(self) -> None:
        """No request is left; the cache is cleared by who owns it."""
        self.running, self._free = [], list(range(self.slots))

    def _grow(self, waiting: deque[RunningRequest]) -> None:
        """Memory for the tokens of this step, from the oldest request on; where there is none, the newest goes."""
        for run in list(self.running):
            while run.slot >= 0 and not self.cache.reserve(run.slot, len(run.ids)):
                newest = self.running[-1]
                self.release(newest)
                newest.past = 0
                waiting.appendleft(newest)
                self.preemptions += 1


def _piece(run: RunningRequest, room: int) -> Chunk:
    """The next tokens of a prompt: fewer where many stand before them, since each of them looks at all."""
    length = min(run.pending, room)
    return Chunk(run, min(length, max(1, MAX_MASK // (run.past + length))) if length else 0)
