"""Gaussian measures: closed forms against their differential equations and against quadrature."""

import math

import pytest
import torch

from darboux import GeometryError
from darboux.flows import gaussian as ga

F64 = torch.float64


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def positive(d, seed=0):
    a = draw(d, d, seed=seed)
    return a @ a.mT / d + 0.5 * torch.eye(d, dtype=F64)


M0, B0 = draw(3, seed=10), draw(3, seed=11)
S0, Q0 = positive(3, seed=1), positive(3, seed=2)


@pytest.mark.parametrize("name", ["w2", "kw", "fr"])
def test_closed_forms_solve_their_equations_for_matrices_that_do_not_commute(name):
    flow, field = getattr(ga, f"{name}_flow"), getattr(ga, f"{name}_field")
    found = ga.solve(lambda m, S: field(m, S, B0, Q0), (M0, S0), 1.0, 400)
    exact = flow(M0, S0, B0, Q0, 1.0)
    for a, b in zip(found, exact, strict=True):
        assert float((a - b).abs().max()) <= 1e-9
    # and they start and end where they should
    assert torch.allclose(flow(M0, S0, B0, Q0, 0.0).cov, S0, atol=1e-13)
    late = flow(M0, S0, B0, Q0, 60.0)
    assert torch.allclose(late.mean, B0, atol=1e-9)
    assert torch.allclose(late.cov, Q0, atol=1e-9)


def test_kl_is_zero_at_the_target_and_its_rate_is_the_fisher_information():
    assert abs(float(ga.kl(B0, Q0, B0, Q0))) <= 1e-14
    m, S = M0.clone().requires_grad_(), S0.clone().requires_grad_()
    value = ga.kl(m, S, B0, Q0)
    expected = torch.distributions.kl_divergence(
        torch.distributions.MultivariateNormal(M0, S0),
        torch.distributions.MultivariateNormal(B0, Q0),
    )
    assert abs(float(value.detach() - expected)) <= 1e-13
    dm, dS = torch.autograd.grad(value, [m, S])
    vm, vS = ga.w2_field(M0, S0, B0, Q0)
    rate = (dm * vm).sum() + (dS * vS).sum()
    P, R = ga.inverse(Q0), ga.inverse(Q0) - ga.inverse(S0)
    fisher = (P @ (M0 - B0)).square().sum() + (R @ S0 @ R).trace()
    assert abs(float(rate + fisher)) <= 1e-12


def test_bures_geometry():
    T = ga.bures_map(S0, Q0)
    assert torch.allclose(T @ S0 @ T, Q0, atol=1e-13)
    V = ga.bures_log(S0, Q0)
    assert torch.allclose(ga.bures_exp(S0, V), Q0, atol=1e-13)
    t = torch.tensor([0.0, 0.25, 1.0], dtype=F64)
    path = ga.bures_geodesic(S0, Q0, t)
    d = ga.bures_sqdist(M0, S0, M0, Q0).sqrt()
    for s, C in zip(t, path, strict=True):
        assert torch.allclose(ga.bures_exp(S0, s * V), C, atol=1e-13)
        # constant speed; a root of round-off at s = 0
        assert abs(float(ga.bures_sqdist(M0, S0, M0, C).sqrt() - s * d)) <= 1e-6
    one = torch.eye(2, dtype=F64)
    zero = torch.zeros(2, dtype=F64)
    assert abs(float(ga.bures_sqdist(zero, 4 * one, zero + 3, 9 * one)) - 20.0) <= 1e-13


