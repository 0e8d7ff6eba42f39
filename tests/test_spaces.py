"""Closed-form spaces against textbook formulas, mpmath, and differentiation of the bare metric."""

import itertools
import math
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from torch import nn
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from darboux import _smooth
from darboux.manifolds.chart import Chart
from darboux.manifolds.embedded import Embedded
from darboux.manifolds.euclidean import Euclidean, FlatTorus
from darboux.manifolds.fisher import FisherGaussian
from darboux.manifolds.space_forms import HalfSpace, Hyperbolic, Stereographic
from darboux.manifolds.sphere import Sphere
from darboux.manifolds.surfaces import Ellipsoid, SurfaceOfRevolution, TorusOfRevolution

F64 = torch.float64
PI = math.pi


def jvp(f, primals, tangents) -> Any:
    return torch.func.jvp(f, primals, tangents)


def tensor(*numbers):
    return torch.tensor(numbers, dtype=F64)


class Anonymous(Chart):
    """The same metric and nothing else."""

    def __init__(self, space):
        super().__init__(space.dim)
        self.metric_of = space.metric

    def metric(self, x):
        return self.metric_of(x)


class PlainSphere(Embedded):
    """The unit sphere by its projector alone."""

    def _projector(self, x):
        return self.metric(x) - x[..., :, None] * x[..., None, :] / (x * x).sum(-1)[..., None, None]

    def _project(self, x):
        return x / x.norm(dim=-1, keepdim=True)


CLOSED = {
    "euclidean": lambda: Euclidean(3),
    "flat_torus": lambda: FlatTorus(lattice=tensor([1.0, 0.2], [0.7, 1.1])),
    "ball": lambda: Stereographic(3, -1.0),
    "ball_0.3": lambda: Stereographic(2, torch.tensor(-0.3, dtype=F64)),
    "flat_stereographic": lambda: Stereographic(2, 0.0),
    "spherical_stereographic": lambda: Stereographic(3, 0.7),
    "half_plane": lambda: HalfSpace(2),
    "half_space": lambda: HalfSpace(3, torch.tensor(-0.4, dtype=F64)),
    "fisher": lambda: FisherGaussian(1),
    "fisher_3": lambda: FisherGaussian(3),
}
INTEGRATED = {
    "torus": lambda: TorusOfRevolution(2.0, torch.tensor(0.7, dtype=F64)),
    "ellipsoid": lambda: Ellipsoid(1.0, 1.3, 0.8),
    "catenoid": lambda: SurfaceOfRevolution(lambda u: (torch.cosh(u), u)),
}
SPHERES = {
    "sphere": lambda: Sphere(2),
    "sphere_4": lambda: Sphere(4, torch.tensor(1.7, dtype=F64)),
    "circle": lambda: Sphere(1, 0.5),
}
CHARTS = {**CLOSED, **INTEGRATED}
GEODESIC = {**CLOSED, **SPHERES}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def sample(space, n=100):
    return space.random_point(n, dtype=F64)


def close(a, b, tol):
    a, b = a.detach(), torch.as_tensor(b, dtype=a.dtype).detach()
    scale = max(1.0, float(b.abs().max()))
    assert float((a - b).abs().max()) <= tol * scale, float((a - b).abs().max())


# -- functions of squares -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "of_root", "low", "high"),
    [
        ("cosc", mpmath.cos, -50, 50),
        ("sinc", lambda r: mpmath.sin(r) / r, -50, 9),
        ("versinc", lambda r: (1 - mpmath.cos(r)) / r**2, -50, 30),
        ("tanc", lambda r: mpmath.tan(r) / r, -50, 2),
        ("asinc", lambda r: mpmath.asin(r) / r, -1e4, 0.99),
        ("atanc", lambda r: mpmath.atan(r) / r, -0.9, 1e4),
    ],
)
def test_smooth_functions_and_two_derivatives_against_mpmath(name, of_root, low, high):
    f = getattr(_smooth, name)
    near = np.concatenate([np.geomspace(1e-12, 1, 40), -np.geomspace(1e-12, 1, 40)])
    s = np.unique(np.clip(np.concatenate([np.linspace(low, high, 41), near, [0.0]]), low, high))
    mpmath.mp.dps = 100

    def exact(q):
        return mpmath.re(of_root(mpmath.sqrt(mpmath.mpc(q)))) if q else mpmath.mpf(_AT_ZERO[name])

    x = torch.tensor(s, dtype=F64)
    first, second = vmap(grad(f))(x), vmap(grad(grad(f)))(x)
    for i, q in enumerate(s):
        if q == 0:
            continue
        value = exact(mpmath.mpf(float(q)))
        # relative to the value, or to the size of what it is computed from next to a zero
        assert abs(f(x)[i] - float(value)) <= 3e-15 * max(abs(float(value)), 0.05)
        step = mpmath.mpf(10) ** -15 * max(abs(float(q)), 1e-6)
        up, down = exact(mpmath.mpf(float(q)) + step), exact(mpmath.mpf(float(q)) - step)
        d1, d2 = float((up - down) / (2 * step)), float((up - 2 * value + down) / step**2)
        size = max(1.0, abs(float(q)))
        assert abs(first[i] - d1) <= 2e-13 * max(abs(d1), 0.02 / size)
        assert abs(second[i] - d2) <= 2e-11 * max(abs(d2), 0.02 / size**2)


_AT_ZERO = {"cosc": 1, "sinc": 1, "versinc": 0.5, "tanc": 1, "asinc": 1, "atanc": 1}


def test_asinc_is_accurate_where_the_sine_is_one():
    gap = torch.logspace(-300, -1, 40, dtype=F64)  # 1 - s
    mpmath.mp.dps = 330
    exact = [mpmath.asin(mpmath.sqrt(1 - mpmath.mpf(float(g)))) for g in gap]
    got = _smooth.asinc(1 - gap, gap) * (1 - gap).sqrt()
    close(got, [float(e) for e in exact], 2e-15)


