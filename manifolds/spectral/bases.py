r"""Galerkin discretisation in smooth bases; here the torus, in Fourier functions of any lattice.

.. math:: K_{ij} = \int g^{ab}\,\partial_a\varphi_i\,\partial_b\varphi_j\,\sqrt{g}\,dx, \qquad
          M_{ij} = \int \varphi_i\,\varphi_j\,\sqrt{g}\,dx

by quadrature, for any metric g in the basis' coordinates. For an analytic metric the error falls
exponentially with the degree: a few hundred unknowns give ten digits.

To add a basis, subclass :class:`Basis`: give ``points``, ``weights``, ``evaluate`` and
``gradient``. Boyd (2001), "Chebyshev and Fourier Spectral Methods".
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from darboux import _checks
from darboux._checks import GeometryError
from darboux.manifolds.base import Manifold
from darboux.manifolds.linalg import is_positive, log_det, solve
from darboux.manifolds.spectral.operator import Operator

Metric = Manifold | Callable[[Tensor], Tensor]


class Basis(ABC):
    """``size`` functions of ``dim`` variables and a quadrature for products of two of them.

    ``points (q, D)`` are the nodes in the coordinates that metrics are functions of, ``weights
    (q,)`` those of the measure dx (on the sphere: of the round area).
    """

    points: Tensor
    weights: Tensor
    dim: int
    size: int

    @abstractmethod
    def evaluate(self, x: Tensor) -> Tensor:
        """Return the functions at points ``x (..., D)`` as ``(..., n)``."""

    @abstractmethod
    def gradient(self, x: Tensor) -> Tensor:
        """Return their gradients at ``x`` as ``(..., n, D)``."""

    @property
    def name(self) -> str:
        return type(self).__name__

    @property
    def values(self) -> Tensor:
        """The functions at the nodes, ``(q, n)``."""
        return self.evaluate(self.points)

    @property
    def gradients(self) -> Tensor:
        """The gradients at the nodes, ``(q, n, d)``."""
        return self.gradient(self.points)

    def extend(self, u: Tensor) -> Tensor:
        """Return the values ``(q, ...)`` at the nodes of the coefficients ``u (n, ...)``."""
        return torch.tensordot(self.values, u, 1)

    def forms(self, metric: Metric) -> Tensor:
        """Return the metric at the nodes in the frame of ``gradients``, ``(..., q, d, d)``."""
        return self._at(metric, self.points, self.dim)

    def _at(self, metric: Metric, x: Tensor, size: int) -> Tensor:
        g = (metric.metric if isinstance(metric, Manifold) else metric)(x)
        where = f"galerkin on {self.name}"
        _checks.check_tensor(where, "metric(points)", g)
        expected = (x.shape[0], size, size)
        if g.shape[-3:] != expected:
            raise ValueError(
                f"{where}: metric(points) has shape {tuple(g.shape)}, expected (..., "
                f"{', '.join(map(str, expected))}) for points of shape {tuple(x.shape)}"
            )
        _checks.check_finite(where, **{"metric(points)": g})
        return g

    def assemble(self, field: Tensor, density: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return :math:`\int C^{ab}\partial_a\varphi_i\partial_b\varphi_j` and
        :math:`\int\rho\,\varphi_i\varphi_j`, both ``(..., n, n)``.

        ``field (..., q, d, d)`` is C, symmetric, and ``density (..., q)`` is rho at the nodes.
        """
        values, gradients, w = self.values, self.gradients, self.weights
        mass = values.mT @ ((w * density)[..., None] * values)
        total = torch.zeros_like(mass)
        for a in range(self.dim):
            for b in range(a, self.dim):
                entry = (w * field[..., a, b])[..., None]
                term = gradients[..., a].mT @ (entry * gradients[..., b])
                total = total + (term if a == b else term + term.mT)
        return total, mass


