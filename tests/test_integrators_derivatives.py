"""Runs and steps differentiate right, in every mode, and vectorise."""

import math

import pytest
import torch
from integrator_cases import COUPLED, F64, GENERAL, KEPLER, hardest, perihelion, start
from torch import nn
from torch.func import jacfwd, jacrev, jvp, vjp, vmap

from darboux.integrators import (
    METHODS,
    Hamiltonian,
    Separable,
    VectorField,
    gauss_legendre,
    integrate,
    solve_stages,
)

FEW = ["leapfrog", "ruth3", "bm4", "rk4", "implicit_midpoint", "gauss4", "gauss8"]


def one_step(name, dt=0.1):
    method = METHODS[name]
    system = hardest(method)

    def step(z):
        return torch.cat(method.step(system, z[..., :2], z[..., 2:], dt), -1)

    return step


def state():
    return torch.cat(start(), -1)


def differences(f, x, h=2e-3):
    """Return the Jacobian by sixth-order differences."""
    columns = []
    for e in torch.eye(len(x), dtype=x.dtype) * h:
        one, two, three = (f(x + k * e) - f(x - k * e) for k in (1, 2, 3))
        columns.append((45 * one - 9 * two + three) / (60 * h))
    return torch.stack(columns, -1)


@pytest.mark.parametrize("name", FEW)
def test_first_derivatives_agree_with_differences_in_every_mode(name):
    step, z = one_step(name), state()
    expected = differences(step, z)
    tape = torch.autograd.functional.jacobian(step, z)
    for found in (jacrev(step)(z), jacfwd(step)(z), tape):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-11)


@pytest.mark.parametrize("name", ["bm4", "gauss4"])
def test_higher_derivatives_agree_with_differences_in_every_nesting(name):
    step, z = one_step(name), state()
    expected = differences(jacfwd(step), z)
    for outer, inner in ((jacfwd, jacfwd), (jacrev, jacrev), (jacrev, jacfwd), (jacfwd, jacrev)):
        torch.testing.assert_close(outer(inner(step))(z), expected, rtol=0, atol=5e-11)
    v = torch.tensor([0.3, -0.5, 0.7, 0.2], dtype=F64)

    def along(f):
        return lambda z: jvp(f, (z,), (v,))[1]

    twice = along(along(step))
    line = differences(lambda s: twice(z + s * v), torch.zeros(1, dtype=F64))[:, 0]
    torch.testing.assert_close(along(twice)(z), line, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["leapfrog", "gauss4"])
def test_gradcheck_twice(name):
    z = state().requires_grad_()
    assert torch.autograd.gradcheck(one_step(name), z)
    assert torch.autograd.gradgradcheck(one_step(name), z)


@pytest.mark.parametrize("name", FEW)
def test_vmap_gives_the_batch(name):
    step = one_step(name)
    z = torch.cat(start(6), -1)
    rows = torch.stack([step(x) for x in z])
    torch.testing.assert_close(step(z), rows, rtol=0, atol=1e-15)
    torch.testing.assert_close(vmap(step)(z), rows, rtol=0, atol=1e-15)
    torch.testing.assert_close(vmap(step, in_dims=1, out_dims=1)(z.T), rows.T, rtol=0, atol=1e-15)
    jacobians = torch.stack([jacrev(step)(x) for x in z])
    torch.testing.assert_close(vmap(jacrev(step))(z), jacobians, rtol=0, atol=1e-14)
    torch.testing.assert_close(vmap(jacfwd(step))(z), jacobians, rtol=0, atol=1e-14)


def test_backward_reaches_through_vmap():
    z = torch.cat(start(3), -1).requires_grad_()
    step = one_step("gauss4")
    (through,) = torch.autograd.grad(vmap(step)(z).sin().sum(), z)
    (plain,) = torch.autograd.grad(step(z).sin().sum(), z)
    torch.testing.assert_close(through, plain, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ["leapfrog", "rk4", "gauss6"])
def test_derivative_in_the_step_size_is_the_velocity(name):
    # A long run at dt = T/n ends at time T: its derivative in T is the field there.
    q, p = start()
    method = METHODS[name]

    def end(t):
        run = integrate(
            COUPLED if name != "leapfrog" else GENERAL, q, p, dt=t / 16, steps=16, method=method
        )
        return torch.cat([run.q[-1], run.p[-1]]), run.t[-1]

    t = torch.tensor(1.0, dtype=F64)
    found = jvp(end, (t,), (torch.ones_like(t),))
    (z, time), (dz, dtime) = found[0], found[1]
    assert time == 1
    assert dtime == 1
    system = COUPLED if name != "leapfrog" else GENERAL
    velocity = torch.cat(system.field(z[:2], z[2:]))
    torch.testing.assert_close(dz, velocity, rtol=0, atol=2e-2 if name == "leapfrog" else 1e-4)
    pull = vjp(lambda t: end(t)[0], t)[1]
    torch.testing.assert_close(pull(torch.ones_like(z))[0], dz.sum(), rtol=0, atol=1e-12)


