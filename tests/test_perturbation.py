"""Perturbation series: orders by slope, exact coefficients, bounds, and tracking."""

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from darboux._checks import ConvergenceError, GeometryError
from darboux.manifolds import Pullback, TorusOfRevolution
from darboux.manifolds.mesh import icosphere, to_sphere
from darboux.manifolds.spectral import bounds, families
from darboux.manifolds.spectral.bases import Fourier, galerkin
from darboux.manifolds.spectral.eigen import eigenpairs
from darboux.manifolds.spectral.families import track
from darboux.manifolds.spectral.finite_elements import stiffness_mass
from darboux.manifolds.spectral.graphs import graph_laplacian
from darboux.manifolds.spectral.harmonics import Harmonics
from darboux.manifolds.spectral.operator import Operator
from darboux.manifolds.spectral.perturbation import perturb, rayleigh_ritz, schrieffer_wolff
from darboux.manifolds.spectral.rank_one import rank_one

derivatives: Any = families.derivatives  # whether its matrices are dense is known here
SQUARE, SPHERE = Fourier(4), Harmonics(6)
NEARLY = Fourier(4, lattice=2 * math.pi * torch.diag(torch.tensor([1.0, 1.0005]).double()))
ARGUMENTS = ("d_stiffness", "d_mass", "d2_stiffness", "d2_mass")


def random_pencil(t: Tensor) -> Any:
    """Forty simple eigenvalues; both matrices are quadratic in t."""
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(6, 40, 40, dtype=torch.float64, generator=generator)
    a = 0.1 * (a + a.mT)
    stiffness = torch.diag(torch.arange(40.0).double()) + a[0] + t * a[1] + t * t * a[2]
    mass = torch.eye(40, dtype=torch.float64) + 0.2 * (a[3] + t * a[4] + t * t * a[5])
    return Operator(stiffness, mass)


def waves(t: Tensor, basis: Fourier, *terms: tuple[float, int, int]) -> Operator:
    """A metric on the torus whose first-order change has the given Fourier modes."""

    cell = 2 * math.pi * torch.linalg.inv(basis.lattice)

    def metric(x: Tensor) -> Tensor:
        x = x @ cell
        parts = [a * torch.cos(m * x[:, 0] + n * x[:, 1] + a) for a, m, n in terms]
        u = torch.stack(parts).sum(0)
        w = torch.sin(x[:, 0] + x[:, 1])
        h = torch.stack([torch.stack([u, 0.3 * w], -1), torch.stack([0.3 * w, u * u - w], -1)], -2)
        return torch.eye(2, dtype=x.dtype) + t * h

    return galerkin(metric, basis)


def square(t: Tensor) -> Any:
    """From the flat square torus: multiplicities 1, 4, 4, and all split at first order."""
    return waves(t, SQUARE, (0.5, 1, 1), (0.5, 1, -1), (0.5, 1, -2), (0.3, 2, 1), (0.2, 0, 2))


def second(t: Tensor) -> Operator:
    """A conformal change of the square torus whose degenerate pairs split at second order."""

    def metric(x: Tensor) -> Tensor:
        u = sum(torch.cos(m * x[:, 0] + n * x[:, 1] + m) for m, n in ((1, -2), (1, 2), (0, 4)))
        return torch.eye(2, dtype=x.dtype) * (1 + t * u)[:, None, None]

    return galerkin(metric, SQUARE)


def nearly(t: Tensor) -> Operator:
    return waves(t, NEARLY, (0.5, 1, 1), (0.5, 1, -1), (0.5, 1, -2), (0.3, 2, 1), (0.2, 0, 2))


def spheroid(t: Tensor) -> Operator:
    """The unit sphere stretched along its axis by 1 + t."""

    def stretch(x: Tensor) -> Tensor:
        return torch.cat([x[..., :2], (1 + t) * x[..., 2:]], -1)

    return galerkin(Pullback(stretch, 3), SPHERE)


def torus(t: Tensor) -> Operator:
    return galerkin(TorusOfRevolution(2.0, 0.8 + t), SQUARE)