def galerkin(
    metric: Metric, basis: Basis, *, potential: Callable[[Tensor], Tensor] | None = None
) -> Operator:
    r"""Return the dense Laplace-Beltrami operator of ``metric`` in a basis.

    ``metric`` is a callable ``(q, D) -> (..., q, d, d)`` or a :class:`Manifold` with ``metric``, in
    the basis' coordinates; leading dimensions, also those of ``vmap``, make a batch of operators.
    ``potential`` ``(q, D) -> (..., q)`` adds :math:`\int V\varphi_i\varphi_j\sqrt g` to the
    stiffness. Differentiable in whatever the metric depends on, forward and reverse, to any order.

    Raises ``ValueError`` for a metric of the wrong shape or with NaN, and ``GeometryError`` where
    it is not positive definite.

    >>> circle = Fourier(2, dim=1)
    >>> operator = galerkin(lambda x: torch.ones(len(x), 1, 1, dtype=x.dtype), circle)
    >>> operator.stiffness.diagonal().round()
    tensor([0., 1., 4., 1., 4.], dtype=torch.float64)
    """
    g = basis.forms(metric)
    _checks.check_that(
        f"galerkin on {basis.name}",
        lambda: is_positive(g),
        "the metric is not positive definite at some nodes",
        GeometryError,
    )
    density, field = _densities(g)
    stiffness, mass = basis.assemble(field, density)
    if potential is not None:
        v = potential(basis.points)
        stiffness = stiffness + basis.assemble(torch.zeros_like(field), v * density)[1]
    return Operator(stiffness, mass, basis)


