"""The table of all methods, and the run of one: what is asked of it, checked and sent on."""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from darboux._checks import (
    ConvergenceError,
    check_finite,
    check_tensor,
    checks_values,
    in_reverse_transform,
    in_transform,
    values,
)
from darboux.integrators.base import Integrator, Trajectory
from darboux.integrators.checkpoint import march_by_pieces
from darboux.integrators.composed import COMPOSITIONS
from darboux.integrators.constrained import RATTLES
from darboux.integrators.energy_preserving import ENERGY_PRESERVING
from darboux.integrators.extended import EXTENDED
from darboux.integrators.implicit import GAUSSES, LOBATTOS
from darboux.integrators.lattice import on_lattice
from darboux.integrators.march import Bar, Run
from darboux.integrators.recording import record
from darboux.integrators.reversible import check_reversible, march_reversibly
from darboux.integrators.runge_kutta import RUNGE_KUTTAS
from darboux.integrators.splitting import Splitting
from darboux.integrators.splitting_table import SPLITTINGS
from darboux.integrators.systems import System

_ALL: tuple[Integrator, ...] = (
    *SPLITTINGS,
    *GAUSSES,
    *LOBATTOS,
    *COMPOSITIONS,
    *EXTENDED,
    *ENERGY_PRESERVING,
    *RATTLES,
    *RUNGE_KUTTAS,
)
METHODS: Mapping[str, Integrator] = MappingProxyType({m.name: m for m in _ALL})


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
    save_to: str | os.PathLike[str] | None = None,
    adjoint: Literal["autograd", "reversible", "checkpoint"] = "autograd",
    lattice: bool | float | tuple[float, float] = False,
    compensated: bool = False,
    compile: bool = False,
    progress: bool = False,
) -> Trajectory:
    """Move ``system`` from ``q, p (..., d)`` at ``t0`` by ``steps`` steps of ``dt``.

    ``method`` is that of the kind of system unless given: ``leapfrog`` where it separates.
    States are saved at steps ``0, save_every, 2 save_every, ...`` and always at the last one,
    with times ``t0 + n dt``. A negative ``dt`` runs backwards. ``dt`` and ``t0`` may be tensors
    that require grad. A :class:`VectorField` or a :class:`Split` may leave ``p`` out.
    ``compensated`` makes an explicit splitting carry what its sums round off, which an implicit
    method always does: over a million steps two more digits. ``compile`` runs the steps of a
    splitting or an implicit Runge-Kutta method in a kernel made for the system; its gradient then
    retraces the run, unless ``adjoint="checkpoint"``. ``progress`` draws a bar on stderr.

    Differentiable in ``q, p, dt`` and the parameters of ``system``; without any of them to
    differentiate, no graph is kept. The memory of a gradient is that of all steps with
    ``adjoint="autograd"``, of the square root of their number with ``"checkpoint"``, which
    computes every step twice, and of the saved states with ``"reversible"``, which retraces the
    steps of a splitting or a symmetric method backward. Retracing a chaotic orbit fails, with a
    warning or an error, unless ``lattice=True`` puts the states on an integer lattice, on which a
    splitting is undone to the last bit; a number or a pair gives the spacing of ``q`` and ``p``,
    a power of two. A second call runs back over the same bits if both are given one spacing, of at
    least an ulp of the largest coordinate, say ``lattice=2.0**-48``.

    ``save_to`` is a folder to write the states to, as :func:`load_trajectory` reads them; the
    result is a view of its files. A run that was interrupted goes on when called again alike. It
    keeps no graph.

    Raises ``ValueError`` or ``TypeError`` for wrong shapes, dtypes or an unknown or unfit
    method, ``ConvergenceError`` when the state stops being finite or a step cannot be solved; its
    ``trajectory`` holds the states that are good.

    >>> from darboux.integrators import Separable
    >>> oscillator = Separable(lambda q: q.square().sum(-1) / 2)
    >>> integrate(oscillator, torch.ones(1), torch.zeros(1), dt=0.1, steps=10).q.shape
    torch.Size([11, 1])
    """
    where = "integrate"
    method = find_method(system.default if method is None else method)
    p = check_state(where, system, q, p)
    check_step(where, dt)
    if checks_values() and bool((values(torch.as_tensor(dt)) == 0).any()):
        raise ValueError(f"{where}: dt is 0, expected a step forward or backward in time")
    check_step(where, t0, "t0")
    check_count(where, "steps", steps, 0)
    check_count(where, "save_every", save_every, 1)
    if adjoint not in ("autograd", "reversible", "checkpoint"):
        raise ValueError(
            f"{where}: adjoint is {adjoint!r}, expected 'autograd', 'reversible' or 'checkpoint'"
        )
    if compensated and isinstance(method, Splitting):
        method = dataclasses.replace(method, compensated=True)
    elif compensated and method.explicit:
        raise ValueError(
            f"{where}: {method.name} does not compensate its sums, expected a splitting or an "
            "implicit method, or compensated=False"
        )
    method.check(system)
    q, p = system.lift(q, p, t0)
    if lattice is not False:
        method = on_lattice(method, lattice, system, q, p, dt)
        q, p = method.settle(q, p)
    if compile:
        if lattice is not False:
            raise ValueError(f"{where}: the kernels of compile=True know no lattice: leave one out")
        if in_transform():
            raise ValueError(
                f"{where}: torch.func and forward mode cannot enter the kernels of compile=True: "
                "leave compile out here, or differentiate with torch.autograd"
            )
        method = Compiled(**method.facts(), base=method, compensated=compensated)
        method.check(system)
    run = Run(system, method, dt)
    bar = Bar(steps) if progress else None
    if save_to is not None:
        return record(run, q, p, t0=t0, steps=steps, save_every=save_every, path=save_to, bar=bar)

    stops = [*range(0, steps, save_every), steps]
    times = t0 + torch.tensor(stops, dtype=torch.float64, device=q.device) * dt
    qs, ps = [q], [p]
    wanted = graph_wanted(system, q, p, dt)
    march = _march_by(adjoint, run) if wanted and steps and q.numel() else _march_plainly

    def saved() -> Trajectory:
        q, p, own = system.lower(torch.stack(qs), torch.stack(ps))
        return Trajectory(times[: len(qs)].to(q.dtype) if own is None else own, q, p)

    with torch.set_grad_enabled(wanted):
        try:
            march(run, stops, qs, ps, bar)
        except ConvergenceError as error:
            error.trajectory = Trajectory(*(x.detach() for x in saved()))
            raise
        return saved()


