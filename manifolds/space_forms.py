r"""Spaces of constant curvature in conformal charts: the stereographic ball and the half-space.

Every formula is entire in the curvature and in the squared length of its vectors, so values and
derivatives of any order are right at ``v = 0``, at ``y = x`` and at curvature 0. Distances on
the hyperbolic side use arsinh, on the spherical side atan2; nothing is clamped. Ungar (2008),
"A Gyrovector Space Approach to Hyperbolic Geometry"; Ratcliffe (2019), ch. 4.
"""

from abc import abstractmethod

import torch
from torch import Tensor

from darboux import _checks, _smooth
from darboux._checks import GeometryError
from darboux._typing import Covector, Point, Scalar, Tangent
from darboux.manifolds import _constants
from darboux.manifolds._constants import Constant, plain_number
from darboux.manifolds.base import Connection, exact
from darboux.manifolds.chart import Chart
from darboux.manifolds.linalg import dot


class SpaceForm(Chart):
    """A chart with metric ``I / scale(x)^2`` and constant sectional curvature ``curvature``."""

    trusted = True
    curvature: Constant

    @abstractmethod
    def _scale(self, x: Point) -> Scalar:
        """Return the square root of the inverse conformal factor, ``(...)``."""

    @abstractmethod
    def _slope(self, x: Point) -> Covector:
        """Return the derivative of ``-log scale``, ``(..., d)``."""

    def _squared_scale(self, x: Point) -> Tensor:
        return self._scale(x).square().unsqueeze(-1)

    def metric(self, x: Point) -> Tensor:
        """Return the conformal metric ``(..., d, d)``."""
        eye = torch.eye(self.dim, dtype=x.dtype, device=x.device)
        return eye / self._squared_scale(x).unsqueeze(-1)

    def _flat(self, x: Point, v: Tangent) -> Covector:
        return v / self._squared_scale(x)

    def _sharp(self, x: Point, p: Covector) -> Tangent:
        return p * self._squared_scale(x)

    def _inner(self, x: Point, u: Tangent, v: Tangent) -> Scalar:
        scale = self._scale(x).unsqueeze(-1)
        return dot(u / scale, v / scale)

    def _trace(self, x: Point, form: Tensor) -> Scalar:
        return form.diagonal(dim1=-2, dim2=-1).sum(-1) * self._scale(x).square()

    def _log_volume(self, x: Point) -> Scalar:
        return -self.dim * self._scale(x).log()

    def _check_end(self, method: str, y: Point) -> None:
        _checks.check_that(
            f"{self.name}.{method}",
            lambda: self._is_point(y, 0.0),
            f"the geodesic ends closer to the edge of the chart than {y.dtype} resolves",
            GeometryError,
        )

    def _geodesic(self, x: Point, v: Tangent, ts: Tensor) -> Point:
        x, v = (z.expand(ts.shape[0], *z.shape) for z in (x, v))
        return self._exp(x, ts.reshape(-1, *[1] * (v.dim() - 1)) * v)

    def _converged(self, method: str, connection: Connection) -> Connection:
        return connection  # closed forms always are, and minimise even at a conjugate point

    def _christoffel(self, x: Point) -> Tensor:
        # G^k_ij = d^k_i f_j + d^k_j f_i - d_ij f^k
        eye = torch.eye(self.dim, dtype=x.dtype, device=x.device)
        f = self._slope(x)
        a = eye[:, :, None] * f[..., None, None, :]
        return a + a.transpose(-1, -2) - eye * f[..., :, None, None]

    def _acceleration(self, x: Point, v: Tangent) -> Tangent:
        f = self._slope(x)
        return dot(v, v).unsqueeze(-1) * f - 2 * dot(f, v).unsqueeze(-1) * v

    def _geodesic_field(self, x: Point, p: Covector) -> tuple[Tangent, Covector]:
        v = self._squared_scale(x) * p
        return v, dot(p, v).unsqueeze(-1) * self._slope(x)

    def _riemann(self, x: Point) -> Tensor:
        return self.curvature * constant_curvature(self.metric(x))

    def _ricci(self, x: Point) -> Tensor:
        return (self.dim - 1) * self.curvature * self.metric(x)

    def _scalar_curvature(self, x: Point) -> Scalar:
        return self.dim * (self.dim - 1) * self.curvature * torch.ones_like(x[..., 0])

    def _sectional(self, x: Point, u: Tangent, v: Tangent) -> Scalar:
        return self.curvature * torch.ones_like(x[..., 0])

    def _random_tangent(self, x: Point, z: Tensor) -> Tangent:
        return z * self._scale(x).unsqueeze(-1)


