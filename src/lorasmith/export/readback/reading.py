"""What a reader makes of an exported file, compared with the trained model, up to what rounding explains."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorasmith.adapters.merge import MARGIN, certify, plain_logits
from lorasmith.export.gguf.tokenizer.vocabulary import compared_texts
from lorasmith.export.readback.readers import Reader
from lorasmith.export.readback.trained import Said, Trained, mean_log_probs
from lorasmith.i18n import _
from lorasmith.report import Report, Steps


@dataclass
class Reading:
    """The figures of a reader.

    error, limit: of its logits on the probes, relative. agreeing: the positions, of those where rounding cannot change
    the most likely token, at which it is the same. log_prob_error: the largest difference of the mean log probability
    of a held-out row.
    """

    reader: str
    version: str
    error: float = 0.0
    limit: float = 0.0
    agreeing: int = 0
    positions: int = 0
    replies: int = 0
    equal_replies: int = 0
    rows: int = 0
    log_prob_error: float = 0.0
    log_prob_limit: float = 0.0


@dataclass(frozen=True)
class Rounding:
    """What rounding the merged weights changes, measured in memory: logits of the probes, and log probabilities."""

    logits: Sequence[Tensor]
    log_probs: Sequence[float]

    @classmethod
    def of(cls, rounded: PreTrainedModel, trained: Trained) -> "Rounding":
        """rounded: the merged model, with its weights as the file has them."""
        log_probs = mean_log_probs(lambda batch: plain_logits(rounded, batch), trained.rows)
        return cls(plain_logits(rounded, trained.probes), log_probs)

    def times(self, slack: float, trained: Trained) -> "Rounding":
        """The same with all differences from the trained model multiplied."""
        logits = [own + slack * (one - own) for one, own in zip(self.logits, trained.logits, strict=True)]
        log_probs = [own + slack * (one - own) for one, own in zip(self.log_probs, trained.log_probs, strict=True)]
        return Rounding(logits, log_probs)


def read(
    reader: Reader, trained: Trained, rounding: Rounding, report: Report | None = None
) -> tuple[Reading, list[str]]:
    """The figures of a reader, and what it does not say as the trained model does."""
    count = len(trained.prompts) + len(trained.rows)
    steps = Steps(report or Report(), _("asking {reader}", reader=reader.name), count)
    reading, explained = Reading(reader.name, reader.version), rounding.times(reader.slack, trained)
    problems = [*_other_ids(reader, trained), *_other_logits(reader, trained, explained, reading)]
    if not problems:
        problems += _other_replies(reader, trained, explained, reading, steps)
        problems += _other_log_probs(reader, trained, explained, reading, steps)
    return reading, problems


def _other_ids(reader: Reader, trained: Trained) -> Iterator[str]:
    tokenizer = trained.template.tokenizer
    for text in compared_texts(tokenizer):
        own = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if reader.tokens(text) not in (None, own):
            yield _(
                "{reader} splits the text {sample} into other tokens than in the training",
                reader=reader.name,
                sample=repr(text),
            )
            return


def _other_logits(reader: Reader, trained: Trained, explained: Rounding, reading: Reading) -> Iterator[str]:
    found = reader.logits(trained.probes)
    wanted, floor = trained.logits, reader.floor
    result = certify("", torch.float32, wanted, [explained.logits], found, False, floor=floor)
    reading.error, reading.limit = result.error, result.limit
    reading.agreeing, reading.positions = result.agreeing, result.positions
    if not result.holds:
        yield _(
            "as {reader} reads it, its logits differ from those of the trained model by {error:.1e}, where rounding "
            "explains {limit:.1e}; the top token agrees at {agreeing} of {positions} positions",
            reader=reader.name,
            error=result.error,
            limit=result.limit,
            agreeing=result.agreeing,
            positions=result.positions,
        )


def _other_replies(
    reader: Reader, trained: Trained, explained: Rounding, reading: Reading, steps: Steps
) -> Iterator[str]:
    found = []
    for prompt in trained.prompts:
        found += reader.replies([prompt], trained.template.stop_ids, trained.context)
        steps.step()
    clear = _clear_lead(trained, explained, reader.floor)
    pairs = list(zip(trained.prompts, trained.replies, found, strict=True))
    reading.replies, reading.equal_replies = len(pairs), sum(own.ids == other for _prompt, own, other in pairs)
    for prompt, own, other in pairs:
        if _differs(own, other, clear):
            yield _(
                "as {reader} reads it, it replies {found} to {prompt} instead of {wanted}",
                reader=reader.name,
                found=repr(trained.template.tokenizer.decode(other)),
                prompt=repr(trained.template.tokenizer.decode(prompt)),
                wanted=repr(trained.template.tokenizer.decode(own.ids)),
            )
            return


def _clear_lead(trained: Trained, explained: Rounding, floor: float) -> float:
    """The lead of a logit over the second largest that rounding cannot undo, as in `adapters.merge.certify`."""
    most = max(float((one - own).abs().max()) for one, own in zip(explained.logits, trained.logits, strict=True))
    size = float(torch.cat([t.double().flatten() for t in trained.logits]).pow(2).mean().sqrt())
    return max(2 * MARGIN * most, floor * size)


def _differs(own: Said, other: list[int], clear: float) -> bool:
    """Whether the first other token is one that rounding does not explain. The rest follows from it."""
    both = enumerate(zip(own.ids, other, strict=False))
    at = next((i for i, (a, b) in both if a != b), min(len(own.ids), len(other)))
    return at < len(own.ids) and own.leads[at] > clear


def _other_log_probs(
    reader: Reader, trained: Trained, explained: Rounding, reading: Reading, steps: Steps
) -> Iterator[str]:
    found = mean_log_probs(reader.logits, trained.rows, steps.step)
    reading.rows = len(trained.rows)
    reading.log_prob_error = _largest(found, trained.log_probs)
    reading.log_prob_limit = max(MARGIN * _largest(explained.log_probs, trained.log_probs), reader.floor)
    if reading.log_prob_error > reading.log_prob_limit:
        yield _(
            "as {reader} reads it, the mean log probability of a held-out row differs by {error:.1e}, where rounding "
            "explains {limit:.1e}",
            reader=reader.name,
            error=reading.log_prob_error,
            limit=reading.log_prob_limit,
        )


def _largest(some: Sequence[float], other: Sequence[float]) -> float:
    return max((abs(a - b) for a, b in zip(some, other, strict=True)), default=0.0)
