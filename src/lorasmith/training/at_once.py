"""Whether several adapters can be trained at once: a trial step together is compared with one of each alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lorasmith.config.toml import Config
from lorasmith.errors import LIBRARY_ERRORS, LorasmithError, first_line
from lorasmith.i18n import _
from lorasmith.model.base import Base
from lorasmith.model.forward import row_of
from lorasmith.model.head import loss_sum
from lorasmith.model.row import Row, join
from lorasmith.model.verify import TOLERANCE
from lorasmith.training.distributed import World
from lorasmith.training.loop import Job

EXAMPLES = 2  # of each adapter in the trial step


def why_alone(config: Config, world: World) -> str:
    """Why this run cannot share its base model with others, as a text; empty if it can."""
    if config.training.method != "lora":
        return _("training.method is {method!r}", method=config.training.method)
    if config.training.start_from is not None:
        return _("training.start_from chooses its base model")
    if config.data.add_tokens:
        return _("data.add_tokens changes the vocabulary of the base model")
    if config.lora.bias != "none":
        return _("lora.bias trains biases of the base model in place")
    if config.lora.modules_to_save:
        return _("lora.modules_to_save trains modules of the base model in full")
    if config.training.trackers:
        return _("a tracker of training.report_to follows one run at a time")
    if world.size > 1:
        return _("it is trained with several processes")
    return ""


def not_at_once(jobs: Sequence[Job]) -> str:
    """Why a step of these jobs at once would not give each the result of its own step, as a text; empty if it would.

    Leaves parameters and gradients as they are.
    """
    base = jobs[0].base
    if any(base.adapters[job.adapter].config.lora_dropout for job in jobs):
        return _("lora.lora_dropout draws other random numbers if several adapters are computed at once")
    rows = [_row(job) for job in jobs]
    parameters = [list(base.adapters[job.adapter].trained.values()) for job in jobs]
    try:
        together = _gradients(base, join(rows), [p for own in parameters for p in own])
    except (LorasmithError, AssertionError, *LIBRARY_ERRORS) as error:
        return _("it fails with an error: {error}", error=first_line(error))
    limit = TOLERANCE[base.dtype][1]
    for job, row, own, found in zip(
        jobs, rows, parameters, together.split([sum(p.numel() for p in own) for own in parameters]), strict=True
    ):
        wanted = _gradients(base, row, own)
        off = float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))
        if not off <= limit:  # NaN, too
            return _("the gradients of {adapter} differ by {off:.1e}", adapter=job.folder.name, off=off)
    return ""


def _row(job: Job) -> Row:
    members = range(min(EXAMPLES, len(job.train)))
    return row_of(job.base, [job.train[i] for i in members], sum(job.train[i].weight for i in members), job.adapter)


def _gradients(base: Base, row: Row, parameters: Sequence[torch.nn.Parameter]) -> Tensor:
    gradients = torch.autograd.grad(loss_sum(base, row), parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in gradients])
