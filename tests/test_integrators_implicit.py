"""Implicit pairs and compositions: coefficients, structure, derivatives through the solution."""

import math
import weakref

import numpy as np
import pytest
import torch
from integrator_cases import COUPLED, F64, HENON_HEILES, PENDULUM, start
from torch import nn
from torch.func import jacfwd, jacrev, jvp, vmap

from darboux._checks import ConvergenceError
from darboux.integrators import (
    METHODS,
    Equations,
    Hamiltonian,
    VectorField,
    audit,
    compose,
    gauss_legendre,
    integrate,
    lobatto_pair,
    solve_fixed_point,
    solve_stages,
)

# --- Coefficients -----------------------------------------------------------------------------


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("s", range(2, 9))
def test_lobatto_pair_satisfies_its_simplifying_assumptions(s, swapped):
    # B(2s-2), C(s) and D(s-2) for IIIA; C(s-2) and D(s) for IIIB; Hairer, Lubich & Wanner
    # (2006), table II.2.2.
    pair = lobatto_pair(s, swapped)
    a, a_hat = (pair.A_hat, pair.A) if swapped else (pair.A, pair.A_hat)
    b, c = pair.b, pair.c
    for k in range(1, 2 * s - 1):
        assert abs(b @ c ** (k - 1) - 1 / k) <= 1e-15
    for matrix, collocates, dual in ((a, s, s - 2), (a_hat, s - 2, s)):
        for k in range(1, collocates + 1):
            assert np.abs(matrix @ c ** (k - 1) - c**k / k).max() <= 1e-15
        for k in range(1, dual + 1):
            assert np.abs((b * c ** (k - 1)) @ matrix - b * (1 - c**k) / k).max() <= 1e-15
    assert np.abs(b[:, None] * pair.A_hat + (b[:, None] * pair.A).T - np.outer(b, b)).max() <= 1e-16
    assert (pair.mu_hat + pair.mu.T == 1).all()


def test_lobatto_pair_matches_closed_forms():
    # Hairer, Lubich & Wanner (2006), table II.2.1 and (II.1.18).
    two, three = lobatto_pair(2), lobatto_pair(3)
    np.testing.assert_array_equal(two.A, [[0, 0], [1 / 2, 1 / 2]])
    np.testing.assert_array_equal(two.A_hat, [[1 / 2, 0], [1 / 2, 0]])
    a = [[0, 0, 0], [5 / 24, 1 / 3, -1 / 24], [1 / 6, 2 / 3, 1 / 6]]
    a_hat = [[1 / 6, -1 / 6, 0], [1 / 6, 1 / 3, 0], [1 / 6, 5 / 6, 0]]
    np.testing.assert_allclose(three.A, a, rtol=0, atol=6e-17)
    np.testing.assert_allclose(three.A_hat, a_hat, rtol=0, atol=2e-16)
    np.testing.assert_array_equal(lobatto_pair(3, swapped=True).A, three.A_hat)
    nodes = [0, (5 - math.sqrt(5)) / 10, (5 + math.sqrt(5)) / 10, 1]
    np.testing.assert_allclose(lobatto_pair(4).c, nodes, rtol=0, atol=2e-16)
    np.testing.assert_allclose(lobatto_pair(4).b, np.array([1, 5, 5, 1]) / 12, rtol=0, atol=6e-17)
    with pytest.raises(ValueError, match="at least 2"):
        lobatto_pair(1)


def test_generalized_leapfrog_is_its_formula_and_leapfrog_where_that_applies():
    q, p = start(4)
    h = 0.1
    one, two = METHODS["generalized_leapfrog"].step(COUPLED, q, p, h)
    middle, moved = p, q
    for _ in range(100):
        middle = p + h / 2 * COUPLED.field(q, middle)[1]
    for _ in range(100):
        moved = q + h / 2 * (COUPLED.field(q, middle)[0] + COUPLED.field(moved, middle)[0])
    torch.testing.assert_close(one, moved, rtol=0, atol=1e-15)
    end = middle + h / 2 * COUPLED.field(moved, middle)[1]
    torch.testing.assert_close(two, end, rtol=0, atol=1e-15)
    for name in ("leapfrog", "position_leapfrog"):
        explicit = METHODS[name].step(HENON_HEILES, q, p, h)
        implicit = METHODS[f"generalized_{name}"].step(HENON_HEILES, q, p, h)
        torch.testing.assert_close(implicit, explicit, rtol=0, atol=1e-15)


# --- Structure --------------------------------------------------------------------------------

