"""The processes that torchrun starts: one model each, one gradient."""

import os
from typing import Any

import torch
from torch import Tensor, distributed, nn

from darboux.learners.tasks import Task


class Processes:
    """The processes that torchrun started, or this one alone."""

    def __init__(self) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.device = torch.device("cpu")
        self.own = False  # whether the group was made here

    def __enter__(self) -> "Processes":
        if self.count > 1 and not distributed.is_initialized():
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            distributed.init_process_group(backend, rank=self.rank, world_size=self.count)
            self.own = True
        return self

    def __exit__(self, *error: object) -> None:
        if self.own:
            distributed.destroy_process_group()

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model that averages gradients; on several GPUs, move it to its own."""
        if self.count > 1 and torch.cuda.is_available():
            model.to(torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))))
        self.device = next(iter(model.parameters()), torch.empty(0)).device
        return nn.parallel.DistributedDataParallel(model) if self.count > 1 else model

    def move(self, task: Task) -> Task:
        return Task(*(part.to(self.device, non_blocking=True) for part in task[:2]))

    def sum(self, value: Tensor) -> Tensor:
        if self.count > 1:
            value = value.clone()
            distributed.all_reduce(value)
        return value

    def gather(self, value: Any) -> list[Any]:
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        distributed.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        if self.count > 1:
            distributed.barrier()
