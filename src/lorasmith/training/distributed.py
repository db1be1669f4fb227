"""Data parallel: the only importer of torch.distributed. torchrun sets the variables, or the caller has joined a group.

Adapters are replicated; gradients meet in one all-reduce of one flat buffer, so the step is the single process' code.
"""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process' number and how many there are."""

    rank: int = 0
    size: int = 1
    is_ours: bool = False  # we joined the group, so we leave it

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and talks to the reader."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> None:
        """Add up `tensor` over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def agree(self, text: str) -> str:
        """The first process' text, in all of them."""
        texts = [text]
        if self.size > 1:
            dist.broadcast_object_list(texts)
        return texts[0]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()


def join() -> World:
    """The group that torchrun describes or that the caller has joined; alone where there is none."""
    is_ours = not dist.is_initialized()
    if is_ours:
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return World()
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local < torch.cuda.device_count():
            torch.cuda.set_device(local)
        # which device the training takes is not known yet, so each kind of tensor gets its own way
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    return World(dist.get_rank(), dist.get_world_size(), is_ours)


def leave() -> None:
    """Take the group down, so that the processes end without a warning."""
    if dist.is_initialized():
        dist.destroy_process_group()
