"""Learned Ricci-like flows: positive whatever the network says, closed forms, true curvature."""

import itertools
import math

import pytest
import torch

from darboux import manifolds
from darboux._checks import ConvergenceError, GeometryError
from darboux.flows import learned_ricci as lr, ricci_grid as rg, ricci_reduced
from darboux.manifolds import curvature

F64 = torch.float64


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def spd(*shape, d=3, seed=0):
    a = torch.randn(*shape, d, d, dtype=F64, generator=seeded(seed))
    return a @ a.mT + 0.5 * torch.eye(d, dtype=F64)


def constant(generator=None, production=None, destruction=None):
    return lambda x, g: lr.SourceTerms(generator, production, destruction)


def parts(d=3, seed=1):
    g = seeded(seed)
    e = 0.5 * torch.randn(d, d, dtype=F64, generator=g)
    xi = 0.7 * torch.randn(2, d, dtype=F64, generator=g)
    return e, xi, 0.5 * torch.randn(2, d, dtype=F64, generator=g)


def riccati(g, t, e, xi, v):
    """The solution of g' = gE + E^T g + P - g Q g, linear in (U, V) with g = V U^-1."""
    d = g.shape[-1]
    p, q = xi.mT @ xi, v.mT @ v
    m = torch.linalg.matrix_exp(t * torch.cat([torch.cat([-e, q], 1), torch.cat([p, e.mT], 1)]))
    u = m[:d, :d] + m[:d, d:] @ g
    return (m[d:, :d] + m[d:, d:] @ g) @ torch.linalg.inv(u)


def slope(errors):
    rates = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    return min(rates)


def general(x):
    a, b = x.unbind(-1)
    off = 0.15 * torch.sin(a - b)
    rows = [1 + 0.2 * torch.cos(b), off], [off, 1 + 0.2 * torch.sin(a + 0.3)]
    return torch.stack([torch.stack(r, -1) for r in rows], -2)


def gradient(p):
    assert p.grad is not None
    return p.grad


def is_spd(g):
    return bool(g.isfinite().all()) and bool((torch.linalg.eigvalsh(g) > 0).all())


# -- positivity ----------------------------------------------------------------------------


@pytest.mark.parametrize("dt", [0.1, 1.0])
def test_positive_for_a_thousand_random_networks(dt):
    """From flat and from nearly degenerate metrics, with weights up to ten times the usual."""
    generator = seeded(2)
    net = lr.TypedSource(3, 8, bound=2.0, dtype=F64, generator=generator)
    scale = 10 ** torch.linspace(0, 1, 1000, dtype=F64)
    params = {
        name: torch.randn(1000, *p.shape, dtype=F64, generator=generator)
        * (scale / p.shape[-1] ** 0.5).reshape(-1, *[1] * p.dim())
        for name, p in net.named_parameters()
    }
    starts = torch.stack([torch.eye(3, dtype=F64), torch.diag(spd()[0].abs() * 1e-3)])
    x = torch.randn(2, 3, dtype=F64, generator=generator)

    def end(params):
        def source(x, g):
            return torch.func.functional_call(net, params, (x, g))

        return lr.learned_flow(starts, source, x, dt=dt, steps=3, save_every=3).g[-1]

    with torch.no_grad():
        ends = torch.vmap(end)(params)
    assert ends.shape == (1000, 2, 3, 3)
    assert is_spd(ends)
    assert float((ends - starts).abs().amax((-1, -2, -3)).min()) > 1e-4  # every network acts


@pytest.mark.parametrize("dt", [0.05, 1.0])
def test_positive_with_the_true_curvature_on_a_grid(dt):
    grid = rg.periodic_grid((7, 7))
    g = general(grid.nodes())
    for seed in range(3):
        source = lr.TypedSource(2, 16, dtype=F64, generator=seeded(seed))
        with torch.no_grad():
            run = lr.learned_grid_flow(g, grid, source, dt=dt, steps=3)
        assert is_spd(run.g)
        # far beyond stability, and it says so
        assert run.status == ("limited" if dt == 1 else "done")