def cycle(t: Tensor) -> Any:
    """A ring of 400 springs, sparse, pairs of equal frequencies; weights and masses change."""
    i = torch.arange(400)
    angle = i.double() * 2 * math.pi / 400
    weights = 1 + t * torch.cos(2 * angle) + t * t * torch.sin(4 * angle + 1) / 2
    mass = 1 + t * torch.cos(4 * angle + 0.3) + t * torch.sin(6 * angle) + t * torch.cos(2 * angle)
    return graph_laplacian(torch.stack([i, (i + 1) % 400], -1), weights, mass=mass)


# family, number of states, size of the steps
FAMILIES = [
    (random_pencil, 9, 0.02),
    (square, 9, 0.02),
    (second, 9, 0.04),
    (spheroid, 16, 0.02),
    (torus, 7, 0.02),
    (cycle, 7, 0.02),
]
EVERY = pytest.mark.parametrize(
    ("family", "k", "step"), FAMILIES, ids=lambda f: f.__name__[:9] if callable(f) else None
)


def expansion(family, k: int, **options):
    d = derivatives(family, 0.0)
    changes = dict(zip(ARGUMENTS, d[1:], strict=True))
    return perturb(eigenpairs(d.operator, k), **changes, **options)


def errors_of_functions(u: Tensor, exact) -> float:
    """The largest M-distance of a function in order from the eigenspace in its place."""
    worst = 0.0
    for cluster in exact.clusters:
        part, space = u[:, cluster], exact.functions[:, cluster]
        mass = exact.operator.mass
        rest = part - space @ (space.mT @ (mass @ part))
        worst = max(worst, float((rest * (mass @ rest)).sum(0).max()) ** 0.5)
    return worst


def slope(errors: list[float]) -> float:
    return math.log2(errors[-2] / errors[-1])


@EVERY
def test_orders(family, k, step):
    first, both = expansion(family, k, order=1), expansion(family, k, order=2)
    one, two, functions, ritz, plain = [], [], [], [], []
    for eps in (step, step / 2, step / 4):
        exact = eigenpairs(family(torch.tensor(eps, dtype=torch.float64)), k)
        order = both.values(eps).argsort()
        one.append(float((first.values(eps).sort().values - exact.values).abs().max()))
        two.append(float((both.values(eps)[order] - exact.values).abs().max()))
        functions.append(errors_of_functions(both.functions(eps)[:, order], exact))
        for errors, basis in (
            (plain, both.modes[0]),
            (ritz, torch.cat([both.modes[0], both.modes[1]], 1)),
        ):
            values = rayleigh_ritz(both.operator(0.0), basis, k).values
            assert (values - both.series[0]).abs().max() < 1e-9
            found = rayleigh_ritz(family(torch.tensor(eps, dtype=torch.float64)), basis, k).values
            assert bool((found > exact.values - 1e-10).all())
            errors.append(float((found - exact.values).abs().max()))
    found = {"1": slope(one), "2": slope(two), "f": slope(functions), "ritz": slope(ritz)}
    print(family.__name__, found, slope(plain), two[-1])
    assert abs(found["1"] - 2) < 0.1
    assert abs(found["2"] - 3) < 0.1
    if family is not second:  # there, only projectors are of second order
        assert abs(found["f"] - 2) < 0.1
    assert abs(slope(plain) - 2) < 0.1
    assert abs(found["ritz"] - 4) < 0.15


def test_projector_of_states_that_split_at_second_order():
    result, errors = expansion(second, 9), []
    assert (result.series[1][1:5].abs()).max() < 1e-12  # they do not split at first order
    assert result.series[2][1:5].diff().abs().max() > 1e-3
    for eps in (0.04, 0.02, 0.01):
        exact = eigenpairs(second(torch.tensor(eps, dtype=torch.float64)), 9)
        u, phi = result.functions(eps)[:, 1:5], exact.functions[:, 1:5]
        rest = u - phi @ (phi.mT @ (exact.operator.mass @ u))
        errors.append(float(rest.norm()))
    assert abs(slope(errors) - 2) < 0.1


