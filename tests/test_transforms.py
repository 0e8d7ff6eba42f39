"""Every public method under vmap, jvp, jacrev and hessian, in float32 and in every batch shape."""

import pytest
import torch
from cases import MANIFOLDS, points, reachable, tangents
from torch.func import hessian, jacrev, jvp, vmap

EVERY = pytest.mark.parametrize("case", MANIFOLDS, ids=lambda c: c.name)


def ripple(x):
    return torch.sin(x).sum(-1) + x[..., 0] * x[..., -1]


def swirl(x):
    return torch.sin(x + 0.3) + 0.5 * x.roll(1, -1)


# name -> call on (manifold, point, tangent, other point), all of one shape (..., n)
POINTWISE = {
    "metric": lambda m, x, v, y: m.metric(x),
    "inner": lambda m, x, v, y: m.inner(x, v, v),
    "norm": lambda m, x, v, y: m.norm(x, v),
    "flat": lambda m, x, v, y: m.flat(x, v),
    "sharp": lambda m, x, v, y: m.sharp(x, v),
    "log_volume": lambda m, x, v, y: m.log_volume(x),
    "christoffel": lambda m, x, v, y: m.christoffel(x),
    "acceleration": lambda m, x, v, y: m.acceleration(x, v),
    "covariant_derivative": lambda m, x, v, y: m.covariant_derivative(
        lambda z: m.project_tangent(m.project(z), swirl(z)), x, v
    ),
    "riemann": lambda m, x, v, y: m.riemann(x),
    "ricci": lambda m, x, v, y: m.ricci(x),
    "scalar_curvature": lambda m, x, v, y: m.scalar_curvature(x),
    "sectional": lambda m, x, v, y: m.sectional(x, v, m.project_tangent(x, swirl(x))),
    "gradient": lambda m, x, v, y: m.gradient(ripple, x),
    "divergence": lambda m, x, v, y: m.divergence(swirl, x),
    "hessian": lambda m, x, v, y: m.hessian(ripple, x),
    "laplacian": lambda m, x, v, y: m.laplacian(ripple, x),
    "project": lambda m, x, v, y: m.project(x),
    "project_tangent": lambda m, x, v, y: m.project_tangent(x, v),
    "retract": lambda m, x, v, y: m.retract(x, v),
}
GEODESIC = {
    "exp": lambda m, x, v, y: m.exp(x, v),
    "geodesic": lambda m, x, v, y: m.geodesic(x, v, torch.tensor([0.5, 1.0]).to(x))[0],
    "connect": lambda m, x, v, y: m.connect(x, y).velocity,
    "log": lambda m, x, v, y: m.log(x, y),
    "sqdist": lambda m, x, v, y: m.sqdist(x, y),
    "dist": lambda m, x, v, y: m.dist(x, y),
    "transport": lambda m, x, v, y: m.transport(x, y, v),
    "transport_along": lambda m, x, v, y: m.transport_along(x, v, v)[1],
}
NOT_DIFFERENTIATED = {"is_point", "is_tangent", "random_point", "random_tangent"}


def test_every_public_method_is_listed():
    from darboux.manifolds import Manifold

    public = {n for n, f in vars(Manifold).items() if callable(f) and not n.startswith("_")}
    assert public == {*POINTWISE, *GEODESIC, *NOT_DIFFERENTIATED}


def close(a, b, tol=1e-8):
    a, b = a.detach(), b.detach()
    size = max(1.0, float(b.abs().max()) if b.numel() else 1.0)
    assert a.shape == b.shape
    assert bool(a.isfinite().all())
    assert not b.numel() or float((a - b).abs().max()) <= tol * size


def check_transforms(case, calls, deep):
    manifold, x = points(case, 2)
    v, y = reachable(case, manifold, x)
    for name, call in calls.items():
        try:
            batch = call(manifold, x, v, y)
            close(vmap(lambda a, b, c, f=call: f(manifold, a, b, c))(x, v, y), batch)

            def at(point, f=call):
                moved = manifold.project(point)
                return f(manifold, moved, manifold.project_tangent(moved, v[0]), y[0])

            (u,) = tangents(manifold, x[0], seed=5)
            value, along, *_ = jvp(at, (x[0],), (u.contiguous(),))
            close(value, batch[0])
            close(jacrev(at)(x[0]) @ u, along)
            if name in deep:
                double = hessian(at)(x[0])
                close(double @ u @ u, jvp(lambda z: jvp(at, (z,), (u,))[1], (x[0],), (u,))[1], 1e-7)
        except Exception as error:
            error.add_note(f"in {case.name}.{name}")
            raise


@EVERY
def test_pointwise_methods_under_transforms(case):
    check_transforms(case, POINTWISE, {"inner", "acceleration", "scalar_curvature", "laplacian"})


@EVERY
def test_geodesic_methods_under_transforms(case):
    check_transforms(case, GEODESIC, {"exp", "log", "sqdist"})


@EVERY
@pytest.mark.parametrize("shape", [(), (1,), (20,), (3, 4, 5)])
def test_single_precision_in_every_batch_shape(case, shape):
    manifold, x = points(case, *shape, dtype=torch.float32)
    v, y = reachable(case, manifold, x)
    double = case.make().to(torch.float64)
    wide = [z.double() for z in (x, v, y)]
    wide[0] = double.project(wide[0])
    wide[1] = double.project_tangent(wide[0], wide[1])
    wide[2] = double.project(wide[2])
    # Curvature loses about three digits with every derivative of the metric.
    loose = {"riemann", "ricci", "scalar_curvature", "sectional", "laplacian", "hessian"}
    for name, call in (POINTWISE | GEODESIC).items():
        try:
            value = call(manifold, x, v, y)
            assert value.dtype == torch.float32
            close(value.double(), call(double, *wide), 2e-2 if name in loose else 2e-3)
        except Exception as error:
            error.add_note(f"in {case.name}.{name}{shape}")
            raise