NEW = ["generalized_leapfrog", "lobatto4", "generalized_leapfrog4", "semiexplicit2"]


@pytest.mark.parametrize("name", NEW)
def test_symplectic_in_single_precision(name):
    z = torch.cat(start(5, dtype=torch.float32), -1)
    assert audit.symplecticity_defect(audit.step_map(COUPLED, name, 0.1), z).max() < 2e-6


SPHERE = Hamiltonian(
    lambda q, p: (1 + q.square().sum(-1)).square() * p.square().sum(-1) / 8,
    lambda q, p: (
        (1 + q.square().sum(-1, keepdim=True)).square() * p / 4,
        -(1 + q.square().sum(-1, keepdim=True)) * p.square().sum(-1, keepdim=True) * q / 2,
    ),
)


def great_circle():
    """Return a state of unit speed on the sphere in the stereographic chart: period 2 pi."""
    q, p = torch.tensor([0.5, 0.0], dtype=F64), torch.tensor([0.5, 1.0], dtype=F64)
    return q, p / (2 * SPHERE.energy(q, p)).sqrt()


@pytest.mark.parametrize(
    ("name", "expected"),
    [  # errors after three periods of 60 steps, by an independent code from a similar orbit
        ("generalized_leapfrog", 6.8e-2),
        ("implicit_midpoint", 3.3e-2),
        ("semiexplicit2", 1.7e-2),
        ("gauss4", 9.0e-6),
        ("gauss6", 9.4e-10),
    ],
)
def test_great_circles_close_and_keep_energy_and_momentum(name, expected):
    q, p = great_circle()
    run = integrate(SPHERE, q, p, dt=2 * math.pi / 60, steps=180, method=name)
    assert float((run.q[-1] - q).norm()) == pytest.approx(expected, rel=0.15)
    error = (SPHERE.energy(run.q, run.p) * 2 - 1).abs()
    assert error[120:].max() <= 1.1 * error[:60].max()
    momentum = run.q[:, 0] * run.p[:, 1] - run.q[:, 1] * run.p[:, 0]
    assert (momentum / momentum[0] - 1).abs().max() < 1e-14


def test_gauss6_keeps_the_energy_of_chaotic_orbits_without_drift():
    # Henon-Heiles at E = 1/8: the truncation error is bounded and the round-off below it.
    q = torch.tensor([[0.0, 0.1], [0.0, -0.2], [0.1, 0.2], [-0.2, 0.1]], dtype=F64)
    p = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-0.6, 0.8]], dtype=F64)
    rest = 1 / 8 - HENON_HEILES.energy(q, torch.zeros_like(q))
    p = p * (2 * rest).sqrt()[:, None]
    run = integrate(HENON_HEILES, q, p, dt=0.1, steps=2000, method="gauss6", save_every=4)
    drift = audit.energy_drift(HENON_HEILES, run)
    assert drift.error.max() < 1e-10
    assert (drift.slope * run.t[-1]).abs().max() < 3e-12


# --- Order without autonomy -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["generalized_leapfrog", "lobatto4", "lobatto6"])
def test_order_where_the_time_enters(name):
    system = VectorField(lambda z, t: torch.cos(3 * t)[..., None] * z, time=True)
    z, exact, errors = torch.ones(1, dtype=F64), math.exp(math.sin(6.0) / 3), []
    for n in (32, 64):
        run = integrate(system, z, dt=2.0 / n, steps=n, method=name, save_every=n)
        errors.append(abs(float(run.q[-1]) - exact))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(METHODS[name].order, abs=0.1)


def test_pairs_move_q_with_a_clock():
    # q has one component more than p: H = p^2/2 + q^2/2 - q cos 2t.
    driven = Hamiltonian(
        lambda q, p, t: (p.square() / 2 + q.square() / 2).sum(-1) - q[..., 0] * torch.cos(2 * t),
        time=True,
    )
    q, p = torch.tensor([-1 / 3], dtype=F64), torch.zeros(1, dtype=F64)
    for name in ("lobatto6", "generalized_leapfrog4", "semiexplicit2", "tao4"):
        run = integrate(driven, q, p, dt=0.05, steps=20, method=name)
        exact = -math.cos(2.0) / 3, 2 * math.sin(2.0) / 3
        found = float(run.q[-1]), float(run.p[-1])
        assert found == pytest.approx(exact, abs={2: 2e-3, 4: 1e-5, 6: 1e-8}[METHODS[name].order])


# --- Derivatives ------------------------------------------------------------------------------

