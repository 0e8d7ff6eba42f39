r"""The geodesic from a point in a direction: an initial value problem in phase space.

Geodesics are the motions of :math:`H = \tfrac12 g^{ij}p_ip_j`; Gauss collocation with eight
stages keeps their symplectic structure and is accurate to round-off in a handful of steps,
each of which evaluates the metric a few times on all stages at once. The number of steps is
doubled until the Legendre expansion of the solution on every step has died out.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.polynomial import legendre
from torch import Tensor

from darboux._checks import ConvergenceError, GeometryError, values
from darboux.integrators import gauss_legendre, solve_stages

Field = Callable[[Tensor], Tensor]

STAGES = 8
MAX_STEPS = 256


class Shot(NamedTuple):
    """A solution on [0, 1] in ``n`` equal steps: states ``(n + 1, ..., m)``, slopes by step."""

    states: Tensor  # (n + 1, ..., m)
    slopes: Tensor  # (n, s, ..., m)

    @property
    def end(self) -> Tensor:
        return self.states[-1]


@lru_cache
def _to_legendre() -> np.ndarray:
    roots, weights = legendre.leggauss(STAGES)
    degree = np.arange(STAGES)
    return (2 * degree + 1)[:, None] / 2 * legendre.legvander(roots, STAGES - 1).T * weights


def shoot(where: str, field: Field, z: Tensor, steps: int | None, dense: bool = False) -> Shot:
    """Solve ``z' = field(z)`` from ``z (..., m)`` over unit time.

    With ``steps=None`` the number of steps follows from the smoothness of the solution: the
    largest of the whole batch decides. ``dense`` asks for accuracy between the step ends as
    well; at the ends the solution superconverges. Raises ``GeometryError`` when no solution is
    found.
    """
    if steps is not None:
        return _shoot(field, z, steps)
    eps = torch.finfo(z.dtype).eps
    tol = max(1e-10 if dense else 1e-6, 1e3 * eps)
    n, shot, residual = 2, None, float("inf")
    while n <= MAX_STEPS:
        try:
            shot = _shoot(field, z, n)
        except ConvergenceError as error:
            residual = error.residual
        else:
            residual = _tail(shot)
            if residual <= tol:
                return shot
        n *= 2
    raise GeometryError(
        f"{where}: the geodesic could not be followed (residual {residual:.1e} in {n // 2} steps); "
        "it leaves the chart, or is too long for it"
    )


def _shoot(field: Field, z: Tensor, n: int) -> Shot:
    states, slopes, stages = [z], [], None
    for _ in range(n):
        stages = solve_stages(
            field, states[-1], 1.0 / n, gauss_legendre(STAGES), guess=stages, rows_alone=True
        )
        states.append(states[-1] + stages.increment)
        slopes.append(stages.slopes)
    return Shot(torch.stack(states), torch.stack(slopes))


def _tail(shot: Shot) -> float:
    # size of the last Legendre coefficients of the motion within a step, relative to the state
    last = _to_legendre()[-2:]
    last = torch.as_tensor(last, dtype=shot.slopes.dtype, device=shot.slopes.device)
    coefficients = values(torch.einsum("as,ns...->na...", last, shot.slopes.detach())).abs()
    if coefficients.numel() == 0:
        return 0.0
    size = max(1.0, float(values(shot.states).abs().max()))
    return float(coefficients.max()) / (shot.slopes.shape[0] * size)


def nodes(shot: Shot) -> Tensor:
    """Return the states at the Gauss points of every step, ``(n, s, ..., m)``."""
    a = torch.as_tensor(gauss_legendre(STAGES).A).to(shot.slopes) / shot.slopes.shape[0]
    return shot.states[:-1, None] + torch.einsum("ij,nj...->ni...", a, shot.slopes)


def evaluate(shot: Shot, ts: Tensor) -> Tensor:
    """Evaluate the collocation polynomial at times ``ts (time,)`` in [0, 1]: ``(time, ..., m)``."""
    n = shot.slopes.shape[0]
    index = (ts * n).floor().clamp(0, n - 1).long()
    local = (ts * n - index) * 2 - 1
    # integral of P_j from -1 to u is (P_{j+1}(u) - P_{j-1}(u)) / (2 j + 1)
    p = [torch.ones_like(local), local]
    for j in range(1, STAGES):
        p.append(((2 * j + 1) * local * p[j] - j * p[j - 1]) / (j + 1))
    integrals = [1 + local] + [(p[j + 1] - p[j - 1]) / (2 * j + 1) for j in range(1, STAGES)]
    weights = torch.stack(integrals, -1) / (2 * n)
    to_legendre = torch.as_tensor(_to_legendre(), dtype=ts.dtype, device=ts.device)
    weights = weights @ to_legendre  # (time, s)
    slopes = shot.slopes[index]
    tail = slopes.dim() - 2
    return shot.states[index] + (weights.reshape(*weights.shape, *[1] * tail) * slopes).sum(1)
