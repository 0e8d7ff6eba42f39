r"""Surfaces in R^3 in their usual coordinates: of revolution, the torus, the ellipsoid.

Geodesics have no elementary closed form here, so they are integrated; the connection, the
curvature and Hamilton's equations are written out, several times cheaper than differentiating
the metric. Do Carmo (1976), "Differential Geometry of Curves and Surfaces", ch. 3-4.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from darboux import _autodiff, _checks
from darboux._typing import Covector, Point, Scalar, Tangent
from darboux.manifolds import _constants
from darboux.manifolds._constants import Constant, plain_number
from darboux.manifolds.chart import Chart
from darboux.manifolds.linalg import dot, solve_vector
from darboux.manifolds.space_forms import constant_curvature

Profile = Callable[[Tensor], tuple[Tensor, Tensor]]


class Surface(Chart):
    """A surface in R^3 whose Gauss curvature is known."""

    trusted = True

    @abstractmethod
    def embedding(self, x: Point) -> Tensor:
        """Return the points ``(..., 3)`` of R^3 with coordinates ``x (..., 2)``."""

    @abstractmethod
    def _gauss_curvature(self, x: Point) -> Scalar: ...

    def _riemann(self, x: Point) -> Tensor:
        k = self._gauss_curvature(x)[..., None, None, None, None]
        return k * constant_curvature(self.metric(x))

    def _ricci(self, x: Point) -> Tensor:
        return self._gauss_curvature(x)[..., None, None] * self.metric(x)

    def _scalar_curvature(self, x: Point) -> Scalar:
        return 2 * self._gauss_curvature(x)

    def _sectional(self, x: Point, u: Tangent, v: Tangent) -> Scalar:
        return self._gauss_curvature(x)


class RotationSurface(Surface):
    r"""A surface with metric :math:`E(u)\,du^2 + G(u)\,d\varphi^2`."""

    @abstractmethod
    def _first_form(self, u: Scalar) -> tuple[Scalar, Scalar]:
        """Return E and G."""

    @abstractmethod
    def _first_form_slope(self, u: Scalar) -> tuple[Scalar, Scalar, Scalar, Scalar]:
        """Return E, G and their derivatives."""

    def metric(self, x: Point) -> Tensor:
        """Return ``diag(E, G) (..., 2, 2)``."""
        return torch.diag_embed(self._diagonal(x))

    def _diagonal(self, x: Point) -> Tensor:
        return torch.stack(torch.broadcast_tensors(*self._first_form(x[..., 0])), -1)

    def _flat(self, x: Point, v: Tangent) -> Covector:
        return self._diagonal(x) * v

    def _sharp(self, x: Point, p: Covector) -> Tangent:
        return p / self._diagonal(x)

    def _trace(self, x: Point, form: Tensor) -> Scalar:
        return (form.diagonal(dim1=-2, dim2=-1) / self._diagonal(x)).sum(-1)

    def _log_volume(self, x: Point) -> Scalar:
        return 0.5 * self._diagonal(x).log().sum(-1)

    def _random_tangent(self, x: Point, z: Tensor) -> Tangent:
        return z / self._diagonal(x).sqrt()

    def _christoffel(self, x: Point) -> Tensor:
        e, g, de, dg = torch.broadcast_tensors(*self._first_form_slope(x[..., 0]))
        zero, mixed = torch.zeros_like(e), dg / (2 * g)
        entries = [de / (2 * e), zero, zero, -dg / (2 * e), zero, mixed, mixed, zero]
        return torch.stack(entries, -1).unflatten(-1, (2, 2, 2))

    def _acceleration(self, x: Point, v: Tangent) -> Tangent:
        e, g, de, dg = self._first_form_slope(x[..., 0])
        a, b = v.unbind(-1)
        return torch.stack([(dg * b * b - de * a * a) / (2 * e), -dg / g * a * b], -1)

    def _geodesic_field(self, x: Point, p: Covector) -> tuple[Tangent, Covector]:
        # Clairaut: the momentum of the angle is constant, exactly.
        e, g, de, dg = self._first_form_slope(x[..., 0])
        a, b = p[..., 0] / e, p[..., 1] / g
        force = (de * a * a + dg * b * b) / 2
        return torch.stack([a, b], -1), torch.stack([force, torch.zeros_like(force)], -1)


def _rates(f: Callable[[Scalar], tuple[Scalar, ...]], u: Scalar) -> Any:
    # the values of f and their derivatives, one number after the other
    along = torch.ones_like(u)[..., None]
    y, dy = _autodiff.directional(lambda z: torch.stack(f(z[..., 0]), -1), u[..., None], along)
    return y.unbind(-1), dy.unbind(-1)


class SurfaceOfRevolution(RotationSurface):
    r"""The surface swept by a plane curve turning about the z axis, coordinates (u, angle).

    ``profile(u) -> (radius, height)`` maps tensors ``(...)`` to two tensors ``(...)``; it may be
    an ``nn.Module``.

    .. math:: g = (r'^2 + z'^2)\,du^2 + r^2 d\varphi^2, \qquad
              K = \frac{z'(r'z'' - r''z')}{r\,(r'^2 + z'^2)^2}

    ``bounds`` holds the range of u to draw, ``period`` the period of u if it has one.

    >>> catenoid = SurfaceOfRevolution(lambda u: (torch.cosh(u), u), bounds=(-1, 1))
    >>> catenoid.scalar_curvature(torch.tensor([0.0, 0.0]))
    tensor(-2.)
    """

    def __init__(
        self,
        profile: Profile,
        bounds: tuple[float, float] = (-1.0, 1.0),
        *,
        period: float = math.inf,
        method: str = "gauss16",
        steps: int | None = None,
    ):
        turn = 2 * math.pi
        both = [(float(bounds[0]), float(bounds[1])), (0.0, turn)]
        super().__init__(2, method=method, steps=steps, periods=(period, turn), bounds=both)
        self.profile = profile

    def embedding(self, x: Point) -> Tensor:
        """Return the points ``(..., 3)`` of R^3 with coordinates ``x (..., 2)``."""
        u, phi = x.unbind(-1)
        r, z = self._curve(u)
        return torch.stack([r * phi.cos(), r * phi.sin(), z], -1)

    def _curve(self, u: Scalar) -> tuple[Scalar, Scalar]:
        r, z = self.profile(u)
        for name, value in (("radius", r), ("height", z)):
            _checks.check_tensor(f"{self.name}.profile", name, value)
        r, z = torch.broadcast_tensors(r, z)
        if r.shape != u.shape:
            raise ValueError(
                f"{self.name}: profile maps u of shape {tuple(u.shape)} to shape {tuple(r.shape)}, "
                "expected the same shape"
            )
        return r, z

    def _curve_slope(self, u: Scalar) -> tuple[Scalar, ...]:
        (r, z), (dr, dz) = _rates(self._curve, u)
        return r, z, dr, dz

    def _curve_jet(self, u: Scalar) -> tuple[Scalar, ...]:
        (r, _, dr, dz), (_, _, ddr, ddz) = _rates(self._curve_slope, u)
        return r, dr, dz, ddr, ddz

    def _first_form(self, u: Scalar) -> tuple[Scalar, Scalar]:
        r, _, dr, dz = self._curve_slope(u)
        return dr * dr + dz * dz, r * r

    def _first_form_slope(self, u: Scalar) -> tuple[Scalar, Scalar, Scalar, Scalar]:
        r, dr, dz, ddr, ddz = self._curve_jet(u)
        return dr * dr + dz * dz, r * r, 2 * (dr * ddr + dz * ddz), 2 * r * dr

    def _gauss_curvature(self, x: Point) -> Scalar:
        r, dr, dz, ddr, ddz = self._curve_jet(x[..., 0])
        return dz * (dr * ddz - ddr * dz) / (r * (dr * dr + dz * dz).square())

    def _is_point(self, x: Tensor, atol: float) -> Tensor:
        return x.isfinite().all(-1) & (self._curve(x[..., 0])[0] != 0)

    def _random_point(self, z: Tensor) -> Point:
        assert self.bounds is not None
        return _uniform(z, self.bounds)


class TorusOfRevolution(RotationSurface):
    r"""The torus in R^3 of radii R > r, coordinates (u, v), both of period :math:`2\pi`.

    .. math:: ((R + r\cos u)\cos v,\ (R + r\cos u)\sin v,\ r\sin u), \qquad
              K = \frac{\cos u}{r(R + r\cos u)}

    >>> TorusOfRevolution(2.0, 1.0).scalar_curvature(torch.tensor([0.0, 0.0]))
    tensor(0.6667)
    """

    R: Constant
    r: Constant

    def __init__(
        self,
        R: Constant = 2.0,
        r: Constant = 1.0,
        *,
        method: str = "gauss16",
        steps: int | None = None,
    ):
        turn = 2 * math.pi
        super().__init__(
            2, method=method, steps=steps, periods=(turn, turn), bounds=[(0.0, turn)] * 2
        )
        _constants.register(self, "R", R, positive=True)
        _constants.register(self, "r", r, positive=True)
        if not plain_number(R) > plain_number(r):
            raise ValueError(
                f"{self.name}: R is {plain_number(R)}, expected more than r = {plain_number(r)}"
            )

    def embedding(self, x: Point) -> Tensor:
        """Return the points ``(..., 3)`` of R^3 with coordinates ``x (..., 2)``."""
        u, v = x.unbind(-1)
        ring = self.R + self.r * u.cos()
        return torch.stack([ring * v.cos(), ring * v.sin(), self.r * u.sin()], -1)

    def _first_form(self, u: Scalar) -> tuple[Scalar, Scalar]:
        return self.r * self.r * torch.ones_like(u), (self.R + self.r * u.cos()).square()

    def _first_form_slope(self, u: Scalar) -> tuple[Scalar, Scalar, Scalar, Scalar]:
        ring = self.R + self.r * u.cos()
        one = torch.ones_like(u)
        slope = -2 * self.r * u.sin() * ring
        return self.r * self.r * one, ring * ring, torch.zeros_like(u), slope

    def _gauss_curvature(self, x: Point) -> Scalar:
        cos = x[..., 0].cos()
        return cos / (self.r * (self.R + self.r * cos))

    def _random_point(self, z: Tensor) -> Point:
        assert self.bounds is not None
        return _uniform(z, self.bounds)


class Ellipsoid(Surface):
    r"""The ellipsoid of semi-axes a, b, c, coordinates (theta, phi) with 0 < theta < pi.

    .. math:: (a\sin\theta\cos\varphi,\ b\sin\theta\sin\varphi,\ c\cos\theta), \qquad
        K = \frac{1}{a^2b^2c^2\,(x^2/a^4 + y^2/b^4 + z^2/c^4)^2}

    >>> Ellipsoid(1.0, 1.0, 2.0).scalar_curvature(torch.tensor([torch.pi / 2, 0.0]))
    tensor(0.5000)
    """

    a: Constant
    b: Constant
    c: Constant

    def __init__(
        self,
        a: Constant,
        b: Constant,
        c: Constant,
        *,
        method: str = "gauss16",
        steps: int | None = None,
    ):
        super().__init__(
            2,
            method=method,
            steps=steps,
            periods=(math.inf, 2 * math.pi),
            bounds=[(0.0, math.pi), (0.0, 2 * math.pi)],
        )
        for name, value in (("a", a), ("b", b), ("c", c)):
            _constants.register(self, name, value, positive=True)

    def embedding(self, x: Point) -> Tensor:
        """Return the points ``(..., 3)`` of R^3 with coordinates ``x (..., 2)``."""
        return self._derivatives(x)[0]

    def _derivatives(self, x: Point) -> tuple[Tensor, ...]:
        """Return f, f_1, f_2, f_11, f_12, f_22 of the embedding f, each ``(..., 3)``."""
        theta, phi = x.unbind(-1)
        st, ct, sp, cp = theta.sin(), theta.cos(), phi.sin(), phi.cos()
        zero = torch.zeros_like(st)

        def vector(u: Scalar, v: Scalar, w: Scalar) -> Tensor:
            return torch.stack([self.a * u, self.b * v, self.c * w], -1)

        f = vector(st * cp, st * sp, ct)
        f_1, f_2 = vector(ct * cp, ct * sp, -st), vector(-st * sp, st * cp, zero)
        return f, f_1, f_2, -f, vector(-ct * sp, ct * cp, zero), vector(-st * cp, -st * sp, zero)

    def metric(self, x: Point) -> Tensor:
        """Return the first fundamental form ``(..., 2, 2)``."""
        return _gram(*self._derivatives(x)[1:3])

    def _christoffel(self, x: Point) -> Tensor:
        _, f_1, f_2, f_11, f_12, f_22 = self._derivatives(x)
        columns = [
            solve_vector(_gram(f_1, f_2), torch.stack([dot(f_1, s), dot(f_2, s)], -1))
            for s in (f_11, f_12, f_12, f_22)
        ]
        return torch.stack(columns, -1).unflatten(-1, (2, 2))

    def _acceleration(self, x: Point, v: Tangent) -> Tangent:
        _, f_1, f_2, f_11, f_12, f_22 = self._derivatives(x)
        a, b = v[..., :1], v[..., 1:]
        bend = a * a * f_11 + 2 * a * b * f_12 + b * b * f_22
        return -solve_vector(_gram(f_1, f_2), torch.stack([dot(f_1, bend), dot(f_2, bend)], -1))

    def _geodesic_field(self, x: Point, p: Covector) -> tuple[Tangent, Covector]:
        # p' = grad |Df v|^2 / 2 with v held
        _, f_1, f_2, f_11, f_12, f_22 = self._derivatives(x)
        v = solve_vector(_gram(f_1, f_2), p)
        a, b = v[..., :1], v[..., 1:]
        w = a * f_1 + b * f_2
        force = torch.stack([dot(w, a * f_11 + b * f_12), dot(w, a * f_12 + b * f_22)], -1)
        return v, force

    def _gauss_curvature(self, x: Point) -> Scalar:
        a2, b2, c2 = (s * s for s in (self.a, self.b, self.c))
        px, py, pz = self.embedding(x).square().unbind(-1)
        support = px / (a2 * a2) + py / (b2 * b2) + pz / (c2 * c2)
        return 1 / (a2 * b2 * c2 * support.square())

    def _is_point(self, x: Tensor, atol: float) -> Tensor:
        theta = x[..., 0]
        return x.isfinite().all(-1) & (theta > 0) & (theta < math.pi)

    def _project(self, x: Tensor) -> Point:
        edge = 4 * torch.finfo(x.dtype).eps
        theta = x[..., :1].clamp(edge, math.pi - edge)
        return torch.cat([theta, x[..., 1:]], -1)

    def _random_point(self, z: Tensor) -> Point:
        return _uniform(z, [(0.1 * math.pi, 0.9 * math.pi), (0.0, 2 * math.pi)])


def _gram(f_1: Tensor, f_2: Tensor) -> Tensor:
    e, f, g = dot(f_1, f_1), dot(f_1, f_2), dot(f_2, f_2)
    return torch.stack([e, f, f, g], -1).unflatten(-1, (2, 2))


def _uniform(z: Tensor, bounds: Sequence[tuple[float, float]]) -> Tensor:
    # normal numbers to uniform ones in a box
    sides = zip(*bounds, strict=True)
    low, high = (torch.tensor(side, dtype=z.dtype, device=z.device) for side in sides)
    return low + (high - low) * 0.5 * (1 + torch.erf(z / math.sqrt(2)))
