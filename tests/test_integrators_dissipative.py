"""Systems that lose energy lose it exactly: friction, contact, noise."""

import math

import numpy as np
import pytest
import torch
from integrator_cases import F64, KEPLER, OSCILLATOR, SPLITTINGS, perihelion, rocking, start
from scipy.linalg import solve_discrete_lyapunov
from scipy.special import gamma as factorial, jv
from torch import nn

from darboux._autodiff import jacobian
from darboux._checks import ConvergenceError
from darboux.integrators import (
    METHODS,
    Hamiltonian,
    Separable,
    Split,
    audit,
    contact,
    damped,
    integrate,
    langevin,
    nesterov,
)

PENDULUM = Separable(rocking)
TWO_PARTS = [m.name for m in SPLITTINGS if not m.rkn]
SYMMETRIC_ROWS = ["leapfrog", "yoshida4", "bm6", "kahan_li8"]


def jacobian_of(system, name, z, d, dt, shift=0.0):
    """Return the Jacobian of one step on states packed as ``q (d)``, then ``p``."""

    def step(z):
        q, p = system.lift(z[..., :d], z[..., d:], shift)
        q, p, _ = system.lower(*METHODS[name].step(system, q, p, dt))
        return torch.cat([q, p], -1)

    return jacobian(step, z)[1]


def conformal_defect(j, factor):
    d = j.shape[-1] // 2
    omega = torch.zeros(2 * d, 2 * d, dtype=F64)
    omega[:d, d:], omega[d:, :d] = torch.eye(d), -torch.eye(d)
    return (j.mT @ omega @ j - factor * omega).abs().max()


# --- Friction -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TWO_PARTS)
def test_friction_scales_the_symplectic_form_exactly(name):
    gamma, h = 0.7, 0.1
    z = torch.cat(start(4), -1)
    j = jacobian_of(damped(PENDULUM, gamma), name, z, 2, h)
    assert conformal_defect(j, math.exp(-gamma * h)) < 1e-12
    assert (torch.linalg.det(j) / math.exp(-2 * gamma * h) - 1).abs().max() < 1e-12


@pytest.mark.parametrize(("name", "h"), [("leapfrog", 0.02), ("bm4", 0.2), ("yoshida6", 0.1)])
@pytest.mark.parametrize("gamma", [0.3, 2.0, 5.0, 0.0])
def test_damped_oscillator_has_its_closed_form(name, h, gamma):
    def exact(t):  # under-, critically and over-damped, from q = 1, p = 0
        half, root = gamma / 2, np.emath.sqrt(1 - gamma**2 / 4)
        ratio = np.sin(root * t) / root if root else t
        return (np.exp(-half * t) * (np.cos(root * t) + half * ratio)).real

    one = torch.ones(1, dtype=F64)
    errors = []
    for dt in (h, h / 2):
        steps = round(4 / dt)
        run = integrate(damped(OSCILLATOR, gamma), one, 0 * one, dt=dt, steps=steps, method=name)
        errors.append(np.abs(run.q[:, 0].numpy() - exact(run.t.numpy())).max())
    assert errors[0] < 2e-3
    assert math.log2(errors[0] / errors[1]) == pytest.approx(METHODS[name].order, abs=0.25)


def test_symplectic_euler_with_friction_is_the_heavy_ball():
    gamma, h = 0.4, 0.3
    run = integrate(damped(PENDULUM, gamma), *start(3), dt=h, steps=50, method="symplectic_euler")
    momentum, rate = math.exp(-gamma * h), h * (1 - math.exp(-gamma * h)) / gamma
    x, before = run.q[1:-1], run.q[:-2]
    expected = x + momentum * (x - before) + rate * PENDULUM.force(x)
    torch.testing.assert_close(run.q[2:], expected, rtol=0, atol=1e-14)


def test_nesterov_iteration_is_not_conformally_symplectic():
    momentum, rate = 0.9, 0.05

    def step(z, ahead):
        x, v = z[..., :2], momentum * z[..., 2:]
        v = v + rate * PENDULUM.force(x + ahead * v)
        return torch.cat([x + v, v], -1)

    z = torch.cat(start(4), -1)
    heavy = jacobian(lambda z: step(z, 0.0), z)[1]
    assert conformal_defect(heavy, momentum) < 1e-15
    accelerated = jacobian(lambda z: step(z, 1.0), z)[1]
    best = torch.linalg.det(accelerated).sqrt()[:, None, None]  # the only factor that could be
    assert conformal_defect(accelerated, best) > 1e-3