def test_period_of_kepler_grows_as_known():
    # T = 2 pi a^(3/2): after one period of the nominal orbit dq/da = -v dT/da + dq0/da.
    q, p = perihelion(0.3)

    def end(a):
        run = integrate(
            KEPLER, a * q, p * a**-0.5, dt=2 * math.pi / 200, steps=200, method="bm6_rkn"
        )
        return run.q[-1]

    a = torch.tensor(1.0, dtype=F64)
    expected = q - p * 3 * math.pi
    torch.testing.assert_close(jacfwd(end)(a), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(jacrev(end)(a), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["leapfrog", "rk4", "gauss6"])
def test_gradients_reach_parameters_of_a_learned_energy(name):
    torch.manual_seed(0)
    first = nn.Linear(2, 8)
    net = nn.Sequential(first, nn.Tanh(), nn.Linear(8, 1)).double()
    weight = first.weight
    system = Separable(lambda q: net(q)[..., 0])
    if name == "gauss6":
        system = Hamiltonian(lambda q, p: net(q + p)[..., 0] + p.square().sum(-1))

    def loss():
        run = integrate(system, *start(4), dt=0.1, steps=10, method=name)
        return run.q.square().sum()

    loss().backward()
    assert weight.grad is not None
    found = weight.grad[2, 1]

    def at(shift):
        with torch.no_grad():
            weight[2, 1] += shift
            value = loss()
            weight[2, 1] -= shift
        return value

    expected = (8 * (at(1e-3) - at(-1e-3)) - (at(2e-3) - at(-2e-3))) / 12e-3
    assert float(found) == pytest.approx(float(expected), rel=1e-8)


def test_no_graph_is_kept_unless_asked_for():
    for system, name in ((GENERAL, "leapfrog"), (COUPLED, "gauss4"), (COUPLED, "rk4")):
        run = integrate(system, *start(), dt=0.1, steps=2, method=name)
        assert not run.q.requires_grad
        assert not METHODS[name].step(system, *start(), 0.1)[0].requires_grad
        q, p = start()
        assert integrate(
            system, q.requires_grad_(), p, dt=0.1, steps=2, method=name
        ).q.requires_grad


def test_stages_differentiate_a_closure_and_dt():
    tableau = gauss_legendre(3)
    z = torch.tensor([0.3, -0.2], dtype=F64)

    def end(rate, dt):
        return z + solve_stages(lambda x: rate * torch.sin(x), z, dt, tableau).increment

    rate, dt = torch.tensor(1.3, dtype=F64), torch.tensor(0.2, dtype=F64)
    # x' = r sin x flows by tan(x/2) -> e^(r t) tan(x/2): a function of r t alone.
    by_rate, by_dt = jacfwd(end, (0, 1))(rate, dt)
    torch.testing.assert_close(by_rate / dt, by_dt / rate, rtol=0, atol=1e-14)
    exact = 2 * torch.atan(torch.exp(rate * dt) * torch.tan(z / 2))
    torch.testing.assert_close(by_dt, rate * torch.sin(exact), rtol=0, atol=1e-6)
    torch.testing.assert_close(jacrev(end, (0, 1))(rate, dt), (by_rate, by_dt), rtol=0, atol=1e-14)
    rate.requires_grad_()
    (tape,) = torch.autograd.grad(end(rate, 0.2).sum(), rate)
    torch.testing.assert_close(tape, by_rate.sum(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("rate", [0.1, 1.0, 3.0])
def test_derivative_at_an_equilibrium_is_the_pade_matrix(rate):
    # The state settles in one sweep there; its derivative must not.
    def energy(q, p):
        return (1 + q.square().sum(-1)) * p.square().sum(-1) / 2 + rate**2 * (1 - torch.cos(q)).sum(
            -1
        )

    def step(z):
        return torch.cat(
            METHODS["gauss4"].step(Hamiltonian(energy), z[..., :1], z[..., 1:], 0.3), -1
        )

    a = 0.3 * torch.tensor([[0.0, 1.0], [-(rate**2), 0.0]], dtype=F64)
    eye = torch.eye(2, dtype=F64)
    expected = torch.linalg.solve(eye - a / 2 + a @ a / 12, eye + a / 2 + a @ a / 12)
    z = torch.zeros(2, dtype=F64)
    for found in (jacrev(step)(z), jacfwd(step)(z), torch.autograd.functional.jacobian(step, z)):
        torch.testing.assert_close(found, expected, rtol=0, atol=3e-15)
    batch = torch.cat([z[None], torch.randn(3, 2, dtype=F64)])
    torch.testing.assert_close(vmap(jacrev(step))(batch)[0], expected, rtol=0, atol=3e-15)


def test_a_whole_run_transforms():
    def end(z):
        run = integrate(
            VectorField(lambda x: torch.sin(x.roll(1, -1))), z, dt=0.1, steps=5, method="gauss4"
        )
        return run.q[-1]

    z = torch.linspace(-1, 1, 12, dtype=F64).reshape(4, 3)
    rows = torch.stack([differences(end, x) for x in z])
    torch.testing.assert_close(vmap(jacrev(end))(z), rows, rtol=0, atol=1e-10)
    torch.testing.assert_close(vmap(jacfwd(end))(z), rows, rtol=0, atol=1e-10)