def test_spheroid_has_rational_coefficients():
    result = expansion(spheroid, 16)
    second_order = {
        (1, 0): Fraction(1574, 875),
        (1, 1): Fraction(466, 875),
        (2, 0): Fraction(1290, 343),
        (2, 1): Fraction(4058, 1029),
        (2, 2): Fraction(1294, 1029),
        (3, 0): Fraction(849188, 111375),
        (3, 1): Fraction(92588, 12375),
        (3, 2): Fraction(628, 99),
        (3, 3): Fraction(1852, 891),
    }
    expected = [(0.0, 0.0, 0.0)]
    for l in (1, 2, 3):
        for m in range(l + 1):
            s = l * (l + 1)
            rate = -2 * s * (2 * s - 2 * m * m - 1) / ((2 * l - 1) * (2 * l + 3))
            expected += [(s, rate, float(second_order[l, m]))] * (1 if m == 0 else 2)
    error = (result.series - torch.tensor(expected, dtype=torch.float64).mT).abs().max(-1).values
    print("spheroid", error)
    assert error.max() < 1e-8
    # the first: -12/5 for m = 0 and -4/5 for m = 1
    assert (
        result.series[1, 1:4] - torch.tensor([-2.4, -0.8, -0.8], dtype=torch.float64)
    ).abs().max() < 1e-10


def test_single_precision():
    def family(t: Tensor) -> Operator:
        def stretch(x: Tensor) -> Tensor:
            return torch.cat([x[..., :2], (1 + t) * x[..., 2:]], -1)

        return galerkin(Pullback(stretch, 3), Harmonics(5, dtype=torch.float32))

    d = derivatives(family, torch.tensor(0.0))
    changes = dict(zip(ARGUMENTS, d[1:], strict=True))
    result = perturb(eigenpairs(d.operator, 9), **changes)
    assert result.series.dtype == torch.float32
    assert [b.states.stop for b in result.blocks] == [1, 4, 9]
    assert (result.series.double() - expansion(spheroid, 9).series).abs().max() < 1e-3


def test_against_the_sums_over_states():
    d = derivatives(random_pencil, 0.0)
    k1, m1, k2, m2 = d[1:]
    every = eigenpairs(d.operator, 40)
    result = perturb(every, k1, m1, d2_stiffness=k2, d2_mass=m2, k=10)
    phi, level = every.functions, every.values
    for i in range(10):
        f = phi[:, i]
        w = phi.mT @ (k1 - level[i] * m1) @ f
        other = torch.arange(40) != i
        c = torch.where(other, w / torch.where(other, level[i] - level, 1.0), 0.0)
        rate = phi @ c - 0.5 * (f @ m1 @ f) * f
        two = (w * c)[other].sum() + f @ (k2 - level[i] * m2) @ f - w[i] * (f @ m1 @ f)
        assert abs(result.series[1, i] - w[i]) < 1e-12
        assert abs(result.series[2, i] - two) < 1e-11
        assert (result.modes[1, :, i] - rate).abs().max() < 1e-12
        assert abs(result.coupling[i] - c.norm()) < 1e-12


def test_effective_hamiltonian_against_the_full_transformation():
    """des Cloizeaux in the orthonormal basis of the perturbed mass, with all states at hand."""
    d = derivatives(random_pencil, 0.0)
    every = eigenpairs(d.operator, 40)
    phi, level = every.functions, torch.diag(every.values)
    k1, m1, k2, m2 = (phi.mT @ a @ phi for a in d[1:])
    v1 = k1 - 0.5 * (m1 @ level + level @ m1)
    v2 = k2 - 0.5 * (m2 @ level + level @ m2) + 0.25 * m1 @ level @ m1
    v2 = v2 + 0.375 * (m1 @ m1 @ level + level @ m1 @ m1) - 0.5 * (m1 @ k1 + k1 @ m1)
    states = slice(3, 7)
    outside = torch.ones(40, dtype=torch.bool)
    outside[states] = False
    gaps = every.values[states, None] - every.values[outside]
    mix = v1[states][:, outside] / gaps
    couple = mix @ v1[outside][:, states]
    expected = v2[states, states] + 0.5 * (couple + couple.mT)
    block = schrieffer_wolff(every, states, *d[1:])
    assert (block.hamiltonian[1] - v1[states, states]).abs().max() < 1e-12
    values = torch.linalg.eigvalsh
    for eps in (1e-2, 5e-3):
        ours = values(
            block.hamiltonian[0] + eps * block.hamiltonian[1] + eps**2 * block.hamiltonian[2]
        )
        theirs = values(level[states, states] + eps * v1[states, states] + eps**2 * expected)
        assert (ours - theirs).abs().max() < 10 * eps**3


