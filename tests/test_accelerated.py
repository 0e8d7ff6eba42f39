"""Acceleration and Langevin dynamics of particles: Hamiltonians, rates, exact stationary laws."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from particle_cases import F64, KL, QUARTIC, B, Q, V, X, draw, mahalanobis

from darboux import GeometryError
from darboux._checks import unchecked
from darboux.flows import accelerated as ac, energies as en, gaussian as ga, wasserstein as wa
from darboux.flows.kernels import Gaussian
from darboux.manifolds import Sphere


@pytest.mark.parametrize(
    "metric", [wa.W2(), wa.KalmanW2(), wa.Stein(Gaussian(1.0))], ids=["w2", "kw", "stein"]
)
def test_the_hamiltonian_is_conserved_without_damping_at_order_four(metric):
    v, drift = 0.3 * draw(6, 2, seed=5), []
    for dt in (0.05, 0.025):
        run = ac.accelerated_flow(
            QUARTIC,
            X,
            v=v,
            dt=dt,
            steps=round(0.5 / dt),
            metric=metric,
            damping=ac.Constant(0.0),
            method="rk4",
            record_energy=False,
        )
        assert run.v is not None
        h = [
            ac.hamiltonian(QUARTIC, x, u, metric=metric)
            for x, u in ((X, v), (run.x[-1], run.v[-1]))
        ]
        drift.append(abs(float((h[1] - h[0]).detach())))
    assert drift[1] <= 1e-5
    assert drift[1] <= drift[0] / 12 or drift[1] <= 1e-10


def test_accelerated_moments_follow_their_equation():
    v = 0.2 * (X - X.mean(0)) + 0.1
    run = ac.accelerated_flow(
        KL, X, v=v, dt=0.01, steps=100, damping=ac.Constant(0.5), method="rk4", save_every=100
    )
    m, S = ga.moments(X)
    start = ga.Moving(m, S, v.mean(0), 0.2 * torch.eye(2, dtype=F64))
    end = ga.solve(lambda *y: ga.accelerated_field(ga.Moving(*y), B, Q, 0.5), start, 1.0, 100)
    for a, b in zip(ga.moments(run.x[-1]), end[:2], strict=True):
        assert float((a - b).abs().max()) <= 1e-9
    assert float((mahalanobis(run.x[-1]) - mahalanobis(X)).abs().max()) <= 1e-10


def target(kappa, d=4, n=8):
    """Return KL to a Gaussian of condition ``kappa`` and L = kappa, its start, and its value."""
    q = torch.logspace(0, -math.log10(kappa), d, dtype=F64)  # variances
    energy = en.KL(lambda x: -(x.square() / q).sum(-1) / 2, "gaussian")
    x = draw(n, d, seed=7)
    m, S = ga.moments(x)
    x = (x - m) @ torch.linalg.inv(torch.linalg.cholesky(S)).mT * q.sqrt() * 2 + q.sqrt()

    def reached(x):
        m, S = ga.moments(x)
        return ga.kl(m, S, torch.zeros_like(q), torch.diag(q)) <= 1e-6

    return energy, x, reached


@pytest.mark.parametrize(("kappa", "gain"), [(10, 1.0), (100, 2.5), (1000, 9.0)])
def test_acceleration_pays_by_the_root_of_the_condition(kappa, gain):
    energy, x, reached = target(kappa)
    tau = 1 / (2 * kappa)
    with unchecked():  # several hundred small steps
        most = {10: 80, 100: 200, 1000: 560}[kappa]
        run = ac.accelerated_flow(energy, x, dt=math.sqrt(tau), steps=most, record_energy=False)
        slow = wa.gradient_flow(energy, x, dt=tau, steps=20, record_energy=False)
    low = reached(run.x)
    assert bool(low[-20:].all())
    fast = int(low.to(torch.int).argmax())
    # the same steps of the gradient flow on mean and variance along each axis
    m, S = (a.numpy() for a in (ga.moments(x).mean, ga.moments(x).cov.diagonal()))
    q, count = torch.logspace(0, -math.log10(kappa), 4, dtype=F64).numpy(), 0
    while (S / q - 1 - np.log(S / q) + m * m / q).sum() / 2 > 1e-6:
        m, S = m - tau * m / q, S * (1 - tau * (1 / q - 1 / S)) ** 2
        count += 1
        if count == 20:
            end = ga.moments(slow.x[-1])
            assert np.abs(end.mean.numpy() - m).max() <= 1e-12
            assert np.abs(end.cov.diagonal().numpy() - S).max() <= 1e-12
    assert count >= gain * fast


@pytest.mark.parametrize("restart", [None, "gradient", "speed"])
@pytest.mark.parametrize("damping", [ac.Nesterov(), ac.StronglyConvex(1.0), ac.Constant(1.0)])
def test_every_acceleration_arrives(restart, damping):
    run = ac.accelerated_flow(
        V, X, dt=0.3, steps=400, damping=damping, restart=restart, save_every=400
    )
    assert float((run.x[-1] - B).abs().max()) <= (1e-2 if restart is None else 1e-4)


def test_baoab_has_the_exact_variance_of_positions():
    # the step is linear in (x, v, noise): read its matrix, solve for the stationary covariance
    k, dt, friction, temperature = 2.0, 0.7, 0.5, 1.3
    energy = en.Potential(lambda x: k * x.square().sum(-1) / 2)
    w = torch.ones(1, dtype=F64)
    columns = []
    for x, v, noise in torch.eye(3, dtype=F64):
        x, v, noise = (a.reshape(1, 1) for a in (x, v, noise))
        y = ac.baoab_step(
            x, v, -k * x, energy, w, noise, dt=dt, friction=friction, temperature=temperature
        )
        columns.append(torch.cat([y[0], y[1]]))
    M = torch.cat(columns, 1)
    A, b = M[:, :2], M[:, 2:]
    kron = torch.eye(4, dtype=F64) - torch.kron(A, A)
    cov = torch.linalg.solve(kron, (b @ b.mT).reshape(-1)).reshape(2, 2)
    assert abs(float(cov[0, 0]) - temperature / k) <= 1e-13
    assert abs(float(cov[0, 1])) <= 1e-13


def test_langevin_without_noise_is_the_flow_and_repeats_with_a_seed():
    cold = ac.langevin(V, X, dt=0.1, steps=3, temperature=0.0)
    flow = wa.gradient_flow(V, X, dt=0.1, steps=3)
    assert torch.allclose(cold.x, flow.x, atol=1e-14)
    circle = Sphere(1)
    cases: list[dict[str, Any]] = [{}, {"friction": 1.0}]
    cases += [{"metric": wa.KalmanW2(0.1)}, {"metric": wa.W2(circle)}]
    for kwargs in cases:
        x = circle.project(X)
        runs = [
            ac.langevin(V, x, dt=0.1, steps=3, generator=torch.Generator().manual_seed(0), **kwargs)
            for _ in range(2)
        ]
        assert torch.equal(runs[0].x, runs[1].x)
        assert not torch.allclose(runs[0].x[-1], x)
        if isinstance(kwargs.get("metric"), wa.W2):
            assert float((runs[0].x.norm(dim=-1) - 1).abs().max()) <= 1e-13


def test_underdamped_steps_tend_to_their_equation_at_order_two():
    # covariance of (x, v) in a harmonic potential: d/dt C = M C + C M^T + N, solved by exponentials
    k, friction, T = 2.0, 0.5, 1.3
    M = torch.tensor([[0.0, 1.0], [-k, -friction]], dtype=F64)
    rest = torch.diag(torch.tensor([T / k, T], dtype=F64))
    start = torch.tensor([[0.2, 0.1], [0.1, 2.0]], dtype=F64)
    P = torch.linalg.matrix_exp(M)
    exact = rest + P @ (start - rest) @ P.mT
    energy = en.Potential(lambda x: k * x.square().sum(-1) / 2)
    errors = []
    for n in (10, 20):
        columns = []
        for x, v, noise in torch.eye(3, dtype=F64):
            x, v, noise = (a.reshape(1, 1) for a in (x, v, noise))
            w = torch.ones(1, dtype=F64)
            options: dict[str, Any] = {"dt": 1 / n, "friction": friction, "temperature": T}
            y = ac.baoab_step(x, v, -k * x, energy, w, noise, **options)
            columns.append(torch.cat([y[0], y[1]]))
        step = torch.cat(columns, 1)
        C = start
        for _ in range(n):
            C = step[:, :2] @ C @ step[:, :2].mT + step[:, 2:] @ step[:, 2:].mT
        errors.append(float((C - exact).norm()))
    assert 3.5 <= errors[0] / errors[1] <= 4.5


def test_kalman_langevin_corrects_by_the_divergence_of_its_metric(monkeypatch):
    w = torch.tensor([0.3, 0.1, 0.2, 0.15, 0.15, 0.1], dtype=F64)
    jac = torch.func.jacrev(lambda x: ga.moments(x, w).cov)(X)  # (a, b, i, c)
    divergence = torch.einsum("abia->ib", jac)
    monkeypatch.setattr(torch, "randn", lambda *_, **kwargs: torch.zeros(6, 2, dtype=F64))
    free = en.Potential(lambda x: 0 * x.sum(-1))
    options: dict[str, Any] = {"dt": 0.1, "steps": 1, "w": w, "temperature": 1.3}
    x = ac.langevin(free, X, metric=wa.KalmanW2(0.1), **options).x[-1]
    assert float((x - X - 0.13 * divergence).abs().max()) <= 1e-14
    with pytest.raises(GeometryError, match="singular"):
        ac.langevin(V, X[:1], dt=0.1, steps=1, metric=wa.KalmanW2())
