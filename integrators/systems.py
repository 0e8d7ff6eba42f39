"""Systems: what an integrator may ask of the thing it moves.

Every system gives ``field(q, p) -> (dq/dt, dp/dt)``, which is all that Runge-Kutta and implicit
methods use. A :class:`Separable` one also gives the two halves, ``velocity(p)`` and
``force(q)``, and a :class:`Split` one the exact flows of its parts, which is what an explicit
splitting needs. ``energy(q, p) -> (...)`` is the conserved quantity that audits watch. States
``q, p`` have shape ``(..., d)``; leading dimensions are independent copies. All callables may be
``nn.Module``\\ s.

With ``time=True`` the callables of a system take the time as a last argument, ``t (...)``, one
for each vector of ``q``. While it runs, such a system carries a clock as the last component of
``q``: time is then a coordinate, and every method keeps its order.

To add a kind of system, subclass :class:`System`: give it ``field`` and, if it has one,
``energy``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from darboux._autodiff import gradient

Pair = tuple[Tensor, Tensor]
Flow = Callable[[Tensor, Tensor, float | Tensor], Pair]


class System(ABC):
    """A right-hand side on phase space."""

    default: ClassVar[str] = "gauss4"  # the method of a run that names none
    nature: ClassVar[str] = "which has no exactly solvable parts"  # why a splitting refuses it
    paired: ClassVar[bool] = True  # whether q and p have one shape
    time: bool = False  # whether the callables take the time

    @abstractmethod
    def field(self, q: Tensor, p: Tensor, /) -> Pair:
        """Return ``dq/dt`` and ``dp/dt`` of the lifted state."""

    def energy(self, q: Tensor, p: Tensor, /, *t: Tensor) -> Tensor:
        """Return the energy ``(...)``, conserved unless it depends on the time ``t (...)``."""
        raise ValueError(f"{type(self).__name__} has no energy: build it from one to audit it")

    def lift(self, q: Tensor, p: Tensor, t: float | Tensor) -> Pair:
        """Return the state that methods move: with a clock, where the system asks for the time."""
        return (_with_clock(q, t), p) if self.time else (q, p)

    def lower(self, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return ``q``, ``p`` and, where every copy keeps a time of its own, those times."""
        return (q[..., :-1], p, None) if self.time else (q, p, None)


class Hamiltonian(System):
    r"""Hamilton's equations of any ``energy(q, p) -> (...)``.

    .. math:: \dot q = \partial H/\partial p, \qquad \dot p = -\partial H/\partial q

    The derivatives come from one reverse pass, or from a closed-form ``field(q, p)``.
    ``time=True``: ``energy(q, p, t)`` and ``field(q, p, t)``.
    """

    nature = "whose equations couple q and p"

    def __init__(
        self,
        energy: Callable[..., Tensor],
        field: Callable[..., Pair] | None = None,
        *,
        time: bool = False,
    ):
        self.energy = energy
        self.closed_form = field
        self.time = time

    def field(self, q: Tensor, p: Tensor, /) -> Pair:
        q, t = (q[..., :-1], (q[..., -1],)) if self.time else (q, ())
        if self.closed_form is not None:
            dq, dp = self.closed_form(q, p, *t)
        else:
            d = q.shape[-1]
            z = torch.cat([q, p], -1)
            slope = gradient(lambda z: self.energy(z[..., :d], z[..., d:], *t), z)
            dq, dp = slope[..., d:], -slope[..., :d]
        return (_with_clock(dq, 1.0), dp) if self.time else (dq, dp)


