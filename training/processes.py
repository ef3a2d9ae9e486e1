"""The processes that train together: one, or as many as torchrun started."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dimmix.errors import DimmixError, first_line


@dataclass(frozen=True)
class Processes:
    rank: int
    count: int
    device: torch.device

    def wrap(self, model: nn.Module) -> nn.Module:
        """`model` with gradients averaged over the processes."""
        return DistributedDataParallel(model) if self.count > 1 else model

    def agree(self, loss: float, late: bool, signal: int) -> tuple[float, bool, int]:
        """The mean loss (not finite if any is not), whether it is late for any process, and the signal that any got."""
        if self.count == 1:
            return loss, late, signal
        votes = torch.zeros(self.count, 3, dtype=torch.float64)
        votes[self.rank] = torch.tensor([loss, late, signal], dtype=torch.float64)
        votes = votes.to(self.device)
        dist.all_reduce(votes)
        losses, lates, signals = votes.unbind(1)
        return losses.mean().item(), bool(lates.any()), int(signals.max())


@contextmanager
def join_processes(device: str) -> Iterator[Processes]:
    """The group that torchrun's environment describes, or this process alone. `device` "auto" takes a GPU if any.

    Raises:
        DimmixError: no such device, or more processes than GPUs.
    """
    rank, count = int(os.environ.get("RANK", 0)), _count()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda"):
        device = _own_gpu(device)
    try:
        chosen = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise DimmixError(f"--device {device}: {first_line(error)}", exit_code=2) from None
    if chosen.type == "meta":
        raise DimmixError(f"--device {device}: holds no numbers to train", exit_code=2)
    if count == 1:
        yield Processes(0, 1, chosen)
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Processes(rank, count, chosen)
    finally:
        dist.destroy_process_group()


def _own_gpu(device: str) -> str:
    """The GPU of this process, one of those that torchrun started on this machine: two cannot share one."""
    local_rank, beside = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if beside == 1:
        return device
    if device != "cuda":
        raise DimmixError(f"--device {device}: {beside} processes need a GPU each; say cuda", exit_code=2)
    if torch.cuda.is_available() and beside > torch.cuda.device_count():
        raise DimmixError(f"--device cuda: {beside} processes, and {torch.cuda.device_count()} GPUs", exit_code=2)
    return f"cuda:{local_rank}"


def started_by() -> str:
    """The command that starts as many processes as there are, before the recipe."""
    return "dimmix train" if _count() == 1 else f"torchrun --nproc-per-node {_count()} -m dimmix.training"


def _count() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))