def test_roots_differentiate_at_repeated_eigenvalues():
    a = torch.eye(3, dtype=F64).expand(2, 3, 3).clone()
    a[1] = positive(3)
    a.requires_grad_()
    assert torch.autograd.gradcheck(ga.sqrtm, (a,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(ga.sqrtm, (a,))
    v = draw(2, 3, 3, seed=4).requires_grad_()

    def f(a, v):
        return ga.lyapunov((a + a.mT) / 2, (v + v.mT) / 2)

    assert torch.autograd.gradcheck(f, (a, v), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, (a, v))
    jac = torch.func.vmap(torch.func.jacrev(ga.sqrtm))(a.detach())
    assert torch.allclose(jac, torch.func.vmap(torch.func.jacfwd(ga.sqrtm))(a.detach()), atol=1e-13)


def test_undamped_acceleration_conserves_its_hamiltonian():
    def hamiltonian(y):
        kinetic = (y.p.square().sum() + (y.A @ y.cov @ y.A).trace()) / 2
        return kinetic + ga.kl(y.mean, y.cov, B0, Q0)

    y = ga.Moving(M0, S0, draw(3, seed=5), 0.1 * torch.eye(3, dtype=F64))
    end = ga.solve(lambda *s: ga.accelerated_field(ga.Moving(*s), B0, Q0, 0.0), y, 2.0, 300)
    assert abs(float(hamiltonian(ga.Moving(*end)) - hamiltonian(y))) <= 1e-8


def test_the_proximal_step_is_optimal():
    s, q, tau = (torch.tensor(v, dtype=F64) for v in (1.7, 0.4, 0.3))
    sigma = ga.jko_step(s, q, 0.3).requires_grad_()
    loss = (sigma - s) ** 2 / (2 * tau) + sigma**2 / (2 * q) - sigma.log()
    assert abs(float(torch.autograd.grad(loss, sigma)[0])) <= 1e-13


def nodes(m, S, order=40):
    """Return tensor Gauss-Hermite nodes (n, 2) and weights (n,) of N(m, S) in the plane."""
    import numpy as np

    z, w = (torch.as_tensor(a) for a in np.polynomial.hermite_e.hermegauss(order))
    w = w / w.sum()
    x = torch.cartesian_prod(z, z) @ torch.linalg.cholesky(S).mT + m
    return x, torch.outer(w, w).reshape(-1)


def test_the_attention_closure_by_quadrature():
    m, S = draw(2, seed=6), 0.3 * positive(2, seed=7)
    B, V = 0.5 * draw(2, 2, seed=8), draw(2, 2, seed=9)
    x, w = nodes(m, S)
    p = (x @ B.mT @ x.mT + w.log()).softmax(-1)  # (B x_i) . x_j
    v = p @ x @ V.mT
    dm, dS = ga.attention_field(m, S, B, V)
    assert torch.allclose(w @ v, dm, atol=1e-10)
    z = x - m
    found = (w[:, None] * (v - w @ v)).mT @ z
    assert torch.allclose(found + found.mT, dS, atol=1e-10)


def test_linear_attention_in_closed_form():
    M = positive(3)
    (found,) = ga.solve(lambda M: (-2 * M @ M,), (M,), 1.0, 400)
    assert torch.allclose(found, ga.linear_attention_flow(M, 1.0), atol=1e-9)


def test_entropic_cost_against_the_unregularised_limit_and_the_scalar_optimum():
    small = ga.entropic_cost(M0, S0, B0, Q0, 1e-4)
    assert abs(float(small - ga.bures_sqdist(M0, S0, B0, Q0) / 2)) <= 1e-6
    # in one dimension the plan is Gaussian with correlation c: minimise over c by hand
    a, b, s = 1.3, 0.6, 0.7
    c = torch.linspace(-0.99999, 0.99999, 400_001, dtype=F64)
    cost = (a + b) / 2 - c * math.sqrt(a * b) - s**2 * torch.log(1 - c**2) / 2
    zero = torch.zeros(1, dtype=F64)
    one = torch.ones(1, 1, dtype=F64)
    assert abs(float(ga.entropic_cost(zero, a * one, zero, b * one, s) - cost.min())) <= 1e-9
    assert abs(float(ga.sinkhorn_divergence(M0, S0, M0, S0, 0.3))) <= 1e-14


def test_an_indefinite_covariance_is_refused():
    with pytest.raises(GeometryError, match="not positive"):
        ga.w2_flow(M0, S0, B0, -Q0, 1.0)
