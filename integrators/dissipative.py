r"""Friction, noise and contact: systems that lose energy in a way that a splitting keeps exactly.

Each is a :class:`Split` of exact flows, so every composition of the table moves it: negative
substeps, which higher orders need, amplify exactly what positive ones damp. Where a potential
acts at a frozen ``q`` the friction is in the kick,

.. math:: \dot p = F(q) - \gamma p: \qquad p \leftarrow e^{-\gamma h} p + h \varphi(\gamma h) F,
          \qquad \varphi(x) = (1 - e^{-x})/x,

so that there are two parts, a drift and a kick, and every splitting but the Nystrom rows applies.
"""

import math
from collections.abc import Callable
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from darboux._checks import check_that, values
from darboux._smooth import sinc, sqrt
from darboux.integrators.systems import Flow, Pair, Separable, Split


def damped(system: Separable, gamma: float | Tensor) -> Split:
    r"""Return ``system`` under linear friction, which is conformally symplectic.

    .. math:: \dot q = \partial T/\partial p, \qquad \dot p = -\nabla V(q) - \gamma p

    A step has the Jacobian :math:`J^T \Omega J = e^{-\gamma h} \Omega` exactly, so volumes shrink
    as those of the equation do. ``gamma`` is a number or a tensor ``()``. With
    ``"symplectic_euler"`` this is the heavy ball: momentum :math:`e^{-\gamma h}`, learning rate
    :math:`h^2 \varphi(\gamma h)`. The energy is that of ``system``; it falls. McLachlan &
    Perlmutter, J. Geom. Phys. 39 (2001) 276; Franca, Jordan & Vidal, J. Stat. Mech. (2021) 043107.
    """
    _check_plain("damped", system)
    _check_rate("damped", "gamma", gamma)

    def kick(q: Tensor, p: Tensor, h: float | Tensor) -> Pair:
        decay, weight = _friction(gamma, h)
        return q, decay * p + weight * system.force(q)

    return Split([_drift(system), kick], field=_damped_field(system, gamma), energy=system.energy)


def contact(system: Separable, gamma: float | Tensor) -> Split:
    r"""Return the contact flow of :math:`H = T(p) + V(q) + \gamma s` with its action ``s``.

    .. math:: \dot q = \partial T/\partial p, \qquad \dot p = -\nabla V - \gamma p, \qquad
              \dot s = p \cdot \dot q - H

    The state is ``q (..., d)`` and ``p (..., d + 1)``, ``s`` being the last component of ``p``.
    A step scales the contact form :math:`\eta = ds - p\,dq` exactly by :math:`e^{-\gamma h}`;
    ``q`` and the momenta move as in :func:`damped`. The energy is :math:`H`, which falls as
    :math:`e^{-\gamma t}`. Bravetti, Seri, Vermeeren & Zadra, Celest. Mech. 132 (2020) 7, in two
    parts rather than three.
    """
    _check_plain("contact", system)
    _check_rate("contact", "gamma", gamma)
    potential = system.potential
    if potential is None:
        raise ValueError("contact: the system gives only a force, expected a potential")
    if system.kinetic is None and not system.quadratic:
        raise ValueError("contact: the system gives only a velocity, expected kinetic")

    def kinetic(p: Tensor) -> Tensor:
        if system.kinetic is not None:
            return system.kinetic(p)[..., None]
        return (p * p / system.mass).sum(-1, keepdim=True) / 2

    def drift(q: Tensor, z: Tensor, h: float | Tensor) -> Pair:
        p, s = z[..., :-1], z[..., -1:]
        v = system.velocity(p)
        action = (p * v).sum(-1, keepdim=True) - kinetic(p)
        return q + h * v, torch.cat([p, s + h * action], -1)

    def kick(q: Tensor, z: Tensor, h: float | Tensor) -> Pair:
        decay, weight = _friction(gamma, h)
        slope = torch.cat([system.force(q), -potential(q)[..., None]], -1)
        return q, decay * z + weight * slope

    def field(q: Tensor, z: Tensor) -> Pair:
        p, s = z[..., :-1], z[..., -1:]
        v = system.velocity(p)
        action = (p * v).sum(-1, keepdim=True) - kinetic(p) - potential(q)[..., None]
        return v, torch.cat([system.force(q) - gamma * p, action - gamma * s], -1)

    def energy(q: Tensor, z: Tensor) -> Tensor:
        return kinetic(z[..., :-1])[..., 0] + potential(q) + gamma * z[..., -1]

    return Split([drift, kick], field=field, energy=energy)


_SCHEMES = tuple("".join((*half, *half[1::-1])) for half in permutations("BAO"))


class _Nesterov(Split):
    # The clock is the last component of q and runs with the kick.
    time = True

    def lift(self, q: Tensor, p: Tensor, t: float | Tensor) -> Pair:
        start = torch.as_tensor(t)
        check_that("nesterov", lambda: start > 0, f"t0 is {t}, expected t0 > 0 where r/t is finite")
        return super().lift(q, p, t)


