"""Discrete gradients keep the energy to round-off, and nothing else."""

import math

import pytest
import torch
from integrator_cases import COUPLED, F64, HENON_HEILES, PENDULUM, solar_system, start
from torch.func import jacfwd, jacrev

from darboux.integrators import (
    METHODS,
    Hamiltonian,
    Poisson,
    Separable,
    VectorField,
    audit,
    average_vector_field,
    integrate,
)

NAMES = ["gonzalez", "avf"]
COMPOSED = ["gonzalez4", "avf4"]


@pytest.mark.parametrize("name", NAMES)
def test_pendulum_energy_is_kept_to_round_off(name):
    # Swings: where the pendulum turns over, its growing angle rounds off more than that.
    q = torch.tensor([[2.0], [0.5], [2.5]], dtype=F64)
    p = torch.tensor([[0.3], [0.0], [0.3]], dtype=F64)
    run = integrate(PENDULUM, q, p, dt=0.2, steps=400, method=name, save_every=10)
    energy = PENDULUM.energy(run.q, run.p)
    assert (energy - energy[0]).abs().max() <= 1e-13
    midpoint = integrate(PENDULUM, q, p, dt=0.2, steps=100, method="implicit_midpoint")
    energy = PENDULUM.energy(midpoint.q, midpoint.p)
    assert (energy - energy[0]).abs().max() > 1e-4


@pytest.mark.parametrize("name", NAMES + COMPOSED)
def test_energy_is_kept_and_the_symplectic_form_is_not(name):
    method, (q, p) = METHODS[name], start(5)
    assert not method.symplectic
    run = integrate(COUPLED, q, p, dt=0.1, steps=30, method=name)
    energy = COUPLED.energy(run.q, run.p)
    assert (energy - energy[0]).abs().max() <= 1e-14
    step = audit.step_map(COUPLED, name, 0.1)
    assert audit.symplecticity_defect(step, torch.cat([q, p], -1)).max() > 1e-7
    step = audit.step_map(PENDULUM, name, 0.2)
    volume = audit.volume_defect(step, torch.cat([q, p], -1))
    assert volume.max() > (1e-6 if method.order == 2 else 1e-9)


def test_average_is_exact_for_polynomials_of_twice_as_many_points():
    # Henon-Heiles is cubic: two points keep it; a quintic they do not, three points do.
    q, p = torch.tensor([0.1, -0.2], dtype=F64), torch.tensor([0.3, 0.2], dtype=F64)
    quintic = Separable(lambda q: (q.pow(5) / 5 + q.square() / 2).sum(-1))
    for system, points, kept in ((HENON_HEILES, 2, True), (quintic, 2, False), (quintic, 3, True)):
        method = average_vector_field(points)
        run = integrate(system, q, p, dt=0.3, steps=50, method=method)
        energy = system.energy(run.q, run.p)
        assert bool((energy - energy[0]).abs().max() <= 1e-15) == kept
    # On a quadratic energy every discrete gradient here is the midpoint rule.
    oscillator = Hamiltonian(lambda q, p: (q.square() + p.square() + q * p).sum(-1) / 2)
    expected = METHODS["implicit_midpoint"].step(oscillator, q, p, 0.3)
    for name in NAMES:
        found = METHODS[name].step(oscillator, q, p, 0.3)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-16)


@pytest.mark.parametrize("name", NAMES)
def test_single_precision_keeps_the_energy_to_its_round_off(name):
    q, p = start(4, dtype=torch.float32)
    run = integrate(PENDULUM, q, p, dt=0.2, steps=100, method=name)
    energy = PENDULUM.energy(run.q, run.p)
    assert run.q.dtype == torch.float32
    assert (energy - energy[0]).abs().max() < 1e-5


