r"""Submanifolds of R^n in ambient coordinates: give the projection on tangent spaces.

Points and tangent vectors have ``n`` components. With :math:`P(x)` the orthogonal projector on
the tangent space at x, everything is a derivative of P: for tangent u, w

.. math:: (D_uP)\,w = \mathrm{II}(u, w), \qquad \nabla_u W = P\,D_uW = D_uW - (D_uP)W, \qquad
          R(u, v)w = P\,[D_uP, D_vP]\,w

so :math:`\Gamma(u, w) = -(D_uP)w` and geodesics obey :math:`\ddot x = (D_{\dot x}P)\dot x`.
Tensors are projected on every index; ``metric`` is the identity of the ambient space.
Do Carmo (1992), ch. 6.
"""

import contextlib
from abc import abstractmethod

import torch
from torch import Tensor

from darboux import _autodiff
from darboux._checks import in_transform, values
from darboux._typing import Covector, Function, Point, Scalar, Tangent, VectorField
from darboux.manifolds import boundary, shooting
from darboux.manifolds.base import Connection, Manifold
from darboux.manifolds.linalg import dot, matvec


class Embedded(Manifold):
    """A submanifold of dimension ``dim`` of R^n, ``n = point_dim``, with the induced metric.

    Subclasses give ``_projector(x) (..., n, n)``, smooth in a neighbourhood of the manifold, and
    ``_project(x)``. Geodesics come from symplectic collocation in the ambient space, ``log``
    from the boundary value problem there.
    """

    #: Steps of a geodesic; None: as many as round-off accuracy takes.
    steps: int | None = None

    @abstractmethod
    def _projector(self, x: Point) -> Tensor:
        """Return the orthogonal projector on the tangent space at ``x``, ``(..., n, n)``."""

    @abstractmethod
    def _project(self, x: Tensor) -> Point: ...

    def metric(self, x: Point) -> Tensor:
        """Return the metric of the ambient space, the identity ``(..., n, n)``."""
        eye = torch.eye(self.point_dim, dtype=x.dtype, device=x.device)
        return eye.expand(*x.shape, self.point_dim)

    def _flat(self, x: Point, v: Tangent) -> Covector:
        return v

    def _sharp(self, x: Point, p: Covector) -> Tangent:
        return self._project_tangent(x, p)

    def _inner(self, x: Point, u: Tangent, v: Tangent) -> Scalar:
        return dot(u, v)

    def _log_volume(self, x: Point) -> Scalar:
        return x.new_zeros(x.shape[:-1])

    def _project_tangent(self, x: Point, v: Tensor) -> Tangent:
        return matvec(self._projector(x), v)

    # -- connection and curvature ---------------------------------------------------------

    def _second_form(self, x: Point) -> tuple[Tensor, Tensor]:
        """Return the projector and ``II (..., k, i, j)``, its k-th component on e_i and e_j."""
        p, dp = _autodiff.jacobian(self._projector, x)  # dp (..., k, j, i)
        return p, torch.einsum("...klm,...mi,...lj->...kij", dp, p, p)

    def _christoffel(self, x: Point) -> Tensor:
        return -self._second_form(x)[1]

    def _acceleration(self, x: Point, v: Tangent) -> Tangent:
        return matvec(_autodiff.directional(self._projector, x, v)[1], v)

    def _covariant_derivative(self, field: VectorField, x: Point, v: Tangent) -> Tangent:
        return self._project_tangent(x, _autodiff.directional(field, x, v)[1])

    def _riemann(self, x: Point) -> Tensor:
        # Gauss: R_lkij = <II_li, II_kj> - <II_lj, II_ki>
        ii = self._second_form(x)[1]
        r = torch.einsum("...mli,...mkj->...lkij", ii, ii)
        return r - r.transpose(-1, -2)

    def _sectional(self, x: Point, u: Tangent, v: Tangent) -> Scalar:
        dp_u = _autodiff.directional(self._projector, x, u)[1]
        dp_v = _autodiff.directional(self._projector, x, v)[1]
        mixed = matvec(dp_u, v)
        area = dot(u, u) * dot(v, v) - dot(u, v).square()
        return (dot(matvec(dp_u, u), matvec(dp_v, v)) - dot(mixed, mixed)) / area

    # -- functions ------------------------------------------------------------------------

    def _gradient(self, f: Function, x: Point) -> Tangent:
        return self._project_tangent(x, _autodiff.gradient(f, x))

    def _divergence(self, field: VectorField, x: Point) -> Scalar:
        dv = _autodiff.jacobian(field, x)[1]
        return (self._projector(x) * dv.mT).sum((-1, -2))

    def _hessian(self, f: Function, x: Point) -> Tensor:
        _, df, d2f = _autodiff.jet(f, x)
        p, ii = self._second_form(x)
        return p @ d2f @ p + (df[..., :, None, None] * ii).sum(-3)

    # -- geodesics ------------------------------------------------------------------------

    def _spin(self, x: Point, velocity: Tangent) -> Tensor:
        # [D_vP, P] is skew and moves tangent vectors as parallel transport does.
        p, rate = _autodiff.directional(self._projector, x, velocity)
        turned = rate @ p
        return turned - turned.mT

    def _flow(self, z: Tensor) -> Tensor:
        # z holds the point, the velocity and any vectors to be carried along
        n = self.point_dim
        x, *carried = z.split(n, -1)
        spin = self._spin(x, carried[0])
        return torch.cat([carried[0], *(matvec(spin, w) for w in carried)], -1)

    def _shoot(self, method: str, z: Tensor, dense: bool = False) -> shooting.Shot:
        where = f"{self.name}.{method}"
        return shooting.shoot(where, self._flow, z, self.steps, dense, d=self.point_dim)

    def _exp(self, x: Point, v: Tangent) -> Point:
        with self._graph_if_wanted(x, v):
            return self._shoot("exp", torch.cat([x, v], -1)).end[..., : self.point_dim]

    def _geodesic(self, x: Point, v: Tangent, ts: Tensor) -> Point:
        plain = values(ts)
        with self._graph_if_wanted(x, v):
            paths = []
            for sign in (1.0, -1.0):
                span = float((sign * plain).max()) if plain.numel() else 0.0
                if span <= 0:
                    paths.append(x.expand(len(ts), *x.shape))
                    continue
                shot = self._shoot("geodesic", torch.cat([x, sign * span * v], -1), dense=True)
                paths.append(shooting.evaluate(shot, sign * ts / span)[..., : self.point_dim])
            return torch.where((ts >= 0).reshape(-1, *[1] * x.dim()), *paths)

    def _transport_along(self, x: Point, u: Tangent, v: Tangent) -> tuple[Point, Tangent]:
        with self._graph_if_wanted(x, u, v):
            end = self._shoot("transport", torch.cat([x, u, v], -1)).end
            y, _, w = end.split(self.point_dim, -1)
            return y, w

    def _connect(self, x: Point, y: Point) -> Connection:
        def inside(z: Tensor) -> Tensor:
            return z.isfinite().all(-1)

        with self._graph_if_wanted(x, y):
            problem = boundary.Problem(self._acceleration, self.metric, inside)
            curve = boundary.connect(problem, x, y)
            velocity = self._project_tangent(x, curve.velocity)
            # The ambient problem may have other solutions: only tangent ones are geodesics.
            normal = (curve.velocity - velocity).detach().norm(dim=-1)
            residual = curve.residual + normal / (1 + velocity.detach().norm(dim=-1))
            converged = curve.converged & (residual < torch.finfo(x.dtype).eps ** 0.5)
            return Connection(
                velocity, residual, converged, ~curve.index_free, curve.index_free.clone()
            )

    # -- points ---------------------------------------------------------------------------

    def _is_point(self, x: Tensor, atol: float) -> Tensor:
        return (x - self._project(x)).abs().amax(-1) <= atol * (1 + x.abs().amax(-1))

    def _is_tangent(self, x: Point, v: Tensor, atol: float) -> Tensor:
        return (v - self._project_tangent(x, v)).abs().amax(-1) <= atol * (1 + v.abs().amax(-1))

    def _random_point(self, z: Tensor) -> Point:
        return self._project(z)

    def _random_tangent(self, x: Point, z: Tensor) -> Tangent:
        return self._project_tangent(x, z)

    def _graph_if_wanted(self, *inputs: Tensor) -> contextlib.AbstractContextManager:
        if in_transform() or not torch.is_grad_enabled():
            return contextlib.nullcontext()
        if any(t.requires_grad for t in inputs) or self._projector(inputs[0]).requires_grad:
            return contextlib.nullcontext()
        return torch.no_grad()
