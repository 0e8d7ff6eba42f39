r"""The token-bump metric on a flat torus: matrix elements in closed form, and a streaming spectrum.

.. math:: g = I + \sum_i \alpha_i\,\theta_i(x)\,v_iv_i^T, \qquad
          \theta_i(x) = \sum_{\ell\in\Lambda} e^{-|x - \mu_i - \ell|^2/2\sigma_i^2}

To first order in :math:`\alpha`, :math:`\delta\sqrt g = \tfrac12\alpha|v|^2\theta` and
:math:`\delta(\sqrt g\,g^{-1}) = \alpha(\tfrac12|v|^2 I - vv^T)\theta`, and the Fourier coefficients
of a periodised Gaussian are those of the Gaussian.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from darboux import _checks
from darboux._checks import GeometryError
from darboux.manifolds.learned import TokenBumps
from darboux.manifolds.linalg import dot, outer
from darboux.manifolds.spectral.bases import Fourier
from darboux.manifolds.spectral.operator import Operator
from darboux.manifolds.spectral.perturbation import _groups


def periodised(bumps: TokenBumps, basis: Fourier) -> Callable[[Tensor], Tensor]:
    """Return the bump metric summed over the lattice of ``basis``, ``(q, d) -> (..., q, d, d)``.

    ``bumps`` may have leading dimensions, which come first in the result. Images further than the
    rounding error of a Gaussian are left out.
    """
    _check(bumps, basis, "periodised")
    generators = basis._generators
    # |l + y| > reach for all y in a cell around zero once l is beyond reach + its diameter
    eps = torch.finfo(basis.points.dtype).eps
    reach = float(_checks.values(bumps.sigma).max()) * math.sqrt(-2 * math.log(1e-2 * eps))
    reach += np.abs(generators).sum()
    counts = np.ceil(reach * np.linalg.norm(np.linalg.inv(generators), axis=0)).astype(int)
    cells = np.array(list(itertools.product(*[range(-c, c + 1) for c in counts])))
    shifts = cells @ generators
    shifts = shifts[np.linalg.norm(shifts, axis=1) <= reach]
    images = torch.as_tensor(shifts, dtype=basis.points.dtype, device=basis.points.device)
    inverse = torch.as_tensor(np.linalg.inv(generators)).to(images)

    def metric(x: Tensor) -> Tensor:
        y = x[:, None] - bumps.centers[..., None, :, :]  # (..., q, n, d)
        y = y - torch.round(y.detach() @ inverse) @ basis.lattice  # near zero
        spread = (bumps.sigma.square() + torch.zeros_like(bumps.amplitudes))[..., None, :]
        theta = torch.zeros_like(y[..., 0])
        for image in images:
            theta = theta + torch.exp(-0.5 * dot(y - image, y - image) / spread)
        v = bumps.directions[..., None, :, :]
        heights = bumps.amplitudes[..., None, :] * theta
        eye = torch.eye(bumps.dim, dtype=x.dtype, device=x.device)
        return eye + v.mT @ (heights[..., None] * v)

    return metric


class Elements(NamedTuple):
    """The first-order changes of the two matrices, each ``(..., K, K)``."""

    d_stiffness: Tensor
    d_mass: Tensor


def bump_elements(basis: Fourier, bumps: TokenBumps, *, each: bool = False) -> Elements:
    r"""Return the first-order changes of stiffness and mass by bumps on the flat torus, exactly.

    .. math:: \delta M_{mk} = \tfrac12\alpha|v|^2 G_{k-m}, \qquad
        \delta K_{mk} = \alpha\bigl(\tfrac12|v|^2\,m\cdot k - (v\cdot m)(v\cdot k)\bigr)G_{k-m},
        \qquad G_d = (2\pi\sigma^2)^{n/2}\,e^{-\sigma^2|d|^2/2}\,e^{-id\cdot\mu}

    in complex waves, turned into the real functions of ``basis``; any lattice. Summed over the
    bumps, or with ``each`` one matrix for each, ``(..., n, K, K)``: O(K²) a bump. Differentiable in
    all that bumps depend on.
    """
    _check(bumps, basis, "bump_elements")
    shape = tuple(4 * int(top) + 1 for top in basis.modes.abs().amax(0).tolist())
    kappa = basis.table_frequencies(shape)  # (T, d)
    v, sigma = bumps.directions, bumps.sigma
    variance = (sigma.square() + torch.zeros_like(bumps.amplitudes))[..., None]
    size = (2 * math.pi * variance) ** (basis.dim / 2)
    size = bumps.amplitudes[..., None] * size * torch.exp(-0.5 * variance * kappa.square().sum(-1))
    phase = bumps.centers @ kappa.mT
    table = torch.complex(size * phase.cos(), -size * phase.sin())  # (..., n, T)
    half = 0.5 * dot(v, v)
    eye = torch.eye(basis.dim, dtype=v.dtype, device=v.device)
    form = half[..., None, None] * eye - outer(v, v)
    if each:
        field = table[..., None, None] * form[..., None, :, :]
        density = table * half[..., None]
    else:
        field = torch.einsum("...nt,...nab->...tab", table, form.to(table.dtype))
        density = torch.einsum("...nt,...n->...t", table, half.to(table.dtype))
    return Elements(*basis.elements(field, density, shape))


class LowRank(NamedTuple):
    """The symmetric matrix ``Z^T diag(signs) Z``: ``factors (r, K)`` are Z, ``signs (r,)``."""

    factors: Tensor
    signs: Tensor

    def dense(self) -> Tensor:
        """Return the matrix ``(K, K)``."""
        return self.factors.mT @ (self.signs[:, None] * self.factors)


def low_rank_elements(
    basis: Fourier, bumps: TokenBumps, *, nodes: int = 1
) -> tuple[LowRank, LowRank]:
    r"""Return the changes of :func:`bump_elements` as products of few vectors, summed over bumps.

    By Gauss-Hermite quadrature with ``nodes`` a dimension around each centre: rank ``nodes ** d`` a
    bump for the mass and d + 1 times that for the stiffness. One node is the point mass, right to
    second order in :math:`\sigma\kappa`; the error falls exponentially with their number. ``bumps``
    without leading dimensions.
    """
    _check(bumps, basis, "low_rank_elements")
    if bumps.centers.dim() != 2:
        raise ValueError(
            f"low_rank_elements: centers has shape {tuple(bumps.centers.shape)}, expected (n, d)"
        )
    d = basis.dim
    z, w = np.polynomial.hermite.hermgauss(nodes)
    z = np.array(list(itertools.product(z, repeat=d)))
    w = np.array([math.prod(p) for p in itertools.product(w, repeat=d)])
    offsets, weights = (torch.as_tensor(a).to(bumps.centers) for a in (z, w))
    sigma = bumps.sigma + torch.zeros_like(bumps.amplitudes)
    points = bumps.centers[:, None] + math.sqrt(2.0) * sigma[:, None, None] * offsets
    heights = bumps.amplitudes * (2 * sigma.square()) ** (d / 2)
    heights = heights[:, None] * weights  # (n, r)
    v = bumps.directions
    half = (0.5 * dot(v, v)[:, None] * heights).sqrt()
    gradients = basis.gradient(points)  # (n, r, K, d)
    mass = (half[..., None] * basis.evaluate(points)).flatten(0, 1)
    across = (half[..., None, None] * gradients).movedim(-1, 0).flatten(0, 2)
    along = (heights.sqrt()[..., None] * (gradients * v[:, None, None]).sum(-1)).flatten(0, 1)
    ones = torch.ones_like(across[:, 0])
    signs = torch.cat([ones, -torch.ones_like(along[:, 0])])
    stiffness = LowRank(torch.cat([across, along]), signs)
    return stiffness, LowRank(mass, torch.ones_like(mass[:, 0]))


def _check(bumps: TokenBumps, basis: Fourier, where: str) -> None:
    if not isinstance(bumps, TokenBumps):
        raise TypeError(f"{where}: bumps is a {type(bumps).__name__}, expected a TokenBumps")
    if bumps.dim != basis.dim:
        raise ValueError(
            f"{where}: bumps has dimension {bumps.dim}, expected {basis.dim} to match the basis"
        )


# -- a spectrum that follows its operator -------------------------------------------------


@dataclass(frozen=True, eq=False)
class StreamingSpectrum:
    r"""The ``k`` lowest eigenpairs in a fixed basis of K functions, updated in O(K²) a token.

    Kept are all eigenvectors at the last solve and, in them, the changes of both matrices since.
    Eigenvalues are of second order in these, eigenvectors of first, with close states as blocks
    (:mod:`~darboux.manifolds.spectral.perturbation`). Once the first-order change of a tracked
    function, ``drift``, is larger than ``tolerance``, all is solved anew, O(K³); so the relative
    error of the values stays of the order of its cube. An update gives a new object.

    >>> stream = StreamingSpectrum.start(Operator(torch.diag(torch.arange(4.0)), torch.eye(4)), 2)
    >>> stream.update(LowRank(0.1 * torch.ones(1, 4), torch.ones(1)), None).values
    tensor([0.0098, 1.0100])
    """

    k: int
    tolerance: float
    spacing: float
    levels: Tensor
    frame: Tensor
    d_stiffness: Tensor
    d_mass: Tensor
    places: Tensor
    values: Tensor
    coordinates: Tensor
    drift: float
    solves: int

    @staticmethod
    def start(
        operator: Operator, k: int | None = None, *, tolerance: float = 0.1, spacing: float = 0.05
    ) -> StreamingSpectrum:
        """Solve a dense operator ``(K, K)`` and follow its ``k`` lowest states (all unless told).

        States closer than ``spacing`` times the mean distance of neighbours form a block.
        """
        if operator.sparse or len(operator.stiffness.shape) != 2:
            raise ValueError("StreamingSpectrum: the operator is not one dense matrix (K, K)")
        n = operator.size
        if k is not None and not 1 <= k <= n:
            raise ValueError(f"StreamingSpectrum: k is {k}, expected 1 to {n}")
        if not tolerance > 0:
            raise ValueError(f"StreamingSpectrum: tolerance is {tolerance}, expected more than 0")
        levels, frame = _eigenbasis(operator)
        return _solved(k or n, tolerance, spacing, levels, frame, 1)

    @property
    def functions(self) -> Tensor:
        """The eigenfunctions ``(K, k)`` in the fixed basis: one product, O(K² k)."""
        return self.frame @ self.coordinates

    def update(
        self, d_stiffness: LowRank | Tensor | None, d_mass: LowRank | Tensor | None
    ) -> StreamingSpectrum:
        """Add changes to both matrices; O(r K²) for low rank r, O(K³) for full matrices."""
        changes = []
        for name, total, change in (
            ("d_stiffness", self.d_stiffness, d_stiffness),
            ("d_mass", self.d_mass, d_mass),
        ):
            if change is None:
                changes.append(total)
                continue
            rows = change.factors if isinstance(change, LowRank) else change
            if rows.shape[-1] != len(self.frame):
                raise ValueError(
                    f"StreamingSpectrum.update: {name} has {rows.shape[-1]} columns, expected "
                    f"{len(self.frame)}"
                )
            _checks.check_finite("StreamingSpectrum.update", **{name: rows})
            moved = rows.detach() @ self.frame
            if isinstance(change, LowRank):
                changes.append(total + moved.mT @ (change.signs[:, None] * moved))
            else:
                changes.append(total + self.frame.mT @ moved)
        stiffness, mass = changes
        values, coordinates, drift = _second_order(
            self.levels, stiffness, mass, self.places, self.k
        )
        if drift > self.tolerance:
            eye = torch.eye(len(self.levels)).to(self.levels)
            levels, vectors = _eigenbasis(Operator(torch.diag(self.levels) + stiffness, eye + mass))
            frame = self.frame @ vectors
            return _solved(self.k, self.tolerance, self.spacing, levels, frame, self.solves + 1)
        return replace(
            self,
            d_stiffness=stiffness,
            d_mass=mass,
            values=values,
            coordinates=coordinates,
            drift=drift,
        )


def _eigenbasis(operator: Operator) -> tuple[Tensor, Tensor]:
    """Return all eigenpairs of a dense operator, M-orthonormal, without a graph."""
    assert isinstance(operator.stiffness, Tensor)
    assert isinstance(operator.mass, Tensor)
    low, info = torch.linalg.cholesky_ex(operator.mass.detach())
    if bool(info != 0):
        raise GeometryError("StreamingSpectrum: the mass matrix is not positive definite")
    half = torch.linalg.solve_triangular(low, operator.stiffness.detach(), upper=False)
    reduced = torch.linalg.solve_triangular(low, half.mT, upper=False)
    values, vectors = torch.linalg.eigh(0.5 * (reduced + reduced.mT))
    return values, torch.linalg.solve_triangular(low.mT, vectors, upper=True)


def _solved(
    k: int, tolerance: float, spacing: float, levels: Tensor, frame: Tensor, solves: int
) -> StreamingSpectrum:
    mean = (levels[-1] - levels[0]) / len(levels)
    groups = [g for g in _groups(levels, (spacing * mean).expand(len(levels))) if g.start < k]
    widest = max(g.stop - g.start for g in groups)
    # the states of each block, filled up with -1: (blocks, widest)
    rows = [[*range(g.start, g.stop)] + [-1] * (widest - g.stop + g.start) for g in groups]
    zero = torch.zeros_like(frame)
    eye = torch.eye(len(levels), k, dtype=levels.dtype, device=levels.device)
    return StreamingSpectrum(
        k,
        tolerance,
        spacing,
        levels,
        frame,
        zero,
        zero,
        torch.tensor(rows, device=levels.device),
        levels[:k],
        eye,
        0.0,
        solves,
    )


def _second_order(
    levels: Tensor, d_stiffness: Tensor, d_mass: Tensor, places: Tensor, k: int
) -> tuple[Tensor, Tensor, float]:
    """Return values ``(k,)``, coordinates ``(K, k)`` and the drift, for all blocks at once."""
    real = places >= 0
    index = places.clamp(min=0)
    level = levels[index]  # (B, m)
    pair = real[:, :, None] & real[:, None, :]

    def within(a: Tensor) -> Tensor:
        return torch.where(pair, a[index[:, :, None], index[:, None, :]], 0.0)

    stiffness_columns, mass_columns = d_stiffness[:, index], d_mass[:, index]  # (K, B, m)
    gaps = level - levels[:, None, None]
    states = torch.arange(len(levels), device=levels.device)
    outside = (states[:, None, None] != places).all(-1, keepdim=True) & real
    x = torch.where(outside, (stiffness_columns - mass_columns * level) / gaps, 0.0)

    def product(a: Tensor, b: Tensor) -> Tensor:
        return torch.einsum("jba,jbc->bac", a, b)

    k1, m1 = within(d_stiffness), within(d_mass)
    k2 = product(stiffness_columns, x)
    k2 = torch.where(pair, k2 + k2.mT, 0.0) + product(x, levels[:, None, None] * x)
    m2 = product(mass_columns, x)
    m2 = torch.where(pair, m2 + m2.mT, 0.0) + product(x, x)
    h0 = torch.diag_embed(torch.where(real, level, 0.0))

    def both(a: Tensor, b: Tensor) -> Tensor:
        return a @ b + b @ a

    # as in perturbation.schrieffer_wolff
    h = h0 + k1 - 0.5 * both(m1, h0) + k2 - 0.5 * both(m2, h0)
    h = h + 0.375 * both(m1 @ m1, h0) + 0.25 * m1 @ h0 @ m1 - 0.5 * both(m1, k1)
    beyond = h.diagonal(dim1=-2, dim2=-1).abs().amax() + h.abs().sum(-1).amax() + 1
    h = h + torch.diag_embed(torch.where(real, 0.0, beyond))
    values, vectors = torch.linalg.eigh(0.5 * (h + h.mT))
    # the functions to first order in the frame
    rows = torch.zeros_like(x)
    rows = rows.scatter(0, index[None], torch.where(real, 1.0, 0.0).to(x.dtype)[None])
    inside = torch.zeros_like(x)
    change = x - 0.5 * inside.scatter_add(
        0, index.T[:, :, None].expand(-1, -1, m1.shape[-1]), m1.movedim(1, 0)
    )
    kept = real & (places < k)
    drift = torch.where(kept, change.square().sum(0), 0.0).sqrt().amax()
    columns = torch.einsum("jba,bac->jbc", rows + change, vectors)
    # true states come before those filled up, and blocks in ascending order
    return values[real][:k], columns[:, real][:, :k], float(drift)