def constant_curvature(g: Tensor) -> Tensor:
    r"""Return :math:`\delta^l_i g_{kj} - \delta^l_j g_{ki}`, the Riemann tensor at curvature 1."""
    eye = torch.eye(g.shape[-1], dtype=g.dtype, device=g.device)
    r = eye[:, None, :, None] * g[..., None, :, None, :]
    return r - r.transpose(-1, -2)


class Stereographic(SpaceForm):
    r"""The space of curvature K in stereographic coordinates, for K of any sign.

    .. math:: g = \frac{4\,I}{(1 + K|x|^2)^2}, \qquad
              d(x, y) = \tfrac{2}{\sqrt K}\arctan\bigl(\sqrt K\,|{-x}\oplus y|\bigr)

    The Poincaré ball of radius :math:`1/\sqrt{-K}` for K < 0, flat space (with g = 4 I) for
    K = 0, the sphere without one point for K > 0. ``curvature`` may be a parameter; everything is
    smooth in it, through 0. Near the rim a coordinate resolves hyperbolic radii up to 37 in
    float64 and 17 in float32; a geodesic that goes further raises ``GeometryError``.

    >>> ball = Stereographic(2, -1.0)
    >>> ball.dist(torch.tensor([0.0, 0.0]), torch.tensor([0.5, 0.0]))
    tensor(1.0986)
    """

    def __init__(self, dim: int, curvature: Constant):
        plain = abs(plain_number(curvature))
        edge = 1 / plain**0.5 if plain else 1.0
        super().__init__(dim, bounds=[(-edge, edge)] * dim)
        _constants.register(self, "curvature", curvature)

    @property
    def _hyperbolic(self) -> bool:
        """True where the curvature is a number and not positive, which saves the other cases."""
        return isinstance(self.curvature, float) and self.curvature <= 0

    def _conformal(self, x: Point) -> Scalar:
        """Return ``1 + K |x|^2``, to full accuracy near the rim."""
        return self._conformal_of(dot(x, x))

    def _conformal_of(self, square: Scalar) -> Scalar:
        t = self.curvature * square
        if isinstance(self.curvature, float) and self.curvature >= 0:
            return 1 + t
        near_rim = t < -0.25
        r = torch.where(near_rim, -t, 1.0).sqrt()
        return torch.where(near_rim, (1 - r) * (1 + r), 1 + t)

    def _scale(self, x: Point) -> Scalar:
        return self._conformal(x) / 2

    def _slope(self, x: Point) -> Covector:
        return -2 * self.curvature * x / self._conformal(x).unsqueeze(-1)

    # -- geodesics ------------------------------------------------------------------------

    def _exp(self, x: Point, v: Tangent) -> Point:
        y = self._follow(x, v)[0]
        self._check_end("exp", y)
        return y

    def _follow(self, x: Point, v: Tangent) -> tuple[Point, Scalar, Tensor, Tensor, Tensor]:
        # With q = v / (1 + K|x|^2), c = cos(sqrt K |q|), s = sin(sqrt K |q|) / (sqrt K |q|):
        #   y = x + (1 + K|x|^2) s (f q - K s w) / (f^2 + K^2 s^2 |w|^2/|q|^2),
        #   f = c - K s <x, q>,  w = |q|^2 x - <x, q> q.
        # For long hyperbolic geodesics c and s are scaled by e^-a, a = sqrt(-K) |q|, and f is
        # written without the cancellation of c against s.
        k = self.curvature
        xx = dot(x, x).unsqueeze(-1)
        nx = self._conformal_of(xx)
        q = v / nx
        qq, xq = dot(q, q).unsqueeze(-1), dot(x, q).unsqueeze(-1)
        t = k * qq
        far = t < -1
        a = torch.where(far, -t, 1.0).sqrt()
        m = torch.exp(-2 * a)
        near = torch.where(far, 0.0, t)
        if self._hyperbolic:
            cos, sin = _smooth.stumpff(near, 0), _smooth.stumpff(near, 1)
        else:
            cos, sin = _smooth.cosc(near), _smooth.sinc(near)
        s = torch.where(far, -torch.expm1(-2 * a) / (2 * a), sin)
        f = torch.where(far, m + s * (a - k * xq), cos - k * s * xq)
        w = qq * x - xq * q
        ww = dot(w, w).unsqueeze(-1) / torch.where(far, qq, 1.0)
        ww = torch.where(far, ww, qq * xx - xq * xq)
        length = f * f + k * k * s * s * ww
        y = x + nx * s * (f * q - k * s * w) / length
        # ratio of the conformal factors 1 + K|y|^2 and 1 + K|x|^2
        ratio = torch.where(far, m, 1.0) / length
        return y, ratio, f, s * q, length

    def _rotate(self, v: Tensor, f: Tensor, a: Tensor, b: Tensor, length: Tensor) -> Tensor:
        # by the rotor with scalar part f and bivector K a ^ b, of squared length |.|^2
        def turn(z: Tensor) -> Tensor:
            return self.curvature * (dot(a, z).unsqueeze(-1) * b - dot(b, z).unsqueeze(-1) * a)

        once = turn(v)
        return v + 2 * (f * once + turn(once)) / length

    def _transport_along(self, x: Point, u: Tangent, v: Tangent) -> tuple[Point, Tangent]:
        y, ratio, f, step, length = self._follow(x, u)
        self._check_end("transport_along", y)
        return y, ratio * self._rotate(v, f, x, step, length)

    def _halves(self, x: Point, y: Point) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return 1 + K|x|^2, 1 + K|y|^2, |y - x|^2 and the numerator D = |1 + K x y|^2.

        Of half the angle z = K |y - x|^2 / (nx ny) is the squared sine, w = D / (nx ny) the
        squared cosine.
        """
        k = self.curvature
        xx = dot(x, x)
        nx, ny = self._conformal_of(xx), self._conformal(y)
        gap = dot(y - x, y - x)
        product = nx * ny
        if self._hyperbolic:
            return nx, ny, gap, product - k * gap, product
        # Near the antipode D is small: there it is a sum of two squares.
        xy = dot(x, y)
        scalar = 1 + k * xy
        opposite = (k * gap > 0) & (scalar < 0.5)
        wedge = xx.unsqueeze(-1) * y - xy.unsqueeze(-1) * x
        wedge = dot(wedge, wedge) / torch.where(opposite, xx, 1.0)
        d = torch.where(opposite, scalar * scalar + k * k * wedge, product - k * gap)
        return nx, ny, gap, d, product

    def _connect(self, x: Point, y: Point) -> Connection:
        k = self.curvature
        nx, ny, gap, d, product = self._halves(x, y)
        w = d / product
        if self._hyperbolic:
            factor = _smooth.asinhc(-k * gap / product) / (ny * w.sqrt())
            direction = nx.unsqueeze(-1) * (y - x) + (k * gap).unsqueeze(-1) * x
            return exact(factor.unsqueeze(-1) * direction)
        # Compare logarithmically small cosines with the round-off of the coordinates.
        cut = (k * gap > 0) & (w.detach() <= (8 * torch.finfo(x.dtype).eps) ** 2)
        angle = _smooth.asinc(k * gap / product, w)
        factor = angle / (ny * torch.where(cut, 1.0, w).sqrt())
        direction = nx.unsqueeze(-1) * (y - x) + (k * gap).unsqueeze(-1) * x
        # At the antipode every direction is one of a shortest geodesic: take the first axis.
        axis = (torch.arange(self.dim, device=x.device) == 0).to(x.dtype)
        size = torch.where(cut, _constants.magnitude(k, x), 1.0)
        half_turn = torch.pi / 2 / size.sqrt() * nx
        v = torch.where(
            cut.unsqueeze(-1), half_turn.unsqueeze(-1) * axis, factor.unsqueeze(-1) * direction
        )
        return exact(v, conjugate=cut)

    def _sqdist(self, x: Point, y: Point) -> Scalar:
        _, _, gap, d, product = self._halves(x, y)
        s = gap / product
        if self._hyperbolic:
            return 4 * s * _smooth.asinhc(-self.curvature * s).square()
        return 4 * s * _smooth.asinc(self.curvature * s, d / product).square()

    def _transport(self, x: Point, y: Point, v: Tangent) -> Tangent:
        nx, ny, gap, d, _ = self._halves(x, y)
        scalar = (nx + ny - self.curvature * gap) / 2  # 1 + K <x, y>
        scalar, length = scalar.unsqueeze(-1), torch.where(d == 0, 1.0, d).unsqueeze(-1)
        return (ny / nx).unsqueeze(-1) * self._rotate(v, scalar, x, y - x, length)

    # -- points ---------------------------------------------------------------------------

    def _is_point(self, x: Tensor, atol: float) -> Tensor:
        return x.isfinite().all(-1) & (self._conformal(x) > 0)

    def _project(self, x: Tensor) -> Point:
        t = -self.curvature * dot(x, x)
        edge = 1 - 4 * torch.finfo(x.dtype).eps
        outside = t > edge**2
        shrink = torch.where(outside, edge / torch.where(outside, t, 1.0).sqrt(), 1.0)
        return shrink.unsqueeze(-1) * x

    def _random_point(self, z: Tensor) -> Point:
        # tanh(|z|/2) z/|z| in units of the radius: unit variance at curvature -1, and on the
        # sphere points of one hemisphere
        size = _constants.magnitude(self.curvature, z)
        half = dot(z, z).unsqueeze(-1) / 4
        return _smooth.tanhc(half) * z / 2 / torch.where(size > 0, size, 1.0).sqrt()


class HalfSpace(SpaceForm):
    r"""Hyperbolic space of curvature K < 0 on the half-space where the last coordinate is positive.

    .. math:: g = \frac{I}{-K\,y^2}, \qquad
              d(p, q) = \tfrac{2}{\sqrt{-K}}\operatorname{arsinh}\frac{|p - q|}{2\sqrt{y_p y_q}}

    >>> HalfSpace(2).dist(torch.tensor([0.0, 1.0]), torch.tensor([0.0, torch.e])).round()
    tensor(1.)
    """

    def __init__(self, dim: int, curvature: Constant = -1.0):
        if dim < 2:
            raise ValueError(f"HalfSpace: dim is {dim}, expected at least 2")
        super().__init__(dim, bounds=[*[(-2.0, 2.0)] * (dim - 1), (0.1, 4.0)])
        plain = plain_number(curvature)
        if not plain < 0:
            raise ValueError(f"HalfSpace: curvature is {plain}, expected a negative number")
        _constants.register(self, "curvature", curvature)

    def _scale(self, x: Point) -> Scalar:
        return _constants.sqrt(-self.curvature) * x[..., -1]

    def _slope(self, x: Point) -> Covector:
        return -self._up(x) / x[..., -1:]

    def _up(self, x: Point) -> Tensor:
        return (torch.arange(self.dim, device=x.device) == self.dim - 1).to(x.dtype)

    def _exp(self, x: Point, v: Tangent) -> Point:
        y = self._follow(x, v)[0]
        self._check_end("exp", y)
        return y

    def _follow(self, x: Point, v: Tangent) -> tuple[Point, Tensor]:
        # With a the horizontal and b the vertical part of v, q = v / y, w = |q|:
        #   h' = h + s a / f, y' = y / f, s = sinh w / w, f = cosh w - s b / y,
        # scaled by e^-w and without the cancellation in f where the geodesic is long.
        height = x[..., -1:]
        q = v / height
        level, rise = q[..., :-1], q[..., -1:]
        t = dot(q, q).unsqueeze(-1)
        far = t > 1
        w = torch.where(far, t, 1.0).sqrt()
        m = torch.exp(-2 * w)
        near = torch.where(far, 0.0, -t)
        s = torch.where(far, -torch.expm1(-2 * w) / (2 * w), _smooth.stumpff(near, 1))
        up = far & (rise > 0)
        gap = dot(level, level).unsqueeze(-1) / torch.where(up, w + rise, 1.0)
        f_far = torch.where(up, m + s * gap, (1 + m) / 2 - s * rise)
        f = torch.where(far, f_far, _smooth.stumpff(near, 0) - s * rise)
        step = s * v[..., :-1] / f
        y = torch.cat([x[..., :-1] + step, height * torch.where(far, torch.exp(-w), 1.0) / f], -1)
        return y, step

    def _rotate(self, v: Tensor, step: Tensor, low: Tensor, high: Tensor) -> Tensor:
        # The rotor of a move by ``step`` from height ``low`` to ``high``, scaled by high / low:
        # scalar part low + high, bivector step ^ up.
        def turn(z: Tensor) -> Tensor:
            return torch.cat([step * z[..., -1:], -dot(step, z[..., :-1]).unsqueeze(-1)], -1)

        total = low + high
        once = turn(v)
        length = total * total + dot(step, step).unsqueeze(-1)
        return high / low * (v + 2 * (total * once + turn(once)) / length)

    def _transport_along(self, x: Point, u: Tangent, v: Tangent) -> tuple[Point, Tangent]:
        y, step = self._follow(x, u)
        self._check_end("transport_along", y)
        return y, self._rotate(v, step, x[..., -1:], y[..., -1:])

    def _transport(self, x: Point, y: Point, v: Tangent) -> Tangent:
        return self._rotate(v, y[..., :-1] - x[..., :-1], x[..., -1:], y[..., -1:])

    def _half_sinh(self, x: Point, y: Point) -> Scalar:
        """Return the square of sinh(d/2) at curvature -1."""
        return dot(y - x, y - x) / (4 * x[..., -1] * y[..., -1])

    def _connect(self, x: Point, y: Point) -> Connection:
        z = self._half_sinh(x, y).unsqueeze(-1)
        step, low, high = y[..., :-1] - x[..., :-1], x[..., -1:], y[..., -1:]
        rise = (dot(step, step).unsqueeze(-1) + (high - low) * (high + low)) / (2 * high)
        factor = _smooth.asinhc(z) / (1 + z).sqrt()
        return exact(factor * torch.cat([step * (low / high), rise], -1))

    def _sqdist(self, x: Point, y: Point) -> Scalar:
        z = self._half_sinh(x, y)
        return 4 * z * _smooth.asinhc(z).square() / -self.curvature

    def _is_point(self, x: Tensor, atol: float) -> Tensor:
        return x.isfinite().all(-1) & (x[..., -1] > 0)

    def _project(self, x: Tensor) -> Point:
        height = x[..., -1:].clamp(min=torch.finfo(x.dtype).eps)
        return torch.cat([x[..., :-1], height], -1)

    def _random_point(self, z: Tensor) -> Point:
        return torch.cat([z[..., :-1], torch.exp(0.5 * z[..., -1:])], -1)


def Hyperbolic(
    dim: int, curvature: Constant = -1.0, model: str = "ball"
) -> Stereographic | HalfSpace:
    """Return hyperbolic space as the Poincaré ball (``model="ball"``) or the ``"half_space"``."""
    plain = plain_number(curvature)
    if not plain < 0:
        raise ValueError(f"Hyperbolic: curvature is {plain}, expected a negative number")
    if model == "ball":
        return Stereographic(dim, curvature)
    if model == "half_space":
        return HalfSpace(dim, curvature)
    raise ValueError(f"Hyperbolic: model is {model!r}, expected 'ball' or 'half_space'")