# -- curvature ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHARTS)
def test_tensors_equal_those_differentiated_from_the_metric(name):
    space = CHARTS[name]()
    bare = Anonymous(space)
    x = sample(space)
    u, v = space.random_tangent(x), space.random_tangent(x)
    close(space.christoffel(x), bare.christoffel(x), 1e-12)
    close(space.acceleration(x, v), bare.acceleration(x, v), 1e-12)
    close(space.log_volume(x), bare.log_volume(x), 1e-12)
    for method in ("riemann", "ricci", "scalar_curvature"):
        close(getattr(space, method)(x), getattr(bare, method)(x), 1e-9)
    wide = (space.inner(x, u, u) * space.inner(x, v, v) - space.inner(x, u, v) ** 2) > 0.1
    close(space.sectional(x, u, v)[wide], bare.sectional(x, u, v)[wide], 1e-9)
    p = space.flat(x, v)
    close(p, bare.flat(x, v), 1e-13)
    close(space.sharp(x, p), v, 1e-13)
    for mine, theirs in zip(space._geodesic_field(x, p), bare._geodesic_field(x, p), strict=True):
        close(mine, theirs, 1e-12)

    def f(z):
        return (z.sin() * z.cos().flip(-1)).sum(-1)

    def field(z):
        return z.flip(-1).sin() + z

    for method in ("gradient", "hessian", "laplacian"):
        close(getattr(space, method)(f, x), getattr(bare, method)(f, x), 1e-11)
    close(space.divergence(field, x), bare.divergence(field, x), 1e-11)
    close(space.covariant_derivative(field, x, v), bare.covariant_derivative(field, x, v), 1e-11)
    z = space.random_tangent(x)
    frames = torch.linalg.cholesky(space.metric(x)).mT
    close(space.norm(x, z), (frames @ z[..., None]).squeeze(-1).norm(dim=-1), 1e-13)


@pytest.mark.parametrize(
    ("space", "k"),
    [
        (Euclidean(3), 0.0),
        (FlatTorus(2), 0.0),
        (Stereographic(3, -1.0), -1.0),
        (Stereographic(4, 0.6), 0.6),
        (Stereographic(2, 0.0), 0.0),
        (HalfSpace(3, -0.5), -0.5),
        (FisherGaussian(1), -1 / 2),
        (FisherGaussian(3), -1 / 6),
        (Sphere(3, 2.0), 0.25),
    ],
)
def test_space_forms_have_constant_curvature(space, k):
    x = sample(space)
    u, v, w = (space.random_tangent(x) for _ in range(3))
    d = space.dim
    close(space.scalar_curvature(x), d * (d - 1) * k, 1e-12)
    g = space.metric(x) if space.point_dim == d else space._projector(x)
    close(space.ricci(x), (d - 1) * k * g, 1e-12)
    bend = torch.einsum("...lkij,...i,...j,...k->...l", space.riemann(x), u, v, w)
    vw, uw = space.inner(x, v, w)[..., None], space.inner(x, u, w)[..., None]
    close(bend, k * (vw * u - uw * v), 1e-11)
    close(space.sectional(x, u, v), k, 1e-12)


def test_half_plane_textbook():
    plane, x = HalfSpace(2), sample(HalfSpace(2))
    y = x[:, 1]
    gamma = torch.zeros(100, 2, 2, 2, dtype=F64)
    gamma[:, 0, 0, 1] = gamma[:, 0, 1, 0] = gamma[:, 1, 1, 1] = -1 / y
    gamma[:, 1, 0, 0] = 1 / y
    close(plane.christoffel(x), gamma, 1e-14)
    s = torch.linspace(-30, 30, 61, dtype=F64)
    start = tensor(0.0, 1.0)
    end = plane.exp(start, s[:, None] * tensor(1.0, 0.0))
    close(end[:, 0], s.tanh(), 1e-14)
    close(end[:, 1] * s.cosh(), torch.ones(61), 1e-13)  # sech s, relative
    close(plane.exp(start, s[:, None] * tensor(0.0, 1.0))[:, 1].log(), s, 1e-14)
    p, q = sample(plane), sample(plane)
    exact = 2 * torch.asinh((p - q).norm(dim=-1) / (2 * (p[:, 1] * q[:, 1]).sqrt()))
    close(plane.dist(p, q), exact, 1e-14)
    close(plane.dist(tensor(0.0, 1e-150), tensor(0.0, 1e150)), 300 * math.log(10), 1e-14)


def test_torus_textbook_and_gauss_bonnet():
    big, small = 2.0, 0.7
    torus = TorusOfRevolution(big, small)
    x = sample(torus)
    u = x[:, 0]
    ring = big + small * u.cos()
    gamma = torch.zeros(100, 2, 2, 2, dtype=F64)
    gamma[:, 0, 1, 1] = ring * u.sin() / small
    gamma[:, 1, 0, 1] = gamma[:, 1, 1, 0] = -small * u.sin() / ring
    close(torus.christoffel(x), gamma, 1e-13)
    close(torus.scalar_curvature(x) / 2, u.cos() / (small * ring), 1e-13)
    us = torch.arange(64, dtype=F64) * 2 * PI / 64
    grid = torch.stack([us, 0 * us], -1)
    area = torus.log_volume(grid).exp() * (2 * PI / 64) * 2 * PI
    close(area.sum(), 4 * PI**2 * big * small, 1e-14)
    close((area * torus.scalar_curvature(grid)).sum(), 0.0, 1e-12)
    jac = vmap(jacrev(torus.embedding))(x)
    close(jac.mT @ jac, torus.metric(x), 1e-13)


