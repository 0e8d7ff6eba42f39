"""Every manifold of geoopt behind our interface, against geoopt's own values and known laws."""

import inspect
import math
import subprocess
import sys
from typing import Any

import pytest
import torch

from darboux._checks import GeometryError
from darboux.manifolds import Euclidean, Geoopt, Product, Sphere, Stereographic, from_geoopt
from darboux.manifolds._geoopt_rules import Foreign, geoopt

manifolds: Any = geoopt.manifolds  # its classes confuse type checkers
F64 = torch.float64


def number(value):
    return torch.tensor(value, dtype=F64)


def plane():
    return torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 1, 1], [0, 0, 0.5]], dtype=F64)


# name of geoopt's class -> (instance, shape, class that from_geoopt returns)
CASES = {
    "Euclidean": (lambda: manifolds.Euclidean(ndim=1), 3, Euclidean),
    "Sphere": (manifolds.Sphere, 3, Sphere),
    "SphereExact": (manifolds.SphereExact, 3, Sphere),
    "Lorentz": (lambda: manifolds.Lorentz(number(1.3)), 3, Geoopt),
    "Stereographic": (lambda: manifolds.Stereographic(number(-0.7)), 2, Stereographic),
    "StereographicExact": (lambda: manifolds.StereographicExact(number(0.5)), 2, Stereographic),
    "PoincareBall": (lambda: manifolds.PoincareBall(number(1.2)), 2, Stereographic),
    "PoincareBallExact": (lambda: manifolds.PoincareBallExact(number(1.0)), 2, Stereographic),
    "SphereProjection": (lambda: manifolds.SphereProjection(number(1.0)), 2, Stereographic),
    "SphereProjectionExact": (
        lambda: manifolds.SphereProjectionExact(number(0.6)),
        2,
        Stereographic,
    ),
    "Stiefel": (manifolds.Stiefel, (3, 2), Geoopt),
    "CanonicalStiefel": (manifolds.CanonicalStiefel, (3, 2), Geoopt),
    "EuclideanStiefel": (manifolds.EuclideanStiefel, (3, 2), Geoopt),
    "EuclideanStiefelExact": (manifolds.EuclideanStiefelExact, (3, 2), Geoopt),
    "SymmetricPositiveDefinite": (manifolds.SymmetricPositiveDefinite, (2, 2), Geoopt),
    "BirkhoffPolytope": (manifolds.BirkhoffPolytope, (3, 3), Geoopt),
    "UpperHalf": (manifolds.UpperHalf, (2, 2), Geoopt),
    "BoundedDomain": (manifolds.BoundedDomain, (2, 2), Geoopt),
    "Scaled": (lambda: manifolds.Scaled(manifolds.Lorentz(number(1.0)), 1.5), 3, Geoopt),
    "ProductManifold": (
        lambda: manifolds.ProductManifold((manifolds.Sphere(), 3), (manifolds.Stiefel(), (2, 1))),
        5,
        Product,
    ),
    "StereographicProductManifold": (
        lambda: manifolds.StereographicProductManifold(
            (manifolds.PoincareBall(number(1.0)), 2), (manifolds.SphereProjection(number(1.0)), 2)
        ),
        4,
        Product,
    ),
}
ABSTRACT = {"Manifold"}

# the bridge itself, also where from_geoopt has something better
BRIDGED = {name: case[:2] for name, case in CASES.items() if case[2] is Geoopt} | {
    "Euclidean": (lambda: manifolds.Euclidean(ndim=2), (2, 2)),
    "Sphere": (manifolds.Sphere, 3),
    "Sphere of a subspace": (lambda: manifolds.Sphere(intersection=plane()), 4),
    "learnable ball": (lambda: manifolds.PoincareBall(number(1.1), learnable=True), 2),
}


@pytest.fixture(params=CASES)
def any_space(request):
    make, shape, _ = CASES[request.param]
    return from_geoopt(make(), shape)