def nesterov(system: Separable, r: float | Tensor = 3.0) -> Split:
    r"""Return ``system`` under the vanishing friction of accelerated descent.

    .. math:: \dot q = \partial T/\partial p, \qquad \dot p = -\nabla V(q) - (r/t)\, p

    The friction is integrated exactly, with its clock: over a step from :math:`t` to
    :math:`t + h`, :math:`J^T \Omega J = (t/(t+h))^r\, \Omega`. Give ``integrate`` a ``t0 > 0``.
    Convex potentials fall as :math:`1/t^2` for :math:`r \ge 3`: Su, Boyd & Candes, J. Mach. Learn.
    Res. 17 (2016) 153. Nesterov's own iteration is another discretisation, which is not conformally
    symplectic.
    """
    _check_plain("nesterov", system)
    _check_rate("nesterov", "r", r)

    def drift(q: Tensor, p: Tensor, h: float | Tensor) -> Pair:
        return torch.cat([q[..., :-1] + h * system.velocity(p), q[..., -1:]], -1), p

    def kick(q: Tensor, p: Tensor, h: float | Tensor) -> Pair:
        x, t = q[..., :-1], q[..., -1:]
        later = t + h
        # The logarithms make a time that is not positive NaN, which the run reports.
        decay = (r * (t.log() - later.log())).exp()
        p = decay * p + (later - t * decay) / (r + 1) * system.force(x)
        return torch.cat([x, later], -1), p

    def field(q: Tensor, p: Tensor) -> Pair:
        x, t = q[..., :-1], q[..., -1:]
        slope = torch.cat([system.velocity(p), torch.ones_like(t)], -1)
        return slope, system.force(x) - r / t * p

    return _Nesterov([drift, kick], field=field, energy=lambda q, p, *t: system.energy(q, p))


def langevin(
    system: Separable,
    friction: float | Tensor,
    temperature: float | Tensor,
    *,
    scheme: str = "BAOAB",
    generator: torch.Generator | None = None,
) -> Split:
    r"""Return ``system`` in a heat bath, to be moved by ``leapfrog``.

    .. math:: dq = M^{-1} p\, dt, \qquad
              dp = -\nabla V\,dt - \gamma p\,dt + \sqrt{2 \gamma k T M}\, dW

    ``scheme`` is the order of the parts in a step: A the drift, B the kick, O friction with
    noise (the Ornstein-Uhlenbeck process, exact in law). On an oscillator of frequency
    :math:`\omega`, BAOAB and ABOBA sample :math:`q` exactly at every step size, OBABO and
    OABAO not: Leimkuhler & Matthews, Molecular Dynamics (2015), ch. 7. ``temperature`` is
    :math:`kT`. The noise comes from ``generator``: a run repeats after seeding it again. Noise
    cannot run back, so steps and substeps must be positive.
    """
    _check_plain("langevin", system)
    _check_rate("langevin", "friction", friction)
    _check_rate("langevin", "temperature", temperature)
    if not system.quadratic:
        raise ValueError("langevin: the kinetic energy is given, expected |p|^2/(2 mass)")
    for name, x in (("friction", friction), ("temperature", temperature)):
        sign = torch.as_tensor(x)
        check_that("langevin", lambda s=sign: s >= 0, f"{name} is {x}, expected at least 0")
    if scheme not in _SCHEMES:
        raise ValueError(f"langevin: scheme is {scheme!r}, expected one of {', '.join(_SCHEMES)}")

    def bath(q: Tensor, p: Tensor, h: float | Tensor) -> Pair:
        if float(values(torch.as_tensor(h))) < 0:
            raise ValueError(
                f"langevin: a substep is {float(h):g}, and noise does not run back: use a positive "
                "dt and a method of positive weights, such as 'leapfrog'"
            )
        decay, weight = _friction(friction, h)
        # 1 - exp(-2 gamma h) = gamma weight (1 + decay)
        variance = temperature * friction * weight * (1 + decay) * system.mass
        spread = sqrt(torch.as_tensor(variance, dtype=p.dtype, device=p.device))
        noise = torch.randn(p.shape, generator=generator, dtype=p.dtype, device=p.device)
        return q, decay * p + spread * noise

    parts = {"A": _drift(system), "B": _kick(system), "O": bath}
    field = _damped_field(system, friction)  # without the noise
    return Split([parts[x] for x in scheme[2::-1]], field=field, energy=system.energy)


def _drift(system: Separable) -> Flow:
    return lambda q, p, h: (q + h * system.velocity(p), p)


def _kick(system: Separable) -> Flow:
    return lambda q, p, h: (q, p + h * system.force(q))


def _damped_field(system: Separable, gamma: float | Tensor) -> Callable[[Tensor, Tensor], Pair]:
    return lambda q, p: (system.velocity(p), system.force(q) - gamma * p)


def _friction(gamma: float | Tensor, h: float | Tensor) -> tuple[Any, Any]:
    # exp(-gamma h) and its integral over the time h, smooth where gamma h = 0
    x = gamma * h
    if isinstance(x, Tensor):
        half = (-x / 2).exp()
        return half * half, h * half * sinc(-x * x / 4)
    return math.exp(-x), h * (-math.expm1(-x) / x if x else 1.0)


def _check_plain(where: str, system: object) -> None:
    if not isinstance(system, Separable):
        raise TypeError(f"{where}: system is a {type(system).__name__}, expected a Separable")
    if system.time:
        raise ValueError(f"{where}: the system depends on the time, expected one that does not")


def _check_rate(where: str, name: str, rate: float | Tensor) -> None:
    if isinstance(rate, Tensor) and rate.dim() > 0:
        raise ValueError(f"{where}: {name} has shape {tuple(rate.shape)}, expected a number or ()")