def test_ellipsoid_textbook_and_gauss_bonnet():
    a, b, c = 1.0, 1.3, 0.8
    shape = Ellipsoid(a, b, c)
    x = sample(shape)
    px, py, pz = shape.embedding(x).unbind(-1)
    close(px**2 / a**2 + py**2 / b**2 + pz**2 / c**2, torch.ones(100), 1e-14)
    jac = vmap(jacrev(shape.embedding))(x)
    close(jac.mT @ jac, shape.metric(x), 1e-14)
    support = px**2 / a**4 + py**2 / b**4 + pz**2 / c**4
    close(shape.scalar_curvature(x) / 2, 1 / (a * b * c * support) ** 2, 1e-12)
    roots, weights = np.polynomial.legendre.leggauss(60)
    theta = torch.tensor((roots + 1) * PI / 2)
    phi = torch.arange(64, dtype=F64) * 2 * PI / 64
    grid = torch.cartesian_prod(theta, phi)
    w = torch.tensor(weights * PI / 2).repeat_interleave(64) * 2 * PI / 64
    total = (w * shape.log_volume(grid).exp() * shape.scalar_curvature(grid) / 2).sum()
    close(total, 4 * PI, 1e-12)
    round_one = Ellipsoid(2.0, 2.0, 2.0)
    theta = x[:, 0]
    gamma = round_one.christoffel(x)
    close(gamma[:, 0, 1, 1], -theta.sin() * theta.cos(), 1e-13)
    close(gamma[:, 1, 0, 1], 1 / theta.tan(), 1e-13)


@pytest.mark.parametrize(
    ("profile", "curvature", "bounds"),
    [
        (lambda u: (u.cosh(), u), lambda u: -1 / u.cosh() ** 4, (-1, 1)),  # catenoid
        (lambda u: (2 * u.sin(), 2 * u.cos()), lambda u: 0.25 + 0 * u, (0.3, 2.8)),
        (lambda u: (1 / u.cosh(), u - u.tanh()), lambda u: -1 + 0 * u, (0.4, 2.0)),  # tractrix
        (lambda u: (1 + 0 * u, u), lambda u: 0 * u, (-1, 1)),
        (lambda u: (u, u**2), lambda u: 4 / (1 + 4 * u**2) ** 2, (0.2, 2.0)),  # paraboloid
    ],
)
def test_surfaces_of_revolution(profile, curvature, bounds):
    surface = SurfaceOfRevolution(profile, bounds)
    x = sample(surface)
    close(surface.scalar_curvature(x) / 2, curvature(x[:, 0]), 1e-12)
    jac = vmap(jacrev(surface.embedding))(x)
    close(jac.mT @ jac, surface.metric(x), 1e-12)


def test_clairaut():
    torus = TorusOfRevolution()
    x, p = sample(torus, 5), torch.randn(5, 2, dtype=F64)
    assert (torus._geodesic_field(x, p)[1][:, 1] == 0).all()
    v = torus.random_tangent(x)
    one = tensor(1.0)[0]
    y, rate = jvp(lambda t: torus.exp(x, t * v), (one,), (one,))
    close(torus.flat(y, rate)[:, 1], torus.flat(x, v)[:, 1], 1e-12)
    close(torus.norm(y, rate), torus.norm(x, v), 1e-12)


# -- exp, log, distance, transport --------------------------------------------------------


@pytest.mark.parametrize("name", GEODESIC)
def test_exp_inverts_log_and_transport_is_parallel(name):
    space = GEODESIC[name]()
    x, y = sample(space), sample(space)
    v, w = space.log(x, y), space.random_tangent(x)
    reached = space.exp(x, v)
    close(space.dist(reached, y), torch.zeros(100), 1e-12)
    close(space.norm(x, v), space.dist(x, y), 1e-12)
    close(space.sqdist(x, y), space.dist(y, x) ** 2, 1e-12)
    close(space.project(space.geodesic(x, v, tensor(0.0, 0.5))[0]), space.project(x), 1e-12)
    half = space.geodesic(x, v, tensor(0.0, 0.5))[1]
    close(space.dist(x, half), space.dist(x, y) / 2, 1e-12)
    moved = space.transport(x, y, w)
    end, along = space.transport_along(x, v, w)
    close(along, moved, 1e-11)
    close(end, reached, 1e-12)
    close(space.norm(y, moved), space.norm(x, w), 1e-12)
    close(space.transport(y, x, moved), w, 1e-11)
    close(space.transport(x, y, v), -space.log(y, x), 1e-11)
    assert space.is_point(reached).all()
    assert space.is_tangent(y, moved, 1e-9).all()


@pytest.mark.parametrize("name", ["ball", "spherical_stereographic", "half_space", "fisher_3"])
def test_geodesics_and_transport_equal_the_integrated_ones(name):
    space = CLOSED[name]()
    bare = Anonymous(space)
    x = sample(space, 10)
    v, w = 0.5 * space.random_tangent(x), space.random_tangent(x)
    y, moved = space.transport_along(x, v, w)
    y_bare, moved_bare = bare.transport_along(x, v, w)
    close(y, y_bare, 1e-11)
    close(moved, moved_bare, 1e-11)
    ts = tensor(-0.5, 0.0, 0.3, 1.0)
    close(space.geodesic(x, v, ts), bare.geodesic(x, v, ts), 1e-9)
    close(bare.log(x[:3], y[:3]), v[:3], 1e-9)


@pytest.mark.parametrize("name", GEODESIC)
def test_gradient_of_half_squared_distance_is_minus_log(name):
    space = GEODESIC[name]()
    x, y = sample(space, 20), sample(space, 20)
    slope = vmap(grad(lambda b, a: space.sqdist(a, b) / 2))(y, x)
    close(space.sharp(y, slope), -space.log(y, x), 1e-12)
    slope = vmap(grad(lambda b, a: space.dist(a, b)))(y, x)
    close(space.norm(y, space.sharp(y, slope)), torch.ones(20), 1e-12)