@pytest.fixture(params=BRIDGED)
def bridged(request):
    make, shape = BRIDGED[request.param]
    manifold = make()
    return manifold, Geoopt(manifold, shape)


def sample(space, *shape, length=0.3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x = space.random_point(*shape, dtype=F64, generator=draw)
    u, v = space.random_tangent(x, draw), space.random_tangent(x, draw)
    size = length * (0.2 if "Birkhoff" in space.name else 1.0)
    return x, size * u / (1 + space.norm(x, u))[..., None], v


def test_every_manifold_of_geoopt_is_covered():
    found = {name for name, _ in inspect.getmembers(manifolds, inspect.isclass)}
    assert found == set(CASES) | ABSTRACT


@pytest.mark.parametrize("name", CASES)
def test_from_geoopt_returns_our_closed_form_where_there_is_one(name):
    make, shape, expected = CASES[name]
    space = from_geoopt(make(), shape)
    assert type(space) is expected
    x, _, v = sample(space, 2)
    assert space.is_point(x).all()
    assert space.is_tangent(x, v).all()


def test_exp_log_transport_laws(any_space):
    x, u, v = sample(any_space, 2)
    y = any_space.exp(x, u)
    assert any_space.is_point(y).all()
    found = any_space.connect(x, y)
    assert found.converged.all()
    torch.testing.assert_close(found.velocity, u, rtol=1e-8, atol=1e-8)
    w = any_space.transport(x, y, v)
    assert any_space.is_tangent(y, w).all()
    for a, b, c in ((v, v, w), (u, v, any_space.transport(x, y, u))):
        torch.testing.assert_close(
            any_space.inner(y, c, w), any_space.inner(x, a, b), rtol=1e-7, atol=1e-8
        )
    torch.testing.assert_close(any_space.dist(x, y), any_space.norm(x, u), rtol=1e-8, atol=1e-8)
    assert (any_space.dist(x, x) == 0).all() or any_space.dist(x, x).max() < 1e-14


def test_acceleration_is_the_second_derivative_of_exp(any_space):
    x, u, _ = sample(any_space, 2)
    h = 1e-3
    y = [any_space.exp(x, k * h * u) for k in (-2, -1, 1, 2)]
    second = (16 * (y[1] + y[2]) - y[0] - y[3] - 30 * x) / (12 * h * h)
    torch.testing.assert_close(any_space.acceleration(x, u), second, rtol=1e-6, atol=1e-7)
    gamma = any_space.christoffel(x)
    contracted = torch.einsum("...kij,...i,...j->...k", gamma, u, u)
    torch.testing.assert_close(any_space.acceleration(x, u), -contracted, rtol=1e-8, atol=1e-9)


def test_inner_and_dist_are_those_of_geoopt(bridged):
    manifold, space = bridged
    x, u, v = sample(space, 2)
    a, b, c = (space.unflatten(t) for t in (x, u, v))
    ours = space.inner(x, u, v)
    if isinstance(manifold, manifolds.BoundedDomain):
        assert not torch.allclose(manifold.inner(a, b, c).real, ours)  # geoopt's is not invariant
    elif isinstance(manifold, manifolds.Scaled):
        torch.testing.assert_close(manifold.inner(a, b, c) * 1.5**2, ours)
    else:
        each = [manifold.inner(*(t[i : i + 1] for t in (a, b, c))) for i in range(2)]
        theirs = torch.stack([torch.real(t).reshape(()) for t in each])
        torch.testing.assert_close(theirs, ours, rtol=1e-9, atol=1e-12)
    y = space.exp(x, u)
    try:
        theirs = manifold.dist(a, space.unflatten(y))
    except NotImplementedError:
        assert "Stiefel" in space.name or "Birkhoff" in space.name
        return
    if isinstance(manifold, manifolds.Euclidean):
        theirs = theirs.reshape(2)
    torch.testing.assert_close(theirs.detach(), space.dist(x, y).detach(), rtol=1e-6, atol=1e-9)


def test_curvature_of_known_spaces():
    def scalar(manifold, shape):
        space = Geoopt(manifold, shape)
        x, u, v = sample(space, 2)
        lowered = torch.einsum("...ml,...lkij->...mkij", space.metric(x), space.riemann(x))
        top = torch.einsum("...lkij,...l,...k,...i,...j->...", lowered, u, v, u, v)
        area = space.inner(x, u, u) * space.inner(x, v, v) - space.inner(x, u, v) ** 2
        torch.testing.assert_close(space.sectional(x, u, v), top / area, rtol=1e-7, atol=1e-9)
        return space.scalar_curvature(x), space.sectional(x, u, v)

    def check(found, scal, sectional=None):
        torch.testing.assert_close(
            found[0], torch.full((2,), scal, dtype=F64), rtol=1e-8, atol=1e-8
        )
        if sectional is not None:
            expected = torch.full((2,), sectional, dtype=F64)
            torch.testing.assert_close(found[1], expected, rtol=1e-8, atol=1e-8)

    check(scalar(manifolds.Sphere(), 3), 2.0, 1.0)
    check(scalar(manifolds.Scaled(manifolds.Sphere(), 2.0), 3), 0.5, 0.25)
    check(scalar(manifolds.Lorentz(number(1.3)), 3), -2 / 1.3, -1 / 1.3)
    check(scalar(manifolds.SymmetricPositiveDefinite(), (2, 2)), -1.0)
    # St(3, 2) is SO(3) with the bi-invariant metric of curvature 1/4
    check(scalar(manifolds.CanonicalStiefel(), (3, 2)), 1.5, 0.25)
    # the Siegel spaces of genus n are Einstein with Ric = -(n + 1)/2 g; genus 1: half-plane, disc
    check(scalar(manifolds.UpperHalf(), (1, 1)), -2.0, -1.0)
    check(scalar(manifolds.BoundedDomain(), (1, 1)), -2.0, -1.0)
    check(scalar(manifolds.UpperHalf(), (2, 2)), -9.0)
    check(scalar(manifolds.BoundedDomain(), (2, 2)), -9.0)


def test_the_siegel_models_are_isometric():
    from geoopt.manifolds.siegel import csym_math

    half = Geoopt(manifolds.UpperHalf(), (2, 2))
    disc = Geoopt(manifolds.BoundedDomain(), (2, 2))
    x, u, _ = sample(half, 2)
    y = half.exp(x, u)
    a, b = (disc.flatten(csym_math.inverse_cayley_transform(half.unflatten(t))) for t in (x, y))
    torch.testing.assert_close(disc.dist(a, b), half.dist(x, y), rtol=1e-9, atol=1e-9)


def test_operators_against_geodesics(bridged):
    _, space = bridged
    x, u, _ = sample(space, 2)
    weights = torch.arange(1.0, space.point_dim + 1, dtype=F64)

    def f(z):
        return (weights * z.square()).sum(-1) + z[..., 0]

    h = 1e-3
    plus, minus = (f(space.exp(x, s * h * u)) for s in (1, -1))
    slope = space.inner(x, space.gradient(f, x), u)
    torch.testing.assert_close(slope, (plus - minus) / (2 * h), rtol=1e-5, atol=1e-6)
    hess = torch.einsum("...ij,...i,...j->...", space.hessian(f, x), u, u)
    torch.testing.assert_close(hess, (plus + minus - 2 * f(x)) / h**2, rtol=1e-4, atol=1e-5)
    expected = space.divergence(lambda z: space._gradient(f, z), x)
    torch.testing.assert_close(space.laplacian(f, x), expected, rtol=1e-7, atol=1e-7)


def test_smooth_where_geoopt_is_not(bridged):
    _, space = bridged
    x, u, _ = sample(space)
    zero = torch.zeros_like(x)
    span = torch.stack([space.project_tangent(x, e) for e in torch.eye(len(x), dtype=F64)], -1)
    jac = torch.func.jacfwd(lambda v: space.exp(x, space.project_tangent(x, v)))(zero)
    torch.testing.assert_close(jac, span, rtol=1e-7, atol=1e-8)
    jac = torch.autograd.functional.jacobian(
        lambda v: space.log(x, space.exp(x, space.project_tangent(x, v))), zero
    )
    torch.testing.assert_close(jac, span, rtol=1e-7, atol=1e-8)
    step = u.clone().requires_grad_()
    (grad,) = torch.autograd.grad(space.sqdist(x, space.exp(x, step)), step)
    torch.testing.assert_close((grad * u).sum(), 2 * space.inner(x, u, u), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("shape", [(), (1,), (20,), (3, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes_and_batches(bridged, dtype, shape):
    manifold, space = bridged
    own = [*manifold.parameters(), *manifold.buffers()]
    if dtype == torch.float32 and any(p.requires_grad for p in own):
        space = space.float()
    draw = torch.Generator().manual_seed(0)
    x = space.random_point(*shape, dtype=dtype, generator=draw)
    u = space.random_tangent(x, draw)
    assert x.shape == u.shape == (*shape, space.point_dim)
    assert x.dtype == u.dtype == dtype
    assert space.is_point(x).all()
    assert space.norm(x, u).shape == shape
    torch.testing.assert_close(space.sharp(x, space.flat(x, u)), u, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(space.project(x), x, rtol=1e-4, atol=1e-4)
    if space.kinds.exp == "closed form":
        y = space.exp(x, 0.3 * u)
        assert y.dtype == dtype
        assert space.is_point(y).all()
    if shape == (1,):
        space.to(F64)


@pytest.mark.parametrize("name", ["Sphere", "Lorentz", "CanonicalStiefel", "EuclideanStiefel",
                                  "SymmetricPositiveDefinite", "UpperHalf"])  # fmt: skip
def test_torch_func_transforms(name):
    make, shape = BRIDGED[name]
    space = Geoopt(make(), shape)
    x, u, _ = sample(space, 2)
    torch.testing.assert_close(torch.func.vmap(space.acceleration)(x, u), space.acceleration(x, u))
    if space.kinds.exp != "closed form":
        return
    torch.testing.assert_close(torch.func.vmap(space.exp)(x, u), space.exp(x, u))
    forward = torch.func.vmap(torch.func.jacfwd(space.exp, 1))(x, u)
    reverse = torch.func.vmap(torch.func.jacrev(space.exp, 1))(x, u)
    torch.testing.assert_close(forward, reverse, rtol=1e-9, atol=1e-9)

    def f(v):
        return space.exp(x[0], v).square().sum() + space.exp(x[0], v)[0]

    with torch.no_grad():
        h = 1e-4
        fd = (f(u[0] * (1 + h)) + f(u[0] * (1 - h)) - 2 * f(u[0])) / h**2
    exact = u[0] @ torch.func.hessian(f)(u[0]) @ u[0]
    torch.testing.assert_close(exact, fd, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [
    lambda: (manifolds.PoincareBall(number(1.1), learnable=True), 2),
    lambda: (manifolds.Lorentz(number(1.1), learnable=True), 3),
])  # fmt: skip
def test_learnable_curvature_stays_live(make):
    manifold, shape = make()
    space = from_geoopt(manifold, shape)
    (parameter,) = space.parameters()
    x, _, _ = sample(space, 1)
    start = x[..., 1:] if "Lorentz" in space.name else x

    def value():
        at = (
            space.project(torch.cat([torch.zeros_like(start[..., :1]), start], -1))
            if ("Lorentz" in space.name)
            else start
        )
        return space.scalar_curvature(at).sum()

    (grad,) = torch.autograd.grad(value(), parameter)
    h, ends = 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            parameter.add_(sign * h)
        ends.append(value().detach())
        with torch.no_grad():
            parameter.sub_(sign * h)
    torch.testing.assert_close(grad, (ends[0] - ends[1]) / (2 * h), rtol=1e-6, atol=1e-7)


def test_log_of_stiefel_reports_what_it_cannot_promise():
    space = Geoopt(manifolds.Stiefel(), (4, 2))
    x, _, _ = sample(space, 20)
    y = x.flip(0)
    found = space.connect(x, y)
    reached = found.converged
    assert reached.any()
    end = space.exp(x[reached], found.velocity[reached])
    torch.testing.assert_close(end, y[reached], rtol=1e-9, atol=1e-9)
    near = space.norm(x, found.velocity) < math.pi * 0.8**0.5
    assert torch.equal(found.conjugate, ~near)


def test_kinds_are_machine_readable():
    assert Geoopt(manifolds.Stiefel(), (3, 2)).kinds.exp == "closed form"
    birkhoff = Geoopt(manifolds.BirkhoffPolytope(), (3, 3)).kinds
    assert (birkhoff.exp, birkhoff.log) == ("integrated", "collocation")
    assert birkhoff.missing == ()


def test_a_manifold_we_do_not_know():
    class Cylinder(manifolds.Euclidean):
        pass

    class Unknown(manifolds.base.Manifold):
        name, ndim, reversible = "Unknown", 1, True

        def __init__(self):
            super().__init__()
            self.inside = manifolds.Euclidean(ndim=1)

        def inner(self, x, u, v=None, *, keepdim=False):
            return 4 * self.inside.inner(x, u, v, keepdim=keepdim)

        def projx(self, x):
            return x

        def proju(self, x, u):
            return u

        def expmap(self, x, u):
            return x + u

        def transp(self, x, y, v):
            return v

        retr, egrad2rgrad = expmap, proju

        def _check_point_on_manifold(self, x, *, atol=1e-5, rtol=1e-5):
            return True, None

        def _check_vector_on_tangent(self, x, u, *, atol=1e-5, rtol=1e-5):
            return True, None

    space = Geoopt(Unknown(), 2)
    assert isinstance(space._rule, Foreign)
    assert space.dim == 2
    x = torch.zeros(3, 2, dtype=F64)
    y = torch.ones(3, 2, dtype=F64)
    torch.testing.assert_close(space.dist(x, y), torch.full((3,), 8**0.5, dtype=F64))
    assert space.kinds.missing
    assert isinstance(from_geoopt(Cylinder(), 2), Euclidean)


def test_errors():
    with pytest.raises(ValueError, match="expected 2 dimensions for CanonicalStiefel"):
        Geoopt(manifolds.Stiefel(), 3)
    with pytest.raises(GeometryError, match="from_geoopt"):
        Geoopt(manifolds.ProductManifold((manifolds.Sphere(), 3)), 3)
    with pytest.raises(ValueError, match=r"expected \(3,\) for the product"):
        from_geoopt(manifolds.ProductManifold((manifolds.Sphere(), 3)), 4)
    finsler = manifolds.siegel.vvd_metrics.SiegelMetricType.FINSLER_ONE
    with pytest.raises(GeometryError, match="Finsler"):
        Geoopt(manifolds.UpperHalf(metric=finsler), (2, 2))
    with pytest.warns(UserWarning, match="not fully implemented"):
        stein = manifolds.SymmetricPositiveDefinite("SM")
    with pytest.raises(GeometryError, match="only 'AIM'"):
        Geoopt(stein, (2, 2))
    space = Geoopt(manifolds.Stiefel(), (3, 2))
    with pytest.raises(ValueError, match="not on the manifold"):
        space.norm(torch.ones(6), torch.ones(6))


def test_geoopt_is_imported_on_first_use():
    code = """if True:
        import sys, darboux
        assert "geoopt" not in sys.modules
        assert not hasattr(darboux.manifolds, "nothing")
        assert darboux.manifolds.Geoopt and "geoopt" in sys.modules
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
