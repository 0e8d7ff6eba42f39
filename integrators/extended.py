r"""Methods on doubled phase space: explicit steps where the energy does not separate.

Two copies ``(q, p)`` and ``(x, y)`` of the state move by :math:`H(q, y) + H(x, p)`, whose halves
have exact flows: one moves ``x`` and ``p``, the other ``q`` and ``y``. :class:`Tao` binds the
copies by a rotation; :class:`SemiExplicit` projects them onto each other.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from darboux.integrators.base import Integrator
from darboux.integrators.composed import SCHEMES, USUAL, Composition, compose
from darboux.integrators.fixed_point import Equations, solve_fixed_point
from darboux.integrators.implicit import are_rows_alone
from darboux.integrators.systems import Hamiltonian, Separable, System

# The binding of the rows tao2, tao4, tao6. Best is a matter of the system: see scan_omega.
OMEGA = 5.0


class _Copies(NamedTuple):
    q: Tensor
    p: Tensor
    x: Tensor
    y: Tensor


class _Memory(NamedTuple):
    x: Tensor
    y: Tensor
    slope: tuple[Tensor, Tensor]  # the field at (q, y), which the next step needs again


@dataclass(frozen=True, kw_only=True, eq=False)
class Tao(Integrator):
    r"""Tao's explicit method of order 2: the copies are bound by a rotation of their difference.

    .. math:: \bar H = H(q, y) + H(x, p) + \tfrac{\omega}{2} (|q - x|^2 + |p - y|^2), \qquad
              \Phi_h = \varphi_A^{h/2} \varphi_B^{h/2} \varphi_C^{h} \varphi_B^{h/2}
              \varphi_A^{h/2}

    Three evaluations of the field a step, whatever the energy. The price:

    - It is symplectic and symmetric in the doubled space ``(q, x; p, y)``, not in ``(q, p)``:
      the copies travel with the run, in ``memory``, and a step by itself starts them afresh.
      Angular momentum and other invariants are kept only as far as the copies agree.
    - Unless ``omega`` is large enough the copies drift apart and the run is lost. Larger is not
      always better: only the angle ``2 omega h`` modulo ``2 pi`` acts, so that ``omega`` beyond
      ``pi/h`` repeats smaller ones, and a multiple of ``pi/h`` does nothing at all. Some values
      between good ones resonate. Look with :func:`scan_omega`.

    Tao, Phys. Rev. E 94 (2016) 043303, eqs. 1-3.
    """

    symplectic: bool = False
    symmetric: bool = False
    explicit: bool = True
    omega: float

    def check(self, system: System) -> None:
        """Refuse what has no Hamiltonian ``H(q, p)`` to double."""
        _check_hamiltonian(self.name, system)

    def advance(
        self,
        system: System,
        q: Tensor,
        p: Tensor,
        dt: float | Tensor,
        steps: int,
        memory: tuple[Tensor, Tensor, tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor, Any]:
        """Take ``steps`` steps; the memory is the copies and the last slope."""
        if steps == 0:
            return q, p, memory
        x, y, slope = (q, p, system.field(q, p)) if memory is None else memory
        angle = 2 * self.omega * dt
        if isinstance(angle, Tensor):
            c, s = torch.cos(angle), torch.sin(angle)
        else:
            c, s = math.cos(angle), math.sin(angle)
        half = dt / 2
        for _ in range(steps):
            x, p = x + half * slope[0], p + half * slope[1]
            slope = system.field(x, p)
            q, y = q + half * slope[0], y + half * slope[1]
            q, p, x, y = _rotate(_Copies(q, p, x, y), c, s)
            slope = system.field(x, p)
            q, y = q + half * slope[0], y + half * slope[1]
            slope = system.field(q, y)
            x, p = x + half * slope[0], p + half * slope[1]
        return q, p, _Memory(x, y, slope)


def _rotate(copies: _Copies, c: float | Tensor, s: float | Tensor) -> _Copies:
    # The differences turn and the sums stay, all four from the old values: overwriting one
    # before it is read is not symplectic.
    q, p, x, y = copies
    d = p.shape[-1]
    u, v = q[..., :d] - x[..., :d], p - y
    du, dv = (c * u + s * v - u) / 2, (c * v - s * u - v) / 2
    if q.shape[-1] > d:  # the clocks of both copies agree here
        du = torch.cat([du, torch.zeros_like(q[..., d:])], -1)
    return _Copies(q + du, p + dv, x - du, y - dv)


def tao(order: int = 2, omega: float = OMEGA) -> Tao | Composition:
    """Return Tao's method of order 2, 4, 6 or 8 with the binding ``omega``.

    The higher orders compose steps of the second: what :class:`Tao` says of ``omega h`` holds for
    each of their step weights.

    >>> tao(4, omega=20.0).order
    4
    """
    if order != 2 and order not in USUAL:
        raise ValueError(f"tao: order is {order}, expected 2, {', '.join(map(str, USUAL))}")
    base = Tao(
        name="tao2", order=2, omega=omega, source="Tao, Phys. Rev. E 94 (2016) 043303, eq. 2"
    )
    return base if order == 2 else compose(base, USUAL[order], f"tao{order}")


class OmegaScan(NamedTuple):
    """How the energy errs for each binding."""

    omega: Tensor  # (n,)
    turn: Tensor  # (n,) 2 omega dt modulo 2 pi: the same turn, the same run
    error: Tensor  # (n, ...) largest |H - H_0| / |H_0| of the run, infinite where it was lost


def scan_omega(
    system: Hamiltonian | Separable,
    q: Tensor,
    p: Tensor,
    *,
    dt: float,
    steps: int,
    omegas: Sequence[float],
    order: int = 2,
) -> OmegaScan:
    """Measure the energy error of Tao's method for each of ``omegas``.

    Errors are absolute where the initial energy is zero.

    >>> pendulum = Hamiltonian(lambda q, p: (p.square() / 2 - torch.cos(q)).sum(-1))
    >>> scan = scan_omega(pendulum, torch.ones(1), torch.ones(1), dt=0.1, steps=9, omegas=[1, 9])
    >>> scan.error.shape
    torch.Size([2])
    """
    _check_hamiltonian("scan_omega", system)
    first = system.energy(q, p)
    size = torch.where(first == 0, 1.0, first.abs())
    errors = []
    for omega in omegas:
        method, memory, a, b = tao(order, omega), None, q, p
        error = torch.zeros_like(first)
        for _ in range(steps):
            a, b, memory = method.advance(system, a, b, dt, 1, memory)
            error = torch.maximum(error, (system.energy(a, b) - first).abs() / size)
        errors.append(error.nan_to_num(math.inf, math.inf))
    omega = torch.tensor(omegas, dtype=q.dtype, device=q.device)
    return OmegaScan(omega, (2 * omega * dt) % (2 * math.pi), torch.stack(errors))


@dataclass(frozen=True, kw_only=True, eq=False)
class SemiExplicit(Integrator):
    r"""The projected method of Jayawardana and Ohsawa: symplectic in ``(q, p)`` itself.

    .. math:: (z + \mu,\, z - \mu) \;\mapsto\; (z_1, z_2)
              = \Psi_h (z + \mu,\, z - \mu), \qquad
              z' = z_1 + \mu = z_2 - \mu

    :math:`\Psi` is the explicit step of the unbound copies (Pihajoki), composed with step
    ``weights``; only the ``2 d`` numbers :math:`\mu` are solved for, one projection whatever the
    order. The residual has the derivative ``4 I + O(h)`` in them, which the sweeps start from.
    Keeps linear and quadratic invariants of the energy.

    Jayawardana & Ohsawa, Math. Comp. 92 (2023) 251, eq. 8; Ohsawa, SIAM J. Numer. Anal. 61
    (2023) 1293, for the invariants.
    """

    symplectic: bool = True
    symmetric: bool = True
    explicit: bool = False
    weights: tuple[float, ...] = (1.0,)

    def check(self, system: System) -> None:
        """Refuse what has no Hamiltonian ``H(q, p)`` to double."""
        _check_hamiltonian(self.name, system)

    def advance(
        self,
        system: System,
        q: Tensor,
        p: Tensor,
        dt: float | Tensor,
        steps: int,
        memory: tuple[Tensor, bool] | None = None,
    ) -> tuple[Tensor, Tensor, Any]:
        """Take ``steps`` steps; the memory is the last projection."""
        d = q.shape[-1]
        z = torch.cat([q, p], -1)
        mu, rows_alone = memory or (torch.zeros_like(z), are_rows_alone(system, q, p))

        def move(z: Tensor, dt: float | Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
            one, two = z + mu, z - mu
            copies = _Copies(one[..., :d], one[..., d:], two[..., :d], two[..., d:])
            q, p, x, y = self._unbound(system, copies, dt)
            return torch.cat([q, p], -1), torch.cat([x, y], -1)

        def equations(z: Tensor, dt: float | Tensor) -> Equations:
            def slope(mu: Tensor) -> Tensor:
                one, two = move(z, dt, mu)
                return mu - (one - two + 2 * mu) / 4

            return Equations(slope, lambda mu: mu)

        for _ in range(steps):
            mu = solve_fixed_point(
                self.name, equations, z, dt, mu.detach(), rows_alone=rows_alone, scale=z
            ).k
            one, two = move(z, dt, mu)
            z = (one + two) / 2
        return z[..., :d], z[..., d:], (mu.detach(), rows_alone)

    def _unbound(self, system: System, copies: _Copies, dt: float | Tensor) -> _Copies:
        q, p, x, y = copies
        ends = [0.0, *self.weights, 0.0]
        for i, w in enumerate(self.weights):
            slope = system.field(q, y)
            between = (ends[i] + w) * dt / 2
            x, p = x + between * slope[0], p + between * slope[1]
            slope = system.field(x, p)
            q, y = q + w * dt * slope[0], y + w * dt * slope[1]
        slope = system.field(q, y)
        last = self.weights[-1] * dt / 2
        return _Copies(q, p + last * slope[1], x + last * slope[0], y)


def _check_hamiltonian(name: str, system: System) -> None:
    if not isinstance(system, Hamiltonian | Separable):
        raise ValueError(
            f"{name} needs a Hamiltonian H(q, p), whose two halves it doubles, got "
            f"{type(system).__name__}: use {system.default!r}, or give a Hamiltonian"
        )


_SEMIEXPLICIT = "Jayawardana & Ohsawa, Math. Comp. 92 (2023) 251"

EXTENDED = (
    *(tao(order) for order in (2, 4, 6)),
    SemiExplicit(name="semiexplicit2", order=2, source=_SEMIEXPLICIT),
    *(
        SemiExplicit(
            name=f"semiexplicit{order}",
            order=order,
            source=_SEMIEXPLICIT,
            weights=SCHEMES[USUAL[order]].weights,
        )
        for order in (4, 6)
    ),
)
