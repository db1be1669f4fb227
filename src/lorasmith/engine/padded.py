"""The padded layout: left-padded batches, for models that do not support packed rows (Bloom, GPT-J, recurrent ones)."""

import inspect
from collections import deque
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from lorasmith.engine.request import Chunk, RunningRequest
from lorasmith.lora.router import Slice
from lorasmith.model.base import Base
from lorasmith.model.head import logits
from lorasmith.model.probe import native_attention
from lorasmith.model.row import slices_of


class Padded:
    """Static batches of up to `slots` requests, with the KV cache of transformers.

    A batch runs until all its requests have ended; only then do waiting requests start. Without a KV cache the whole
    text is recomputed for each token.

        B = requests of the batch, including ended ones; L = tokens so far; N = new tokens of each
    """

    def __init__(self, base: Base, slots: int, use_cache: bool = True) -> None:
        self.base, self.slots = base, slots
        self._batch: list[RunningRequest] = []
        self._ended: set[int] = set()
        self._keys: Any = None
        self._mask_BL = torch.empty(0, 0, dtype=torch.long)
        self.longest: int | None = None
        accepted = inspect.signature(base.model.forward).parameters
        self._takes_positions = slots > 1 and "position_ids" in accepted  # alone, the model counts better itself
        self._has_cache = use_cache and "past_key_values" in accepted
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    def admits(self, lengths: Sequence[int]) -> bool:
        """Always True: the memory of the model's own cache is not limited."""
        del lengths
        return True

    def make_way(self, tokens: int, waiting: deque[RunningRequest]) -> bool:
        """Always False: the requests of a batch end together."""
        del tokens, waiting
        return False

    def schedule(self, waiting: deque[RunningRequest]) -> list[Chunk]:
        """The unfinished requests of the batch; starts a new batch, sorted by adapter, if there are none."""
        if not self._batch:
            chosen: list[RunningRequest] = []
            while waiting and len(chosen) < self.slots and self._fits([*chosen, waiting[0]]):
                chosen.append(waiting.popleft())
            self._batch = sorted(chosen, key=lambda run: run.request.adapter or "")
            self._ended, self._keys = set(), None
            for row, run in enumerate(self._batch):
                run.slot = row
        return [Chunk(run, run.pending) for run in self._batch if run.key not in self._ended]

    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        """Logits [chunks, V] in float32."""
        with native_attention(self.base):
            logits_BV = self._forward(self._inputs())
        rows = {run.key: i for i, run in enumerate(self._batch)}
        at_C = torch.tensor([rows[chunk.running.key] for chunk in chunks], device=logits_BV.device)
        for run, length in chunks:
            run.past += length
        return logits_BV.index_select(0, at_C).float()

    def release(self, run: RunningRequest) -> None:
        """Mark the request as ended. Its row stays in the batch, ignored, until the batch is complete."""
        self._ended.add(run.key)
        if len(self._ended) == len(self._batch):
            self._batch, self._keys = [], None

    def clear(self) -> None:
        """Drop all requests and the cache, which may be half updated."""
        self._batch, self._keys = [], None

    def _fits(self, batch: Sequence[RunningRequest]) -> bool:
        """Whether the longest prompt plus the longest reply fit into the context: padding takes positions too."""
        limit = self.base.max_positions
        new = max(run.limit - len(run.ids) for run in batch)
        return len(batch) == 1 or limit is None or max(len(run.ids) for run in batch) + new <= limit

    def _inputs(self) -> Tensor:
        """The tokens [B, N] that are not in the cache yet; extends the mask. Ended rows repeat their last token."""
        device = self.base.device
        if self._keys is not None:
            self._mask_BL = torch.cat([self._mask_BL, self._mask_BL.new_ones(len(self._batch), 1)], 1)
            return torch.tensor([[run.ids[-1]] for run in self._batch], device=device)
        longest = max(len(run.ids) for run in self._batch)
        pads = [longest - len(run.ids) for run in self._batch]
        mask = [[0] * pad + [1] * (longest - pad) for pad in pads]
        self._mask_BL = torch.tensor(mask, device=device)
        return torch.tensor([[0] * pad + run.ids for pad, run in zip(pads, self._batch, strict=True)], device=device)

    def _forward(self, ids_BN: Tensor) -> Tensor:
        """Logits [B, V] of the last tokens. The router is set once for the tokens and once for the rows of the head."""
        inputs: dict[str, Any] = {"input_ids": ids_BN, "attention_mask": self._mask_BL, "use_cache": self._has_cache}
        if self._takes_positions:
            position_BL = (self._mask_BL.cumsum(-1) - 1).clamp(min=0)
            inputs["position_ids"] = position_BL[:, -ids_BN.shape[1] :]
        if self._has_cache:
            inputs["past_key_values"] = self._keys
        router = self.base.router
        router.route(self._slices(ids_BN.shape[1]))
        if not self.base.head.direct:
            out = self.base.model(**inputs, **self._last)
            self._keys = getattr(out, "past_key_values", None)
            last: Tensor = out.logits[:, -1]
            return last
        out = self.base.decoder(**inputs)
        self._keys = getattr(out, "past_key_values", None)
        router.route(self._slices(1))
        return logits(self.base, out.last_hidden_state[:, -1])

    def _slices(self, tokens: int) -> list[Slice]:
        """The adapter of each row, for the last `tokens` tokens of each row."""
        if any(run.active_from for run in self._batch):
            return list(slices_of([one for run in self._batch for one in _adapters(run, tokens)]))
        slices, first = [], 0
        for adapter, group in groupby(self._batch, key=lambda run: run.request.adapter):
            last = first + len(list(group))
            slices.append(Slice(adapter, first * tokens, last * tokens))
            first = last
        return slices


def _adapters(run: RunningRequest, tokens: int) -> list[str | None]:
    """The adapter of each of the last `tokens` tokens of a request, padding included."""
    active = max(0, min(tokens, len(run.ids) - run.active_from))
    return [None] * (tokens - active) + [run.request.adapter] * active
