"""The interface of a Riemannian manifold: what one can ask of any space.

A space says how it computes by overriding the methods that begin with an underscore. The
public methods are written once, here: they check what they were given, broadcast leading
dimensions, and call the space. Points and tangent vectors have shape ``(..., n)``, where
``n = point_dim`` is the number of coordinates: the dimension in a chart, that of the
ambient space for an embedded manifold.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from darboux import _checks, _smooth
from darboux._checks import ConvergenceError
from darboux._typing import Covector, Function, Point, Scalar, Tangent, VectorField


class Connection(NamedTuple):
    """A geodesic from ``x`` to ``y`` and what is known about it.

    ``velocity (..., n)`` is its initial velocity, so that ``y = exp(x, velocity)``;
    ``residual (...)`` the defect of the equation that was solved, zero for closed forms;
    ``converged (...)`` whether it was solved; ``conjugate (...)`` whether a point conjugate
    to ``x`` lies on it up to and including ``y``, so that it does not minimise;
    ``unique (...)`` is false where another geodesic of the same length is known to exist.
    """

    velocity: Tangent
    residual: Scalar
    converged: Tensor
    conjugate: Tensor
    unique: Tensor


class Manifold(nn.Module, ABC):
    """A Riemannian manifold of dimension ``dim`` with points in ``point_dim`` coordinates."""

    def __init__(self, dim: int, point_dim: int | None = None):
        super().__init__()
        if dim < 1:
            raise ValueError(f"{type(self).__name__}: dim is {dim}, expected at least 1")
        self.dim = dim
        self.point_dim = dim if point_dim is None else point_dim

    # -- the metric -----------------------------------------------------------------------

    @abstractmethod
    def metric(self, x: Point) -> Tensor:
        """Return the metric ``(..., n, n)`` at ``x (..., n)``: the one thing a space must give."""

    def inner(self, x: Point, u: Tangent, v: Tangent) -> Scalar:
        r"""Return :math:`\langle u, v\rangle_x = g_{ij} u^i v^j`."""
        x, u, v = self._door("inner", x, u=u, v=v)
        return self._inner(x, u, v)

    def norm(self, x: Point, v: Tangent) -> Scalar:
        r"""Return :math:`\|v\|_x`; its derivative at ``v = 0`` is set to 0."""
        x, v = self._door("norm", x, v=v)
        return _smooth.sqrt(self._inner(x, v, v))

    def flat(self, x: Point, v: Tangent) -> Covector:
        """Lower the index: ``p = g v``."""
        x, v = self._door("flat", x, v=v)
        return self._flat(x, v)

    def sharp(self, x: Point, p: Covector) -> Tangent:
        """Raise the index: solve ``g v = p``."""
        x, p = self._door("sharp", x, covectors=("p",), p=p)
        return self._sharp(x, p)

    def log_volume(self, x: Point) -> Scalar:
        r"""Return :math:`\log\sqrt{|\det g|}`, the log density of the Riemannian volume."""
        (x,) = self._door("log_volume", x)
        return self._log_volume(x)

    # -- geodesics ------------------------------------------------------------------------

    def exp(self, x: Point, v: Tangent) -> Point:
        r"""Follow the geodesic from ``x`` with velocity ``v`` for unit time.

        Smooth at ``v = 0``. Raises ``GeometryError`` where it leaves the chart.
        """
        x, v = self._door("exp", x, v=v)
        return self._exp(x, v)

    def geodesic(self, x: Point, v: Tangent, ts: Tensor) -> Point:
        """Return the geodesic from ``x`` with velocity ``v`` at times ``ts (time,)``.

        The result has time first: ``(time, ..., n)``.
        """
        x, v = self._door("geodesic", x, v=v)
        _checks.check_tensor(f"{self.name}.geodesic", "ts", ts)
        if ts.dim() != 1:
            raise ValueError(
                f"{self.name}.geodesic: ts has shape {tuple(ts.shape)}, expected (time,)"
            )
        if ts.dtype != x.dtype:
            raise TypeError(
                f"{self.name}.geodesic: ts has dtype {ts.dtype}, expected {x.dtype} to match x"
            )
        _checks.check_finite(f"{self.name}.geodesic", ts=ts)
        return self._geodesic(x, v, ts.to(x.device))

    def connect(self, x: Point, y: Point) -> Connection:
        """Find the geodesic from ``x`` to ``y`` and report on it; never raises for hard pairs."""
        x, y = self._door("connect", x, points=("y",), y=y)
        return self._connect(x, y)

    def log(self, x: Point, y: Point) -> Tangent:
        """Return the initial velocity of the geodesic from ``x`` to ``y``: ``exp(x, v) = y``.

        Smooth at ``y = x``, where its derivative in ``y`` is the identity. Raises
        ``ConvergenceError`` where no geodesic was found; :meth:`connect` instead reports
        convergence, conjugate points and non-uniqueness pair by pair.
        """
        x, y = self._door("log", x, points=("y",), y=y)
        return self._converged("log", self._connect(x, y)).velocity

    def sqdist(self, x: Point, y: Point) -> Scalar:
        """Return the squared distance, smooth at ``y = x`` with Hessian ``2 g`` there."""
        x, y = self._door("sqdist", x, points=("y",), y=y)
        return self._sqdist(x, y)

    def dist(self, x: Point, y: Point) -> Scalar:
        r"""Return the geodesic distance; :math:`\nabla_y d^2/2 = -\log_y x`.

        Its derivative at ``y = x`` is set to 0; use :meth:`sqdist` for a smooth function.
        """
        x, y = self._door("dist", x, points=("y",), y=y)
        return self._dist(x, y)

    def transport(self, x: Point, y: Point, v: Tangent) -> Tangent:
        """Transport ``v`` from ``x`` to ``y``, parallel along the geodesic that ``log`` finds."""
        x, y, v = self._door("transport", x, points=("y",), y=y, v=v)
        return self._transport(x, y, v)

    def transport_along(self, x: Point, u: Tangent, v: Tangent) -> tuple[Point, Tangent]:
        """Transport ``v`` along ``exp(x, t u)``, ``0 <= t <= 1``; return end point and vector."""
        x, u, v = self._door("transport_along", x, u=u, v=v)
        return self._transport_along(x, u, v)

    def retract(self, x: Point, v: Tangent) -> Point:
        """Move from ``x`` along ``v`` to first order, cheaply; not the exponential map."""
        x, v = self._door("retract", x, v=v)
        return self._retract(x, v)

    # -- connection and curvature ---------------------------------------------------------

    def christoffel(self, x: Point) -> Tensor:
        r"""Return :math:`\Gamma^k_{ij}` as ``(..., k, i, j)``."""
        (x,) = self._door("christoffel", x)
        return self._christoffel(x)

    def acceleration(self, x: Point, v: Tangent) -> Tangent:
        r"""Return the acceleration of the geodesic, :math:`-\Gamma(v, v)`."""
        x, v = self._door("acceleration", x, v=v)
        return self._acceleration(x, v)

    def covariant_derivative(self, field: VectorField, x: Point, v: Tangent) -> Tangent:
        r"""Return :math:`\nabla_v W` of the vector field ``field: (..., n) -> (..., n)``."""
        x, v = self._door("covariant_derivative", x, v=v)
        self._check_output("covariant_derivative", field, x, (self.point_dim,))
        return self._covariant_derivative(field, x, v)

    def riemann(self, x: Point) -> Tensor:
        r"""Return :math:`R^l{}_{kij}` as ``(..., l, k, i, j)``."""
        (x,) = self._door("riemann", x)
        return self._riemann(x)

    def ricci(self, x: Point) -> Tensor:
        r"""Return :math:`\mathrm{Ric}_{kj} = R^i{}_{kij}` as ``(..., k, j)``."""
        (x,) = self._door("ricci", x)
        return self._ricci(x)

    def scalar_curvature(self, x: Point) -> Scalar:
        r"""Return :math:`g^{kj}\mathrm{Ric}_{kj}`; on a surface twice the Gauss curvature."""
        (x,) = self._door("scalar_curvature", x)
        return self._scalar_curvature(x)

    def sectional(self, x: Point, u: Tangent, v: Tangent) -> Scalar:
        """Return the sectional curvature of the plane spanned by ``u`` and ``v``.

        Not finite where ``u`` and ``v`` are parallel.
        """
        x, u, v = self._door("sectional", x, u=u, v=v)
        return self._sectional(x, u, v)

    # -- functions ------------------------------------------------------------------------

    def gradient(self, f: Function, x: Point) -> Tangent:
        r"""Return :math:`\operatorname{grad} f = g^{-1}df` of ``f: (..., n) -> (...)``."""
        (x,) = self._door("gradient", x)
        self._check_output("gradient", f, x, ())
        return self._gradient(f, x)

    def divergence(self, field: VectorField, x: Point) -> Scalar:
        r"""Return :math:`\operatorname{div} V = \nabla_i V^i`."""
        (x,) = self._door("divergence", x)
        self._check_output("divergence", field, x, (self.point_dim,))
        return self._divergence(field, x)

    def hessian(self, f: Function, x: Point) -> Tensor:
        r"""Return the covariant Hessian :math:`\nabla_i\nabla_j f` as ``(..., n, n)``."""
        (x,) = self._door("hessian", x)
        self._check_output("hessian", f, x, ())
        return self._hessian(f, x)

    def laplacian(self, f: Function, x: Point) -> Scalar:
        r"""Return :math:`\Delta f = \operatorname{div}\operatorname{grad} f`."""
        (x,) = self._door("laplacian", x)
        self._check_output("laplacian", f, x, ())
        return self._laplacian(f, x)

    # -- points ---------------------------------------------------------------------------

    def project(self, x: Tensor) -> Point:
        """Return a point of the manifold near ``x``: ``x`` itself where it is one already."""
        _checks.check_last(f"{self.name}.project", "x", x, self.point_dim)
        return self._project(x)

    def project_tangent(self, x: Point, v: Tensor) -> Tangent:
        """Return the orthogonal projection of an ambient vector on the tangent space."""
        x, v = self._door("project_tangent", x, covectors=("v",), v=v)
        return self._project_tangent(x, v)

    def is_point(self, x: Tensor, atol: float | None = None) -> Tensor:
        """Say where ``x`` is a point of the manifold, as a bool tensor ``(...)``."""
        _checks.check_last(f"{self.name}.is_point", "x", x, self.point_dim)
        return x.isfinite().all(-1) & self._is_point(x, _tolerance(x, atol))

    def is_tangent(self, x: Point, v: Tensor, atol: float | None = None) -> Tensor:
        """Say where ``v`` is tangent at ``x``, as a bool tensor ``(...)``."""
        where = f"{self.name}.is_tangent"
        _checks.check_last(where, "x", x, self.point_dim)
        _checks.check_like(where, "v", v, "x", x)
        return v.isfinite().all(-1) & self._is_tangent(x, v, _tolerance(x, atol))

    def random_point(
        self,
        *shape: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Point:
        """Draw points ``(*shape, n)`` spread over an interesting part of the manifold."""
        z = torch.randn(*shape, self.point_dim, dtype=dtype, device=device, generator=generator)
        return self._random_point(z)

    def random_tangent(self, x: Point, generator: torch.Generator | None = None) -> Tangent:
        """Draw one tangent vector at each ``x``, standard normal in the metric."""
        (x,) = self._door("random_tangent", x)
        z = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
        return self._random_tangent(x, z)

    # -- how a space computes; override what it knows -------------------------------------

    @property
    def name(self) -> str:
        """The name that error messages carry."""
        return type(self).__name__

    @abstractmethod
    def _exp(self, x: Point, v: Tangent) -> Point: ...

    @abstractmethod
    def _connect(self, x: Point, y: Point) -> Connection: ...

    @abstractmethod
    def _transport_along(self, x: Point, u: Tangent, v: Tangent) -> tuple[Point, Tangent]: ...

    @abstractmethod
    def _sharp(self, x: Point, p: Covector) -> Tangent: ...

    @abstractmethod
    def _christoffel(self, x: Point) -> Tensor: ...

    @abstractmethod
    def _acceleration(self, x: Point, v: Tangent) -> Tangent: ...

    @abstractmethod
    def _covariant_derivative(self, field: VectorField, x: Point, v: Tangent) -> Tangent: ...

    @abstractmethod
    def _riemann(self, x: Point) -> Tensor: ...

    @abstractmethod
    def _sectional(self, x: Point, u: Tangent, v: Tangent) -> Scalar: ...

    @abstractmethod
    def _gradient(self, f: Function, x: Point) -> Tangent: ...

    @abstractmethod
    def _divergence(self, field: VectorField, x: Point) -> Scalar: ...

    @abstractmethod
    def _hessian(self, f: Function, x: Point) -> Tensor: ...

    @abstractmethod
    def _log_volume(self, x: Point) -> Scalar: ...

    @abstractmethod
    def _random_point(self, z: Tensor) -> Point:
        """Map standard normal numbers ``z (..., n)`` to points."""

    @abstractmethod
    def _random_tangent(self, x: Point, z: Tensor) -> Tangent:
        """Map standard normal numbers to a vector that is standard normal in the metric."""

    def _ricci(self, x: Point) -> Tensor:
        return torch.einsum("...ikij->...kj", self._riemann(x))

    def _scalar_curvature(self, x: Point) -> Scalar:
        return self._trace(x, self._ricci(x))

    def _laplacian(self, f: Function, x: Point) -> Scalar:
        return self._trace(x, self._hessian(f, x))

    def _trace(self, x: Point, form: Tensor) -> Scalar:
        """Contract a symmetric bilinear form ``(..., n, n)`` with the inverse metric."""
        rows = self._sharp(x.unsqueeze(-2).expand_as(form), form)
        return rows.diagonal(dim1=-2, dim2=-1).sum(-1)

    def _inner(self, x: Point, u: Tangent, v: Tangent) -> Scalar:
        return (u * self._flat(x, v)).sum(-1)

    def _flat(self, x: Point, v: Tangent) -> Covector:
        return (self.metric(x) * v.unsqueeze(-2)).sum(-1)

    def _geodesic(self, x: Point, v: Tangent, ts: Tensor) -> Point:
        x, v = (z.expand(ts.shape[0], *z.shape) for z in (x, v))
        return self._exp(x, ts.reshape(-1, *[1] * (v.dim() - 1)) * v)

    def _sqdist(self, x: Point, y: Point) -> Scalar:
        v = self._converged("dist", self._connect(x, y)).velocity
        return self._inner(x, v, v)

    def _dist(self, x: Point, y: Point) -> Scalar:
        return _smooth.sqrt(self._sqdist(x, y))

    def _transport(self, x: Point, y: Point, v: Tangent) -> Tangent:
        u = self._converged("transport", self._connect(x, y)).velocity
        return self._transport_along(x, u, v)[1]

    def _retract(self, x: Point, v: Tangent) -> Point:
        return self._project(x + v)

    def _project(self, x: Tensor) -> Point:
        return x

    def _project_tangent(self, x: Point, v: Tensor) -> Tangent:
        return v

    def _is_point(self, x: Tensor, atol: float) -> Tensor:
        return torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)

    def _is_tangent(self, x: Point, v: Tensor, atol: float) -> Tensor:
        return torch.ones(v.shape[:-1], dtype=torch.bool, device=v.device)

    # -- the door -------------------------------------------------------------------------

    def _door(
        self,
        method: str,
        x: Point,
        *,
        points: tuple[str, ...] = (),
        covectors: tuple[str, ...] = (),
        **others: Tensor,
    ) -> tuple[Tensor, ...]:
        """Check a point and what goes with it, and broadcast them to one shape.

        Everything in ``others`` is a tangent vector at ``x`` unless named in ``points`` or
        ``covectors``.
        """
        where = f"{self.name}.{method}"
        _checks.check_last(where, "x", x, self.point_dim)
        self._check_own_dtype(where, x)
        for name, other in others.items():
            _checks.check_like(where, name, other, "x", x)
        all_ = torch.broadcast_tensors(x, *others.values()) if others else (x,)
        if _checks.checks_values():
            _checks.check_finite(where, x=x, **others)
            self._check_is_point(where, "x", x)
            for name, other in others.items():
                if name in points:
                    self._check_is_point(where, name, other)
                elif name not in covectors:
                    self._check_is_tangent(where, name, x, other)
        return tuple(all_)

    def _check_is_point(self, where: str, name: str, x: Tensor) -> None:
        _checks.check_that(
            where,
            lambda: self._is_point(x, _tolerance(x, None)),
            f"{name} of shape {tuple(x.shape)} is not on the manifold; see project()",
        )

    def _check_is_tangent(self, where: str, name: str, x: Tensor, v: Tensor) -> None:
        _checks.check_that(
            where,
            lambda: self._is_tangent(x, v, _tolerance(x, None)),
            f"{name} of shape {tuple(v.shape)} is not tangent at x; see project_tangent()",
        )

    def _check_own_dtype(self, where: str, x: Tensor) -> None:
        for name, own in (*self.named_parameters(), *self.named_buffers()):
            if own.is_floating_point() and own.dtype != x.dtype:
                raise TypeError(
                    f"{where}: x has dtype {x.dtype} but {name} has dtype {own.dtype}, expected "
                    f"one dtype; move the manifold with .to({x.dtype})"
                )

    def _check_output(self, method: str, f: Function, x: Tensor, tail: tuple[int, ...]) -> None:
        with torch.no_grad():
            shape = tuple(f(x).shape)
        expected = (*x.shape[:-1], *tail)
        if shape != expected:
            raise ValueError(
                f"{self.name}.{method}: the function maps x of shape {tuple(x.shape)} to shape "
                f"{shape}, expected {expected}; leading dimensions are a batch"
            )

    def _converged(self, method: str, connection: Connection) -> Connection:
        if _checks.checks_values():
            failed = ~_checks.values(connection.converged)
            if failed.any():
                residuals = _checks.values(connection.residual)[failed]
                residual = float(residuals.nan_to_num(nan=torch.inf).max())
                if residual <= torch.finfo(residuals.dtype).eps ** 0.5:
                    reason = (
                        "a curve solves the equation at the nodes (largest residual "
                        f"{residual:.1e}), but it leaves the chart, or bends too sharply between "
                        "them to be trusted"
                    )
                else:
                    reason = (
                        f"the equation is not solved (largest residual {residual:.1e}); the "
                        "points may be too far apart or separated by the edge of the chart"
                    )
                raise ConvergenceError(
                    f"{self.name}.{method}: no geodesic found for {int(failed.sum())} of "
                    f"{failed.numel()} pairs: {reason}. connect() reports pair by pair",
                    residual,
                )
        return connection


def _tolerance(x: Tensor, atol: float | None) -> float:
    # Loose enough that a finite-difference probe of a point still counts as a point.
    return torch.finfo(x.dtype).eps ** (1 / 3) if atol is None else atol


def exact(velocity: Tangent, conjugate: Tensor | None = None) -> Connection:
    """Return the record of a geodesic known in closed form."""
    scalar = velocity.detach()[..., 0]
    yes = torch.ones_like(scalar, dtype=torch.bool)
    bad = torch.zeros_like(yes) if conjugate is None else conjugate
    return Connection(velocity, torch.zeros_like(scalar), yes, bad, ~bad)