@pytest.mark.parametrize("name", GEODESIC)
def test_coincident_points_and_zero_vectors(name):
    space = GEODESIC[name]()
    x = sample(space, 1)[0]
    zero = torch.zeros_like(x)
    n, d = space.point_dim, space.dim
    tangent = torch.eye(n, dtype=F64) if n == d else space._projector(x)
    metric = space.metric(x)
    assert space.dist(x, x) == 0
    assert (space.log(x, x) == 0).all()
    close(space.exp(x, zero), x, 1e-15)
    assert (grad(lambda b: space.dist(x, b))(x) == 0).all()
    assert (grad(lambda b: space.sqdist(x, b))(x) == 0).all()
    close(space.hessian(lambda b: space.sqdist(x.expand_as(b), b), x), 2 * tangent @ metric, 1e-12)
    for mode in (jacfwd, jacrev):
        close(mode(lambda b: space.log(x, b))(x) @ tangent, tangent, 1e-14)
        close(mode(lambda b: space.log(b, x))(x) @ tangent, -tangent, 1e-14)
        close(mode(lambda v: space.exp(x, v))(zero) @ tangent, tangent, 1e-14)
        close(mode(lambda b: space.transport(x, b, zero))(x), torch.zeros(n, n), 1e-14)
    # second derivative of exp is the acceleration, of log minus that
    v = space.random_tangent(x)
    bend = jvp(
        lambda t: jvp(lambda s: space.exp(x, s * v), (t,), (1 + 0 * t,))[1],
        (tensor(0.0)[0],),
        (tensor(1.0)[0],),
    )[1]
    close(bend, space.acceleration(x, v), 1e-12)
    for f in (
        lambda z: space.exp(x, z - x).sum(),
        lambda z: space.log(x, z).sum(),
        lambda z: space.log(z, x).sum(),
        lambda z: space.transport(x, z, v).sum(),
        lambda z: space.dist(x, z),
    ):
        assert hessian(f)(x).isfinite().all()
    close(jvp(lambda z: space.transport(x, z, v), (x,), (v,))[1], -gamma(space, x, v, v), 1e-12)


def gamma(space, x, u, v):
    return torch.einsum("kij,i,j->k", space.christoffel(x), u, v)


@pytest.mark.parametrize("name", GEODESIC)
def test_derivatives_of_squared_distance_near_coincidence(name):
    # the thresholds inside must not show: compare with a Taylor expansion of the gradient
    space = GEODESIC[name]()
    x = sample(space, 1)[0]
    v = space.random_tangent(x)

    def along(t):
        return space.sqdist(x, space.exp(x, t * v))

    ts = torch.logspace(-8, -0.5, 12, dtype=F64)
    sq = float(space.inner(x, v, v))
    if name == "flat_torus":
        ts = ts * 0.2
    first = vmap(grad(along))(ts) / ts
    rounding = 1e-13 + 1e-15 / ts  # of exp(x, t v), whose distance from x is t
    assert ((first - 2 * sq).abs() <= 2 * max(sq, 1) * rounding * (1 + x.abs().max())).all()
    close(vmap(grad(grad(along)))(ts), 2 * sq, 1e-10)


@pytest.mark.parametrize("name", GEODESIC)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_dtypes_and_vmap(name, dtype):
    space = GEODESIC[name]().to(dtype)
    d = space.point_dim
    x, y = space.random_point(3, 1, dtype=dtype), space.random_point(2, dtype=dtype)
    v, out = space.log(x, y), space.dist(x, y)
    assert v.shape == (3, 2, d)
    assert out.shape == (3, 2)
    assert v.dtype == out.dtype == space.scalar_curvature(x).dtype == dtype
    tol = 1e-12 if dtype == F64 else 2e-4
    one = vmap(space.log, in_dims=(None, 0))(x[0, 0], y)
    close(one, v[0], tol)
    close(space.dist(space.exp(x.expand_as(v), v), y), 0.0, tol)
    assert space.random_point(dtype=dtype).shape == (d,)
    assert space.log(x[:0, 0], x[:0, 0]).shape == (0, d)


# -- the sphere ---------------------------------------------------------------------------


def test_sphere_law_of_cosines_and_distance():
    ball = Sphere(2, 1.5)
    a, b, c = (sample(ball) for _ in range(3))
    u, v = ball.log(c, a), ball.log(c, b)
    la, lb = u.norm(dim=-1) / 1.5, v.norm(dim=-1) / 1.5
    angle = (u * v).sum(-1) / (u.norm(dim=-1) * v.norm(dim=-1))
    law = la.cos() * lb.cos() + la.sin() * lb.sin() * angle
    close((ball.dist(a, b) / 1.5).cos(), law, 1e-14)
    close((a * b).sum(-1) / 1.5**2, (ball.dist(a, b) / 1.5).cos(), 1e-14)
    for s in (1e-150, 1e-12, 1e-3, 1.0, 3.0, PI - 1e-3, PI - 1e-9):
        x = tensor(1.0, 0.0, 0.0)
        y = tensor(math.cos(s), math.sin(s), 0.0)
        assert abs(Sphere(2).dist(x, y) - s) <= 4e-16 * s


def test_sphere_holonomy_of_an_octant():
    ball = Sphere(2)
    e = torch.eye(3, dtype=F64)
    v = e[1]
    for a, b in ((0, 1), (1, 2), (2, 0)):
        v = ball.transport(e[a], e[b], v)
    close(v, e[2], 1e-15)  # turned by pi/2 = the area, e_1 towards e_2 seen from outside at e_0