@dataclass(frozen=True, kw_only=True, eq=False)
class Compiled(Integrator):
    """A method that takes its steps in a native kernel."""

    base: Integrator
    compensated: bool

    @property
    def retraces(self) -> bool:
        """Say whether the kernel goes back by itself for a gradient, whatever the adjoint."""
        return isinstance(self.base, Splitting)

    def check(self, system: System) -> None:
        from darboux.integrators import engine

        reason = engine.supports(self.base, system)
        if reason is not None:
            raise ValueError(f"compile=True: {reason}: leave compile out")

    def advance(
        self, system: System, q: Tensor, p: Tensor, dt: float | Tensor, steps: int, memory: Any
    ) -> tuple[Tensor, Tensor, Any]:
        """Take ``steps`` steps, as the method itself would."""
        from darboux.integrators import engine  # an engine is built only where one is asked for

        return engine.advance(
            self.base, system, q, p, dt, steps, memory, compensated=self.compensated
        )


def _march_plainly(
    run: Run, stops: Sequence[int], qs: list[Tensor], ps: list[Tensor], bar: Bar | None
) -> None:
    run.march(stops, qs, ps, None, bar)


def _march_by(adjoint: str, run: Run) -> Callable[..., None]:
    if isinstance(run.method, Compiled) and adjoint != "checkpoint":
        if run.method.retraces:
            return _march_plainly
        adjoint = "reversible"  # a kernel records nothing
    if adjoint == "autograd":
        return _march_plainly
    if adjoint == "reversible":
        check_reversible(run)
    if in_reverse_transform():
        raise ValueError(
            f"integrate: adjoint={adjoint!r} saves the memory of plain autograd, and this runs "
            "inside torch.func.grad, vjp or jacrev: leave it out there, differentiate forward "
            "(jvp, jacfwd), which keeps no steps, or call torch.autograd.grad"
        )
    if in_transform():
        return _march_plainly  # forward mode and vmap keep no steps
    return march_reversibly if adjoint == "reversible" else march_by_pieces


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
