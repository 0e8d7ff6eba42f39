"""Heat, signatures, spectral distances and filters: closed forms, invariances, gradients."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from darboux.manifolds import mesh as meshes
from darboux.manifolds.spectral import kernels
from darboux.manifolds.spectral.eigen import eigenpairs
from darboux.manifolds.spectral.exponential import coefficients
from darboux.manifolds.spectral.finite_elements import stiffness_mass
from darboux.manifolds.spectral.kernels import (
    band_pass,
    diffuse,
    diffusion_distance,
    heat_kernel,
    heat_kernel_signature,
    heat_times,
    heat_trace,
    high_pass,
    low_pass,
    spectral_filter,
    wave_energies,
    wave_kernel_signature,
)
from darboux.manifolds.spectral.operator import Operator

F64 = torch.float64
RANDOM = torch.Generator().manual_seed(0)
MESH = meshes.icosphere(2)
N = MESH.vertices.shape[0]
U, D = (torch.randn(N, *m, generator=RANDOM, dtype=F64) for m in ((), (3,)))


def dense(matrix: Any) -> Tensor:
    return matrix.dense()


def sphere_values(top):
    return torch.tensor([float(k * (k + 1)) for k in range(top) for _ in range(2 * k + 1)])


@pytest.fixture(scope="module")
def sphere():
    """The unit sphere, quadratic elements, 13 whole levels."""
    operator = stiffness_mass(meshes.icosphere(3), order=2, project=meshes.to_sphere)
    return eigenpairs(operator, 169)


@pytest.fixture(scope="module")
def operator():
    return stiffness_mass(MESH)


@pytest.fixture(scope="module")
def full(operator):
    return eigenpairs(operator, N - 1, method="dense")


# -- heat -------------------------------------------------------------------------------------


def test_heat_trace_hears_area_and_euler_characteristic(sphere):
    times = torch.tensor([0.1, 0.15, 0.2], dtype=F64)
    found = heat_trace(sphere, times)
    closed = torch.exp(-times[:, None] * sphere_values(40)).sum(-1)
    series = 1 / times + 1 / 3 + times / 15 + 4 * times**2 / 315
    print(f"heat trace, relative: {(found / closed - 1).abs().max():.1e}")
    torch.testing.assert_close(found, closed, rtol=3e-4, atol=0)
    torch.testing.assert_close(closed, series, rtol=1e-4, atol=0)
    # area from the fit of a / t + b + t / 15, Euler characteristic 6 b
    rest = found - times / 15 - 4 * times**2 / 315
    fit = torch.linalg.lstsq(torch.stack([1 / times, times**0], 1), rest[:, None]).solution[:, 0]
    print(f"area / 4 pi {fit[0]:.5f}, chi {6 * fit[1]:.4f}")
    assert float(fit[0]) == pytest.approx(1, abs=1e-3)
    assert float(6 * fit[1]) == pytest.approx(2, abs=0.03)


def test_heat_kernel_on_the_sphere_is_the_sum_of_legendre_polynomials(sphere):
    t, x = 0.2, sphere.operator.space.nodes()
    cosine = x @ x[0]
    before, now, total = torch.ones_like(cosine), cosine, torch.zeros_like(cosine)
    for k in range(30):
        total += (2 * k + 1) / (4 * math.pi) * math.exp(-t * k * (k + 1)) * before
        before, now = now, ((2 * k + 3) * cosine * now - (k + 1) * before) / (k + 2)
    found = heat_kernel(sphere, t, 0)
    print(f"heat kernel: {(found - total).abs().max():.1e} of {total.max():.2f}")
    torch.testing.assert_close(found, total, rtol=0, atol=2e-4)
    assert float((sphere.operator.mass @ found).sum()) == pytest.approx(1, abs=1e-9)


def test_heat_kernel_shapes_and_symmetry(full):
    times = torch.tensor([0.1, 0.5], dtype=F64)
    every = heat_kernel(full, times)
    assert every.shape == (2, N, N)
    torch.testing.assert_close(every, every.mT)
    torch.testing.assert_close(heat_kernel(full, times, [3, 5]), every[:, :, [3, 5]])
    torch.testing.assert_close(heat_kernel(full, 0.5, 3), every[1, :, 3])
    torch.testing.assert_close(heat_kernel_signature(full, times), every.diagonal(dim1=-2, dim2=-1))


def test_rational_exponential_converges_as_it_should():
    x = torch.cat([torch.zeros(1, dtype=F64), torch.logspace(-3, 6, 500, dtype=F64)])
    for tolerance in (1e-3, 1e-6, 1e-9, 1e-12):
        c, gamma = coefficients(tolerance)
        y = 2 / (1 + x / gamma) - 1
        total = sum(a * torch.cos(k * torch.acos(y)) for k, a in enumerate(c))
        assert (total - torch.exp(-x)).abs().max() < 2 * tolerance
        # the rate of the best rational functions with one real pole, with a few degrees to spare
        assert len(c) - 1 <= math.log(tolerance) / math.log(math.sqrt(2) - 1) + 3


@pytest.mark.parametrize("t", [1e-4, 0.03, 1.0, 50.0])
def test_diffusion_by_factorisation_equals_that_by_all_modes(operator, t):
    whole = operator.map(dense)
    exact = diffuse(eigenpairs(whole, N), U, t)
    for given in (operator, whole):
        found = diffuse(given, U, t)
        error = (found - exact).norm() / U.norm()
        print(f"diffuse t={t}: {error:.1e}")
        assert error < 3e-12
    assert (diffuse(operator, U, t, tolerance=1e-4) - exact).norm() < 3e-4 * U.norm()


def test_diffusion_is_a_semigroup_that_keeps_mass_and_loses_energy(operator, full):
    mass, u = operator.mass, torch.stack([U, D[:, 0]], 1)
    twice = diffuse(operator, diffuse(operator, u, 0.1), 0.25)
    torch.testing.assert_close(twice, diffuse(operator, u, 0.35), rtol=0, atol=1e-11)
    spectral = diffuse(full, diffuse(full, u, 0.1), 0.25)
    torch.testing.assert_close(spectral, diffuse(full, u, 0.35), rtol=0, atol=1e-13)
    times = torch.tensor([0.0, 0.01, 0.1, 1.0, 10.0], dtype=F64)
    flow = diffuse(operator, u, times)
    assert flow.shape == (5, N, 2)
    total = torch.stack([(mass @ v).sum(0) for v in flow])
    torch.testing.assert_close(total, total[:1].expand(5, 2), rtol=0, atol=1e-12)
    energy = torch.stack([(v * (operator.stiffness @ v)).sum(0) for v in flow])
    size = torch.stack([(v * (mass @ v)).sum(0) for v in flow])
    assert (energy.diff(dim=0) < 1e-12).all()
    assert (size.diff(dim=0) < 1e-12).all()
    mean = total[-1] / mass.values.sum()
    torch.testing.assert_close(flow[-1], mean.expand(N, 2), rtol=0, atol=1e-6)


def test_gradients_of_diffusion_by_solves(operator):
    mesh = meshes.icosphere(1)
    n = mesh.vertices.shape[0]
    random = torch.Generator().manual_seed(1)
    x = mesh.vertices + 0.05 * torch.randn(n, 3, generator=random, dtype=F64)
    u = torch.randn(n, 2, generator=random, dtype=F64, requires_grad=True)
    t = torch.tensor(0.2, dtype=F64, requires_grad=True)

    def f(s, u, t):
        moved = mesh.move(x * (1 + s * torch.tensor([1.0, 0.0, -1.0], dtype=F64)))
        return diffuse(stiffness_mass(moved), u, t)

    s = torch.tensor(0.1, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(f, (s, u, t), fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (s, u, t), fast_mode=True)


# -- signatures -------------------------------------------------------------------------------


def ellipsoid(x):
    return x * torch.tensor([1.0, 1.2, 1.5], dtype=x.dtype)


def signatures(mesh, times=None, k=36):
    spectrum = eigenpairs(stiffness_mass(mesh), k)
    times = heat_times(spectrum, 5) if times is None else times
    energies, sigma = wave_energies(spectrum, 5)
    return (
        heat_kernel_signature(spectrum, times),
        heat_kernel_signature(spectrum, times, scaled=True),
        wave_kernel_signature(spectrum, energies, sigma),
    )


def test_signatures_are_invariant():
    mesh = MESH.move(ellipsoid(MESH.vertices))
    before = signatures(mesh)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=RANDOM, dtype=F64))[0]
    rigid = mesh.move(mesh.vertices @ turn + torch.tensor([1.0, -2.0, 3.0], dtype=F64))
    order = torch.randperm(N, generator=RANDOM)
    back = torch.argsort(order)
    shuffled = meshes.Mesh(mesh.vertices[order], back[mesh.cells])
    c = 3.0
    for hks, other in zip(before, signatures(rigid), strict=True):
        torch.testing.assert_close(other, hks, rtol=1e-9, atol=0)
    for hks, other in zip(before, signatures(shuffled), strict=True):
        torch.testing.assert_close(other, hks[:, order], rtol=1e-9, atol=0)
    for hks, other in zip(before, signatures(mesh.move(c * mesh.vertices)), strict=True):
        torch.testing.assert_close(other * c**2, hks, rtol=1e-9, atol=0)


def test_signatures_integrate_to_what_they_should(sphere):
    mass = sphere.operator.mass
    times = heat_times(sphere, 7)
    low, high = float(sphere.values[1]), float(sphere.values[-1])
    assert float(times[0]) == pytest.approx(4 * math.log(10) / high)
    assert float(times[-1]) == pytest.approx(4 * math.log(10) / low)
    hks = heat_kernel_signature(sphere, times)
    whole = torch.stack([(mass @ row).sum() for row in hks])
    # squares of quadratic functions are not quadratic: the integral is one by interpolation only
    torch.testing.assert_close(whole, heat_trace(sphere, times), rtol=2e-3, atol=0)
    scaled = heat_kernel_signature(sphere, times, scaled=True)
    energies, sigma = wave_energies(sphere, 7)
    assert float(energies[0] - 2 * sigma) == pytest.approx(math.log(low))
    assert float(energies[-1] + 2 * sigma) == pytest.approx(math.log(high))
    wks = wave_kernel_signature(sphere, energies, sigma)
    # a homogeneous space: all points alike, one over the area
    for found in (scaled, wks):
        error = (found * 4 * math.pi - 1).abs()
        print(f"homogeneous: {error.mean():.1e}, at most {error.max():.1e}")
        assert error.mean() < 5e-3
        assert error.max() < 2e-2


@pytest.mark.parametrize("method", ["dense", "lanczos"])
@pytest.mark.parametrize("name", ["heat", "scaled", "wave", "distance", "kernel"])
def test_gradients_in_the_vertices_at_the_degenerate_sphere(name, method):
    # the icosphere has exact clusters 1 | 3 | 5 | 3 + 4 | 5 ...
    weight = torch.randn(N, generator=torch.Generator().manual_seed(2), dtype=F64)
    times = torch.tensor([0.2, 0.6], dtype=F64)
    losses = {
        "heat": lambda s: (heat_kernel_signature(s, times) @ weight).square().sum(),
        "scaled": lambda s: (heat_kernel_signature(s, times, scaled=True) @ weight).sum(),
        "wave": lambda s: (wave_kernel_signature(s, torch.tensor([1.0, 2.0]), 0.4) @ weight).sum(),
        "distance": lambda s: diffusion_distance(s, 0.2, torch.arange(20), 50).sum(),
        "kernel": lambda s: (heat_kernel(s, 0.3, [0, 9]).T @ weight).prod(),
    }

    def f(x):
        return losses[name](eigenpairs(stiffness_mass(MESH.move(x)), 21, method=method))

    x = MESH.vertices.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(f(x), x)
    exact, h = float((gradient * D).sum()), 2e-5
    with torch.no_grad():
        near, far = (float(f(MESH.vertices + s * D) - f(MESH.vertices - s * D)) for s in (h, 2 * h))
    measured = (8 * near - far) / (12 * h)
    print(f"{name} {method}: {abs(exact / measured - 1):.1e}")
    assert exact == pytest.approx(measured, rel=1e-6)


# -- distances and filters --------------------------------------------------------------------


def test_diffusion_distance(full):
    """From the definition, as the distance of kernels; a metric; on a ring in closed form."""
    t = 0.15
    rows = heat_kernel(full, t)
    i, j = torch.arange(6), torch.arange(30, 36)
    apart = rows[:, i] - rows[:, j]
    defined = (apart * (full.operator.mass @ apart)).sum(0).sqrt()
    torch.testing.assert_close(diffusion_distance(full, t, i, j), defined)
    torch.testing.assert_close(diffusion_distance(full, t, j, i), defined)
    d = diffusion_distance(full, torch.tensor([t, 0.3], dtype=F64), i[:, None], i)
    assert d.shape == (2, 6, 6)
    assert (d.diagonal(dim1=-2, dim2=-1) == 0).all()
    assert (d[:, :, None] <= d[:, :, :, None] + d[:, None, :, :] + 1e-12).all()
    circle = stiffness_mass(meshes.grid((24,), (2 * math.pi,), periodic=True), order=4)
    ring = eigenpairs(circle, 13)
    found = diffusion_distance(ring, 0.5, 0, 6)  # a quarter of the circle
    k = torch.arange(1, 7, dtype=F64)
    squared = (torch.exp(-k.square()) * 2 * (1 - torch.cos(k * math.pi / 2)) / math.pi).sum()
    assert float(found) == pytest.approx(float(squared.sqrt()), rel=1e-6)


def test_filters(full, operator):
    smooth, rough = (spectral_filter(full, U, f(20.0)) for f in (low_pass, high_pass))
    kept = spectral_filter(full, U, lambda v: torch.ones_like(v))
    torch.testing.assert_close(smooth + rough, kept)
    # a truncated spectrum with the rest passed unchanged: again all of it
    few = eigenpairs(operator, 36, method="dense")
    high = spectral_filter(few, U, high_pass(5.0), beyond=1.0)
    torch.testing.assert_close(spectral_filter(few, U, low_pass(5.0)) + high, U)
    mode = full.functions[:, 6]
    value = full.values[6]
    found = spectral_filter(full, mode, band_pass(3.0, 8.0, order=2))
    expected = (1 - 1 / (1 + (value / 3) ** 4)) / (1 + (value / 8) ** 4)
    torch.testing.assert_close(found, expected * mode)
    assert (spectral_filter(full, torch.ones(N, dtype=F64), band_pass(3.0, 8.0)).abs() < 1e-9).all()


def test_batches_of_dense_operators_and_float32():
    mesh = meshes.icosphere(1)
    n = mesh.vertices.shape[0]
    parts = [stiffness_mass(mesh.move(mesh.vertices * s)).map(dense) for s in (1.0, 2.0)]
    batch = Operator(*(torch.stack([getattr(p, m) for p in parts]) for m in ("stiffness", "mass")))
    spectrum = eigenpairs(batch, 9)
    times = torch.tensor([0.5, 1.0, 2.0], dtype=F64)
    hks = heat_kernel_signature(spectrum, times)
    assert hks.shape == (3, 2, n)
    torch.testing.assert_close(heat_kernel_signature(spectrum, 4 * times)[:, 1] * 4, hks[:, 0])
    assert heat_trace(spectrum, times).shape == (3, 2)
    assert heat_kernel(spectrum, times, [0, 1, 2]).shape == (3, 2, n, 3)
    assert diffusion_distance(spectrum, times, 0, [3, 4]).shape == (3, 2, 2)
    u = torch.randn(2, n, 3, generator=RANDOM, dtype=F64)
    torch.testing.assert_close(diffuse(batch, u, 0.1)[1], diffuse(parts[1], u[1], 0.1))
    single = stiffness_mass(mesh.to(dtype=torch.float32))
    found = diffuse(single, u[0].float(), 0.1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), diffuse(parts[0], u[0], 0.1), rtol=0, atol=1e-5)


def test_bad_input(full, operator):
    trace_of: Any = heat_trace
    distance: Any = diffusion_distance
    cases = [
        (ValueError, "t holds -1", lambda: heat_trace(full, -1.0)),
        (ValueError, "t holds nan", lambda: diffuse(full, U, float("nan"))),
        (TypeError, "expected a Spectrum or an Operator", lambda: trace_of(MESH, 1.0)),
        (ValueError, "expected numbers of points in 0", lambda: heat_kernel(full, 1.0, [N])),
        (TypeError, "expected integers", lambda: distance(full, 1.0, 0.5, 1)),
        (ValueError, "u has shape", lambda: diffuse(operator, U[:5], 1.0)),
        (TypeError, "u has dtype", lambda: diffuse(operator, U.float(), 1.0)),
        (ValueError, "NaN or infinite", lambda: diffuse(operator, U * math.nan, 1.0)),
        (ValueError, "at least 1e-14", lambda: diffuse(operator, U, 1.0, tolerance=1e-18)),
        (ValueError, "no eigenvalue", lambda: wave_kernel_signature(full, 50.0, 0.1)),
        (ValueError, "sigma is 0", lambda: wave_kernel_signature(full, 1.0, 0)),
        (ValueError, "low < high", lambda: band_pass(3.0, 2.0)),
        (ValueError, "cutoff is -1", lambda: low_pass(-1.0)),
        (ValueError, "two different", lambda: heat_times(eigenpairs(operator, 1))),
        (ValueError, "count is 1", lambda: kernels.wave_energies(full, 1)),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
    with pytest.raises(TypeError, match=r"torch\.func"):
        torch.func.grad(lambda v: diffuse(operator, v, 1.0).sum())(U)
