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

    def agree(self, loss: float, stop: bool) -> tuple[float, bool]:
        """The mean loss (not finite if any is not), and whether any process wants to stop."""
        if self.count == 1:
            return loss, stop
        votes = torch.tensor([loss, float(stop)], dtype=torch.float64, device=self.device)
        dist.all_reduce(votes)
        return votes[0].item() / self.count, votes[1].item() > 0


@contextmanager
def join_processes(device: str) -> Iterator[Processes]:
    """The group that torchrun's environment describes, or this process alone. `device` "auto" takes a GPU if any."""
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    count = _count()
    if device == "auto":
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        device = f"cuda:{local_rank % gpus}" if gpus else "cpu"
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


def started_by() -> str:
    """The command that starts as many processes as there are, before the recipe."""
    return "dimmix train" if _count() == 1 else f"torchrun --nproc-per-node {_count()} -m dimmix.training"


def _count() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))
