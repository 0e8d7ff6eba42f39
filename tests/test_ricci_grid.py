"""The Ricci flow of a metric tensor on T^2 and T^3: identities, gauges, the conformal flow."""

import math

import pytest
import torch

from darboux._checks import ConvergenceError, GeometryError
from darboux.flows import ricci_conformal as rc, ricci_grid as rg
from darboux.manifolds import curvature

F64 = torch.float64


def factor(x):
    a, b = x.unbind(-1)
    return 0.12 * torch.cos(a) + 0.1 * torch.sin(b + 0.5) + 0.04 * torch.cos(a + b)


def bent(x):
    """A change of coordinates of the torus."""
    a, b = x.unbind(-1)
    return torch.stack([a + 0.12 * torch.sin(b), b + 0.1 * torch.cos(a - 0.3)], -1)


def general(x):
    """The metric e^{2u} (dx^2 + dy^2) in bent coordinates."""
    a, b = x.unbind(-1)
    one = torch.ones_like(a)
    jacobian = torch.stack([one, 0.12 * torch.cos(b), -0.1 * torch.sin(a - 0.3), one], -1)
    jacobian = jacobian.unflatten(-1, (2, 2))
    return torch.exp(2 * factor(bent(x)))[..., None, None] * jacobian.mT @ jacobian


def space(x):
    a, b, c = x.unbind(-1)
    diagonal = 1 + 0.1 * torch.stack([torch.cos(b) * torch.sin(c), torch.sin(c), torch.cos(a)], -1)
    off = 0.1 * torch.sin(a + b)
    zero = torch.zeros_like(off)
    rows = [zero, off, zero], [off, zero, 0.5 * torch.cos(c) * off], [zero] * 3
    shear = torch.stack([torch.stack(r, -1) for r in rows], -2)
    return torch.diag_embed(diagonal) + (shear + shear.mT) / 2


def squares(g, grid):
    return rg.grid_integral(rg.grid_scalar(g, grid).square() / 4, g, grid)


def rough(grid, size=0.02):
    x = grid.nodes()
    noise = torch.randn(*grid.shape, 2, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    return general(x) + size * (noise + noise.mT) / 2


# -- geometry ------------------------------------------------------------------------------


@pytest.mark.parametrize(("metric", "shape"), [(general, (27, 25)), (space, (15, 17, 16))])
def test_grid_ricci_is_the_ricci_tensor(metric, shape):
    grid = rg.periodic_grid(shape)
    x, g = grid.nodes(), metric(grid.nodes())
    some = x.flatten(0, -2)[::37]
    found = rg.grid_ricci(g, grid).flatten(0, -3)[::37]
    torch.testing.assert_close(found, curvature.ricci(metric, some), atol=2e-8, rtol=0)
    found = rg.grid_scalar(g, grid).flatten()[::37]
    torch.testing.assert_close(found, curvature.scalar(metric, some), atol=4e-8, rtol=0)


@pytest.mark.parametrize(("scheme", "order"), [("fd2", 2), ("fd4", 4)])
def test_difference_schemes_have_their_order(scheme, order):
    errors = []
    for n in (16, 32):
        grid = rg.periodic_grid((n, n), [2 * math.pi, 2 * math.pi], scheme=scheme)
        g = general(grid.nodes())
        exact = rg.grid_ricci(g, rg.periodic_grid((n, n))) if n > 16 else None
        if exact is None:
            exact = curvature.ricci(general, grid.nodes())
        errors.append(float((rg.grid_ricci(g, grid) - exact).abs().max()))
    assert math.log2(errors[0] / errors[1]) >= order - 0.4


def test_volume_falls_by_the_scalar_curvature_in_three_dimensions():
    """And DeTurck's term, a divergence, changes no volume."""
    grid = rg.periodic_grid((17, 17, 17))
    g = space(grid.nodes())
    expected = -rg.grid_integral(rg.grid_scalar(g, grid), g, grid)
    for gauge in rg.GAUGES:
        rate = rg.ricci_rate(g, grid, gauge=gauge)
        h = 1e-3
        plus, minus = rg.grid_volume(g + h * rate, grid), rg.grid_volume(g - h * rate, grid)
        far = rg.grid_volume(g + 2 * h * rate, grid) - rg.grid_volume(g - 2 * h * rate, grid)
        found = (8 * (plus - minus) - far) / (12 * h)
        assert abs(float(found / expected) - 1) <= 1e-7
    rate = rg.ricci_rate(g, grid, normalized=True)
    assert (
        abs(float((torch.linalg.inv(g) * rate).sum((-1, -2)).mul(rg.volume_element(g)).mean()))
        < 1e-9
    )


# -- exact identities of the flow ----------------------------------------------------------


@pytest.fixture(scope="module")
def smooth_run():
    grid = rg.periodic_grid((27, 27))
    return grid, rg.grid_flow(general(grid.nodes()), grid, dt=2e-3, steps=50, save_every=25)


def test_area_and_gauss_bonnet(smooth_run):
    grid, run = smooth_run
    area = rg.grid_volume(run.g, grid)
    assert float((area / area[0] - 1).abs().max()) <= 1e-10
    total = rg.grid_integral(rg.grid_scalar(run.g, grid), run.g, grid) / 2
    assert float(total.abs().max()) <= 1e-12


def test_it_is_the_conformal_flow_in_other_coordinates(smooth_run):
    grid, run = smooth_run
    torus = rc.flat_torus((27, 27))
    u = factor(grid.nodes())
    conformal = rc.conformal_flow(u, torus, dt=2e-3, steps=50, save_every=25)
    k = torus.gauss_curvature(conformal.u)
    expected = torus.integral(k.square() * torch.exp(2 * conformal.u))
    found = squares(run.g, grid)
    assert float((found / expected - 1).abs().max()) <= 1e-8
    assert float(expected[-1] / expected[0]) < 0.9
    assert float((run.g[-1] - general(grid.nodes())).abs().max()) > 0.01
    # a third way: the plain flow, which is the same up to diffeomorphisms
    plain = rg.grid_flow(run.g[0], grid, dt=2e-3, steps=50, gauge="none", save_every=25)
    assert float((squares(plain.g, grid) / expected - 1).abs().max()) <= 1e-8
    assert float((plain.g[-1] - run.g[-1]).abs().max()) > 1e-3


def test_noise_is_damped_by_deturck_and_amplified_by_the_plain_flow():
    grid = rg.periodic_grid((25, 25))
    g = rough(grid)
    start = float(rg.high_frequency_share(g, grid))
    damped = rg.grid_flow(g, grid, dt=5e-3, steps=20, save_every=20)
    assert start > 0.005
    assert float(rg.high_frequency_share(damped.g[-1], grid)) <= start / 5
    try:
        plain = rg.grid_flow(g, grid, dt=5e-3, steps=20, save_every=20, gauge="none")
    except ConvergenceError as error:
        plain = error.trajectory
    assert float(rg.high_frequency_share(plain.g[-1], grid)) >= 2 * start


def test_flat_metrics_stay_and_symmetries_are_kept():
    grid = rg.periodic_grid((9, 9))
    flat = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=F64).expand(9, 9, 2, 2)
    run = rg.grid_flow(flat, grid, dt=0.01, steps=3)
    assert float((run.g - flat).abs().max()) <= 1e-13
    g = general(grid.nodes())
    rate = rg.ricci_rate(g, grid)
    moved = rg.ricci_rate(g.roll((2, 3), (0, 1)), grid)
    torch.testing.assert_close(moved, rate.roll((2, 3), (0, 1)), atol=1e-12, rtol=0)
    swapped = rg.ricci_rate(g.transpose(0, 1).flip(-1, -2), grid)
    torch.testing.assert_close(swapped, rate.transpose(0, 1).flip(-1, -2), atol=1e-12, rtol=0)
    # a metric is its own gauge: with itself as background DeTurck's term vanishes
    own = rg.ricci_rate(g, grid, background=g)
    torch.testing.assert_close(own, rg.ricci_rate(g, grid, gauge="none"), atol=1e-12, rtol=0)


