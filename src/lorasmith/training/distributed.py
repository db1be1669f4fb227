"""Data parallelism; the only module that imports torch.distributed.

Every process has the whole adapter, and gradients are summed by one all-reduce of one flat buffer, so that a step is
the same code as in a single process. The process group comes from torchrun, or from a caller that has initialized it.
"""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """The rank of this process and the number of processes. Its methods communicate only if there are several."""

    rank: int = 0
    size: int = 1
    owns_group: bool = False  # `join` created the group, so `leave` must take it down

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and reports to the user."""
        return self.rank == 0

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum `tensor` over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def broadcast(self, text: str) -> str:
        """The text that the first process passed, in every process."""
        texts = [text]
        if self.size > 1:
            dist.broadcast_object_list(texts)
        return texts[0]

    def barrier(self) -> None:
        """Wait until all processes have reached this call."""
        if self.size > 1:
            dist.barrier()


def join() -> World:
    """Join the process group of torchrun or of the caller; a world of one process if there is neither."""
    owns_group = not dist.is_initialized()
    if owns_group:
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return World()
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local < torch.cuda.device_count():
            torch.cuda.set_device(local)
        # the training's device is not known yet, so each kind of tensor gets a backend
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    return World(dist.get_rank(), dist.get_world_size(), owns_group)


def leave() -> None:
    """Destroy the process group, so that the processes end without a warning."""
    if dist.is_initialized():
        dist.destroy_process_group()
