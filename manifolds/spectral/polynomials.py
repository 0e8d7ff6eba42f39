"""Legendre polynomials on an interval, and products of bases: boxes, cylinders, annuli."""

from __future__ import annotations

import math
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from darboux import _checks
from darboux.manifolds.spectral.bases import Basis

_BOUNDARIES = ("neumann", "dirichlet")


class Legendre(Basis):
    r"""Polynomials of degree at most N on the interval ``(low, high)``.

    ``boundary`` is "neumann" or "dirichlet", or one for each end. With Neumann ends, the natural
    condition, they are the normalised :math:`P_k`; with a Dirichlet end the combinations of
    neighbours that vanish there, :math:`P_k - P_{k+2}` for both ends. Shen, SIAM J. Sci. Comput. 15
    (1994) 1489. Quadrature by ``nodes`` Gauss-Legendre points (2 N + 4 unless told).

    >>> Legendre(8, "dirichlet").size
    7
    """

    def __init__(
        self,
        degree: int,
        boundary: str | tuple[str, str] = "neumann",
        bounds: tuple[float, float] = (-1.0, 1.0),
        *,
        nodes: int | None = None,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
    ):
        ends = (boundary, boundary) if isinstance(boundary, str) else tuple(boundary)
        if len(ends) != 2 or not set(ends) <= set(_BOUNDARIES):
            raise ValueError(
                f"Legendre: boundary is {boundary!r}, expected 'neumann' or 'dirichlet', or two"
            )
        low, high = bounds
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"Legendre: bounds is {bounds}, expected two numbers low < high")
        fixed = ends.count("dirichlet")
        if degree < fixed:
            raise ValueError(f"Legendre: degree is {degree}, expected at least {fixed}")
        count = nodes or 2 * degree + 4
        if count <= degree:
            raise ValueError(f"Legendre: nodes is {nodes}, expected more than {degree}")
        self.degree, self.boundary, self.bounds = degree, ends, (float(low), float(high))
        self.dim, self.size = 1, degree + 1 - fixed
        k = np.arange(degree + 1)
        mix = np.diag(np.sqrt((2 * k + 1) / (high - low)))
        if fixed:
            step = {("dirichlet", "neumann"): 1.0, ("neumann", "dirichlet"): -1.0}
            mix = np.eye(degree + 1, self.size)
            mix += step.get(ends, -1.0) * np.eye(degree + 1, self.size, -fixed)
            mix /= np.sqrt(4 * k[: self.size] + 6)
        z, w = np.polynomial.legendre.leggauss(count)
        half = 0.5 * (high - low)
        self._mix = torch.as_tensor(mix, dtype=dtype, device=device)
        self.points = torch.as_tensor((low + half * (1 + z))[:, None], dtype=dtype, device=device)
        self.weights = torch.as_tensor(half * w, dtype=dtype, device=device)

    def evaluate(self, x: Tensor) -> Tensor:
        return self._jet("evaluate", x)[0] @ self._mix

    def gradient(self, x: Tensor) -> Tensor:
        return (self._jet("gradient", x)[1] @ self._mix)[..., None]

    def _jet(self, method: str, x: Tensor) -> tuple[Tensor, Tensor]:
        _checks.check_last(f"Legendre.{method}", "x", x, 1)
        low, high = self.bounds
        slope = 2 / (high - low)
        z = (x[..., 0] - low) * slope - 1
        p, dp = [torch.ones_like(z), z], [torch.zeros_like(z), torch.ones_like(z)]
        for k in range(1, self.degree):
            p.append(((2 * k + 1) * z * p[-1] - k * p[-2]) / (k + 1))
            dp.append(dp[-2] + (2 * k + 1) * p[-2])
        size = self.degree + 1
        return torch.stack(p[:size], -1), slope * torch.stack(dp[:size], -1)


class ProductBasis(Basis):
    """All products of one function of each factor, in the coordinates of all, last factor fastest.

    The factors are bases in chart coordinates: ``Fourier``, ``Legendre`` or products again.

    >>> ProductBasis(Legendre(4, "dirichlet"), Legendre(4)).size
    15
    """

    def __init__(self, *factors: Basis):
        if len(factors) < 1 or any(f.points.shape[-1] != f.dim for f in factors):
            raise ValueError(
                f"ProductBasis: factors is {[f.name for f in factors]}, expected bases in chart "
                "coordinates"
            )
        self.factors = factors
        self.dim = sum(f.dim for f in factors)
        self.size = math.prod(f.size for f in factors)
        cells = torch.cartesian_prod(*[torch.arange(len(f.points)) for f in factors])
        cells = cells.reshape(-1, len(factors)).to(factors[0].points.device)
        every = list(zip(factors, cells.unbind(-1), strict=True))
        self.points = torch.cat([f.points[i] for f, i in every], -1)
        self.weights = reduce(torch.mul, [f.weights[i] for f, i in every])

    def evaluate(self, x: Tensor) -> Tensor:
        return reduce(_kronecker, [f.evaluate(part) for f, part in self._parts("evaluate", x)])

    def gradient(self, x: Tensor) -> Tensor:
        parts = self._parts("gradient", x)
        values = [f.evaluate(part) for f, part in parts]
        slopes = []
        for i, (factor, part) in enumerate(parts):
            rates = factor.gradient(part).unbind(-1)
            slopes += [reduce(_kronecker, [*values[:i], r, *values[i + 1 :]]) for r in rates]
        return torch.stack(slopes, -1)

    def _parts(self, method: str, x: Tensor) -> list[tuple[Basis, Tensor]]:
        _checks.check_last(f"ProductBasis.{method}", "x", x, self.dim)
        return list(zip(self.factors, x.split([f.dim for f in self.factors], -1), strict=True))


def _kronecker(a: Tensor, b: Tensor) -> Tensor:
    return (a[..., :, None] * b[..., None, :]).flatten(-2)
