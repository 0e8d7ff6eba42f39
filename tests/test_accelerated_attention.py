"""Accelerated attention as particles: Hamiltonian and velocity form, closures, what fails."""

import math

import pytest
import torch

from darboux.flows import accelerated_attention as aa, gaussian as ga, kernel_sums
from darboux.flows.interaction import SelfAttention, attention

F64 = torch.float64


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def case(n=7, d=3):
    x, u = 0.6 * draw(n, d), 0.8 * draw(n, d, seed=1)
    a, b = draw(d, d, seed=2), draw(d, d, seed=3)
    return x, u, (a + a.mT) / 2, b @ b.mT + torch.eye(d, dtype=F64)


def flat(field):
    """Return a field of pairs as one of vectors."""

    def rates(z):
        return torch.cat([r.reshape(-1) for r in field(*z.view(2, -1))])

    return rates


def test_the_velocity_form_is_the_hamiltonian_form():
    x, u, A, B = case()
    y = aa.momenta(x, u, A, B)
    grads = torch.func.grad(lambda x, y: aa.hamiltonian(x, y, A, B), (0, 1))(x, y)
    dx, dy = aa.momentum_field(x, y, A, B, 0.3)
    assert float((dx - grads[1]).abs().max()) <= 1e-12
    assert float((dy + 0.3 * y + grads[0]).abs().max()) <= 1e-11 * float(dy.abs().max())
    assert torch.allclose(dx, u, atol=1e-13)

    def velocity(x, y):
        M = torch.exp(x @ A @ x.mT)
        return y @ B / M.mean(-1, keepdim=True)

    rate = torch.func.jvp(velocity, (x, y), (dx, dy))[1]
    du = aa.velocity_field(x, u, A, B, 0.3)[1]
    assert float((du - rate).abs().max()) <= 1e-9 * float(rate.abs().max())

    # and over time: both flows integrated
    end = ga.solve(lambda x, y: aa.momentum_field(x, y, A, B, 0.3), (x, 0.2 * y), 0.25, 70)
    also = ga.solve(lambda x, u: aa.velocity_field(x, u, A, B, 0.3), (x, 0.2 * u), 0.25, 70)
    assert float((end[0] - x).abs().max()) >= 0.05
    assert float((end[0] - also[0]).abs().max()) <= 1e-9


def test_energy_falls_at_the_stated_rate():
    x, u, A, B = case()
    y, alpha = aa.momenta(x, u, A, B), 0.7
    rates = aa.momentum_field(x, y, A, B, alpha)
    rate = torch.func.jvp(lambda x, y: aa.hamiltonian(x, y, A, B), (x, y), rates)[1]
    z = aa.partition(x, A)
    assert torch.allclose(rate, -alpha * ((y @ B * y).sum(-1) / z).sum(), rtol=1e-12)
    assert float(rate) < 0


def test_from_rest_the_acceleration_is_attention():
    x, u, A, B = case()
    out = aa.velocity_field(x, torch.zeros_like(u), A, B)[1]
    assert torch.allclose(out, SelfAttention(A.mT, None, B @ A)(x), atol=1e-13)
    # the flow of -1/2N^2 sum M in the metric of mobility B/z, and not in that of Wasserstein
    n = len(x)
    grad = torch.func.grad(lambda x: torch.exp(x @ A @ x.mT).sum() / (2 * n))(x)
    z = aa.partition(x, A).unsqueeze(-1)
    assert torch.allclose(out, grad @ B / z, atol=1e-12)


def test_which_attention_is_a_gradient():
    # V = A symmetric: Jacobians of un-normalised and Sinkhorn attention are symmetric
    x = 0.7 * draw(5, 2)

    def defect(norm):
        def f(z):
            z = z.view(5, 2)
            return attention(z @ A, z, z @ A, norm=norm, iterations=300).reshape(-1)

        J = torch.func.jacrev(f)(x.reshape(-1))
        return float((J - J.mT).norm() / J.norm())

    A = case(d=2)[2]
    assert defect("sum") <= 1e-10
    assert defect("sinkhorn") <= 1e-8
    assert defect("softmax") >= 0.05


