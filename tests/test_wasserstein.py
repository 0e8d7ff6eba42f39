"""Particle flows: exact oracles at finite N, dissipation, time derivatives, failure."""

import math

import numpy as np
import pytest
import torch
from particle_cases import F64, KL, QUARTIC, B, Q, V, X, draw, mahalanobis, potential

from darboux import ConvergenceError
from darboux.flows import accelerated as ac, energies as en, gaussian as ga, wasserstein as wa
from darboux.flows.kernels import Bilinear, Gaussian, InverseMultiquadric
from darboux.manifolds import FlatTorus, Sphere


@pytest.mark.parametrize(
    ("name", "metric"), [("w2", wa.W2()), ("kw", wa.KalmanW2())], ids=["w2", "kw"]
)
def test_moments_of_six_particles_follow_the_closed_form(name, metric):
    run = wa.gradient_flow(KL, X, dt=0.01, steps=100, metric=metric, method="rk4", save_every=50)
    m, S = ga.moments(X)
    for t, x in zip(run.t, run.x, strict=True):
        exact = getattr(ga, f"{name}_flow")(m, S, B, Q, float(t))
        for a, b in zip(ga.moments(x), exact, strict=True):
            assert float((a - b).abs().max()) <= 1e-8
    # affine steps conserve the shape of the cloud to round-off
    assert float((mahalanobis(run.x) - mahalanobis(X)).abs().max()) <= 1e-11


def test_stein_flow_with_the_bilinear_kernel_follows_its_equation():
    A = torch.tensor([[0.8, 0.1], [0.1, 0.5]], dtype=F64)
    metric = wa.Stein(Bilinear(A))
    run = wa.gradient_flow(KL, X, dt=0.02, steps=25, metric=metric, method="rk4", save_every=25)
    exact = ga.solve(lambda m, S: ga.svgd_field(m, S, B, Q, A), ga.moments(X), 0.5, 100)
    for a, b in zip(ga.moments(run.x[-1]), exact, strict=True):
        assert float((a - b).abs().max()) <= 1e-8
    v = metric.velocity(KL, X, torch.full((6,), 1 / 6, dtype=F64))
    dm, dS = ga.svgd_field(*ga.moments(X), B, Q, A)
    z = X - X.mean(0)
    assert torch.allclose(v.mean(0), dm, atol=1e-13)
    assert torch.allclose((v.mT @ z + z.mT @ v) / 6, dS, atol=1e-13)
    assert float((mahalanobis(run.x[-1]) - mahalanobis(X)).abs().max()) <= 1e-11


def test_fisher_rao_reweights_by_the_density():
    w0 = torch.full((6,), 1 / 6, dtype=F64)
    run = wa.gradient_flow(V, X, dt=0.01, steps=100, metric=wa.FisherRao(), method="rk4")
    exact = torch.softmax(w0.log() - potential(X), -1)
    assert float((run.w[-1] - exact).abs().max()) <= 1e-9
    assert torch.equal(run.x[-1], X)

    class Relative(en.Energy):  # on fixed cells: w -> w0^(e^-t) pi^(1 - e^-t)
        def _value(self, x, w):
            return (w * (w.log() + potential(x))).sum(-1)

    run = wa.gradient_flow(Relative(), X, dt=0.01, steps=100, metric=wa.FisherRao(), method="rk4")
    exact = torch.softmax(math.exp(-1) * w0.log() - (1 - math.exp(-1)) * potential(X), -1)
    assert float((run.w[-1] - exact).abs().max()) <= 1e-9
    both = wa.FisherRao(transport=wa.W2())
    run = wa.gradient_flow(V, X, dt=0.01, steps=5, metric=both)
    assert float(run.w[-1].sum() - 1) <= 1e-12
    assert not torch.equal(run.x[-1], X)