def test_nearly_degenerate_states_need_a_block():
    errors: dict[str, list[float]] = {"block": [], "simple": [], "functions": []}
    block = expansion(nearly, 9, degenerate=0.01)
    simple = expansion(nearly, 9)
    for eps in (0.02, 0.01, 0.005):
        exact = eigenpairs(nearly(torch.tensor(eps, dtype=torch.float64)), 9)
        errors["block"].append(float((block.values(eps) - exact.values).abs().max()))
        errors["simple"].append(float((simple.values(eps) - exact.values).abs().max()))
        errors["functions"].append(errors_of_functions(block.functions(eps), exact))
    assert abs(slope(errors["block"]) - 3) < 0.1
    assert abs(slope(errors["functions"]) - 2) < 0.1
    assert errors["simple"][-1] > 100 * errors["block"][-1]
    # and the indicator says so
    assert bool(block.valid(0.02).all())
    assert not bool(simple.valid(0.02).all())


def test_spheroid_by_finite_elements():
    """Levels that the mesh splits a little are blocks; coefficients converge like h^4."""
    rates, values = [], []
    for level in (1, 2):
        mesh = icosphere(level)

        def family(t: Tensor) -> Operator:
            def project(x: Tensor) -> Tensor:
                y = to_sphere(x)
                return torch.cat([y[..., :2], (1 + t) * y[..., 2:]], -1)

            return stiffness_mass(mesh, order=2, project=project)

        result = expansion(family, 9, degenerate=0.1)
        assert [b.states.stop for b in result.blocks] == [1, 4, 9]
        rates.append(abs(float(torch.linalg.eigvalsh(result.blocks[1].hamiltonian[1])[0]) + 2.4))
        values = []
        for eps in (0.04, 0.02, 0.01):
            exact = eigenpairs(family(torch.tensor(eps, dtype=torch.float64)), 9)
            values.append(float((result.values(eps).sort().values - exact.values).abs().max()))
        assert abs(slope(values) - 3) < 0.1
    assert math.log2(rates[0] / rates[1]) > 3.7


def test_sparse_series_is_the_dense_one():
    """Seven of 400 states are known to the sparse path; the sum is over all of them."""
    d = derivatives(cycle, 0.0)
    changes = dict(zip(ARGUMENTS, d[1:], strict=True))
    sparse = perturb(eigenpairs(d.operator, 7, method="lanczos"), **changes)
    dense = perturb(
        eigenpairs(d.operator.map(lambda a: a.dense()), 7),
        **{name: change.dense() for name, change in changes.items()},
    )
    assert (sparse.series - dense.series).abs().max() < 1e-11
    assert (sparse.coupling - dense.coupling).abs().max() < 1e-8


def test_conformal_change_of_the_sphere():
    # K is kept, and the rates of one level sum to -2 lambda times the mean of u
    def family(t: Tensor) -> Operator:
        def metric(x: Tensor) -> Tensor:
            u = x[:, 0].square() + 0.3 * x[:, 1] * x[:, 2]
            return torch.exp(2 * t * u)[:, None, None] * torch.eye(3, dtype=x.dtype)

        return galerkin(metric, SPHERE)

    assert derivatives(family, 0.0).d_stiffness.abs().max() < 1e-13
    result = expansion(family, 16)
    for l in (1, 2, 3):
        rates = result.series[1, l * l : (l + 1) ** 2]
        assert abs(rates.mean() + 2 * l * (l + 1) / 3) < 1e-10


# -- families -----------------------------------------------------------------------------


def test_derivatives_against_differences():
    h = 1e-3
    for family in (square, cycle):
        at = torch.tensor(0.1, dtype=torch.float64)
        d = derivatives(family, at)
        before, here, after = (family(at + s * h) for s in (-1, 0, 1))
        for name, first, two in (
            ("stiffness", d.d_stiffness, d.d2_stiffness),
            ("mass", d.d_mass, d.d2_mass),
        ):
            a, b, c = (
                m if isinstance(m := getattr(op, name), Tensor) else m.values
                for op in (before, here, after)
            )
            first, two = (m if isinstance(m, Tensor) else m.values for m in (first, two))
            assert ((c - a) / (2 * h) - first).abs().max() < 1e-4
            assert ((c - 2 * b + a) / (2 * h * h) - two).abs().max() < 1e-4


