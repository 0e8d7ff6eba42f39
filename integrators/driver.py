"""The table of all methods, and the loop that runs one."""

import dataclasses
import math
import sys
import time
from collections.abc import Mapping
from itertools import pairwise
from types import MappingProxyType

import torch
from torch import Tensor

from darboux._checks import (
    ConvergenceError,
    check_finite,
    check_tensor,
    checks_values,
    in_transform,
    values,
)
from darboux.integrators.base import Integrator, Trajectory
from darboux.integrators.implicit import GAUSSES
from darboux.integrators.runge_kutta import RUNGE_KUTTAS
from darboux.integrators.splitting import Splitting
from darboux.integrators.splitting_table import SPLITTINGS
from darboux.integrators.systems import System

_ALL: tuple[Integrator, ...] = (*SPLITTINGS, *GAUSSES, *RUNGE_KUTTAS)
METHODS: Mapping[str, Integrator] = MappingProxyType({m.name: m for m in _ALL})

# A run that has blown up is noticed within about this many steps.
_CHECK_EVERY = 256


def find_method(method: str | Integrator) -> Integrator:
    """Return the method of that name. Raises ``ValueError`` listing the known ones."""
    if isinstance(method, Integrator):
        return method
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not known, expected one of {', '.join(METHODS)}")
    return METHODS[method]


def methods_for(system: System) -> list[str]:
    """Return the names of the methods that move ``system``; ``system.default`` is among them."""
    return [name for name, method in METHODS.items() if applies(method, system)]


def applies(method: Integrator, system: System) -> bool:
    """Say whether ``method`` moves ``system``."""
    try:
        method.check(system)
    except ValueError:
        return False
    return True


def integrate(
    system: System,
    q: Tensor,
    p: Tensor | None = None,
    *,
    dt: float | Tensor,
    steps: int,
    method: str | Integrator | None = None,
    t0: float | Tensor = 0.0,
    save_every: int = 1,
    compensated: bool = False,
    progress: bool = False,
) -> Trajectory:
    """Move ``system`` from ``q, p (..., d)`` at ``t0`` by ``steps`` steps of ``dt``.

    ``method`` is that of the kind of system unless given: ``leapfrog`` where it separates.
    States are saved at steps ``0, save_every, 2 save_every, ...`` and always at the last one,
    with times ``t0 + n dt``. A negative ``dt`` runs backwards. ``dt`` and ``t0`` may be tensors
    that require grad. A :class:`VectorField` or a :class:`Split` may leave ``p`` out.
    ``compensated`` makes an explicit splitting carry what its sums round off, which an implicit
    method always does: over a million steps two more digits. ``progress`` draws a bar on stderr.

    Differentiable in ``q, p, dt`` and the parameters of ``system``; without any of them to
    differentiate, no graph is kept.

    Raises ``ValueError`` or ``TypeError`` for wrong shapes, dtypes or an unknown or unfit
    method, ``ConvergenceError`` when the state stops being finite.

    >>> from darboux.integrators import Separable
    >>> oscillator = Separable(lambda q: q.square().sum(-1) / 2)
    >>> integrate(oscillator, torch.ones(1), torch.zeros(1), dt=0.1, steps=10).q.shape
    torch.Size([11, 1])
    """
    where = "integrate"
    method = find_method(system.default if method is None else method)
    p = check_state(where, system, q, p)
    check_step(where, dt)
    check_step(where, t0, "t0")
    check_count(where, "steps", steps, 0)
    check_count(where, "save_every", save_every, 1)
    if compensated and isinstance(method, Splitting):
        method = dataclasses.replace(method, compensated=True)
    method.check(system)

    stops = [*range(0, steps, save_every), steps]
    times = t0 + torch.tensor(stops, dtype=torch.float64, device=q.device) * dt
    q, p = system.lift(q, p, t0)
    qs, ps, memory, checked = [q], [p], None, 0
    bar = _Bar(steps) if progress else None
    with torch.set_grad_enabled(graph_wanted(system, q, p, dt)):
        for before, now in pairwise(stops):
            try:
                q, p, memory = method.advance(system, q, p, dt, now - before, memory)
            except ConvergenceError as error:
                message = f"integrate: {method.name}, between steps {before} and {now}: {error}"
                raise ConvergenceError(message, error.residual, error.iterations) from error
            qs.append(q)
            ps.append(p)
            if now - checked >= _CHECK_EVERY:
                _check_alive(stops, qs, ps)
                checked = now
            if bar is not None:
                bar.show(now)
        _check_alive(stops, qs, ps)
        q, p, own_times = system.lower(torch.stack(qs), torch.stack(ps))
        return Trajectory(times.to(q.dtype) if own_times is None else own_times, q, p)


