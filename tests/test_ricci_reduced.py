"""Ricci flows of a few numbers or one function, against closed forms and conserved quantities."""

import math

import pytest
import torch

from darboux._checks import ConvergenceError
from darboux.flows import ricci_reduced, ricci_warped
from darboux.manifolds import curvature

F64 = torch.float64


def vec(*a):
    return torch.tensor(a, dtype=F64)


def relative(found, expected):
    return float(((found - expected) / expected).abs().max())


# -- products and homogeneous geometries ---------------------------------------------------


@pytest.mark.parametrize(
    ("curvatures", "dims"),
    [
        ([1.0], [2]),
        ([1.0], [5]),
        ([-1.0], [3]),
        ([1.0, 0.0], [2, 1]),
        ([1.0, -1.0, 2.0], [2, 3, 3]),
    ],
)
def test_products_of_space_forms_follow_their_closed_form(curvatures, dims):
    scales = torch.linspace(1.0, 2.0, 2 * len(dims), dtype=F64).reshape(2, -1)
    run = ricci_reduced.product_flow(scales, curvatures, dims, dt=2e-4, steps=300, save_every=100)
    expected = ricci_reduced.product_solution(scales, curvatures, dims, run.t)
    assert run.status == "done"
    assert run.scales.shape == (4, 2, len(dims))
    assert relative(run.scales, expected) <= 1e-10


def test_the_sphere_collapses_on_time():
    run = ricci_reduced.product_flow(vec(1.0), [1.0], [3], dt=1e-3, steps=1000)
    assert run.status == "extinct"
    assert abs(float(run.extinction) - 0.25) <= 1e-5  # r^2/(2 (n - 1))
    assert bool((run.scales > 0).all())


@pytest.mark.parametrize(
    ("geometry", "scales"),
    [
        ("flat", (1.0, 2.0, 0.3)),
        ("nil", (1.0, 2.0, 0.7)),
        ("sol", (0.8, 1.5, 0.8)),
        ("e2", (0.8, 0.8, 1.2)),
        ("su2", (3.0, 3.0, 3.0)),
    ],
)
def test_milnor_closed_forms(geometry, scales):
    run = ricci_reduced.homogeneous_flow(vec(*scales), geometry, dt=2e-3, steps=200, save_every=50)
    expected = ricci_reduced.homogeneous_solution(vec(*scales), geometry, run.t)
    assert relative(run.scales, expected) <= 1e-9


def test_conserved_quantities_of_homogeneous_flows():
    def flow(geometry, *scales, t=0.2):
        run = ricci_reduced.homogeneous_flow(vec(*scales), geometry, dt=t / 200, steps=200)
        assert run.status == "done"
        assert float((run.scales[-1] / run.scales[0] - 1).abs().max()) > 0.1
        return run.scales.unbind(-1)

    a, b, c = flow("nil", 1.0, 2.0, 0.7)
    assert relative(a * b, a[:1] * b[:1]) <= 1e-10
    assert relative(a * c, a[:1] * c[:1]) <= 1e-10
    a, b, c = flow("sol", 1.0, 1.5, 0.4)
    assert relative(a * c, a[:1] * c[:1]) <= 1e-10
    a, b, c = flow("e2", 1.0, 0.5, 1.2)
    assert relative(a * b, a[:1] * b[:1]) <= 1e-10
    a, b, c = flow("su2", 1.0, 3.0, 3.0)  # Berger
    assert relative(b, c) <= 1e-13
    first = a * a * b / (b - a)
    assert relative(first, first[:1]) <= 1e-8
    a, b, c = flow("sl2", 1.0, 1.0, 2.0)
    first = c * c * a / (a + c)
    assert relative(a, b) <= 1e-13
    assert relative(first, first[:1]) <= 1e-8


def test_berger_spheres_become_round():
    start = vec(1.0, 3.0, 3.0)
    run = ricci_reduced.homogeneous_flow(start, "su2", dt=5e-4, steps=10_000, save_every=200)
    a, b, _ = run.scales.unbind(-1)
    assert run.status == "extinct"
    assert float(b[-1] / a[-1] - 1) < 0.01 < float(b[0] / a[0] - 1)


def test_normalized_flows_keep_the_volume():
    run = ricci_reduced.homogeneous_flow(
        vec(1.0, 2.0, 3.0), "su2", dt=0.01, steps=500, normalized=True, save_every=100
    )
    assert relative(run.scales.prod(-1), vec(6.0)) <= 1e-12
    assert relative(run.scales[-1], vec(6.0) ** (1 / 3)) <= 1e-6  # round in the limit
    run = ricci_reduced.product_flow(
        vec(1.0, 2.0), [1.0, -1.0], [2, 2], dt=0.01, steps=20, normalized=True
    )
    assert relative(run.scales.prod(-1), vec(2.0)) <= 1e-12