def test_derivatives_along_a_direction():
    weights = torch.linspace(1.0, 2.0, 6, dtype=torch.float64)
    direction = torch.tensor([1.0, 0, 0, 2.0, 0, 0], dtype=torch.float64)
    i = torch.arange(6)
    edges = torch.stack([i, (i + 1) % 6], -1)
    d = derivatives(lambda w: graph_laplacian(edges, w * w), weights, direction)
    once = graph_laplacian(edges, (2 * weights * direction).clamp(min=1e-300)).stiffness.values
    twice = graph_laplacian(edges, direction.square().clamp(min=1e-300)).stiffness.values
    assert (d.d_stiffness.values - once).abs().max() < 1e-13
    assert (d.d2_stiffness.values - twice).abs().max() < 1e-13


def rectangle(t: Tensor) -> Operator:
    """The flat torus of periods 2 pi and 2 pi t: eigenvalues m² + n² / t²."""
    scales = torch.stack([torch.ones_like(t), t * t])
    return galerkin(lambda x: torch.diag(scales).expand(len(x), 2, 2), Fourier(2))


@pytest.mark.parametrize("count", [8, 9])  # with and without a point at the crossing
def test_tracking_through_a_crossing(count):
    ts = torch.linspace(0.8, 1.2, count, dtype=torch.float64)
    result = track(rectangle, ts, 5)
    ones, others = torch.ones_like(ts), 1 / ts.square()
    expected = torch.stack([0 * ts, ones, ones, others, others], -1)
    assert (result.values - expected).abs().max() < 1e-12
    assert result.values.shape == (count, 5)
    # no mixing on the way: the functions, normalised, stay what they were
    for i in range(5):
        kept = result.functions[0, :, i] @ result.functions[-1, :, i]
        size = result.functions[0, :, i].norm() * result.functions[-1, :, i].norm()
        assert kept / size > 1 - 1e-9


def test_tracking_through_the_sphere_from_a_degenerate_start():
    # from the sphere itself, and across it: the azimuthal numbers stay
    for ts in (torch.linspace(0.0, 0.2, 4), torch.linspace(-0.15, 0.15, 7)):
        result = track(spheroid, ts.double(), 9)
        m = torch.cat([torch.arange(-l, l + 1).abs() for l in range(7)])
        content = result.functions.square()
        for order in range(3):
            part = content[:, m == order].sum(1) / content.sum(1)
            assert (part - part.round()).abs().max() < 1e-9
            assert (part - part[-1]).abs().max() < 1e-9
        # smooth values: third differences are small
        third = result.values.diff(dim=0).diff(dim=0).diff(dim=0)
        assert third.abs().max() < 0.05
        assert bool((result.overlaps > 0.9).all())


def test_tracking_halves_steps_and_says_when_a_branch_is_lost():
    def turning(t: Tensor) -> Operator:
        # the eigenvectors turn by t, the eigenvalues stay
        c, s = torch.cos(t), torch.sin(t)
        turn = torch.stack([torch.stack([c, -s]), torch.stack([s, c])])
        levels = torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64))
        return Operator(turn @ levels @ turn.mT, torch.eye(2, dtype=torch.float64))

    ts = torch.tensor([0.0, 0.9, 1.8], dtype=torch.float64)
    result = track(turning, ts, 2, extra=0)
    assert (result.values - torch.tensor([1.0, 2.0])).abs().max() < 1e-12
    assert result.overlaps[1].min() > 0.7
    with pytest.raises(ConvergenceError, match="keeps an overlap of 0.614"):
        track(turning, ts, 2, extra=0, halvings=0)
    with pytest.raises(ValueError, match="expected \\(T,\\)"):
        track(turning, torch.zeros(2, 2), 1)
    with pytest.raises(ValueError, match="k is 0"):
        track(turning, ts, 0)


# -- bounds -------------------------------------------------------------------------------