@pytest.mark.parametrize("name", ["leapfrog", "bm4", "kahan_li8"])
def test_vanishing_friction_scales_the_symplectic_form_exactly(name):
    r, t0, h = 3.5, 0.8, 0.1
    j = jacobian_of(nesterov(PENDULUM, r), name, torch.cat(start(4), -1), 2, h, t0)
    assert conformal_defect(j, (t0 / (t0 + h)) ** r) < 1e-12


@pytest.mark.parametrize("r", [3.0, 4.5])
def test_accelerated_descent_of_a_parabola_is_a_bessel_function(r):
    # Su, Boyd & Candes (2016), eq. 10, in any order.
    nu = (r - 1) / 2

    def exact(t):
        return factorial(nu + 1) * (2 / t) ** nu * jv(nu, t)

    def slope(t):
        return -factorial(nu + 1) * (2 / t) ** nu * jv(nu + 1, t)

    q, p = (torch.tensor([f(1.0)], dtype=F64) for f in (exact, slope))
    errors = []
    for steps in (40, 80):
        run = integrate(
            nesterov(OSCILLATOR, r), q, p, dt=8 / steps, steps=steps, t0=1.0, method="bm4"
        )
        assert run.q.shape == (steps + 1, 1)
        assert run.t[0] == 1
        errors.append(np.abs(run.q[:, 0].numpy() - exact(run.t.numpy())).max())
    assert errors[0] < 1e-5
    assert math.log2(errors[0] / errors[1]) == pytest.approx(4, abs=0.2)


def test_accelerated_descent_starts_after_zero():
    with pytest.raises(ValueError, match="t0 is 0.0, expected t0 > 0"):
        integrate(nesterov(OSCILLATOR), *start(), dt=0.1, steps=1)
    with pytest.raises(ConvergenceError, match="NaN"):
        integrate(nesterov(OSCILLATOR), *start(), dt=-0.1, steps=3, t0=0.2)


# --- Contact ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TWO_PARTS)
def test_contact_form_is_scaled_exactly(name):
    gamma, h = 0.7, 0.1
    system = contact(PENDULUM, gamma)
    q, p = start(4)
    p = torch.cat([p, torch.linspace(-1, 1, 4, dtype=F64)[:, None]], -1)
    j = jacobian_of(system, name, torch.cat([q, p], -1), 2, h)
    end = METHODS[name].step(system, q, p, h)[1]

    def form(p):  # the components of ds - p dq
        return torch.cat(
            [-p[..., :2], torch.zeros_like(p[..., :2]), torch.ones_like(p[..., 2:])], -1
        )

    pulled = (form(end)[:, None] @ j)[:, 0]
    assert (pulled - math.exp(-gamma * h) * form(p)).abs().max() < 1e-12


@pytest.mark.parametrize("kinetic", [None, lambda p: (1 + p.square().sum(-1)).sqrt()])
def test_contact_motion_is_the_damped_one_and_its_energy_falls(kinetic):
    gamma, system = 0.4, Separable(rocking, kinetic)
    q, p = start(3)
    with_action = torch.cat([p, torch.zeros(3, 1, dtype=F64)], -1)
    run = integrate(contact(system, gamma), q, with_action, dt=0.05, steps=100, method="bm6")
    plain = integrate(damped(system, gamma), q, p, dt=0.05, steps=100, method="bm6")
    torch.testing.assert_close((run.q, run.p[..., :2]), (plain.q, plain.p), rtol=0, atol=1e-14)
    energy = contact(system, gamma).energy(run.q, run.p)
    expected = energy[0] * torch.exp(-gamma * run.t)[:, None]
    torch.testing.assert_close(energy, expected, rtol=0, atol=1e-10)


# --- Noise --------------------------------------------------------------------------------------


