"""Steps that follow the motion, on Kepler orbits of high eccentricity."""

import math
from itertools import pairwise

import pytest
import torch
from integrator_cases import F64, KEPLER, OSCILLATOR, perihelion, solve
from scipy.optimize import brentq

from darboux._autodiff import jacobian
from darboux.integrators import (
    METHODS,
    Hamiltonian,
    Separable,
    Split,
    integrate,
    logarithmic,
    step_controlled,
)


def monitor(q):
    return q.square().sum(-1) ** 0.75  # r^(3/2)


CONTROLLED = step_controlled(KEPLER, monitor)
LOGARITHMIC = logarithmic(KEPLER)
KINDS = {"controlled": CONTROLLED, "logarithmic": LOGARITHMIC}


def energy_errors(run):
    """Return the largest error of the energy in each quarter of a run."""
    energy = KEPLER.energy(run.q, run.p)
    return [float(x.max()) for x in (energy - energy[0]).abs()[1:].chunk(4)]


def steps_per_orbit(run):
    return (len(run.t) - 1) / (float(run.t[-1]) / (2 * math.pi))


def comet(dtype=F64):
    return tuple(x.to(dtype) for x in perihelion(0.9))


# --- The figures, from an independent code ------------------------------------------------------


def test_constant_steps_lose_the_comet():
    run = integrate(KEPLER, *comet(), dt=2 * math.pi / 1000, steps=8000)
    assert max(energy_errors(run)) == pytest.approx(5.0e-2, rel=0.01)


