r"""Information geometry: families of distributions with Fisher's metric."""

import torch
from torch import Tensor

from darboux._typing import Covector, Point, Scalar, Tangent
from darboux.manifolds.base import Connection
from darboux.manifolds.chart import Chart
from darboux.manifolds.linalg import dot
from darboux.manifolds.space_forms import HalfSpace, constant_curvature


class FisherGaussian(Chart):
    r"""Normal distributions :math:`N(\mu, \sigma^2 I_n)` with Fisher's metric.

    Points are :math:`(\mu_1, \dots, \mu_n, \sigma)`, of dimension ``n + 1`` with ``n = dim``.

    .. math:: g = \frac{\operatorname{diag}(1, \dots, 1, 2n)}{\sigma^2}, \qquad K = -\frac{1}{2n}

    The map :math:`\mu \mapsto \mu/\sqrt{2n}` takes it to the half-space of that curvature, whose
    closed forms serve here. Costa, Santos & Strapasson, Discrete Appl. Math. 197 (2015) 59.

    >>> FisherGaussian(1).dist(torch.tensor([0.0, 1.0]), torch.tensor([0.0, torch.e]))
    tensor(1.4142)
    """

    trusted = True

    def __init__(self, dim: int = 1):
        if dim < 1:
            raise ValueError(f"FisherGaussian: dim is {dim}, expected at least 1")
        super().__init__(dim + 1, bounds=[*[(-2.0, 2.0)] * dim, (0.1, 3.0)])
        self.half_space = HalfSpace(dim + 1, -1 / (2 * dim))

    @property
    def curvature(self) -> float:
        """The sectional curvature, the same for every plane."""
        return -1 / (2 * (self.dim - 1))

    def _widths(self, x: Tensor) -> Tensor:
        # of the coordinates in units of those of the half-space
        n = self.dim - 1
        return torch.tensor([(2.0 * n) ** 0.5] * n + [1.0], dtype=x.dtype, device=x.device)

    def _weights(self, x: Tensor) -> Tensor:
        # the diagonal of the metric times sigma^2
        n = self.dim - 1
        return torch.tensor([1.0] * n + [2.0 * n], dtype=x.dtype, device=x.device)

    def metric(self, x: Point) -> Tensor:
        """Return Fisher's metric ``(..., n + 1, n + 1)``."""
        return torch.diag_embed(self._weights(x) / x[..., -1:].square())

    def _flat(self, x: Point, v: Tangent) -> Covector:
        return self._weights(x) * v / x[..., -1:].square()

    def _sharp(self, x: Point, p: Covector) -> Tangent:
        return p * x[..., -1:].square() / self._weights(x)

    def _trace(self, x: Point, form: Tensor) -> Scalar:
        return self._sharp(x, form.diagonal(dim1=-2, dim2=-1)).sum(-1)

    def _log_volume(self, x: Point) -> Scalar:
        return 0.5 * self._weights(x).log().sum() - self.dim * x[..., -1].log()

    def _random_tangent(self, x: Point, z: Tensor) -> Tangent:
        return z * x[..., -1:] / self._weights(x).sqrt()

    # -- geodesics, by the isometry -------------------------------------------------------

    def _exp(self, x: Point, v: Tangent) -> Point:
        w = self._widths(x)
        y, step = self.half_space._follow(x / w, v / w)
        self.half_space._check_end("exp", y)
        # x plus the step, so that exp(x, 0) is x to the last bit
        return torch.cat([x[..., :-1] + w[:-1] * step, y[..., -1:]], -1)

    def _geodesic(self, x: Point, v: Tangent, ts: Tensor) -> Point:
        x, v = (z.expand(ts.shape[0], *z.shape) for z in (x, v))
        return self._exp(x, ts.reshape(-1, *[1] * (v.dim() - 1)) * v)

    def _connect(self, x: Point, y: Point) -> Connection:
        w = self._widths(x)
        found = self.half_space._connect(x / w, y / w)
        return found._replace(velocity=w * found.velocity)

    def _sqdist(self, x: Point, y: Point) -> Scalar:
        w = self._widths(x)
        return self.half_space._sqdist(x / w, y / w)

    def _transport(self, x: Point, y: Point, v: Tangent) -> Tangent:
        w = self._widths(x)
        return w * self.half_space._transport(x / w, y / w, v / w)

    def _transport_along(self, x: Point, u: Tangent, v: Tangent) -> tuple[Point, Tangent]:
        w = self._widths(x)
        y, moved = self.half_space._transport_along(x / w, u / w, v / w)
        return w * y, w * moved

    # -- connection and curvature ---------------------------------------------------------

    def _christoffel(self, x: Point) -> Tensor:
        # homogeneous of degree 0 in the coordinates: G^k_ij scales as w_k / (w_i w_j)
        w = self._widths(x)
        gamma = self.half_space._christoffel(x / w)
        return gamma * w[:, None, None] / (w[:, None] * w)

    def _acceleration(self, x: Point, v: Tangent) -> Tangent:
        w = self._widths(x)
        return w * self.half_space._acceleration(x / w, v / w)

    def _geodesic_field(self, x: Point, p: Covector) -> tuple[Tangent, Covector]:
        # H = sigma^2 sum p_i^2 / (2 weight_i)
        v = self._sharp(x, p)
        force = torch.zeros_like(p)
        down = -(dot(p, v) / x[..., -1]).unsqueeze(-1)
        return v, torch.cat([force[..., :-1], down], -1)

    def _riemann(self, x: Point) -> Tensor:
        return self.curvature * constant_curvature(self.metric(x))

    def _ricci(self, x: Point) -> Tensor:
        return (self.dim - 1) * self.curvature * self.metric(x)

    def _scalar_curvature(self, x: Point) -> Scalar:
        return torch.full_like(x[..., 0], self.dim * (self.dim - 1) * self.curvature)

    def _sectional(self, x: Point, u: Tangent, v: Tangent) -> Scalar:
        return torch.full_like(x[..., 0], self.curvature)

    # -- points ---------------------------------------------------------------------------

    def _is_point(self, x: Tensor, atol: float) -> Tensor:
        return self.half_space._is_point(x, atol)

    def _project(self, x: Tensor) -> Point:
        return self.half_space._project(x)

    def _random_point(self, z: Tensor) -> Point:
        return self.half_space._random_point(z)
