"""Repetition, presence and frequency penalties, applied to all rows of a step at once.

    N = requests that get a token, V = vocabulary, I = distinct tokens of all penalized requests

The repetition penalty (CTRL, arXiv:1909.05858, section 4.1) covers prompt and reply. Presence and frequency penalties,
as defined by OpenAI, cover only the reply.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lorasmith.config.sampling import SamplingConfig

MAX_REPETITION = 1e9  # larger repetition penalties have no further effect, but could make a logit infinite


class TokenCounts:
    """The distinct tokens of a request and how often each is in its reply. Adding a token takes constant time."""

    def __init__(self, prompt: Iterable[int]) -> None:
        self._place = {token: i for i, token in enumerate(dict.fromkeys(prompt))}
        spare = len(self._place) + 64
        self._ids = np.zeros(spare, dtype=np.int64)
        self._ids[: len(self._place)] = list(self._place)
        self._counts = np.zeros(spare, dtype=np.float32)

    def add(self, token: int) -> None:
        """Add a token of the reply."""
        place = self._place.setdefault(token, len(self._place))
        if place == len(self._ids):
            self._ids, self._counts = (np.concatenate([a, np.zeros_like(a)]) for a in (self._ids, self._counts))
        self._ids[place] = token
        self._counts[place] += 1

    @property
    def ids_I(self) -> Tensor:
        """The distinct token ids, int64. Like `counts_I` a view that is valid until the next `add`."""
        return torch.from_numpy(self._ids[: len(self._place)])

    @property
    def counts_I(self) -> Tensor:
        """How often each token is in the reply, float32."""
        return torch.from_numpy(self._counts[: len(self._place)])


class PenalizedRow(NamedTuple):
    """A row of logits whose request has a penalty."""

    row: int
    token_counts: TokenCounts
    sampling: SamplingConfig


def apply_penalties(logits_NV: Tensor, penalized: Sequence[PenalizedRow]) -> None:
    """Apply the penalties in place: first repetition, then presence and frequency. Neutral ones do not change a bit."""
    if not penalized:
        return
    ids = [one.token_counts.ids_I for one in penalized]
    lengths = torch.tensor([len(own_I) for own_I in ids])
    settings = [
        (min(max(s.repetition_penalty, 1 / MAX_REPETITION), MAX_REPETITION), s.presence_penalty, s.frequency_penalty)
        for s in (one.sampling for one in penalized)
    ]
    device = logits_NV.device
    row_I = torch.tensor([one.row for one in penalized]).repeat_interleave(lengths).to(device)
    counts_I = torch.cat([one.token_counts.counts_I for one in penalized]).to(device)
    settings_I3 = torch.tensor(settings, dtype=torch.float32).repeat_interleave(lengths, 0).to(device)
    repetition_I, presence_I, frequency_I = settings_I3.unbind(1)
    at = row_I, torch.cat(ids).to(device)
    old_I = logits_NV[at]
    new_I = torch.where(old_I < 0, old_I * repetition_I, old_I / repetition_I)
    logits_NV[at] = new_I - counts_I * frequency_I - (counts_I > 0) * presence_I
