"""Galerkin in smooth bases: closed forms, a separated equation, and derivatives."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import scipy.special
import torch
from torch import Tensor

from darboux._checks import GeometryError
from darboux.manifolds import (
    Ellipsoid,
    FlatTorus,
    Pullback,
    Sphere,
    TorusOfRevolution,
)
from darboux.manifolds.spectral import bases
from darboux.manifolds.spectral.bases import Basis, Fourier
from darboux.manifolds.spectral.exact import exact_spectrum
from darboux.manifolds.spectral.harmonics import Harmonics
from darboux.manifolds.spectral.polynomials import Legendre, ProductBasis

galerkin: Any = bases.galerkin  # its matrices are dense
SKEW = torch.tensor([[1.0, 0.3], [-0.2, 1.4]], dtype=torch.float64)
HEXAGONAL = torch.tensor([[1.0, 0.0], [0.5, 0.75**0.5]], dtype=torch.float64)
BASES = [
    Fourier(3, dim=1),
    Fourier((2, 3), lattice=SKEW),
    Fourier((2, 1, 1)),
    Harmonics(4),
    Legendre(5, bounds=(0.5, 2.0)),
    Legendre(5, "dirichlet"),
    Legendre(4, ("dirichlet", "neumann")),
    Legendre(4, ("neumann", "dirichlet")),
    ProductBasis(Legendre(3, "dirichlet"), Fourier(2, dim=1)),
]
EVERY = pytest.mark.parametrize("basis", BASES, ids=lambda b: f"{b.name}{b.size}")


def eigenvalues(op) -> Tensor:
    # of the pencil, by the Cholesky factor of the mass; sums over clusters are differentiable
    low = torch.linalg.cholesky(op.mass)
    half = torch.linalg.solve_triangular(low, op.stiffness, upper=False)
    return torch.linalg.eigvalsh(torch.linalg.solve_triangular(low, half.mT, upper=False))


def relative(a: Tensor, b: Tensor) -> float:
    return float(((a - b).abs() / b.abs().clamp(min=1.0)).max())


def flat(x: Tensor) -> Tensor:
    return torch.eye(x.shape[-1], dtype=x.dtype).expand(len(x), -1, -1)


def wavy(x: Tensor) -> Tensor:
    """A metric of any dimension that is not diagonal, periodic under the lattice of integers."""
    d = x.shape[-1]
    rows = torch.sin(2 * math.pi * x[..., None] + torch.arange(d, dtype=x.dtype))
    return torch.eye(d, dtype=x.dtype) + 0.4 * rows @ rows.mT / d + 0.2 * rows.mT @ rows / d


# -- the bases ----------------------------------------------------------------------------


@EVERY
def test_gradients_are_those_of_the_functions(basis):
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(6, basis.points.shape[-1], dtype=torch.float64, generator=generator) + 0.6
    if isinstance(basis, Harmonics):
        x = torch.nn.functional.normalize(x - 1, dim=-1)

        def f(y: Tensor) -> Tensor:
            return basis.evaluate(y / y.norm())
    else:
        f = basis.evaluate
    expected = torch.func.vmap(torch.func.jacfwd(f))(x)
    assert (basis.gradient(x) - expected).abs().max() < 1e-12
    assert (basis.evaluate(x[None])[0] - torch.stack([f(y) for y in x])).abs().max() < 1e-13


@EVERY
def test_nodes_and_shapes(basis):
    q, n, d = len(basis.points), basis.size, basis.dim
    assert basis.weights.shape == (q,)
    assert basis.values.shape == (q, n)
    assert basis.gradients.shape == (q, n, d)
    u = torch.ones(n, 2, dtype=torch.float64)
    assert torch.allclose(basis.extend(u)[:, 0], basis.values.sum(-1))
    assert torch.linalg.matrix_rank(basis.values) == n


@pytest.mark.parametrize("basis", [Fourier((2, 3), lattice=SKEW), Harmonics(9), Legendre(7)])
def test_orthonormal(basis):
    gram = basis.values.mT @ (basis.weights[:, None] * basis.values)
    assert (gram - torch.eye(basis.size)).abs().max() < 1e-13


def test_harmonics_are_those_of_scipy():
    x = torch.nn.functional.normalize(torch.randn(7, 3, dtype=torch.float64), dim=-1)
    theta, phi = torch.acos(x[:, 2]).numpy(), torch.atan2(x[:, 1], x[:, 0]).numpy()
    y = Harmonics(12).evaluate(x).numpy()
    for l, m in itertools.product(range(13), range(-12, 13)):
        if abs(m) <= l:
            z = scipy.special.sph_harm_y(l, abs(m), theta, phi) * (-1) ** m
            part = z.real if m >= 0 else z.imag
            expected = part * (1 if m == 0 else math.sqrt(2))
            assert np.abs(y[:, l * l + l + m] - expected).max() < 1e-13


def test_harmonics_stay_accurate_at_high_degree_and_at_the_poles():
    # the addition theorem: the squares of one level sum to (2 l + 1) / 4 pi
    poles = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0], [0.6, 0.0, 0.8]], dtype=torch.float64)
    basis = Harmonics(80, nodes=81)
    squares = basis.evaluate(poles).square()
    levels = torch.arange(81, dtype=torch.float64)
    sums = torch.stack([squares[:, l * l : (l + 1) ** 2].sum(-1) for l in range(81)], -1)
    assert relative(sums, (2 * levels + 1) / (4 * math.pi)) < 1e-12
    assert bool(basis.gradient(poles).isfinite().all())


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_fourier_by_fft_is_the_quadrature(dim):
    lattice = torch.eye(dim, dtype=torch.float64)
    basis = Fourier({1: 5, 2: 3, 3: 1}[dim], lattice=lattice)
    fast = galerkin(wavy, basis)
    g = wavy(basis.points)
    density = torch.linalg.det(g).sqrt()
    slow = Basis.assemble(basis, density[:, None, None] * torch.linalg.inv(g), density)
    assert (fast.stiffness - slow[0]).abs().max() < 1e-11
    assert (fast.mass - slow[1]).abs().max() < 1e-13


def test_four_dimensions():
    g = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    values = eigenvalues(galerkin(lambda x: g.expand(len(x), 4, 4), Fourier(1, dim=4)))
    m = np.array(list(itertools.product((-1, 0, 1), repeat=4)))
    assert relative(values, torch.from_numpy(np.sort((m**2 / [1, 2, 3, 4]).sum(-1)))) < 1e-12


# -- closed forms -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lattice",
    [SKEW, HEXAGONAL, torch.diag(torch.tensor([1.0, 2.0, 0.7], dtype=torch.float64))],
    ids=["skew", "hexagonal", "box"],
)
def test_flat_tori(lattice):
    d = lattice.shape[0]
    basis = Fourier(3 if d == 2 else 2, lattice=lattice)
    assert relative(
        eigenvalues(galerkin(FlatTorus(lattice=lattice), basis))[:9],
        exact_spectrum("torus", 9, lattice=lattice),
    ) < (error := 1e-10)
    # a constant metric A^T A makes it the torus of the lattice A moves it to
    a = torch.eye(d, dtype=torch.float64) + 0.2 * torch.ones(d, d, dtype=torch.float64).triu()
    values = eigenvalues(galerkin(lambda x: (a.mT @ a).expand(len(x), d, d), basis))
    moved = exact_spectrum("torus", 9, lattice=lattice @ a.mT)
    assert relative(values[:9], moved) < error


def test_hexagonal_torus_has_six_equal_lowest_eigenvalues():
    values = exact_spectrum("torus", 8, lattice=HEXAGONAL)
    assert relative(values[1:7], torch.full((6,), 16 * math.pi**2 / 3, dtype=torch.float64)) < 1e-12
    assert values[7] > values[6] + 1


def test_every_metric_on_a_circle_is_round():
    # length 2 pi times 1.5: eigenvalues (m / 1.5)^2
    values = eigenvalues(
        galerkin(lambda x: (1.5 + 0.9 * torch.cos(x)).square()[..., None], Fourier(40, dim=1))
    )
    expected = exact_spectrum("sphere", 11, dim=1, radius=1.5)
    assert relative(values[:11], expected) < 1e-10


@pytest.mark.parametrize("radius", [1.0, 2.5])
def test_round_spheres(radius):
    expected = exact_spectrum("sphere", 49, radius=radius)
    by_map = Pullback(lambda x: radius * x, 3)
    by_angles = Ellipsoid(radius, radius, radius)
    for metric in (by_map, by_angles) + ((Sphere(2),) if radius == 1 else ()):
        assert relative(eigenvalues(galerkin(metric, Harmonics(6))), expected) < 1e-11


def test_spheroids_against_published_values():
    for c, expected in (
        (1.2, [0.0, 1.585221331849, 1.859148264287, 1.859148264287]),
        (2.0, [0.0, 0.7287949, 1.53363198, 1.53363198, 2.37408878, 3.24510114, 3.24510114]),
    ):
        values = eigenvalues(galerkin(Ellipsoid(1.0, 1.0, c), Harmonics(12)))
        error = (values[: len(expected)] - torch.tensor(expected, dtype=torch.float64)).abs().max()
        assert error < (2e-12 if c == 1.2 else 1e-8)


def test_spheroid_by_169_harmonics():
    metric = Ellipsoid(1.0, 1.0, 1.3)
    values = eigenvalues(galerkin(metric, Harmonics(12)))[1:36]
    finer = eigenvalues(galerkin(metric, Harmonics(18)))[1:36]
    assert relative(values, finer) < 1e-8


def test_triaxial_ellipsoid_by_a_map_and_by_a_chart():
    axes = torch.diag(torch.tensor([1.0, 1.2, 1.5], dtype=torch.float64))
    by_map = eigenvalues(galerkin(Pullback(lambda x: x @ axes, 3), Harmonics(14)))[1:10]
    by_chart = eigenvalues(galerkin(Ellipsoid(1.0, 1.2, 1.5), Harmonics(14)))[1:10]
    published = "1.1006857 1.3866737 1.5335393 3.4273030 3.6184204 3.9332818 4.5541981 4.5595994"
    expected = torch.tensor([*map(float, published.split()), 6.8816189], dtype=torch.float64)
    assert relative(by_map, by_chart) < 1e-12
    assert (by_map - expected).abs().max() < 1e-7


def separated(R: float, r: float, k: int, n: int = 48) -> np.ndarray:
    """The torus of revolution by its ordinary equation for each azimuthal number m.

    -(w u')' / (r^2 w) + (m / w)^2 u = lambda u with w = R + r cos s: trigonometric collocation of
    the derivative at half-way points, which shares no code with the Galerkin method.
    """
    s = 2 * np.pi * np.arange(2 * n + 1) / (2 * n + 1)
    modes = np.arange(-n, n + 1)
    transform = np.exp(1j * np.outer(s, modes))
    derivative = transform @ np.diag(1j * modes) @ transform.conj().T / (2 * n + 1)
    w = R + r * np.cos(s)
    values = []
    for m in range(12):
        matrix = derivative.real.T @ (w[:, None] * derivative.real) / r**2 + np.diag(m * m / w)
        found = scipy.linalg.eigh(matrix, np.diag(w), eigvals_only=True)[:24]
        values += list(found) * (1 if m == 0 else 2)
    return np.sort(values)[:k]


def test_torus_of_revolution_by_289_functions():
    values = eigenvalues(galerkin(TorusOfRevolution(2.0, 0.8), Fourier(8)))[1:50]
    assert relative(values, torch.from_numpy(separated(2.0, 0.8, 50)[1:])) < 1e-10


def test_gradient_in_the_radii_of_a_torus():
    radii = torch.tensor([2.0, 0.8], dtype=torch.float64, requires_grad=True)
    surface = TorusOfRevolution(radii[0], radii[1])
    eigenvalues(galerkin(surface, Fourier(8)))[1:10].sum().backward()
    h = 1e-4
    steps = [
        (separated(2 + h, 0.8, 10).sum() - separated(2 - h, 0.8, 10).sum()) / (2 * h),
        (separated(2, 0.8 + h, 10).sum() - separated(2, 0.8 - h, 10).sum()) / (2 * h),
    ]
    assert radii.grad is not None
    assert relative(radii.grad, torch.tensor(steps, dtype=torch.float64)) < 1e-6
    published = torch.tensor([-4.7862271, -15.4143321], dtype=torch.float64)
    assert relative(radii.grad, published) < 1e-7


def test_interval_and_box_with_each_boundary():
    mixed = (math.pi * (torch.arange(4, dtype=torch.float64) + 0.5) / 2).square()
    for ends, expected in (
        ("neumann", exact_spectrum("box", 4, sides=2.0)),
        ("dirichlet", exact_spectrum("box", 4, sides=2.0, boundary="dirichlet")),
        (("dirichlet", "neumann"), mixed),
        (("neumann", "dirichlet"), mixed),
    ):
        values = eigenvalues(galerkin(flat, Legendre(20, ends, (1.0, 3.0))))[:4]
        assert relative(values, expected) < 1e-10
    box = ProductBasis(*[Legendre(12, "dirichlet", (0.0, side)) for side in (1.0, 1.5)])
    expected = exact_spectrum("box", 4, sides=(1.0, 1.5), boundary="dirichlet")
    assert relative(eigenvalues(galerkin(flat, box))[:4], expected) < 1e-8


def test_annulus_as_a_product():
    # the annulus 1 < r < 2, Dirichlet: zeros of J_m(x) Y_m(2 x) - Y_m(x) J_m(2 x)
    basis = ProductBasis(Legendre(16, "dirichlet", (1.0, 2.0)), Fourier(3, dim=1))

    def polar(x: Tensor) -> Tensor:
        return torch.diag_embed(torch.stack([torch.ones_like(x[:, 0]), x[:, 0].square()], -1))

    values = eigenvalues(galerkin(polar, basis))[:7]
    j, y = scipy.special.jv, scipy.special.yv

    def root(m: int) -> float:
        def cross(x: float) -> Any:
            return j(m, x) * y(m, 2 * x) - y(m, x) * j(m, 2 * x)

        found: Any = scipy.optimize.brentq(cross, 2.5, 5.0)
        return found**2

    expected = sorted([root(0)] + 2 * [root(1)] + 2 * [root(2)] + 2 * [root(3)])
    assert relative(values, torch.tensor(expected, dtype=torch.float64)) < 1e-9


def test_conformal_change_keeps_the_form_in_two_dimensions():
    basis = Harmonics(5)
    stretched = galerkin(lambda x: torch.exp(x[:, :1, None]) * flat(x), basis)
    assert (stretched.stiffness - galerkin(flat, basis).stiffness).abs().max() < 1e-12


def test_potential_is_added_to_the_stiffness():
    # Mathieu's equation: -u'' + 2 q cos 2x u
    q = 1.7
    op = galerkin(flat, Fourier(20, dim=1), potential=lambda x: 2 * q * torch.cos(2 * x[..., 0]))
    expected = [scipy.special.mathieu_a(m, q) for m in range(4)]
    expected += [scipy.special.mathieu_b(m, q) for m in range(1, 4)]
    assert relative(eigenvalues(op)[:7], torch.tensor(np.sort(expected))) < 1e-12


@pytest.mark.parametrize("space", ["klein", "projective", "hemisphere"])
def test_spectra_of_quotients_are_those_of_invariant_functions(space):
    """An isometry S with S² = 1 acts on a cover; invariant functions are those of the quotient."""
    if space == "klein":
        basis = Fourier(4, lattice=torch.diag(torch.tensor([2.0, 1.3], dtype=torch.float64)))
        images = basis.points * torch.tensor([1.0, -1.0]) + torch.tensor([1.0, 1.3])
        expected = exact_spectrum("klein", 12, a=1.0, b=1.3)
    else:
        basis = Harmonics(7)
        sign = torch.tensor([-1.0, -1.0, -1.0] if space == "projective" else [1.0, 1.0, -1.0])
        images = basis.points * sign
        expected = exact_spectrum(space, 12)
    # how S acts on coefficients, by projection, and its invariant subspace
    action = basis.values.mT @ (basis.weights[:, None] * basis.evaluate(images.double()))
    values, vectors = torch.linalg.eigh(0.5 * (action + action.mT))
    invariant = vectors[:, values > 0.5]
    op = galerkin(flat, basis).map(lambda a: invariant.mT @ a @ invariant)
    assert relative(eigenvalues(op)[:12], expected) < 1e-11


def test_spectra_obey_weyl_and_are_complete():
    for space, parameters, area, length in (
        ("disk", {"boundary": "dirichlet"}, math.pi, 2 * math.pi),
        ("disk", {"boundary": "neumann"}, math.pi, -2 * math.pi),
        ("triangle", {"boundary": "dirichlet"}, 0.75**0.5 / 2, 3.0),
        ("box", {"boundary": "dirichlet", "sides": (1.0, 2.0)}, 2.0, 6.0),
        ("klein", {"a": 1.0, "b": 2.0}, 2.0, 0.0),
        ("moebius", {"a": 1.0, "b": 2.0}, 2.0, -2.0),
    ):
        values = exact_spectrum(space, 400, **parameters)
        assert bool((values.diff() >= 0).all())
        # a lost family of eigenvalues would shift the mean of N(x) - Weyl by many
        count = torch.arange(400) + 0.5
        weyl = area * values / (4 * math.pi) - length * values.sqrt() / (4 * math.pi)
        assert abs(float((count - weyl)[200:].mean())) < 2.0, space


def test_torus_spectrum_is_differentiable_in_the_lattice():
    lattice = SKEW.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda a: exact_spectrum("torus", 7, lattice=a)[1::2], lattice)


# -- derivatives, batches, precision ------------------------------------------------------


def matrices(basis: Basis, parameters: Tensor) -> tuple[Tensor, Tensor]:
    a, b = parameters.unbind(-1)

    def metric(x: Tensor) -> Tensor:
        f = torch.stack([x[:, i % x.shape[-1]] for i in range(x.shape[-1])], -1)
        g = 1.5 + a * torch.sin(f[:, :1]) * f[:, :1] + b * torch.cos(2 * f)
        return torch.diag_embed(g.square()) + 0.1 * a * b

    op = galerkin(metric, basis)
    return op.stiffness, op.mass


@pytest.mark.parametrize("basis", [Fourier(2, dim=1), Fourier(1), Fourier(1, dim=3), Harmonics(2)])
def test_matrices_are_differentiable_to_second_order(basis):
    parameters = torch.tensor([0.3, 0.2], dtype=torch.float64, requires_grad=True)

    def f(p: Tensor) -> Tensor:
        k, m = matrices(basis, p)
        steps = torch.arange(k.numel()).reshape(k.shape)
        return (steps * k + steps.sqrt() * m).sum()

    assert torch.autograd.gradcheck(f, parameters, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, parameters)
    forward = torch.func.jacfwd(torch.func.jacfwd(f))(parameters.detach())
    reverse = torch.func.hessian(f)(parameters.detach())
    assert torch.allclose(forward, reverse, rtol=1e-11)


@pytest.mark.parametrize("basis", [Fourier(2), Harmonics(2), Legendre(3)])
def test_batches_of_metrics(basis):
    parameters = torch.tensor([[0.3, 0.2], [0.1, 0.4], [0.0, 0.0]], dtype=torch.float64)
    batched = torch.func.vmap(lambda p: matrices(basis, p))(parameters)
    for i, p in enumerate(parameters):
        for whole, one in zip(batched, matrices(basis, p), strict=True):
            assert (whole[i] - one).abs().max() < 1e-13
    scales = torch.tensor([1.0, 2.0], dtype=torch.float64)
    op = galerkin(lambda x: scales[:, None, None, None] * flat(x), basis)
    assert op.stiffness.shape == (2, basis.size, basis.size)
    expected = galerkin(lambda x: 2 * flat(x), basis)
    assert (op.mass[1] - expected.mass).abs().max() < 1e-13


def test_single_precision():
    op = galerkin(TorusOfRevolution(2.0, 0.8), Fourier(6, dtype=torch.float32))
    assert op.stiffness.dtype == op.mass.dtype == torch.float32
    exact = galerkin(TorusOfRevolution(2.0, 0.8), Fourier(6))
    assert relative(op.stiffness.double(), exact.stiffness) < 1e-5
    assert Harmonics(3, dtype=torch.float32).gradients.dtype == torch.float32


# -- the door -----------------------------------------------------------------------------


def test_errors():
    with pytest.raises(ValueError, match="expected \\(..., 16, 2, 2\\) for points"):
        galerkin(lambda x: torch.ones(len(x), 3, 3), Fourier(1, nodes=4))
    with pytest.raises(ValueError, match="NaN"):
        galerkin(lambda x: flat(x) * math.nan, Fourier(1))
    with pytest.raises(GeometryError, match="not positive definite"):
        galerkin(lambda x: -flat(x), Fourier(1))
    with pytest.raises(ValueError, match="periodic under"):
        galerkin(FlatTorus(lattice=SKEW), Fourier(1))
    with pytest.raises(ValueError, match="not periodic under the lattice"):
        galerkin(lambda x: (1 + 0.1 * x[:, :1, None]) * flat(x), Fourier(1))
    with pytest.raises(ValueError, match="not the unit vectors"):
        galerkin(Sphere(2, radius=2.0), Harmonics(1))
    with pytest.raises(ValueError, match="not independent"):
        Fourier(1, lattice=torch.ones(2, 2))
    with pytest.raises(ValueError, match="expected more than"):
        Fourier(4, nodes=8)
    with pytest.raises(ValueError, match="degree is -1"):
        Harmonics(-1)
    with pytest.raises(ValueError, match="boundary"):
        Legendre(3, "robin")
    with pytest.raises(ValueError, match="low < high"):
        Legendre(3, bounds=(1.0, 1.0))
    with pytest.raises(ValueError, match="chart coordinates"):
        ProductBasis(Harmonics(1), Fourier(1))
    with pytest.raises(ValueError, match="x has shape"):
        Fourier(1).evaluate(torch.zeros(3))
    for arguments, message in (
        (("cube", 3), "expected one of"),
        (("disk", 0), "at least 1"),
        (("bolza", 99), "tabulated"),
    ):
        with pytest.raises(ValueError, match=message):
            exact_spectrum(*arguments)
    with pytest.raises(ValueError, match="unexpected keyword"):
        exact_spectrum("disk", 3, sides=2.0)
    with pytest.raises(ValueError, match="positive numbers"):
        exact_spectrum("sphere", 3, radius=-1.0)
    with pytest.raises(ValueError, match="'neumann' or 'dirichlet'"):
        exact_spectrum("disk", 3, boundary="robin")
