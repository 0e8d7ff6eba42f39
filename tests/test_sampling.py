"""Proximal steps, Metropolis steps, births and deaths, further scores: exact identities."""

import math

import numpy as np
import pytest
import torch

from darboux import ConvergenceError
from darboux.flows import energies as en, gaussian as ga, sampling as sa, scores as sc
from darboux.flows.proximal import jko_step
from darboux.flows.wasserstein import KalmanW2, gradient_flow

F64 = torch.float64


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def number(value):
    return torch.tensor(value, dtype=F64)


def hermite(order):
    z, w = (torch.as_tensor(a) for a in np.polynomial.hermite_e.hermegauss(order))
    keep = w > 1e-25 * w.max()
    return z[keep], w[keep] / w[keep].sum()


X = draw(7, 2)
BLOB = en.Potential(lambda x: (x**4).sum(-1) / 4) + en.Entropy("blob", 0.5)


# -- proximal steps --------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.01, 0.3, 10.0, 1e3])
def test_the_proximal_step_of_kl_is_the_closed_form(tau):
    q = number([0.4, 2.0])
    x = draw(6, 2, seed=1)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(ga.moments(x).cov)).mT
    x = x * number([0.5, 1.2]) + 0.3  # a diagonal covariance, which commutes with the target's
    y = jko_step(en.KL(lambda x: -(x.square() / q).sum(-1) / 2, "gaussian"), x, tau)
    m, S = ga.moments(y)
    exact = ga.jko_step(number([0.5, 1.2]), q, tau)
    assert float((S.diagonal().sqrt() - exact).abs().max()) <= 1e-9
    assert abs(float(S[0, 1])) <= 1e-9
    assert float((m - 0.3 / (1 + tau / q)).abs().max()) <= 1e-9


@pytest.mark.parametrize("weighted", [False, True])
def test_the_proximal_step_of_a_quadratic_potential_is_a_resolvent(weighted):
    w = number([0.4, 0.0, 0.1, 0.1, 0.2, 0.1, 0.1]) if weighted else None
    H = number([[2.0, 0.5], [0.5, 50.0]])
    y = jko_step(en.Potential(lambda x: (x @ H * x).sum(-1) / 2), X, 0.7, w=w)
    exact = X @ torch.linalg.inv(torch.eye(2, dtype=F64) + 0.7 * H)
    seen = slice(None) if w is None else w > 0
    assert float((y - exact)[seen].abs().max()) <= 1e-8


def test_proximal_steps_lower_the_energy_at_every_length_and_have_order_one():
    both = torch.stack([X, 3 * draw(7, 2, seed=2)])
    for tau in (1e-3, 1.0, 1e3):
        y = jko_step(BLOB, both, tau)
        assert bool((BLOB.value(y) < BLOB.value(both)).all())
        assert torch.allclose(y[1], jko_step(BLOB, both[1], tau), atol=1e-7)
        # the optimality condition, to the tolerance
        assert float((y - both - tau * BLOB.velocity(y)).abs().max()) <= 1e-8 * (1 + tau)
    exact = gradient_flow(BLOB, X, dt=0.02, steps=10, method="rk4").x[-1]
    errors = [
        float((gradient_flow(BLOB, X, dt=0.2 / n, steps=n, method="jko").x[-1] - exact).norm())
        for n in (4, 8)
    ]
    assert 1.7 <= errors[0] / errors[1] <= 2.3


def test_proximal_steps_differentiate_implicitly():
    w = number([0.2, 0.5, 0.3])

    def f(x, c, h):
        energy = c * en.Potential(lambda x: (x**4).sum(-1) / 4) + en.Entropy("blob", h)
        return jko_step(energy, x, 0.5, w=w, tol=1e-13)

    inputs = [z.clone().requires_grad_() for z in (X[:3, :1], number(1.3), number(0.6))]
    assert torch.autograd.gradcheck(f, inputs, atol=1e-5)


