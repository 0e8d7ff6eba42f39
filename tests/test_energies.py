"""Energies: velocities against gradients of values, closed forms, sums, degenerate particles."""

import math

import pytest
import torch

from darboux import ConvergenceError, GeometryError
from darboux.flows import energies as en, gaussian as ga
from darboux.flows.kernels import Distance, Gaussian, InverseMultiquadric
from darboux.flows.sinkhorn import SinkhornDivergence

F64 = torch.float64


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def quartic(x):
    return (x**4).sum(-1) / 4 + x[..., 0] * x[..., -1]


X, Y = draw(7, 2), draw(5, 2, seed=1)
W = draw(7, seed=2).abs() + 0.1
W = W / W.sum()
ENERGIES = {
    "potential": en.Potential(quartic),
    "interaction": en.Interaction(lambda z: (1 + z.square().sum(-1)).log()),
    "log": en.Interaction(lambda z: -z.square().sum(-1).log() / 2),
    "gaussian": en.Entropy("gaussian"),
    "blob": en.Entropy("blob", 0.6),
    "power": en.Power(3.0, 0.6),
    "mmd": en.MMD(Y, Gaussian("median")),
    "mmd_imq": en.MMD(Y, InverseMultiquadric(0.7)),
    "energy_distance": en.MMD(Y, Distance()),
    "sinkhorn": SinkhornDivergence(Y, 1.3, tol=1e-13),
    "sliced": en.SlicedW2(Y, 5, generator=torch.Generator().manual_seed(3)),
}
ENERGIES["sum"] = 2.0 * ENERGIES["potential"] + 0.5 * ENERGIES["blob"] - 0.1 * ENERGIES["mmd"]


@pytest.mark.parametrize("name", ENERGIES)
@pytest.mark.parametrize("w", [None, W])
def test_velocity_is_minus_n_times_the_gradient(name, w):
    energy = ENERGIES[name]
    x = X.clone().requires_grad_()
    value = energy.value(x, w)
    (g,) = torch.autograd.grad(value, x)
    weight = torch.full((7,), 1 / 7, dtype=F64) if w is None else w
    v = energy.velocity(X, w)
    assert float((v + g / weight[:, None]).abs().max()) <= 1e-12 * max(1, float(v.abs().max()))
    assert energy.exact
    # finite differences along a line: the value knows of its own gradient
    e, t = draw(7, 2, seed=4), 1e-5
    slope = (energy.value(X + t * e, w) - energy.value(X - t * e, w)) / (2 * t)
    assert abs(float((slope - (g * e).sum()).detach())) <= 1e-7 * (1 + abs(float(slope.detach())))


@pytest.mark.parametrize("name", ENERGIES)
def test_the_variation_is_the_derivative_in_the_weights(name):
    # along changes of weight that keep the mass
    energy, e = ENERGIES[name], draw(7, seed=5)
    e = (e - e.mean()) * W.min() / e.abs().max()
    t = 1e-5
    slope = (energy.value(X, W + t * e) - energy.value(X, W - t * e)) / (2 * t)
    assert abs(float(slope - (energy.variation(X, W) * e).sum())) <= 1e-8


@pytest.mark.parametrize("name", ENERGIES)
@pytest.mark.parametrize("kind", ["coincident", "one", "zero weight"])
def test_degenerate_particles_give_finite_values_and_derivatives(name, kind):
    energy, w = ENERGIES[name], None
    x = X.clone()
    if kind == "coincident":
        x[3] = x[1]
    elif kind == "one":
        x = x[:1]
    else:
        w = W.clone()
        w[2] = 0.0
        w = w / w.sum()
    if name == "log" and kind == "coincident":
        return  # a singular energy is infinite there, and says so
    if name == "gaussian" and kind == "one":
        with pytest.raises(GeometryError, match="singular"):
            energy.value(x)
        energy = en.Entropy("gaussian", ridge=0.1)
    x.requires_grad_()
    value, v = energy.value(x, w), energy.velocity(x, w)
    (g,) = torch.autograd.grad(value, x, allow_unused=True, materialize_grads=True)
    for a in (value, v, g):
        assert bool(a.isfinite().all())
    if kind == "zero weight":  # the others do not see it
        keep = [i for i in range(7) if i != 2]
        assert w is not None
        assert torch.allclose(v[keep], energy.velocity(x[keep], w[keep]), atol=1e-9)


@pytest.mark.parametrize("score", en.SCORES)
@pytest.mark.parametrize("kind", ["spread", "coincident"])
def test_gradcheck_of_scores_in_particles_width_and_weights(score, kind):
    x = draw(5, 2, seed=6)
    if kind == "coincident":
        x[1] = x[0]
    h = torch.tensor(0.8, dtype=F64)
    w = draw(5, seed=7).abs() + 0.2
    w = w / w.sum()

    def f(x, h, w):
        return en.Entropy(score, h)._velocity(x, w)

    inputs = [z.clone().requires_grad_() for z in (x, h, w)]
    assert torch.autograd.gradcheck(f, inputs, atol=1e-6)


def test_gradcheck_in_the_parameters_of_a_network():
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)
    ).double()
    energy = en.Potential(lambda x: net(x).squeeze(-1)) + en.Entropy("blob", 0.5)
    x = draw(4, 2).requires_grad_()

    def f(x, *_):
        return energy.velocity(x)

    assert torch.autograd.gradcheck(f, (x, *net.parameters()))


