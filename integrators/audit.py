"""Audits: measure what a method claims, on your own system.

Maps act on packed states ``z = (q, p)`` of shape ``(..., 2 d)``, leading dimensions being
independent copies; :func:`step_map` makes one from a method, and any map of yours will do.
Derivatives are exact (forward mode), not differences.
"""

import contextlib
import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from darboux._autodiff import jacobian
from darboux._checks import ConvergenceError, GeometryError, check_tensor
from darboux.integrators.base import Integrator, Trajectory
from darboux.integrators.driver import (
    METHODS,
    applies,
    check_state,
    check_step,
    find_method,
    integrate,
)
from darboux.integrators.systems import Separable, System

Map = Callable[[Tensor], Tensor]

_USUAL = (
    "euler",
    "rk4",
    "symplectic_euler",
    "leapfrog",
    "yoshida4",
    "bm4",
    "bm4_rkn",
    "bm6",
    "bm6_rkn",
    "kahan_li8",
    "implicit_midpoint",
    "gauss4",
    "gauss6",
    "gauss8",
)


def step_map(
    system: System, method: str | Integrator, dt: float | Tensor, *, shape: Sequence[int] = (-1,)
) -> Map:
    """Return one step as a map of ``z (..., 2 d)``; each half is unflattened to ``shape``."""
    method = find_method(method)

    def step(z: Tensor) -> Tensor:
        q, p = (x.unflatten(-1, tuple(shape)) for x in z.chunk(2, -1))
        return _pack(*method.step(system, q, p, dt), len(shape))

    return step


def symplecticity_defect(phase_map: Map, z: Tensor) -> Tensor:
    r"""Return :math:`\max |J^T \Omega J - \Omega|` ``(...)`` at ``z (..., 2 d)``."""
    _check_packed("symplecticity_defect", z)
    d = z.shape[-1] // 2
    _, j = jacobian(phase_map, z)
    a, b = j[..., :d, :], j[..., d:, :]
    upper = a.mT @ b  # J^T Omega J is this less its transpose
    eye = torch.eye(d, dtype=z.dtype, device=z.device)
    omega = torch.zeros(2 * d, 2 * d, dtype=z.dtype, device=z.device)
    omega[:d, d:], omega[d:, :d] = eye, -eye
    return (upper - upper.mT - omega).abs().amax((-2, -1))


def volume_defect(phase_map: Map, z: Tensor) -> Tensor:
    r"""Return :math:`|\det J - 1|` ``(...)`` at ``z (..., m)``."""
    check_tensor("volume_defect", "z", z)
    return (torch.linalg.det(jacobian(phase_map, z)[1]) - 1).abs()


def check_symplectic(phase_map: Map, z: Tensor, atol: float = 1e-11) -> float:
    """Return the largest symplecticity defect over the states ``z (..., 2 d)``.

    Raises ``GeometryError`` where it is above ``atol``.
    """
    defect = float(symplecticity_defect(phase_map, z).detach().max())
    if not defect <= atol:
        raise GeometryError(
            f"check_symplectic: max |J^T Omega J - Omega| is {defect:.3g}, expected at most "
            f"{atol:g}"
        )
    return defect


class EnergyDrift(NamedTuple):
    """How the energy of a trajectory errs, each ``(...)``."""

    error: Tensor  # largest |H - H_0| / |H_0|
    slope: Tensor  # fitted relative change per unit time
    significance: Tensor  # slope in units of its standard error


