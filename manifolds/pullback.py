r"""The chart that a map into a larger space pulls back: surfaces, graphs, decoders."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from darboux import _autodiff
from darboux._typing import Covector, Point, Scalar, Tangent
from darboux.manifolds.base import Manifold
from darboux.manifolds.chart import Chart
from darboux.manifolds.linalg import dot, matvec

_ELIMINATED = 4  # columns up to which least squares is written out


def _least_squares(j: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the minimiser of ``|j s - b|`` and the residual ``b - j s``.

    ``j (..., D, d)``, ``b (..., D, m)``. By orthogonalisation (modified Gram-Schmidt on both
    sides, which is backward stable), not by the normal equations.
    """
    d = j.shape[-1]
    if d > _ELIMINATED:
        q, r = torch.linalg.qr(j)
        part = q.mT @ b
        return torch.linalg.solve_triangular(r, part, upper=True), b - q @ part
    columns = list(j.unbind(-1))
    mix: list[list[Tensor]] = [[] for _ in range(d)]  # row k: coefficients of later columns
    right: list[Tensor] = []
    for k in range(d):
        a = columns[k]
        unit = a / dot(a, a).unsqueeze(-1)
        for i in range(k + 1, d):
            m = dot(unit, columns[i]).unsqueeze(-1)
            columns[i] = columns[i] - m * a
            mix[k].append(m)
        m = (unit.unsqueeze(-1) * b).sum(-2)
        b = b - a.unsqueeze(-1) * m.unsqueeze(-2)
        right.append(m)
    for k in reversed(range(d)):
        for i in range(k + 1, d):
            right[k] = right[k] - mix[k][i - k - 1] * right[i]
    return torch.stack(right, -2), b


class Pullback(Chart):
    r"""A chart with the metric that a map ``embedding: (..., dim) -> (..., D)`` pulls back.

    .. math:: g = J^T\,G(f(x))\,J, \qquad J = Df(x)

    with G the identity, or the metric of ``ambient``. ``embedding`` must be an immersion: where J
    loses rank, the metric is not positive. In R^D the connection and the curvature come from the
    second fundamental form (Gauss' equation), by orthogonalising J, whose condition is the
    square root of that of g.

    >>> graph = Pullback(lambda x: torch.cat([x, x.square().sum(-1, keepdim=True)], -1), dim=2)
    >>> graph.scalar_curvature(torch.zeros(2))
    tensor(8.)
    """

    def __init__(
        self,
        embedding: Callable[[Tensor], Tensor],
        dim: int,
        ambient: Manifold | None = None,
        **options: Any,
    ):
        super().__init__(dim, **options)
        self.embedding = embedding
        self.ambient = ambient

    def metric(self, x: Point) -> Tensor:
        """Return the pulled back metric ``(..., d, d)``."""
        y, j = _autodiff.jacobian(self.embedding, x)
        if self.ambient is None:
            return _product(j, j)
        g = self.ambient.metric(y)
        return j.mT @ g @ j

    def _geodesic_field(self, x: Point, p: Covector) -> tuple[Tangent, Covector]:
        if self.ambient is not None or self.dim <= 3:
            return super()._geodesic_field(x, p)

        # p' = grad |Df v|^2 / 2 with v held: one direction differentiated twice, not d
        def push(z: Tensor) -> Tensor:
            return _autodiff.directional(self.embedding, z, v)[1]

        v = self._sharp(x, p)
        return v, _autodiff.pullback(push, x, lambda w: w)[1]

    def _second(self, x: Point, v: Tangent) -> Tensor:
        def push(z: Tensor) -> Tensor:
            return _autodiff.directional(self.embedding, z, v)[1]

        return _autodiff.directional(push, x, v)[1]

    def _acceleration(self, x: Point, v: Tangent) -> Tangent:
        if self.ambient is not None:
            return super()._acceleration(x, v)
        j = _autodiff.jacobian(self.embedding, x)[1]
        return -_least_squares(j, self._second(x, v).unsqueeze(-1))[0].squeeze(-1)

    def _split(self, x: Point) -> tuple[Tensor, Tensor]:
        """Return the Christoffel symbols and the second fundamental form ``(..., D, i, j)``."""
        _, j, d2f = _autodiff.jet(self.embedding, x)
        gamma, normal = _least_squares(j, d2f.flatten(-2))
        shape = (self.dim, self.dim)
        return gamma.unflatten(-1, shape), normal.unflatten(-1, shape)

    def _christoffel(self, x: Point) -> Tensor:
        return super()._christoffel(x) if self.ambient is not None else self._split(x)[0]

    def _riemann(self, x: Point) -> Tensor:
        if self.ambient is not None:
            return super()._riemann(x)
        ii = self._split(x)[1]
        r = torch.einsum("...mli,...mkj->...lkij", ii, ii)
        r = (r - r.transpose(-1, -2)).flatten(-3)
        return self._raise(x, r).unflatten(-1, (self.dim,) * 3)

    def _raise(self, x: Point, rows: Tensor) -> Tensor:
        # g^{-1} rows = R^{-1} R^{-T} rows with J = Q R
        r = torch.linalg.qr(_autodiff.jacobian(self.embedding, x)[1])[1]
        half = torch.linalg.solve_triangular(r.mT, rows, upper=False)
        return torch.linalg.solve_triangular(r, half, upper=True)

    def _sectional(self, x: Point, u: Tangent, v: Tangent) -> Scalar:
        if self.ambient is not None:
            return super()._sectional(x, u, v)
        # Gauss' equation needs II on u, v and their sum only
        j = _autodiff.jacobian(self.embedding, x)[1]
        seconds = [self._second(x, w) for w in (u, v, u + v)]
        _, normal = _least_squares(j, torch.stack(seconds, -1))
        uu, vv, both = normal.unbind(-1)
        uv = (both - uu - vv) / 2
        ju, jv = matvec(j, u), matvec(j, v)
        area = dot(ju, ju) * dot(jv, jv) - dot(ju, jv).square()
        return (dot(uu, vv) - dot(uv, uv)) / area


def _product(a: Tensor, b: Tensor) -> Tensor:
    # a^T b; elementwise beats a batched matmul of small matrices
    if a.shape[-1] <= 4 and a.shape[-2] <= 8:
        return (a.unsqueeze(-1) * b.unsqueeze(-2)).sum(-3)
    return a.mT @ b
