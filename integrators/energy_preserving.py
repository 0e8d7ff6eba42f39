r"""Methods that keep the energy to round-off, and give up the symplectic form for it.

A discrete gradient :math:`\bar\nabla H(z, z')` satisfies

.. math:: \bar\nabla H(z, z') \cdot (z' - z) = H(z') - H(z), \qquad
          \bar\nabla H(z, z) = \nabla H(z),

and with any skew ``B`` the step :math:`z' = z + h B \bar\nabla H(z, z')` keeps ``H``. ``B`` is the
canonical one for a Hamiltonian and taken at the midpoint for a :class:`Poisson` system. To add a
method, add a discrete gradient and a row.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from darboux._autodiff import gradient
from darboux.integrators.base import Integrator
from darboux.integrators.composed import compose
from darboux.integrators.fixed_point import Equations, solve_fixed_point
from darboux.integrators.implicit import add_compensated, gauss_legendre, step_ratio
from darboux.integrators.systems import Hamiltonian, Poisson, Separable, System


class _Parts(NamedTuple):
    """A conservative system on states ``z (..., m)``, one vector for each copy."""

    energy: Callable[[Tensor], Tensor]  # (..., m) -> (...)
    gradient: Callable[[Tensor], Tensor]  # (..., m) -> (..., m)
    turn: Callable[[Tensor, Tensor], Tensor]  # z, g -> B(z) g


# Given the system and z, the discrete gradient as a function of z'.
DiscreteGradient = Callable[[_Parts, Tensor], Callable[[Tensor], Tensor]]


def gonzalez(parts: _Parts, z: Tensor) -> Callable[[Tensor], Tensor]:
    r"""Correct the gradient at the midpoint ``m`` along the step :math:`\Delta = z' - z`.

    .. math:: \bar\nabla H = \nabla H(m) + \frac{H(z') - H(z) - \nabla H(m) \cdot \Delta}
              {|\Delta|^2}\, \Delta

    One ruler measures all of :math:`\Delta`: where the scales of positions and momenta differ much
    from component to component (light and heavy bodies), the correction spoils the small ones, and
    the average below is the better method.

    A step shorter than the cube root of the machine precision is not corrected: there the
    correction, of third order, is all round-off. Gonzalez, J. Nonlinear Sci. 6 (1996) 449.
    """
    here = parts.energy(z)
    cut = torch.finfo(z.dtype).eps ** (2 / 3)

    def mean(moved: Tensor) -> Tensor:
        step = moved - z
        middle = z + step / 2
        slope = parts.gradient(middle)
        square = step.square().sum(-1)
        short = square <= cut * middle.square().sum(-1)
        gap = parts.energy(moved) - here - (slope * step).sum(-1)
        factor = torch.where(short, 0.0, gap / torch.where(short, 1.0, square))
        return slope + factor[..., None] * step

    return mean


def average(points: int) -> DiscreteGradient:
    r"""Average the gradient over the straight step, by a Gauss quadrature of so many points.

    .. math:: \bar\nabla H = \int_0^1 \nabla H(z + s (z' - z))\, ds

    Keeps polynomial energies up to degree ``2 points`` exactly, others up to ``h^(2 points)``.
    McLachlan, Quispel & Robidoux, Phil. Trans. R. Soc. A 357 (1999) 1021, eq. 2.6.
    """
    quadrature = gauss_legendre(points)

    def discrete(parts: _Parts, z: Tensor) -> Callable[[Tensor], Tensor]:
        c, b = (torch.from_numpy(x).to(z) for x in (quadrature.c, quadrature.b))

        def mean(moved: Tensor) -> Tensor:
            shape = (points, *[1] * moved.dim())
            slopes = parts.gradient(z + c.reshape(shape) * (moved - z))
            return (b.reshape(shape) * slopes).sum(0)

        return mean

    return discrete


class _Memory(NamedTuple):
    step: Tensor  # z' - z
    dt: float | Tensor  # of that step
    lost: Tensor  # what the additions to the state rounded off


@dataclass(frozen=True, kw_only=True, eq=False)
class EnergyPreserving(Integrator):
    r"""The method of a discrete gradient: :math:`z' = z + h B((z + z')/2)\, \bar\nabla H(z, z')`.

    The step is solved for to round-off, each copy being a small dense system.
    """

    symplectic: bool = False
    symmetric: bool = True
    explicit: bool = False
    discrete: DiscreteGradient

    def check(self, system: System) -> None:
        """Refuse what has no energy, or one that is not conserved."""
        instead = f"use {system.default!r}"
        if not isinstance(system, Hamiltonian | Separable | Poisson):
            raise ValueError(
                f"{self.name} keeps the energy of a Hamiltonian or a Poisson system, got "
                f"{type(system).__name__}: {instead}"
            )
        if system.time:
            raise ValueError(
                f"{self.name} keeps the energy, and this one depends on the time: {instead}"
            )
        if isinstance(system, Separable) and (
            system.potential is None or (system.kinetic is None and not system.quadratic)
        ):
            raise ValueError(
                f"{self.name} keeps the energy, and this Separable gives only a force or a "
                f"velocity: give potential and kinetic, or {instead}"
            )

    def advance(
        self,
        system: System,
        q: Tensor,
        p: Tensor,
        dt: float | Tensor,
        steps: int,
        memory: _Memory | None = None,
    ) -> tuple[Tensor, Tensor, Any]:
        """Take ``steps`` steps; the memory is the last one and what the state rounded off."""
        parts, z, unpack = _take_apart(system, q, p)

        def equations(z: Tensor, dt: float | Tensor) -> Equations:
            mean = self.discrete(parts, z)
            return Equations(
                lambda moved: dt * parts.turn((z + moved) / 2, mean(moved)), lambda k: z + k
            )

        with torch.no_grad():
            if memory is None:
                memory = _Memory(dt * parts.turn(z, parts.gradient(z)), dt, torch.zeros_like(z))
            guess = memory.step.detach() * step_ratio(dt, memory.dt)
        lost = memory.lost
        for _ in range(steps):
            scale = _round_off_scale(parts, z, dt, guess)
            step = solve_fixed_point(
                self.name, equations, z, dt, z + guess, rows_alone=True, scale=scale
            ).k
            z, lost = add_compensated(z, step, lost)
            guess = step.detach()
        return *unpack(z), _Memory(guess, dt, lost)


def _round_off_scale(parts: _Parts, z: Tensor, dt: float | Tensor, step: Tensor) -> Tensor:
    # The energy fixes the state only to its own round-off over its slope, |step|/dt: more than
    # the round-off of the state where the motion is slow.
    with torch.no_grad():
        size, length = z.norm(dim=-1), step.norm(dim=-1)
        shortest = torch.finfo(z.dtype).eps ** (1 / 3) * size
        tiny = torch.finfo(z.dtype).tiny
        return size + (parts.energy(z) * dt).abs() / (length + shortest).clamp_min(tiny)


def _take_apart(
    system: System, q: Tensor, p: Tensor
) -> tuple[_Parts, Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]:
    # The system on packed states, those dimensions that its energy sums away being one vector.
    if isinstance(system, Poisson):
        d = q.shape[-1]
        parts = _Parts(
            system.hamiltonian,
            lambda z: gradient(system.hamiltonian, z),
            lambda z, g: (system.structure(z) @ g.unsqueeze(-1)).squeeze(-1),
        )
        return parts, torch.cat([q, p], -1), lambda z: (z[..., :d], z[..., d:])
    with torch.no_grad():
        dims = q.dim() - system.energy(q, p).dim()
    shape = q.shape[q.dim() - dims :]

    def pack(q: Tensor, p: Tensor) -> Tensor:
        return torch.cat([q.flatten(-dims), p.flatten(-dims)], -1)

    def unpack(z: Tensor) -> tuple[Tensor, Tensor]:
        a, b = z.chunk(2, -1)
        return a.unflatten(-1, shape), b.unflatten(-1, shape)

    def slope(z: Tensor) -> Tensor:
        velocity, force = system.field(*unpack(z))
        return pack(-force, velocity)

    def turn(_: Tensor, g: Tensor) -> Tensor:
        a, b = g.chunk(2, -1)
        return torch.cat([b, -a], -1)

    return _Parts(lambda z: system.energy(*unpack(z)), slope, turn), pack(q, p), unpack


def average_vector_field(points: int) -> EnergyPreserving:
    """Return the average vector field method with a quadrature of so many points.

    >>> average_vector_field(2).name
    'avf_2_points'
    """
    return EnergyPreserving(
        name=f"avf_{points}_points",
        order=2,
        discrete=average(points),
        source="McLachlan, Quispel & Robidoux, Phil. Trans. R. Soc. A 357 (1999) 1021, eq. 2.6; "
        "Cohen & Hairer, BIT 51 (2011) 91",
    )


_GONZALEZ = EnergyPreserving(
    name="gonzalez",
    order=2,
    discrete=gonzalez,
    source="Gonzalez, J. Nonlinear Sci. 6 (1996) 449, the midpoint discrete gradient",
)
# Six points keep the energy of a pendulum to round-off up to dt = 0.5.
_AVERAGE = dataclasses.replace(average_vector_field(6), name="avf")

ENERGY_PRESERVING = (
    _GONZALEZ,
    _AVERAGE,
    compose(_GONZALEZ, "suzuki4", "gonzalez4"),
    compose(_AVERAGE, "suzuki4", "avf4"),
)
