r"""Flat spaces: :math:`\mathbb R^d` and its quotients by a lattice."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from darboux import _autodiff
from darboux._checks import values
from darboux._typing import Covector, Function, Point, Scalar, Tangent, VectorField
from darboux.manifolds.base import Connection, exact
from darboux.manifolds.chart import Chart
from darboux.manifolds.linalg import dot


class Euclidean(Chart):
    """The space R^d with Cartesian coordinates.

    >>> Euclidean(2).dist(torch.tensor([0.0, 0.0]), torch.tensor([3.0, 4.0]))
    tensor(5.)
    """

    trusted = True

    def __init__(self, dim: int, *, bounds: Sequence[tuple[float, float]] | None = None):
        super().__init__(dim, bounds=bounds or [(-1.0, 1.0)] * dim)

    def metric(self, x: Point) -> Tensor:
        """Return the identity ``(..., d, d)``."""
        eye = torch.eye(self.dim, dtype=x.dtype, device=x.device)
        return eye.expand(*x.shape, self.dim)

    def _sharp(self, x: Point, p: Covector) -> Tangent:
        return p

    def _flat(self, x: Point, v: Tangent) -> Covector:
        return v

    def _inner(self, x: Point, u: Tangent, v: Tangent) -> Scalar:
        return dot(u, v)

    def _exp(self, x: Point, v: Tangent) -> Point:
        return x + v

    def _geodesic(self, x: Point, v: Tangent, ts: Tensor) -> Point:
        return x + ts.reshape(-1, *[1] * v.dim()) * v

    def _connect(self, x: Point, y: Point) -> Connection:
        return exact(y - x)

    def _transport_along(self, x: Point, u: Tangent, v: Tangent) -> tuple[Point, Tangent]:
        return self._exp(x, u), v

    def _transport(self, x: Point, y: Point, v: Tangent) -> Tangent:
        return v

    def _retract(self, x: Point, v: Tangent) -> Point:
        return x + v

    def _christoffel(self, x: Point) -> Tensor:
        return x.new_zeros(*x.shape, self.dim, self.dim)

    def _acceleration(self, x: Point, v: Tangent) -> Tangent:
        return torch.zeros_like(v)

    def _geodesic_field(self, x: Point, p: Covector) -> tuple[Tangent, Covector]:
        return p, torch.zeros_like(p)

    def _covariant_derivative(self, field: VectorField, x: Point, v: Tangent) -> Tangent:
        return _autodiff.directional(field, x, v)[1]

    def _riemann(self, x: Point) -> Tensor:
        return x.new_zeros(*x.shape, self.dim, self.dim, self.dim)

    def _ricci(self, x: Point) -> Tensor:
        return x.new_zeros(*x.shape, self.dim)

    def _scalar_curvature(self, x: Point) -> Scalar:
        return x.new_zeros(x.shape[:-1])

    def _sectional(self, x: Point, u: Tangent, v: Tangent) -> Scalar:
        return x.new_zeros(x.shape[:-1])

    def _trace(self, x: Point, form: Tensor) -> Scalar:
        return form.diagonal(dim1=-2, dim2=-1).sum(-1)

    def _log_volume(self, x: Point) -> Scalar:
        return x.new_zeros(x.shape[:-1])

    def _gradient(self, f: Function, x: Point) -> Tangent:
        return _autodiff.gradient(f, x)

    def _divergence(self, field: VectorField, x: Point) -> Scalar:
        return _autodiff.jacobian(field, x)[1].diagonal(dim1=-2, dim2=-1).sum(-1)

    def _hessian(self, f: Function, x: Point) -> Tensor:
        return _autodiff.jet(f, x)[2]

    def _random_tangent(self, x: Point, z: Tensor) -> Tangent:
        return z


class FlatTorus(Euclidean):
    r"""The flat torus :math:`\mathbb R^d / \Lambda`, in the Cartesian coordinates of R^d.

    The rows of ``lattice (d, d)`` generate :math:`\Lambda`; without it the torus has
    :math:`2\pi` periods. Points are any representatives, ``project`` wraps them into the cell of
    the generators. ``log`` finds the closest image, exactly for ``d <= 4`` and for rectangular
    lattices of any dimension; otherwise among the images next to the rounded one in a reduced
    basis. Nguyen & Stehlé, ACM Trans. Algorithms 5 (2009) 46.

    >>> FlatTorus(1).dist(torch.tensor([0.1]), torch.tensor([6.2]))
    tensor(0.1832)
    """

    def __init__(self, dim: int | None = None, lattice: Tensor | None = None):
        if dim is None and lattice is None:
            raise ValueError("FlatTorus: neither dim nor lattice is given, expected one")
        if lattice is not None:
            d = lattice.shape[-1] if lattice.dim() else 0
            if tuple(lattice.shape) != (d, d) or d == 0 or dim not in (None, d):
                raise ValueError(
                    f"FlatTorus: lattice has shape {tuple(lattice.shape)}, expected (d, d)"
                    + ("" if dim is None else f" with d = {dim}")
                )
            if not lattice.is_floating_point():
                raise TypeError(
                    f"FlatTorus: lattice has dtype {lattice.dtype}, expected a floating-point dtype"
                )
            dim = d
        assert dim is not None
        plain = 2 * math.pi * np.eye(dim) if lattice is None else _plain(lattice)
        if not np.isfinite(plain).all() or np.linalg.cond(plain) > 1e12:
            raise ValueError("FlatTorus: the rows of lattice are not independent")
        corners = np.array(list(itertools.product((0, 1), repeat=min(dim, 12))))
        corners = corners @ plain[: corners.shape[1]]
        super().__init__(dim, bounds=list(zip(corners.min(0), corners.max(0), strict=True)))
        diagonal = not (plain - np.diag(np.diag(plain))).any()
        self.periods = tuple(np.abs(np.diag(plain)).tolist()) if diagonal else None
        self._change = _reduce(plain)
        if lattice is None:
            self.lattice = None
        elif isinstance(lattice, nn.Parameter):
            self.lattice = lattice
        else:
            self.register_buffer("lattice", lattice)

    def generators(self, like: Tensor) -> Tensor:
        """Return the generators ``(d, d)``, one a row, with the dtype and device of ``like``."""
        if self.lattice is not None:
            return self.lattice
        return 2 * math.pi * torch.eye(self.dim, dtype=like.dtype, device=like.device)

    def _reduced(self, like: Tensor) -> Tensor:
        basis = self.generators(like)
        # A parameter may have moved since construction.
        change = _reduce(_plain(basis)) if isinstance(basis, nn.Parameter) else self._change
        return torch.as_tensor(change, dtype=like.dtype, device=like.device) @ basis

    def _connect(self, x: Point, y: Point) -> Connection:
        basis = self._reduced(x)
        gap = y - x
        rounded = torch.round(gap.detach() @ torch.linalg.inv_ex(basis.detach())[0])
        near = gap - rounded @ basis
        # candidates (images, d); the first is the rounded one itself
        offsets = torch.as_tensor(_offsets(self.dim), dtype=x.dtype, device=x.device)
        shifts = offsets @ basis
        still = near.detach()
        # |near - shift|^2 - |near|^2, free of cancellation between large numbers
        gain = dot(shifts, shifts).detach() - 2 * still @ shifts.detach().mT
        order = gain.sort(stable=True, dim=-1)
        best = torch.arange(len(offsets), device=x.device) == order.indices[..., :1]
        velocity = near - best.to(x.dtype) @ shifts
        # second nearest within 1e-9 of the same length
        sq = dot(velocity, velocity).detach()
        slack = max(2e-9, 16 * torch.finfo(x.dtype).eps)
        unique = order.values[..., 1] - order.values[..., 0] > slack * sq
        return exact(velocity)._replace(unique=unique)

    def _sqdist(self, x: Point, y: Point) -> Scalar:
        v = self._connect(x, y).velocity
        return dot(v, v)

    def _project(self, x: Tensor) -> Point:
        basis = self.generators(x)
        cell = torch.linalg.inv_ex(basis)[0]
        return x - torch.floor((x @ cell).detach()) @ basis

    def _random_point(self, z: Tensor) -> Point:
        uniform = 0.5 * (1 + torch.erf(z / math.sqrt(2)))
        return uniform @ self.generators(z)

    def volume(self, like: Tensor | None = None) -> Tensor:
        """Return the volume of the torus as a scalar tensor."""
        like = torch.empty(0) if like is None else like
        factor = torch.linalg.qr(self.generators(like))[1]
        return factor.diagonal().abs().prod()

    def dual(self, like: Tensor | None = None) -> Tensor:
        r"""Return generators of :math:`\Lambda^* = \{k : k\cdot l \in \mathbb Z\}`, one a row.

        The eigenvalues of :math:`-\Delta` are :math:`4\pi^2|k|^2`.
        """
        like = torch.empty(0) if like is None else like
        return torch.linalg.inv_ex(self.generators(like))[0].mT


def _plain(lattice: Tensor) -> np.ndarray:
    plain = np.array(values(lattice).tolist(), dtype=float)
    return plain.reshape(-1, *plain.shape[-2:])[0]  # of a batch under vmap, the first


_EXACT = 4  # dimensions in which all of {-1, 0, 1}^d is searched


def _offsets(d: int) -> list[tuple[int, ...]]:
    zero: tuple[int, ...] = (0,) * d
    if d <= _EXACT:
        return [zero, *(o for o in itertools.product((-1, 0, 1), repeat=d) if any(o))]
    found: list[tuple[int, ...]] = [zero]
    for i in range(d):
        for a in (-1, 1):
            found.append(tuple(a if k == i else 0 for k in range(d)))
            for j in range(i):
                for b in (-1, 1):
                    found.append(tuple(a if k == i else b if k == j else 0 for k in range(d)))
    return found


def _reduce(basis: np.ndarray) -> np.ndarray:
    """Return the unimodular matrix whose product with ``basis`` is a reduced basis.

    Greedy: shorten each vector by combinations of the shorter ones until none gets shorter,
    which up to dimension 4 is Minkowski's reduction.
    """
    d = len(basis)
    change = np.eye(d)
    for _ in range(1000):
        rows = change @ basis
        order = np.argsort((rows**2).sum(1), kind="stable")
        change, rows = change[order], rows[order]
        shortened = False
        for i in range(1, d):
            for j in reversed(range(i)):
                m = np.round(rows[i] @ rows[j] / (rows[j] @ rows[j]))
                trial = rows[i] - m * rows[j]
                if trial @ trial < (1 - 1e-12) * (rows[i] @ rows[i]):
                    rows[i], change[i], shortened = trial, change[i] - m * change[j], True
            if i >= _EXACT:
                continue
            for o in itertools.product((-1, 0, 1), repeat=i):
                trial = rows[i] + np.array(o) @ rows[:i]
                if trial @ trial < (1 - 1e-12) * (rows[i] @ rows[i]):
                    rows[i], change[i] = trial, change[i] + np.array(o) @ change[:i]
                    shortened = True
        if not shortened:
            return change
    return change
