"""Explicit splitting methods: the executor of a row of coefficients.

For ``H = T(p) + V(q)`` each half has an exact flow: a drift ``q += a dt dT/dp`` and a kick
``p -= b dt dV/dq``. A method alternates the two; the rows are in ``splitting_table``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from itertools import chain, repeat

import torch
from torch import Tensor

from darboux.integrators.base import Integrator
from darboux.integrators.systems import Separable, System

Flow = tuple[bool, float]  # (is a kick, coefficient of dt)


@dataclass(frozen=True, kw_only=True, eq=False)
class Splitting(Integrator):
    """Alternating kicks and drifts of a :class:`Separable` system.

    ``rkn`` (Runge-Kutta-Nystrom): order or error constant rest on brackets that vanish when
    the kinetic energy is quadratic; other systems are refused.
    """

    symplectic: bool = True
    explicit: bool = True
    flows: tuple[Flow, ...]
    rkn: bool = False

    def check(self, system: System) -> None:
        if not isinstance(system, Separable):
            raise ValueError(
                f"{self.name} needs a separable Hamiltonian T(p) + V(q), got "
                f"{type(system).__name__}, whose equations couple q and p: use 'gauss4' or "
                "'implicit_midpoint', or give a Separable"
            )
        if self.rkn and not system.quadratic:
            raise ValueError(
                f"{self.name} needs a kinetic energy |p|^2/(2 mass), and this system gives its "
                "own kinetic or velocity, which may not be quadratic: use 'bm4', 'bm6' or "
                "'kahan_li8', or give the system a mass instead"
            )

    def advance(
        self,
        system: System,
        q: Tensor,
        p: Tensor,
        dt: float | Tensor,
        steps: int,
        memory: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Take ``steps`` steps; the memory is the last slope, when the next flow needs the same."""
        assert isinstance(system, Separable)
        force, velocity = system.force, system.velocity
        slope, last = memory, None
        for kick, h in self._program(dt, steps):
            if kick:
                last = force(q) if slope is None else slope
                p = p + h * last if isinstance(h, Tensor) else torch.add(p, last, alpha=h)
            else:
                last = velocity(p) if slope is None else slope
                q = q + h * last if isinstance(h, Tensor) else torch.add(q, last, alpha=h)
            slope = None
        return q, p, last if self._same_ends else None

    @property
    def _same_ends(self) -> bool:
        return self.flows[0][0] == self.flows[-1][0]

    def _program(self, dt: float | Tensor, steps: int) -> Iterator[tuple[bool, float | Tensor]]:
        # Neighbouring flows of two steps are one flow: a leapfrog step costs one force.
        flows = [(kick, c * dt) for kick, c in self.flows]
        if steps == 0:
            return iter(())
        if not self._same_ends:
            return chain.from_iterable(repeat(flows, steps))
        joined = [*flows[1:-1], (flows[-1][0], (self.flows[-1][1] + self.flows[0][1]) * dt)]
        return chain(flows[:1], chain.from_iterable(repeat(joined, steps - 1)), flows[1:])


def _alternate(first: str, coefficients: list[Decimal]) -> tuple[Flow, ...]:
    start = first == "kick"
    return tuple((start ^ bool(i % 2), float(c)) for i, c in enumerate(coefficients))


def sequence(first: str, digits: str) -> tuple[Flow, ...]:
    """Read the coefficients of a method in the order in which they act."""
    return _alternate(first, [Decimal(x) for x in digits.split()])


def palindrome(first: str, digits: str = "") -> tuple[Flow, ...]:
    """Complete a method that reads the same backwards from its first, free coefficients.

    The two before the middle follow from kicks and drifts summing to one each.
    """
    half = [Decimal(x) for x in digits.split()]
    half.append(Decimal("0.5") - sum(half[-2::-2], Decimal(0)))
    middle = 1 - 2 * sum(half[-2::-2], Decimal(0))
    return _alternate(first, [*half, middle, *reversed(half)])


def composition(digits: str) -> tuple[Flow, ...]:
    """Compose leapfrogs (kick first) with step weights ``w1 ... wm, 1 - 2 sum w, wm ... w1``."""
    w = [Decimal(x) for x in digits.split()]
    kicks = [(a + b) / 2 for a, b in zip([Decimal(0), *w], w, strict=False)]
    return palindrome("kick", " ".join(f"{b} {a}" for b, a in zip(kicks, w, strict=True)))