@pytest.mark.parametrize("geometry", ["nil", "sol", "su2"])
def test_milnor_ricci_is_the_ricci_tensor(geometry):
    """Against the 2-jet of the metric in coordinates."""
    scales = vec(0.7, 1.3, 2.1)

    def coframe(x):
        a, b, c = x.unbind(-1)
        zero, one = torch.zeros_like(a), torch.ones_like(a)
        if geometry == "nil":  # dw1 = -2 w2 w3
            rows = [one, zero, -2 * b], [zero, one, zero], [zero, zero, one]
        elif geometry == "sol":  # dw1 = -2 w2 w3, dw3 = 2 w1 w2: rotated light-cone frame
            ch, sh = torch.cosh(2 * b), torch.sinh(2 * b)
            rows = [ch, zero, -sh], [zero, one, zero], [-sh, zero, ch]
        else:  # Euler angles, scaled: dw1 = -2 w2 w3
            s, k = torch.sin(a), torch.cos(a)
            sc, cc = torch.sin(c), torch.cos(c)
            rows = [cc / 2, s * sc / 2, zero], [-sc / 2, s * cc / 2, zero], [zero, k / 2, one / 2]
        return torch.stack([torch.stack(r, -1) for r in rows], -2)

    def metric(x):
        w = coframe(x)
        return (w * scales[:, None]).mT @ w

    x = torch.rand(4, 3, dtype=F64, generator=torch.Generator().manual_seed(0)) + 0.4
    frame = torch.linalg.inv(coframe(x))
    found = frame.mT @ curvature.ricci(metric, x) @ frame
    expected = torch.diag(ricci_reduced.milnor_ricci(scales, geometry))
    torch.testing.assert_close(found, expected.expand_as(found), atol=1e-10, rtol=0)


def test_gradients_through_time_of_a_homogeneous_flow():
    def end(scales, constants):
        return ricci_reduced.homogeneous_flow(scales, constants, dt=0.02, steps=5).scales[-1]

    start = vec(1.0, 2.0, 1.5).requires_grad_()
    constants = vec(1.0, 0.5, -0.3).requires_grad_()
    assert torch.autograd.gradcheck(end, (start, constants))
    # the closed form's derivative of A in A, through 200 steps
    start = vec(1.0, 2.0, 0.7).requires_grad_()
    run = ricci_reduced.homogeneous_flow(start, "nil", dt=2e-3, steps=200)
    exact = ricci_reduced.homogeneous_solution(start, "nil", run.t[-1])
    found = torch.autograd.grad(run.scales[-1, 0], start)[0]
    assert relative(found, torch.autograd.grad(exact[0], start)[0]) <= 1e-9


