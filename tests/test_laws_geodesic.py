"""Laws of exp, log, dist, geodesic and transport, on every space."""

import pytest
import torch
from cases import MANIFOLDS, points, reachable, tangents
from torch.func import grad, grad_and_value, hessian, jacfwd, jacrev, vmap

EVERY = pytest.mark.parametrize("case", MANIFOLDS, ids=lambda c: c.name)


def close(a, b, tol):
    a, b = a.detach(), b.detach()
    size = max(1.0, float(b.abs().max()))
    assert float((a - b).abs().max()) <= tol * size


@EVERY
def test_log_inverts_exp(case):
    manifold, x = points(case, 20)
    v, y = reachable(case, manifold, x)
    assert bool(manifold.is_point(y).all())
    close(manifold.log(x, y), v, 1e-9)
    close(manifold.project(manifold.exp(x, manifold.log(x, y))), manifold.project(y), 1e-9)
    report = manifold.connect(x, y)
    assert bool(report.converged.all())
    assert not bool(report.conjugate.any())
    assert bool(report.unique.all())
    assert float(report.residual.max()) <= 1e-9


@EVERY
def test_distance_is_the_length_of_log(case):
    manifold, x = points(case, 20)
    v, y = reachable(case, manifold, x)
    close(manifold.dist(x, y), manifold.norm(x, v), 1e-9)
    close(manifold.dist(y, x), manifold.dist(x, y), 1e-9)
    close(manifold.sqdist(x, y), manifold.inner(x, v, v), 1e-9)
    assert float(manifold.dist(x, x).abs().max()) == 0.0


@EVERY
def test_geodesic_is_exp_of_the_scaled_vector_at_constant_speed(case):
    manifold, x = points(case, 5)
    v, _ = reachable(case, manifold, x)
    ts = torch.tensor([-0.7, 0.0, 0.3, 1.0], dtype=x.dtype)
    path = manifold.geodesic(x, v, ts)
    assert path.shape == (4, *x.shape)
    for t, here in zip(ts, path, strict=True):
        close(manifold.project(here), manifold.project(manifold.exp(x, t * v)), 1e-9)
    # the defect of c'' = -Gamma(c', c') by differentiating in time
    t0 = torch.tensor([0.4], dtype=x.dtype)

    def curve(t):
        return manifold.geodesic(x, v, t[None])[0]

    velocity = jacfwd(curve)(t0[0])
    second = jacfwd(jacfwd(curve))(t0[0])
    here = curve(t0[0])
    close(second, manifold.acceleration(here, velocity), 1e-7)
    close(manifold.norm(here, velocity), manifold.norm(x, v), 1e-9)


@EVERY
def test_transport_is_an_isometry(case):
    manifold, x = points(case, 20)
    v, y = reachable(case, manifold, x)
    u, w = tangents(manifold, x, 2, seed=7)
    moved_u, moved_w = manifold.transport(x, y, u), manifold.transport(x, y, w)
    assert bool(manifold.is_tangent(y, moved_u).all())
    close(manifold.inner(y, moved_u, moved_w), manifold.inner(x, u, w), 1e-9)
    # the velocity of a geodesic is parallel, and there and back is the identity
    close(manifold.transport(x, y, v), -manifold.log(y, x), 1e-9)
    close(manifold.transport(y, x, moved_u), u, 1e-9)
    end, along = manifold.transport_along(x, v, u)
    close(manifold.project(end), manifold.project(y), 1e-9)
    close(along, moved_u, 1e-9)


@EVERY
def test_derivatives_of_exp_and_log_at_rest(case):
    """v = 0 and y = x are where textbook formulas divide zero by zero."""
    manifold, x = points(case, 3)
    n = manifold.point_dim
    eye = torch.eye(n, dtype=x.dtype)
    for point in x:
        zero = torch.zeros_like(point)
        tangent = torch.stack([manifold.project_tangent(point, e) for e in eye], -1)
        close(manifold.exp(point, zero), point, 1e-15)
        assert float(manifold.log(point, point).abs().max()) == 0.0
        for jac in (jacfwd, jacrev):
            close(jac(lambda v: manifold.exp(point, v))(zero) @ tangent, tangent, 1e-9)
            close(jac(lambda y: manifold.log(point, y))(point) @ tangent, tangent, 1e-9)
            assert bool(jac(lambda y: manifold.dist(point, y))(point).isfinite().all())
        # c(t) = exp(t v) has c'' = -Gamma(v, v)
        (v,) = tangents(manifold, point)
        second = jacfwd(jacfwd(lambda t: manifold.exp(point, t * v)))(zero[0])
        close(second, manifold.acceleration(point, v), 1e-8)
        hess = hessian(lambda y: manifold.sqdist(point, y))(point)
        g = tangent.mT @ manifold.metric(point) @ tangent
        close(tangent.mT @ hess @ tangent, 2 * g, 1e-8)


