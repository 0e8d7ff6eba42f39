"""Particles on manifolds, rows of exact laws, Sinkhorn's schedule, and accuracy far from 0."""

import math

import pytest
import torch

from darboux.flows import (
    accelerated as ac,
    energies as en,
    gaussian as ga,
    kernel_sums as ks,
    wasserstein as wa,
)
from darboux.flows.kernels import Gaussian, InverseMultiquadric
from darboux.flows.sinkhorn import SinkhornDivergence
from darboux.manifolds import FlatTorus, Hyperbolic, Sphere

F64 = torch.float64


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


# -- on manifolds ----------------------------------------------------------------------------

SPACES = {
    "sphere": (Sphere(2), Sphere(2).project(0.5 * draw(5, 3) + torch.tensor([0, 0, 1.0]).double())),
    "ball": (Hyperbolic(2), 0.3 * draw(5, 2)),
    "half-space": (
        Hyperbolic(2, -0.7, "half_space"),
        0.3 * draw(5, 2) * torch.tensor([1.0, 0.5]).double() + torch.tensor([0.0, 1.0]).double(),
    ),
    "torus": (FlatTorus(2), 0.5 * draw(5, 2)),
}
W = torch.tensor([0.3, 0.1, 0.2, 0.15, 0.25], dtype=F64)


class Attraction(en.Energy):
    """Half the mean of half the squared distances of pairs: each is drawn along geodesics."""

    def __init__(self, space):
        super().__init__()
        self.space = space

    def _value(self, x, w):
        i, j = torch.triu_indices(x.shape[-2], x.shape[-2], 1)
        d = self.space.dist(x[..., i, :], x[..., j, :])
        return (w[..., i] * w[..., j] * d.square()).sum(-1) / 2


@pytest.mark.parametrize("name", SPACES)
def test_particles_on_a_manifold_fall_along_geodesics(name):
    space, x = SPACES[name]
    energy, metric = Attraction(space), wa.W2(space)
    v = metric.velocity(energy, x, W)
    # velocity = -(1/w) grad_M E = sum_j w_j log_{x_i} x_j, and nothing of a particle from itself
    logs = space.log(x[:, None].expand(5, 5, -1), x[None].expand(5, 5, -1))
    logs = torch.where(torch.eye(5, dtype=torch.bool).unsqueeze(-1), 0.0, logs)
    assert float((v - (W[:, None] * logs).sum(1)).abs().max()) <= 1e-10
    z = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(energy.value(z, W), z)
    rate = float((g * v).sum())  # the differential along the velocity
    assert abs(rate + float(wa.dissipation(energy, x, W, metric))) <= 1e-10 * abs(rate)
    assert rate < 0
    run = wa.gradient_flow(energy, x, w=W, dt=0.3, steps=12, metric=metric)
    assert run.energy is not None
    assert bool((run.energy.diff() < 0).all())
    assert float(run.energy[-1]) <= 1e-2 * float(run.energy[0])
    # explicit steps follow the energy at order one
    small = wa.gradient_flow(energy, x, w=W, dt=1e-4, steps=1, metric=metric)
    assert small.energy is not None
    assert abs(float(small.energy[1] - small.energy[0]) / 1e-4 - rate) <= 1e-3 * abs(rate)


@pytest.mark.parametrize("name", SPACES)
def test_momentum_is_carried_along_geodesics(name):
    space, x = SPACES[name]
    still = en.Potential(lambda x: 0 * x.sum(-1))
    v = space.random_tangent(x, generator=torch.Generator().manual_seed(1))
    run = ac.accelerated_flow(
        still, x, v=v, dt=0.1, steps=5, metric=wa.W2(space), damping=ac.Constant(0.0)
    )
    # without force and damping every particle moves on its geodesic
    gap = space.dist(run.x[-1], space.exp(x, 0.5 * v))
    assert float(gap.max()) <= 1e-7  # a distance near 0 is a root of round-off
    assert run.v is not None
    speed = [space.norm(a, b) for a, b in ((x, v), (run.x[-1], run.v[-1]))]
    assert torch.allclose(*speed, rtol=1e-10)
    noisy = ac.langevin(
        Attraction(space),
        x,
        dt=0.01,
        steps=3,
        metric=wa.W2(space),
        generator=torch.Generator().manual_seed(0),
    )
    assert float(space.dist(space.project(noisy.x[-1]), noisy.x[-1]).max()) <= 1e-7
    assert float(space.dist(noisy.x[-1], x).min()) > 1e-3


# -- exact laws ------------------------------------------------------------------------------


