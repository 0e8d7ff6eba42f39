"""Train a sequence model: one loop that can be killed and resumed, alone or under torchrun."""

import contextlib
import csv
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from geoopt import ManifoldParameter
from geoopt.optim import RiemannianAdam
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from darboux import _checks
from darboux.learners import checkpoints
from darboux.learners._processes import Processes, giving_back
from darboux.learners.model import stream
from darboux.learners.tasks import IGNORED, Task

Batches = Callable[[int, torch.Generator], Task] | Iterable[Task]
FIELDS = ("step", "loss", "lr", "gradient", "seconds")


class Fit(NamedTuple):
    """What :func:`fit` did: the loss of each step, ``(steps,)`` in float64, also those resumed."""

    losses: Tensor
    seconds: float  # of this call


def fit(
    model: nn.Module,
    batches: Batches,
    *,
    steps: int,
    lr: float = 1e-3,
    optimizer: str | Callable[..., torch.optim.Optimizer] = "adamw",
    weight_decay: float = 0.01,
    schedule: str = "cosine",
    warmup: int = 0,
    clip: float | None = 1.0,
    precision: str = "float32",
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    seed: int = 0,
    progress: bool = False,
    log_to: str | Path | None = None,
    checkpoint_to: str | Path | None = None,
    every: int = 1000,
    resume: bool = False,
    shard: bool = False,
) -> Fit:
    """Train ``model`` for ``steps`` batches; return the losses.

    ``batches(step, generator)`` makes a batch with a generator of that step, this process and
    ``seed``; or ``batches`` is any iterable of :class:`~darboux.learners.tasks.Task`, read once
    more up to the step where a run resumes. ``optimizer`` is a name of ``OPTIMIZERS`` (or makes one
    from parameters, ``lr`` and ``weight_decay``; matrices decay, vectors do not), ``schedule`` one
    of ``SCHEDULES`` after ``warmup`` steps. ``clip`` bounds the norm of the gradient.
    ``precision="bf16"`` runs the model under autocast, parameters and loss in float32. ``loss`` is
    a function of logits and targets; the mean cross-entropy over targets other than -100 if not
    given.

    ``log_to`` is a folder for ``log.csv`` and, where TensorBoard is installed, its events.
    ``checkpoint_to`` is a safetensors file, written every ``every`` steps and at the end; the one
    before it stays as ``*.previous``. ``resume=True`` goes on from it, or starts where there is
    none: the losses are those of a run that was never interrupted, on one thread to the last bit.

    Under ``torchrun`` each process trains on its own batches with the gradient of them all, the
    first one writes. ``shard=True`` cuts a copy of the model among them (each member of a
    ``ModuleList``, then the rest) and puts its parameters into ``model`` at the end; checkpoints
    are the same with it and without. A loss or gradient that is not finite raises
    ``ConvergenceError`` before the step is taken.
    """
    _check_options(steps, every, schedule, precision)
    if shard and (curved := _curved(model)):
        raise ValueError(
            f"fit: shard=True would cut {', '.join(curved)}, each a whole point of its manifold, "
            "expected shard=False or parameters without manifold"
        )
    group = Processes()
    trained, run = group.wrap(model, shard)
    tools = _make_optimizer(trained, optimizer, lr, weight_decay)
    rates = [g["lr"] for g in tools.param_groups]
    settings = {
        "optimizer": optimizer if isinstance(optimizer, str) else "own",
        "lr": lr, "weight_decay": weight_decay, "schedule": schedule, "warmup": warmup,
        "clip": clip, "precision": precision, "seed": seed, "processes": group.count,
    }  # fmt: skip
    losses: list[float] = []
    path = None if checkpoint_to is None else Path(checkpoint_to)
    if path is not None:
        found = checkpoints.find(path)
        if found is not None and not resume:
            raise FileExistsError(f"fit: {found} exists, expected resume=True or another path")
        if found is not None:
            losses = checkpoints.restore(found, trained, tools, settings, group.rank)
    first = len(losses)
    log = _Log(log_to if group.rank == 0 else None, first)
    bar = _bar(first, steps, progress and group.rank == 0)
    begin = time.perf_counter()
    with log, bar, giving_back(trained, model):
        model.train()
        run.train()
        for step, task in zip(
            range(first, steps), _tasks(batches, first, seed, group.rank), strict=False
        ):
            factor = SCHEDULES[schedule](step, steps, warmup)
            for g, rate in zip(tools.param_groups, rates, strict=True):
                g["lr"] = rate * factor
            tools.zero_grad(set_to_none=True)
            value = _backward(run, group.move(task), loss, precision, group)
            with group.mixing():
                norm = _clip(trained, clip)
                if not (math.isfinite(value) and math.isfinite(norm)):
                    raise _checks.ConvergenceError(
                        f"fit: loss {value} and gradient {norm} at step {step}, expected "
                        "finite numbers; the model is that before the step",
                        value, step,
                    )  # fmt: skip
                tools.step()
            losses.append(value)
            log.write(step, value, lr * factor, norm, time.perf_counter() - begin)
            bar.update()
            last = step + 1 == steps
            if path is not None and ((step + 1) % every == 0 or last):
                _save(path, trained, tools, settings, losses, group)
    if len(losses) < steps:
        raise ValueError(f"fit: batches ended after {len(losses)} steps, expected {steps}")
    return Fit(torch.tensor(losses, dtype=torch.float64), time.perf_counter() - begin)


