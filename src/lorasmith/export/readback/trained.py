"""What the trained model says, computed before anything is merged or rounded: an exported file must say the same."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lorasmith.adapters.merge import adapter_logits, probe_rows
from lorasmith.adapters.session import Session
from lorasmith.config.sampling import SamplingConfig
from lorasmith.data.template.encoding import Template
from lorasmith.engine.engine import Engine, replies
from lorasmith.engine.request import Request
from lorasmith.export.gguf.families import context_length
from lorasmith.export.readback.prompts import prompts_of
from lorasmith.export.readback.readers import REPLY
from lorasmith.i18n import _
from lorasmith.model.row import IGNORED, Example
from lorasmith.report import Report, Steps

ROW = 256  # tokens of a held-out row that are compared
LogitsOf = Callable[[Sequence[list[int]]], list[Tensor]]


@dataclass(frozen=True)
class Said:
    """A greedy reply. leads: by how much the logit of each of its tokens exceeds the second largest."""

    ids: list[int]
    leads: list[float]


@dataclass(frozen=True)
class Trained:
    """What the trained model says, with the adapter on the base model.

    logits: of each probe, float32 of shape [L, V]. replies: to `prompts`, which are token ids. log_probs: the mean log
    probability of the learned tokens of each of the held-out `rows`. context: tokens that the exported model may read.
    """

    template: Template
    context: int
    probes: Sequence[list[int]]
    logits: Sequence[Tensor]
    prompts: Sequence[list[int]]
    replies: Sequence[Said]
    rows: Sequence[Example] = ()
    log_probs: Sequence[float] = ()

    @property
    def longest(self) -> int:
        """Tokens of the longest row that a reader has to read."""
        rows = [*self.probes, *(row.ids for row in self.rows)]
        return min(self.context, max([*map(len, rows), *(len(ids) + REPLY for ids in self.prompts)]))


def measure(session: Session, rows: Sequence[Example] = (), report: Report | None = None) -> Trained:
    """Compute what the trained model says; rows: held-out examples, of which the first `ROW` tokens count."""
    template, context = session.template, context_length(session.base.model.config)
    probes = [ids[:context] for ids in probe_rows(session)]
    prompts = [ids for _messages, ids in prompts_of(template) if len(ids) < context]
    rows = [short for row in rows if (short := _cut(row, min(ROW, context))).learned]

    def logits_of(batch: Sequence[list[int]]) -> list[Tensor]:
        return adapter_logits(session, batch)

    steps = Steps(report or Report(), _("asking the trained model"), 2 * len(prompts) + len(rows))
    said = zip(prompts, _replies(session, prompts, context, steps.step), strict=True)
    replies = [Said(ids, _leads(logits_of, prompt, ids, steps.step)) for prompt, ids in said]
    log_probs = mean_log_probs(logits_of, rows, steps.step)
    return Trained(template, context, probes, logits_of(probes), prompts, replies, rows, log_probs)


def mean_log_probs(
    logits_of: LogitsOf, rows: Sequence[Example], step: Callable[[], None] = lambda: None
) -> list[float]:
    """The mean log probability of the learned tokens of each row. step: called after each."""
    found = []
    for row in rows:
        logits_LV, wanted_L = logits_of([row.ids])[0], torch.tensor(row.targets)
        found.append(-float(cross_entropy(logits_LV, wanted_L, ignore_index=IGNORED)))
        step()
    return found


def _cut(row: Example, limit: int) -> Example:
    return Example(row.ids[:limit], row.targets[:limit], row.weights[:limit], row.source)


def _replies(session: Session, prompts: Sequence[list[int]], context: int, step: Callable[[], None]) -> list[list[int]]:
    """The greedy replies, as `generate` and `chat` compute them."""
    asked, adapter = list[Request](), next(iter(session.names), None)
    for ids in prompts:
        sampling = SamplingConfig(temperature=0.0, max_new_tokens=min(REPLY, context - len(ids)))
        asked.append(Request(ids, sampling, adapter, session.template.stop_ids))
    return [reply.ids for reply in replies(Engine(session.base), asked, step)]


def _leads(logits_of: LogitsOf, prompt: list[int], reply: list[int], step: Callable[[], None]) -> list[float]:
    (logits_LV,) = logits_of([[*prompt, *reply]])
    step()
    top = logits_LV[len(prompt) - 1 : -1].topk(2, dim=-1).values
    leads: list[float] = (top[:, 0] - top[:, 1]).tolist()
    return leads