def test_particles_that_repel_by_the_logarithm_come_to_rest_at_hermite_zeros():
    n = 5
    energy = en.Potential(lambda x: x.square().sum(-1) / 2) + en.Interaction(
        lambda z: -z.square().sum(-1).log() / 2
    )
    x = torch.linspace(-1, 1, n, dtype=F64)[:, None] + 0.1
    run = wa.gradient_flow(energy, x, dt=0.01, steps=100, method="rk4", save_every=50)
    c = (n - 1) / (2 * n)
    second = run.x.square().mean((-1, -2))
    exact = c + (second[0] - c) * torch.exp(-2 * run.t)
    assert float((second - exact).abs().max()) <= 1e-8
    end = wa.gradient_flow(energy, x, dt=0.1, steps=300, method="rk4").x[-1, :, 0]
    zeros = np.polynomial.hermite.hermroots([0] * n + [1]) / math.sqrt(n)
    assert float((end.sort().values - torch.as_tensor(zeros).sort().values).abs().max()) <= 1e-10


def test_quadratic_attraction_contracts_exactly_and_keeps_the_centre():
    energy = en.Interaction(lambda z: z.square().sum(-1) / 2)
    run = wa.gradient_flow(energy, X, dt=0.02, steps=50, method="rk4", save_every=50)
    exact = X.mean(0) + math.exp(-1) * (X - X.mean(0))
    assert float((run.x[-1] - exact).abs().max()) <= 1e-8


@pytest.mark.parametrize(
    "energy",
    [KL, QUARTIC, en.MMD(draw(5, 2, seed=3), Gaussian(1.0)) + V],
    ids=["kl", "blob", "mmd"],
)
@pytest.mark.parametrize(
    "metric", [wa.W2(), wa.KalmanW2(0.1), wa.Stein(Gaussian(1.0))], ids=["w2", "kw", "stein"]
)
def test_energy_falls_at_the_rate_of_dissipation(energy, metric):
    w = torch.full((6,), 1 / 6, dtype=F64)
    x = X.clone().requires_grad_()
    (g,) = torch.autograd.grad(energy.value(x), x)
    u = metric.force(energy, X, w)
    rate = float((g * metric.lift(X, w, u)).sum())
    assert abs(rate + float(wa.dissipation(energy, X, metric=metric))) <= 1e-12
    assert rate < 0


def test_stein_flow_of_any_kernel_is_its_formula():
    score = -torch.func.vmap(torch.func.grad(potential))(X)
    w = torch.full((6,), 1 / 6, dtype=F64)
    for kernel in (Gaussian(0.8), InverseMultiquadric(0.8)):
        jac = torch.func.jacrev(lambda y: kernel(X, y))(X)  # (i, j, l, d)
        repulsion = torch.einsum("ijjd->id", jac)
        expected = (kernel(X, X) @ score + repulsion) / 6
        assert torch.allclose(wa.Stein(kernel).velocity(KL, X, w), expected, atol=1e-13)
    near = wa.svgd(lambda x: -potential(x), X, dt=0.1, steps=3).x[-1]
    assert near.shape == X.shape


def test_the_adaptive_method_keeps_its_tolerance():
    m, S = ga.moments(X)
    errors = []
    for tol in (1e-4, 1e-8):
        run = wa.gradient_flow(KL, X, dt=0.5, steps=2, method="adaptive", rtol=tol, atol=tol)
        errors.append(float((ga.moments(run.x[-1]).cov - ga.w2_flow(m, S, B, Q, 1.0).cov).norm()))
    assert errors[0] <= 1e-3
    assert errors[1] <= 1e-7


def test_flow_on_the_sphere_and_the_torus_by_the_same_code():
    sphere = Sphere(2)
    x = sphere.project(draw(5, 3))
    pole = torch.tensor([0.0, 0.0, 1.0], dtype=F64)
    energy = en.Potential(lambda x: -(x @ pole))
    # the height of a particle obeys z' = 1 - z^2
    errors = []
    for n in (50, 100):
        run = wa.gradient_flow(energy, x, dt=1 / n, steps=n, metric=wa.W2(sphere))
        exact = torch.tanh(1 + torch.atanh(x[:, 2]))
        errors.append(float((run.x[-1, :, 2] - exact).abs().max()))
        assert float((run.x.norm(dim=-1) - 1).abs().max()) <= 1e-13
    assert 1.8 <= errors[0] / errors[1] <= 2.2
    run = ac.accelerated_flow(energy, x, dt=0.2, steps=400, metric=wa.W2(sphere))
    assert float((run.x[-1] - pole).abs().max()) <= 1e-4
    assert run.v is not None
    assert float((run.v * run.x).sum(-1).abs().max()) <= 1e-12
    torus = FlatTorus(2)
    energy = en.Potential(lambda x: -torch.cos(x).sum(-1))
    start = 0.5 * draw(4, 2, seed=1)
    run = wa.gradient_flow(energy, start, dt=0.1, steps=300, metric=wa.W2(torus))
    assert float(torus.dist(run.x[-1], torch.zeros(4, 2, dtype=F64)).max()) <= 1e-10


