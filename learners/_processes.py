"""The processes that torchrun starts: one model each or a part of it, one gradient."""

import atexit
import contextlib
import copy
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, distributed, nn

from darboux import _checks
from darboux.learners import checkpoints
from darboux.learners.tasks import Task


class Processes:
    """The processes that torchrun started, or this one alone."""

    def __init__(self) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.device = torch.device("cpu")
        # the context of work on sharded and whole tensors together
        self.mixing: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
        if self.count > 1 and not distributed.is_initialized():
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            distributed.init_process_group(backend, rank=self.rank, world_size=self.count)
            atexit.register(_leave)  # not sooner: torchrun's store starts no second group

    def wrap(self, model: nn.Module, shard: bool = False) -> tuple[nn.Module, nn.Module]:
        """Return what trains, and what to call: it averages gradients.

        On several GPUs, move the model to its own; ``shard`` trains a copy instead.
        """
        if shard and self.count > 1:
            trained = self._shard(model)
            return trained, trained
        if self.count > 1 and torch.cuda.is_available():
            model.to(torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))))
        self.device = next(iter(model.parameters()), torch.empty(0)).device
        return model, nn.parallel.DistributedDataParallel(model) if self.count > 1 else model

    def _shard(self, model: nn.Module) -> nn.Module:
        """Return a copy, since nothing undoes ``fully_shard``, of which each process holds a part.

        Scalars, and what several blocks share, it holds as a whole: ``fully_shard`` takes neither.
        """
        # slow to import
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor.experimental import implicit_replication

        self.mixing = implicit_replication
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(self.device)
        mesh = init_device_mesh(self.device.type, (self.count,))
        model = copy.deepcopy(model)
        for value in (*model.parameters(), *model.buffers()):
            sent = value.detach().to(self.device).contiguous()
            distributed.broadcast(sent, 0)
            value.data = sent.to(value.device)
        blocks: dict[nn.Parameter, set[nn.Module]] = {}
        _find_blocks(model, model, blocks)
        whole = {p for p, found in blocks.items() if len(found) > 1 or not p.dim()}
        for p in whole:
            p.data = p.data.to(self.device)
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(self._average)
        inner = set().union(*blocks.values()) - {model}
        for block in [*(m for m in reversed(list(model.modules())) if m in inner), model]:
            fully_shard(block, mesh=mesh, ignored_params=whole)
        model.register_forward_pre_hook(_share_buffers)
        return model

    def _average(self, p: Tensor) -> None:
        assert p.grad is not None
        p.grad = self.sum(p.grad) / self.count

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


def _leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _share_buffers(model: nn.Module, *_: Any) -> None:
    """Take the buffers of the first process, as under DistributedDataParallel."""
    for value in model.buffers():
        distributed.broadcast(value, 0)


def _find_blocks(
    module: nn.Module, block: nn.Module, found: dict[nn.Parameter, set[nn.Module]]
) -> None:
    """Note for each parameter the blocks that use it: members of a ``ModuleList``, or the root."""
    for p in module.parameters(recurse=False):
        found.setdefault(p, set()).add(block)
    for child in module.children():
        own = isinstance(module, nn.ModuleList) and type(child).forward is not nn.Module.forward
        _find_blocks(child, child if own else block, found)


@contextlib.contextmanager
def giving_back(trained: nn.Module, model: nn.Module) -> Iterator[None]:
    """Load ``trained``, a sharded copy of ``model`` or itself, into ``model`` at the end."""
    alike = True
    try:
        yield
    except BaseException as error:
        alike = isinstance(error, _checks.ConvergenceError)  # all processes raise it, all load
        raise
    finally:
        if alike and trained is not model:
            own = model.state_dict()
            for name, value in trained.state_dict().items():
                own[name].copy_(checkpoints.whole(value))