def test_steps_chosen_from_the_state_drift():
    (q, p), energies, t = comet(), [], 0.0
    leapfrog = METHODS["leapfrog"]
    while t < 2 * math.pi * 16:
        h = 0.02 * float(monitor(q))
        q, p, _ = leapfrog.advance(KEPLER, q, p, h, 1, None)
        t += h
        energies.append(float(KEPLER.energy(q, p)))
    quarters = [energies[(k + 1) * len(energies) // 4 - 1] for k in range(4)]
    drift = [abs(b - a) for a, b in pairwise(quarters)]
    assert min(drift) > 0.5 * max(drift) > 5e-5


def test_controlled_steps_keep_the_energy_bounded_and_run_back():
    run = integrate(CONTROLLED, *comet(), dt=0.01976, steps=419 * 4)
    assert run.t.shape == (419 * 4 + 1,)
    assert steps_per_orbit(run) == pytest.approx(419, rel=0.005)
    errors = energy_errors(run)
    assert max(errors) == pytest.approx(7.4e-4, rel=0.03)
    assert max(errors) < 1.05 * min(errors)
    # Reversed, with the density it arrived with.
    q, p = CONTROLLED.lift(*perihelion(0.9), 0.0)
    leapfrog = METHODS["leapfrog"]
    there = leapfrog.advance(CONTROLLED, q, p, 0.01976, 600, None)
    flip = torch.tensor([-1.0, -1.0, 1.0], dtype=F64)
    back = leapfrog.advance(CONTROLLED, there[0], there[1] * flip, 0.01976, 600, None)
    torch.testing.assert_close(back[0][:2], q[:2], rtol=0, atol=1e-11)
    torch.testing.assert_close(back[1] * flip, p, rtol=0, atol=1e-10)


def test_logarithmic_steps_keep_the_orbit_itself():
    run = integrate(LOGARITHMIC, *comet(), dt=2 * math.pi / 495, steps=495 * 8)
    assert steps_per_orbit(run) == pytest.approx(495, rel=0.001)
    assert max(energy_errors(run)) < 1e-12
    # The points lie on the ellipse: r = 1 - e^2 - e x.
    distance = run.q.square().sum(-1).sqrt()
    assert (distance - (1 - 0.81 - 0.9 * run.q[:, 0])).abs().max() < 1e-12
    momentum = run.q[:, 0] * run.p[:, 1] - run.q[:, 1] * run.p[:, 0]
    assert (momentum / momentum[0] - 1).abs().max() < 1e-13


# --- Order --------------------------------------------------------------------------------------


def position_at(times):
    """Return the comet at ``times``, by Kepler's equation."""
    rows = []
    for t in times.flatten().tolist():
        u = brentq(lambda u, t=t: u - 0.9 * math.sin(u) - t, t - 1, t + 1, xtol=1e-15)
        assert isinstance(u, float)
        rows.append([math.cos(u) - 0.9, math.sqrt(0.19) * math.sin(u)])
    return torch.tensor(rows, dtype=F64)


@pytest.mark.parametrize(
    ("kind", "name", "steps"),
    [
        ("controlled", "leapfrog", 400),
        ("controlled", "suzuki4", 100),
        ("controlled", "kahan_li6", 100),
        ("logarithmic", "leapfrog", 200),
        ("logarithmic", "position_leapfrog", 200),
        ("logarithmic", "bm4", 50),
        ("logarithmic", "bm6", 50),
    ],
)
def test_order_against_the_equation_of_kepler(kind, name, steps):
    span = {"controlled": 9.0, "logarithmic": 6.0}[kind]
    errors = []
    for n in (steps, 2 * steps):
        run = integrate(KINDS[kind], *comet(), dt=span / n, steps=n, method=name)
        errors.append(float((run.q[-1] - position_at(run.t[-1:])[0]).norm()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(METHODS[name].order, abs=0.35)


def test_logarithmic_step_is_symplectic_in_time_and_energy():
    q, p = LOGARITHMIC.lift(*perihelion(0.9), 0.3)
    # (q, t) and (p, -E) are conjugate; the system carries E.
    sign = torch.tensor([1.0, 1.0, -1.0], dtype=F64)
    z = torch.cat([q, sign * p])

    def step(z):
        a, b = METHODS["bm4"].step(LOGARITHMIC, z[..., :3], sign * z[..., 3:], 0.1)
        return torch.cat([a, sign * b], -1)

    j = jacobian(step, z)[1]
    omega = torch.zeros(6, 6, dtype=F64)
    omega[:3, 3:], omega[3:, :3] = torch.eye(3), -torch.eye(3)
    assert (j.T @ omega @ j - omega).abs().max() < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_copies_keep_times_of_their_own(kind):
    q = torch.tensor([[0.5, 0.0], [0.1, 0.0]], dtype=F64)
    p = torch.tensor([[0.0, 1.7], [0.0, 4.0]], dtype=F64)
    run = integrate(KINDS[kind], q, p, dt=0.01, steps=60, t0=2.0, method="yoshida6")
    assert run.t.shape == (61, 2)
    assert (run.t[0] == 2).all()
    assert run.t[-1, 0] != run.t[-1, 1]
    for k in range(2):
        exact = solve(KEPLER, q[k], p[k], float(run.t[-1, k]) - 2)
        torch.testing.assert_close(
            torch.cat([run.q[-1, k], run.p[-1, k]]), exact, rtol=0, atol=1e-6
        )


# --- Shapes, derivatives, errors ----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,)])
def test_shapes_and_single_precision(kind, batch):
    q, p = (x.expand(*batch, 2) for x in comet())
    run = integrate(KINDS[kind], q, p, dt=0.05, steps=4)
    assert run.t.shape == (5, *batch)
    assert run.q.shape == run.p.shape == (5, *batch, 2)
    single = integrate(KINDS[kind], q.float(), p.float(), dt=0.05, steps=4)
    assert single.q.dtype == single.p.dtype == single.t.dtype == torch.float32
    torch.testing.assert_close(single.q.double(), run.q, rtol=0, atol=1e-5)
    torch.testing.assert_close(single.t.double(), run.t, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_of_state_and_time(kind):
    q, p = (x.expand(2, 2).clone() for x in comet())

    def end(q, p, dt):
        run = integrate(KINDS[kind], q, p, dt=dt, steps=3)
        return torch.cat([run.q[-1], run.t[-1][..., None]], -1)

    dt = torch.tensor(0.05, dtype=F64)
    directions = torch.ones_like(q), 0.3 * torch.ones_like(p), torch.ones_like(dt)
    forward = torch.func.jvp(end, (q, p, dt), directions)[1]
    a, b = (
        end(*(x + e * v for x, v in zip((q, p, dt), directions, strict=True)))
        for e in (1e-6, -1e-6)
    )
    torch.testing.assert_close(forward, (a - b) / 2e-6, rtol=1e-7, atol=1e-7)
    inputs = [x.requires_grad_() for x in (q, p, dt)]
    grads = torch.autograd.grad(end(*inputs).sum(), inputs)
    paired = torch.stack([(g * v).sum() for g, v in zip(grads, directions, strict=True)]).sum()
    torch.testing.assert_close(paired, forward.sum(), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        alone = torch.func.vmap(lambda q, p: end(q, p, dt))(q, p)
        torch.testing.assert_close(alone, end(q, p, dt), rtol=0, atol=1e-14)


def test_fields_are_those_of_the_flows():
    q, p = CONTROLLED.lift(*perihelion(0.9), 0.0)
    dq, dp = Split.field(CONTROLLED, q, p)
    torch.testing.assert_close(dq[:2], KEPLER.velocity(p[:2]) * 0.1**1.5, rtol=1e-14, atol=0)
    torch.testing.assert_close(dq[2], torch.tensor(0.1**1.5, dtype=F64), rtol=1e-14, atol=0)
    torch.testing.assert_close(dp[:2], KEPLER.force(q[:2]) * 0.1**1.5, rtol=1e-14, atol=0)


def test_constructors_refuse_what_they_cannot_move():
    moving = Separable(lambda q, t: q[..., 0], time=True)
    for make in (logarithmic, lambda system: step_controlled(system, monitor)):
        with pytest.raises(TypeError, match="expected a Separable"):
            make(Hamiltonian(lambda q, p: q[..., 0]))  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match="depends on the time"):
            make(moving)
    with pytest.raises(ValueError, match="only a force"):
        logarithmic(Separable(force=torch.neg))
    with pytest.raises(ValueError, match="potential is not negative"):
        integrate(logarithmic(OSCILLATOR), *comet(), dt=0.1, steps=1)
    with pytest.raises(ValueError, match="monitor is not positive"):
        integrate(step_controlled(KEPLER, lambda q: q[..., 1]), *comet(), dt=0.1, steps=1)
    with pytest.raises(ValueError, match=r"scalar of the state has shape \(2,\)"):
        integrate(step_controlled(KEPLER, lambda q: q + 1), *comet(), dt=0.1, steps=1)
    with pytest.raises(ValueError, match="alternates two parts"):
        integrate(CONTROLLED, *comet(), dt=0.1, steps=1, method="bm4")
