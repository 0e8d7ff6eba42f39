"""Laws of the metric, connection, curvature and operators, on every space."""

import pytest
import torch
from cases import MANIFOLDS, points, tangents
from torch import Tensor
from torch.func import jacfwd, jacrev, vmap

EVERY = pytest.mark.parametrize("case", MANIFOLDS, ids=lambda c: c.name)
CHARTS = pytest.mark.parametrize("case", [c for c in MANIFOLDS if c.is_chart], ids=lambda c: c.name)


def close(a: Tensor, b: Tensor, tol: float) -> None:
    a, b = a.detach(), b.detach()
    size = max(1.0, float(b.abs().max()))
    assert float((a - b).abs().max()) <= tol * size


def field(manifold, shift: float):
    """A smooth tangent field in ambient coordinates."""

    def w(x: Tensor) -> Tensor:
        raw = torch.sin(x + shift) + 0.5 * x.roll(1, -1) * (1 + shift)
        return manifold._project_tangent(x, raw)

    return w


def bump(x: Tensor) -> Tensor:
    return torch.sin(x[..., 0]) + 0.5 * x[..., -1] * x[..., 0] + 0.3 * x.square().sum(-1)


@EVERY
def test_metric_is_an_inner_product(case):
    manifold, x = points(case, 50)
    u, v = tangents(manifold, x, 2)
    close(
        manifold.inner(x, u, v),
        torch.einsum("...i,...ij,...j->...", u, manifold.metric(x), v),
        1e-13,
    )
    assert bool((manifold.inner(x, u, u) > 0).all())
    close(manifold.sharp(x, manifold.flat(x, v)), v, 1e-10)
    close(manifold.norm(x, v).square(), manifold.inner(x, v, v), 1e-12)
    assert bool(manifold.is_point(x).all())
    assert bool(manifold.is_tangent(x, v).all())


@EVERY
def test_random_tangents_are_standard_normal_in_the_metric(case):
    manifold, x = points(case, 1)
    x = x.expand(4000, -1)
    (v,) = tangents(manifold, x)
    close(manifold.inner(x, v, v).mean(), torch.tensor(float(manifold.dim), dtype=x.dtype), 0.15)


@EVERY
def test_connection_keeps_the_metric_and_has_no_torsion(case):
    manifold, x = points(case, 20)
    (v,) = tangents(manifold, x)
    w, z = field(manifold, 0.3), field(manifold, -0.7)

    def product(y: Tensor) -> Tensor:
        return torch.einsum("...i,...ij,...j->...", w(y), manifold.metric(y), z(y))

    along = torch.func.jvp(product, (x,), (v.contiguous(),))[1]
    dw, dz = (manifold.covariant_derivative(f, x, v) for f in (w, z))
    close(manifold.inner(x, dw, z(x)) + manifold.inner(x, w(x), dz), along, 1e-8)

    bracket = torch.func.jvp(z, (x,), (w(x),))[1] - torch.func.jvp(w, (x,), (z(x),))[1]
    torsion = manifold.covariant_derivative(z, x, w(x)) - manifold.covariant_derivative(w, x, z(x))
    close(torsion, bracket, 1e-8)


@CHARTS
def test_christoffel_is_compatible_with_the_metric(case):
    manifold, x = points(case, 20)
    gamma = manifold.christoffel(x)
    assert gamma.shape == (*x.shape, manifold.dim, manifold.dim)
    close(gamma, gamma.mT, 1e-12)
    low = torch.einsum("...lk,...kij->...lij", manifold.metric(x), gamma)
    dg = vmap(jacrev(manifold.metric))(x)  # the other mode than the library's
    rebuilt = torch.einsum("...jmi->...ijm", low) + torch.einsum("...imj->...ijm", low)
    close(rebuilt, dg, 1e-9)


@EVERY
def test_acceleration_contracts_christoffel(case):
    manifold, x = points(case, 20)
    (v,) = tangents(manifold, x)
    gamma = manifold.christoffel(x)
    close(manifold.acceleration(x, v), -torch.einsum("...kij,...i,...j->...k", gamma, v, v), 1e-11)