def test_a_proximal_step_that_cannot_be_made_is_refused():
    with pytest.raises(ValueError, match="not its gradient"):
        jko_step(en.KL(lambda x: x.sum(-1), "kde"), X, 0.1)
    with pytest.raises(ConvergenceError, match="off by"):
        jko_step(BLOB, X, 1.0, max_iter=2)
    with pytest.raises(NotImplementedError, match="torch.func"):
        torch.func.vmap(lambda x: jko_step(BLOB, x, 0.1))(torch.stack([X, X]))
    with pytest.raises(ValueError, match="expected the metric W2"):
        gradient_flow(BLOB, X, dt=0.1, steps=1, method="jko", metric=KalmanW2())


# -- Metropolis steps ------------------------------------------------------------------------


def quartic(x):
    return -(x**4).sum(-1) / 4 + x[..., 0] / 3


def test_detailed_balance_holds_pair_by_pair():
    x, y, dt = draw(50, 2), draw(50, 2, seed=1), 0.3

    def density(x, y):  # of moving from x to y
        g = torch.func.vmap(torch.func.grad(quartic))(x)
        normal = torch.distributions.Normal(x + dt * g, math.sqrt(2 * dt))
        return normal.log_prob(y).sum(-1)

    ratio = sa.mala_log_ratio(quartic, x, y, dt)
    there = quartic(x) + density(x, y) + ratio.clamp_max(0)
    back = quartic(y) + density(y, x) + sa.mala_log_ratio(quartic, y, x, dt).clamp_max(0)
    assert float((there - back).abs().max()) <= 1e-12
    assert bool((ratio > 0).any())
    assert bool((ratio < 0).any())


def test_corrected_steps_have_the_right_law_where_plain_ones_do_not():
    # many chains of few long steps, from the law itself: quantiles of e^(-x^4/4)
    grid = torch.linspace(-5, 5, 20001, dtype=F64)
    p = torch.exp(-(grid**4) / 4)
    p = p / p.sum()
    n, dt = 40_000, 0.5
    u = (torch.arange(n, dtype=F64) + 0.5) / n
    start = grid[torch.searchsorted(p.cumsum(0), u)][:, None]

    def log_prob(x):
        return -(x**4).sum(-1) / 4

    run = sa.mala(log_prob, start, dt=dt, steps=8, generator=torch.Generator().manual_seed(0))
    rate = float(run.acceptance.mean())
    assert 0.3 <= rate <= 0.95
    for power in (2, 4):
        mean = float((p * grid**power).sum())
        spread = math.sqrt(float((p * grid ** (2 * power)).sum()) - mean**2)
        assert abs(float((run.x[-1] ** power).mean()) - mean) <= 4 * spread / math.sqrt(n)
    # without the correction one step already spoils the law: its second moment by quadrature
    moved = (p * ((grid - dt * grid**3) ** 2 + 2 * dt)).sum()
    assert abs(float(moved - (p * grid**2).sum())) >= 0.1
    again = sa.mala(log_prob, start, dt=dt, steps=1, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.x[1], run.x[1])


# -- births and deaths -----------------------------------------------------------------------


def test_systematic_births_copy_in_proportion():
    n, dt = 6, 0.8
    x = torch.arange(float(n), dtype=F64)[:, None]
    energy = en.Potential(lambda x: torch.cos(x).sum(-1))
    y = sa.birth_death(energy, x.expand(3000, n, 1), dt, generator=torch.Generator().manual_seed(0))
    assert y.shape == (3000, n, 1)
    copies = (y == x[:, 0]).to(F64).sum(-2)
    share = n * (-dt * torch.cos(x[:, 0])).softmax(0)
    assert bool(((copies - share).abs() < 1).all())  # systematic: less than one off
    assert float((copies.mean(0) - share).abs().max()) <= 4 * 0.5 / math.sqrt(3000)