def check_state(where: str, system: System, q: Tensor, p: Tensor | None) -> Tensor:
    """Raise unless ``q`` and ``p`` make a state of ``system``; return ``p``."""
    check_tensor(where, "q", q)
    if p is None:
        if system.paired:
            raise ValueError(
                f"{where}: p is missing; only a VectorField or a Split moves without it, not a "
                f"{type(system).__name__}"
            )
        p = q[..., :0]
    check_tensor(where, "p", p)
    skip = 0 if system.paired else 1
    if q.dim() == 0 or q.dim() != p.dim() or q.shape[: q.dim() - skip] != p.shape[: q.dim() - skip]:
        raise ValueError(
            f"{where}: p has shape {tuple(p.shape)}, expected (..., d) like q of shape "
            f"{tuple(q.shape)}"
        )
    if p.dtype != q.dtype:
        raise TypeError(f"{where}: p has dtype {p.dtype}, expected {q.dtype} to match q")
    if p.device != q.device:
        raise ValueError(f"{where}: p is on {p.device}, expected {q.device} to match q")
    check_finite(where, q=q, p=p)
    return p


def check_step(where: str, dt: object, name: str = "dt") -> None:
    """Raise unless ``dt`` is a number or a floating tensor without dimensions."""
    if isinstance(dt, Tensor):
        check_tensor(where, name, dt)
        if dt.dim() > 0:
            raise ValueError(f"{where}: {name} has shape {tuple(dt.shape)}, expected ()")
        check_finite(where, **{name: dt})
    elif isinstance(dt, bool) or not isinstance(dt, int | float):
        raise TypeError(f"{where}: {name} is a {type(dt).__name__}, expected a number")
    elif not math.isfinite(dt):
        raise ValueError(f"{where}: {name} is {dt}, expected a finite number")


def check_count(where: str, name: str, count: object, least: int) -> None:
    """Raise unless ``count`` is an integer of at least ``least``."""
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"{where}: {name} is a {type(count).__name__}, expected an int")
    if count < least:
        raise ValueError(f"{where}: {name} is {count}, expected at least {least}")


def graph_wanted(system: System, q: Tensor, p: Tensor, dt: float | Tensor) -> bool:
    """Say whether somebody will differentiate the run.

    Asked once, so that a closed-form step pays nothing for grad mode.
    """
    if in_transform() or not torch.is_grad_enabled():
        return torch.is_grad_enabled()
    if q.requires_grad or p.requires_grad or (isinstance(dt, Tensor) and dt.requires_grad):
        return True
    return any(x.requires_grad for x in system.field(q, p))


def _check_alive(stops: list[int], qs: list[Tensor], ps: list[Tensor]) -> None:
    # NaN and infinity stay once they come, so the last state tells of all.
    if not checks_values() or (_finite(qs[-1]) and _finite(ps[-1])):
        return
    last = max(i for i in range(len(qs)) if _finite(qs[i]) and _finite(ps[i]))
    raise ConvergenceError(
        f"integrate: the state is NaN or infinite at step {stops[last + 1]}; it was finite at "
        f"step {stops[last]}: take a smaller dt",
        iterations=stops[last],
    )


def _finite(x: Tensor) -> bool:
    return bool(values(x).isfinite().all())


class _Bar:
    # A progress bar on stderr, redrawn at most five times a second.
    def __init__(self, steps: int):
        self.steps, self.start, self.next = steps, time.monotonic(), 0.0

    def show(self, done: int) -> None:
        now = time.monotonic()
        if now < self.next and done < self.steps:
            return
        self.next = now + 0.2
        left = (now - self.start) * (self.steps - done) / done
        bar = "#" * (30 * done // self.steps)
        end = "\n" if done == self.steps else ""
        print(f"\r[{bar:<30}] {done}/{self.steps}, {left:.0f} s left ", end=end, file=sys.stderr)
        sys.stderr.flush()
