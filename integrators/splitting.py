"""Explicit splitting methods: the executor of a row of coefficients.

For ``H = T(p) + V(q)`` each half has an exact flow: a drift ``q += a dt dT/dp`` and a kick
``p -= b dt dV/dq``. A method alternates the two; the rows are in ``splitting_table``. The flows
of a :class:`Split` system take the places of drift and kick.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from itertools import chain, pairwise, repeat
from typing import Any

import torch
from torch import Tensor

from darboux.integrators.base import Integrator
from darboux.integrators.systems import Separable, Split, System

Flow = tuple[int, float]  # (0 for the drift or the number of the part, coefficient of dt)
Exact = tuple[int, Decimal]  # the same before rounding


@dataclass(frozen=True, kw_only=True, eq=False)
class Splitting(Integrator):
    """Alternating kicks and drifts of a :class:`Separable` or a :class:`Split` system.

    ``rkn`` (Runge-Kutta-Nystrom): order or error constant rest on brackets that vanish when
    the kinetic energy is quadratic; other systems are refused. ``weights`` are those of a
    composition of leapfrogs, which is what more than two parts allow. ``compensated`` carries
    what each addition rounds off to the next one (Kahan). ``exact`` keeps the digits of the
    table, for whoever checks its order conditions.
    """

    symplectic: bool = True
    explicit: bool = True
    flows: tuple[Flow, ...]
    exact: tuple[Exact, ...] = ()
    weights: tuple[float, ...] = ()
    rkn: bool = False
    compensated: bool = False

    def check(self, system: System) -> None:
        if not isinstance(system, Separable | Split):
            raise ValueError(
                f"{self.name} needs a separable Hamiltonian T(p) + V(q), got "
                f"{type(system).__name__}, {system.nature}: use {system.default!r}, or give a "
                "Separable or a Split"
            )
        if self.rkn and not system.quadratic:
            raise ValueError(
                f"{self.name} needs a kinetic energy |p|^2/(2 mass), and this system gives its "
                "own kinetic or velocity, which may not be quadratic: use 'bm4', 'bm6' or "
                "'kahan_li8', or give the system a mass instead"
            )
        if isinstance(system, Split):
            if len(system.flows) > 2 and not self.weights:
                raise ValueError(
                    f"{self.name} alternates two parts, got a Split of {len(system.flows)}: use a "
                    "composition of a symmetric step, such as 'leapfrog', 'yoshida4', 'suzuki4' "
                    "or 'kahan_li8'"
                )
            if self.compensated:
                raise ValueError(
                    f"{self.name}: compensated sums need the increments of a Separable system, "
                    "got a Split, which gives only its flows"
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
        """Take ``steps`` steps; the memory is the last slope, when the next flow needs the same.

        Compensated, it is that slope and what ``q`` and ``p`` rounded off.
        """
        if isinstance(system, Split):
            for part, h in program(self.parts(len(system.flows)), dt, steps):
                q, p = system.flows[part](q, p, h)
            return q, p, None
        assert isinstance(system, Separable)
        if self.compensated:
            return self._advance_compensated(system, q, p, dt, steps, memory)
        force, velocity = system.force, system.velocity
        slope, last = memory, None
        for kick, h in program(self.flows, dt, steps):
            if kick:
                last = force(q) if slope is None else slope
                p = p + h * last if isinstance(h, Tensor) else torch.add(p, last, alpha=h)
            else:
                last = velocity(p) if slope is None else slope
                q = q + h * last if isinstance(h, Tensor) else torch.add(q, last, alpha=h)
            slope = None
        return q, p, last if self._same_ends else None

    def _advance_compensated(
        self, system: Separable, q: Tensor, p: Tensor, dt: float | Tensor, steps: int, memory: Any
    ) -> tuple[Tensor, Tensor, Any]:
        slope, lost_q, lost_p = memory or (None, torch.zeros_like(q), torch.zeros_like(p))
        last = None
        for kick, h in program(self.flows, dt, steps):
            if kick:
                last = system.force(q) if slope is None else slope
                p, lost_p = _kahan(p, h * last, lost_p)
            else:
                last = system.velocity(p) if slope is None else slope
                q, lost_q = _kahan(q, h * last, lost_q)
            slope = None
        return q, p, (last if self._same_ends else None, lost_q, lost_p)

    @property
    def _same_ends(self) -> bool:
        return self.flows[0][0] == self.flows[-1][0]

    def parts(self, n: int) -> tuple[Flow, ...]:
        """Return the flows of one step of a system of ``n`` parts, in the order they act."""
        if n == 2:
            return self.flows
        order = list(range(n))
        if self.flows[0][0]:
            order.reverse()
        flows: list[Flow] = []
        for w in self.weights:
            half = [(i, w / 2) for i in order[:-1]]
            step = [*half, (order[-1], w), *reversed(half)]
            if flows:
                part, c = flows.pop()
                step[0] = (part, c + step[0][1])
            flows.extend(step)
        return tuple(flows)


def program(
    flows: tuple[Flow, ...], dt: float | Tensor, steps: int
) -> Iterator[tuple[int, float | Tensor]]:
    """Yield the flows of ``steps`` steps; neighbours of one kind are one flow.

    A leapfrog step so costs one force.
    """
    scaled = [(part, c * dt) for part, c in flows]
    if steps == 0:
        return iter(())
    if flows[0][0] != flows[-1][0]:
        return chain.from_iterable(repeat(scaled, steps))
    joined = [*scaled[1:-1], (flows[-1][0], (flows[-1][1] + flows[0][1]) * dt)]
    return chain(scaled[:1], chain.from_iterable(repeat(joined, steps - 1)), scaled[1:])


def _kahan(x: Tensor, increment: Tensor, lost: Tensor) -> tuple[Tensor, Tensor]:
    increment = increment + lost
    moved = x + increment
    return moved, (increment - (moved - x)).detach()


def _alternate(first: str, coefficients: list[Decimal]) -> tuple[Exact, ...]:
    start = int(first == "kick")
    return tuple((start ^ (i % 2), c) for i, c in enumerate(coefficients))


def sequence(first: str, digits: str) -> tuple[Exact, ...]:
    """Read the coefficients of a method in the order in which they act."""
    return _alternate(first, [Decimal(x) for x in digits.split()])


def palindrome(first: str, digits: str = "") -> tuple[Exact, ...]:
    """Complete a method that reads the same backwards from its first, free coefficients.

    The two before the middle follow from kicks and drifts summing to one each.
    """
    half = [Decimal(x) for x in digits.split()]
    half.append(Decimal("0.5") - sum(half[-2::-2], Decimal(0)))
    middle = 1 - 2 * sum(half[-2::-2], Decimal(0))
    return _alternate(first, [*half, middle, *reversed(half)])


def weights(digits: str = "") -> tuple[Decimal, ...]:
    """Complete symmetric step weights: ``w1 ... wm, 1 - 2 sum w, wm ... w1``."""
    w = [Decimal(x) for x in digits.split()]
    return (*w, 1 - 2 * sum(w, Decimal(0)), *reversed(w))


def composition(w: tuple[Decimal, ...]) -> tuple[Exact, ...]:
    """Compose leapfrogs (kick first) with step weights ``w``."""
    kicks = [w[0] / 2, *((a + b) / 2 for a, b in pairwise(w)), w[-1] / 2]
    flows = [x for pair in zip(kicks, w, strict=False) for x in pair]
    return _alternate("kick", [*flows, kicks[-1]])