class Separable(System):
    r"""A Hamiltonian in two parts, each with an exact flow.

    .. math:: H(q, p) = T(p) + V(q), \qquad T(p) = |p|^2 / 2m \text{ unless given}

    ``mass`` is a number or a tensor that broadcasts to ``p``. ``force`` :math:`= -\nabla V` and
    ``velocity`` :math:`= \nabla T` in closed form save the reverse passes; ``force`` alone is
    enough to move, ``potential`` is needed for the energy.

    The dimensions that ``potential`` sums away are those of one system: with ``q (..., n, 3)``
    and ``potential(q) (...)`` the ``n`` bodies are one, and the kinetic energy sums over both.

    ``time=True``: ``potential(q, t)`` and ``force(q, t)``. The attributes ``force`` and
    ``velocity`` are those of the lifted state.
    """

    default = "leapfrog"

    def __init__(
        self,
        potential: Callable[..., Tensor] | None = None,
        kinetic: Callable[[Tensor], Tensor] | None = None,
        *,
        force: Callable[..., Tensor] | None = None,
        velocity: Callable[[Tensor], Tensor] | None = None,
        mass: float | Tensor = 1.0,
        time: bool = False,
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
        self.time = time
        if time:
            plain_force, plain_velocity = self.force, self.velocity
            self.force = lambda q: plain_force(q[..., :-1], q[..., -1])
            self.velocity = lambda p: _with_clock(plain_velocity(p), 1.0)

    def _derived_force(self, q: Tensor, *t: Tensor) -> Tensor:
        potential = self.potential
        assert potential is not None
        return -gradient(lambda x: potential(x, *t), q)

    def _derived_velocity(self, p: Tensor) -> Tensor:
        assert self.kinetic is not None
        return gradient(self.kinetic, p)

    def _momentum_over_mass(self, p: Tensor) -> Tensor:
        return p / self.mass

    def field(self, q: Tensor, p: Tensor, /) -> Pair:
        return self.velocity(p), self.force(q)

    def energy(self, q: Tensor, p: Tensor, /, *t: Tensor) -> Tensor:
        if self.potential is None:
            raise ValueError("Separable.energy: only a force is given, expected a potential")
        if self.time and not t:
            raise ValueError("Separable.energy: t is missing; this energy depends on the time")
        v = self.potential(q, *t)
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


class Split(System):
    r"""A field that is a sum of parts, each with an exact flow.

    .. math:: \dot z = \sum_i f_i(z), \qquad \mathtt{flows[i]}(q, p, h) = \exp(h f_i)(q, p)

    ``q`` and ``p`` may have any shapes that the flows keep; ``p`` may be left out. With two
    flows every splitting applies, the first being its drift and the second its kick; with more,
    the compositions of a symmetric step do, ``leapfrog`` being

    .. math:: \varphi_n^{h/2} \cdots \varphi_1^{h/2} \, \varphi_0^{h} \,
              \varphi_1^{h/2} \cdots \varphi_n^{h/2}.

    ``field``, for methods that do not split, is the sum of the derivatives of the flows unless
    given. ``quadratic`` promises that :math:`[f_1, [f_1, [f_1, f_0]]] = 0`, on which the
    Nystrom rows rest. McLachlan & Quispel, Acta Numerica 11 (2002) 341.
    """

    default = "leapfrog"
    paired = False

    def __init__(
        self,
        flows: Sequence[Flow],
        *,
        field: Callable[[Tensor, Tensor], Pair] | None = None,
        energy: Callable[..., Tensor] | None = None,
        quadratic: bool = False,
    ):
        if len(flows) < 2:
            raise ValueError(f"Split: {len(flows)} flows are given, expected at least two")
        self.flows = tuple(flows)
        self.quadratic = quadratic
        if field is not None:
            self.field = field
        if energy is not None:
            self.energy = energy

    def field(self, q: Tensor, p: Tensor, /) -> Pair:
        zero = torch.zeros(1, dtype=q.dtype, device=q.device)
        parts = [
            torch.func.jvp(lambda h, flow=flow: flow(q, p, h), (zero,), (zero + 1,))[1]
            for flow in self.flows
        ]
        return sum(x[0] for x in parts), sum(x[1] for x in parts)


class VectorField(System):
    """A plain equation ``dz/dt = f(z)``, without structure: for Runge-Kutta and implicit methods.

    The state is ``z (..., m)`` given as ``q`` alone, or packed from ``q`` and ``p``.
    ``time=True``: ``f(z, t)``.
    """

    paired = False

    def __init__(self, f: Callable[..., Tensor], *, time: bool = False):
        self.f = f
        self.time = time

    def field(self, q: Tensor, p: Tensor, /) -> Pair:
        q, t = (q[..., :-1], (q[..., -1],)) if self.time else (q, ())
        slope = self.f(torch.cat([q, p], -1), *t)
        dq, dp = slope[..., : q.shape[-1]], slope[..., q.shape[-1] :]
        return (_with_clock(dq, 1.0), dp) if self.time else (dq, dp)


class Poisson(System):
    r"""A Poisson system: the gradient of an energy, turned by a skew matrix.

    .. math:: \dot z = B(z)\, \nabla H(z), \qquad B^T = -B

    ``energy(z) -> (...)`` and ``structure(z) -> (..., m, m)``, on states ``z (..., m)`` given as
    ``q`` alone or packed from ``q`` and ``p``. For ``B`` to be a Poisson structure it must satisfy
    Jacobi's identity; the energy is conserved without. The rigid body: ``structure(m)`` is the
    matrix of :math:`v \mapsto m \times v`. Hairer, Lubich & Wanner (2006), VII.2.
    """

    paired = False

    def __init__(self, energy: Callable[[Tensor], Tensor], structure: Callable[[Tensor], Tensor]):
        self.hamiltonian = energy
        self.structure = structure

    def field(self, q: Tensor, p: Tensor, /) -> Pair:
        z = torch.cat([q, p], -1)
        slope = (self.structure(z) @ gradient(self.hamiltonian, z).unsqueeze(-1)).squeeze(-1)
        return slope[..., : q.shape[-1]], slope[..., q.shape[-1] :]

    def energy(self, q: Tensor, p: Tensor, /, *t: Tensor) -> Tensor:
        return self.hamiltonian(torch.cat([q, p], -1))


def packed(system: System, d: int) -> Callable[[Tensor], Tensor]:
    """Return the field of ``system`` on states ``z = (q, p)`` whose ``q`` has ``d`` components."""

    def field(z: Tensor) -> Tensor:
        return torch.cat(system.field(z[..., :d], z[..., d:]), -1)

    return field


def _with_clock(q: Tensor, t: float | Tensor) -> Tensor:
    clock = torch.as_tensor(t, dtype=q.dtype, device=q.device).expand(*q.shape[:-1], 1)
    return torch.cat([q, clock], -1)


def _identity(p: Tensor) -> Tensor:
    return p


def _is_one(mass: float | Tensor) -> bool:
    return not isinstance(mass, Tensor) and mass == 1.0
