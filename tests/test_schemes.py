"""Steps in depth: orders, conformal symplecticity and where it ends, schedules."""

import math

import pytest
import torch

from darboux.flows import accelerated_attention as aa, gaussian as ga
from darboux.learners.schemes import SCHEDULES, SCHEMES, Damping, Phase, step

F64 = torch.float64


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def clock(t=1.0):
    return torch.tensor(t, dtype=F64)


def damping(schedule):
    return Damping(schedule, 0.8).double().requires_grad_(False)


def pendulum(x, u):
    return -x.sin()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", SCHEMES)
def test_orders(name, schedule):
    friction, x, u = damping(schedule), draw(3), draw(3, seed=1)

    def field(t, x, u):
        return torch.ones_like(t), u, pendulum(x, u) - friction.rate(t) * u

    exact = ga.solve(field, (clock(), x, u), 1.0, 100)

    def error(n):
        phase = Phase(x, u, clock())
        for _ in range(n):
            phase = step(SCHEMES[name], phase, pendulum, friction, 1.0 / n)
        assert float(phase.t) == pytest.approx(2.0)
        return float((phase.x - exact[1]).abs().max() + (phase.u - exact[2]).abs().max())

    slope = math.log2(error(16) / error(32))
    assert slope >= SCHEMES[name].order - 0.2
    assert slope <= SCHEMES[name].order + 0.6


def jacobian(name, force, friction, dt=0.3, d=4):
    x, u = 0.5 * draw(d), draw(d, seed=1)

    def f(z):
        phase = step(SCHEMES[name], Phase(z[:d], z[d:], clock()), force, friction, dt)
        return torch.cat([phase.x, phase.u])

    J = torch.func.jacrev(f)(torch.cat([x, u]))
    I, O = torch.eye(d, dtype=F64), torch.zeros(d, d, dtype=F64)
    omega = torch.cat([torch.cat([O, I], 1), torch.cat([-I, O], 1)])
    sigma = (-friction.integral(clock(), dt)).exp()
    return float((J.mT @ omega @ J - sigma * omega).abs().max()), J, sigma


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", SCHEMES)
def test_conformal_rows_contract_the_form_exactly(name, schedule):
    # a force with a symmetric Jacobian
    K = draw(4, 4, seed=2)

    def force(x, u):
        return -K.mT @ (K @ x).tanh()

    defect, J, sigma = jacobian(name, force, damping(schedule))
    if SCHEMES[name].conformal:
        assert defect <= 1e-13
        assert torch.linalg.det(J) == pytest.approx(float(sigma) ** 4, rel=1e-12)
    else:
        assert defect >= 1e-3


@pytest.mark.parametrize("name", [n for n in SCHEMES if SCHEMES[n].conformal])
def test_softmax_attention_has_no_separable_hamiltonian(name):
    A, B, friction = torch.eye(2, dtype=F64), torch.eye(2, dtype=F64), damping("constant")

    def force(x, u):  # un-normalised: a gradient, which keeps the form
        x = x.view(2, 2)
        return (torch.exp(x @ x.mT) @ x).reshape(-1)

    assert jacobian(name, force, friction)[0] <= 1e-12

    def softmax(x, u):
        return aa.velocity_field(x.view(2, 2), u.view(2, 2), A, B)[1].reshape(-1)

    assert jacobian(name, softmax, friction)[0] >= 1e-2

    # and in the momenta of its own Hamiltonian, where the step is explicit
    def push(x, y):
        return aa.momentum_field(x.view(2, 2), y.view(2, 2), A, B)[1].reshape(-1)

    def drift(x, y):
        return aa.momentum_field(x.view(2, 2), y.view(2, 2), A, B)[0].reshape(-1)

    z = torch.cat([0.5 * draw(4), draw(4, seed=1)])

    def f(z):
        phase = step(SCHEMES[name], Phase(z[:4], z[4:], clock()), push, friction, 0.3, drift)
        return torch.cat([phase.x, phase.u])

    J = torch.func.jacrev(f)(z)
    I, O = torch.eye(4, dtype=F64), torch.zeros(4, 4, dtype=F64)
    omega = torch.cat([torch.cat([O, I], 1), torch.cat([-I, O], 1)])
    sigma = (-friction.integral(clock(), 0.3)).exp()
    assert float((J.mT @ omega @ J - sigma * omega).abs().max()) >= 1e-2


def test_a_free_velocity_decays_as_its_damping():
    still = lambda x, u: torch.zeros_like(x)  # noqa: E731
    u = draw(3)
    for name in ("kick_damp_drift", "exponential", "strang", "etd_ab2"):
        phase = Phase(0 * u, u, clock(0.5))
        for _ in range(4):
            phase = step(SCHEMES[name], phase, still, damping("nesterov"), 0.5)
        assert torch.allclose(phase.u, u * (0.5 / 2.5) ** 3, atol=1e-14)


def test_a_constant_force_is_solved_exactly_by_the_exponential_rows():
    push = lambda x, u: torch.ones_like(x)  # noqa: E731
    for alpha in (1e-6, 0.3, 5.0):
        friction = Damping("constant", alpha)
        for name in ("exponential", "etd_ab2"):
            phase = Phase(torch.zeros(1, dtype=F64), torch.zeros(1, dtype=F64), clock())
            for _ in range(3):
                phase = step(SCHEMES[name], phase, push, friction, 0.5)
            assert float(phase.u) == pytest.approx(-math.expm1(-1.5 * alpha) / alpha, rel=1e-12)


def test_schedules():
    t = clock(2.0)
    assert float(damping("nesterov").rate(t)) == 1.5
    assert float(damping("constant").rate(t)) == 0.8
    learned = damping("learned").requires_grad_()
    assert float(learned.rate(t).detach()) == pytest.approx(1.5 + 1e-4, rel=1e-4)
    learned.integral(t, 1.0).backward()
    assert learned.raw.grad is not None
    assert bool((learned.raw.grad > 0).all())
    with pytest.raises(ValueError, match="unknown schedule 'cosine'"):
        Damping("cosine")
    with pytest.raises(ValueError, match="alpha is -1"):
        Damping("constant", -1)
