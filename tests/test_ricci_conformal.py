"""The conformal Ricci flow of surfaces: conservation laws, solitons, the round and flat limits."""

import itertools
import math

import pytest
import torch

from darboux._checks import ConvergenceError
from darboux.flows import ricci_conformal as rc
from darboux.manifolds import curvature

F64 = torch.float64


def bumpy_torus(n=24):
    x, y = rc.torus_nodes((n, n)).unbind(-1)
    return 0.3 * torch.cos(x) + 0.2 * torch.sin(y + 0.5) + 0.1 * torch.cos(x + 2 * y)


def bumpy_sphere(degree):
    x, y, z = rc.sphere_nodes(degree).unbind(-1)
    return 0.3 * x * y + 0.2 * z.pow(3) - 0.1 * x + 0.1 * torch.exp(y * z)


def sausage(degree, t):
    # In the sphere's z = tanh(height/2): e^{2u} = 4 sinh(-t)/(1 + z^2 + (1 - z^2) cosh t)
    z = rc.sphere_nodes(degree)[..., 2].square()
    return 0.5 * torch.log(4 * math.sinh(-t) / (1 + z + (1 - z) * math.cosh(t)))


# -- backgrounds ---------------------------------------------------------------------------


def test_the_sphere_laplacian_has_its_eigenvalues_and_integrals():
    sphere, nodes = rc.round_sphere(9), rc.sphere_nodes(9)
    x, y, z = nodes.unbind(-1)
    harmonics = [
        (z, 2),
        (x * y, 6),
        ((x + 1j * y).pow(4).imag * z, 30),
        ((x + 1j * y).pow(9).real, 90),
        (35 * z.pow(4) - 30 * z.pow(2) + 3, 20),
    ]
    for f, eigenvalue in harmonics:
        expected = -eigenvalue * f
        torch.testing.assert_close(sphere.laplacian(f), expected, atol=1e-11, rtol=0)
    even = sphere.integral(x.pow(4) * y.pow(2))
    assert abs(float(even) - 4 * math.pi * 3 / 105) <= 1e-13
    noise = torch.randn(3, 10, 19, dtype=F64, generator=torch.Generator().manual_seed(0))
    assert float(sphere.integral(sphere.laplacian(noise)).abs().max()) <= 1e-11


def test_gauss_curvature_is_that_of_the_metric():
    nodes = rc.torus_nodes((24, 24))

    def metric(x):
        a, b = x.unbind(-1)
        u = 0.3 * torch.cos(a) + 0.2 * torch.sin(b + 0.5) + 0.1 * torch.cos(a + 2 * b)
        return torch.exp(2 * u)[..., None, None] * torch.eye(2, dtype=F64)

    found = rc.flat_torus((24, 24)).gauss_curvature(bumpy_torus())
    expected = curvature.scalar(metric, nodes) / 2
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=0)


# -- conservation --------------------------------------------------------------------------


@pytest.mark.parametrize("normalized", [False, True])
def test_area_and_gauss_bonnet_on_the_torus(normalized):
    torus, u = rc.flat_torus((24, 24)), bumpy_torus()
    run = rc.conformal_flow(u, torus, dt=2e-3, steps=300, normalized=normalized, save_every=30)
    area = torus.area(run.u)
    assert float((area / area[0] - 1).abs().max()) <= 1e-12
    total = torus.integral(torus.gauss_curvature(run.u) * torch.exp(2 * run.u))
    assert float(total.abs().max()) <= 1e-12
    energy = torus.integral(-run.u * torus.laplacian(run.u))
    assert bool((energy.diff() < 0).all())
    assert float(energy[-1] / energy[0]) < 0.5


@pytest.mark.parametrize("normalized", [False, True])
def test_area_and_gauss_bonnet_on_the_sphere(normalized):
    sphere, u = rc.round_sphere(10), bumpy_sphere(10)
    run = rc.conformal_flow(u, sphere, dt=4e-3, steps=60, normalized=normalized, save_every=20)
    area = sphere.area(run.u)
    expected = area[0] - (0 if normalized else 8 * math.pi * run.t)
    assert float((area / expected - 1).abs().max()) <= 1e-12
    total = sphere.integral(sphere.gauss_curvature(run.u) * torch.exp(2 * run.u))
    assert float((total / (4 * math.pi) - 1).abs().max()) <= 1e-12


def test_the_dirichlet_energy_falls_at_its_rate():
    """d/dt int |grad u|^2 = -2 int K^2 dA on the torus, by an eighth-order difference."""
    torus, h = rc.flat_torus((24, 24)), 1e-3
    run = rc.conformal_flow(bumpy_torus(), torus, dt=h, steps=8)
    energy = torus.integral(-run.u * torus.laplacian(run.u))
    weights = torch.tensor([3, -32, 168, -672, 0, 672, -168, 32, -3], dtype=F64) / 840
    rate = (weights * energy).sum() / h
    u = run.u[4]
    squares = torus.integral(torus.gauss_curvature(u).square() * torch.exp(2 * u))
    assert abs(float(rate / (-2 * squares)) - 1) <= 1e-9


# -- closed forms and limits ---------------------------------------------------------------


