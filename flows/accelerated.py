r"""Particles with momentum: accelerated flows of measures, and Langevin dynamics.

Damped Hamiltonian motion on the space of densities, Wang and Li (2022),

.. math:: \dot x = G v, \qquad
          \dot v = -\alpha v - \tfrac1w\,\partial_x\tfrac12\langle v, Gv\rangle + u

with the force ``u`` of an energy and the ``G`` of a metric of :mod:`darboux.flows.wasserstein`.
Without damping :func:`hamiltonian` is conserved where the energy is exact.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from darboux import _checks
from darboux.flows import _stepping, gaussian
from darboux.flows.energies import Energy, check_particles
from darboux.flows.wasserstein import (
    W2,
    FisherRao,
    KalmanW2,
    Metric,
    ParticleFlow,
    _Record,
    _start,
)

RESTARTS = ("gradient", "speed")


class Constant(NamedTuple):
    """The damping ``alpha``."""

    alpha: float = 1.0

    def rate(self, t: float, dt: float) -> float:
        return self.alpha

    def factor(self, k: Tensor, dt: float) -> Tensor:
        return torch.full_like(k, (1 - self.alpha * dt / 2) / (1 + self.alpha * dt / 2))


class StronglyConvex(NamedTuple):
    r"""The damping :math:`2\sqrt\beta` for an energy that is ``beta``-convex."""

    beta: float

    def rate(self, t: float, dt: float) -> float:
        return 2 * math.sqrt(self.beta)

    def factor(self, k: Tensor, dt: float) -> Tensor:
        a = math.sqrt(self.beta) * dt
        return torch.full_like(k, (1 - a) / (1 + a))


class Nesterov(NamedTuple):
    """The damping ``r / t``; in steps ``(k - 1)/(k + r - 1)``, ``k`` counted from a restart."""

    r: float = 3.0

    def rate(self, t: float, dt: float) -> float:
        return self.r / (t + dt)

    def factor(self, k: Tensor, dt: float) -> Tensor:
        return (k - 1) / (k + self.r - 1)


Damping = Constant | StronglyConvex | Nesterov


def hamiltonian(
    energy: Energy, x: Tensor, v: Tensor, w: Tensor | None = None, metric: Metric | None = None
) -> Tensor:
    r"""Return :math:`\frac12\sum_iw_iv_i \cdot (Gv)_i + E`, shape ``(...)``."""
    x, w = check_particles("hamiltonian", x, w)
    metric = W2() if metric is None else metric
    return metric.inner(x, w, v, v) / 2 + energy._value(x, w)


def accelerated_flow(
    energy: Energy,
    x: Tensor,
    *,
    dt: float,
    steps: int,
    w: Tensor | None = None,
    v: Tensor | None = None,
    metric: Metric | None = None,
    damping: Damping | None = None,
    restart: str | None = "gradient",
    method: str = "nesterov",
    save_every: int = 1,
    record_energy: bool = True,
) -> ParticleFlow:
    r"""Follow the accelerated flow of ``energy`` for ``steps`` steps of ``dt``; differentiable.

    ``method="nesterov"`` steps as an optimiser does, one force each, on a manifold too:
    :math:`v \leftarrow a_kv + dt\,u`, :math:`x \leftarrow x + dt\,Gv`; ``dt`` is the root of
    the step of the gradient flow. ``restart="gradient"`` forgets ``v`` where it points uphill,
    :math:`\langle v, u\rangle < 0` in the metric, per flow; ``"speed"`` where a particle slows
    down, per particle. ``method="rk4"`` integrates the differential equation instead, without
    restarts. The default damping is ``Nesterov()``.

    Strongly convex damping oscillates for long where ``dt`` is not small against the curvature
    of the entropy; Nesterov's with gradient restart is the safe choice.
    """
    where = "accelerated_flow"
    x, w, metric = _start(where, x, w, metric, dt, steps, save_every)
    damping = Nesterov() if damping is None else damping
    if isinstance(metric, FisherRao):
        raise TypeError(f"{where}: metric is FisherRao, expected one that moves particles")
    if method not in ("nesterov", "rk4"):
        raise ValueError(f"{where}: unknown method {method!r}, expected 'nesterov' or 'rk4'")
    if restart is not None and restart not in RESTARTS:
        raise ValueError(f"{where}: unknown restart {restart!r}, expected one of {RESTARTS}")
    if v is None:
        v = torch.zeros_like(x)
    _checks.check_like(where, "v", v, "x", x)
    v = v.expand_as(x)
    if method == "rk4" and metric.manifold is not None:
        raise ValueError(f"{where}: method is 'rk4', expected 'nesterov' on a manifold")

    def field(t: float, y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, v = y
        push = metric.force(energy, x, w) + metric.bend(x, w, v)
        return metric.lift(x, w, v), push - damping.rate(t, dt) * v

    record = _Record(energy, record_energy, x)
    record.add(0.0, x, w, v)
    k = torch.zeros_like(x[..., 0])
    old = torch.full_like(k, -1.0)
    for n in range(1, steps + 1):
        if method == "rk4":
            x, v = _stepping.step(_stepping.TABLEAUS["rk4"], field, (n - 1) * dt, (x, v), dt)[0]
        else:
            u = metric.force(energy, x, w)
            k = k + 1
            if restart == "gradient":
                uphill = metric.inner(x, w, v, u) < 0
                k = torch.where(uphill.unsqueeze(-1), 1.0, k)
                v = torch.where(uphill[..., None, None], 0.0, v)
            elif restart == "speed":
                speed = v.detach().square().sum(-1)
                slower = speed < old
                k, old = torch.where(slower, 1.0, k), torch.where(slower, 0.0, speed)
                v = torch.where(slower.unsqueeze(-1), 0.0, v)
            v = damping.factor(k, dt).unsqueeze(-1) * v + dt * (u + metric.bend(x, w, v))
            if metric.manifold is None:
                x = x + dt * metric.lift(x, w, v)
            else:  # carry the velocity along the geodesic
                end, turned = metric.manifold._transport_along(x, dt * v, v)
                x, v = end, turned
        record.watch(where, n, dt, x, lambda x, w: metric.velocity(energy, x, w))
        if n % save_every == 0:
            record.add(n * dt, x, w, v)
    return record.flow()


def baoab_step(
    x: Tensor,
    v: Tensor,
    force: Tensor,
    energy: Energy,
    w: Tensor,
    noise: Tensor,
    *,
    dt: float,
    friction: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Make one step of underdamped Langevin dynamics; return particles, velocities and force.

    The splitting of Leimkuhler and Matthews (2013): in a harmonic potential the variance of the
    positions is exact for every stable step.
    """
    keep = math.exp(-friction * dt)
    v = v + dt / 2 * force
    x = x + dt / 2 * v
    v = keep * v + math.sqrt(temperature * (1 - keep * keep)) * noise
    x = x + dt / 2 * v
    force = energy._velocity(x, w)
    return x, v + dt / 2 * force, force


