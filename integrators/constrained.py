r"""Motion on a surface :math:`g(q) = 0`: constrained systems, RATTLE and SHAKE.

.. math:: p_{1/2} = p - \tfrac h2 \nabla V(q) - G(q)^T \lambda, \qquad
          q' = q + h M^{-1} p_{1/2}, \qquad g(q') = 0, \qquad
          p' = p_{1/2} - \tfrac h2 \nabla V(q') - G(q')^T \mu

RATTLE takes :math:`\mu` such that :math:`G(q') M^{-1} p' = 0`, SHAKE takes none: its positions are
the same. Andersen, J. Comput. Phys. 52 (1983) 24; Leimkuhler & Skeel, J. Comput. Phys. 112 (1994)
117; Hairer, Lubich & Wanner (2006), VII.1.4.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from darboux._autodiff import directional, jacobian
from darboux._checks import (
    ConvergenceError,
    check_last,
    check_that,
    corrections,
    in_transform,
    values,
)
from darboux.integrators.base import Integrator
from darboux.integrators.composed import USUAL, compose
from darboux.integrators.systems import Pair, Separable, System

_MAX_SWEEPS = 100
# A change this many ulps of the state large is not yet round-off.
_ROUND_OFF = 1e3
# Newton steps of a projection; the last ones change nothing.
_PROJECTIONS = 30


class Constrained(System):
    r"""A separable system held on a surface by ideal forces.

    .. math:: \dot q = M^{-1} p, \qquad \dot p = -\nabla V(q) - G(q)^T \lambda, \qquad
              g(q) = 0, \qquad G = \partial g/\partial q

    ``free`` is the system without the constraint, its kinetic energy :math:`|p|^2/2m`;
    ``constraint(q)`` maps ``(..., d)`` to ``(..., m)``, of full rank on the surface, and
    ``jacobian(q) (..., m, d)`` is its derivative where a closed form saves that of autodiff.
    A run starts on the surface with ``p`` tangent to it: :meth:`project` takes it there.
    ``field`` has the multipliers of the continuous motion; methods other than ``rattle`` leave
    the surface slowly. Hairer, Lubich & Wanner (2006), VII.1.
    """

    default = "rattle"
    nature = "which moves on a constraint"

    def __init__(
        self,
        free: Separable,
        constraint: Callable[[Tensor], Tensor],
        jacobian: Callable[[Tensor], Tensor] | None = None,
    ):
        if not isinstance(free, Separable):
            raise TypeError(f"Constrained: free is a {type(free).__name__}, expected a Separable")
        if not free.quadratic or free.time:
            raise ValueError(
                "Constrained: expected a free system with the kinetic energy |p|^2/(2 mass) and "
                "without time"
            )
        self.free = free
        self.constraint = constraint
        self.closed_form = jacobian

    def jacobian(self, q: Tensor) -> Tensor:
        """Return the derivative ``(..., m, d)`` of the constraint."""
        if self.closed_form is not None:
            return self.closed_form(q)
        return jacobian(self.constraint, q)[1]

    def field(self, q: Tensor, p: Tensor, /) -> Pair:
        v, force, normals = self.free.velocity(p), self.free.force(q), self.jacobian(q)

        def rate(x: Tensor) -> Tensor:
            return directional(self.constraint, x, v)[1]

        bend = directional(rate, q, v)[1]  # of the surface, along the motion
        pull = _apply(normals, force / self.free.mass) + bend
        return v, force - _apply(normals.mT, _apply(self._inverse(normals), pull))

    def _inverse(self, normals: Tensor) -> Tensor:
        return torch.linalg.inv(normals @ (normals.mT / _column(self.free.mass)))

    def energy(self, q: Tensor, p: Tensor, /, *t: Tensor) -> Tensor:
        return self.free.energy(q, p)

    def tangent(self, q: Tensor, p: Tensor, normals: Tensor | None = None) -> Tensor:
        r"""Return ``p`` less its part along the normals, so that :math:`G M^{-1} p = 0`."""
        normals = self.jacobian(q) if normals is None else normals
        multiplier = _apply(self._inverse(normals), _apply(normals, p / self.free.mass))
        return p - _apply(normals.mT, multiplier)

    def project(self, q: Tensor, p: Tensor) -> Pair:
        """Return the state on the surface to which Newton's iteration leads, ``p`` tangent.

        Raises ``ConvergenceError`` when it does not lead there from ``q``.
        """
        step = q
        for _ in range(_PROJECTIONS):
            normals = self.jacobian(q)
            multiplier = _apply(self._inverse(normals), self.constraint(q))
            step = _apply(normals.mT, multiplier) / self.free.mass
            q = q - step
        size = values(step.abs().amax() if step.numel() else step.sum())
        scale = float(values(q).abs().max()) if q.numel() else 0.0
        if not float(size) <= 1e3 * torch.finfo(q.dtype).eps * (1 + scale):
            raise ConvergenceError(
                f"Constrained.project: after {_PROJECTIONS} steps q still moves by "
                f"{float(size):.3g}: start nearer to the surface",
                float(size),
                _PROJECTIONS,
            )
        return q, self.tangent(q, p)

    def lift(self, q: Tensor, p: Tensor, t: float | Tensor) -> Pair:
        gap, normals = self.constraint(q), self.jacobian(q)
        if gap.dim() != q.dim() or gap.shape[:-1] != q.shape[:-1]:
            raise ValueError(
                f"Constrained: constraint has shape {tuple(gap.shape)} for q of shape "
                f"{tuple(q.shape)}, expected (..., m) for (..., d)"
            )
        near = torch.finfo(q.dtype).eps ** 0.5
        length = normals.abs().sum(-1)
        size = 1 + q.abs().amax(-1, keepdim=True)
        check_that(
            "Constrained",
            lambda: gap.abs() <= near * length * size,
            "q is not on the constraint: start from system.project(q, p)",
        )
        speed = self.free.velocity(p)
        across = _apply(normals, speed)
        check_that(
            "Constrained",
            lambda: across.abs() <= near * length * (1 + speed.abs().amax(-1, keepdim=True)),
            "p is not tangent to the constraint: start from system.project(q, p)",
        )
        return q, p


def rods(lengths: Sequence[float] | Tensor, dim: int = 2) -> Callable[[Tensor], Tensor]:
    r"""Return the constraint of a chain of rods that hangs from the origin.

    .. math:: g_i(q) = \tfrac12 \bigl(|x_i - x_{i-1}|^2 - \ell_i^2\bigr), \qquad x_0 = 0

    ``q (..., n dim)`` holds the joints :math:`x_1 \dots x_n` one after the other; the constraint
    is ``(..., n)``. One rod is a pendulum, two the double pendulum.

    >>> rods([1.0, 1.0])(torch.tensor([1.0, 0.0, 1.0, 1.0]))
    tensor([0., 0.])
    """
    n = len(lengths)

    def constraint(q: Tensor) -> Tensor:
        check_last("rods", "q", q, n * dim)
        x = q.unflatten(-1, (n, dim))
        rod = x - torch.cat([torch.zeros_like(x[..., :1, :]), x[..., :-1, :]], -2)
        length = torch.as_tensor(lengths, dtype=q.dtype, device=q.device)
        return (rod.square().sum(-1) - length.square()) / 2

    return constraint


@dataclass(frozen=True, kw_only=True, eq=False)
class Rattle(Integrator):
    """A leapfrog whose positions and, if ``tangent``, momenta obey the constraint.

    The multipliers are found by Newton's iteration with the matrix of the start of the step, which
    stops where it stops improving, not at a tolerance. Derivatives are those of the implicit
    function theorem: chord steps from the solution with the exact matrix.
    """

    order: int = 2
    symplectic: bool = True
    symmetric: bool = True
    explicit: bool = False
    tangent: bool

    def check(self, system: System) -> None:
        """Accept a :class:`Constrained` system."""
        if not isinstance(system, Constrained):
            raise ValueError(
                f"{self.name} needs a Constrained system, got a {type(system).__name__}: use "
                f"{system.default!r}"
            )

    def advance(
        self,
        system: System,
        q: Tensor,
        p: Tensor,
        dt: float | Tensor,
        steps: int,
        memory: Any = None,
    ) -> tuple[Tensor, Tensor, Any]:
        """Take ``steps`` steps; the memory is the force and the normals at the end."""
        assert isinstance(system, Constrained)
        force, normals = memory or (system.free.force(q), system.jacobian(q))
        for _ in range(steps):
            q, p = _drift(system, q, p + dt / 2 * force, dt, normals)
            force, normals = system.free.force(q), system.jacobian(q)
            p = p + dt / 2 * force
            if self.tangent:
                p = system.tangent(q, p, normals)
        return q, p, (force, normals)


def _drift(system: Constrained, q: Tensor, p: Tensor, dt: float | Tensor, normals: Tensor) -> Pair:
    # Straight on, then back to the surface along the normals of the start.
    mass = system.free.mass
    ahead = q + dt * p / mass
    with torch.no_grad():
        still = dt.detach() if isinstance(dt, Tensor) else dt
        back = still * normals.detach().mT / _column(mass)
        multiplier, there = _find_multiplier(system, ahead.detach(), back, normals.detach())
    if torch.is_grad_enabled() or in_transform():
        with torch.no_grad():
            inverse = torch.linalg.inv(system.jacobian(there).detach() @ back)
        back = dt * normals.mT / _column(mass)
        for _ in range(corrections()):
            gap = system.constraint(ahead - _apply(back, multiplier))
            multiplier = multiplier + _apply(inverse, gap)
    pull = _apply(normals.mT, multiplier)
    return ahead - dt * pull / mass, p - pull


def _find_multiplier(
    system: Constrained, ahead: Tensor, back: Tensor, normals: Tensor
) -> tuple[Tensor, Tensor]:
    # The multiplier and the point ahead - back @ multiplier of the surface, without a graph.
    inverse = torch.linalg.inv(normals @ back)
    multiplier = torch.zeros_like(normals[..., 0])
    there, least, settled, worst, sweep = ahead, None, None, math.inf, 0
    limit = _ROUND_OFF * torch.finfo(ahead.dtype).eps
    while sweep < _MAX_SWEEPS:
        sweep += 1
        multiplier = multiplier + _apply(inverse, system.constraint(there).detach())
        moved = ahead - _apply(back, multiplier)
        change = values((moved - there).abs().amax(-1) / (1 + moved.abs().amax(-1)))
        there = moved
        now = float(change.max()) if change.numel() else 0.0
        if now == 0.0:
            return multiplier, there
        if not math.isfinite(now):
            break
        worst = now
        if least is not None:
            stalled = (change <= limit) & ((change >= least) | (change == 0))
            settled = stalled if settled is None else settled | stalled
            if settled.all():
                return multiplier, there
        least = change if least is None else torch.minimum(change, least)
    if worst <= limit:
        return multiplier, there
    raise ConvergenceError(
        f"rattle: after {sweep} sweeps the positions still change by {worst:.3g}: take a "
        "smaller dt",
        worst,
        sweep,
    )


def _column(mass: float | Tensor) -> float | Tensor:
    return mass.unsqueeze(-1) if isinstance(mass, Tensor) and mass.dim() else mass


def _apply(matrix: Tensor, x: Tensor) -> Tensor:
    return (matrix @ x.unsqueeze(-1)).squeeze(-1)


RATTLE = Rattle(
    name="rattle",
    tangent=True,
    source="Andersen, J. Comput. Phys. 52 (1983) 24; Hairer, Lubich & Wanner (2006), VII.1.4",
)
SHAKE = Rattle(
    name="shake",
    tangent=False,
    source="Ryckaert, Ciccotti & Berendsen, J. Comput. Phys. 23 (1977) 327; order 2 in positions",
)
RATTLES = (
    RATTLE,
    SHAKE,
    *(compose(RATTLE, scheme, f"rattle{order}") for order, scheme in USUAL.items()),
)
