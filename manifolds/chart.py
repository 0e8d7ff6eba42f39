"""A manifold given by its metric in one chart: write ``metric(x)``, get the rest.

Curvature and operators come from automatic differentiation, geodesics from symplectic
integration, ``log`` from a boundary value solver. Subclasses that know more override the
methods that begin with an underscore.
"""

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from darboux import _autodiff, _checks
from darboux._checks import GeometryError, in_transform, values
from darboux._typing import Covector, Function, Point, Scalar, Tangent, VectorField
from darboux.integrators import Hamiltonian, find_method, gauss_legendre
from darboux.manifolds import boundary, connection, curvature, operators, shooting
from darboux.manifolds.base import Connection, Manifold
from darboux.manifolds.linalg import dot, is_positive, matvec, solve, solve_vector

# Steps in one piece of compiled code: more cost more to compile than they save.
_CHUNK = 2
# How many points of a metric are looked at to see how short curves around a period may be, and
# how much shorter than the sample says they are taken to be.
_SAMPLE, _MARGIN = 128, 2.0


class Chart(Manifold):
    """A space of dimension ``dim`` in one chart; subclasses give ``metric(x)``.

    >>> class HalfPlane(Chart):
    ...     def metric(self, x):  # (..., 2) -> (..., 2, 2)
    ...         return torch.eye(2, dtype=x.dtype) / x[..., 1, None, None] ** 2
    >>> HalfPlane(dim=2).scalar_curvature(torch.tensor([0.0, 1.0])).round()
    tensor(-2.)

    ``method`` and ``steps`` say how geodesics are integrated: with ``steps=None`` Gauss
    collocation chooses its steps and is accurate to round-off; otherwise ``steps`` equal steps
    of any method of :mod:`darboux.integrators`, which ``compile=True`` compiles (``exp`` only,
    where no derivative is asked for; the first call for a shape takes some seconds, later ones
    are about ten times faster). ``periods`` holds one number for each
    coordinate, ``inf`` where it is not periodic. ``bounds`` holds one pair ``(low, high)`` for
    each coordinate: the part of the chart to draw.
    """

    #: False for metrics of other signatures (Lorentzian), which then use ``inv`` and QR.
    positive: bool = True
    #: True where ``metric`` is known to be right, which saves checking it at every door.
    trusted: bool = False

    def __init__(
        self,
        dim: int,
        *,
        method: str = "gauss16",
        steps: int | None = None,
        compile: bool = False,
        periods: Sequence[float] | None = None,
        bounds: Sequence[tuple[float, float]] | None = None,
    ):
        super().__init__(dim)
        integrator = find_method(method)
        if steps is None and method != "gauss16":
            raise ValueError(
                f"{self.name}: method {method!r} needs a number of steps; only 'gauss16' chooses "
                "its own"
            )
        if steps is not None and steps < 1:
            raise ValueError(f"{self.name}: steps is {steps}, expected at least 1")
        for name, given in (("periods", periods), ("bounds", bounds)):
            if given is not None and len(given) != dim:
                raise ValueError(f"{self.name}: {name} has {len(given)} entries, expected {dim}")
        if compile and (steps is None or not integrator.explicit):
            raise ValueError(
                f"{self.name}: compile=True needs an explicit method and a number of steps, for "
                f"example method='rk4', steps=100; got method={method!r}, steps={steps}"
            )
        self.method = integrator
        self.steps = steps
        self.compiled = compile
        self.periods = None if periods is None else tuple(float(p) for p in periods)
        self.bounds = None if bounds is None else tuple((float(a), float(b)) for a, b in bounds)

    # -- pointwise ------------------------------------------------------------------------

    def _sharp(self, x: Point, p: Covector) -> Tangent:
        return solve_vector(self.metric(x), p, self.positive)

    def _flat(self, x: Point, v: Tangent) -> Covector:
        return matvec(self.metric(x), v)

    def norm(self, x: Point, v: Tangent) -> Scalar:
        """Return the length of ``v``; raise ``GeometryError`` for a metric that is not positive."""
        self._needs_positive("norm")
        return super().norm(x, v)

    def _log_volume(self, x: Point) -> Scalar:
        return operators.log_volume(self.metric, x, self.positive)

    def _christoffel(self, x: Point) -> Tensor:
        return connection.christoffel(self.metric, x, self.positive)

    def _acceleration(self, x: Point, v: Tangent) -> Tangent:
        return connection.acceleration(self.metric, x, v, self.positive)

    def _covariant_derivative(self, field: VectorField, x: Point, v: Tangent) -> Tangent:
        return connection.covariant_derivative(self.metric, field, x, v, self.positive)

    def _riemann(self, x: Point) -> Tensor:
        return curvature.riemann(self.metric, x, self.positive)

    def _sectional(self, x: Point, u: Tangent, v: Tangent) -> Scalar:
        return curvature.sectional(self.metric, x, u, v, self.positive)

    def _trace(self, x: Point, form: Tensor) -> Scalar:
        return solve(self.metric(x), form, self.positive).diagonal(dim1=-2, dim2=-1).sum(-1)

    def _gradient(self, f: Function, x: Point) -> Tangent:
        return operators.gradient(self.metric, f, x, self.positive)

    def _divergence(self, field: VectorField, x: Point) -> Scalar:
        return operators.divergence(self.metric, field, x, self.positive)

    def _hessian(self, f: Function, x: Point) -> Tensor:
        return operators.hessian(self.metric, f, x, self.positive)

    # -- geodesics as motions -------------------------------------------------------------

    def _geodesic_field(self, x: Point, p: Covector) -> tuple[Tangent, Covector]:
        """Return Hamilton's equations of the geodesic flow, ``(dx/dt, dp/dt)``."""
        return connection.geodesic_field(self.metric, x, p, self.positive)

    def geodesic_system(self) -> Hamiltonian:
        r"""Return :math:`H = \tfrac12 g^{ij}(x)p_ip_j` as a system for any integrator."""

        def energy(x: Tensor, p: Tensor) -> Tensor:
            return 0.5 * dot(p, self._sharp(x, p))

        return Hamiltonian(energy, field=self._geodesic_field)

    def _packed_field(self, z: Tensor) -> Tensor:
        d = self.dim
        return torch.cat(self._geodesic_field(z[..., :d], z[..., d:]), -1)

    def _exp(self, x: Point, v: Tangent) -> Point:
        with self._graph_if_wanted(x, v):
            z = torch.cat([x, self._flat(x, v)], -1)
            if self._collocated:
                return self._shoot("exp", self._packed_field, z).end[..., : self.dim]
            end = self._run(z)[..., : self.dim]
            self._check_inside("exp", end[None])
            return end

    @property
    def _collocated(self) -> bool:
        # whether geodesics are solved by the Gauss collocation of :mod:`shooting`
        return self.steps is None or self.method.name == f"gauss{2 * shooting.STAGES}"

    def _run(self, z: Tensor) -> Tensor:
        """Take ``steps`` equal steps of ``method`` from ``z = (x, p)``."""
        assert self.steps is not None
        if not self.compiled or in_transform() or torch.is_grad_enabled():
            return self._advance(z, self.steps)
        # Compiled code is kept by torch for as long as this manifold and this shape are used.
        chunk = torch.compile(self._advance, dynamic=False)
        for _ in range(self.steps // _CHUNK):
            z = chunk(z, _CHUNK)
        return self._advance(z, self.steps % _CHUNK)

    def _advance(self, z: Tensor, steps: int) -> Tensor:
        assert self.steps is not None
        q, p = z[..., : self.dim], z[..., self.dim :]
        system = self.geodesic_system()
        q, p, _ = self.method.advance(system, q, p, 1 / self.steps, steps, None)
        return torch.cat([q, p], -1)

    def _geodesic(self, x: Point, v: Tangent, ts: Tensor) -> Point:
        if not self._collocated:
            return super()._geodesic(x, v, ts)
        plain = values(ts)
        if plain.numel() == 0:
            return x.expand(0, *x.shape)
        with self._graph_if_wanted(x, v, ts):
            p = self._flat(x, v)
            paths = []
            for sign in (1.0, -1.0):
                span = max(float((sign * plain).max()), 0.0)
                if span == 0.0:  # no time on this side, but perhaps t = 0
                    paths.append(x + ts.reshape(-1, *[1] * x.dim()) * v)
                    continue
                z = torch.cat([x, sign * span * p], -1)
                shot = self._shoot("geodesic", self._packed_field, z, dense=True)
                paths.append(shooting.evaluate(shot, sign * ts / span)[..., : self.dim])
            forward = (ts >= 0).reshape(-1, *[1] * x.dim())
            return torch.where(forward, paths[0], paths[1])

    def _shoot(
        self, method: str, field, z: Tensor, dense: bool = False, steps: int | None = None
    ) -> shooting.Shot:
        where = f"{self.name}.{method}"
        shot = shooting.shoot(where, field, z, steps or self.steps, dense, d=self.dim)
        self._check_inside(method, shot.states[..., : self.dim])
        return shot

    def _transport_along(self, x: Point, u: Tangent, v: Tangent) -> tuple[Point, Tangent]:
        d = self.dim
        self._needs_positive("transport")
        with self._graph_if_wanted(x, u, v):
            z = torch.cat([x, self._flat(x, u)], -1)
            shot = self._shoot("transport", self._packed_field, z)
            while True:
                here, velocity = shooting.nodes(shot)[..., :d], shot.slopes[..., :d]
                omega = self._frame_rotation(here, velocity)
                n = 2 * len(omega)
                if self.steps is not None or _turns_slowly(omega) or n > shooting.MAX_STEPS:
                    break
                # the frame turns faster than the geodesic bends
                shot = self._shoot("transport", self._packed_field, z, steps=n)
            y = shot.end[..., :d]
            return y, self._propagate(omega, x, y, v)

    def transport_curve(self, curve, v: Tangent, steps: int | None = None) -> Tangent:
        """Transport ``v (..., d)`` along ``curve: (time,) -> (time, ..., d)``, ``0 <= t <= 1``.

        The curve is differentiated by forward mode, and is one for the whole batch or one for
        each vector. Around a loop the result is the holonomy. Isometric to round-off at any
        number of ``steps``; the error falls with the 16th power of their length. With
        ``steps=None`` they are halved until the frame turns slowly and smoothly in each.
        """
        where = f"{self.name}.transport_curve"
        self._needs_positive("transport_curve")
        _checks.check_last(where, "v", v, self.dim)
        ends = curve(torch.tensor([0.0, 1.0], dtype=v.dtype, device=v.device))
        _checks.check_last(where, "curve(t)", ends, self.dim)

        def spread(z: Tensor) -> Tensor:
            return z.reshape(len(z), *[1] * (v.dim() + 1 - z.dim()), *z.shape[1:])

        c = torch.as_tensor(gauss_legendre(shooting.STAGES).c).to(v)
        n = steps or 4
        while True:
            t = (torch.arange(n, dtype=v.dtype, device=v.device)[:, None] + c) / n
            times = t.flatten()
            x, dx, *_ = torch.func.jvp(curve, (times,), (torch.ones_like(times),))
            x, dx = (spread(z).unflatten(0, t.shape).expand(*t.shape, *v.shape) for z in (x, dx))
            omega = self._frame_rotation(x, dx)
            if steps is not None or _turns_slowly(omega) or n >= shooting.MAX_STEPS:
                break
            n *= 2
        start, end = spread(ends).expand(2, *v.shape)
        return self._propagate(omega, start, end, v)

    def _frame_rotation(self, x: Tensor, dx: Tensor) -> Tensor:
        """Return the connection in the orthonormal frame, times the step: ``(n, s, ..., d, d)``.

        ``x, dx (n, s, ..., d)`` are a curve and its derivative at the Gauss points of n steps.
        """
        d = self.dim
        basis = torch.eye(d, dtype=x.dtype, device=x.device)
        basis = basis.reshape(d, *[1] * (x.dim() - 1), d).expand(d, *x.shape)
        columns = self._frame_rate(x.expand_as(basis), dx.expand_as(basis), basis)
        omega = columns.movedim(0, -1)
        return 0.5 * (omega - omega.mT) / x.shape[0]

    def _propagate(self, omega: Tensor, start: Point, end: Point, v: Tangent) -> Tangent:
        """Transport ``v`` along a curve whose frame rotation is known.

        In the orthonormal frame of ``g = L L^T`` the components ``w = L^T v`` obey a linear
        equation with a skew matrix, whose collocation solution is orthogonal at any step.
        """
        s, d = omega.shape[1], self.dim
        tableau = gauss_legendre(s)
        a, b = (torch.as_tensor(z).to(omega) for z in (tableau.A, tableau.b))
        coupling = torch.einsum("ij,ni...kl->n...ikjl", a, omega).flatten(-4, -3).flatten(-2)
        system = torch.eye(s * d, dtype=omega.dtype, device=omega.device) - coupling
        slopes = torch.linalg.inv(system) @ omega.movedim(1, -3).flatten(-3, -2)
        turn = torch.einsum("i,n...ikl->n...kl", b, slopes.unflatten(-2, (s, d)))
        w = matvec(torch.linalg.cholesky_ex(self.metric(start))[0].mT, v)
        for step in turn:
            w = w + matvec(step, w)
        return _solve_triangular(torch.linalg.cholesky_ex(self.metric(end))[0].mT, w, upper=True)

    def _frame_rate(self, x: Point, velocity: Tangent, w: Tensor) -> Tensor:
        """Return dw/dt of a parallel vector's components ``w = L^T v`` along a curve."""

        def frame(z: Tensor) -> Tensor:
            return torch.linalg.cholesky_ex(self.metric(z))[0]

        factor, rate = _autodiff.directional(frame, x, velocity)
        v = _solve_triangular(factor.mT, w, upper=True)
        low = connection.lowered(self.metric, x, velocity, v)
        return matvec(rate.mT, v) - _solve_triangular(factor, low, upper=False)

    # -- geodesics between points ---------------------------------------------------------

    def _connect(self, x: Point, y: Point) -> Connection:
        self._needs_positive("connect")
        self._check_periods("connect", y)
        with self._graph_if_wanted(x, y):
            y = self._nearest_image(x, y)
            solve = partial(boundary.connect, self._boundary_problem())
            curve = solve(x, y)
            best = Connection(
                curve.velocity,
                curve.residual,
                curve.converged,
                ~curve.index_free,
                curve.unique,
            )
            for other, worthwhile in self._other_images(x, y, best):
                worthwhile = worthwhile | ~best.converged | best.conjugate
                if not values(worthwhile).any():
                    continue
                # pairs not worth it get a trivial problem
                end = torch.where(worthwhile[..., None], other, x)
                rival = solve(x, end, persistent=False)
                good = worthwhile & rival.converged & rival.index_free
                best = self._shorter(x, best, rival, good)
            return best

    def _boundary_problem(self) -> boundary.Problem:
        return boundary.Problem(self._acceleration, self.metric, self._inside)

    def _shorter(
        self, x: Point, best: Connection, rival: boundary.Curve, good: Tensor
    ) -> Connection:
        old, new = (self._inner(x, v, v).detach() for v in (best.velocity, rival.velocity))
        tie = 1e-8 * old
        worse = best.conjugate | ~best.converged
        take = good & (worse | (new < old - tie))
        equal = good & ~worse & ((new - old).abs() <= tie)
        return Connection(
            torch.where(take[..., None], rival.velocity, best.velocity),
            torch.where(take, rival.residual, best.residual),
            take | best.converged,
            best.conjugate & ~take,
            (take | best.unique) & ~equal,
        )

    def _check_periods(self, method: str, y: Point) -> None:
        if self.periods is None:
            return
        period = torch.tensor(self.periods, dtype=y.dtype, device=y.device)

        def holds() -> Tensor:
            g, turned = self.metric(y), self.metric(y + period.nan_to_num(posinf=0.0))
            # sqrt(eps) leaves room for the rounding of y + period in a steep metric
            tol = torch.finfo(y.dtype).eps ** 0.5 * g.abs().amax((-1, -2))
            return (turned - g).abs().amax((-1, -2)) <= tol

        _checks.check_that(
            f"{self.name}.{method}",
            holds,
            f"the metric differs after one turn of the coordinates with periods {self.periods}; "
            "expected a metric with these periods, or periods=None",
            GeometryError,
        )

    def _nearest_image(self, x: Point, y: Point) -> Point:
        if self.periods is None:
            return y
        period = torch.tensor(self.periods, dtype=y.dtype, device=y.device)
        turns = torch.round((y - x).detach() / period)
        return y - torch.where(period.isinf(), 0.0, turns * period.nan_to_num(posinf=0.0))

    def _other_images(self, x: Point, y: Point, best: Connection) -> Iterator[tuple[Point, Tensor]]:
        """Yield copies of ``y`` one turn the other way round, and where they may be nearer."""
        turning = [i for i, p in enumerate(self.periods or ()) if not math.isinf(p)]
        if not turning:
            return
        gap = (y - x).detach()
        period = torch.tensor(self.periods, dtype=y.dtype, device=y.device)
        # the turn that leads across x, and how far y is then
        turn = torch.where(gap >= 0, -period, period).nan_to_num(posinf=0.0, neginf=0.0)
        if self.trusted:
            nearer = gap.abs() > period / 4
        else:  # the long way round may be the short one
            reach = self._reach(x, best.velocity)
            nearer = ((gap + turn).abs() <= reach) | ~best.converged.unsqueeze(-1)
        for which in itertools.product((False, True), repeat=len(turning)):
            if any(which):
                chosen = torch.zeros(self.dim, dtype=torch.bool, device=y.device)
                chosen[turning] = torch.tensor(which, device=y.device)
                yield y + torch.where(chosen, turn, 0.0), (nearer | ~chosen).all(-1)

    def _reach(self, x: Point, v: Tangent) -> Tensor:
        r"""Bound how far a curve from ``x`` no longer than ``v`` can get in each coordinate.

        Along any curve :math:`|dx^i| \le \sqrt{g^{ii}}\,ds` (Cauchy-Schwarz), so it gets no
        farther than its length times the largest :math:`\sqrt{g^{ii}}` on its way. That is taken
        from a sample of all it can meet: a whole turn of the coordinates that have a period, and
        of the others a box that the bound itself shows it cannot leave; infinite where it does
        not. The sample is allowed to miss the largest value by the factor ``_MARGIN``; what is
        narrower than that would escape the solver too, which starts from 16 points.
        """
        assert self.periods is not None
        with torch.no_grad():
            x, v = x.detach(), v.detach()
            allowed = _MARGIN * self._inner(x, v, v).sqrt().unsqueeze(-1)
            period = torch.tensor(self.periods, dtype=x.dtype, device=x.device)
            open_ = period.isinf()
            box = torch.where(open_, _MARGIN * allowed * self._rate(x), period / 2)
            sample = torch.as_tensor(_sample(self.dim)).to(x)
            z = x + sample.reshape(-1, *[1] * (x.dim() - 1), self.dim) * box
            rate = torch.where(self._inside(z).unsqueeze(-1), self._rate(z), 0.0).amax(0)
            reach = (allowed * rate).nan_to_num(nan=torch.inf)
            stays = (~open_ | (reach <= box)).all(-1, keepdim=True)
            return torch.where(stays, reach, torch.inf)

    def _rate(self, x: Point) -> Tensor:
        # sqrt(g^ii), the largest rate of each coordinate along a curve of unit speed
        forms = torch.eye(self.dim, dtype=x.dtype, device=x.device)
        forms = forms.expand(*x.shape, self.dim)
        raised = self._sharp(x.unsqueeze(-2).expand_as(forms), forms)
        return raised.diagonal(dim1=-2, dim2=-1).sqrt()

    def _converged(self, method: str, connection: Connection) -> Connection:
        connection = super()._converged(method, connection)
        _checks.check_that(
            f"{self.name}.{method}",
            lambda: ~values(connection.conjugate),
            "the geodesic found passes a conjugate point and does not minimise; connect() "
            "returns it all the same",
            GeometryError,
        )
        return connection

    # -- what is inside -------------------------------------------------------------------

    def _inside(self, x: Point) -> Tensor:
        return x.isfinite().all(-1) & self._is_point(x, 0.0)

    def _check_inside(self, method: str, path: Tensor) -> None:
        # path (time, ..., d)
        def holds() -> Tensor:
            ok = self._inside(path)
            if self.positive and not self.trusted:
                ok = ok & is_positive(self.metric(path))
            return ok.all(0)

        _checks.check_that(
            f"{self.name}.{method}", holds, "the geodesic leaves the chart", GeometryError
        )

    def _check_is_point(self, where: str, name: str, x: Tensor) -> None:
        super()._check_is_point(where, name, x)
        if self.trusted:
            return
        g = self.metric(x)
        expected = (*x.shape, x.shape[-1])
        if g.shape != expected:
            raise ValueError(
                f"{where}: metric({name}) has shape {tuple(g.shape)}, expected {expected} for "
                f"{name} of shape {tuple(x.shape)}"
            )
        if g.dtype != x.dtype:
            raise TypeError(f"{where}: metric({name}) has dtype {g.dtype}, expected {x.dtype}")
        if self.positive:
            _checks.check_that(
                where,
                lambda: is_positive(g),
                f"the metric at {name} is not positive definite",
                GeometryError,
            )
        _checks.check_that(
            where, lambda: _symmetric(g), f"the metric at {name} is not symmetric", GeometryError
        )

    def _random_point(self, z: Tensor) -> Point:
        return z

    def _random_tangent(self, x: Point, z: Tensor) -> Tangent:
        self._needs_positive("random_tangent")
        frame = torch.linalg.cholesky_ex(self.metric(x))[0]
        return _solve_triangular(frame.mT, z, upper=True)

    def _needs_positive(self, method: str) -> None:
        if not self.positive:
            raise GeometryError(
                f"{self.name}.{method}: the metric is not positive, expected a Riemannian one; "
                "inner, exp, geodesic, curvature and the operators work in any signature"
            )

    def _graph_if_wanted(self, *inputs: Tensor) -> contextlib.AbstractContextManager:
        # Recording a graph that nobody can use doubles the cost of every step.
        if in_transform() or not torch.is_grad_enabled():
            return contextlib.nullcontext()
        if any(t.requires_grad for t in inputs) or self.metric(inputs[0]).requires_grad:
            return contextlib.nullcontext()
        return torch.no_grad()


@lru_cache
def _sample(d: int) -> np.ndarray:
    """Spread points evenly in the cube [-1, 1]^d: the Kronecker sequence of Roberts (2018)."""
    golden = 2.0  # the root of z^(d + 1) = z + 1
    for _ in range(64):
        golden = (1 + golden) ** (1 / (d + 1))
    steps = golden ** -np.arange(1.0, d + 1)
    return 2 * (np.arange(_SAMPLE)[:, None] * steps % 1) - 1


def _turns_slowly(omega: Tensor) -> bool:
    if omega.numel() == 0:
        return True
    tail = shooting.legendre_tail(omega.detach())
    eps = torch.finfo(omega.dtype).eps
    slow = (omega.detach().abs().amax() <= 2) & (tail.abs().amax() <= max(1e-6, 1e3 * eps))
    return bool(values(slow).all())


def _symmetric(g: Tensor) -> Tensor:
    g = g.detach()
    if not in_transform() and torch.equal(g, g.mT):  # much the cheaper test, and nearly always true
        return torch.ones((), dtype=torch.bool)
    tol = 100 * torch.finfo(g.dtype).eps * g.abs().amax((-1, -2), keepdim=True)
    return ((g - g.mT).abs() <= tol).all(-1).all(-1)


def _solve_triangular(a: Tensor, b: Tensor, *, upper: bool) -> Tensor:
    return torch.linalg.solve_triangular(a, b.unsqueeze(-1), upper=upper).squeeze(-1)