def gaussian_step(scheme, h, friction=1.0):
    """Return the matrix of one step on the oscillator and that of its noises, from their draws."""

    def step(q, p, temperature, seed=0):
        generator = torch.Generator().manual_seed(seed)
        system = langevin(OSCILLATOR, friction, temperature, scheme=scheme, generator=generator)
        q, p = METHODS["leapfrog"].step(system, q, p, h)
        return torch.cat([q, p], -1)

    eye = torch.eye(2, dtype=F64)
    matrix = step(eye[:, :1], eye[:, 1:], 0.0).T
    zero = torch.zeros(16, 1, dtype=F64)
    generator = torch.Generator().manual_seed(5)
    draws = [torch.randn(16, 1, generator=generator, dtype=F64) for _ in range(scheme.count("O"))]
    noise = torch.linalg.lstsq(torch.cat(draws, -1), step(zero, zero, 1.0, seed=5))
    assert len(noise.solution) == scheme.count("O")
    return matrix.numpy(), noise.solution.T.numpy()


@pytest.mark.parametrize("h", [0.5, 1.5])
@pytest.mark.parametrize(
    ("scheme", "q_error", "p_error"),
    [  # <q^2> - 1 and <p^2> - 1 by the squared step
        ("BAOAB", lambda s: 0, lambda s: -s / 4),
        ("ABOBA", lambda s: 0, lambda s: s / 4 / (1 - s / 4)),
        ("OBABO", lambda s: s / 4 / (1 - s / 4), lambda s: 0),
        ("OABAO", lambda s: -s / 4, lambda s: 0),
    ],
)
def test_stationary_covariance_of_each_scheme(scheme, q_error, p_error, h):
    matrix, noise = gaussian_step(scheme, h)
    covariance = solve_discrete_lyapunov(matrix, noise @ noise.T)
    expected = np.diag([1 + q_error(h * h), 1 + p_error(h * h)])
    np.testing.assert_allclose(covariance, expected, atol=2e-14)


def test_friction_and_noise_alone_are_the_exact_process():
    free = Separable(force=torch.zeros_like, mass=2.0)
    generator = torch.Generator().manual_seed(0)
    system = langevin(free, 0.8, 1.5, generator=generator)
    p = torch.full((400_000, 1), 3.0, dtype=F64)
    end = METHODS["leapfrog"].step(system, p, p, 0.6)[1]
    decay = math.exp(-0.48)
    assert float(end.mean()) == pytest.approx(3 * decay, abs=0.01)
    assert float(end.var()) == pytest.approx(1.5 * 2 * (1 - decay**2), rel=0.01)


def test_samples_have_the_temperature_and_repeat_under_their_seed():
    well = Separable(lambda q: (q**4 / 4 + q**2 / 2).sum(-1))

    def sample(seed):
        generator = torch.Generator().manual_seed(seed)
        system = langevin(well, 1.0, 0.5, generator=generator)
        q, p = (torch.zeros(4000, 2, dtype=F64) for _ in range(2))
        return integrate(system, q, p, dt=0.2, steps=150, save_every=30)

    run, again, other = sample(1), sample(1), sample(2)
    assert (run.q == again.q).all()
    assert (run.q != other.q).any()
    # The virial <q . grad V> = 2 kT is exact in no discretisation, but nearly so.
    virial = -(run.q * well.force(run.q)).sum(-1)[2:].mean()
    assert float(virial) == pytest.approx(1.0, abs=0.03)
    assert float(run.p[2:].square().mean()) == pytest.approx(0.5, rel=0.03)


def test_noise_refuses_to_run_back():
    system = langevin(OSCILLATOR, 1.0, 1.0)
    with pytest.raises(ValueError, match="positive weights"):
        integrate(system, *start(), dt=0.1, steps=1, method="yoshida4")
    with pytest.raises(ValueError, match="noise does not run back"):
        integrate(system, *start(), dt=-0.1, steps=1)


# --- All ----------------------------------------------------------------------------------------

KINDS = {
    "damped": (lambda system: damped(system, 0.3), 0),
    "contact": (lambda system: contact(system, 0.3), 1),
    "nesterov": (lambda system: nesterov(system, 0.3), 0),
    "langevin": (lambda system: langevin(system, 0.3, 0.0), 0),
}


def state(kind, *batch, dtype=F64):
    q, p = start(*batch, dtype=dtype)
    return q, torch.cat([p, p[..., : KINDS[kind][1]]], -1)