def test_clocks_move_mass_at_the_rate_of_fisher_and_rao():
    n, dt, many = 6, 0.05, 20_000
    x = torch.arange(float(n), dtype=F64)[:, None]
    energy = en.Potential(lambda x: 2 * torch.cos(x).sum(-1))
    y = sa.birth_death(
        energy,
        x.expand(many, n, 1),
        dt,
        method="clocks",
        generator=torch.Generator().manual_seed(1),
    )
    phi = 2 * torch.cos(x[:, 0])
    phi = phi - phi.mean()
    change = (y == x[:, 0]).to(F64).sum(-2).mean(0) - 1
    # the others share the loss of one that dies, and make room for one that is born
    others = (phi.sum() - phi) / (n - 1)
    expected = -dt * (phi - others)
    assert float((change - expected).abs().max()) <= 4 * 0.4 / math.sqrt(many) + 2 * dt**2
    assert float(change.abs().max()) >= 0.05
    alone = sa.birth_death(energy, x[:1], dt, method="clocks")
    assert torch.equal(alone, x[:1])


# -- further scores --------------------------------------------------------------------------


def test_the_bias_of_the_proximal_score_is_the_stated_one():
    q, T = 1.0, 0.3
    z, w = hermite(120)
    s = q / (1 + (T / q) ** 2 / (2 * (1 - T / q)))
    x = math.sqrt(s) * z[:, None]
    v = sc.ProximalKL(lambda x: -x.square().sum(-1) / (2 * q), T).velocity(x, w)
    assert float(v[z.abs() < 2].abs().max()) <= 1e-8
    assert q - s < T / 4  # of second order: the kernel score of that width is off by 2 T


def test_renyi_divergence_of_gaussians_by_quadrature_and_its_limit():
    q, s, h, m = 1.3, 0.8, 0.2, 1.7
    z, w = hermite(80)
    x = math.sqrt(s) * z[:, None]

    def log_prob(x):
        return -x.square().sum(-1) / (2 * q) - math.log(2 * math.pi * q) / 2

    value = sc.Renyi(log_prob, m, h).value(x, w)
    a = (m - 1) * (1 / (s + h) - 1 / q)  # E[e^{-a x^2/2}] = (1 + a s)^{-1/2}
    exact = math.log(q / (s + h)) / 2 - math.log(1 + a * s) / (2 * (m - 1))
    assert abs(float(value) - exact) <= 1e-9
    near = sc.Renyi(log_prob, 1 + 1e-7, 0.5)
    kl = en.KL(log_prob, "blob", 0.5)
    y = draw(6, 1)
    assert torch.allclose(near.value(y), kl.value(y), atol=1e-6)
    assert torch.allclose(near.velocity(y), kl.velocity(y), atol=1e-6)


def test_the_entropy_by_neighbours():
    x = draw(1000, 2, seed=4)
    energy = sc.NeighbourEntropy(3)
    exact = -(1 + math.log(2 * math.pi))
    assert abs(float(energy.value(x)) - exact) <= 0.1
    # scaling by c adds -d log c, exactly
    assert abs(float(energy.value(3 * x) - energy.value(x)) + 2 * math.log(3)) <= 1e-12
    y = draw(6, 2)
    y[3] = y[2]
    assert bool(energy.velocity(y).isfinite().all())
    with pytest.raises(ValueError, match="more than k"):
        energy.value(y[:3])


@pytest.mark.parametrize("kind", ["spread", "coincident", "one", "zero weight"])
@pytest.mark.parametrize("name", ["renyi", "proximal"])
def test_gradcheck_of_further_velocities(name, kind):
    x = draw(1 if kind == "one" else 4, 2)
    w = torch.full((len(x),), 1 / len(x), dtype=F64)
    if kind == "coincident":
        x[1] = x[0]
    if kind == "zero weight":
        w = number([0.5, 0.2, 0.0, 0.3])

    def f(x, h, a):
        def log_prob(x):
            return -a * (x**4).sum(-1) / 4

        made = sc.Renyi(log_prob, 1.5, h) if name == "renyi" else sc.ProximalKL(log_prob, h)
        return made._velocity(x, w)

    inputs = [z.clone().requires_grad_() for z in (x, number(0.6), number(1.1))]
    assert torch.autograd.gradcheck(f, inputs)
    assert bool(f(*inputs).isfinite().all())
    if name == "renyi":
        energy = sc.Renyi(quartic, 1.5, 0.6)
        z = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(energy.value(z, w), z)
        assert torch.allclose(w[:, None] * energy.velocity(x, w), -g, atol=1e-13)