def test_hyperbolic_holonomy_is_minus_the_area():
    for space in (HalfSpace(2), Stereographic(2, -1.0)):
        a, b, c = sample(space, 3)
        v = space.random_tangent(a)
        w = v
        for p, q in ((a, b), (b, c), (c, a)):
            w = space.transport(p, q, w)

        def angle(at, p, q, space=space):
            u, v = space.log(at, p), space.log(at, q)
            return torch.acos(space.inner(at, u, v) / (space.norm(at, u) * space.norm(at, v)))

        area = PI - angle(a, b, c) - angle(b, c, a) - angle(c, a, b)
        orientation = torch.linalg.det(torch.stack([space.log(a, b), space.log(a, c)])).sign()
        turn = torch.atan2(v[0] * w[1] - v[1] * w[0], (v * w).sum())  # conformal charts
        close(turn, -orientation * area, 1e-12)


def test_sphere_antipodes():
    ball = Sphere(3, 2.0)
    x = sample(ball, 20)
    there = ball.connect(x, -x)
    assert there.conjugate.all()
    assert not there.unique.any()
    close(ball.norm(x, there.velocity), 2 * PI, 1e-15)
    close(ball.exp(x, there.velocity), -x, 1e-15)
    assert torch.equal(ball.log(x, -x), there.velocity)
    w = ball.random_tangent(x)
    close(ball.norm(-x, ball.transport(x, -x, w)), ball.norm(x, w), 1e-14)
    for s in (1e-3, 1e-8, 1e-12):
        u = ball.random_tangent(x)
        u = u / ball.norm(x, u)[..., None]
        y = ball.exp(x, (PI - s) * 2 * u)
        v = ball.log(x, y)
        near = ball.connect(x, y)
        assert near.unique.all()
        close(ball.exp(x, v), y, 1e-14)
        close(v, (PI - s) * 2 * u, 1e-14 / s)
    for f in (ball.log, ball.dist, ball.sqdist, lambda p, q: ball.transport(p, q, w[0])):
        assert jacrev(f, argnums=(0, 1))(x[0], -x[0])[1].isfinite().all()


def test_stereographic_antipodes_and_long_geodesics():
    ball = Stereographic(2, 1.0)
    x = sample(ball, 20) + 0.1
    far = -x / x.square().sum(-1, keepdim=True)
    there = ball.connect(x, far)
    close(ball.dist(x, far), PI, 1e-15)
    close(ball.norm(x, ball.log(x, far)), PI, 1e-13)
    near = ball.exp(x, ball.log(x, far) * (1 - 1e-6))
    close(ball.dist(x, near), PI * (1 - 1e-6), 1e-13)
    assert there.velocity.isfinite().all()
    exact = ball.connect(tensor(1.0, 0.0), tensor(-1.0, 0.0))
    assert exact.conjugate
    assert not exact.unique
    v = ball.random_tangent(x)
    v = v / ball.norm(x, v)[..., None]
    close(ball.exp(x, 2 * PI * v), x, 1e-13)  # around once
    y, w = ball.transport_along(x, 2 * PI * v, v)
    close(w, v, 1e-12)
    close(y, x, 1e-12)
    y, w = ball.transport_along(x, 4.0 * v, v)
    close(w, ball.log(y, ball.exp(x, 4.5 * v)) / 0.5, 1e-11)


def test_embedded_by_its_projector_equals_the_closed_sphere():
    ball, plain = Sphere(2), PlainSphere(2, 3)
    x = sample(ball, 30)
    u, v = ball.random_tangent(x), ball.random_tangent(x)
    for method in ("christoffel", "riemann", "ricci", "scalar_curvature", "log_volume"):
        close(getattr(plain, method)(x), getattr(ball, method)(x), 1e-14)
    close(plain.acceleration(x, v), ball.acceleration(x, v), 1e-14)
    wide = torch.linalg.cross(u, v).norm(dim=-1) > 0.1
    close(plain.sectional(x, u, v)[wide], torch.ones(30)[wide], 1e-12)

    def f(z):
        return z[..., 0] * z[..., 1] + z[..., 2] ** 3

    def field(z):
        return ball.gradient(f, z)

    for method in ("gradient", "hessian", "laplacian"):
        close(getattr(plain, method)(f, x), getattr(ball, method)(f, x), 1e-13)
    close(ball.divergence(field, x), ball.laplacian(f, x), 1e-13)
    close(ball.laplacian(lambda z: z[..., 0] * z[..., 1], x), -6 * x[:, 0] * x[:, 1], 1e-13)
    close(plain.exp(x, v), ball.exp(x, v), 1e-12)
    ts = tensor(-0.7, 0.0, 0.4, 1.0)
    close(plain.geodesic(x, v, ts), ball.geodesic(x, v, ts), 1e-9)
    for mine, theirs in zip(
        plain.transport_along(x, u, v), ball.transport_along(x, u, v), strict=True
    ):
        close(mine, theirs, 1e-12)
    y = ball.exp(x, u * (2 * torch.rand(30, 1, dtype=F64) / ball.norm(x, u)[:, None]))
    close(plain.log(x, y), ball.log(x, y), 1e-12)
    close(plain.dist(x, y), ball.dist(x, y), 1e-12)
    close(
        vmap(jacrev(lambda b, a: plain.log(a, b)))(y[:3], x[:3]) @ ball._projector(y[:3]),
        vmap(jacrev(lambda b, a: ball.log(a, b)))(y[:3], x[:3]) @ ball._projector(y[:3]),
        1e-10,
    )


# -- hyperbolic space ---------------------------------------------------------------------


def to_hyperboloid(x):  # from the ball
    sq = x.square().sum(-1, keepdim=True)
    return torch.cat([1 + sq, 2 * x], -1) / (1 - sq)


def to_ball(h):  # from the half-space: reflect through the sphere about -e_n of radius sqrt 2
    up = torch.zeros_like(h)
    up[..., -1] = 1
    c = h + up
    return -up + 2 * c / c.square().sum(-1, keepdim=True)