COMPOSED = "generalized_leapfrog4"  # many steps of a family: slow, and nothing new to each
FAMILIES = ["lobatto4", COMPOSED, "semiexplicit2", "tao2", "gonzalez", "avf"]


def one_step(name):
    def step(z):
        return torch.cat(METHODS[name].step(COUPLED, z[..., :2], z[..., 2:], 0.1), -1)

    return step


def differences(f, x, h=2e-3):
    columns = []
    for e in torch.eye(len(x), dtype=x.dtype) * h:
        one, two, three = (f(x + k * e) - f(x - k * e) for k in (1, 2, 3))
        columns.append((45 * one - 9 * two + three) / (60 * h))
    return torch.stack(columns, -1)


@pytest.mark.parametrize("name", [n for n in FAMILIES if n != COMPOSED])
def test_steps_differentiate_in_every_mode(name):
    step, z = one_step(name), torch.cat(start(2), -1)
    expected = torch.stack([differences(step, x) for x in z])
    tape = torch.autograd.functional.jacobian(step, z[0])
    torch.testing.assert_close(tape, expected[0], rtol=0, atol=5e-11)
    for transform in (jacrev, jacfwd):
        found = vmap(transform(step))(z)
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-11)
    v = torch.tensor([0.3, -0.5, 0.7, 0.2], dtype=F64)

    def slope(s):
        return jvp(step, (z[0] + s * v,), (v,))[1]

    second = differences(slope, torch.zeros(1, dtype=F64))[:, 0]
    twice = jvp(lambda x: jvp(step, (x,), (v,))[1], (z[0],), (v,))[1]
    torch.testing.assert_close(twice, second, rtol=0, atol=1e-9)
    nested = jacrev(lambda x: jvp(step, (x,), (v,))[1])(z[0]) @ v
    torch.testing.assert_close(nested, second, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_reach_parameters_and_the_step_size(name):
    torch.manual_seed(0)
    first = nn.Linear(4, 8)
    net = nn.Sequential(first, nn.Tanh(), nn.Linear(8, 1)).double()
    weight = first.weight
    system = Hamiltonian(
        lambda q, p: net(torch.cat([q, p], -1))[..., 0] + p.square().sum(-1) * (1 + q[..., 0] ** 2)
    )

    def loss(dt):
        run = integrate(system, *start(4), dt=dt, steps=3, method=name)
        return run.q.square().sum() + run.p.sum()

    dt = torch.tensor(0.1, dtype=F64, requires_grad=True)
    loss(dt).backward()
    assert weight.grad is not None
    assert dt.grad is not None

    def at(shift):
        with torch.no_grad():
            weight[2, 1] += shift
            value = loss(0.1)
            weight[2, 1] -= shift
            return value

    for found, f in ((weight.grad[2, 1], at), (dt.grad, lambda shift: loss(0.1 + shift).detach())):
        expected = (8 * (f(1e-3) - f(-1e-3)) - (f(2e-3) - f(-2e-3))) / 12e-3
        assert float(found) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("rows_alone", [False, True])
def test_derivative_is_that_of_unrolled_iterations(rows_alone):
    tableau, h = lobatto_pair(3), 0.1
    z = torch.cat(start(3), -1).requires_grad_()
    rate = torch.tensor(1.3, dtype=F64, requires_grad=True)
    weights = torch.linspace(-1, 1, 4, dtype=F64)

    def field(x):
        return torch.cat(COUPLED.field(x[..., :2], rate * x[..., 2:]), -1)

    solved = solve_stages(field, z, h, tableau, split=2, rows_alone=rows_alone).increment
    found = torch.autograd.grad((solved * weights).sum(), (z, rate))
    a, a_hat = (h * torch.from_numpy(x) for x in (tableau.A, tableau.A_hat))
    k = torch.zeros(3, *z.shape, dtype=F64)
    for _ in range(40):
        moved = [
            torch.einsum("ij,j...->i...", m, x)
            for m, x in zip((a, a_hat), k.split(2, -1), strict=True)
        ]
        k = field(z + torch.cat(moved, -1))
    unrolled = h * torch.einsum("j,j...->...", torch.from_numpy(tableau.b), k)
    torch.testing.assert_close(solved, unrolled, rtol=0, atol=1e-15)
    expected = torch.autograd.grad((unrolled * weights).sum(), (z, rate))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["gauss4", "lobatto4", "semiexplicit2", "gonzalez", "avf"])