def _densities(g: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return :math:`\sqrt g` and :math:`\sqrt g\,g^{-1}`; by cofactors up to three dimensions."""
    d = g.shape[-1]
    if d > 3:
        density = (0.5 * log_det(g)).exp()
        eye = torch.eye(d, dtype=g.dtype, device=g.device).expand_as(g)
        return density, density[..., None, None] * solve(g, eye)
    if d == 1:
        density = g[..., 0, 0].sqrt()
        return density, (1 / density)[..., None, None]
    if d == 2:
        a, b, c = g[..., 0, 0], g[..., 0, 1], g[..., 1, 1]
        density = (a * c - b * b).sqrt()
        rows = [torch.stack([c, -b], -1), torch.stack([-b, a], -1)]
        return density, torch.stack(rows, -2) / density[..., None, None]
    x, y, z = g.unbind(-2)
    cofactors = torch.stack([torch.linalg.cross(*pair) for pair in ((y, z), (z, x), (x, y))], -2)
    density = (x * cofactors[..., 0, :]).sum(-1).sqrt()
    return density, cofactors / density[..., None, None]


class Fourier(Basis):
    r"""Real trigonometric functions on :math:`\mathbb R^d/\Lambda`, orthonormal for dx.

    .. math:: 1,\ \sqrt2\cos\kappa\cdot x,\ \sqrt2\sin\kappa\cdot x \quad\text{over } \sqrt V,
        \qquad \kappa = 2\pi\,\mathrm{lattice}^{-1} k,\ |k_i| \le N_i

    with k over one of each pair k, -k. Order: the constant, all cosines, all sines. ``degree`` is
    N, one number or one for each axis. The rows of ``lattice (d, d)`` generate :math:`\Lambda`;
    without it all ``dim`` periods are :math:`2\pi`. x are Cartesian coordinates of R^d. Quadrature
    by ``nodes`` points along each generator (4 N unless told).

    The matrices come from one FFT of the metric: O(n²) memory and time and no table of values.

    >>> Fourier(8).size
    289
    """

    def __init__(
        self,
        degree: int | Sequence[int],
        dim: int | None = None,
        *,
        lattice: Tensor | None = None,
        nodes: int | None = None,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
    ):
        if lattice is not None:
            d = lattice.shape[-1] if lattice.dim() else 0
            if tuple(lattice.shape) != (d, d) or d == 0 or dim not in (None, d):
                raise ValueError(
                    f"Fourier: lattice has shape {tuple(lattice.shape)}, expected (d, d)"
                    + ("" if dim is None else f" with d = {dim}")
                )
            plain = np.asarray(_checks.values(lattice).tolist(), dtype=np.float64)
        else:
            d = dim or (2 if isinstance(degree, int) else len(degree))
            plain = 2 * np.pi * np.eye(d)
        degrees = (degree,) * d if isinstance(degree, int) else tuple(degree)
        if len(degrees) != d or min(degrees) < 0:
            raise ValueError(
                f"Fourier: degree is {degree}, expected a number >= 0 or {d} of them, one an axis"
            )
        if not np.isfinite(plain).all() or np.linalg.cond(plain) > 1e12:
            raise ValueError("Fourier: the rows of lattice are not independent")
        shape = tuple(nodes or max(4 * n, 1) for n in degrees)
        if any(q <= 2 * n for q, n in zip(shape, degrees, strict=True)):
            raise ValueError(f"Fourier: nodes is {nodes}, expected more than {2 * max(degrees)}")

        def as_given(x: np.ndarray) -> Tensor:
            return torch.as_tensor(x, dtype=dtype, device=device)

        axes = np.meshgrid(*[np.arange(-n, n + 1) for n in degrees], indexing="ij")
        modes = np.stack([axis.ravel() for axis in axes], -1)
        half = modes[len(modes) // 2 :]  # the upper half in lexicographic order, from zero
        self.dim, self.size, self.shape = d, len(modes), shape
        self.lattice, self._generators = as_given(plain), plain
        self.modes = torch.as_tensor(half, device=device)
        self.frequencies = as_given(2 * np.pi * half @ np.linalg.inv(plain).T)
        self.volume = float(abs(np.linalg.det(plain)))
        scale = np.sqrt(np.where(np.arange(self.size) > 0, 2.0, 1.0) / self.volume)
        self.scale = as_given(scale)
        cells = np.stack([c.ravel() / q for c, q in zip(np.indices(shape), shape, strict=True)], -1)
        self.points = as_given(cells @ plain)
        self.weights = as_given(np.full(len(cells), self.volume / len(cells)))

    def evaluate(self, x: Tensor) -> Tensor:
        _checks.check_last("Fourier.evaluate", "x", x, self.dim)
        phase = x @ self.frequencies.mT
        return self.scale * torch.cat([phase.cos(), phase[..., 1:].sin()], -1)

    def gradient(self, x: Tensor) -> Tensor:
        _checks.check_last("Fourier.gradient", "x", x, self.dim)
        phase = x @ self.frequencies.mT
        slope = torch.cat([-phase.sin(), phase[..., 1:].cos()], -1)
        kappa = torch.cat([self.frequencies, self.frequencies[1:]])
        return (self.scale * slope)[..., None] * kappa

    def forms(self, metric: Metric) -> Tensor:
        if isinstance(metric, Manifold):
            self._check_lattice(metric)
        g = super().forms(metric)
        _checks.check_that(
            "galerkin on Fourier",
            lambda: self._jumps(metric) <= 1e-6 * _checks.values(g).abs().max(),
            "the metric is not periodic under the lattice of the basis",
        )
        return g

    def _jumps(self, metric: Metric) -> Tensor:
        """Return how the metric differs on opposite faces of the cell, at some of the nodes."""
        evaluate = metric.metric if isinstance(metric, Manifold) else metric
        jumps = []
        for axis, generator in enumerate(self.lattice):
            face = self.points.unflatten(0, self.shape).select(axis, 0).reshape(-1, self.dim)
            face = face[:: max(1, len(face) // 32)]
            jumps.append((evaluate(face + generator) - evaluate(face)).abs().amax())
        return torch.stack(jumps)

    def _check_lattice(self, manifold: Manifold) -> None:
        periods = getattr(manifold, "periods", None)
        lattice = getattr(manifold, "lattice", None)
        if lattice is not None:
            rows = np.asarray(_checks.values(lattice).tolist(), dtype=np.float64)
        elif periods is not None and all(map(math.isfinite, periods)):
            rows = np.diag(periods)
        else:
            return
        # both generate the same lattice if the change of generators is an integer matrix
        if rows.shape == self._generators.shape:
            change = rows @ np.linalg.inv(self._generators)
            whole = np.abs(change - change.round()).max() < 1e-5
            if whole and abs(abs(np.linalg.det(change)) - 1) < 1e-5:
                return
        raise ValueError(
            f"galerkin on Fourier: {manifold.name} is periodic under {rows.tolist()}, expected "
            f"the lattice of the basis, {self._generators.tolist()}"
        )

    def assemble(self, field: Tensor, density: Tensor) -> tuple[Tensor, Tensor]:
        def transform(f: Tensor) -> Tensor:
            grid = (self.weights * f).unflatten(-1, self.shape)
            return torch.fft.fftn(grid, dim=tuple(range(-self.dim, 0))).flatten(-self.dim)

        tables = [transform(f) for f in (density, *field.flatten(-2).unbind(-1))]
        return self.elements(
            torch.stack(tables[1:], -1).unflatten(-1, field.shape[-2:]), tables[0], self.shape
        )

    def table_frequencies(self, shape: Sequence[int]) -> Tensor:
        """Return the frequencies ``(prod(shape), d)`` of the entries of a Fourier table."""
        axes = [np.fft.fftfreq(q, 1 / q).round() for q in shape]
        k = np.stack([a.ravel() for a in np.meshgrid(*axes, indexing="ij")], -1)
        kappa = 2 * np.pi * k @ np.linalg.inv(self._generators).T
        return torch.as_tensor(kappa, dtype=self.points.dtype, device=self.points.device)

    def elements(
        self, field: Tensor, density: Tensor, shape: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        r"""Return the matrices of :meth:`assemble` from the Fourier transforms of C and rho.

        ``field (..., T, d, d)`` and ``density (..., T)`` hold :math:`\int f e^{-i\kappa x}dx`,
        complex, at the frequencies of a table of T = prod(``shape``) places. The product formulas
        of sine and cosine leave sums of two entries.
        """
        strides = np.cumprod([1, *reversed(shape)])[:-1][::-1].copy()
        sizes = self.modes.new_tensor(list(shape))
        steps = self.modes.new_tensor(strides)
        apart = ((self.modes[:, None] - self.modes) % sizes) @ steps
        sums = ((self.modes[:, None] + self.modes) % sizes) @ steps

        def pair(f: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            # integrals of f against cos cos, sin sin and sin cos
            c, s = f.real, -f.imag
            c_apart, c_sum, s_apart, s_sum = (
                c[..., apart],
                c[..., sums],
                s[..., apart],
                s[..., sums],
            )
            return 0.5 * (c_apart + c_sum), 0.5 * (c_apart - c_sum), 0.5 * (s_sum + s_apart)

        cc, ss, sc = pair(density)
        mass = self._blocks(cc, sc.mT, sc, ss)
        parts: list[Any] = [0.0, 0.0, 0.0]
        kappa = self.frequencies
        for a in range(self.dim):
            for b in range(a, self.dim):
                twice = kappa[:, None, a] * kappa[:, b]
                twice = twice if a == b else twice + twice.mT
                parts = [
                    total + twice * f
                    for total, f in zip(parts, pair(field[..., a, b]), strict=True)
                ]
        cc, ss, sc = parts
        return self._blocks(ss, -sc, -sc.mT, cc), mass

    def _blocks(self, cc: Tensor, cs: Tensor, sc: Tensor, ss: Tensor) -> Tensor:
        upper = torch.cat([cc, cs[..., :, 1:]], -1)
        lower = torch.cat([sc[..., 1:, :], ss[..., 1:, 1:]], -1)
        return self.scale[:, None] * torch.cat([upper, lower], -2) * self.scale