def test_potential_is_unbounded_and_one_particle_escapes():
    one = torch.eye(1, dtype=F64)
    energies = [float(aa.hamiltonian(c * one, 0 * one, one, one)) for c in (1.0, 3.0, 5.0)]
    assert energies == pytest.approx([-math.exp(c * c) / 2 for c in (1.0, 3.0, 5.0)])
    # softmax alone: x' = x
    (end,) = ga.solve(lambda x: (SelfAttention()(x),), (one,), 3.0, 60)
    assert float(end) == pytest.approx(20.0855, rel=1e-4)
    # linear alone: x' = x^3 blows up at t = 1/2
    (end,) = ga.solve(lambda x: (SelfAttention(norm="linear")(x),), (one,), 0.48, 200)
    assert float(end) == pytest.approx(5.0, rel=1e-4)


def test_large_scores_overflow_in_momenta_only():
    x, u, A, B = case()
    x = 60 * x
    with pytest.raises(ValueError, match="momentum_field: z"):
        aa.momentum_field(x, u, A, B)
    du = aa.velocity_field(x, u, A, B)[1]
    P = torch.softmax(x @ A @ x.mT, -1)
    V, s = B @ A, (u @ ga.inverse(B) * u).sum(-1)
    a = (P * (u @ A @ x.mT + x @ A @ u.mT)).sum(-1)
    F = P @ x @ V.mT
    exact = F - a[:, None] * u + (s[:, None] * F + P @ (s[:, None] * x) @ V.mT) / 2
    assert float((du - exact).abs().max()) <= 1e-12 * float(exact.abs().max())


def test_a_row_among_fixed_keys_has_its_own_hamiltonian():
    x, u, _, B = case()
    A, keys, alpha = draw(3, 3, seed=5), draw(9, 3, seed=6), 0.4

    def z(x):
        return torch.exp(x @ A @ keys.mT).mean(-1, keepdim=True)

    def energy(x, y):
        return ((y @ B * y).sum(-1, keepdim=True) / z(x) / 2 - z(x)).sum()

    y = z(x) * (u @ ga.inverse(B))
    gx, gy = torch.func.grad(energy, (0, 1))(x, y)
    assert torch.allclose(gy, u, atol=1e-13)
    rate = torch.func.jvp(lambda x, y: y @ B / z(x), (x, y), (gy, -gx - alpha * y))[1]
    du = aa.row_field(x, u, keys, A, B, alpha)[1]
    assert float((du - rate).abs().max()) <= 1e-10 * float(rate.abs().max())


def test_the_causally_masked_hamiltonian_leaks_and_the_row_forms_do_not():
    x, u, A, B = case()
    later = x.clone()
    later[5:] += 0.5

    def force(x):  # of the Hamiltonian summed over the rows of a masked matrix
        M = torch.exp(x @ A @ x.mT).tril()
        z = M.sum(-1) / torch.arange(1, len(x) + 1)
        H = ((u @ B * u).sum(-1) / z - z).sum() / 2
        return -torch.autograd.grad(H, x)[0]

    leak = force(later.requires_grad_()) - force(x.clone().requires_grad_())
    assert float(leak[:5].abs().max()) >= 0.1
    later = later.detach()
    one, two = (aa.velocity_field(z, u, A, B, causal=True)[1] for z in (x, later))
    assert torch.equal(one[:5], two[:5])
    assert not torch.allclose(one[5:], two[5:])
    one, two = (
        torch.stack(
            [aa.row_field(z[i : i + 1], u[i : i + 1], z[: i + 1], A, B)[1] for i in range(7)]
        )
        for z in (x, later)
    )
    assert torch.equal(one[:5], two[:5])


def test_gaussian_barycentre():
    # weights of Gauss-Hermite quadrature make the cloud a Gaussian to all moments that matter
    import numpy as np

    z, p = (torch.as_tensor(a) for a in np.polynomial.hermite_e.hermegauss(40))
    w = torch.outer(p, p).reshape(-1) / p.sum() ** 2
    L, m = torch.tensor([[0.6, 0.0], [0.2, 0.5]], dtype=F64), torch.tensor([0.3, -0.2], dtype=F64)
    y = torch.cartesian_prod(z, z) @ L.mT + m
    A = 0.8 * draw(2, 2, seed=4)  # need not be symmetric
    x = draw(6, 2, seed=5)
    mean = attention(x @ A, y, y, w=w)
    assert float((mean - (m + x @ A @ (L @ L.mT))).abs().max()) <= 1e-9


def stein_case():
    x, _, A, _ = case(12)
    v = draw(3, 3, seed=8)
    S = 0.5 * draw(3, 3, seed=9)
    return x, S, A, (v + v.mT) / 2