# --- Where the step vanishes ------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_at_an_equilibrium_are_those_of_the_midpoint_rule(name):
    # z' = z there: the quotient is 0/0, and the linear part that of every symmetric method.
    def step(z):
        return torch.cat(METHODS[name].step(COUPLED, z[..., :2], z[..., 2:], 0.1), -1)

    def field(z):
        return torch.cat(COUPLED.field(z[..., :2], z[..., 2:]), -1)

    z = torch.zeros(4, dtype=F64)
    torch.testing.assert_close(step(z), z, rtol=0, atol=0)
    eye, a = torch.eye(4, dtype=F64), 0.1 * jacfwd(field)(z)
    expected = torch.linalg.solve(eye - a / 2, eye + a / 2)
    for found in (jacfwd(step)(z), jacrev(step)(z), torch.autograd.functional.jacobian(step, z)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)
    assert torch.func.hessian(lambda z: step(z).sin().sum())(z).isfinite().all()


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-5, 1e-7, 1e-12])
def test_slow_motion_settles_with_right_derivatives(size):
    # Near the upper equilibrium of a pendulum, its energy being of size 1.
    q = torch.tensor([math.pi - size], dtype=F64)
    p = torch.zeros(1, dtype=F64)
    found = METHODS["gonzalez"].step(PENDULUM, q, p, 0.1)
    expected = METHODS["avf"].step(PENDULUM, q, p, 0.1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    slopes = []
    for name in NAMES:
        x = q.clone().requires_grad_()
        slopes.append(torch.autograd.grad(METHODS[name].step(PENDULUM, x, p, 0.1)[1].sum(), x)[0])
    torch.testing.assert_close(slopes[0], slopes[1], rtol=0, atol=1e-5)


# --- Systems ----------------------------------------------------------------------------------

INERTIA = torch.tensor([1.0, 2.0, 3.0], dtype=F64)


def hat(m: torch.Tensor) -> torch.Tensor:
    """Return the matrix of ``v -> m x v``."""
    x, y, z = m.unbind(-1)
    o = torch.zeros_like(x)
    return torch.stack([o, -z, y, z, o, -x, -y, x, o], -1).unflatten(-1, (3, 3))


BODY = Poisson(lambda m: (m.square() / INERTIA).sum(-1) / 2, hat)
# Lotka and Volterra with B(z) = [[0, xy], [-xy, 0]].
LOTKA = Poisson(
    lambda z: (z - z.log()).sum(-1),
    lambda z: z.prod(-1)[..., None, None] * torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=F64),
)


def test_poisson_field_is_the_known_one():
    m = torch.tensor([[0.3, 1.0, -0.5], [1.0, 0.01, 0.2]], dtype=F64)
    expected = torch.linalg.cross(m, m / INERTIA)
    torch.testing.assert_close(BODY.field(m, m[..., :0])[0], expected, rtol=0, atol=1e-15)
    z = torch.tensor([0.7, 1.8], dtype=F64)
    field = LOTKA.field(z[:1], z[1:])
    torch.testing.assert_close(
        torch.cat(field), torch.stack([z[0] * (z[1] - 1), z[1] * (1 - z[0])])
    )


@pytest.mark.parametrize("name", NAMES)
def test_poisson_systems_keep_their_energy_at_order_two(name):
    z = torch.tensor([[0.7, 1.8], [1.2, 0.4]], dtype=F64)
    run = integrate(LOTKA, z, dt=0.1, steps=100, method=name)
    energy = LOTKA.energy(run.q, run.p)
    assert (energy - energy[0]).abs().max() < 1e-14
    exact = integrate(LOTKA, z, dt=0.05, steps=40, method="gauss8", save_every=40).q[-1]
    errors = [
        float((integrate(LOTKA, z, dt=2 / n, steps=n, method=name).q[-1] - exact).norm())
        for n in (20, 40)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.1)
    # The rigid body: energy and momentum are quadratic, and the midpoint rule keeps both.
    m = torch.tensor([0.3, 1.0, -0.5], dtype=F64)
    run = integrate(BODY, m, dt=0.2, steps=50, method=name)
    for invariant in (BODY.energy(run.q, run.p), run.q.square().sum(-1)):
        assert (invariant / invariant[0] - 1).abs().max() < 1e-14


def test_coupled_bodies_are_one_system():
    system, q, p = solar_system()
    run = integrate(system, q, p, dt=100.0, steps=20, method="avf")
    energy = system.energy(run.q, run.p)
    assert (energy / energy[0] - 1).abs().max() < 1e-14
    expected = integrate(system, q, p, dt=100.0, steps=20, method="gauss6").q[-1]
    assert (run.q[-1] - expected).abs().max() < 0.2


@pytest.mark.parametrize("name", ["gonzalez", "avf4"])
def test_systems_without_a_constant_energy_are_refused(name):
    q, p = start()
    driven = Hamiltonian(lambda q, p, t: (q * t[..., None]).sum(-1), time=True)
    for system, message in (
        (VectorField(lambda z: -z), "keeps the energy of a Hamiltonian.*VectorField: use 'gauss4'"),
        (driven, "depends on the time"),
        (Separable(force=torch.neg), "only a force"),
        (Separable(lambda q: q.sum(-1), velocity=torch.sinh), "only a force or a velocity"),
    ):
        with pytest.raises(ValueError, match=message):
            integrate(system, q, p, dt=0.1, steps=1, method=name)