def test_the_gaussian_score_is_exact_and_the_stein_score_tends_to_it():
    m, S = ga.moments(X)
    v = en.Entropy("gaussian").velocity(X)
    assert torch.allclose(v, (X - m) @ torch.linalg.inv(S), atol=1e-12)
    # a wide kernel and a small ridge recover a linear score, up to the noise of the draw
    x = draw(400, 1)
    stein = en.Entropy("stein", 4.0, ridge=1e-6).velocity(x)
    bulk = x.abs() < 1
    assert float((stein - x)[bulk].abs().max()) <= 0.35
    coarse = en.Entropy("stein", 4.0, ridge=10.0).velocity(x)
    assert float(coarse.norm()) < 0.5 * float(stein.norm())  # the ridge shrinks it


def test_the_bias_of_the_kernel_score_is_the_stated_one():
    # at rest, var + h = q for a Gaussian: quadrature nodes of N(0, q - h) are a fixed point
    import numpy as np

    q, h = 1.0, 0.1
    z, w = (torch.as_tensor(a) for a in np.polynomial.hermite_e.hermegauss(120))
    keep = w > 1e-25 * w.max()
    z, w = z[keep], w[keep] / w[keep].sum()
    x = (math.sqrt(q - h) * z)[:, None]
    energy = en.KL(lambda x: -x.square().sum(-1) / (2 * q), "kde", h)
    v = energy.velocity(x, w)
    assert float(v[z.abs() < 2].abs().max()) <= 1e-8
    other = en.KL(lambda x: -x.square().sum(-1) / (2 * q), "kde", 2 * h).velocity(x, w)
    assert float(other[z.abs() < 2].abs().max()) >= 0.1


def test_sinkhorn_against_gaussians_and_itself():
    import numpy as np

    z, p = (torch.as_tensor(a) for a in np.polynomial.hermite_e.hermegauss(40))
    p = p / p.sum()
    x, y, blur = 0.7 * z[:, None] + 0.3, 1.2 * z[:, None], 0.8
    found = SinkhornDivergence(y, blur, p, tol=1e-13).value(x, p)
    exact = ga.sinkhorn_divergence(
        torch.tensor([0.3], dtype=F64),
        torch.tensor([[0.49]], dtype=F64),
        torch.tensor([0.0], dtype=F64),
        torch.tensor([[1.44]], dtype=F64),
        blur,
    )
    assert abs(float(found - exact)) <= 1e-10
    same = SinkhornDivergence(X, 0.3, tol=1e-12)
    assert abs(float(same.value(X))) <= 1e-14
    assert float(same.velocity(X).abs().max()) <= 1e-12
    # a translation costs half its square and moves all particles alike
    shift = torch.tensor([0.4, -0.2], dtype=F64)
    assert abs(float(SinkhornDivergence(X + shift, 0.7, tol=1e-12).value(X)) - 0.1) <= 1e-11


def test_sinkhorn_reports_failure():
    with pytest.raises(ConvergenceError, match="blur 0.001"):
        SinkhornDivergence(Y, 1e-3, tol=1e-12, max_iter=3).value(X)


def test_the_sliced_distance_on_a_line_is_the_distance():
    x, y = draw(6, 1), draw(6, 1, seed=1)
    one = torch.ones(1, 1, dtype=F64)
    energy = en.SlicedW2(y, one)
    expected = (x.sort(0).values - y.sort(0).values).square().mean() / 2
    assert abs(float(energy.value(x) - expected)) <= 1e-14
    assert torch.allclose(x + energy.velocity(x), y.sort(0).values[x.argsort(0).argsort(0)[:, 0]])
    # a weight is a repeated particle
    double = torch.cat([y, y[:1]])
    u = torch.tensor([2.0, 1, 1, 1, 1, 1], dtype=F64) / 7
    a, b = en.SlicedW2(double, one).value(x), en.SlicedW2(y, one, u).value(x)
    assert abs(float(a - b)) <= 1e-14


def test_batches_are_independent_and_float32_follows():
    both = torch.stack([X, draw(7, 2, seed=8)])
    for name, energy in ENERGIES.items():
        value, v = energy.value(both), energy.velocity(both)
        assert value.shape == (2,)
        assert torch.allclose(v[1], energy.velocity(both[1]), atol=1e-10), name
    small = en.Entropy("blob", 0.6)
    assert small.velocity(X.float()).dtype == torch.float32
    assert torch.allclose(small.velocity(X.float()).double(), small.velocity(X), atol=1e-5)


@pytest.mark.parametrize(
    ("w", "error"),
    [
        (torch.ones(3, dtype=F64) / 3, ValueError),
        (torch.ones(7, dtype=F64), ValueError),
        (torch.ones(7) / 7, TypeError),
        (torch.tensor([2.0, -1, 0, 0, 0, 0, 0], dtype=F64), ValueError),
    ],
)
def test_bad_weights_are_refused(w, error):
    with pytest.raises(error, match="w |weights"):
        ENERGIES["blob"].value(X, w)


@pytest.mark.parametrize(
    "name",
    ["interaction", "log", "gaussian", "power", "mmd", "mmd_imq", "energy_distance", "sliced"],
)
def test_gradcheck_of_velocities_in_particles_and_weights(name):
    energy, w = ENERGIES[name], torch.tensor([0.31, 0.12, 0.23, 0.34], dtype=F64)
    inputs = [X[:4].clone().requires_grad_(), w.requires_grad_()]
    # a law: the sliced distance has a kink where masses differ
    assert torch.autograd.gradcheck(lambda x, w: energy._velocity(x, w / w.sum()), inputs)
    both = torch.stack([X[:4], X[3:]])
    batch = torch.func.vmap(energy.velocity)(both)
    assert torch.allclose(batch[1], energy.velocity(X[3:]), atol=1e-12)
