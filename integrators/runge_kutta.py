"""Explicit Runge-Kutta methods: one table of Butcher rows, the honest baselines.

None is symplectic (an explicit Runge-Kutta method cannot be): their energy drifts. They move
any system. To add one, add a row.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from darboux.integrators.base import Integrator
from darboux.integrators.systems import System, packed


@dataclass(frozen=True, kw_only=True, eq=False)
class ExplicitRungeKutta(Integrator):
    r"""The method of a strictly lower triangular tableau.

    .. math:: k_i = f(z + h \sum_{j<i} a_{ij} k_j), \qquad z' = z + h \sum_i b_i k_i
    """

    symplectic: bool = False
    symmetric: bool = False
    explicit: bool = True
    matrix: tuple[tuple[float, ...], ...]  # rows a_2, a_3, ...; the first stage is z itself
    weights: tuple[float, ...]

    def check(self, system: System) -> None:
        """Accept every system."""

    def advance(
        self,
        system: System,
        q: Tensor,
        p: Tensor,
        dt: float | Tensor,
        steps: int,
        memory: Any = None,
    ) -> tuple[Tensor, Tensor, None]:
        """Take ``steps`` steps; there is no memory."""
        d = q.shape[-1]
        field = packed(system, d)
        z = torch.cat([q, p], -1)
        for _ in range(steps):
            k = [field(z)]
            for row in self.matrix:
                k.append(field(_moved(z, dt, row, k)))
            z = _moved(z, dt, self.weights, k)
        return z[..., :d], z[..., d:], None


def _moved(z: Tensor, dt: float | Tensor, row: tuple[float, ...], k: list[Tensor]) -> Tensor:
    return z + dt * sum(a * slope for a, slope in zip(row, k, strict=True) if a)


RUNGE_KUTTAS = (
    ExplicitRungeKutta(
        name="euler",
        order=1,
        matrix=(),
        weights=(1.0,),
        source="Euler 1768",
    ),
    ExplicitRungeKutta(
        name="midpoint",
        order=2,
        matrix=((1 / 2,),),
        weights=(0.0, 1.0),
        source="Runge, Math. Ann. 46 (1895) 167",
    ),
    ExplicitRungeKutta(
        name="heun2",
        order=2,
        matrix=((1.0,),),
        weights=(1 / 2, 1 / 2),
        source="Heun, Z. Math. Phys. 45 (1900) 23",
    ),
    ExplicitRungeKutta(
        name="rk4",
        order=4,
        matrix=((1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)),
        weights=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
        source="Kutta, Z. Math. Phys. 46 (1901) 435",
    ),
)
