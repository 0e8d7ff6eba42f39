r"""Every manifold of geoopt behind the interface of this package.

:func:`from_geoopt` returns one of our closed-form spaces where one has the same coordinates,
and :class:`Geoopt` otherwise. Points are flat: ``(..., n)`` with n the product of geoopt's
matrix shape; complex points hold the real parts, then the imaginary parts.

geoopt supplies the space and its parameters, which stay live when learnable, and projections on
it. The geometry is ours, for geoopt's has gaps that the promises of this package do not allow:

* ``expmap`` is not the exponential of ``CanonicalStiefel`` (a Cayley retraction) nor of
  ``BirkhoffPolytope`` (a Sinkhorn step); the Siegel spaces have none, and no ``logmap``, nor have
  Stiefel and Birkhoff;
* ``transp`` is a projection, not parallel, on spheres, Stiefel, Siegel and Birkhoff;
* ``proju`` is no projection on ``CanonicalStiefel`` and the Siegel spaces: it converts gradients;
* ``inner`` of ``BoundedDomain`` is not the metric that ``dist`` belongs to (a factor 4, and two
  matrices exchanged), and that of ``Scaled`` leaves the scale to the vectors;
* gradients are NaN where a norm is zero or eigenvalues agree, and the distance of a point from
  itself is not zero; there is no curvature.

Each space is therefore described by a few formulas that are smooth under nested autodiff (a
``Rule`` in ``_geoopt_rules.py``), and the rest is derived. ``Geoopt(...).kinds`` says how each
operation is found, and what cannot be had. Importing this module imports geoopt, which takes a
second or two.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from darboux import _autodiff, _checks
from darboux._checks import GeometryError, in_transform, values
from darboux._typing import Covector, Function, Point, Scalar, Tangent, VectorField
from darboux.manifolds import boundary, connection, curvature, operators, shooting
from darboux.manifolds._geoopt_rules import RULES, Foreign, constant, geoopt
from darboux.manifolds.base import Connection, Manifold
from darboux.manifolds.euclidean import Euclidean
from darboux.manifolds.linalg import log_det, matvec, solve, solve_vector
from darboux.manifolds.product import Product
from darboux.manifolds.space_forms import Stereographic
from darboux.manifolds.sphere import Sphere


def from_geoopt(manifold: "geoopt.manifolds.Manifold", shape: int | tuple[int, ...]) -> Manifold:
    """Return the space of points of the given ``shape`` on a manifold of geoopt.

    Spheres, Euclidean space and the stereographic family (the Poincaré ball among them) come
    back as our own classes in the same coordinates, products as a product of what their
    factors give, the others as :class:`Geoopt`. A learnable curvature keeps the bridge, which
    reads it anew at each call. A curvature is taken as the number that geoopt holds: give it
    ``torch.tensor(c, dtype=torch.float64)``, or it has been rounded to float32.

    >>> from_geoopt(geoopt.PoincareBall(c=1.0), 2).scalar_curvature(torch.zeros(2))
    tensor(-2.)
    """
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    if isinstance(manifold, geoopt.ProductManifold):
        if sizes != (manifold.n_elements,):
            raise ValueError(
                f"from_geoopt: shape is {sizes}, expected ({manifold.n_elements},) for the product"
            )
        parts = zip(manifold.manifolds, manifold.shapes, strict=True)
        return Product(*(from_geoopt(cast(Any, part), size) for part, size in parts))
    n = math.prod(sizes)
    learnable = any(p.requires_grad for p in manifold.parameters())
    if isinstance(manifold, geoopt.Euclidean):
        return Euclidean(n)
    spheres = (geoopt.Sphere, geoopt.SphereExact)
    if type(manifold) in spheres and len(sizes) == 1 and manifold.projector is None:
        return Sphere(n - 1)
    if isinstance(manifold, geoopt.Stereographic) and len(sizes) == 1 and not learnable:
        return Stereographic(n, float(manifold.k))
    return Geoopt(manifold, shape)


class Kinds(NamedTuple):
    """How a bridged manifold finds what it is asked for."""

    exp: str  # "closed form", "integrated" or "geoopt"
    log: str  # "Newton on exp" or "collocation"
    transport: str  # "integrated"
    curvature: str  # the chart whose metric is differentiated
    missing: tuple[str, ...]  # documented exceptions


class Geoopt(Manifold):
    r"""A manifold of geoopt with points flattened to ``(..., n)``.

    Tensors have n components in each index and are projected on the tangent space, as for
    :class:`~darboux.manifolds.embedded.Embedded`. In a smooth chart :math:`\varphi_x(s)` at each
    point, with :math:`\varphi_x(0) = x` and :math:`D\varphi_x(0)` the identity on tangent
    vectors, curvature is that of the pulled back metric, and the connection of the ambient
    coordinates is

    .. math:: \Gamma(u, w) = \Gamma_\varphi(u, w) - D^2\varphi_x[u, w]

    Where the exponential is known, it is the chart, and :math:`\Gamma_\varphi = 0`. ``log`` then
    is Newton's method on exp, differentiable by the implicit function theorem; where not, both
    come from the geodesic equation.

    >>> stiefel = Geoopt(geoopt.Stiefel(), (3, 2))
    >>> stiefel.dim, stiefel.point_dim, stiefel.kinds.exp
    (3, 6, 'closed form')
    """

    def __init__(self, manifold: "geoopt.manifolds.Manifold", shape: int | tuple[int, ...]):
        sizes = (shape,) if isinstance(shape, int) else tuple(shape)
        scale: Callable[[], Tensor | float] = lambda: 1.0  # noqa: E731
        base = manifold
        if isinstance(base, geoopt.Scaled):
            scale, base = constant(manifold, "scale"), base.base
        if isinstance(base, (geoopt.ProductManifold, geoopt.Scaled)):
            raise GeometryError(
                f"Geoopt: {type(base).__name__} inside {type(manifold).__name__} is not bridged; "
                "use from_geoopt() for products and scale once"
            )
        make = next((RULES[t] for t in type(base).__mro__ if t in RULES), Foreign)
        rule = make(base, sizes)
        super().__init__(rule.dim, math.prod(rule.shape))
        self.shape = sizes
        self._rule, self._scale = rule, scale
        # Constants that nobody trains follow the dtype of the inputs; they are not registered.
        if any(p.requires_grad for p in manifold.parameters()):
            self.geoopt = manifold
        else:
            self._unregistered = (manifold,)

    @property
    def name(self) -> str:
        return f"Geoopt({type(self._rule.base).__name__})"

    @property
    def kinds(self) -> Kinds:
        """How each operation is found."""
        closed = self._rule.closed
        return Kinds(
            exp=self._rule.kind if closed else "integrated",
            log="Newton on exp" if closed else "collocation",
            transport="integrated",
            curvature="normal coordinates" if closed else "ambient affine coordinates",
            missing=self._rule.missing,
        )

    def flatten(self, points: Tensor) -> Point:
        """Return geoopt's points or vectors ``(..., *shape)`` as ``(..., n)``."""
        if points.is_complex():
            points = torch.stack([points.real, points.imag], -len(self.shape) - 1)
        return points.flatten(-len(self._rule.shape))

    def unflatten(self, x: Tensor) -> Tensor:
        """Return ``x (..., n)`` as points or vectors of geoopt, ``(..., *shape)``."""
        m = x.unflatten(-1, self._rule.shape)
        if self._rule.shape == self.shape:
            return m
        re, im = m.unbind(-len(self._rule.shape))
        return torch.complex(re, im)

    # -- the metric -----------------------------------------------------------------------

    def _on_matrices(self, f: Callable[..., Tensor], *flat: Tensor) -> Tensor:
        shape = self._rule.shape
        return f(*(t.unflatten(-1, shape) for t in flat)).flatten(-len(shape))

    def _linear(self, f: Callable[..., Tensor], x: Point) -> Tensor:
        """Return the matrix ``(..., n, n)`` of the linear map ``v -> f(x, v)``."""
        n = self.point_dim
        eye = torch.eye(n, dtype=x.dtype, device=x.device).reshape(n, *[1] * (x.dim() - 1), n)
        columns = self._on_matrices(f, x.expand(n, *x.shape), eye.expand(n, *x.shape))
        return columns.movedim(0, -1)

    def metric(self, x: Point) -> Tensor:
        """Return the form ``(..., n, n)`` whose restriction to tangent vectors is the metric."""
        return self._scale() ** 2 * self._linear(self._rule.lower, x)

    def _flat(self, x: Point, v: Tangent) -> Covector:
        return self._scale() ** 2 * self._on_matrices(self._rule.lower, x, v)

    def _span(self, x: Point) -> Tensor:
        return self._linear(self._rule.span, x)

    def _extended(self, x: Point, s: Tensor, span: Tensor) -> Tensor:
        # The metric of the chart at s, and a flat metric on what is not tangent: a product.
        if self._rule.closed:
            y, push = _autodiff.jacobian(lambda z: self._chart(x, matvec(span, z)), s)
        else:
            y, push = x + matvec(span, s), span
        return push.mT @ self.metric(y) @ push + _normal_form(span)

    def _field(self, x: Point) -> Callable[[Tensor], Tensor]:
        span = self._span(x)
        return lambda s: self._extended(x, s, span)

    def _at(self, x: Point) -> Tensor:
        # the extended metric at the point itself, where the chart is the identity
        span = self._span(x)
        return span.mT @ self.metric(x) @ span + _normal_form(span)

    def _sharp(self, x: Point, p: Covector) -> Tangent:
        return solve_vector(self._at(x), matvec(self._span(x).mT, p))

    def _trace(self, x: Point, form: Tensor) -> Scalar:
        span = self._span(x)
        return solve(self._at(x), span.mT @ form @ span).diagonal(dim1=-2, dim2=-1).sum(-1)

    def _project_tangent(self, x: Point, v: Tensor) -> Tangent:
        return self._sharp(x, self._flat(x, v))

    def _log_volume(self, x: Point) -> Scalar:
        return 0.5 * log_det(self._at(x))

    # -- connection and curvature ---------------------------------------------------------

    def _chart(self, x: Point, v: Tangent) -> Point:
        x, v = torch.broadcast_tensors(x, v)
        return self._on_matrices(self._rule.exp if self._rule.closed else torch.add, x, v)

    def _mixed(self, x: Point, u: Tangent, w: Tangent) -> Tangent:
        r"""Return :math:`-\Gamma(u, w)` in ambient coordinates."""
        if self._rule.knows("mixed"):
            return self._on_matrices(self._rule.mixed, x, u, w)
        zero = torch.zeros_like(x)
        if not self._rule.closed:
            field = self._field(x)
            return -solve_vector(field(zero), connection.lowered(field, zero, u, w))

        def along_u(s: Tensor) -> Tensor:
            return torch.func.jvp(lambda z: self._chart(x, z), (s,), (u.contiguous(),))[1]

        return _autodiff.directional(along_u, zero, w)[1]

    def _acceleration(self, x: Point, v: Tangent) -> Tangent:
        return self._mixed(x, v, v)

    def _christoffel(self, x: Point) -> Tensor:
        span, zero = self._span(x), torch.zeros_like(x)
        if not self._rule.closed:
            return connection.christoffel(self._field(x), zero)
        return -_autodiff.jet(lambda s: self._chart(x, matvec(span, s)), zero)[2]

    def _covariant_derivative(self, field: VectorField, x: Point, v: Tangent) -> Tangent:
        w, rate = _autodiff.directional(field, x, v)
        return rate - self._mixed(x, v, w)

    def _riemann(self, x: Point) -> Tensor:
        return curvature.riemann(self._field(x), torch.zeros_like(x))

    def _sectional(self, x: Point, u: Tangent, v: Tangent) -> Scalar:
        return curvature.sectional(self._field(x), torch.zeros_like(x), u, v)

    # -- functions ------------------------------------------------------------------------

    def _gradient(self, f: Function, x: Point) -> Tangent:
        return self._sharp(x, _autodiff.gradient(f, x))

    def _divergence(self, field: VectorField, x: Point) -> Scalar:
        w, dw = _autodiff.jacobian(field, x)
        span = self._span(x)
        turn = torch.einsum("...kij,...j->...ki", self._christoffel(x), w)
        return (dw @ span + turn).diagonal(dim1=-2, dim2=-1).sum(-1)

    def _hessian(self, f: Function, x: Point) -> Tensor:
        span, zero = self._span(x), torch.zeros_like(x)

        def local(s: Tensor) -> Tensor:
            return f(self._chart(x, matvec(span, s)))

        if self._rule.closed:
            return _autodiff.jet(local, zero)[2]
        return operators.hessian(self._field(x), local, zero)

    # -- geodesics ------------------------------------------------------------------------

    def _exp(self, x: Point, v: Tangent) -> Point:
        if self._rule.closed:
            return self._chart(x, v)
        return self._shoot("exp", torch.cat([x, v], -1))[..., : self.point_dim]

    def _flow(self, z: Tensor) -> Tensor:
        # z holds the point, the velocity and any vectors to be carried along
        x, u, *carried = z.split(self.point_dim, -1)
        return torch.cat([u, self._mixed(x, u, u), *(self._mixed(x, u, w) for w in carried)], -1)

    def _shoot(self, method: str, z: Tensor) -> Tensor:
        where = f"{self.name}.{method}"
        states = shooting.shoot(where, self._flow, z, None, d=self.point_dim).states
        _checks.check_that(
            where,
            lambda: self._is_point(states[..., : self.point_dim], math.inf).all(0),
            "the geodesic leaves the manifold",
            GeometryError,
        )
        return states[-1]

    def _transport_along(self, x: Point, u: Tangent, v: Tangent) -> tuple[Point, Tangent]:
        y, _, w = self._shoot("transport", torch.cat([x, u, v], -1)).split(self.point_dim, -1)
        return y, w

    def _connect(self, x: Point, y: Point) -> Connection:
        if self._rule.closed:
            return self._newton(x, y)
        problem = boundary.Problem(
            self._acceleration, self._at, lambda z: self._is_point(z, math.inf)
        )
        curve = boundary.connect(problem, x, y)
        free = curve.index_free
        return Connection(curve.velocity, curve.residual, curve.converged, ~free, free.clone())

    def _newton(self, x: Point, y: Point, iterations: int = 50) -> Connection:
        # Gauss-Newton on exp_x(v) = y, halved where it does not help; then chord steps with the
        # last matrix, which make derivatives of v exact.
        tol = 200 * torch.finfo(x.dtype).eps
        with torch.no_grad():
            x0, y0 = x.detach(), y.detach()
            size = 1 + y0.abs().amax(-1)
            span = self._span(x0)
            v = self._guess(x0, y0)
            gap, error = self._miss(x0, y0, v, size)
            for _ in range(iterations):
                inverse, push = self._inverse(x0, v, span)
                step = matvec(inverse, matvec(push.mT, gap))
                damping = torch.ones_like(error)
                trial = v + step
                new_gap, new = self._miss(x0, y0, trial, size)
                for _ in range(8):
                    worse = ~(new < error) & (error > tol)
                    if not values(worse).any():
                        break
                    damping = torch.where(worse, damping / 2, damping)
                    trial = v + damping[..., None] * step
                    new_gap, new = self._miss(x0, y0, trial, size)
                keep = new < error
                v = torch.where(keep[..., None], trial, v)
                gap = torch.where(keep[..., None], new_gap, gap)
                error = torch.where(keep, new, error)
                if not values(keep & (error > tol / 100)).any():
                    break
            inverse, push = self._inverse(x0, v, span)
            back = inverse @ push.mT
        if in_transform() or any(t.requires_grad for t in (x, y, *self.parameters())):
            v = matvec(self._span(x), v)
            for _ in range(3):
                v = v + matvec(self._span(x), matvec(back, y - self._exp(x, v)))
        far = self._inner(x0, v.detach(), v.detach()).sqrt() >= self._rule.radius * float(
            values(torch.as_tensor(self._scale()))
        )
        return Connection(v, error, error <= tol, far, ~far)

    def _miss(self, x: Point, y: Point, v: Tangent, size: Tensor) -> tuple[Tensor, Tensor]:
        gap = y - self._exp(x, v)
        return gap, gap.abs().amax(-1) / size

    def _inverse(self, x: Point, v: Tangent, span: Tensor) -> tuple[Tensor, Tensor]:
        _, push = _autodiff.jacobian(lambda z: self._exp(x, matvec(span, z)), v)
        return torch.linalg.inv_ex(push.mT @ push + _normal_form(span))[0].nan_to_num(), push

    def _guess(self, x: Point, y: Point) -> Tangent:
        if self._rule.knows("log"):
            v = self._on_matrices(self._rule.log, x, y)
            return torch.where(v.isfinite().all(-1, keepdim=True), v, 0.0)
        return matvec(self._span(x), y - x)

    def _retract(self, x: Point, v: Tangent) -> Point:
        return self._exp(x, v) if self._rule.closed else self._project(x + v)

    # -- points ---------------------------------------------------------------------------

    def _project(self, x: Tensor) -> Point:
        return self._on_matrices(self._rule.project, x)

    def _is_point(self, x: Tensor, atol: float) -> Tensor:
        m = x.unflatten(-1, self._rule.shape)
        inside = self._rule.inside(m)
        if math.isinf(atol):
            return inside
        return inside & (self._rule.defect(m) <= atol * (1 + x.abs().amax(-1)))

    def _is_tangent(self, x: Point, v: Tensor, atol: float) -> Tensor:
        gap = v - matvec(self._span(x), v)
        return gap.abs().amax(-1) <= atol * (1 + v.abs().amax(-1)) * (1 + x.abs().amax(-1)) ** 2

    def _random_point(self, z: Tensor) -> Point:
        return self._on_matrices(self._rule.random, z)

    def _random_tangent(self, x: Point, z: Tensor) -> Tangent:
        # P L^{-T} z with the extended metric L L^T: orthonormal on the tangent space
        factor = torch.linalg.cholesky_ex(self._at(x))[0]
        w = torch.linalg.solve_triangular(factor.mT, z.unsqueeze(-1), upper=True).squeeze(-1)
        return matvec(self._span(x), w)


def _normal_form(span: Tensor) -> Tensor:
    """Return the flat metric on what the projection ``span (..., n, n)`` takes away."""
    normal = torch.eye(span.shape[-1], dtype=span.dtype, device=span.device) - span
    return normal.mT @ normal