@EVERY
def test_riemann_symmetries_and_first_bianchi(case):
    manifold, x = points(case, 20)
    r = manifold.riemann(x)
    low = torch.einsum("...lm,...mkij->...lkij", manifold.metric(x), r)
    close(low, -low.transpose(-4, -3), 1e-8)
    close(low, -low.mT, 1e-8)
    close(low, low.movedim((-2, -1), (-4, -3)), 1e-8)
    cyclic = low + torch.einsum("...lkij->...lijk", low) + torch.einsum("...lkij->...ljki", low)
    close(cyclic, torch.zeros_like(cyclic), 1e-8)


@CHARTS
def test_second_bianchi_and_contracted(case):
    manifold, x = points(case, 5)
    gamma = manifold.christoffel(x)
    r = manifold.riemann(x)
    dr = vmap(jacfwd(lambda y: manifold.riemann(y)))(x)  # (..., l, k, i, j, m)
    cov = (
        dr
        + torch.einsum("...lma,...akij->...lkijm", gamma, r)
        - torch.einsum("...amk,...laij->...lkijm", gamma, r)
        - torch.einsum("...ami,...lkaj->...lkijm", gamma, r)
        - torch.einsum("...amj,...lkia->...lkijm", gamma, r)
    )
    cyclic = cov + torch.einsum("...lkijm->...lkjmi", cov) + torch.einsum("...lkijm->...lkmij", cov)
    close(cyclic / max(1.0, float(cov.detach().abs().max())), torch.zeros_like(cyclic), 1e-8)

    # div Ric = 1/2 d Scal
    ric = manifold.ricci(x)
    dric = vmap(jacfwd(lambda y: manifold.ricci(y)))(x)
    cov = (
        dric
        - torch.einsum("...amk,...aj->...kjm", gamma, ric)
        - torch.einsum("...amj,...ka->...kjm", gamma, ric)
    )
    inverse = torch.linalg.inv(manifold.metric(x))
    div = torch.einsum("...km,...kjm->...j", inverse, cov)
    dscal = vmap(jacrev(lambda y: manifold.scalar_curvature(y)))(x)
    close(div, 0.5 * dscal, 1e-8)


@EVERY
def test_ricci_scalar_and_sectional_agree_with_riemann(case):
    manifold, x = points(case, 20)
    u, v = tangents(manifold, x, 2)
    r, ric = manifold.riemann(x), manifold.ricci(x)
    close(ric, torch.einsum("...ikij->...kj", r), 1e-9)
    close(ric, ric.mT, 1e-9)
    # an orthonormal frame, by Gram-Schmidt in the metric
    frame = []
    for e in tangents(manifold, x, manifold.dim, seed=4):
        for f in frame:
            e = e - manifold.inner(x, e, f)[..., None] * f
        frame.append(e / manifold.norm(x, e)[..., None])
    traces = [torch.einsum("...i,...ij,...j->...", e, ric, e) for e in frame]
    trace = torch.stack(traces).sum(0)
    close(manifold.scalar_curvature(x), trace, 1e-8)
    low = torch.einsum("...lm,...mkij->...lkij", manifold.metric(x), r)
    top = torch.einsum("...lkij,...l,...k,...i,...j->...", low, u, v, u, v)
    area = manifold.inner(x, u, u) * manifold.inner(x, v, v) - manifold.inner(x, u, v).square()
    good = area > 0.05 * manifold.inner(x, u, u) * manifold.inner(x, v, v)
    close(manifold.sectional(x, u, v)[good], (top / area)[good], 1e-8)


@EVERY
def test_operators_agree_with_each_other(case):
    manifold, x = points(case, 20)
    u, v = tangents(manifold, x, 2)
    grad = manifold.gradient(bump, x)
    assert bool(manifold.is_tangent(x, grad).all())
    along = torch.func.jvp(bump, (x,), (v.contiguous(),))[1]
    close(manifold.inner(x, grad, v), along, 1e-10)
    hess = manifold.hessian(bump, x)
    close(hess, hess.mT, 1e-10)
    # Hess f (u, v) = <nabla_u grad f, v>
    dgrad = manifold.covariant_derivative(lambda y: manifold._gradient(bump, y), x, u)
    close(torch.einsum("...i,...ij,...j->...", u, hess, v), manifold.inner(x, dgrad, v), 1e-8)
    close(
        manifold.laplacian(bump, x),
        manifold.divergence(lambda y: manifold._gradient(bump, y), x),
        1e-8,
    )