def test_homogeneous_scaling_and_the_normalised_volume():
    grid = rg.periodic_grid((11, 11, 11))
    g = space(grid.nodes())
    run = rg.grid_flow(g, grid, dt=0.01, steps=4, normalized=True, save_every=4)
    volume = rg.grid_volume(run.g, grid)
    assert abs(float(volume[-1] / volume[0]) - 1) <= 1e-5  # of the space discretisation
    torch.testing.assert_close(
        rg.grid_ricci(3 * g, grid), rg.grid_ricci(g, grid), atol=1e-12, rtol=0
    )


def test_float32():
    grid, single = rg.periodic_grid((9, 9)), rg.periodic_grid((9, 9), dtype=torch.float32)
    g = general(grid.nodes())
    run = rg.grid_flow(g.float(), single, dt=0.01, steps=5)
    assert run.g.dtype == torch.float32
    exact = rg.grid_flow(g, grid, dt=0.01, steps=5).g
    torch.testing.assert_close(run.g, exact.float(), atol=1e-5, rtol=0)


def test_gradients_through_time_and_transforms():
    grid = rg.periodic_grid((5, 5))
    g = general(grid.nodes())
    direction = torch.diag_embed(torch.sin(grid.nodes()))

    def end(s):
        run = rg.grid_flow(g + s * direction, grid, dt=0.02, steps=3)
        return rg.grid_integral(rg.grid_scalar(run.g[-1], grid).square(), run.g[-1], grid)

    s = torch.tensor(0.1, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(end, (s,))
    forward = torch.func.jvp(end, (s.detach(),), (torch.ones_like(s),))[1]
    torch.testing.assert_close(forward, torch.autograd.grad(end(s), s)[0], atol=1e-12, rtol=1e-10)
    many = torch.tensor([0.0, 0.1], dtype=F64)
    torch.testing.assert_close(torch.vmap(end)(many)[1], end(s), atol=1e-12, rtol=1e-10)


def test_bad_input_and_failures():
    grid = rg.periodic_grid((9, 9))
    g = general(grid.nodes())
    with pytest.raises(ValueError, match="stability bound 0.0"):
        rg.grid_flow(g, grid, dt=1.0, steps=1)
    with pytest.raises(GeometryError, match="not positive definite"):
        rg.grid_flow(g - 2 * torch.eye(2, dtype=F64), grid, dt=1e-3, steps=1)
    with pytest.raises(ValueError, match="not symmetric"):
        rg.grid_ricci(g + torch.tensor([[0.0, 0.1], [0.0, 0.0]], dtype=F64), grid)
    with pytest.raises(ValueError, match="gauge"):
        rg.grid_flow(g, grid, dt=1e-3, steps=1, gauge="harmonic")
    with pytest.raises(ValueError, match="shape"):
        rg.grid_flow(g[1:], grid, dt=1e-3, steps=1)
    with pytest.raises(TypeError, match="dtype"):
        rg.grid_flow(g.float(), grid, dt=1e-3, steps=1)
    # wild noise without a gauge: an error with the last good state, never NaN
    wild = rough(grid, 0.15)
    with pytest.raises(ConvergenceError, match="last good state") as caught:
        rg.grid_flow(wild, grid, dt=0.5 * rg.stable_step(wild, grid), steps=2000, gauge="none")
    assert bool(torch.linalg.eigvalsh(caught.value.trajectory.g[-1]).gt(0).all())
