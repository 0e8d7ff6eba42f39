"""Structure that methods keep: the symplectic form, volume, reversibility, invariants."""

import math

import pytest
import torch
from integrator_cases import (
    COUPLED,
    F64,
    KEPLER,
    OSCILLATOR,
    SYMMETRIC,
    SYMPLECTIC,
    hardest,
    perihelion,
    solar_system,
    start,
)
from torch import nn

from darboux.integrators import (
    METHODS,
    Hamiltonian,
    Separable,
    VectorField,
    audit,
    catalogue,
    integrate,
)

BASELINES = ["euler", "midpoint", "heun2", "rk4"]


@pytest.mark.parametrize("method", SYMPLECTIC, ids=lambda m: m.name)
def test_symplectic_and_volume_preserving(method):
    z = torch.cat(start(5), -1)
    step = audit.step_map(hardest(method), method, 0.1)
    bound = 1e-12 if method.explicit else 1e-11
    assert audit.check_symplectic(step, z, atol=bound) <= bound
    assert audit.volume_defect(step, z).max() <= bound


@pytest.mark.parametrize("name", BASELINES)
def test_runge_kutta_is_found_not_symplectic(name):
    z = torch.cat(start(5), -1)
    step = audit.step_map(COUPLED, name, 0.1)
    assert audit.symplecticity_defect(step, z).min() > 1e-8
    with pytest.raises(RuntimeError, match="check_symplectic"):
        audit.check_symplectic(step, z)


@pytest.mark.parametrize("name", ["leapfrog", "bm6", "gauss6"])
def test_a_learned_energy_is_moved_symplectically(name):
    torch.manual_seed(3)

    def net(width):
        layers = nn.Sequential(nn.Linear(width, 16), nn.Tanh(), nn.Linear(16, 1)).double()
        return lambda x: layers(x)[..., 0]

    separable = Separable(net(2), net(2))
    energy = net(4)
    coupled = Hamiltonian(lambda q, p: energy(torch.cat([q, p], -1)))
    system = coupled if name == "gauss6" else separable
    step = audit.step_map(system, name, 0.1)
    audit.check_symplectic(step, torch.cat(start(4), -1), atol=1e-12)


def test_composed_map_stays_symplectic_over_many_steps():
    method = METHODS["bm4"]

    def flow(z):
        q, p, _ = method.advance(KEPLER, z[..., :2], z[..., 2:], 0.02, 300, None)
        return torch.cat([q, p], -1)

    audit.check_symplectic(flow, torch.cat(perihelion(0.3)), atol=1e-10)


@pytest.mark.parametrize("method", SYMMETRIC, ids=lambda m: m.name)
def test_symmetric_methods_run_back(method):
    q, p = start(5)
    assert audit.reversibility_defect(hardest(method), method, q, p, dt=0.1, steps=4) < 1e-13


@pytest.mark.parametrize("name", ["symplectic_euler", "ruth3", "rk4"])
def test_other_methods_do_not_run_back(name):
    q, p = start(5)
    method = METHODS[name]
    assert audit.reversibility_defect(hardest(method), method, q, p, dt=0.1) > 1e-8


def test_adjoint_of_symplectic_euler_undoes_it():
    q, p = start(5)
    system = hardest(METHODS["leapfrog"])
    there = METHODS["symplectic_euler"].step(system, q, p, 0.1)
    back = METHODS["symplectic_euler_adjoint"].step(system, *there, -0.1)
    torch.testing.assert_close(back, (q, p), rtol=0, atol=1e-15)


@pytest.mark.parametrize("h", [0.1, 1.0, 1.9])
def test_leapfrog_keeps_its_modified_oscillator_energy(h):
    q, p = torch.tensor([1.0], dtype=F64), torch.tensor([0.5], dtype=F64)
    run = integrate(OSCILLATOR, q, p, dt=h, steps=10_000, save_every=7)
    invariant = run.p**2 + (1 - h * h / 4) * run.q**2
    assert (invariant / invariant[0] - 1).abs().max() < 1e-12


def test_symplectic_euler_keeps_its_modified_oscillator_energy():
    q, p = torch.tensor([1.0], dtype=F64), torch.tensor([0.5], dtype=F64)
    run = integrate(OSCILLATOR, q, p, dt=0.3, steps=10_000, method="symplectic_euler", save_every=7)
    invariant = run.p**2 + run.q**2 - 0.3 * run.p * run.q
    assert (invariant / invariant[0] - 1).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["implicit_midpoint", "gauss4", "gauss10"])
def test_gauss_keeps_quadratic_invariants_of_any_system(name):
    # A rigid body: angular momentum and energy.
    inertia = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    body = VectorField(lambda m: torch.linalg.cross(m, m / inertia))
    m = torch.tensor([[0.3, 1.0, -0.5], [1.0, 0.01, 0.2]], dtype=F64)
    run = integrate(body, m, dt=0.2, steps=500, method=name)
    for weight in (torch.ones(3, dtype=F64), 1 / inertia):
        invariant = (run.q.square() * weight).sum(-1)
        assert (invariant / invariant[0] - 1).abs().max() < 1e-13