@pytest.mark.parametrize("kind", KINDS)
def test_given_fields_are_those_of_the_flows(kind):
    system = KINDS[kind][0](PENDULUM)
    q, p = system.lift(*state(kind, 3), 0.7)
    torch.testing.assert_close(system.field(q, p), Split.field(system, q, p), rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,)])
def test_shapes_and_single_precision(kind, batch):
    system = KINDS[kind][0](PENDULUM)
    run = integrate(system, *state(kind, *batch), dt=0.1, steps=4, t0=1.0)
    assert run.t.shape == (5,)
    assert run.q.shape == (5, *batch, 2)
    assert run.p.shape == (5, *batch, 2 + KINDS[kind][1])
    single = integrate(system, *state(kind, *batch, dtype=torch.float32), dt=0.1, steps=4, t0=1.0)
    assert single.q.dtype == single.p.dtype == single.t.dtype == torch.float32
    torch.testing.assert_close(single.q.double(), run.q, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_of_a_run(kind):
    make, _ = KINDS[kind]
    q, p = state(kind, 3)

    def end(q, gamma, dt):
        parts = {"damped": damped, "contact": contact, "nesterov": nesterov}
        if kind == "langevin":
            system = langevin(PENDULUM, gamma, 0.0)
        else:
            system = parts[kind](PENDULUM, gamma)
        return integrate(system, q, p, dt=dt, steps=3, t0=1.0).q[-1]

    gamma, dt = torch.tensor(0.3, dtype=F64), torch.tensor(0.1, dtype=F64)
    inputs = tuple(x.clone().requires_grad_() for x in (q, gamma, dt))
    assert torch.autograd.gradcheck(end, inputs, check_forward_ad=True)
    alone = torch.func.vmap(
        lambda q, p: integrate(make(PENDULUM), q, p, dt=0.1, steps=3, t0=1.0).q[-1],
        randomness="different",
    )(q, p)
    torch.testing.assert_close(alone, end(q, 0.3, 0.1), rtol=0, atol=1e-14)


def test_a_learned_friction_gets_its_gradient():
    gamma = nn.Parameter(torch.tensor(0.2, dtype=F64))
    run = integrate(damped(PENDULUM, gamma), *start(3), dt=0.1, steps=5)
    run.q[-1].sum().backward()
    assert gamma.grad is not None
    assert gamma.grad != 0


def test_constructors_refuse_what_they_cannot_keep():
    moving = Separable(lambda q, t: q[..., 0], time=True)
    for make in (damped, contact, nesterov, lambda s, g: langevin(s, g, 1.0)):
        with pytest.raises(TypeError, match="expected a Separable"):
            make(Hamiltonian(lambda q, p: q[..., 0]), 1.0)  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match="depends on the time"):
            make(moving, 1.0)
        with pytest.raises(ValueError, match=r"shape \(2,\), expected a number"):
            make(PENDULUM, torch.ones(2))
    with pytest.raises(ValueError, match="only a force"):
        contact(Separable(force=torch.neg), 1.0)
    with pytest.raises(ValueError, match="temperature is -1.0"):
        langevin(PENDULUM, 1.0, -1.0)
    with pytest.raises(ValueError, match="scheme is 'BAOA'"):
        langevin(PENDULUM, 1.0, 1.0, scheme="BAOA")
    with pytest.raises(ValueError, match="kinetic energy is given"):
        langevin(Separable(rocking, rocking), 1.0, 1.0)
    with pytest.raises(ValueError, match="bm4_rkn needs a kinetic energy"):
        integrate(damped(PENDULUM, 0.1), *start(), dt=0.1, steps=1, method="bm4_rkn")


def test_friction_brings_a_comet_down():
    q, p = perihelion(0.3)
    run = integrate(damped(KEPLER, 0.01), q, p, dt=0.02, steps=2000, method="bm4")
    momentum = run.q[:, 0] * run.p[:, 1] - run.q[:, 1] * run.p[:, 0]
    decay = momentum / momentum[0] / torch.exp(-0.01 * run.t)
    assert (decay - 1).abs().max() < 1e-12
    assert audit.energy_drift(damped(KEPLER, 0.01), run).error > 0.1
