"""The loop under the flows of metrics: fixed explicit steps, saved states, an early end.

States are single tensors; everything is plain autograd through time. What a flow calls failure
or a singularity it says by ``verdict``, asked on plain numbers after every step.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from darboux._checks import ConvergenceError, checks_values, values

Field = Callable[[Tensor], Tensor]

# The stability interval of the classical Runge-Kutta method on the negative real axis.
RK4_REAL = 2.785


def rk4(field: Field, y: Tensor, dt: float | Tensor) -> Tensor:
    """Take one step of the classical Runge-Kutta method (Kutta 1901)."""
    a = field(y)
    b = field(y + dt / 2 * a)
    c = field(y + dt / 2 * b)
    d = field(y + dt * c)
    return y + dt / 6 * (a + 2 * (b + c) + d)


def march(
    step: Callable[[Tensor], Tensor],
    y: Tensor,
    dt: float,
    steps: int,
    save_every: int,
    verdict: Callable[[Tensor], str | None],
) -> tuple[Tensor, Tensor, str | None]:
    """Return times, saved states (time first) and what ended the run early, if anything.

    A state that ``verdict`` condemns is dropped; the last good one is saved in any case.
    """
    kept, counts, word = [y], [0], None
    for k in range(1, steps + 1):
        new = step(y)
        if checks_values():
            word = verdict(values(new))
            if word is not None:
                if counts[-1] != k - 1:
                    kept.append(y)
                    counts.append(k - 1)
                break
        y = new
        if k % save_every == 0 or k == steps:
            kept.append(y)
            counts.append(k)
    t = dt * torch.tensor(counts, dtype=y.dtype, device=y.device)
    return t, torch.stack(kept), word


def check_run(where: str, dt: float, steps: int, save_every: int) -> None:
    """Raise ``ValueError`` unless the numbers of a run make sense."""
    if not (dt > 0 and math.isfinite(dt)):
        raise ValueError(f"{where}: dt is {dt}, expected a positive number")
    for name, value in (("steps", steps), ("save_every", save_every)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{where}: {name} is {value}, expected a positive integer")


def check_stable(where: str, dt: float, bound: float) -> None:
    """Raise ``ValueError`` that reports the bound if ``dt`` is beyond explicit stability."""
    if checks_values() and not dt <= bound:
        raise ValueError(
            f"{where}: dt is {dt:.6g}, beyond the explicit stability bound {bound:.6g} of this "
            "metric on this grid"
        )


def stopped(where: str, why: str, run: Any) -> ConvergenceError:
    """Return the error of a failed run; its ``trajectory`` is the run up to the last good state."""
    error = ConvergenceError(
        f"{where}: {why} after t = {float(values(run.t)[-1]):.6g}; the error's trajectory ends "
        "with the last good state",
        iterations=len(run.t) - 1,
    )
    error.trajectory = run
    return error