def test_fisher_rao_keeps_gaussians_gaussian_with_mixing_precisions():
    x = torch.linspace(-9, 9, 181, dtype=F64)[:, None]
    m, S, b, Q = (torch.tensor(v, dtype=F64) for v in ([0.6], [[0.5]], [-0.4], [[1.5]]))
    w = torch.softmax(-((x[:, 0] - 0.6) ** 2) / (2 * 0.5), 0)

    class Relative(en.Energy):  # the entropy of a density on a grid
        def _value(self, x, w):
            return (w * (w.log() + (x[:, 0] + 0.4) ** 2 / (2 * 1.5))).sum(-1)

    run = wa.gradient_flow(
        Relative(), x, w=w, dt=0.005, steps=200, metric=wa.FisherRao(), method="rk4", save_every=200
    )
    for a, e in zip(ga.moments(x, run.w[-1]), ga.fr_flow(m, S, b, Q, 1.0), strict=True):
        assert float((a - e).abs().max()) <= 1e-8


def test_the_second_moment_of_a_log_gas_in_the_plane():
    n = 6
    energy = en.Potential(lambda x: x.square().sum(-1) / 2) + en.Interaction(
        lambda z: -z.square().sum(-1).log() / 2
    )
    turn = 2 * math.pi * torch.arange(n, dtype=F64) / n
    x = torch.stack([turn.cos(), 0.7 * turn.sin()], -1) + 0.05 * draw(n, 2)
    run = wa.gradient_flow(energy, x, dt=0.01, steps=50, method="rk4", save_every=25)
    c = (n - 1) / (2 * n)
    second = run.x.square().sum(-1).mean(-1)
    exact = c + (second[0] - c) * torch.exp(-2 * run.t)
    assert float((second - exact).abs().max()) <= 1e-8


def test_blobs_of_a_porous_medium_move_as_its_self_similar_solution():
    # m = 2 on a line: rho = C - x^2/12 at t = 1 expands at speed x/3; inside, smoothing a
    # parabola shifts it, so that the blob velocity is exact there
    r = 2.0
    x = torch.linspace(-r, r, 801, dtype=F64)[:, None]
    w = (r**2 - x[:, 0] ** 2).clamp_min(0.0)
    mass = 4 * r**3 / 36  # of (r^2 - x^2)/12
    v = mass * en.Power(2.0, 4e-3).velocity(x, w / w.sum())
    inside = x[:, 0].abs() < 1.5
    # the trapezium rule misses the corners: its mass is off by (2/800)^2 / 2
    assert float((v - x / 3)[inside].abs().max()) <= 2e-6
    z = torch.linspace(-r, r, 1601, dtype=F64)[:, None]
    u = r**2 - z[:, 0] ** 2
    finer = mass * en.Power(2.0, 4e-3).velocity(z, u / u.sum())
    both = (4 * finer[::2] - v) / 3  # its error goes as the square of the spacing
    assert float((both - x / 3)[inside].abs().max()) <= 1e-8


def test_flows_of_convex_energies_contract():
    energy = en.Potential(lambda x: (x**4).sum(-1) / 4 + 0.7 * x.square().sum(-1) / 2)
    x, y = draw(9, 1), draw(9, 1, seed=1)

    def w2(a, b):
        return float((a.sort(0).values - b.sort(0).values).square().mean().sqrt())

    ends = [wa.gradient_flow(energy, z, dt=0.05, steps=20, method="rk4").x[-1] for z in (x, y)]
    assert w2(*ends) <= math.exp(-0.7) * w2(x, y)
    linear = en.Potential(lambda x: 0.7 * x.square().sum(-1) / 2)
    ends = [wa.gradient_flow(linear, z, dt=0.02, steps=50, method="rk4").x[-1] for z in (x, y)]
    assert abs(w2(*ends) - math.exp(-0.7) * w2(x, y)) <= 1e-8


# -- Sinkhorn --------------------------------------------------------------------------------


def by_matrices(x, y, blur, scaling):
    """Return the divergence by averaged steps of one schedule, as Feydy et al. write them."""
    size = float((torch.cat([x, y]).amax(0) - torch.cat([x, y]).amin(0)).norm())
    eps, s = [size**2], size
    while s > blur:
        eps.append(s**2)
        s *= scaling
    eps.append(blur**2)

    def soft(e, c, g):
        return -e * ((g - c) / e - math.log(c.shape[-1])).logsumexp(-1)

    def solve(x, y):
        c = torch.cdist(x, y).square() / 2
        f, g = soft(eps[0], c, 0 * c[0]), soft(eps[0], c.mT, 0 * c[:, 0])
        for e in eps:
            f, g = (f + soft(e, c, g)) / 2, (g + soft(e, c.mT, f)) / 2
        return soft(eps[-1], c, g), soft(eps[-1], c.mT, f)

    f, g = solve(x, y)
    return (f - solve(x, x)[0]).mean() + (g - solve(y, y)[0]).mean()