def test_bounds_hold_the_eigenvalues():
    for family, k, eps in ((square, 9, 0.05), (cycle, 7, 0.05), (random_pencil, 9, 0.1)):
        quotients, radii = expansion(family, k).bounds(eps)
        exact = eigenpairs(family(torch.tensor(eps, dtype=torch.float64)), k + 10).values
        distance = (exact[:, None] - quotients).abs().amin(0)
        assert bool((distance <= radii + 1e-12).all())
        assert radii.max() < 0.1


def test_residual_bounds():
    operator = random_pencil(torch.tensor(0.0, dtype=torch.float64))
    exact = eigenpairs(operator, 40)
    generator = torch.Generator().manual_seed(0)
    x = exact.functions + 1e-3 * torch.randn(40, 40, dtype=torch.float64, generator=generator)
    mass_x = operator.mass @ x
    x = x / (x * mass_x).sum(0).sqrt()
    mass_x = operator.mass @ x
    theta = (x * (operator.stiffness @ x)).sum(0)
    radii = bounds.weyl(operator, theta, x)
    error = (exact.values - theta).abs()
    assert bool((error <= radii).all())
    gaps = torch.where(torch.eye(40) > 0, torch.inf, (exact.values[:, None] - theta).abs()).amin(0)
    sine = (1 - (exact.functions * mass_x).sum(0).square()).clamp(min=0).sqrt()
    angle = bounds.davis_kahan(radii, gaps)
    assert bool((error <= bounds.kato_temple(radii, gaps) + 1e-14).all())
    assert bool((sine <= angle + 1e-12).all())
    # they say something: neither is trivial, and of the right size
    assert angle.median() < 0.5
    assert bounds.kato_temple(radii, gaps).median() < 100 * error.median()


def test_form_bounds_enclose_every_eigenvalue_in_its_place():
    d = derivatives(square, 0.0)
    eps = 0.2
    after = square(torch.tensor(eps, dtype=torch.float64))
    a, b = bounds.form_bounds(
        d.operator, after.stiffness - d.operator.stiffness, after.mass - d.operator.mass
    )
    low, high = bounds.enclose(eigenpairs(d.operator, 20).values, a, b)
    exact = eigenpairs(after, 20).values
    assert bool((low - 1e-12 <= exact).all() & (exact <= high + 1e-12).all())
    assert 0 < float(a) < 0.5
    assert 0 < float(b) < 0.5
    # sharp for a change of scale
    twice = eigenpairs(Operator(1.5 * d.operator.stiffness, d.operator.mass), 5).values
    a, b = bounds.form_bounds(d.operator, 0.5 * d.operator.stiffness, None)
    assert (bounds.enclose(eigenpairs(d.operator, 5).values, a, b)[1] - twice).abs().max() < 1e-12
    assert math.isinf(bounds.form_bounds(d.operator, d.operator.mass, None)[0])


def test_rank_one():
    operator = random_pencil(torch.tensor(0.0, dtype=torch.float64))
    every = eigenpairs(operator, 40)
    generator = torch.Generator().manual_seed(1)
    k = torch.randn(40, dtype=torch.float64, generator=generator)
    z = every.functions.mT @ k
    for rho in (0.7, -0.3, 1e-7, 1e3):
        changed = Operator(operator.stiffness + rho * k.outer(k), operator.mass)
        expected = eigenpairs(changed, 40).values
        assert (rank_one(every.values, z, rho) - expected).abs().max() < 1e-11 * (1 + abs(rho)) * 50
    positive = Operator(operator.stiffness + 5 * operator.mass, operator.mass)
    values = eigenpairs(positive, 40).values
    for rho in (0.7, 1e-7, 1e2):
        changed = Operator(positive.stiffness, operator.mass + rho * k.outer(k))
        expected = eigenpairs(changed, 40).values
        found = rank_one(values, z, rho, change="mass")
        assert (found - expected).abs().max() < 1e-10
        # interlacing
        assert bool((found <= values + 1e-12).all() & (found[1:] >= values[:-1] - 1e-12).all())


def test_rank_one_with_equal_values_and_zero_weights():
    values = torch.tensor([0.0, 1, 1, 1, 2, 2, 5], dtype=torch.float64)
    z = torch.tensor([1, 1, 0, 0.5, 0, 0, 1e-9], dtype=torch.float64)
    for rho in (0.3, -0.3, 1e4):
        expected = torch.linalg.eigvalsh(torch.diag(values) + rho * z.outer(z))
        assert (rank_one(values, z, rho) - expected).abs().max() < 1e-11
    assert torch.equal(rank_one(values, 0 * z, 1.0), values)