def test_models_of_hyperbolic_space_agree():
    ball, half = Hyperbolic(3), Hyperbolic(3, model="half_space")
    p, q = sample(half), sample(half)
    a, b = to_ball(p), to_ball(q)
    close(half.dist(p, q), ball.dist(a, b), 1e-13)
    x, y = to_hyperboloid(a), to_hyperboloid(b)
    minkowski = x[:, 0] * y[:, 0] - (x[:, 1:] * y[:, 1:]).sum(-1)
    close(half.dist(p, q), torch.acosh(minkowski), 1e-11)
    v = half.random_tangent(p)
    pushed, end = [], []
    for i in range(100):
        image, dv = jvp(to_ball, (p[i],), (v[i],))
        pushed.append(dv)
        end.append(image)
    close(ball.exp(torch.stack(end), torch.stack(pushed)), to_ball(half.exp(p, v)), 1e-12)
    scaled = HalfSpace(3, -0.25)
    close(scaled.dist(p, q), 2 * half.dist(p, q), 1e-14)
    close(Stereographic(3, -0.25).dist(2 * a, 2 * b), 2 * ball.dist(a, b), 1e-14)


def test_jacobi_fields_grow_as_sn_k():
    t = torch.linspace(0.1, 3.0, 8, dtype=F64)
    cases = [
        (Sphere(2), torch.sin(t)),
        (Stereographic(2, 1.0), torch.sin(t)),
        (Stereographic(3, -1.0), torch.sinh(t)),
        (HalfSpace(3), torch.sinh(t)),
        (Euclidean(2), t),
        (Stereographic(2, 0.0), t),
    ]
    for space, sn in cases:
        x = sample(space, 1)[0]
        u, w = space.random_tangent(x), space.random_tangent(x)
        u = u / space.norm(x, u)
        w = w - space.inner(x, u, w) * u
        w = w / space.norm(x, w)
        for i in range(8):
            y, j = jvp(lambda v, s=space, x=x: s.exp(x, v), (t[i] * u,), (t[i] * w,))
            close(space.norm(y, j), sn[i], 1e-12)


def mp_ball_distance(x, y, k=-1):
    mpmath.mp.dps = 60
    x, y = ([mpmath.mpf(float(c)) for c in z] for z in (x, y))
    sq = sum((a - b) ** 2 for a, b in zip(x, y, strict=True))
    nx, ny = (1 + k * sum(c**2 for c in z) for z in (x, y))
    return 2 * mpmath.asinh(mpmath.sqrt(-k * sq / (nx * ny))) / mpmath.sqrt(-k)


def test_ball_near_the_rim():
    ball = Stereographic(2, -1.0)
    for dtype, reach in ((torch.float64, 37.4), (torch.float32, 17.3)):
        zero = torch.zeros(2, dtype=dtype)
        last = torch.tensor([1 - torch.finfo(dtype).eps / 2, 0.0], dtype=dtype)
        assert ball.dist(zero, last) == pytest.approx(reach, abs=0.1)
        assert ball.dist(-last, last) == pytest.approx(2 * reach, abs=0.2)
    # axis points are exact to the last digit
    for gap in (1e-3, 1e-8, 2.0**-50):
        x = tensor(1 - gap, 0.0)
        for y in (
            tensor(0.0, 0.0),
            tensor(-0.5, 0.2),
            tensor(gap - 1, 0.0),
            tensor(1 - 2 * gap, 0.0),
        ):
            exact = mp_ball_distance(x, y)
            assert abs(ball.dist(x, y) - float(exact)) <= 1e-15 * float(exact)
    # near pairs keep relative accuracy
    for dtype, tol in ((torch.float64, 1e-14), (torch.float32, 1e-5)):
        x = torch.tensor([0.6, 0.3], dtype=dtype)
        for step in (1e-3, 1e-5, 1e-7 if dtype == F64 else 1e-6):
            y = x + torch.tensor([step, -step / 3], dtype=dtype)
            exact = float(mp_ball_distance(x, y))
            assert abs(ball.dist(x, y) - exact) <= tol * exact
            assert abs(ball.norm(x, ball.log(x, y)) - exact) <= tol * exact


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-8), (torch.float32, 2e-2)])
def test_ball_geodesics_from_rim_to_rim(dtype, tol):
    # from a radius of 15 (5 in float32) back across the middle: cosh and sinh agree there to
    # more digits than there are
    ball = Stereographic(2, -1.0)
    radius = 15.0 if dtype == F64 else 5.0
    x = torch.tensor([math.tanh(radius / 2), 0.0], dtype=dtype)
    for far in (0.0, 2.0, -2.0):
        end = torch.tensor([-math.tanh(far / 2) * 0.8, -math.tanh(far / 2) * 0.6], dtype=dtype)
        v = ball.log(x, end)
        assert ball.dist(ball.exp(x, v), end) <= tol
        y, w = ball.transport_along(x, v, v)
        assert abs(ball.norm(y, w) / ball.norm(x, v) - 1) <= tol
    with pytest.raises(RuntimeError, match="closer to the edge"):
        ball.exp(0 * x, 50 * x)
    assert (ball.project(torch.tensor([3.0, 4.0], dtype=dtype)).norm() < 1).all()