@pytest.mark.parametrize(
    ("name", "steps", "expected"),
    [  # largest |dE/E| on Kepler with e = 0.6, steps per orbit, by an independent code
        ("symplectic_euler", 200, 1.07e-1),
        ("leapfrog", 200, 7.352e-3),
        ("forest_ruth", 200, 3.911e-5),
        ("bm4_rkn", 100, 1.376e-7),
        ("kahan_li8", 80, 7.871e-9),
    ],
)
def test_kepler_energy_error_is_the_known_one_and_bounded(name, steps, expected):
    q, p = perihelion(0.6)
    run = integrate(KEPLER, q, p, dt=2 * math.pi / steps, steps=40 * steps, method=name)
    energy = KEPLER.energy(run.q, run.p)
    error = (energy / energy[0] - 1).abs()
    assert float(error.max()) == pytest.approx(expected, rel=0.01)
    assert error[-10 * steps :].max() <= error[: 10 * steps].max() * 1.05
    momentum = run.q[:, 0] * run.p[:, 1] - run.q[:, 1] * run.p[:, 0]
    assert (momentum / momentum[0] - 1).abs().max() < 3e-14


@pytest.mark.parametrize(
    ("name", "h", "expected"),
    [("symplectic_euler", 100.0, 2.527e-2), ("leapfrog", 200.0, 1.958e-3)],
)
def test_outer_solar_system(name, h, expected):
    # Hairer, Lubich & Wanner (2006), figure I.2.4: 200 000 days.
    system, q, p = solar_system()
    run = integrate(system, q, p, dt=h, steps=int(2e5 / h), method=name)
    energy = system.energy(run.q, run.p)
    assert float((energy / energy[0] - 1).abs().max()) == pytest.approx(expected, rel=2e-3)
    total = run.p.sum(1)
    assert (total - total[0]).abs().max() < 1e-15
    momentum = torch.linalg.cross(run.q, run.p).sum(1)
    assert (momentum - momentum[0]).norm(dim=-1).max() / momentum[0].norm() < 1e-12


def test_coupled_bodies_are_audited_as_one_system():
    system, q, p = solar_system()
    rows = audit.report(system, q, p, dt=50.0, steps=40, methods=["leapfrog", "gauss4", "rk4"])
    # Momenta here are tiny and positions large: the defect is relative to neither.
    assert rows["leapfrog"].symplecticity < 1e-6
    assert rows["gauss4"].volume < 1e-11
    assert rows["leapfrog"].volume < 1e-11 < rows["rk4"].volume


TORUS = 2.0  # radius of the centre line; the tube has radius 1


def torus_energy(q, p):
    across = TORUS + torch.cos(q[..., 0])
    return (p[..., 0].square() + (p[..., 1] / across).square()) / 2


def torus_field(q, p):
    across = TORUS + torch.cos(q[..., 0])
    turn = p[..., 1] / across.square()
    force = -turn * p[..., 1] / across * torch.sin(q[..., 0])
    return torch.stack([p[..., 0], turn], -1), torch.stack([force, torch.zeros_like(force)], -1)


def test_geodesics_of_a_torus_keep_energy_without_drift():
    # Thousands of turns of unwrapped angles: round-off of q must not reach the energy.
    system = Hamiltonian(torus_energy, torus_field)
    generator = torch.Generator().manual_seed(0)
    q = 6 * torch.rand(8, 2, generator=generator, dtype=F64)
    p = torch.randn(8, 2, generator=generator, dtype=F64)
    p = p / (2 * torus_energy(q, p)).sqrt()[:, None]
    run = integrate(system, q, p, dt=0.03, steps=4000, method="gauss6", save_every=4)
    drift = audit.energy_drift(system, run)
    assert drift.error.max() < 2e-13
    assert (drift.slope * run.t[-1]).abs().max() < 3e-15
    clairaut = run.p[..., 1]
    assert (clairaut - clairaut[0]).abs().max() < 1e-15


def lax_spectrum(q, p):
    """Return the eigenvalues of Flaschka's matrix: the invariants of the periodic Toda lattice."""
    off = torch.exp((q - q.roll(-1, -1)) / 2) / 2
    lower = torch.diag_embed(off[..., :-1], -1)
    lower[..., -1, 0] = lower[..., -1, 0] + off[..., -1]
    return torch.linalg.eigvalsh(torch.diag_embed(p / 2) + lower + lower.mT)


def test_toda_lattice_stays_isospectral():
    # The bounds, and the first eigenvalues, are those of an independent code.
    q, p = torch.zeros(3, dtype=F64), torch.tensor([1.5, -0.5, -1.0], dtype=F64)
    known = torch.tensor([-0.89675787, -0.31606138, 1.21281925], dtype=F64)
    assert (lax_spectrum(q, p) - known).abs().max() < 1e-8
    worst = []
    for h, expected in ((0.05, 5.0e-4), (0.025, 1.25e-4)):
        run = integrate(catalogue.toda(), q, p, dt=h, steps=round(200 / h))
        error = (lax_spectrum(run.q, run.p) - known).abs().amax(1)
        worst.append(float(error.max()))
        assert worst[-1] == pytest.approx(expected, rel=0.1)
        assert error[-len(error) // 4 :].max() < 1.05 * error[: len(error) // 4].max()
    assert math.log2(worst[0] / worst[1]) == pytest.approx(2, abs=0.05)