def energy_drift(system: System, trajectory: Trajectory) -> EnergyDrift:
    """Measure the relative energy error of a trajectory and fit its drift.

    The line is fitted to the means of up to 16 blocks, which averages the oscillation of a
    symplectic method away. Errors are absolute where the initial energy is zero. A drift is
    there when its significance is well above 3, say 6, and stays so for longer runs.
    """
    relative = _relative_energy(system, trajectory)
    error = relative.abs().amax(0)
    blocks = min(16, len(relative) // 2)
    if blocks < 3:
        nothing = torch.full_like(error, math.nan)
        return EnergyDrift(error, nothing, nothing)
    size = len(relative) // blocks
    skip = len(relative) - blocks * size
    means = relative[skip:].unflatten(0, (blocks, size)).mean(1)
    t = trajectory.t[skip:].unflatten(0, (blocks, size)).mean(1)
    t = (t - t.mean()).reshape(-1, *[1] * error.dim())
    spread = (t * t).sum()
    slope = (t * means).sum(0) / spread
    rest = means - means.mean(0) - slope * t
    deviation = (rest.square().sum(0) / (blocks - 2) / spread).sqrt()
    tiny = torch.finfo(relative.dtype).tiny
    return EnergyDrift(error, slope, slope / deviation.clamp_min(tiny))


def _relative_energy(system: System, trajectory: Trajectory) -> Tensor:
    energy = system.energy(trajectory.q, trajectory.p)
    return (energy - energy[0]) / torch.where(energy[0] == 0, 1.0, energy[0].abs())


def reversibility_defect(
    system: System,
    method: str | Integrator,
    q: Tensor,
    p: Tensor | None = None,
    *,
    dt: float,
    steps: int = 1,
) -> Tensor:
    r"""Return :math:`\max |\Phi_{-h}^n \Phi_h^n z - z| / \max |z|` over all copies.

    Round-off for a symmetric method and of the order of the error for others.
    """
    p = check_state("reversibility_defect", system, q, p)
    there = integrate(system, q, p, dt=dt, steps=steps, method=method, save_every=max(steps, 1))
    back = integrate(
        system,
        there.q[-1],
        there.p[-1],
        dt=-dt,
        steps=steps,
        method=method,
        save_every=max(steps, 1),
    )
    z = torch.cat([q, p], -1)
    return (torch.cat([back.q[-1], back.p[-1]], -1) - z).abs().max() / z.abs().max()


class OrderEstimate(NamedTuple):
    """The slope of errors against step sizes."""

    order: float
    dts: list[float]
    errors: list[float]


def observed_order(
    system: System,
    method: str | Integrator,
    q: Tensor,
    p: Tensor | None = None,
    *,
    t: float,
    steps: int = 8,
) -> OrderEstimate:
    """Measure the order of a method by halving its step from ``t/steps`` on.

    Errors at time ``t`` are taken against the Gauss method of order 16 and kept while they lie
    well between 1 and round-off; the order is the slope of the last two kept. NaN where fewer
    than two are left or the reference fails: choose ``t`` and ``steps`` otherwise.
    """
    p = check_state("observed_order", system, q, p)
    method = find_method(method)
    scale = float(torch.cat([q, p], -1).abs().max()) or 1.0

    def end(by: str | Integrator, count: int) -> Tensor:
        run = integrate(system, q, p, dt=t / count, steps=count, method=by, save_every=count)
        return torch.cat([run.q[-1], run.p[-1]], -1)

    floor = 2e4 * torch.finfo(q.dtype).eps
    dts, errors = [], []
    with torch.no_grad():
        try:
            exact = end("gauss16", 4 * steps)
        except ConvergenceError:
            return OrderEstimate(math.nan, dts, errors)
        for level in range(10):
            count = steps * 2**level
            try:
                error = float((end(method, count) - exact).abs().max()) / scale
            except ConvergenceError:  # still too coarse
                continue
            if error < floor:
                break
            if error < 0.1:
                dts.append(t / count)
                errors.append(error)
            if len(errors) >= 5:
                break
    if len(errors) < 2:
        return OrderEstimate(math.nan, dts, errors)
    return OrderEstimate(math.log2(errors[-2] / errors[-1]), dts, errors)


def evaluations(
    system: System,
    method: str | Integrator,
    q: Tensor,
    p: Tensor | None = None,
    *,
    dt: float,
    steps: int = 32,
) -> float:
    """Return the evaluations of the force (of the field, where there is none) per step.

    The stages of an implicit method are counted each, though they are evaluated together.
    """
    name = "force" if isinstance(system, Separable) else "field"
    inner, count = getattr(system, name), 0.0

    def counted(*state: Tensor):
        nonlocal count
        count += state[0].numel() / max(q.numel(), 1)
        return inner(*state)

    spy = copy.copy(system)
    setattr(spy, name, counted)
    with torch.no_grad():  # with grad mode on, a run looks at the field once more
        integrate(spy, q, p, dt=dt, steps=steps, method=method, save_every=steps)
    return count / steps


@dataclass(frozen=True)
class Audit:
    """One method, measured: a row of the report."""

    method: str
    order: int
    observed: float
    symplecticity: float
    volume: float
    energy: float
    drift: float  # of the fitted line over the whole run, relative
    sigma: float  # its significance
    reversal: float
    evals: float
    ms: float
    times: tuple[float, ...]  # of the run
    energy_errors: tuple[float, ...]  # the largest relative one of all copies, at those times
    dts: tuple[float, ...]  # of the order
    errors: tuple[float, ...]  # after equal times, with those steps


_COLUMNS = "method order observed symplecticity volume energy drift sigma reversal evals ms".split()


@dataclass(frozen=True)
class Report:
    """What :func:`report` measured: ``str`` prints a table, ``darboux.plotting.audit`` draws it."""

    rows: tuple[Audit, ...]

    def __getitem__(self, method: str) -> Audit:
        return next(row for row in self.rows if row.method == method)

    def __str__(self) -> str:
        table = [_COLUMNS]
        for row in self.rows:
            table.append([_show(name, getattr(row, name)) for name in _COLUMNS])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
            for line in table
        ]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def report(
    system: System,
    q: Tensor,
    p: Tensor | None = None,
    *,
    dt: float,
    steps: int = 1000,
    methods: Sequence[str | Integrator] | None = None,
) -> Report:
    """Audit ``methods`` on ``system`` from ``q, p``: order, structure, energy, cost.

    ``methods`` defaults to a few of each family, as far as they apply. Columns: stated and
    observed order, the largest symplecticity and volume defects of one step, the relative energy
    error over ``steps`` steps of ``dt``, its fitted drift and the drift's significance, the
    reversal of one step, evaluations and milliseconds per step. The worst of all copies is
    shown, infinity where the run breaks down. Where ``q`` has several dimensions per copy, the
    energy tells which: those it sums away.
    """
    p = check_state("report", system, q, p)
    check_step("report", dt)
    if methods is None:
        methods = [m for m in _USUAL if applies(METHODS[m], system)]
    with torch.no_grad():
        return Report(tuple(_audit(system, find_method(m), q, p, dt, steps) for m in methods))