@pytest.mark.parametrize(("soliton", "t"), [("cigar", 0.3), ("sausage", -0.7)])
def test_solitons_solve_the_flow(soliton, t):
    family = getattr(ricci_reduced, soliton)
    x = 2 * torch.randn(20, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
    rate = torch.func.jacfwd(lambda s: family(x, s))(vec(t)[0])
    ricci = curvature.ricci(lambda z: family(z, t), x)
    scale = rate.abs().amax((-1, -2), keepdim=True)
    assert float(((rate + 2 * ricci) / scale).abs().max()) <= 1e-10


def test_float32_of_reduced_and_warped_flows():
    start = torch.tensor([1.0, 2.0, 0.7])
    run = ricci_reduced.homogeneous_flow(start, "nil", dt=0.02, steps=20)
    exact = ricci_reduced.homogeneous_solution(start, "nil", run.t)
    assert run.scales.dtype == torch.float32
    assert relative(run.scales, exact) <= 1e-5
    warped = ricci_warped.warped_flow(torch.full((8,), 1.2), 5.0, 0.2)
    assert warped.psi.dtype == torch.float32
    assert relative(warped.psi[-1].square(), torch.tensor(1.04)) <= 1e-5


def test_bad_input_of_reduced_flows():
    with pytest.raises(ValueError, match="not positive"):
        ricci_reduced.homogeneous_flow(vec(1.0, -1.0, 1.0), "nil", dt=0.1, steps=1)
    with pytest.raises(ValueError, match="expected one of flat"):
        ricci_reduced.homogeneous_flow(vec(1.0, 1.0, 1.0), "nile", dt=0.1, steps=1)
    with pytest.raises(ValueError, match="expected dt below 0.125"):
        ricci_reduced.product_flow(vec(1.0), [1.0], [2], dt=0.4, steps=1)
    with pytest.raises(ValueError, match="symmetric form"):
        ricci_reduced.homogeneous_solution(vec(1.0, 1.0, 2.0), "su2", 0.1)


# -- warped products -----------------------------------------------------------------------


def dumbbell(size, depth=0.4, length=2 * math.pi):
    s = length * torch.arange(size, dtype=F64) / size
    return 1 + depth * torch.cos(2 * math.pi * s / length), length


@pytest.mark.parametrize("n", [2, 3])
def test_the_cylinder_is_exact(n):
    run = ricci_warped.warped_flow(torch.full((2, 8), 1.2, dtype=F64), 5.0, 0.2, n=n)
    assert run.status == "done"
    assert run.t[-1] == 0.2
    assert relative(run.psi.square(), 1.44 - 2 * (n - 1) * run.t[:, None, None]) <= 1e-13
    assert relative(run.length, vec(5.0)) <= 1e-13


def test_warped_curvatures_are_those_of_the_metric():
    psi, length = dumbbell(48)

    def metric(x):  # the sphere in stereographic coordinates
        s, u = x[..., 0], x[..., 1:]
        factor = ((1 + 0.4 * torch.cos(s)) * 2 / (1 + u.square().sum(-1))).square()
        return torch.diag_embed(torch.stack([torch.ones_like(s), factor, factor], -1))

    x = torch.zeros(48, 3, dtype=F64)
    x[:, 0] = length * torch.arange(48, dtype=F64) / 48
    e = torch.eye(3, dtype=F64).expand(48, 3, 3)
    along, across = ricci_warped.warped_curvatures(psi, length)
    expected = curvature.sectional(metric, x, e[:, 0], e[:, 1])
    torch.testing.assert_close(along, expected, atol=1e-10, rtol=0)
    expected = curvature.sectional(metric, x, e[:, 1], e[:, 2])
    torch.testing.assert_close(across, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("n", [2, 3])
def test_volume_changes_by_the_scalar_curvature(n):
    psi, length = dumbbell(32, depth=0.3)
    run = ricci_warped.warped_flow(psi, length, 0.008, n=n, dt=0.001)
    k0, k1 = ricci_warped.warped_curvatures(run.psi, run.length, n)
    element = run.psi**n * run.length[:, None] / 32
    volume = element.sum(-1)
    rate = ((2 * n * k0 + n * (n - 1) * k1) * element).sum(-1)
    weights = vec(3, -32, 168, -672, 0, 672, -168, 32, -3) / 840  # central, eighth order
    found = (weights * volume).sum() / 0.001
    assert abs(float(found / rate[4] + 1)) <= 1e-8


def test_the_neck_pinches_on_a_grid_independent_time_and_place():
    times = []
    for size in (48, 64):
        psi, length = dumbbell(size)
        psi = torch.stack([psi, psi.roll(5)])  # the flow commutes with rotations
        run = ricci_warped.warped_flow(psi, length, 1.0, pinched_below=0.15, save_every=50)
        assert run.status == "pinched"
        assert bool((run.psi > 0).all())
        assert float(run.psi[-1].min()) < 0.15 * 0.6
        place = run.pinch_place / length
        assert float((place - vec(0.5, 0.5 + 5 / size)).abs().max()) <= 1e-4
        assert relative(run.pinch_time[1], run.pinch_time[0]) <= 1e-4
        assert float(run.psi[-1].max()) > 0.8  # the bulges live on
        times.append(run.pinch_time[0])
    # comparison: cylinders of the smallest and the largest radius pinch earlier and later
    assert 0.6**2 / 2 < float(times[0]) < 1.4**2 / 2
    assert relative(times[0], times[1]) <= 1e-3


def test_gradients_through_a_warped_flow_and_its_failures():
    psi, length = dumbbell(8)
    psi = (psi + 0.1 * torch.rand(8, dtype=F64)).requires_grad_()
    length = vec(length)[0].requires_grad_()

    def end(psi, length):
        run = ricci_warped.warped_flow(psi, length, 0.015, dt=0.005)
        return run.psi[-1], run.length[-1]

    assert torch.autograd.gradcheck(end, (psi, length))
    with pytest.raises(ValueError, match="psi is not positive"):
        ricci_warped.warped_flow(-psi, 1.0, 0.1)
    with pytest.raises(ConvergenceError, match="not enough") as caught:
        ricci_warped.warped_flow(psi, 6.0, 0.1, max_steps=3, dt=1e-3)
    assert caught.value.trajectory.psi.shape == (4, 8)
