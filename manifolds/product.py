r"""Products of manifolds: everything block by block, by delegation."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from darboux import _autodiff
from darboux._typing import Covector, Function, Point, Scalar, Tangent, VectorField
from darboux.integrators import Hamiltonian
from darboux.manifolds.base import Connection, Manifold
from darboux.manifolds.linalg import dot


def needs_flow(where: str, name: str, space: Manifold) -> None:
    if not isinstance(space, Manifold):
        raise TypeError(f"{where}: {name} is a {type(space).__name__}, expected a Manifold")
    if space.point_dim != space.dim or not hasattr(space, "_geodesic_field"):
        raise TypeError(
            f"{where}: {name} is a {type(space).__name__} in {space.point_dim} coordinates, "
            f"expected a chart: as many coordinates as dimensions ({space.dim})"
        )


class Product(Manifold):
    r"""The Riemannian product of manifolds, coordinates one after the other.

    .. math:: g = g_1 \oplus g_2 \oplus \dots, \qquad d^2 = d_1^2 + d_2^2 + \dots

    Everything splits; charts and embedded manifolds mix.

    >>> from darboux.manifolds.euclidean import Euclidean
    >>> Product(Euclidean(1), Euclidean(2)).point_dim
    3
    """

    def __init__(self, *factors: Manifold):
        if not factors:
            raise ValueError("Product: no factors given, expected at least one")
        for i, factor in enumerate(factors):
            if not isinstance(factor, Manifold):
                raise TypeError(
                    f"Product: factor {i} is a {type(factor).__name__}, expected a Manifold"
                )
        super().__init__(sum(m.dim for m in factors), sum(m.point_dim for m in factors))
        self.factors = nn.ModuleList(factors)
        self.sizes = tuple(m.point_dim for m in factors)
        self.periods = self._gather("periods", math.inf)
        self.bounds = self._gather("bounds", None)

    def _gather(self, name: str, missing: Any) -> tuple[Any, ...] | None:
        found = [getattr(m, name, None) for m in self.spaces]
        if all(f is None for f in found) or (missing is None and any(f is None for f in found)):
            return None
        entries = []
        for f, m in zip(found, self.spaces, strict=True):
            entries.extend(f if f is not None else (missing,) * m.point_dim)
        return tuple(entries)

    @property
    def spaces(self) -> tuple[Manifold, ...]:
        """The factors."""
        return tuple(m for m in self.factors if isinstance(m, Manifold))

    def split(self, *tensors: Tensor) -> list[tuple[Any, ...]]:
        """Return ``(factor, block, block, ...)`` for each factor, of tensors ``(..., n)``."""
        blocks = [t.split(self.sizes, -1) for t in tensors]
        return list(zip(self.spaces, *blocks, strict=True))

    def _join(self, method: str, *tensors: Tensor) -> Tensor:
        return torch.cat([getattr(m, method)(*t) for m, *t in self.split(*tensors)], -1)

    def _add(self, method: str, *tensors: Tensor) -> Tensor:
        return torch.stack([getattr(m, method)(*t) for m, *t in self.split(*tensors)]).sum(0)

    def _all(self, method: str, atol: float, *tensors: Tensor) -> Tensor:
        found = [getattr(m, method)(*t, atol) for m, *t in self.split(*tensors)]
        return torch.stack(found).all(0)

    def _blocks(self, method: str, x: Point, rank: int) -> Tensor:
        """Put tensors ``(..., n_i, n_i, ...)`` of the factors on the diagonal of a larger one."""
        n, start, total = self.point_dim, 0, None
        for m, x_i in self.split(x):
            pad = (start, n - start - m.point_dim) * rank
            block = nn.functional.pad(getattr(m, method)(x_i), pad)
            total = block if total is None else total + block
            start += m.point_dim
        assert total is not None
        return total

    def metric(self, x: Point) -> Tensor:
        """Return the block diagonal metric ``(..., n, n)``."""
        return self._blocks("metric", x, 2)

    def _flat(self, x: Point, v: Tangent) -> Covector:
        return self._join("_flat", x, v)

    def _sharp(self, x: Point, p: Covector) -> Tangent:
        return self._join("_sharp", x, p)

    def _inner(self, x: Point, u: Tangent, v: Tangent) -> Scalar:
        return self._add("_inner", x, u, v)

    def _log_volume(self, x: Point) -> Scalar:
        return self._add("_log_volume", x)

    def _trace(self, x: Point, form: Tensor) -> Scalar:
        start, total = 0, x.new_zeros(x.shape[:-1])
        for m, x_i in self.split(x):
            end = start + m.point_dim
            total = total + m._trace(x_i, form[..., start:end, start:end])
            start = end
        return total

    # -- geodesics ------------------------------------------------------------------------

    def _exp(self, x: Point, v: Tangent) -> Point:
        return self._join("_exp", x, v)

    def _geodesic(self, x: Point, v: Tangent, ts: Tensor) -> Point:
        return torch.cat([m._geodesic(x_i, v_i, ts) for m, x_i, v_i in self.split(x, v)], -1)

    def _connect(self, x: Point, y: Point) -> Connection:
        found = [m._connect(x_i, y_i) for m, x_i, y_i in self.split(x, y)]
        return Connection(
            torch.cat([c.velocity for c in found], -1),
            torch.stack([c.residual for c in found]).amax(0),
            torch.stack([c.converged for c in found]).all(0),
            torch.stack([c.conjugate for c in found]).any(0),
            torch.stack([c.unique for c in found]).all(0),
        )

    def _sqdist(self, x: Point, y: Point) -> Scalar:
        return self._add("_sqdist", x, y)

    def _transport(self, x: Point, y: Point, v: Tangent) -> Tangent:
        return self._join("_transport", x, y, v)

    def _transport_along(self, x: Point, u: Tangent, v: Tangent) -> tuple[Point, Tangent]:
        ends = [m._transport_along(*t) for m, *t in self.split(x, u, v)]
        return torch.cat([y for y, _ in ends], -1), torch.cat([w for _, w in ends], -1)

    def _retract(self, x: Point, v: Tangent) -> Point:
        return self._join("_retract", x, v)

    def _geodesic_field(self, x: Point, p: Covector) -> tuple[Tangent, Covector]:
        """Return Hamilton's equations of the geodesic flow; every factor must be a chart."""
        for i, m in enumerate(self.spaces):
            needs_flow(f"{self.name}.geodesic_system", f"factor {i}", m)
        rates = [m._geodesic_field(*t) for m, *t in self.split(x, p)]
        return torch.cat([v for v, _ in rates], -1), torch.cat([f for _, f in rates], -1)

    def geodesic_system(self) -> Hamiltonian:
        r"""Return :math:`H = \tfrac12 g^{ij}(x)p_ip_j` as a system; every factor a chart."""
        for i, m in enumerate(self.spaces):
            needs_flow(f"{self.name}.geodesic_system", f"factor {i}", m)

        def energy(x: Tensor, p: Tensor) -> Tensor:
            return 0.5 * dot(p, self._sharp(x, p))

        return Hamiltonian(energy, field=self._geodesic_field)

    # -- connection and curvature ---------------------------------------------------------

    def _christoffel(self, x: Point) -> Tensor:
        return self._blocks("_christoffel", x, 3)

    def _acceleration(self, x: Point, v: Tangent) -> Tangent:
        return self._join("_acceleration", x, v)

    def _covariant_derivative(self, field: VectorField, x: Point, v: Tangent) -> Tangent:
        w, dw = _autodiff.directional(field, x, v)
        bent = [
            torch.einsum("...kij,...i,...j->...k", m._christoffel(x_i), v_i, w_i)
            for m, x_i, v_i, w_i in self.split(x, v, w)
        ]
        return dw + torch.cat(bent, -1)

    def _riemann(self, x: Point) -> Tensor:
        return self._blocks("_riemann", x, 4)

    def _ricci(self, x: Point) -> Tensor:
        return self._blocks("_ricci", x, 2)

    def _scalar_curvature(self, x: Point) -> Scalar:
        return self._add("_scalar_curvature", x)

    def _sectional(self, x: Point, u: Tangent, v: Tangent) -> Scalar:
        bend = x.new_zeros(x.shape[:-1])
        for m, x_i, u_i, v_i in self.split(x, u, v):
            w = torch.einsum("...lkij,...k,...i,...j->...l", m._riemann(x_i), v_i, u_i, v_i)
            bend = bend + m._inner(x_i, w, u_i)
        uu, vv, uv = (self._inner(x, *pair) for pair in ((u, u), (v, v), (u, v)))
        return bend / (uu * vv - uv.square())

    # -- functions ------------------------------------------------------------------------

    def _slice(self, f: Callable[[Tensor], Tensor], x: Point, i: int) -> Callable[[Tensor], Tensor]:
        """Return ``f`` as a function of the i-th block, the others as in ``x``."""
        blocks = x.split(self.sizes, -1)

        def sliced(z: Tensor) -> Tensor:
            full = [b.expand(*z.shape[:-1], b.shape[-1]) for b in blocks]
            full[i] = z
            return f(torch.cat(full, -1))

        return sliced

    def _gradient(self, f: Function, x: Point) -> Tangent:
        return self._sharp(x, _autodiff.gradient(f, x))

    def _divergence(self, field: VectorField, x: Point) -> Scalar:
        total = x.new_zeros(x.shape[:-1])
        for i, (m, x_i) in enumerate(self.split(x)):

            def block(z: Tensor, i: int = i) -> Tensor:
                return self._slice(field, x, i)(z).split(self.sizes, -1)[i]

            total = total + m._divergence(block, x_i)
        return total

    def _hessian(self, f: Function, x: Point) -> Tensor:
        _, df, rows = _autodiff.jet(f, x)

        def project(form: Tensor) -> Tensor:
            # project every row; the identity in a chart
            base = x.unsqueeze(-2).expand_as(form)
            return self._join("_project_tangent", base, form)

        flat = project(project(rows).mT).mT
        bent = torch.einsum("...kij,...k->...ij", self._christoffel(x), df)
        return flat - bent

    def _laplacian(self, f: Function, x: Point) -> Scalar:
        total = x.new_zeros(x.shape[:-1])
        for i, (m, x_i) in enumerate(self.split(x)):
            total = total + m._laplacian(self._slice(f, x, i), x_i)
        return total

    # -- points ---------------------------------------------------------------------------

    def _project(self, x: Tensor) -> Point:
        return self._join("_project", x)

    def _project_tangent(self, x: Point, v: Tensor) -> Tangent:
        return self._join("_project_tangent", x, v)

    def _is_point(self, x: Tensor, atol: float) -> Tensor:
        return self._all("_is_point", atol, x)

    def _is_tangent(self, x: Point, v: Tensor, atol: float) -> Tensor:
        return self._all("_is_tangent", atol, x, v)

    def _check_is_point(self, where: str, name: str, x: Tensor) -> None:
        for m, x_i in self.split(x):
            m._check_is_point(where, name, x_i)

    def _random_point(self, z: Tensor) -> Point:
        return self._join("_random_point", z)

    def _random_tangent(self, x: Point, z: Tensor) -> Tangent:
        return self._join("_random_tangent", x, z)