def test_distance_is_smooth_in_the_curvature_through_zero():
    x, y = tensor(0.3, -0.2), tensor(-0.4, 0.5)
    mpmath.mp.dps = 40

    def exact(k):
        k = mpmath.mpmathify(k)
        a, b = ([mpmath.mpf(float(c)) for c in z] for z in (x, y))
        sq = sum((p - q) ** 2 for p, q in zip(a, b, strict=True))
        dot = sum(p * q for p, q in zip(a, b, strict=True))
        den = 1 + 2 * k * dot + k * k * sum(p * p for p in a) * sum(q * q for q in b)
        m = mpmath.sqrt(sq / den)
        if k == 0:
            return 2 * m
        r = mpmath.sqrt(mpmath.mpc(k))
        return mpmath.re(2 * mpmath.atan(r * m) / r)

    def dist(k):
        return Stereographic(2, k).dist(x, y)

    for k in (-1.0, -0.3, -1e-3, -1e-9, 0.0, 1e-9, 1e-3, 0.4, 2.0):
        kt = torch.tensor(k, dtype=F64)
        close(dist(kt), float(exact(k)), 1e-15)
        close(dist(k), float(exact(k)), 1e-15)
        h = mpmath.mpf(10) ** -10
        close(grad(dist)(kt), float((exact(k + h) - exact(k - h)) / (2 * h)), 1e-13)
        second = float((exact(k + h) - 2 * exact(k) + exact(k - h)) / h**2)
        close(grad(grad(dist))(kt), second, 1e-11)
        for f in (
            lambda k: Stereographic(2, k).exp(x, y),
            lambda k: Stereographic(2, k).log(x, y),
            lambda k: Stereographic(2, k).transport(x, y, y),
            lambda k: Stereographic(2, k).transport_along(x, y, x)[1],
        ):
            e = 1e-5
            close(jacfwd(f)(kt), (f(kt + e) - f(kt - e)) / (2 * e), 1e-9)
            close(f(kt), f(k), 1e-15)
    ks = torch.linspace(-1, 1, 5, dtype=F64)
    close(vmap(dist)(ks), torch.stack([dist(k) for k in ks]), 1e-15)


# -- the flat torus -----------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_flat_torus_finds_the_closest_image(dim):
    generator = np.random.default_rng(dim)
    for _ in range(6):
        basis = generator.normal(size=(dim, dim))
        basis = np.where(np.abs(basis) > 0.1, basis, 0.3) + np.eye(dim)
        basis = basis @ np.diag(generator.uniform(0.3, 2, dim))
        # a skew basis of the same lattice
        skew = np.eye(dim) + np.triu(generator.integers(-3, 4, (dim, dim)), 1)
        reach = 9 if dim < 3 else 7
        if np.linalg.cond(basis) > 8:
            continue
        torus = FlatTorus(lattice=torch.tensor(skew @ basis))
        x = torch.tensor(generator.normal(size=(40, dim)))
        y = x + torch.tensor(generator.uniform(-3, 3, (40, dim)) @ basis)
        shifts = torch.tensor(list(itertools.product(range(-reach, reach + 1), repeat=dim)))
        images = y[:, None] - x[:, None] + shifts.to(F64) @ torch.tensor(basis)
        brute = images.norm(dim=-1).sort(-1).values
        close(torus.dist(x, y), brute[:, 0], 1e-13)
        found = torus.connect(x, y)
        cell = torch.linalg.inv(torch.tensor(basis))
        turns = (found.velocity - (y - x)) @ cell
        close(turns, turns.round(), 1e-11)
        assert found.unique.all()


def test_flat_torus_in_high_dimension_and_on_its_cut_locus():
    torus = FlatTorus(7)
    x, y = 10 * torch.randn(2, 30, 7, dtype=F64)
    gap = torch.remainder(y - x + PI, 2 * PI) - PI
    close(torus.log(x, y), gap, 1e-13)
    two = FlatTorus(2)
    zero = tensor(0.0, 0.0)
    assert not two.connect(zero, tensor(PI, 0.3)).unique
    assert two.connect(zero, tensor(PI - 1e-6, 0.3)).unique
    assert two.dist(zero, tensor(PI, 0.0)) == pytest.approx(PI)
    hexagon = FlatTorus(lattice=tensor([1.0, 0.0], [0.5, math.sqrt(3) / 2]))
    corner = tensor(0.5, math.sqrt(3) / 6)
    assert not hexagon.connect(zero, corner).unique
    assert hexagon.dist(zero, corner) == pytest.approx(1 / math.sqrt(3))
    assert hexagon.volume() == pytest.approx(math.sqrt(3) / 2)
    close(hexagon.dual() @ hexagon.generators(zero).mT, torch.eye(2), 1e-15)
    wrapped = two.project(tensor(7.0, -1.0))
    close(wrapped, tensor(7 - 2 * PI, 2 * PI - 1), 1e-15)


# -- parameters ---------------------------------------------------------------------------


def by_difference(f, a, h=1e-5):
    a = a.detach()
    return torch.stack(
        [
            (f(a + h * e.reshape(a.shape)) - f(a - h * e.reshape(a.shape))) / (2 * h)
            for e in torch.eye(a.numel(), dtype=F64)
        ]
    ).reshape(a.shape)


def one(first: Any, *others: Any):
    return torch.tensor([first, *others] if others else first, dtype=F64)