def langevin(
    energy: Energy,
    x: Tensor,
    *,
    dt: float,
    steps: int,
    w: Tensor | None = None,
    v: Tensor | None = None,
    metric: Metric | None = None,
    friction: float | None = None,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    save_every: int = 1,
    record_energy: bool = True,
) -> ParticleFlow:
    r"""Add noise to the flow of ``energy``, which then needs no entropy of its own.

    Without ``friction`` overdamped, :math:`dx = u\,dt + \sqrt{2T}\,dB`, by Euler steps. With
    :class:`KalmanW2` affine-invariant, :math:`dx_i = Gu_i\,dt + T(d + 1)w_i(x_i - m)dt
    + \sqrt{2TG}\,dB_i`; the second term, the divergence of ``G`` in :math:`x_i`, corrects for
    finitely many particles (Garbuno-Inigo, Nuesken and Reich 2020). With ``friction``
    underdamped, by :func:`baoab_step` on R^d.
    """
    where = "langevin"
    x, w, metric = _start(where, x, w, metric, dt, steps, save_every)
    kalman = isinstance(metric, KalmanW2)
    if not (kalman or isinstance(metric, W2)) or (friction is not None and kalman):
        raise TypeError(
            f"{where}: metric is {type(metric).__name__}, expected W2, or KalmanW2 and no friction"
        )
    if friction is not None and metric.manifold is not None:
        raise ValueError(f"{where}: got friction on a manifold, expected R^d")
    if not temperature >= 0 or (friction is not None and not friction >= 0):
        raise ValueError(
            f"{where}: temperature is {temperature} and friction {friction}, expected at least 0"
        )
    if friction is not None and v is None:
        v = torch.zeros_like(x)
    record = _Record(energy, record_energy, x)
    record.add(0.0, x, w, v)
    force = energy._velocity(x, w) if friction is not None else x
    d = x.shape[-1]
    for k in range(1, steps + 1):
        noise = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
        if friction is not None:
            assert v is not None
            x, v, force = baoab_step(
                x, v, force, energy, w, noise, dt=dt, friction=friction, temperature=temperature
            )
        else:
            drift = dt * metric.velocity(energy, x, w)
            noise = math.sqrt(2 * temperature * dt) * noise
            if kalman:
                m, S = gaussian.moments(x, w)
                G = S + metric.ridge * gaussian.eye_like(S)  # pyright: ignore
                own = (d + 1) * w.unsqueeze(-1) * (x - m.unsqueeze(-2))
                drift = drift + dt * temperature * own
                factor, info = torch.linalg.cholesky_ex(G)
                _checks.check_that(
                    where,
                    lambda info=info: info == 0,
                    "the covariance of the particles is singular, expected more than d of them or "
                    "a ridge",
                    _checks.GeometryError,
                )
                noise = noise @ factor.mT
            if metric.manifold is None:
                x = x + drift + noise
            else:
                x = metric.manifold._exp(x, drift + metric.manifold._random_tangent(x, noise))
        record.watch(where, k, dt, x, lambda x, w: metric.velocity(energy, x, w))
        if k % save_every == 0:
            record.add(k * dt, x, w, v)
    return record.flow()
