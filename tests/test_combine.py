"""Combinators against closed forms, and against differentiation of the metric they produce."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import grad, hessian, jacrev, vmap

from darboux.manifolds import Conformal, Product, Pullback, Warped
from darboux.manifolds.chart import Chart
from darboux.manifolds.euclidean import Euclidean, FlatTorus
from darboux.manifolds.space_forms import HalfSpace, Hyperbolic, Stereographic
from darboux.manifolds.sphere import Sphere
from darboux.manifolds.surfaces import Ellipsoid, TorusOfRevolution

F64 = torch.float64


def tensor(*numbers):
    return torch.tensor(numbers, dtype=F64)


def close(a, b, tol):
    a, b = a.detach(), torch.as_tensor(b, dtype=a.dtype).detach()
    scale = max(1.0, float(b.abs().max()))
    assert float((a - b).abs().max()) <= tol * scale, float((a - b).abs().max())


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Anonymous(Chart):
    """The same metric and nothing else."""

    def __init__(self, space):
        super().__init__(space.dim)
        self.metric_of = space.metric

    def metric(self, x):
        return self.metric_of(x)


class Net(nn.Module):
    """A smooth scalar function, bounded below by ``floor``."""

    def __init__(self, dim, floor=None):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(dim, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        self.floor = floor

    def forward(self, x):
        y = self.layers(x).squeeze(-1)
        return y if self.floor is None else self.floor + y.square()


NOT_SPACES: list[Any] = [Net(3)]


def graph(x):
    return torch.cat([x, x.square().sum(-1, keepdim=True), x[..., :1].sin()], -1)


SPACES = {
    "pullback": lambda: Pullback(graph, 2),
    "pullback_3": lambda: Pullback(graph, 3),
    "pullback_5": lambda: Pullback(graph, 5),
    "pullback_network": lambda: Pullback(nn.Sequential(nn.Linear(2, 9), nn.Tanh()).double(), 2),
    "pullback_to_half_space": lambda: Pullback(
        lambda x: torch.cat([x, 1 + x.square().sum(-1, keepdim=True)], -1), 2, HalfSpace(3)
    ),
    "conformal": lambda: Conformal(Euclidean(3), Net(3)),
    "conformal_plane": lambda: Conformal(Euclidean(2), Net(2)),
    "conformal_half_space": lambda: Conformal(HalfSpace(3), Net(3)),
    "conformal_surface": lambda: Conformal(TorusOfRevolution(), lambda x: x.sin().sum(-1) / 4),
    "warped": lambda: Warped(Euclidean(2), HalfSpace(2), Net(2, 0.5)),
    "warped_curve": lambda: Warped(HalfSpace(2), Euclidean(1), lambda b: b[..., 1]),
    "warped_over_line": lambda: Warped(Euclidean(1), Stereographic(2, 1.0), Net(1, 0.5)),
    "product": lambda: Product(TorusOfRevolution(), HalfSpace(2), Euclidean(1)),
    "conformal_product": lambda: Conformal(Product(HalfSpace(2), Euclidean(1)), Net(3)),
}


@pytest.mark.parametrize("name", SPACES)
def test_tensors_equal_those_differentiated_from_the_metric(name):
    space = SPACES[name]()
    bare = Anonymous(space)
    x = space.random_point(100, dtype=F64)
    if name in ("pullback", "pullback_3", "pullback_5", "pullback_network"):
        x = 0.5 * x
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
    close(space.sharp(x, p), v, 1e-11)
    for mine, theirs in zip(space._geodesic_field(x, p), bare._geodesic_field(x, p), strict=True):
        close(mine, theirs, 1e-11)

    def f(z):
        return (z.sin() * z.cos().flip(-1)).sum(-1)

    def field(z):
        return z.flip(-1).sin() + z

    for method in ("gradient", "hessian", "laplacian"):
        close(getattr(space, method)(f, x), getattr(bare, method)(f, x), 1e-11)
    close(space.divergence(field, x), bare.divergence(field, x), 1e-11)
    close(space.covariant_derivative(field, x, v), bare.covariant_derivative(field, x, v), 1e-11)
    z = space.random_tangent(x)
    close(space.norm(x, z), bare.norm(x, z), 1e-12)


@pytest.mark.parametrize("name", SPACES)
def test_exp_inverts_log(name):
    space = SPACES[name]()
    x = (
        0.5 * space.random_point(6, dtype=F64)
        if "pullback" in name
        else space.random_point(6, dtype=F64)
    )
    v, w = 0.2 * space.random_tangent(x), space.random_tangent(x)
    y = space.exp(x, v)
    close(space.log(x, y), v, 1e-9)
    close(space.dist(x, y), space.norm(x, v), 1e-9)
    end, moved = space.transport_along(x, v, w)
    close(end, y, 1e-9)
    close(space.norm(y, moved), space.norm(x, w), 1e-10)
    slope = vmap(grad(lambda b, a: space.sqdist(a, b) / 2))(y, x)
    close(space.sharp(y, slope), -space.log(y, x), 1e-8)
    close(space.log(x, x), 0 * x, 0)
    close(hessian(lambda b: space.sqdist(x[0], b))(x[0]), 2 * space.metric(x[0]), 1e-9)


def test_parameters_are_those_of_the_maps():
    for name in ("pullback_network", "conformal", "warped"):
        space = SPACES[name]()
        x = space.random_point(3, dtype=F64)
        own = list(space.parameters())
        assert len(own) in (2, 4)
        space.dist(x, space.exp(x, 0.1 * space.random_tangent(x)).detach()).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in own)


@pytest.mark.parametrize(
    ("curvature_of", "space", "at"),
    [
        (lambda x: 4 / (1 + 4 * x.square().sum(-1)) ** 2, "paraboloid", 1.0),
        (lambda x: -1 / (1 + x.square().sum(-1)) ** 2, "saddle", 1.0),
        (lambda x: 2 / (1 + x.square().sum(-1)), "cigar", 1.0),
        (lambda x: -torch.ones_like(x[..., 0]), "poincare", 0.4),
    ],
)
def test_gauss_curvature_of_classical_surfaces(curvature_of, space, at):
    spaces = {
        "paraboloid": Pullback(lambda x: torch.cat([x, x.square().sum(-1, keepdim=True)], -1), 2),
        "saddle": Pullback(lambda x: torch.cat([x, x.prod(-1, keepdim=True)], -1), 2),
        "cigar": Conformal(Euclidean(2), lambda x: -torch.log1p(x.square().sum(-1)) / 2),
        "poincare": Conformal(
            Euclidean(2), lambda x: math.log(2) - torch.log1p(-x.square().sum(-1))
        ),
    }
    m = spaces[space]
    x = at * torch.randn(100, 2, dtype=F64).clamp(-1.2, 1.2)
    close(m.scalar_curvature(x) / 2, curvature_of(x), 1e-12)


def test_conformal_curvature_formula():
    # Scal = -e^{-2 phi} (2 (n - 1) Lap phi + (n - 1)(n - 2) |dphi|^2), Weyl = 0
    phi = Net(4)
    space = Conformal(Euclidean(4), phi)
    x = torch.randn(50, 4, dtype=F64)
    d, h = vmap(grad(phi))(x), vmap(hessian(phi))(x)
    lap = h.diagonal(dim1=-2, dim2=-1).sum(-1)
    scal = -torch.exp(-2 * phi(x)) * (6 * lap + 6 * d.square().sum(-1))
    close(space.scalar_curvature(x), scal, 1e-12)
    g = space.metric(x)
    lowered = torch.einsum("...lm,...mkij->...lkij", g, space.riemann(x))
    schouten = (space.ricci(x) - scal[:, None, None] / 6 * g) / 2

    def wedge(a, b):  # Kulkarni-Nomizu, positive on the sphere
        first = torch.einsum("...li,...kj->...lkij", a, b) + torch.einsum(
            "...li,...kj->...lkij", b, a
        )
        return first - first.transpose(-1, -2)

    close(lowered - wedge(schouten, g), 0.0, 1e-11)
    v = torch.randn(50, 4, dtype=F64)
    dv = (d * v).sum(-1, keepdim=True)
    gamma = 2 * dv * v - v.square().sum(-1, keepdim=True) * d
    close(space.acceleration(x, v), -gamma, 1e-13)


def test_conformal_half_plane_has_its_geodesics():
    plane = Conformal(Euclidean(2), lambda x: -x[..., 1].log())
    half = HalfSpace(2)
    x, v = half.random_point(20, dtype=F64), half.random_tangent(half.random_point(20, dtype=F64))
    v = half.random_tangent(x)
    close(plane.exp(x, v), half.exp(x, v), 1e-11)
    fast = Conformal(Euclidean(2), lambda x: -x[..., 1].log(), method="rk4", steps=200)
    close(fast.exp(x, v), half.exp(x, v), 1e-6)


def test_pullback_of_polar_coordinates_and_of_a_submanifold():
    polar = Pullback(
        lambda x: torch.stack([x[..., 0] * x[..., 1].cos(), x[..., 0] * x[..., 1].sin()], -1), 2
    )
    x = tensor(1.0, 0.0) + torch.rand(20, 2, dtype=F64)
    v = 0.3 * torch.randn(20, 2, dtype=F64)
    close(polar.riemann(x), 0.0, 1e-12)
    jac = vmap(jacrev(polar.embedding))(x)
    straight = polar.embedding(x) + (jac @ v[..., None]).squeeze(-1)
    close(polar.embedding(polar.exp(x, v)), straight, 1e-11)
    shape = Ellipsoid(1.0, 1.3, 0.8)
    pulled = Pullback(shape.embedding, 2)
    x = shape.random_point(20, dtype=F64)
    close(pulled.riemann(x), shape.riemann(x), 1e-11)

    # through the chart of the ellipsoid, by its own metric
    def bend(x):
        return torch.stack([0.5 + 0.5 * x[..., 0], x[..., 1] + x[..., 0].square()], -1)

    close(
        Pullback(bend, 2, shape).scalar_curvature(x),
        shape.scalar_curvature(bend(x)),
        1e-9,
    )


def test_pullback_acceleration_loses_kappa_not_its_square():
    # J has condition 1e6, g 1e12
    thin = tensor(1.0, 1e-6)

    def f(x):
        a, b = (x * thin).unbind(-1)
        return torch.stack([a, b, a.square() + b.square()], -1)

    space = Pullback(f, 2)
    x, v = tensor(0.3, 0.2), tensor(0.5, 3e5)
    a, b = (x * thin), (v * thin)
    exact = -4 * a * (b * b).sum() / (1 + 4 * a.square().sum()) / thin
    got = space.acceleration(x, v)
    close(got * thin, exact * thin, 1e-14)


# -- products -----------------------------------------------------------------------------


def norm_squared(g, r):
    inverse = torch.linalg.inv(g)
    return torch.einsum("...lkij,...abcd,...la,...kb,...ic,...jd->...", r, r, *[inverse] * 4)


def weyl(space, x):
    n, g = space.dim, space.metric(x)
    ric, scal = space.ricci(x), space.scalar_curvature(x)
    lowered = torch.einsum("...lm,...mkij->...lkij", g, space.riemann(x))
    schouten = (ric - scal[..., None, None] / (2 * (n - 1)) * g) / (n - 2)
    a = torch.einsum("...li,...kj->...lkij", schouten, g)
    a = a + torch.einsum("...li,...kj->...lkij", g, schouten)
    return lowered - a + a.transpose(-1, -2)


def test_products_of_two_spheres_and_of_sphere_and_plane():
    both = Product(Stereographic(2, 1.0), Stereographic(2, 1.0))
    x = both.random_point(20, dtype=F64)
    close(both.ricci(x), both.metric(x), 1e-13)
    close(both.scalar_curvature(x), 4.0, 1e-13)
    u, v = both.random_tangent(x), both.random_tangent(x)
    u[:, 2:] = 0
    v[:, :2] = 0
    close(both.sectional(x, u, v), 0.0, 1e-14)
    close(norm_squared(both.metric(x), weyl(both, x)), 16 / 3, 1e-12)
    mixed = Product(Stereographic(2, 1.0), Hyperbolic(2))
    x = mixed.random_point(20, dtype=F64)
    close(mixed.scalar_curvature(x), 0.0, 1e-13)
    close(weyl(mixed, x), 0.0, 1e-12)


def test_product_of_embedded_and_chart():
    ball, plane, torus = Sphere(2, 1.5), HalfSpace(2), FlatTorus(1)
    space = Product(ball, plane, torus)
    assert (space.dim, space.point_dim) == (5, 6)
    x, y = space.random_point(30, dtype=F64), space.random_point(30, dtype=F64)
    parts = [m.dist(a, b) for m, a, b in space.split(x, y)]
    close(space.sqdist(x, y), sum(d**2 for d in parts), 1e-14)
    v, w = space.log(x, y), space.random_tangent(x)
    close(space.dist(space.exp(x, v), y), 0.0, 1e-12)
    moved = space.transport(x, y, w)
    close(space.transport_along(x, v, w)[1], moved, 1e-12)
    close(space.norm(y, moved), space.norm(x, w), 1e-13)
    assert space.is_point(x).all()
    assert space.is_tangent(y, moved).all()
    assert not space.is_point(2 * x).any()
    ts = tensor(0.0, 0.5, 1.0)
    close(space.geodesic(x, v, ts)[2], space.exp(x, v), 1e-13)
    close(space.dist(x, space.geodesic(x, v, ts)[1]), space.dist(x, y) / 2, 1e-12)
    assert space.riemann(x).shape == (30, 6, 6, 6, 6)
    assert space.christoffel(x).shape == (30, 6, 6, 6)
    scal = ball.scalar_curvature(x[:, :3]) + plane.scalar_curvature(x[:, 3:5])
    close(space.scalar_curvature(x), scal, 1e-13)
    u = space.random_tangent(x)
    bend = torch.einsum("...lkij,...k,...i,...j->...l", space.riemann(x), w, u, w)
    area = space.inner(x, u, u) * space.inner(x, w, w) - space.inner(x, u, w) ** 2
    close(space.sectional(x, u, w), space.inner(x, bend, u) / area, 1e-12)

    def f(z):
        return z[..., 0] * z[..., 1] * z[..., 4].log() + z[..., 5].sin() * z[..., 2]

    hess = space.hessian(f, x)
    close(hess, hess.mT, 1e-13)
    slope = space.gradient(f, x)
    close(space.inner(x, slope, u), (vmap(grad(f))(x) * u).sum(-1), 1e-12)
    close(space.divergence(lambda z: space.gradient(f, z), x), space.laplacian(f, x), 1e-11)
    close(
        (space.covariant_derivative(lambda z: space.gradient(f, z), x, u) * space.flat(x, w)).sum(
            -1
        ),
        torch.einsum("...ij,...i,...j->...", hess, u, w),
        1e-11,
    )
    slope = vmap(grad(lambda b, a: space.sqdist(a, b) / 2))(y, x)
    close(space.sharp(y, slope), -space.log(y, x), 1e-12)
    found = space.connect(x, torch.cat([-x[:, :3], y[:, 3:]], -1))
    assert found.conjugate.all()
    assert not found.unique.any()


def test_product_integrates_when_every_factor_is_a_chart():
    torus = TorusOfRevolution()
    space = Product(torus, HalfSpace(2))
    assert space.periods == (2 * math.pi, 2 * math.pi, math.inf, math.inf)
    assert space.bounds is not None
    assert len(space.bounds) == 4
    x = space.random_point(5, dtype=F64)
    p = space.flat(x, space.random_tangent(x))
    system = space.geodesic_system()
    v, force = system.field(x, p)
    slope = grad(lambda z: system.energy(z, p).sum())(x)
    close(force, -slope, 1e-12)
    close(v, space.sharp(x, p), 1e-14)
    with pytest.raises(TypeError, match="expected a chart"):
        Product(Sphere(2), torus).geodesic_system()


# -- warped products ----------------------------------------------------------------------


def test_warped_products_over_a_line():
    # radial curvature -f''/f, tangential (1 - f'^2)/f^2
    def f(b):
        return (b[..., 0].sin() + 2).exp()

    space = Warped(Euclidean(1), Stereographic(2, 1.0), f)
    x = space.random_point(50, dtype=F64)
    r = x[:, :1]
    f0 = f(r)
    f1 = vmap(grad(lambda b: f(b)))(r)[:, 0]
    f2 = vmap(hessian(lambda b: f(b)))(r)[:, 0, 0]
    e = torch.eye(3, dtype=F64).expand(50, 3, 3)
    close(space.sectional(x, e[:, 0], e[:, 1] + 0.3 * e[:, 2]), -f2 / f0, 1e-11)
    close(space.sectional(x, e[:, 1], e[:, 2]), (1 - f1**2) / f0**2, 1e-11)


def test_warped_models():
    e3 = Warped(Euclidean(1), Stereographic(2, 1.0), lambda r: r[..., 0])
    x = torch.cat([tensor(1.0) + torch.rand(20, 1, dtype=F64), torch.randn(20, 2, dtype=F64)], -1)
    close(e3.riemann(x), 0.0, 1e-12)
    h3 = Warped(Euclidean(1), Stereographic(2, 1.0), lambda r: r[..., 0].sinh())
    u, v = h3.random_tangent(x), h3.random_tangent(x)
    close(h3.sectional(x, u, v), -1.0, 1e-9)
    # the warped half-plane over its height is hyperbolic 3-space in upper half-space form
    half = Warped(HalfSpace(2), Euclidean(1), lambda b: 1 / b[..., 1])
    x = half.random_point(10, dtype=F64)
    close(half.ricci(x), -2 * half.metric(x), 1e-12)
    order = torch.tensor([0, 2, 1])  # (h, y, t) -> (h, t, y)
    v = half.random_tangent(x)
    close(half.exp(x, v)[:, order], HalfSpace(3).exp(x[:, order], v[:, order]), 1e-10)
    two = Warped(HalfSpace(2), Euclidean(1), lambda b: 1 / b[..., 1], steps=None)
    y = half.exp(x, 0.3 * v)
    close(two.dist(x, y), HalfSpace(3).dist(x[:, order], y[:, order]), 1e-10)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Product(), ValueError, "at least one"),
        (lambda: Product(*[Euclidean(1), *NOT_SPACES]), TypeError, "factor 1 is a Net"),
        (lambda: Conformal(Sphere(2), Net(3)), TypeError, "base is a Sphere in 3 coordinates"),
        (lambda: Conformal(NOT_SPACES[0], Net(3)), TypeError, "expected a Manifold"),
        (lambda: Warped(Euclidean(1), Sphere(2), Net(1)), TypeError, "fiber is a Sphere"),
        (
            lambda: Conformal(Euclidean(2), lambda x: x).metric(torch.zeros(3, 2)),
            ValueError,
            r"log_factor maps x of shape \(3, 2\) to shape \(3, 2\), expected \(3,\)",
        ),
        (
            lambda: Warped(Euclidean(1), Euclidean(1), lambda x: x).metric(torch.zeros(3, 2)),
            ValueError,
            r"expected \(3,\)",
        ),
        (
            lambda: Warped(Euclidean(1), Euclidean(1), lambda b: b[..., 0]).dist(
                tensor(-1.0, 0.0), tensor(1.0, 0.0)
            ),
            ValueError,
            "not on the manifold",
        ),
    ],
)
def test_errors_say_what_was_expected(make, error, message):
    with pytest.raises(error, match=message):
        make()