def _audit(
    system: System, method: Integrator, q: Tensor, p: Tensor, dt: float, steps: int
) -> Audit:
    try:
        dims = q.dim() - system.energy(q, p).dim()
        energy, drift, sigma = math.inf, math.nan, math.nan
    except ValueError:  # no energy to watch
        dims = 1
        energy = drift = sigma = math.nan
    start, times, series = time.perf_counter(), (), ()
    with contextlib.suppress(ConvergenceError):
        run = integrate(system, q, p, dt=dt, steps=steps, method=method)
        if not math.isnan(energy):
            energy, drift, sigma = _worst(energy_drift(system, run), float(run.t[-1] - run.t[0]))
            times, series = tuple(run.t.tolist()), tuple(_energy_errors(system, run))
    ms = (time.perf_counter() - start) / max(steps, 1) * 1e3
    symplecticity = volume = math.nan
    if q.shape == p.shape:
        one_step = step_map(system, method, dt, shape=q.shape[q.dim() - dims :])
        z = _pack(q, p, dims)
        symplecticity = _or_inf(lambda: symplecticity_defect(one_step, z))
        volume = _or_inf(lambda: volume_defect(one_step, z))
    estimate = observed_order(system, method, q, p, t=8 * dt, steps=2)
    return Audit(
        method=method.name,
        order=method.order,
        observed=estimate.order,
        symplecticity=symplecticity,
        volume=volume,
        energy=energy,
        drift=drift,
        sigma=sigma,
        reversal=_or_inf(lambda: reversibility_defect(system, method, q, p, dt=dt)),
        evals=_or_inf(lambda: evaluations(system, method, q, p, dt=dt)),
        ms=ms,
        times=times,
        energy_errors=series,
        dts=tuple(estimate.dts),
        errors=tuple(estimate.errors),
    )


def _energy_errors(system: System, trajectory: Trajectory) -> list[float]:
    error = _relative_energy(system, trajectory).abs()
    return error.reshape(len(error), -1).amax(1).tolist()


def _worst(drift: EnergyDrift, duration: float) -> tuple[float, float, float]:
    at = drift.significance.abs().flatten().argmax()
    slope, sigma = drift.slope.flatten()[at], drift.significance.flatten()[at]
    return float(drift.error.max()), float(slope) * duration, float(sigma)


def _or_inf(measure: Callable[[], Tensor | float]) -> float:
    # A method that fails at this dt is a finding, not the end of the report.
    try:
        return float(torch.as_tensor(measure()).max())
    except ConvergenceError:
        return math.inf


def _pack(q: Tensor, p: Tensor, dims: int) -> Tensor:
    return torch.cat([q.flatten(-dims), p.flatten(-dims)], -1)


def _check_packed(where: str, z: Tensor) -> None:
    check_tensor(where, "z", z)
    if z.dim() == 0 or z.shape[-1] % 2:
        raise ValueError(f"{where}: z has shape {tuple(z.shape)}, expected (..., 2 d)")


def _show(name: str, value: str | float) -> str:
    if isinstance(value, str):
        return value
    if math.isnan(value):
        return "-"
    if name in ("order", "observed", "evals", "sigma"):
        return f"{value:.3g}" if name != "observed" else f"{value:.2f}"
    return f"{value:.2g}" if name == "ms" else f"{value:.1e}"
