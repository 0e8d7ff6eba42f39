r"""The round sphere in R^{n+1}, everything in closed form."""

import torch
from torch import Tensor

from darboux import _smooth
from darboux._typing import Point, Scalar, Tangent
from darboux.manifolds import _constants
from darboux.manifolds._constants import Constant
from darboux.manifolds.base import Connection, exact
from darboux.manifolds.embedded import Embedded
from darboux.manifolds.linalg import dot, outer


class Sphere(Embedded):
    r"""The sphere of dimension ``dim`` and radius ``radius`` in :math:`\mathbb R^{dim+1}`.

    .. math:: \exp_x v = \cos(|v|/r)\,x + \sin(|v|/r)\,r v/|v|, \qquad
              d(x, y) = 2r\operatorname{atan2}(|x - y|, |x + y|)

    Accurate to round-off for coincident and for antipodal points. At the exact antipode every
    direction is a shortest one; ``connect`` returns one of them, always the same, and says that
    it is conjugate and not unique.

    >>> Sphere(2).dist(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0]))
    tensor(1.5708)
    """

    radius: Constant

    def __init__(self, dim: int, radius: Constant = 1.0):
        super().__init__(dim, dim + 1)
        _constants.register(self, "radius", radius, positive=True)

    def _square(self) -> Constant:
        return self.radius * self.radius

    def _projector(self, x: Point) -> Tensor:
        return self.metric(x) - outer(x, x) / self._square()

    def _project_tangent(self, x: Point, v: Tensor) -> Tangent:
        return v - dot(x, v).unsqueeze(-1) * x / self._square()

    # -- geodesics ------------------------------------------------------------------------

    def _exp(self, x: Point, v: Tangent) -> Point:
        s = (dot(v, v) / self._square()).unsqueeze(-1)
        return _smooth.cosc(s) * x + _smooth.sinc(s) * v

    def _geodesic(self, x: Point, v: Tangent, ts: Tensor) -> Point:
        return self._exp(x, ts.reshape(-1, *[1] * v.dim()) * v)

    def _halves(self, x: Point, y: Point) -> tuple[Tensor, Tensor]:
        """Return the squares of the sine and cosine of half the angle."""
        scale = 4 * self._square()
        return dot(x - y, x - y) / scale, dot(x + y, x + y) / scale

    def _connect(self, x: Point, y: Point) -> Connection:
        z, w = self._halves(x, y)
        near = z <= w
        # y - x and y + x have the same tangential part; the shorter one is the accurate one.
        u = self._project_tangent(x, torch.where(near.unsqueeze(-1), y - x, y + x))
        q = dot(u, u)
        antipodal = q == 0
        antipodal = antipodal & ~near
        angle = _smooth.asinc(z, w)  # (angle / 2) / sin(angle / 2)
        small = angle / torch.where(near, w, 1.0).sqrt()
        far = torch.where(near | antipodal, 1.0, q)
        large = 2 * self.radius * angle * _smooth.sqrt(z) / far.sqrt()
        e = self._some_tangent(x)
        v = torch.where(near, small, large).unsqueeze(-1) * u
        v = torch.where(antipodal.unsqueeze(-1), torch.pi * self.radius * e, v)
        # within round-off of the antipode
        cut = w.detach() <= (8 * torch.finfo(x.dtype).eps) ** 2
        return exact(v, conjugate=cut)

    def _some_tangent(self, x: Point) -> Tangent:
        """Return a unit tangent vector that depends on ``x`` alone."""
        still = x.detach()
        axis = torch.arange(x.shape[-1], device=x.device)
        e = (axis == still.abs().argmin(-1, keepdim=True)).to(x.dtype)
        e = e - dot(still, e).unsqueeze(-1) * still / dot(still, still).unsqueeze(-1)
        return e / dot(e, e).sqrt().unsqueeze(-1)

    def _sqdist(self, x: Point, y: Point) -> Scalar:
        z, w = self._halves(x, y)
        return dot(x - y, x - y) * _smooth.asinc(z, w).square()

    def _transport(self, x: Point, y: Point, v: Tangent) -> Tangent:
        # The reflection that swaps x and -y; isometric to round-off.
        m = x + y
        q = dot(m, m).unsqueeze(-1)
        antipodal = q == 0
        m = torch.where(antipodal, self._some_tangent(x), m)
        return v - 2 * dot(m, v).unsqueeze(-1) / torch.where(antipodal, 1.0, q) * m

    def _transport_along(self, x: Point, u: Tangent, v: Tangent) -> tuple[Point, Tangent]:
        s = (dot(u, u) / self._square()).unsqueeze(-1)
        component = dot(u, v).unsqueeze(-1) / self._square()
        turned = v - component * (_smooth.sinc(s) * x + _smooth.versinc(s) * u)
        return self._exp(x, u), turned

    # -- connection and curvature ---------------------------------------------------------

    def _second_form(self, x: Point) -> tuple[Tensor, Tensor]:
        p = self._projector(x)
        return p, -x[..., :, None, None] * p.unsqueeze(-3) / self._square()

    def _acceleration(self, x: Point, v: Tangent) -> Tangent:
        return -dot(v, v).unsqueeze(-1) * x / self._square()

    def _riemann(self, x: Point) -> Tensor:
        p = self._projector(x)
        r = p[..., :, None, :, None] * p[..., None, :, None, :]
        return (r - r.transpose(-1, -2)) / self._square()

    def _ricci(self, x: Point) -> Tensor:
        return (self.dim - 1) * self._projector(x) / self._square()

    def _scalar_curvature(self, x: Point) -> Scalar:
        return self.dim * (self.dim - 1) * torch.ones_like(x[..., 0]) / self._square()

    def _sectional(self, x: Point, u: Tangent, v: Tangent) -> Scalar:
        return torch.ones_like(x[..., 0]) / self._square()

    # -- points ---------------------------------------------------------------------------

    def _project(self, x: Tensor) -> Point:
        return self.radius * x / dot(x, x).sqrt().unsqueeze(-1)