def test_point_mass_and_spring_on_a_ring():
    op = cycle(torch.tensor(0.0, dtype=torch.float64)).map(lambda a: a.dense())
    every = eigenpairs(op, 400)
    phi = every.functions
    mass, stiffness = op.mass.clone(), op.stiffness.clone()
    mass[7, 7] += 5.0
    found = rank_one(every.values, phi[7], 5.0, change="mass")
    expected = eigenpairs(Operator(op.stiffness, mass), 400).values
    assert (found - expected).abs().max() < 1e-11
    for a, b, sign in ((3, 3, 1), (90, 90, 1), (3, 90, -1), (90, 3, -1)):
        stiffness[a, b] += 2.0 * sign
    found = rank_one(every.values, phi[3] - phi[90], 2.0)
    expected = eigenpairs(Operator(stiffness, op.mass), 400).values
    assert (found - expected).abs().max() < 1e-11


# -- the door -----------------------------------------------------------------------------


def test_errors():
    d = derivatives(square, 0.0)
    spectrum = eigenpairs(d.operator, 9)
    with pytest.raises(GeometryError, match="occurs outside this block"):
        perturb(eigenpairs(d.operator, 7), d.d_stiffness, d.d_mass)
    with pytest.raises(GeometryError, match="occurs outside this block"):
        schrieffer_wolff(spectrum, slice(1, 3), d.d_stiffness, d.d_mass)
    with pytest.raises(ValueError, match="whole clusters"):
        perturb(spectrum, d.d_stiffness, d.d_mass, k=3)
    with pytest.raises(ValueError, match="k is 10"):
        perturb(spectrum, d.d_stiffness, d.d_mass, k=10)
    with pytest.raises(ValueError, match="order is 3"):
        perturb(spectrum, d.d_stiffness, d.d_mass, order=3)
    with pytest.raises(ValueError, match="d_mass has shape"):
        perturb(spectrum, d.d_stiffness, torch.eye(3))
    with pytest.raises(ValueError, match="NaN"):
        perturb(spectrum, d.d_stiffness * math.nan, d.d_mass)
    with pytest.raises(ValueError, match="degenerate is 'all'"):
        perturb(spectrum, d.d_stiffness, d.d_mass, degenerate="all")
    with pytest.raises(ValueError, match="states is empty"):
        schrieffer_wolff(spectrum, slice(4, 4), d.d_stiffness, d.d_mass)
    sparse = eigenpairs(cycle(torch.tensor(0.0, dtype=torch.float64)), 3)
    with pytest.raises(TypeError, match="d_stiffness is dense"):
        perturb(sparse, torch.eye(400), None)
    other = graph_laplacian(torch.tensor([[0, 2]]), n=400)
    with pytest.raises(ValueError, match="other places"):
        perturb(sparse, other.stiffness, None)
    batch = Operator(torch.stack([d.operator.stiffness] * 2), torch.stack([d.operator.mass] * 2))
    with pytest.raises(ValueError, match="one spectrum of the batch"):
        perturb(eigenpairs(batch, 5), None, None)
    with pytest.raises(ValueError, match="direction has shape"):
        derivatives(square, torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="basis has shape"):
        rayleigh_ritz(d.operator, torch.ones(5, 2))
    with pytest.raises(TypeError, match="sparse"):
        bounds.form_bounds(sparse.operator, None, None)
    with pytest.raises(ValueError, match="less than 1"):
        bounds.enclose(torch.ones(2), 0.1, 1.0)
    with pytest.raises(ValueError, match="expected both \\(n,\\)"):
        rank_one(torch.ones(2, 2), torch.ones(2, 2), 1.0)
    with pytest.raises(ValueError, match="must not be negative"):
        rank_one(torch.ones(2), torch.ones(2), -1.0, change="mass")
    with pytest.raises(ValueError, match="'stiffness' or 'mass'"):
        rank_one(torch.ones(2), torch.ones(2), 1.0, change="both")