def test_stein_form_is_hamiltonian_and_closed():
    x, S, A, V = stein_case()
    y, alpha = x @ S.mT, 0.4
    gx, gy = torch.func.grad(lambda x, y: aa.stein_hamiltonian(x, y, A, V), (0, 1))(x, y)
    dx, dy = aa.stein_field(x, y, A, V, alpha)
    assert torch.allclose(dx, gy, atol=1e-13)
    assert torch.allclose(dy, -gx - alpha * y, atol=1e-13)

    xT, yT = ga.solve(lambda x, y: aa.stein_field(x, y, A, V, alpha), (x, y), 1.0, 100)
    C, S1 = ga.solve(
        lambda C, S: aa.stein_closure(C, S, A, V, alpha), (x.mT @ x / len(x), S), 1.0, 100
    )
    assert float((xT - x).abs().max()) >= 0.1
    assert float((xT.mT @ xT / len(x) - C).abs().max()) <= 1e-9
    assert float((yT - xT @ S1.mT).abs().max()) <= 1e-9


def test_elliptical_laws_survive_without_a_mask_only():
    x, S, A, V = stein_case()

    def radii(x):
        return (x @ ga.inverse(x.mT @ x / len(x)) * x).sum(-1)

    def moved(causal, y):
        field = lambda x, y: aa.stein_field(x, y, A, V, 0.4, causal=causal)  # noqa: E731
        return ga.solve(field, (x, y), 1.0, 50)[0]

    assert float((radii(moved(False, x @ S.mT)) - radii(x)).abs().max()) <= 1e-10
    assert float((radii(moved(True, x @ S.mT)) - radii(x)).abs().max()) >= 0.1
    # momenta need not be linear in the positions for that: x' = X (A X^T Y / N) is, whatever Y
    assert float((radii(moved(False, draw(12, 3, seed=7))) - radii(x)).abs().max()) <= 1e-10


def test_no_hamiltonian_has_the_masked_stein_field():
    x, S, A, V = stein_case()
    z = torch.stack([x[:5], (x @ S.mT)[:5]])
    n = z[0].numel()
    I, O = torch.eye(n, dtype=F64), torch.zeros(n, n, dtype=F64)
    omega = torch.cat([torch.cat([O, I], 1), torch.cat([-I, O], 1)])

    def defect(causal):
        def field(x, y):
            return aa.stein_field(x.view(5, 3), y.view(5, 3), A, V, causal=causal)

        J = omega @ torch.func.jacrev(flat(field))(z.reshape(-1))
        return float((J - J.mT).norm() / J.norm())

    assert defect(False) <= 1e-12
    assert defect(True) >= 0.1


@pytest.mark.parametrize("n", [1, 3, 8, 21])
def test_linear_attention_in_chunks(n):
    q, k, v, start = draw(2, n, 3), draw(2, n, 3, seed=1), draw(2, n, 4, seed=2), draw(2, 3, 4)
    out, end = kernel_sums.causal_linear_sum(q, k, v, start, chunk=8)
    exact = (q @ k.mT).tril() @ v + q @ start
    assert torch.allclose(out, exact, atol=1e-12)
    assert torch.allclose(end, start + k.mT @ v, atol=1e-12)


def test_momentum_is_faster_in_the_softmax_metric():
    # convex potential 1/2 x.Hx with H = diag(.01, 1); five clouds at once; alpha = 2 sqrt(.01)
    H = torch.diag(torch.tensor([0.01, 1.0], dtype=F64))
    A, B = 0.05 * torch.eye(2, dtype=F64), torch.eye(2, dtype=F64)
    x = 0.5 * draw(5, 16, 2) * torch.tensor([1.0, 0.1], dtype=F64)

    def steps(field, state, longest):
        start = (state[0] @ H * state[0]).sum((-1, -2))
        late = torch.zeros(5)
        for k in range(1, longest + 1):
            state = ga.solve(field, state, 1.0, 1)
            over = (state[0] @ H * state[0]).sum((-1, -2)) > 1e-3 * start
            late = torch.where(over, float(k + 1), late)
        return late

    def first(x):
        return (-(x @ H) @ B / aa.partition(x, A).unsqueeze(-1),)

    def second(x, u):
        return aa.velocity_field(x, u, A, B, 0.2, gradient=lambda x: x @ H)

    slow, fast = steps(first, (x,), 400), steps(second, (x, torch.zeros_like(x)), 120)
    assert bool((slow < 400).all() and (fast < 120).all())
    assert bool((fast < slow).all())
    assert float(1 - fast.mean() / slow.mean()) >= 0.25