@pytest.mark.parametrize(
    ("f", "at"),
    [
        (lambda r: Sphere(2, r).dist(r * one(1.0, 0, 0), r * one(0.6, 0.8, 0)), one(1.3)),
        (lambda r: Sphere(2, r).exp(r * one(1.0, 0, 0), one(0.0, 0.4, 0.2)).sum(), one(1.3)),
        (lambda r: Sphere(2, r).log(r * one(1.0, 0, 0), r * one(0.6, 0.8, 0)).sum(), one(1.3)),
        (lambda k: Stereographic(2, k).scalar_curvature(one(0.1, 0.2)), one(-0.6)),
        (lambda k: HalfSpace(2, k).dist(one(0.1, 1.2), one(0.6, 0.7)), one(-0.6)),
        (lambda k: HalfSpace(2, k).norm(one(0.1, 1.2), one(0.6, 0.7)), one(-0.6)),
        (
            lambda b: FlatTorus(lattice=b).dist(one(0.1, 0.2), one(3.0, -2.0)),
            one((1.0, 0.2), (0.7, 1.1)),
        ),
        (lambda b: FlatTorus(lattice=b).volume(), one((1.0, 0.2), (0.7, 1.1))),
        (lambda r: TorusOfRevolution(r[0], r[1]).dist(one(0.1, 0.2), one(0.9, 0.8)), one(2.0, 0.7)),
        (
            lambda r: TorusOfRevolution(r[0], r[1]).exp(one(0.1, 0.2), one(0.9, 0.8)).sum(),
            one(2.0, 0.7),
        ),
        (lambda a: Ellipsoid(*a).dist(one(0.9, 0.2), one(1.5, 0.8)), one(1.0, 1.3, 0.8)),
        (lambda a: Ellipsoid(*a).scalar_curvature(one(0.9, 0.2)), one(1.0, 1.3, 0.8)),
        (
            lambda a: SurfaceOfRevolution(lambda u: (a * u.cosh(), u)).dist(
                one(0.1, 0.2), one(0.5, 0.8)
            ),
            one(1.3),
        ),
    ],
)
def test_gradients_in_the_parameters(f, at):
    numeric = by_difference(f, at)
    close(grad(f)(at), numeric, 1e-8)
    leaf = at.clone().requires_grad_()
    f(leaf).backward()
    close(leaf.grad, numeric, 1e-8)
    parameter = nn.Parameter(at.clone())
    f(parameter).backward()
    close(parameter.grad, numeric, 1e-8)


def test_parameters_are_registered_and_keep_their_dtype():
    ball = Stereographic(2, nn.Parameter(torch.tensor(-1.0)))
    assert [name for name, _ in ball.named_parameters()] == ["curvature"]
    with pytest.raises(TypeError, match="curvature has dtype"):
        ball.dist(tensor(0.0, 0.0), tensor(0.1, 0.0))
    ball.double().dist(tensor(0.0, 0.0), tensor(0.1, 0.0)).backward()
    lattice = nn.Parameter(torch.eye(2, dtype=F64))
    torus = FlatTorus(lattice=lattice)
    with torch.no_grad():  # a parameter that moves far away is reduced again
        lattice.copy_(tensor([1.0, 0.0], [5.0, 1.0]))
    close(torus.dist(tensor(0.0, 0.0), tensor(0.0, 0.9)), 0.1, 1e-15)


def test_fisher_distance_of_gaussians():
    family = FisherGaussian(1)
    x, y = sample(family), sample(family)
    (m1, s1), (m2, s2) = x.unbind(-1), y.unbind(-1)
    half = ((m1 - m2) ** 2 / 2 + (s1 - s2) ** 2) / (2 * s1 * s2)
    close(family.dist(x, y), math.sqrt(2) * torch.acosh(1 + half), 1e-10)
    # the metric is the expected Hessian of -log p: Monte Carlo free, by Gauss-Hermite
    roots, weights = np.polynomial.hermite_e.hermegauss(20)
    nodes, weights = torch.tensor(roots), torch.tensor(weights / math.sqrt(2 * PI))
    at = tensor(0.3, 0.8)

    def log_p(theta, z):
        return -((z - theta[0]) ** 2) / (2 * theta[1] ** 2) - theta[1].log()

    data = at[0] + at[1] * nodes
    fisher = -(weights[:, None, None] * vmap(hessian(log_p), in_dims=(None, 0))(at, data)).sum(0)
    close(family.metric(at), fisher, 1e-12)
    three = FisherGaussian(3)
    scores = tensor(1.0, 1.0, 1.0, 6.0) / 0.8**2
    close(three.metric(tensor(0.1, 0.2, 0.3, 0.8)), torch.diag(scores), 1e-14)


# -- errors -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Sphere(2, -1.0), ValueError, "expected a positive number"),
        (lambda: Sphere(2, torch.ones(2)), ValueError, "expected a floating-point scalar"),
        (lambda: Stereographic(2, float("nan")), ValueError, "expected a finite number"),
        (lambda: HalfSpace(2, 1.0), ValueError, "expected a negative number"),
        (lambda: HalfSpace(1), ValueError, "at least 2"),
        (lambda: Hyperbolic(2, 0.5), ValueError, "expected a negative number"),
        (lambda: Hyperbolic(2, model="klein"), ValueError, "expected 'ball' or 'half_space'"),
        (lambda: FlatTorus(), ValueError, "expected one"),
        (lambda: FlatTorus(3, torch.eye(2)), ValueError, r"expected \(d, d\) with d = 3"),
        (lambda: FlatTorus(lattice=torch.ones(2, 2)), ValueError, "not independent"),
        (lambda: FlatTorus(lattice=torch.eye(2, dtype=torch.long)), TypeError, "floating-point"),
        (lambda: TorusOfRevolution(1.0, 2.0), ValueError, "expected more than r"),
        (lambda: Ellipsoid(1.0, 0.0, 1.0), ValueError, "expected a positive number"),
        (lambda: FisherGaussian(0), ValueError, "at least 1"),
        (lambda: HalfSpace(2).dist(tensor(0.0, -1.0), tensor(0.0, 1.0)), ValueError, "not on the"),
        (lambda: Hyperbolic(2).dist(tensor(2.0, 0.0), tensor(0.0, 0.0)), ValueError, "not on the"),
        (lambda: Sphere(1).log(tensor(1.0, 1.0), tensor(0.0, 1.0)), ValueError, "not on the"),
        (lambda: Sphere(1).exp(tensor(1.0, 0.0), tensor(1.0, 0.0)), ValueError, "not tangent"),
        (
            lambda: SurfaceOfRevolution(lambda u: (u.sum(), u.sum())).metric(torch.zeros(3, 2)),
            ValueError,
            "expected the same shape",
        ),
    ],
)
def test_errors_say_what_was_expected(make, error, message):
    with pytest.raises(error, match=message):
        make()
