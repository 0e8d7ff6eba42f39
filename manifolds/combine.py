r"""Conformal changes and warped products: a metric scaled by a function.

Each passes on what its parts know in closed form, so that nothing is differentiated that need
not be. Maps given by the user take ``(..., d)`` and may be ``nn.Module``s; their parameters are
then parameters of the space.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from darboux import _autodiff
from darboux._typing import Covector, Function, Point, Scalar, Tangent, VectorField
from darboux.manifolds.base import Manifold
from darboux.manifolds.chart import Chart
from darboux.manifolds.euclidean import Euclidean
from darboux.manifolds.linalg import dot, matvec, outer
from darboux.manifolds.product import Product, needs_flow


class Conformal(Chart):
    r"""A chart with the metric :math:`e^{2\varphi(x)} g_{base}`.

    ``log_factor`` is :math:`\varphi`, a function ``(..., d) -> (...)``. With D, <,> those of the
    base,

    .. math:: \Gamma(v, v) = \Gamma_{base}(v, v) + 2\,d\varphi(v)\,v - |v|^2 \nabla\varphi, \qquad
        R^l{}_{kij} = R^l_{base\,kij} - \delta^l_i T_{kj} + \delta^l_j T_{ki} - g_{kj}T^l{}_i
        + g_{ki}T^l{}_j

    where :math:`T = D^2\varphi - d\varphi^2 + \tfrac12|d\varphi|^2 g`. Besse (1987), 1.159.

    >>> from darboux.manifolds.euclidean import Euclidean
    >>> plane = Conformal(Euclidean(2), lambda x: -x[..., 1].log())  # hyperbolic
    >>> plane.scalar_curvature(torch.tensor([0.0, 1.0]))
    tensor(-2.)
    """

    def __init__(self, base: Manifold, log_factor: Callable[[Tensor], Tensor], **options: Any):
        needs_flow(type(self).__name__, "base", base)
        options.setdefault("bounds", getattr(base, "bounds", None))
        options.setdefault("periods", getattr(base, "periods", None))
        super().__init__(base.dim, **options)
        self.base = base
        self.log_factor = log_factor

    def _factor(self, x: Point) -> Tensor:
        """Return ``e^{2 phi} (..., 1)``."""
        phi = self.log_factor(x)
        if phi.shape != x.shape[:-1]:
            raise ValueError(
                f"{self.name}: log_factor maps x of shape {tuple(x.shape)} to shape "
                f"{tuple(phi.shape)}, expected {tuple(x.shape[:-1])}"
            )
        return torch.exp(2 * phi).unsqueeze(-1)

    def _slope(self, x: Point) -> tuple[Tensor, Covector]:
        phi, slope = _autodiff.pullback(self.log_factor, x, torch.ones_like)
        return phi.unsqueeze(-1), slope

    def metric(self, x: Point) -> Tensor:
        """Return the conformal metric ``(..., d, d)``."""
        return self._factor(x).unsqueeze(-1) * self.base.metric(x)

    def _flat(self, x: Point, v: Tangent) -> Covector:
        return self._factor(x) * self.base._flat(x, v)

    def _sharp(self, x: Point, p: Covector) -> Tangent:
        return self.base._sharp(x, p) / self._factor(x)

    def _inner(self, x: Point, u: Tangent, v: Tangent) -> Scalar:
        return self._factor(x).squeeze(-1) * self.base._inner(x, u, v)

    def _trace(self, x: Point, form: Tensor) -> Scalar:
        return self.base._trace(x, form) / self._factor(x).squeeze(-1)

    def _log_volume(self, x: Point) -> Scalar:
        return self.base._log_volume(x) + self.dim * self.log_factor(x)

    def _geodesic_field(self, x: Point, p: Covector) -> tuple[Tangent, Covector]:
        # H = e^{-2 phi} H_base
        phi, slope = self._slope(x)
        shrink = torch.exp(-2 * phi)
        if isinstance(self.base, Euclidean):
            v = shrink * p
            return v, dot(p, v).unsqueeze(-1) * slope
        v, force = _field(self.base, x, p)
        return shrink * v, shrink * (force + dot(p, v).unsqueeze(-1) * slope)

    def _acceleration(self, x: Point, v: Tangent) -> Tangent:
        _, slope = self._slope(x)
        up = self.base._sharp(x, slope)
        sq = self.base._inner(x, v, v).unsqueeze(-1)
        return self.base._acceleration(x, v) - 2 * dot(slope, v).unsqueeze(-1) * v + sq * up

    def _christoffel(self, x: Point) -> Tensor:
        _, slope = self._slope(x)
        eye = torch.eye(self.dim, dtype=x.dtype, device=x.device)
        a = eye[:, :, None] * slope[..., None, None, :]
        up = self.base._sharp(x, slope)
        bend = up[..., :, None, None] * self.base.metric(x).unsqueeze(-3)
        return self.base._christoffel(x) + a + a.transpose(-1, -2) - bend

    def _tensor(self, x: Point) -> tuple[Tensor, Tensor]:
        """Return T and the metric of the base."""
        _, slope = self._slope(x)
        g = self.base.metric(x)
        sq = dot(slope, self.base._sharp(x, slope))[..., None, None]
        hess = self.base._hessian(self.log_factor, x)
        return hess - outer(slope, slope) + 0.5 * sq * g, g

    def _riemann(self, x: Point) -> Tensor:
        t, g = self._tensor(x)
        eye = torch.eye(self.dim, dtype=x.dtype, device=x.device)
        up = self.base._sharp(x.unsqueeze(-2).expand_as(t), t).mT  # (..., l, i)
        a = eye[:, None, :, None] * t[..., None, :, None, :]
        a = a + up[..., :, None, :, None] * g[..., None, :, None, :]
        return self.base._riemann(x) - a + a.transpose(-1, -2)

    def _ricci(self, x: Point) -> Tensor:
        t, g = self._tensor(x)
        trace = self.base._trace(x, t)[..., None, None]
        return self.base._ricci(x) - (self.dim - 2) * t - trace * g

    def _scalar_curvature(self, x: Point) -> Scalar:
        t, _ = self._tensor(x)
        change = 2 * (self.dim - 1) * self.base._trace(x, t)
        return (self.base._scalar_curvature(x) - change) / self._factor(x).squeeze(-1)

    def _sectional(self, x: Point, u: Tangent, v: Tangent) -> Scalar:
        t, _ = self._tensor(x)
        uu, vv, uv = (self.base._inner(x, *pair) for pair in ((u, u), (v, v), (u, v)))
        tu, tv = matvec(t, u), matvec(t, v)
        change = (dot(tu, u) * vv + dot(tv, v) * uu - 2 * dot(tu, v) * uv) / (uu * vv - uv * uv)
        return (self.base._sectional(x, u, v) - change) / self._factor(x).squeeze(-1)

    def _gradient(self, f: Function, x: Point) -> Tangent:
        return self.base._gradient(f, x) / self._factor(x)

    def _divergence(self, field: VectorField, x: Point) -> Scalar:
        return self.base._divergence(field, x) + self.dim * dot(self._slope(x)[1], field(x))

    def _hessian(self, f: Function, x: Point) -> Tensor:
        _, slope = self._slope(x)
        df = _autodiff.gradient(f, x)
        both = outer(df, slope)
        inner = dot(slope, self.base._sharp(x, df))[..., None, None]
        return self.base._hessian(f, x) - both - both.mT + inner * self.base.metric(x)

    def _random_tangent(self, x: Point, z: Tensor) -> Tangent:
        return self.base._random_tangent(x, z) / self._factor(x).sqrt()

    def _random_point(self, z: Tensor) -> Point:
        return self.base._random_point(z)

    def _is_point(self, x: Tensor, atol: float) -> Tensor:
        return self.base._is_point(x, atol)

    def _project(self, x: Tensor) -> Point:
        return self.base._project(x)


class Warped(Chart):
    r"""The warped product :math:`B \times_f F` with metric :math:`g_B + f(b)^2 g_F`.

    ``warp`` is f, a positive function ``(..., dim_B) -> (...)``; coordinates of ``base`` come
    first, those of ``fiber`` after them. Curvature by O'Neill (1983), ch. 7, prop. 42: with X, Y
    in B and V, W in F,

    .. math:: R(X,V,V,Y) = -\tfrac{1}{f}D^2f(X, Y)\,|V|^2, \qquad
              K(V, W) = \bigl(K_F - |\nabla f|^2\bigr)/f^2

    >>> from darboux.manifolds.euclidean import Euclidean
    >>> polar = Warped(Euclidean(1), Euclidean(1), lambda r: r[..., 0])
    >>> polar.dist(torch.tensor([3.0, 0.0]), torch.tensor([4.0, torch.pi / 2])).round()
    tensor(5.)
    """

    def __init__(
        self, base: Manifold, fiber: Manifold, warp: Callable[[Tensor], Tensor], **options: Any
    ):
        for name, space in (("base", base), ("fiber", fiber)):
            needs_flow(type(self).__name__, name, space)
        parts = Product(base, fiber)
        options.setdefault("bounds", parts.bounds)
        options.setdefault("periods", parts.periods)
        super().__init__(base.dim + fiber.dim, **options)
        self.base = base
        self.fiber = fiber
        self.warp = warp

    def _split(self, *tensors: Tensor) -> list[Tensor]:
        sizes = (self.base.dim, self.fiber.dim)
        return [part for t in tensors for part in t.split(sizes, -1)]

    def _warp(self, b: Tensor) -> Tensor:
        """Return ``f (..., 1)``."""
        f = self.warp(b)
        if f.shape != b.shape[:-1]:
            raise ValueError(
                f"{self.name}: warp maps b of shape {tuple(b.shape)} to shape {tuple(f.shape)}, "
                f"expected {tuple(b.shape[:-1])}"
            )
        return f.unsqueeze(-1)

    def _slope(self, b: Tensor) -> tuple[Tensor, Tensor]:
        f, slope = _autodiff.pullback(self.warp, b, torch.ones_like)
        return f.unsqueeze(-1), slope

    def _pad(self, base: Tensor, fiber: Tensor, rank: int) -> Tensor:
        low, high = self.base.dim, self.fiber.dim
        pad = nn.functional.pad
        return pad(base, (0, high) * rank) + pad(fiber, (low, 0) * rank)

    def metric(self, x: Point) -> Tensor:
        """Return the block diagonal metric ``(..., d, d)``."""
        b, y = self._split(x)
        f = self._warp(b).unsqueeze(-1)
        return self._pad(self.base.metric(b), f * f * self.fiber.metric(y), 2)

    def _flat(self, x: Point, v: Tangent) -> Covector:
        b, y, v_b, v_y = self._split(x, v)
        f = self._warp(b)
        return torch.cat([self.base._flat(b, v_b), f * f * self.fiber._flat(y, v_y)], -1)

    def _sharp(self, x: Point, p: Covector) -> Tangent:
        b, y, p_b, p_y = self._split(x, p)
        f = self._warp(b)
        return torch.cat([self.base._sharp(b, p_b), self.fiber._sharp(y, p_y) / (f * f)], -1)

    def _log_volume(self, x: Point) -> Scalar:
        b, y = self._split(x)
        log_f = self._warp(b).squeeze(-1).log()
        return self.base._log_volume(b) + self.fiber._log_volume(y) + self.fiber.dim * log_f

    def _geodesic_field(self, x: Point, p: Covector) -> tuple[Tangent, Covector]:
        # H = H_B + H_F / f^2
        b, y, p_b, p_y = self._split(x, p)
        f, slope = self._slope(b)
        v_b, force_b = _field(self.base, b, p_b)
        v_y, force_y = _field(self.fiber, y, p_y)
        shrink = 1 / (f * f)
        force_b = force_b + dot(p_y, v_y).unsqueeze(-1) * shrink / f * slope
        return torch.cat([v_b, shrink * v_y], -1), torch.cat([force_b, shrink * force_y], -1)

    def _acceleration(self, x: Point, v: Tangent) -> Tangent:
        b, y, v_b, v_y = self._split(x, v)
        f, slope = self._slope(b)
        sq = self.fiber._inner(y, v_y, v_y).unsqueeze(-1)
        a_b = self.base._acceleration(b, v_b) + f * sq * self.base._sharp(b, slope)
        a_y = self.fiber._acceleration(y, v_y) - 2 * dot(slope, v_b).unsqueeze(-1) / f * v_y
        return torch.cat([a_b, a_y], -1)

    def _christoffel(self, x: Point) -> Tensor:
        b, y = self._split(x)
        m, n = self.base.dim, self.fiber.dim
        f, slope = self._slope(b)
        gamma = self._pad(self.base._christoffel(b), self.fiber._christoffel(y), 3)
        # G^a_ij = -f grad^a f g_ij, G^k_aj = d^k_j (d_a f)/f
        up = -f * self.base._sharp(b, slope)
        lift = up[..., :, None, None] * self.fiber.metric(y).unsqueeze(-3)
        eye = torch.eye(n, dtype=x.dtype, device=x.device)
        slide = eye[:, None, :] * (slope / f)[..., None, :, None]  # (..., k, a, j)
        pad = nn.functional.pad
        mixed = pad(slide, (m, 0, 0, n, m, 0))
        return gamma + pad(lift, (m, 0, m, 0, 0, n)) + mixed + mixed.transpose(-1, -2)

    def _riemann(self, x: Point) -> Tensor:
        b, y = self._split(x)
        m, n = self.base.dim, self.fiber.dim
        f, slope = self._slope(b)
        h = self.fiber.metric(y)
        up = self.base._sharp(b, slope)
        eye = torch.eye(n, dtype=x.dtype, device=x.device)
        flat = eye[:, None, :, None] * h[..., None, :, None, :]
        flat = flat - flat.transpose(-1, -2)
        sq = dot(slope, up)[..., None, None, None, None]
        total = self._pad(self.base._riemann(b), self.fiber._riemann(y) - sq * flat, 4)
        # R(V, X) Y = -D2f(X, Y)/f V and R(X, V) W = -h(V, W) f D_X grad f
        hess = self.base._hessian(self.warp, b)
        turn = -eye[:, None, :, None] * (hess / f.unsqueeze(-1))[..., None, :, None, :]
        raised = self.base._sharp(b.unsqueeze(-2).expand_as(hess), hess).mT
        lean = -(f.unsqueeze(-1) * raised)[..., :, None, :, None] * h[..., None, :, None, :]
        pad = nn.functional.pad
        turn = pad(turn, (0, n, m, 0, 0, n, m, 0))  # (l in F, k in B, i in F, j in B)
        lean = pad(lean, (m, 0, 0, n, m, 0, 0, n))  # (l in B, k in F, i in B, j in F)
        mixed = turn + lean
        return total + mixed - mixed.transpose(-1, -2)

    def _random_point(self, z: Tensor) -> Point:
        b, y = self._split(z)
        return torch.cat([self.base._random_point(b), self.fiber._random_point(y)], -1)

    def _random_tangent(self, x: Point, z: Tensor) -> Tangent:
        b, y, z_b, z_y = self._split(x, z)
        f = self._warp(b)
        v_b, v_y = self.base._random_tangent(b, z_b), self.fiber._random_tangent(y, z_y)
        return torch.cat([v_b, v_y / f], -1)

    def _is_point(self, x: Tensor, atol: float) -> Tensor:
        b, y = self._split(x)
        positive = self._warp(b).squeeze(-1) > 0
        return positive & self.base._is_point(b, atol) & self.fiber._is_point(y, atol)

    def _project(self, x: Tensor) -> Point:
        b, y = self._split(x)
        return torch.cat([self.base._project(b), self.fiber._project(y)], -1)


def _field(space: Manifold, x: Point, p: Covector) -> tuple[Tangent, Covector]:
    return space._geodesic_field(x, p)  # type: ignore[operator]