def test_memory_of_a_gradient_does_not_depend_on_the_iteration(name):
    class Kept:
        def __init__(self, x):
            self.x = x

    sizes, sweeps = [], []
    for h in (1e-4, 0.4):
        kept, evaluations = weakref.WeakSet(), 0

        def pack(x):
            saved = Kept(x)
            kept.add(saved)
            return saved

        def energy(q, p):
            nonlocal evaluations
            evaluations += 1
            return (p.square() * (1 + q.square()) / 2 - torch.cos(q)).sum(-1)

        q, p = start(3)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.x):
            end = METHODS[name].step(Hamiltonian(energy), q.requires_grad_(), p, h)
        sizes.append(sum(saved.x.numel() for saved in kept))
        sweeps.append(evaluations)
        torch.autograd.grad(end[0].sum(), q)
    assert sweeps[1] >= sweeps[0] + 5
    assert sizes[0] == sizes[1] > 0


# --- The solver -------------------------------------------------------------------------------


def test_slow_contraction_is_sped_up_where_rows_are_alone():
    def equations(z, dt):
        return Equations(lambda x: dt * torch.sin(x), lambda k: z + k)

    z = torch.linspace(0.1, 0.6, 5, dtype=F64)[:, None]
    fast = solve_fixed_point("here", equations, z, 0.8, z, rows_alone=True)
    slow = solve_fixed_point("here", equations, z, 0.8, z)
    assert fast.iterations < slow.iterations / 2
    torch.testing.assert_close(fast.k, slow.k, rtol=0, atol=1e-14)
    residual = fast.k - 0.8 * torch.sin(z + fast.k)
    assert residual.abs().max() < 3e-16


def test_what_does_not_settle_says_so_with_residual_and_iterations():
    def equations(z, dt):
        return Equations(lambda x: -dt * x, lambda k: z + k)

    for dt in (3.0, torch.tensor(3.0, dtype=F64)):
        with pytest.raises(ConvergenceError, match="here: after 100 sweeps of .* dt = 3") as info:
            solve_fixed_point("here", equations, torch.ones(2, 1, dtype=F64), dt, torch.ones(2, 1))
        assert info.value.iterations == 100
        assert info.value.residual > 1
    q, p = start()
    for name in ("generalized_leapfrog", "semiexplicit2", "gonzalez", "avf"):
        with pytest.raises(ConvergenceError, match=f"{name}, between steps 0 and 1: .*smaller dt"):
            integrate(COUPLED, q * 20, p * 20, dt=1.0, steps=2, method=name)


@pytest.mark.parametrize("ratio", [1.0, -1.7, 0.4])
def test_guess_extrapolates_to_steps_of_another_length(ratio):
    tableau = gauss_legendre(3)

    def field(z):
        return torch.cat(COUPLED.field(z[..., :2], z[..., 2:]), -1)

    z = torch.cat(start(4), -1)
    first = solve_stages(field, z, 0.05, tableau)
    z = z + first.increment
    cold = solve_stages(field, z, 0.05 * ratio, tableau)
    warm = solve_stages(field, z, 0.05 * ratio, tableau, guess=first, ratio=ratio)
    assert warm.iterations < cold.iterations
    torch.testing.assert_close(warm.increment, cold.increment, rtol=0, atol=2e-16)


# --- Compositions -----------------------------------------------------------------------------


def test_a_composition_carries_the_memory_of_its_base():
    q, p = start(3)
    for name in ("generalized_leapfrog4", "tao4", "gonzalez4"):
        whole = integrate(COUPLED, q, p, dt=0.1, steps=6, method=name, save_every=6)
        parts = integrate(COUPLED, q, p, dt=0.1, steps=6, method=name)
        torch.testing.assert_close(whole.q[-1], parts.q[-1], rtol=0, atol=1e-15)
        torch.testing.assert_close(whole.p[-1], parts.p[-1], rtol=0, atol=1e-15)


def test_a_composed_leapfrog_is_the_splitting_of_these_weights():
    q, p = torch.tensor([1.0], dtype=F64), torch.tensor([0.5], dtype=F64)
    method = compose(METHODS["leapfrog"], "suzuki4")
    assert method.explicit
    assert method.symplectic
    for found, expected in zip(
        method.step(PENDULUM, q, p, 0.1), METHODS["suzuki4"].step(PENDULUM, q, p, 0.1), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-16)
    with pytest.raises(ValueError, match="'gauss4'.*'suzuki4'|gauss4.*suzuki4"):
        compose(METHODS["leapfrog"], "gauss4")
    with pytest.raises(ValueError, match="gauss4 has order 4, expected .* order 2"):
        compose(METHODS["gauss4"], "suzuki4")
