"""Compositions: a symmetric method of order 2 raised to order 4, 6 or 8 by step weights.

Any method with the right symmetry will do, implicit ones and those on doubled phase space
included. The weights are those of the compositions in ``splitting_table``.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from darboux.integrators.base import Integrator
from darboux.integrators.implicit import LOBATTOS
from darboux.integrators.splitting_table import SPLITTINGS
from darboux.integrators.systems import System

SCHEMES = {m.name: m for m in SPLITTINGS if len(m.weights) > 1}


@dataclass(frozen=True, kw_only=True, eq=False)
class Composition(Integrator):
    r"""Steps of ``base``, of the lengths ``weights`` times ``dt``.

    .. math:: \Psi_h = \Phi_{w_m h} \circ \dots \circ \Phi_{w_1 h}, \qquad \sum w_i = 1

    It keeps what ``base`` keeps: symplecticity, invariants, energy. ``base`` carries its memory
    from each step to the next. Hairer, Lubich & Wanner (2006), V.3.2.
    """

    base: Integrator
    weights: tuple[float, ...]

    def check(self, system: System) -> None:
        """Accept what ``base`` accepts."""
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
        """Take ``steps`` steps; the memory is that of ``base``."""
        lengths = [w * dt for w in self.weights]
        for _ in range(steps):
            for length in lengths:
                q, p, memory = self.base.advance(system, q, p, length, 1, memory)
        return q, p, memory


def compose(base: Integrator, scheme: str, name: str | None = None) -> Composition:
    """Return ``base``, symmetric and of order 2, composed with the weights of ``scheme``.

    ``scheme`` is the name of a composition among the splittings: ``yoshida4``, ``suzuki4``,
    ``kahan_li6``, ``kahan_li8`` and so on. Raises ``ValueError`` for another one, or where
    ``base`` has another order, which these weights would not raise as told.

    >>> from darboux.integrators import METHODS
    >>> compose(METHODS["implicit_midpoint"], "kahan_li6").order
    6
    """
    if scheme not in SCHEMES:
        raise ValueError(f"compose: scheme is {scheme!r}, expected one of {', '.join(SCHEMES)}")
    if base.order != 2:
        raise ValueError(
            f"compose: {base.name} has order {base.order}, expected a symmetric method of order 2"
        )
    row = SCHEMES[scheme]
    return Composition(
        name=name or f"{base.name}_{scheme}",
        order=row.order,
        symplectic=base.symplectic,
        symmetric=base.symmetric,
        explicit=base.explicit,
        source=f"{base.source}; weights: {row.source}",
        base=base,
        weights=row.weights,
    )


# The usual weights of each order: of those with few stages the ones with small errors.
USUAL = {4: "suzuki4", 6: "kahan_li6", 8: "kahan_li8"}

COMPOSITIONS = tuple(
    compose(LOBATTOS[0], scheme, f"generalized_leapfrog{order}") for order, scheme in USUAL.items()
)