def test_an_untyped_source_leaves_the_cone_at_once():
    """What the types are for: the exact solution with T constant is g + tT."""
    g, t = spd(200, seed=3), torch.randn(200, 3, 3, dtype=F64, generator=seeded(4)).mul(3)
    assert float((torch.linalg.eigvalsh(g + t + t.mT)[:, 0] < 0).double().mean()) > 0.5


# -- closed forms --------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 4])
def test_congruence_has_the_order_of_the_scheme(order):
    e, _, _ = parts()
    g = spd(4)
    move = torch.linalg.matrix_exp(e)
    exact = move.mT @ g @ move
    errors = []
    for n in (8, 16, 32):
        run = lr.learned_flow(
            g, constant(e), torch.zeros(4, 3, dtype=F64), dt=1 / n, steps=n, order=order
        )
        assert run.status == "done"
        errors.append(float((run.g[-1] - exact).abs().max()))
    assert order - 0.35 <= slope(errors) <= order + 1


def test_production_and_destruction_alone_are_exact():
    _, xi, v = parts()
    g, x = spd(4), torch.zeros(4, 3, dtype=F64)
    made = lr.learned_flow(g, constant(production=xi), x, dt=0.5, steps=4).g[-1]
    torch.testing.assert_close(made, g + 2 * xi.mT @ xi, atol=1e-13, rtol=1e-13)
    lost = lr.learned_flow(g, constant(destruction=v), x, dt=0.5, steps=4).g[-1]
    exact = torch.linalg.inv(torch.linalg.inv(g) + 2 * v.mT @ v)
    torch.testing.assert_close(lost, exact, atol=1e-13, rtol=1e-12)


def test_the_splitting_is_of_second_order():
    e, xi, v = parts()
    g = spd()
    exact = riccati(g, 1.0, e, xi, v)
    errors = []
    for n in (16, 32, 64):
        x = torch.zeros(3, dtype=F64)
        run = lr.learned_flow(g, constant(e, xi, v), x, dt=1 / n, steps=n)
        errors.append(float((run.g[-1] - exact).abs().max()))
    assert slope(errors) >= 1.9
    assert errors[-1] < 1e-3


def test_the_splitting_is_of_second_order_for_fields_of_the_metric():
    source = lr.TypedSource(3, 8, dtype=F64, generator=seeded(5))
    g, x = spd(), torch.ones(3, dtype=F64)
    with torch.no_grad():
        ends = [
            lr.learned_flow(g, source, x, dt=1 / n, steps=n, save_every=n).g[-1]
            for n in (3, 6, 12, 36)
        ]
    assert slope([float((end - ends[-1]).abs().max()) for end in ends[:-1]]) >= 1.8


def test_it_commutes_with_linear_changes_of_coordinates():
    e, xi, v = parts()
    p = torch.eye(3, dtype=F64) + 0.4 * torch.randn(3, 3, dtype=F64, generator=seeded(6))
    back = torch.linalg.inv(p)
    g, x = spd(), torch.zeros(3, dtype=F64)
    one = lr.learned_flow(g, constant(e, xi, v), x, dt=0.01, steps=20).g[-1]
    moved = constant(back @ e @ p, xi @ p, v @ back.mT)
    two = lr.learned_flow(p.mT @ g @ p, moved, x, dt=0.01, steps=20).g[-1]
    torch.testing.assert_close(two, p.mT @ one @ p, atol=1e-8, rtol=0)


# -- curvature -----------------------------------------------------------------------------


def test_without_a_source_it_is_the_ricci_flow_on_a_grid():
    grid = rg.periodic_grid((13, 13))
    g = general(grid.nodes())
    dt = 0.4 * rg.stable_step(g, grid)
    errors = []
    for n in (1, 2):
        found = lr.learned_grid_flow(g, grid, dt=dt / n, steps=8 * n).g[-1]
        exact = rg.grid_flow(g, grid, dt=dt / n, steps=8 * n).g[-1]
        errors.append(float((found - exact).abs().max()))
    assert errors[0] <= 1e-4
    assert slope(errors) >= 3.5


