"""Systems: what an integrator may ask of the thing it moves.

Every system gives ``field(q, p) -> (dq/dt, dp/dt)``, which is all that Runge-Kutta and implicit
methods use. A :class:`Separable` one also gives the two halves, ``velocity(p)`` and
``force(q)``, which is what an explicit splitting needs. ``energy(q, p) -> (...)`` is the
conserved quantity that audits watch. States ``q, p`` have shape ``(..., d)``; leading
dimensions are independent copies. All callables may be ``nn.Module``\\ s.

To add a kind of system, subclass :class:`System`: give it ``field`` and, if it has one,
``energy``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from darboux._autodiff import gradient

Pair = tuple[Tensor, Tensor]


class System(ABC):
    """A right-hand side on phase space."""

    @abstractmethod
    def field(self, q: Tensor, p: Tensor, /) -> Pair:
        """Return ``dq/dt`` and ``dp/dt``."""

    def energy(self, q: Tensor, p: Tensor, /) -> Tensor:
        """Return the conserved energy ``(...)``."""
        raise ValueError(f"{type(self).__name__} has no energy: build it from one to audit it")


class Hamiltonian(System):
    r"""Hamilton's equations of any ``energy(q, p) -> (...)``.

    .. math:: \dot q = \partial H/\partial p, \qquad \dot p = -\partial H/\partial q

    The derivatives come from one reverse pass, or from a closed-form ``field(q, p)``.
    """

    def __init__(
        self,
        energy: Callable[[Tensor, Tensor], Tensor],
        field: Callable[[Tensor, Tensor], Pair] | None = None,
    ):
        self.energy = energy
        self.closed_form = field

    def field(self, q: Tensor, p: Tensor, /) -> Pair:
        if self.closed_form is not None:
            return self.closed_form(q, p)
        d = q.shape[-1]
        slope = gradient(lambda z: self.energy(z[..., :d], z[..., d:]), torch.cat([q, p], -1))
        return slope[..., d:], -slope[..., :d]


class Separable(System):
    r"""A Hamiltonian in two parts, each with an exact flow.

    .. math:: H(q, p) = T(p) + V(q), \qquad T(p) = |p|^2 / 2m \text{ unless given}

    ``mass`` is a number or a tensor that broadcasts to ``p``. ``force`` :math:`= -\nabla V` and
    ``velocity`` :math:`= \nabla T` in closed form save the reverse passes; ``force`` alone is
    enough to move, ``potential`` is needed for the energy.

    The dimensions that ``potential`` sums away are those of one system: with ``q (..., n, 3)``
    and ``potential(q) (...)`` the ``n`` bodies are one, and the kinetic energy sums over both.
    """

    def __init__(
        self,
        potential: Callable[[Tensor], Tensor] | None = None,
        kinetic: Callable[[Tensor], Tensor] | None = None,
        *,
        force: Callable[[Tensor], Tensor] | None = None,
        velocity: Callable[[Tensor], Tensor] | None = None,
        mass: float | Tensor = 1.0,
    ):
        if potential is None and force is None:
            raise ValueError("Separable: neither potential nor force is given, expected one")
        if (kinetic is not None or velocity is not None) and not _is_one(mass):
            raise ValueError("Separable: mass is part of the kinetic energy: give one of the two")
        self.potential = potential
        self.kinetic = kinetic
        self.mass = mass
        self.force = self._derived_force if force is None else force
        if velocity is not None:
            self.velocity = velocity
        elif kinetic is not None:
            self.velocity = self._derived_velocity
        else:
            self.velocity = _identity if _is_one(mass) else self._momentum_over_mass
        # What Runge-Kutta-Nystrom splittings rest on.
        self.quadratic = kinetic is None and velocity is None

    def _derived_force(self, q: Tensor) -> Tensor:
        assert self.potential is not None
        return -gradient(self.potential, q)

    def _derived_velocity(self, p: Tensor) -> Tensor:
        assert self.kinetic is not None
        return gradient(self.kinetic, p)

    def _momentum_over_mass(self, p: Tensor) -> Tensor:
        return p / self.mass

    def field(self, q: Tensor, p: Tensor, /) -> Pair:
        return self.velocity(p), self.force(q)

    def energy(self, q: Tensor, p: Tensor, /) -> Tensor:
        if self.potential is None:
            raise ValueError("Separable.energy: only a force is given, expected a potential")
        v = self.potential(q)
        if v.dim() >= q.dim():
            raise ValueError(
                f"Separable.energy: potential has shape {tuple(v.shape)} for q of shape "
                f"{tuple(q.shape)}, expected (...) for (..., d)"
            )
        if self.kinetic is not None:
            return self.kinetic(p) + v
        if not self.quadratic:
            raise ValueError("Separable.energy: only a velocity is given, expected kinetic")
        return (p * p / self.mass).flatten(v.dim()).sum(-1) / 2 + v


class VectorField(System):
    """A plain equation ``dz/dt = f(z)``, without structure: for Runge-Kutta and implicit methods.

    The state is ``z (..., m)`` given as ``q`` alone, or packed from ``q`` and ``p``.
    """

    def __init__(self, f: Callable[[Tensor], Tensor]):
        self.f = f

    def field(self, q: Tensor, p: Tensor, /) -> Pair:
        slope = self.f(torch.cat([q, p], -1))
        return slope[..., : q.shape[-1]], slope[..., q.shape[-1] :]


def packed(system: System, d: int) -> Callable[[Tensor], Tensor]:
    """Return the field of ``system`` on states ``z = (q, p)`` whose ``q`` has ``d`` components."""

    def field(z: Tensor) -> Tensor:
        return torch.cat(system.field(z[..., :d], z[..., d:]), -1)

    return field


def _identity(p: Tensor) -> Tensor:
    return p


def _is_one(mass: float | Tensor) -> bool:
    return not isinstance(mass, Tensor) and mass == 1.0