def test_resampling_copies_in_proportion():
    w = torch.tensor([0.5, 0.25, 0.25, 0.0], dtype=F64)
    x = torch.arange(4.0, dtype=F64)[:, None]
    y = wa.resample(x, w, torch.Generator().manual_seed(0))
    assert y[:, 0].tolist() == [0.0, 0.0, 1.0, 2.0]


def test_derivatives_through_time():
    h = torch.tensor(0.8, dtype=F64)

    def f(x, h, scale):
        energy = scale * V + en.Entropy("kde", h)
        plain = wa.gradient_flow(energy, x, dt=0.1, steps=2, method="rk4").x[-1]
        fast = ac.accelerated_flow(energy, x, dt=0.1, steps=3, metric=wa.Stein(Gaussian(h))).x[-1]
        return plain, fast

    inputs = [z.clone().requires_grad_() for z in (X[:3], h, torch.tensor(1.2, dtype=F64))]
    assert torch.autograd.gradcheck(f, inputs)


def test_an_unstable_step_is_reported_with_its_bound():
    stiff = en.Potential(lambda x: 50 * x.square().sum(-1))
    with pytest.raises(ConvergenceError, match="stable below about 0.02") as caught:
        wa.gradient_flow(stiff, X, dt=0.1, steps=100)
    kept = caught.value.trajectory
    assert bool(kept.x.isfinite().all())
    assert len(kept.t) > 3
    assert torch.equal(kept.x[0], X)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: wa.gradient_flow(V, X, dt=0.0, steps=1), "dt is 0.0"),
        (lambda: wa.gradient_flow(V, X, dt=0.1, steps=1, method="rk5"), "unknown method"),
        (
            lambda: wa.gradient_flow(V, X, dt=0.1, steps=1, w=torch.ones(2, dtype=F64)),
            "w has shape",
        ),
        (lambda: wa.gradient_flow(V, X * math.nan, dt=0.1, steps=1), "NaN"),
        (lambda: ac.accelerated_flow(V, X, dt=0.1, steps=1, restart="x"), "unknown restart"),
        (lambda: wa.KalmanW2(-1.0), "ridge"),
    ],
)
def test_bad_input_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize("kind", ["spread", "coincident", "one", "zero weight"])
@pytest.mark.parametrize("name", ["gaussian", "imq", "kalman", "rate"])
def test_gradcheck_of_metrics_in_particles_width_and_weights(name, kind):
    x = X[: 1 if kind == "one" else 4].clone()
    w = torch.full((len(x),), 1 / len(x), dtype=F64)
    if kind == "coincident":
        x[1] = x[0]

    def f(x, h, w):
        if kind == "zero weight":
            w = w * torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=F64)
        energy = V + 0.7 * en.Entropy("blob", h)
        if name == "rate":
            return wa.FisherRao().rate(energy, x, w)
        if name == "kalman":
            return wa.KalmanW2(0.1).velocity(energy, x, w)
        kernel = Gaussian(h) if name == "gaussian" else InverseMultiquadric(h)
        return wa.Stein(kernel).velocity(energy, x, w)

    inputs = [z.clone().requires_grad_() for z in (x, torch.tensor(0.8, dtype=F64), w)]
    assert bool(f(*inputs).isfinite().all())
    assert torch.autograd.gradcheck(f, inputs)
