r"""Motion on an integer lattice, which runs backward over the very bits it ran forward.

A position is an integer multiple of a spacing :math:`S`, a power of two. A kick

.. math:: P \mathrel{+}= \operatorname{round}\bigl(h\, f(Q S_q) / S_p\bigr)

adds an integer that depends on ``Q`` alone, so subtracting it undoes the kick, whatever the force
and however long the run; drifts alike. Sums of integers round nothing off. Levesque & Verlet,
J. Stat. Phys. 72 (1993) 519; Rein & Tamayo, MNRAS 473 (2018) 3351 (JANUS).

Integers have 64 bits for every dtype of the state; that dtype is what the force sees. One step
is so large a sum of bits that float32 states gain by it, as from compensated sums.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from darboux._checks import ConvergenceError, checks_values, in_transform, values
from darboux.integrators.base import Integrator
from darboux.integrators.splitting import Splitting
from darboux.integrators.systems import Separable, Split, System

Spacings = tuple[float, float]  # of q and of p

# A coordinate of the size of the start has this many bits; ten more are left to grow into.
_BITS = 52
_LARGEST = 2.0**62
# Whether integers may have wrapped is asked once in so many steps.
_CHECK_EVERY = 32


@dataclass(frozen=True, kw_only=True, eq=False)
class LatticeSplitting(Integrator):
    """A splitting whose kicks and drifts are bijections of a lattice.

    Its derivative is that of the real method at the lattice points (straight-through), which
    differs from that of the real orbit by the spacing. States do not depend on where the run is
    cut into calls: neighbouring kicks share a force but are rounded one by one.
    """

    base: Splitting
    spacings: Spacings

    def check(self, system: System) -> None:
        if isinstance(system, Split):
            raise ValueError(
                "lattice=True needs the increments of a Separable system, got a Split, whose "
                "flows are not bijections of a lattice: build a flow of yours from "
                "darboux.integrators.lattice.rotate, or leave lattice out"
            )
        self.base.check(system)

    def advance(
        self,
        system: System,
        q: Tensor,
        p: Tensor,
        dt: float | Tensor,
        steps: int,
        memory: Any = None,
    ) -> tuple[Tensor, Tensor, Any]:
        """Take ``steps`` steps; the memory is the integers, the last slope and what it moved."""
        assert isinstance(system, Separable)
        if q.numel() == 0:
            return q, p, None
        if memory is None:
            memory = [place(x, s) for x, s in zip((q, p), self.spacings, strict=True)], None, None
        places, slope, last = list(memory[0]), *memory[1:]
        halves = system.velocity, system.force
        flows = [(kind, c * dt) for kind, c in self.base.flows]
        # In a graph each use of a state is one node, a view, at which its cotangents meet: so
        # they are summed in the order of the reversible gradient, to the same bits.
        graph = torch.is_grad_enabled() or in_transform()
        x = [q.view_as(q), p.view_as(p)] if graph else [q, p]
        for block in range(0, steps, _CHECK_EVERY):
            reach = [_largest(n) for n in places]
            for kind, h in flows * min(_CHECK_EVERY, steps - block):
                if kind != last:
                    seen = x[1 - kind].view_as(x[1 - kind]) if graph else x[1 - kind]
                    slope, last = halves[kind](seen), kind
                jump = increment(slope, h, self.spacings[kind])
                places[kind] = places[kind] + jump.to(torch.int64)
                reach[kind] = reach[kind] + _largest(jump)
                point = read(places[kind], self.spacings[kind], q.dtype)
                if graph:
                    moved = x[kind] + h * slope
                    point = _Settle.apply(moved, point)
                x[kind] = point
            _check_reach(reach, self.spacings)
        return x[0], x[1], (places, slope, last)

    def settle(self, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """Return the lattice points next to ``q`` and ``p``, differentiated as if they were."""
        pairs = zip((q, p), self.spacings, strict=True)
        points = [_Settle.apply(x, read(place(x, s), s, x.dtype)) for x, s in pairs]
        return points[0], points[1]


def on_lattice(
    method: Integrator,
    spacings: bool | float | Spacings,
    system: System,
    q: Tensor,
    p: Tensor,
    dt: Any,
) -> LatticeSplitting:
    """Return ``method`` on a lattice, with the ``spacings`` of q and p, or with fitting ones.

    Raises ``ValueError`` unless it is a splitting and the spacings are powers of two.
    """
    if not isinstance(method, Splitting):
        raise ValueError(
            f"lattice=True needs kicks and drifts, got {method.name}, whose steps are not "
            "bijections of a lattice: use an explicit splitting such as 'leapfrog' or 'bm4'"
        )
    if method.compensated:
        raise ValueError("lattice=True rounds off nothing: leave compensated out")
    LatticeSplitting(**method.facts(), base=method, spacings=(1.0, 1.0)).check(system)
    if spacings is True:
        fitting = fitting_spacings(system, q, p, dt)
    else:
        both = spacings if isinstance(spacings, tuple) else (spacings, spacings)
        fitting = float(both[0]), float(both[1])
        for s in fitting:
            if not (s > 0 and math.frexp(s)[0] == 0.5):
                raise ValueError(f"lattice: a spacing is {s}, expected a power of two")
    return LatticeSplitting(**method.facts(), base=method, spacings=fitting)


def fitting_spacings(system: System, q: Tensor, p: Tensor, dt: float | Tensor) -> Spacings:
    r"""Return :math:`2^{e - 52}` for ``q`` and ``p``, the start being at most :math:`2^e` large.

    Coordinates may grow a thousandfold. One that starts at zero counts as what 64 steps make of
    it at the first slope. Those of a batch share a spacing.
    """
    with torch.no_grad():
        slopes = system.field(q, p)
    found = []
    for x, slope in zip((q, p), slopes, strict=True):
        size = _size(x) or 64 * _size(slope * dt)
        found.append(math.ldexp(1.0, math.frexp(size or 1.0)[1] - _BITS))
    return found[0], found[1]


def place(x: Tensor, spacing: float) -> Tensor:
    """Return the integers (int64) of the lattice points next to ``x``."""
    return torch.round(x.detach().double() / spacing).to(torch.int64)


def read(places: Tensor, spacing: float, dtype: torch.dtype) -> Tensor:
    """Return the lattice points with the integers ``places``, rounded to ``dtype``."""
    return (places.double() * spacing).to(dtype)


def increment(slope: Tensor, h: float | Tensor, spacing: float) -> Tensor:
    """Return ``h slope`` in lattice units: float64 with an integral value."""
    with torch.no_grad():
        return torch.round(slope.detach().double() * (_still(h) / spacing))


def rotate(
    a: Tensor, b: Tensor, angle: float | Tensor, *, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    r"""Turn integers ``(a, b) -> (a cos - b sin, a sin + b cos)`` by a bijection.

    A turn by :math:`|\theta| \le \pi/4` is three shears, each of which adds a rounded function of
    the coordinate it keeps:

    .. math:: a \mathrel{-}= [\tan(\theta/2)\, b], \quad b \mathrel{+}= [\sin(\theta)\, a], \quad
              a \mathrel{-}= [\tan(\theta/2)\, b];

    quarter turns before it are exact. Off the true rotation by at most 1.5 units.
    ``inverse=True`` undoes the turn by that same ``angle``, exactly. ``angle`` broadcasts to
    ``a`` and ``b``, which must stay below 2^62. Paeth, Graphics Interface (1986) 77.

    >>> a, b = rotate(torch.tensor([1000]), torch.tensor([0]), 0.5)
    >>> a.item(), b.item(), rotate(a, b, 0.5, inverse=True)[0].item()
    (878, 479, 1000)
    """
    angle = torch.as_tensor(angle, dtype=torch.float64, device=a.device)
    quarters = torch.round(angle / (math.pi / 2))
    rest = angle - quarters * (math.pi / 2)
    turns = quarters.to(torch.int64) % 4
    half, full = torch.tan(rest / 2), torch.sin(rest)
    if not inverse:
        a, b = _quarters(a, b, turns)
        a = a - _rounded(half, b)
        b = b + _rounded(full, a)
        return a - _rounded(half, b), b
    a = a + _rounded(half, b)
    b = b - _rounded(full, a)
    a = a + _rounded(half, b)
    return _quarters(a, b, -turns % 4)


def _quarters(a: Tensor, b: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
    odd, far = turns % 2 == 1, turns >= 2
    a, b = torch.where(odd, -b, a), torch.where(odd, a, b)
    return torch.where(far, -a, a), torch.where(far, -b, b)


def _rounded(c: Tensor, x: Tensor) -> Tensor:
    return torch.round(c * x.double()).to(torch.int64)


class _Settle(torch.autograd.Function):
    # The value of the second argument with the derivative of the first.
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, point: Tensor) -> Tensor:
        return point.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        return bar, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, _: Any) -> Tensor:  # pyright: ignore
        return dx.clone()


def _still(h: float | Tensor) -> float | Tensor:
    return h.detach() if isinstance(h, Tensor) else h


def _size(x: Tensor) -> float:
    return float(values(x).abs().max()) if values(x).numel() else 0.0


def _largest(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.double(), math.inf)


def _check_reach(reach: list[Tensor], spacings: Spacings) -> None:
    # Where the integers were, and all jumps since: below this no sum can have wrapped. NaN in a
    # slope shows here too, and nowhere else, for an integer cannot hold it.
    if not checks_values():
        return
    for name, far, s in zip("qp", reach, spacings, strict=True):
        worst = float(values(far).max())
        if not worst <= _LARGEST:
            raise ConvergenceError(
                f"lattice: {name} may have reached {worst * s:.3g}, and its lattice of spacing "
                f"{s:.3g} ends at {_LARGEST * s:.3g}: give a larger spacing, lattice={s * 1024:.3g}"
                ", or a smaller dt if the motion should be bounded"
            )
