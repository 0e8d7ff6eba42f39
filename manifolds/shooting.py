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


def shoot(
    where: str, field: Field, z: Tensor, steps: int | None, dense: bool = False, *, d: int
) -> Shot:
    """Solve ``z' = field(z)`` from ``z (..., m)``, of which ``d`` are positions, over unit time.

    With ``steps=None`` the number of steps follows from the smoothness of the solution: the
    roughest of the batch decides. ``dense`` asks for accuracy between the step ends as well; at
    the ends the solution superconverges. Raises ``GeometryError`` when no solution is found.
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
            residual = _roughness(field, shot, d)
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


def _roughness(field: Field, shot: Shot, d: int) -> float:
    """Return what a step leaves unresolved of the motion, relative to it, row by row.

    The last Legendre coefficients of the slopes, and their defect between the stages, where a
    narrow feature of the metric may hide.
    """
    with torch.no_grad():
        states, slopes = shot.states.detach(), shot.slopes.detach()
        n = slopes.shape[0]
        if slopes.numel() == 0:
            return 0.0
        at_test = torch.as_tensor(_test()).to(slopes)
        tail = legendre_tail(slopes)
        t = (torch.arange(n).to(slopes)[:, None] + torch.as_tensor(_test_times()).to(slopes)) / n
        z = evaluate(Shot(states, slopes), t.flatten()).unflatten(0, t.shape)
        defect = field(z) - torch.einsum("as,ns...->na...", at_test, slopes)
        unresolved = torch.cat([tail, defect / 10], 1).abs().amax((0, 1)) / n
        # positions are measured by how far they go, momenta and the like by their size
        sizes = slopes.abs().amax((0, 1)), states.abs().amax(0)
        parts = [u.amax(-1) for u in unresolved.split((d, unresolved.shape[-1] - d), -1)]
        sizes = sizes[0][..., :d].amax(-1), sizes[1][..., d:].amax(-1)
        ratios = [torch.where(u > 0, u / s, 0.0) for u, s in zip(parts, sizes, strict=True)]
        return float(values(torch.maximum(*ratios)).max())


def legendre_tail(nodal: Tensor) -> Tensor:
    """Return the last two Legendre coefficients of values at the stages, ``(n, 2, ...)``."""
    last = torch.as_tensor(_to_legendre()[-2:]).to(nodal)
    return torch.einsum("as,ns...->na...", last, nodal)


@lru_cache
def _test_times() -> np.ndarray:
    return (legendre.leggauss(STAGES + 3)[0] + 1) / 2


@lru_cache
def _test() -> np.ndarray:
    # from slopes at the stages to slopes at the test times
    return legendre.legvander(2 * _test_times() - 1, STAGES - 1) @ _to_legendre()


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