def test_the_round_sphere_shrinks_and_dies_on_time():
    sphere = rc.round_sphere(3)
    u = torch.full((2, 4, 7), 0.1, dtype=F64)
    run = rc.conformal_flow(u, sphere, dt=2e-3, steps=10_000, save_every=20)
    radius = math.exp(0.2) - 2 * run.t
    assert float((torch.exp(2 * run.u) / radius[:, None, None, None] - 1).abs().max()) <= 1e-11
    assert run.status == "extinct"
    assert float((run.extinction - math.exp(0.2) / 2).abs().max()) <= 1e-13


def test_the_sausage_on_the_sphere():
    degree, t = 20, -0.9
    sphere = rc.round_sphere(degree)
    run = rc.conformal_flow(sausage(degree, t), sphere, dt=1.25e-3, steps=240, save_every=80)
    for s, u in zip(run.t, run.u, strict=True):
        exact = sausage(degree, t + float(s))
        assert float(torch.expm1(2 * (u - exact)).abs().max()) <= 1e-8


def test_the_cigar_against_its_own_background():
    """Any surface is a background: here the cigar itself, functions of s = 1/(1 + r^2).

    Laplacian 4 s d/ds (s (1 - s) d/ds), curvature 2 s; the flow of u is
    -log(1 + (e^{4t} - 1) s)/2.
    """
    size = 16
    nodes = 0.5 - 0.5 * torch.cos(math.pi * torch.arange(size, dtype=F64) / (size - 1))
    gaps = nodes[:, None] - nodes + torch.eye(size, dtype=F64)
    barycentric = 1 / gaps.prod(-1)
    d = barycentric / barycentric[:, None] / gaps * (1 - torch.eye(size, dtype=F64))
    d = d - torch.diag(d.sum(-1))
    matrix = 4 * nodes[:, None] * (d @ ((nodes * (1 - nodes))[:, None] * d))
    largest = float(torch.linalg.eigvals(matrix).abs().max())
    surface = rc.Background(lambda f: f @ matrix.mT, 2 * nodes, torch.ones_like(nodes), largest)
    start = torch.zeros_like(nodes)
    run = rc.conformal_flow(start, surface, dt=5e-4, steps=400, save_every=100)
    assert run.status == "done"
    exact = -0.5 * torch.log1p(torch.expm1(4 * run.t)[:, None] * nodes)
    assert float(torch.expm1(2 * (run.u - exact)).abs().max()) <= 1e-8


def test_the_normalised_flow_makes_spheres_round():
    sphere, u = rc.round_sphere(8), bumpy_sphere(8)
    run = rc.conformal_flow(u, sphere, dt=8e-3, steps=500, normalized=True, save_every=250)
    k = sphere.gauss_curvature(run.u)
    spread = (k.amax((-1, -2)) - k.amin((-1, -2))).tolist()
    assert spread[0] > 1
    assert spread[-1] < 1e-4
    assert float((k[-1] * sphere.area(run.u[-1]) / (4 * math.pi) - 1).abs().max()) <= 1e-4


def test_the_order_is_four():
    torus, u = rc.flat_torus((8, 8)), bumpy_torus(8)
    ends = [
        rc.conformal_flow(u, torus, dt=0.16 / n, steps=n, save_every=n).u[-1]
        for n in (8, 16, 32, 128)
    ]
    errors = [float((end - ends[-1]).abs().max()) for end in ends[:-1]]
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert min(slopes) >= 3.7


# -- derivatives and the door --------------------------------------------------------------


def test_gradients_through_time():
    generator = torch.Generator().manual_seed(0)
    for background in (rc.flat_torus((4, 3)), rc.round_sphere(2)):
        u = 0.1 * torch.randn(background.weights.shape, dtype=F64, generator=generator)

        def end(u):
            return rc.conformal_flow(u, background, dt=0.02, steps=3, normalized=True).u[-1]

        assert torch.autograd.gradcheck(end, (u.requires_grad_(),))
        batch = torch.stack([u.detach(), 2 * u.detach()])
        torch.testing.assert_close(torch.vmap(end)(batch), end(batch), atol=1e-14, rtol=0)


def test_bad_input_and_instability():
    torus, u = rc.flat_torus((24, 24)), bumpy_torus()
    with pytest.raises(ValueError, match="beyond the explicit stability bound 0.003"):
        rc.conformal_flow(u, torus, dt=0.1, steps=1)
    with pytest.raises(ValueError, match="expected"):
        rc.conformal_flow(u[:5], torus, dt=1e-3, steps=1)
    with pytest.raises(TypeError, match="dtype"):
        rc.conformal_flow(u.float(), torus, dt=1e-3, steps=1)
    sphere = rc.round_sphere(8)  # the bound shrinks with the sphere
    flat = torch.zeros(9, 17, dtype=F64)
    with pytest.raises(ConvergenceError, match="stability bound") as caught:
        rc.conformal_flow(flat, sphere, dt=0.02, steps=100)
    run = caught.value.trajectory
    exact = 1 - 2 * run.t[-1]
    assert float((torch.exp(2 * run.u[-1]) / exact - 1).abs().max()) <= 1e-6


def test_float32():
    torus = rc.flat_torus((12, 12), dtype=torch.float32)
    u = bumpy_torus(12).float()
    run = rc.conformal_flow(u, torus, dt=0.01, steps=20, save_every=20)
    exact = rc.conformal_flow(u.double(), rc.flat_torus((12, 12)), dt=0.01, steps=20)
    assert run.u.dtype == torch.float32
    assert float((run.u[-1] - exact.u[-1]).abs().max()) <= 1e-5