def test_without_a_source_it_is_the_flow_of_nil():
    start = torch.tensor([1.0, 2.0, 0.7], dtype=F64)

    def rate(g):
        diagonal = g.diagonal(dim1=-2, dim2=-1)
        return torch.diag_embed(-2 * ricci_reduced.milnor_ricci(diagonal, "nil"))

    run = lr.learned_flow(torch.diag(start), dt=5e-3, steps=80, rate=rate)
    exact = ricci_reduced.homogeneous_solution(start, "nil", run.t)
    found = run.g.diagonal(dim1=-2, dim2=-1)
    assert float((found / exact - 1).abs().max()) <= 1e-8
    found = lr.learned_flow(spd(), rate=lambda g: torch.zeros_like(g), dt=1.0, steps=2).g
    torch.testing.assert_close(found[-1], found[0], atol=1e-14, rtol=0)


def test_the_rate_of_a_network_metric_is_exact():
    x = 0.5 * torch.randn(6, 3, dtype=F64, generator=seeded(7))

    def round_metric(x):  # the unit 3-sphere, stereographic
        factor = 4 / (1 + x.square().sum(-1)).square()
        return factor[..., None, None] * torch.eye(3, dtype=F64)

    expected = -4 * round_metric(x)
    torch.testing.assert_close(lr.learned_rate(round_metric, x), expected, atol=1e-11, rtol=0)
    e, xi, v = parts()
    with_source = lr.learned_rate(round_metric, x, constant(e, xi, v)) - expected
    g = round_metric(x)
    by_hand = g @ e + e.mT @ g + xi.mT @ xi - g @ v.mT @ v @ g
    torch.testing.assert_close(with_source, by_hand, atol=1e-11, rtol=0)


def test_a_flowed_metric_is_a_metric_field():
    """One step of the round sphere scales it; its curvature is the one of the scaled sphere."""
    x = 0.3 * torch.randn(5, 2, dtype=F64, generator=seeded(8))

    def round_metric(x):
        factor = 4 / (1 + x.square().sum(-1)).square()
        return factor[..., None, None] * torch.eye(2, dtype=F64)

    after = lr.flowed_metric(round_metric, dt=0.05, steps=2)
    ratio = after(x) / round_metric(x)
    scale = math.exp(-2 * 0.05) * math.exp(-2 * 0.05 * math.exp(0.1))
    torch.testing.assert_close(ratio[:, 0, 0], x.new_full((5,), scale), atol=1e-9, rtol=0)
    once = lr.flowed_metric(round_metric, dt=0.05)
    k = curvature.scalar(once, x) / 2
    torch.testing.assert_close(k, x.new_full((5,), math.exp(0.1)), atol=1e-8, rtol=0)


def test_a_flowed_network_trains_and_stays_positive():
    chart = manifolds.CholeskyNetwork(2, 8, dtype=F64, generator=seeded(9))
    source = lr.TypedSource(2, 8, dtype=F64, generator=seeded(10))
    x = torch.randn(4, 2, dtype=F64, generator=seeded(11))
    g = lr.flowed_metric(chart.metric, source, dt=1.0)(x)
    assert is_spd(g)
    g.square().sum().backward()
    sizes = [float(gradient(p).abs().sum()) for p in [*chart.parameters(), *source.parameters()]]
    assert all(0 < size < math.inf for size in sizes)


# -- derivatives ---------------------------------------------------------------------------


