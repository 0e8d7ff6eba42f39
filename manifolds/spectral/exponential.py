r"""The exponential :math:`e^{-tA} u` of the whole operator, by one factorisation and no time steps.

A rational function with one real pole,

.. math:: e^{-x} \approx p\left(\frac{1}{1 + x/\gamma}\right), \qquad
          e^{-tA}u \approx p(B)\,u, \quad B = (M + tK/\gamma)^{-1} M,

with p the interpolant of degree m at Chebyshev's points of [0, 1] and :math:`\gamma = m/\sqrt2`.
The error falls as :math:`(\sqrt2 - 1)^m`, uniformly in x from zero to infinity, so in t and in the
mesh too; p(1) = 1 keeps the constant and p(0) = 0 damps the highest modes (L-stable).
Saff, Schönhage and Varga (1976), Numer. Math. 25; Andersson (1981), J. Approx. Theory 32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from darboux._checks import GeometryError, check_that
from darboux.manifolds.spectral.operator import Operator, Pattern, Sparse
from darboux.manifolds.spectral.solve import solver


def exponential(operator: Operator, u: Tensor, t: Tensor, tolerance: float) -> Tensor:
    """Return ``exp(-t A) u`` for ``u (..., n, m)`` and one time, to ``tolerance`` in the M-norm."""
    c, gamma = coefficients(tolerance)
    step = _resolvent(operator, t / gamma)
    # Clenshaw's recurrence in y = 2 B - 1
    one, two = c[-1] * u, torch.zeros_like(u)
    for weight in c[-2:0:-1]:
        one, two = weight * u + 2 * (2 * step(one) - one) - two, one
    return c[0] * u + (2 * step(one) - one) - two


def _resolvent(operator: Operator, step: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the function ``x -> (M + step K)⁻¹ M x``."""
    stiffness, mass = operator.stiffness, operator.mass
    if isinstance(stiffness, Sparse) and isinstance(mass, Sparse):
        solve = solver(add(mass, stiffness, step), "diffuse")
        return lambda x: solve(mass @ x)
    assert isinstance(stiffness, Tensor)
    assert isinstance(mass, Tensor)
    factor, info = torch.linalg.cholesky_ex(mass + step * stiffness)
    check_that("diffuse", lambda: info == 0, "M + t K is not positive definite", GeometryError)
    return lambda x: torch.cholesky_solve(mass @ x, factor)


def add(one: Sparse, other: Sparse, factor: Tensor | float = 1.0) -> Sparse:
    """Return ``one + factor * other``; their patterns may differ."""
    if one.pattern is other.pattern:
        return Sparse(one.pattern, one.values + factor * other.values)
    p, q = one.pattern, other.pattern
    rows, cols = torch.cat([p.rows, q.rows]), torch.cat([p.cols, q.cols])
    pattern, where = Pattern.of(rows, cols, p.size)
    return pattern.assemble(where, torch.cat([one.values, factor * other.values]))


@lru_cache(maxsize=16)
def coefficients(tolerance: float) -> tuple[list[float], float]:
    """Return Chebyshev's coefficients of ``exp(-x)`` in ``2 / (1 + x / gamma) - 1``, and gamma."""
    x = np.concatenate([[0.0], np.logspace(-4, 4, 2000)])
    for m in range(4, 48):
        gamma, k = m / math.sqrt(2), np.arange(m + 1)
        nodes = np.cos(np.pi * k / m)
        with np.errstate(divide="ignore", over="ignore"):
            values = np.exp(-gamma * (2 / (1 + nodes) - 1))
        ends = np.where((k == 0) | (k == m), 0.5, 1.0)
        c = 2 / m * ends * (np.cos(np.pi * np.outer(k, k) / m) @ (ends * values))
        seen = np.polynomial.chebyshev.chebval(2 / (1 + x / gamma) - 1, c)
        if np.abs(seen - np.exp(-x)).max() < tolerance:
            return c.tolist(), gamma
    raise ValueError(f"diffuse: tolerance is {tolerance}, expected at least 1e-14")