def _check_options(steps: int, every: int, schedule: str, precision: str) -> None:
    if steps < 1 or every < 1:
        raise ValueError(f"fit: steps {steps} and every {every}, expected positive numbers")
    if schedule not in SCHEDULES:
        raise ValueError(f"fit: schedule {schedule!r}, expected one of {', '.join(SCHEDULES)}")
    if precision not in ("float32", "bf16"):
        raise ValueError(f"fit: precision {precision!r}, expected 'float32' or 'bf16'")


def _tasks(batches: Batches, first: int, seed: int, rank: int) -> Iterator[Task]:
    """Yield the batches from step ``first`` on."""
    if not callable(batches):
        yield from itertools.islice(batches, first, None)
        return
    for step in itertools.count(first):
        # a generator of its own for each step: where to go on needs no memory
        number = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]
        yield batches(step, torch.Generator().manual_seed(int(number >> np.uint64(1))))


def _backward(model: nn.Module, task: Task, loss: Any, precision: str, group: Processes) -> float:
    """Add the gradient of the loss over all processes; return that loss."""
    device = task.tokens.device.type
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
        logits = model(task.tokens)[0]
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    if loss is None:
        # the mean over the targets of all processes, which may not have equally many
        total = cross_entropy(
            logits.flatten(0, -2), task.targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        asked = group.sum((task.targets != IGNORED).sum())
        if not asked:
            raise ValueError("fit: a batch without a target, expected some other than -100")
        value = total * group.count / asked
    else:
        value = loss(logits, task.targets)
    value.backward()
    return float(group.sum(value.detach())) / group.count


def _clip(model: nn.Module, clip: float | None) -> float:
    """Bound the norm of the gradient and return what it was."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.clip_grad_norm_(parameters, math.inf if clip is None else clip)
    return float(checkpoints.whole(norm))


# Schedules: the factor of the learning rate at a step


def constant(step: int, steps: int, warmup: int) -> float:
    """Return one after a linear warm-up."""
    return min(1.0, (step + 1) / (warmup + 1))


def cosine(step: int, steps: int, warmup: int) -> float:
    """Return half a cosine from one to zero after a linear warm-up."""
    if step < warmup:
        return constant(step, steps, warmup)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def one_cycle(step: int, steps: int, warmup: int) -> float:
    """Return 1/25 rising to one in the first 30 %, then falling to 1/250,000 (Smith and Topin).

    Takes no other warm-up.
    """
    peak, end = 0.3 * steps - 1, steps - 1
    if step <= peak:
        return _between(1 / 25, 1.0, step / peak if peak > 0 else 1.0)
    return _between(1.0, 4e-6, (step - peak) / (end - peak))


def _between(a: float, b: float, share: float) -> float:
    return b + (a - b) / 2 * (1 + math.cos(math.pi * share))


SCHEDULES: dict[str, Callable[[int, int, int], float]] = {
    "constant": constant, "cosine": cosine, "one_cycle": one_cycle,
}  # fmt: skip
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    # parameters on a manifold of geoopt move along it, all others as under Adam
    "riemannian_adam": RiemannianAdam,
}


def _curved(model: nn.Module) -> list[str]:
    return [n for n, p in model.named_parameters() if isinstance(p, ManifoldParameter)]


def _make_optimizer(
    model: nn.Module, optimizer: Any, lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    if isinstance(optimizer, str) and optimizer not in OPTIMIZERS:
        raise ValueError(f"fit: optimizer {optimizer!r}, expected one of {', '.join(OPTIMIZERS)}")
    curved = _curved(model)
    if curved and isinstance(optimizer, str) and optimizer != "riemannian_adam":
        raise ValueError(
            f"fit: optimizer {optimizer!r} would leave the manifold of {', '.join(curved)}, "
            "expected 'riemannian_adam'"
        )
    free = [p for p in model.parameters() if p.requires_grad]
    # what lives on a manifold or is a vector (a bias, a scale) is not drawn towards zero
    decays = [p for p in free if p.dim() > 1 and not isinstance(p, ManifoldParameter)]
    chosen = {id(p) for p in decays}
    groups = [
        {"params": decays, "weight_decay": weight_decay},
        {"params": [p for p in free if id(p) not in chosen], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if not groups:
        raise ValueError("fit: the model has no trainable parameters")
    return (OPTIMIZERS[optimizer] if isinstance(optimizer, str) else optimizer)(groups, lr=lr)


def _save(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: dict[str, Any],
    losses: list[float],
    group: Processes,
) -> None:
    """Write a checkpoint with the random states of all processes."""
    states = group.gather(checkpoints.random_state(group.device))
    checkpoints.save(path, model, optimizer, settings, losses, states, group.rank)
    group.wait()


# Logs


class _Log:
    """A CSV file of the steps, and TensorBoard where it is installed."""

    def __init__(self, folder: str | Path | None, first: int):
        self.file = self.writer = self.board = None
        if folder is None:
            return
        path = Path(folder) / "log.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if first and path.exists():  # steps after the checkpoint will come once more
            with open(path, newline="") as file:
                kept = [row for row in csv.reader(file) if row[0].isdigit() and int(row[0]) < first]
        beside = path.with_name(".log.csv.part")  # a kill here must not cost the log
        with open(beside, "w", newline="") as file:
            csv.writer(file).writerows([FIELDS, *kept])
        beside.replace(path)
        self.file = open(path, "a", newline="")
        self.writer = csv.writer(self.file)
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder), purge_step=first)

    def write(self, step: int, *values: float) -> None:
        if self.writer is None or self.file is None:
            return
        self.writer.writerow([step, *values])
        self.file.flush()
        if self.board is not None:
            for name, value in zip(FIELDS[1:], values, strict=True):
                self.board.add_scalar(name, value, step)

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, *error: object) -> None:
        for part in (self.file, self.board):
            if part is not None:
                part.close()


class _NoBar(contextlib.nullcontext):
    def update(self) -> None:
        pass


def _bar(first: int, steps: int, shown: bool) -> Any:
    """Return a progress bar of tqdm, or one that shows nothing."""
    if shown:
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            return tqdm(initial=first, total=steps, unit="step")
    return _NoBar()


# Evaluation


class Evaluation(NamedTuple):
    """The share of right answers, the mean cross-entropy in nats, and how many were asked."""

    accuracy: float
    loss: float
    asked: int

    @property
    def bits(self) -> float:
        """Return the loss in bits."""
        return self.loss / math.log(2)


def evaluate(
    model: nn.Module, task: Task | Iterable[Task], *, chunk: int | None = None
) -> Evaluation:
    """Return accuracy and loss over all targets other than -100.

    ``chunk`` streams so many tokens at a time; an iterable of tasks is one stream in chunks, as
    :func:`~darboux.learners.tasks.running` makes it.
    """
    if isinstance(task, Task):
        size = chunk or task.tokens.shape[1]
        parts: Iterable[Task] = (
            Task(*pair)
            for pair in zip(task.tokens.split(size, 1), task.targets.split(size, 1), strict=True)
        )
    else:
        parts = task
    right = count = 0
    total = 0.0
    ours, theirs = itertools.tee(parts)
    for logits, part in zip(stream(model, (p.tokens for p in ours)), theirs, strict=True):
        targets = part.targets.to(logits.device)
        asked = targets != IGNORED
        answers, targets = logits[asked], targets[asked]
        right += int((answers.argmax(-1) == targets).sum())
        total += float(cross_entropy(answers.double(), targets, reduction="sum"))
        count += len(targets)
    if not count:
        raise ValueError("evaluate: no targets, expected some other than -100")
    return Evaluation(right / count, total / count, count)
