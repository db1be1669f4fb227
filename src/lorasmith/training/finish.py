"""The end of a training: which adapter is kept, and its held-out losses."""

import shutil
from pathlib import Path

import torch

from lorasmith.evaluation.loss import ExampleLosses, evaluate_loss
from lorasmith.i18n import _
from lorasmith.lora.files import read_weights
from lorasmith.system.writing import write_folder
from lorasmith.training.checkpoint import State
from lorasmith.training.files import ADAPTER
from lorasmith.training.loop import Job, ask, best_folder, measure


def finish_adapter(job: Job, state: State) -> ExampleLosses | None:
    """Fill adapter/ with the best adapter by held-out loss, or the last where none was measured; its losses.

    The last one is measured first, but after an early stop: there it has been, and it is not the best.
    """
    if state.step == len(job.plan):
        ask(job, state.step, job.adapter)
        last = measure(job, state, _("held-out loss of the adapter")) if job.held_out else None
        if last is None or state.best_loss is None or last.loss <= state.best_loss:
            state.best_loss, state.best_step = last.loss if last else None, state.step
            if job.world.is_first:
                write_folder(job.folder / ADAPTER, job.write_adapter)
            return last
    best = best_folder(job, state)
    if job.world.is_first:
        write_folder(job.folder / ADAPTER, lambda folder: _copy(best, folder))
    job.world.wait()
    _put_weights(job, best)
    job.report.say(_("Keeping the adapter from step {step}, which has the best held-out loss", step=state.best_step))
    task = _("held-out loss of the best adapter")
    return evaluate_loss(job.base, job.held_out, job.adapter, job.report, task, job.world)


def _copy(source: Path, folder: Path) -> None:
    shutil.copytree(source, folder, dirs_exist_ok=True)


@torch.no_grad()
def _put_weights(job: Job, folder: Path) -> None:
    tensors = read_weights(folder)
    for key, parameter in job.base.adapters[job.adapter].parameters.items():
        parameter.copy_(tensors[key])