@EVERY
def test_first_variation_of_distance(case):
    manifold, x = points(case, 10)
    _, y = reachable(case, manifold, x)
    y = y.clone().requires_grad_()
    (grad,) = torch.autograd.grad(0.5 * manifold.sqdist(x, y).sum(), y)
    y = y.detach()
    close(manifold.project_tangent(y, manifold.sharp(y, grad)), -manifold.log(y, x), 1e-8)


STEP = 2e-3
OFFSETS = STEP * torch.tensor([-3.0, -2.0, -1.0, 1.0, 2.0, 3.0], dtype=torch.float64)
WEIGHTS = torch.tensor([-1.0, 9.0, -45.0, 45.0, -9.0, 1.0], dtype=torch.float64) / (60 * STEP)


def probes(n):
    """Return the points ``(6 n, n)`` around zero that ``differences`` needs."""
    return (OFFSETS[:, None, None] * torch.eye(n, dtype=torch.float64)).flatten(0, 1)


def differences(found, n):
    """Jacobian ``(*out, n)`` at zero from values at the probes, to the sixth order.

    The truncation error is 5e-19 times the seventh derivative, ``STEP^6 / 140``; an error of
    1e-12 in the values grows to no more than 1e-9.
    """
    return torch.einsum("a,ai...->...i", WEIGHTS, found.unflatten(0, (len(OFFSETS), n)))


# name -> call on (manifold, first point, tangent there, second point)
DIFFERENTIATED = {
    "exp": lambda m, x, v, y: m.exp(x, v),
    "log": lambda m, x, v, y: m.log(x, y),
    "dist": lambda m, x, v, y: m.dist(x, y),
    "transport": lambda m, x, v, y: m.transport(x, y, v),
    "scalar_curvature": lambda m, x, v, y: m.scalar_curvature(x),
}


@EVERY
@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_derivatives_against_differences(case, name):
    """First and second derivatives, nested and under vmap, in both points and in the metric."""
    manifold, x = points(case, 1)
    v, y = reachable(case, manifold, x)
    x, v, y = x[0], v[0], y[0]
    d, n = manifold.dim, 1 + 2 * manifold.dim
    # steps of about unit length in the metric, however the chart stretches it
    at_x, at_y = (torch.stack(tangents(manifold, z, d, seed=9), -1) for z in (x, y))
    weights = 1 / torch.arange(1, manifold.point_dim + 1, dtype=x.dtype)

    def value(s):
        """A number that depends on s: a factor in the metric, then the points x and y."""
        dk, dx, dy = s[0], s[1 : d + 1], s[d + 1 :]
        space = case.make(1 + dk)
        a, b = space.project(x + at_x @ dx), space.project(y + at_y @ dy)
        found = DIFFERENTIATED[name](space, a, space.project_tangent(a, v + at_x @ dy), b)
        # the last term: something to differentiate twice in what is linear or constant
        return (found * weights).sum() + s.square().sum()

    values, slopes = vmap(grad_and_value(value))(probes(n))[::-1]
    zero = torch.zeros(n, dtype=x.dtype)
    gradient, curvature = grad(value)(zero), vmap(hessian(value))(zero.expand(2, -1))[1]
    close(gradient, differences(values, n), 1e-7)
    close(curvature, differences(slopes, n), 1e-7)
    # plain autograd, twice
    s = zero.clone().requires_grad_()
    (once,) = torch.autograd.grad(value(s), s, create_graph=True)
    w = torch.sin(1 + torch.arange(n, dtype=x.dtype))
    (twice,) = torch.autograd.grad(once @ w, s)
    close(once, gradient, 1e-9)
    close(twice, curvature @ w, 1e-9)