@pytest.mark.parametrize("kind", ["spread", "coincident", "one", "zero weight"])
def test_the_sinkhorn_velocity_differentiates_implicitly(kind):
    # in the particles, their weights and the target: along one direction, by differences
    x = draw(1 if kind == "one" else 4, 2)
    w = torch.full((len(x),), 1 / len(x), dtype=F64)
    if kind == "coincident":
        x[1] = x[0]

    def f(x, w, y):
        if kind == "zero weight":
            w = w * torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=F64)
        energy = SinkhornDivergence(Y3, 2.0, tol=1e-12)
        energy.y = y
        return energy._velocity(x, w / w.sum())

    inputs = [z.clone().requires_grad_() for z in (x, w, Y3)]
    along = [draw(*z.shape, seed=7) for z in inputs]
    c, t = draw(*x.shape, seed=8), 1e-4
    found = torch.autograd.grad((c * f(*inputs)).sum(), inputs)
    slope = sum(float((g * e).sum()) for g, e in zip(found, along, strict=True))
    with torch.no_grad():
        ends = [f(*(z + s * e for z, e in zip(inputs, along, strict=True))) for s in (t, -t)]
    assert abs(slope - float((c * (ends[0] - ends[1])).sum()) / (2 * t)) <= 1e-6 * (1 + abs(slope))


Y3 = draw(3, 2, seed=1)


def test_the_derivative_of_the_sinkhorn_velocity_is_refused_where_it_is_not():
    energy = SinkhornDivergence(Y3, 1.0)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        with pytest.raises(NotImplementedError, match="torch.autograd"):
            transform(energy.velocity)(draw(4, 2))


@pytest.mark.parametrize("blur", [0.5, 0.05, 1e-3])
def test_the_schedule_alone_gives_the_numbers_of_matrices(blur):
    x, y = draw(20, 2), draw(25, 2, seed=1) + 1
    value = SinkhornDivergence(y, blur, tol=None).value(x)
    assert abs(float(value - by_matrices(x, y, blur, 0.5))) <= 1e-11


def test_sinkhorn_differentiates_under_every_transform():
    x, y = draw(3, 6, 2), draw(5, 2, seed=1)
    energy = SinkhornDivergence(y, 0.8, tol=1e-12)
    z = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(energy.value(z).sum(), z)
    assert torch.allclose(torch.func.grad(energy.value)(x[0]), expected[0], atol=1e-10)
    both = torch.func.vmap(torch.func.grad(energy.value))(x)
    assert torch.allclose(both, expected, atol=1e-10)
    v = torch.func.vmap(energy.velocity)(x)
    assert torch.allclose(v, -6 * expected, atol=1e-10)
    t = draw(6, 2, seed=2)
    slope = torch.func.jvp(energy.value, (x[0],), (t,))[1]
    assert abs(float(slope - (expected[0] * t).sum())) <= 1e-10


def test_the_log_sum_knows_its_derivatives_in_one_place_alone():
    q, k = draw(2, 5, 3).requires_grad_(), draw(7, 3, seed=1)
    found = ks.log_sum(q, k)
    expected = (q @ k.mT).logsumexp(-1)
    assert torch.allclose(found, expected, rtol=1e-13)
    assert torch.autograd.gradcheck(lambda q: ks.log_sum(q, k), q)
    assert torch.autograd.gradgradcheck(lambda q: ks.log_sum(q, k), q)


# -- far from the origin ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["blob", "kde", "power", "mmd", "imq", "sinkhorn", "gaussian"])
def test_float32_is_accurate_far_from_the_origin(name):
    x, y = (draw(40, 2) + 50).float(), (draw(30, 2, seed=1) + 50).float()

    def made(y):
        return {
            "blob": en.Entropy("blob", 0.5),
            "kde": en.Entropy("kde", 0.5),
            "gaussian": en.Entropy("gaussian"),
            "power": en.Power(2.0, 0.5),
            "mmd": en.MMD(y, Gaussian(0.5)),
            "imq": en.MMD(y, InverseMultiquadric(0.5)),
            "sinkhorn": SinkhornDivergence(y, 0.5, tol=1e-3),
        }[name]

    found, exact = made(y).velocity(x), made(y.double()).velocity(x.double())
    assert float((found - exact).abs().max()) <= 2e-4 * float(exact.abs().max())
    w, u = torch.full((40,), 1 / 40), draw(40, 2, seed=3).float()
    for metric in (wa.KalmanW2(), wa.Stein(Gaussian(0.5))):
        a, b = metric.lift(x, w, u), metric.lift(x.double(), w.double(), u.double())
        assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())