def test_gradients_at_the_identity_and_in_the_network():
    source = lr.TypedSource(2, 4, depth=1, dtype=F64, generator=seeded(12))
    x = torch.randn(2, 2, dtype=F64, generator=seeded(13)).requires_grad_()
    eye = torch.eye(2, dtype=F64)

    def end(s, x, *params, steps=2):
        names = [name for name, _ in source.named_parameters()]

        def call(x, g):
            return torch.func.functional_call(source, dict(zip(names, params, strict=True)), (x, g))

        return lr.learned_flow(eye + s + s.mT, call, x, dt=0.3, steps=steps).g[-1]

    s = torch.zeros(2, 2, 2, dtype=F64, requires_grad=True)
    params = tuple(p.detach().requires_grad_() for p in source.parameters())
    assert torch.autograd.gradcheck(end, (s, x, *params), fast_mode=True)
    (first,) = torch.autograd.grad(end(s, x, *params, steps=1)[0, 0, 0], s, create_graph=True)
    (hessian,) = torch.autograd.grad(first[0, 1, 1], s)
    assert bool(hessian.isfinite().all())
    assert float(hessian.abs().max()) > 0


def test_gradients_through_the_grid_flow_and_where_a_step_is_limited():
    grid = rg.periodic_grid((5, 5))
    source = lr.TypedSource(2, 8, dtype=F64, generator=seeded(14))
    for dt in (0.05, 1.0):
        g = general(grid.nodes()).requires_grad_()
        run = lr.learned_grid_flow(g, grid, source, dt=dt, steps=2)
        run.g[-1].diagonal(dim1=-2, dim2=-1).log().sum().backward()
        assert all(bool(gradient(p).isfinite().all()) for p in [g, *source.parameters()])


def test_token_stress():
    tokens = torch.tensor([[0.0, 0.0], [3.0, 0.0]], dtype=F64)
    xi = torch.tensor([[1.0, 2.0], [0.5, 0.0]], dtype=F64)
    x = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1e4, 0.0]], dtype=F64)
    found = lr.source_rate(lr.token_stress(x, tokens, xi, 0.8), torch.zeros(3, 2, 2, dtype=F64))
    weights = torch.exp(-(x[:, None] - tokens).square().sum(-1) / (2 * 0.64))
    expected = torch.einsum("xa,ai,aj->xij", weights, xi, xi)
    torch.testing.assert_close(found, expected, atol=1e-30, rtol=1e-13)
    flat = torch.eye(2, dtype=F64).expand(3, 2, 2)
    run = lr.learned_flow(
        flat, lambda x, g: lr.token_stress(x, tokens, xi, 0.8), x, dt=0.5, steps=2
    )
    torch.testing.assert_close(run.g[-1], flat + expected, atol=1e-13, rtol=0)


# -- the door ------------------------------------------------------------------------------


def test_larger_matrices_and_float32():
    source = lr.TypedSource(5, 8, generator=seeded(15))
    run = lr.learned_flow(torch.eye(5), source, torch.zeros(5), dt=1.0, steps=3)
    assert run.g.dtype == torch.float32
    assert is_spd(run.g)
    with torch.no_grad():
        again = lr.learned_flow(
            torch.eye(5, dtype=F64), source.double(), torch.zeros(5, dtype=F64), dt=1.0, steps=3
        )
    torch.testing.assert_close(run.g, again.g.float(), atol=1e-4, rtol=1e-4)


def test_bad_input():
    g, x = spd(), torch.zeros(3, dtype=F64)
    with pytest.raises(GeometryError, match="not positive definite"):
        lr.learned_flow(-g, dt=0.1, steps=1)
    with pytest.raises(ValueError, match="points x"):
        lr.learned_flow(g, constant(), dt=0.1, steps=1)
    with pytest.raises(ValueError, match="dt is"):
        lr.learned_flow(g, constant(), x, dt=-0.1, steps=1)
    with pytest.raises(ValueError, match="order is 3"):
        lr.learned_flow(g, constant(), x, dt=0.1, steps=1, order=3)
    with pytest.raises(ValueError, match="bandwidth is 0"):
        lr.token_stress(x, g, g, 0.0)
    calls = []

    def failing(x, g):
        calls.append(1)
        return lr.SourceTerms(production=(torch.nan if len(calls) > 4 else 1.0) * g)

    with pytest.raises(ConvergenceError, match="last good state") as caught:
        lr.learned_flow(g, failing, x, dt=0.1, steps=5)
    assert is_spd(caught.value.trajectory.g)
