"""The bridge to torchdiffeq, both ways."""

import pytest
import torch
import torchdiffeq
from integrator_cases import COUPLED, F64, GENERAL, KEPLER, OSCILLATOR, perihelion, start
from torch import nn

from darboux.integrators import Hamiltonian, Separable, VectorField, as_ode, integrate, odeint


def test_torchdiffeq_and_gauss_agree():
    q, p = start(4)
    t = torch.linspace(0, 2, 6, dtype=F64)
    theirs = odeint(COUPLED, q, p, t=t, method="dopri5", rtol=1e-11, atol=1e-12)
    ours = odeint(COUPLED, q, p, t=t, method="gauss8", step_size=0.05)
    assert theirs.q.shape == ours.q.shape == (6, 4, 2)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-8)


def test_a_system_is_a_torchdiffeq_function():
    q, p = perihelion(0.3)
    t = torch.linspace(0, 6, 4, dtype=F64)
    qs, ps = torchdiffeq.odeint(as_ode(KEPLER), (q, p), t, rtol=1e-11, atol=1e-12)
    ours = odeint(KEPLER, q, p, t=t, method="kahan_li8", step_size=0.02)
    torch.testing.assert_close((qs, ps), (ours.q, ours.p), rtol=0, atol=1e-8)


def test_our_steps_meet_the_times():
    q, p = start()
    t = torch.tensor([0.0, 0.5, 1.0, 0.0], dtype=F64)
    found = odeint(OSCILLATOR, q, p, t=t, method="leapfrog", step_size=0.1)
    run = integrate(OSCILLATOR, q, p, dt=0.1, steps=10)
    torch.testing.assert_close(found.q[:3], run.q[::5], rtol=0, atol=1e-14)
    torch.testing.assert_close(found.q[3], q, rtol=0, atol=1e-14)


class Energy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        layers = [nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)]
        self.net = nn.Sequential(*layers).double()

    def forward(self, q, p):
        return self.net(torch.cat([q, p], -1))[..., 0] + p.square().sum(-1) / 2


@pytest.mark.parametrize("given", ["module", "method"])
def test_the_adjoint_finds_the_parameters(given):
    q, p = start(3)
    t = torch.linspace(0, 1, 3, dtype=F64)
    gradients = []
    for adjoint in (True, False):
        energy = Energy()
        system = Hamiltonian(energy if given == "module" else energy.forward)
        run = odeint(system, q, p, t=t, adjoint=adjoint, rtol=1e-10, atol=1e-11)
        run.q[-1].sin().sum().backward()
        gradients.append(energy.net[0].weight.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-8)


def test_the_adjoint_refuses_parameters_it_would_miss():
    q, p = start(3)
    energy = Energy()
    system = Hamiltonian(lambda q, p: energy(q, p))
    t = torch.linspace(0, 1, 3, dtype=F64)
    with pytest.raises(ValueError, match="adjoint_params"):
        odeint(system, q, p, t=t, adjoint=True)
    run = odeint(system, q, p, t=t, adjoint=True, adjoint_params=tuple(energy.parameters()))
    run.q.sum().backward()
    assert energy.net[0].weight.grad is not None


def test_a_learned_mass_is_found():
    mass = nn.Parameter(torch.ones(2, dtype=F64))
    system = Separable(lambda q: q.square().sum(-1) / 2, mass=mass)
    assert list(as_ode(system).parameters()) == [mass]


def test_times_are_differentiable():
    q, p = start()
    t = torch.tensor([0.0, 0.4, 1.0], dtype=F64, requires_grad=True)
    run = odeint(GENERAL, q, p, t=t, method="bm6", step_size=0.1)
    (dt,) = torch.autograd.grad(run.q[-1, 0], t)
    velocity = GENERAL.velocity(run.p[-1])[0]
    torch.testing.assert_close(dt[-1], velocity, rtol=0, atol=1e-7)
    assert dt[1].abs() < 1e-7  # where it is looked at in between does not matter


def test_fixed_steps_of_torchdiffeq():
    z = torch.ones(2, dtype=F64)
    decay = VectorField(torch.neg)
    t = torch.tensor([0.0, 1.0], dtype=F64)
    run = odeint(decay, z, t=t, method="heun3", step_size=0.01)
    torch.testing.assert_close(run.q[-1], torch.exp(-t[-1]) * z, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "leapfrog"}, "needs a step_size"),
        ({"method": "leapfrog", "step_size": -0.1}, "step_size is -0.1"),
        (
            {"method": "leapfrog", "step_size": 0.1, "adjoint": True},
            "adjoint belong to torchdiffeq",
        ),
        ({"t": torch.zeros(2, 2, dtype=F64)}, r"t has shape \(2, 2\)"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        odeint(OSCILLATOR, *start(), **{"t": torch.linspace(0, 1, 2, dtype=F64), **options})
