"""Learned metrics: bounds, structure, gradients, training, decoders."""

import math

import pytest
import torch
from torch import nn

from darboux._checks import GeometryError
from darboux.manifolds import (
    Chart,
    CholeskyNetwork,
    ConformalNetwork,
    DecoderPullback,
    DiagonalNetwork,
    LowRankNetwork,
    RBFUncertainty,
    TokenBumps,
)
from darboux.manifolds._layers import Jet, push


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def bumps(dim=3, n=5, learnable=False, dtype=torch.float64):
    draw = seeded(3)
    centers = torch.randn(n, dim, generator=draw, dtype=dtype)
    directions = torch.randn(n, dim, generator=draw, dtype=dtype)
    heights = torch.rand(n, generator=draw, dtype=dtype)
    sigma = 0.5 + torch.rand(n, generator=draw, dtype=dtype)
    return TokenBumps(centers, directions, heights, sigma, learnable=learnable)


def decoder(dtype=torch.float64, std=True):
    draw = seeded(4)
    mean = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 6)).to(dtype)
    with torch.no_grad():
        for p in mean.parameters():
            p.copy_(torch.randn(p.shape, generator=draw, dtype=dtype) * 0.7)
    centers = torch.randn(7, 2, generator=draw, dtype=dtype)
    spread = RBFUncertainty(centers, 0.9, precision=20.0, floor=1.0) if std else None
    return DecoderPullback(mean, spread, dim=2)


CASES = {
    "cholesky": lambda dtype: CholeskyNetwork(3, 16, dtype=dtype, generator=seeded()),
    "cholesky 1d": lambda dtype: CholeskyNetwork(1, 8, dtype=dtype, generator=seeded()),
    "conformal": lambda dtype: ConformalNetwork(3, 16, dtype=dtype, generator=seeded()),
    "diagonal": lambda dtype: DiagonalNetwork(3, 16, dtype=dtype, generator=seeded()),
    "low rank": lambda dtype: LowRankNetwork(4, 2, 16, dtype=dtype, generator=seeded()),
    "bumps": lambda dtype: bumps(dtype=dtype),
    "learnable bumps": lambda dtype: bumps(learnable=True, dtype=dtype),
    "decoder": lambda dtype: decoder(dtype),
    "mean decoder": lambda dtype: decoder(dtype, std=False),
}


@pytest.fixture(params=CASES)
def space(request):
    return CASES[request.param](torch.float64)


class Plain(Chart):
    """The same metric with everything derived by automatic differentiation."""

    def __init__(self, other):
        super().__init__(other.dim)
        self.other = other

    def metric(self, x):
        return self.other.metric(x)


def points(space, *shape, seed=1, scale=0.7):
    return scale * torch.randn(*shape, space.dim, generator=seeded(seed), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (20,), (3, 4, 5)])
@pytest.mark.parametrize("name", CASES)
def test_shape_dtype_symmetry_and_floor(name, shape, dtype):
    space = CASES[name](dtype)
    x = (10 * points(space, *shape)).to(dtype)
    g = space.metric(x)
    assert g.shape == (*shape, space.dim, space.dim)
    assert g.dtype == dtype
    assert torch.equal(g, g.mT) or (g - g.mT).abs().max() <= 1e-6 * g.abs().max()
    slack = 20 * torch.finfo(dtype).eps * float(g.detach().abs().max())
    assert torch.linalg.eigvalsh(g).min() >= space.floor - slack
    assert space.acceleration(x, torch.ones_like(x)).shape == x.shape
    assert space.floor > 0


def test_ceiling_of_the_conformal_network():
    space = ConformalNetwork(2, floor=0.5, ceiling=3.0, generator=seeded(), dtype=torch.float64)
    with torch.no_grad():
        for p in space.parameters():
            p.mul_(100)
    e = torch.linalg.eigvalsh(space.metric(100 * points(space, 200)))
    assert e.min() >= 0.5 - 1e-12
    assert e.max() <= 3.0 + 1e-12
    assert e.max() - e.min() > 2


def test_structure_agrees_with_autodiff_of_the_metric(space):
    plain = Plain(space)
    x, v, p = (points(space, 5, seed=s) for s in (1, 2, 3))
    for name, args in {
        "acceleration": (x, v),
        "_geodesic_field": (x, p),
        "sharp": (x, p),
        "flat": (x, v),
        "log_volume": (x,),
        "riemann": (x,),
        "scalar_curvature": (x,),
    }.items():
        got, expected = getattr(space, name)(*args), getattr(plain, name)(*args)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_acceleration_against_finite_differences_of_the_metric(space):
    x, v = points(space, 4), points(space, 4, seed=2)
    h = 1e-5
    eye = torch.eye(space.dim, dtype=x.dtype)
    dg = torch.stack(
        [(space.metric(x + h * e) - space.metric(x - h * e)) / (2 * h) for e in eye], -1
    )  # (..., a, b, c)
    low = torch.einsum("...jlk,...j,...k->...l", dg, v, v)
    low = low - 0.5 * torch.einsum("...jkl,...j,...k->...l", dg, v, v)
    with torch.no_grad():
        g = space.metric(x)
    expected = -torch.linalg.inv(g) @ low.unsqueeze(-1)
    torch.testing.assert_close(space.acceleration(x, v), expected[..., 0], rtol=1e-6, atol=1e-6)


def test_exp_and_log_are_inverse_and_conserve_speed(space):
    x, v = points(space, 3, scale=0.3), points(space, 3, seed=2, scale=0.3)
    y = space.exp(x, v)
    torch.testing.assert_close(space.log(x, y), v, rtol=1e-7, atol=1e-7)
    h = 1e-5
    end = (space.exp(x, (1 + h) * v) - space.exp(x, (1 - h) * v)) / (2 * h)
    torch.testing.assert_close(space.norm(y, end), space.norm(x, v), rtol=1e-7, atol=1e-7)


def test_parameter_gradients_equal_finite_differences(space):
    trained = [p for p in space.parameters() if p.requires_grad]
    if not trained:
        pytest.skip("no parameters")
    x, v = points(space, 2, scale=0.4), points(space, 2, seed=2, scale=0.4)
    directions = [torch.randn(p.shape, generator=seeded(9), dtype=p.dtype) for p in trained]

    def shifted(h, f):
        with torch.no_grad():
            for p, d in zip(trained, directions, strict=True):
                p.add_(h * d)
            value = f()
            for p, d in zip(trained, directions, strict=True):
                p.sub_(h * d)
        return value

    for f in (
        lambda: space.scalar_curvature(x).sum() if space.dim > 1 else space.metric(x).sum(),
        lambda: space.exp(x, v).sum(),
        lambda: space.sqdist(x, x + v).sum(),
    ):
        grads = torch.autograd.grad(f(), trained, allow_unused=True, materialize_grads=True)
        assert all(g.isfinite().all() for g in grads)
        slope = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
        h = 1e-5
        expected = (shifted(h, f) - shifted(-h, f)) / (2 * h)
        torch.testing.assert_close(slope, expected, rtol=2e-5, atol=2e-6)


def test_gradient_of_a_gradient_in_the_parameters():
    space = CholeskyNetwork(2, 8, dtype=torch.float64, generator=seeded())
    x = points(space, 3)
    weight = space.network.get_parameter("0.weight")
    (first,) = torch.autograd.grad(
        space.scalar_curvature(x).square().sum(), weight, create_graph=True
    )
    (second,) = torch.autograd.grad(first.square().sum(), weight)
    assert second.isfinite().all()
    d = torch.randn(weight.shape, generator=seeded(5), dtype=weight.dtype)
    norms, h = [], 1e-5
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(sign * h * d)
        (g,) = torch.autograd.grad(space.scalar_curvature(x).square().sum(), weight)
        norms.append(g.square().sum())
        with torch.no_grad():
            weight.sub_(sign * h * d)
    torch.testing.assert_close(
        (second * d).sum(), (norms[0] - norms[1]) / (2 * h), rtol=1e-5, atol=0
    )


class Curvature(nn.Module):
    """The public way to functional calls: a module with a forward around the manifold."""

    def __init__(self, space):
        super().__init__()
        self.space = space

    def forward(self, x):
        return self.space.scalar_curvature(x)


def test_functional_call_grad_and_ensembles():
    spaces = [DiagonalNetwork(2, 8, dtype=torch.float64, generator=seeded(s)) for s in range(3)]
    loss = Curvature(spaces[0])
    x = points(spaces[0], 4)
    parameters = {k: p.detach() for k, p in loss.named_parameters()}

    def f(params):
        return torch.func.functional_call(loss, params, (x,)).sum()

    grads = torch.func.grad(f)(parameters)
    f(dict(loss.named_parameters())).backward()
    for name, p in loss.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-9, atol=1e-10)

    stacked, _ = torch.func.stack_module_state([Curvature(s) for s in spaces])
    many = torch.func.vmap(lambda params: torch.func.functional_call(loss, params, (x,)))(stacked)
    expected = torch.stack([s.scalar_curvature(x) for s in spaces])
    torch.testing.assert_close(many, expected, rtol=1e-9, atol=1e-10)


def test_torch_func_transforms_agree_with_batches(space):
    x, v = points(space, 3, scale=0.4), points(space, 3, seed=2, scale=0.4)
    batched = space.acceleration(x, v)
    torch.testing.assert_close(torch.func.vmap(space.acceleration)(x, v), batched)
    jac = torch.func.vmap(torch.func.jacrev(space.acceleration))(x, v)
    fwd = torch.func.vmap(torch.func.jacfwd(space.acceleration))(x, v)
    torch.testing.assert_close(jac, fwd, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(torch.func.vmap(space.exp)(x, 0.3 * v), space.exp(x, 0.3 * v))


@pytest.mark.parametrize("name", ["cholesky", "learnable bumps", "decoder"])
@pytest.mark.parametrize("quantity", ["curvature", "length"])
def test_adam_reduces_a_loss(name, quantity):
    space = CASES[name](torch.float64)
    x, y = points(space, 4, scale=0.3), points(space, 4, seed=2, scale=0.3)
    optimizer = torch.optim.Adam(space.parameters(), 1e-2)
    losses = []
    for _ in range(8):
        if quantity == "curvature":
            loss = space.scalar_curvature(x).square().mean()
        else:
            loss = space.sqdist(x, y).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert torch.linalg.eigvalsh(space.metric(x)).min() >= space.floor - 1e-9


def test_state_dict_and_to(space, tmp_path):
    x = points(space, 4)
    g = space.metric(x)
    torch.save(space.state_dict(), tmp_path / "state.pt")
    with torch.no_grad():
        for p in space.parameters():
            p.add_(1.0)
    space.load_state_dict(torch.load(tmp_path / "state.pt"))
    torch.testing.assert_close(space.metric(x), g, rtol=0, atol=0)
    single = space.to(torch.float32)
    torch.testing.assert_close(single.metric(x.float()), g.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "cls", [CholeskyNetwork, ConformalNetwork, DiagonalNetwork, LowRankNetwork]
)
def test_seeds_and_chart_options(cls):
    a, b, c = (cls(2, generator=seeded(s), bounds=[(-1, 1)] * 2) for s in (0, 0, 1))
    x = torch.zeros(2)
    assert torch.equal(a.metric(x), b.metric(x))
    assert not torch.equal(a.metric(x), c.metric(x))
    assert a.bounds == ((-1.0, 1.0),) * 2
    before = torch.random.get_rng_state()
    cls(2, generator=seeded())
    assert torch.equal(before, torch.random.get_rng_state())
    assert cls(2, dtype=torch.float64).metric(x.double()).dtype == torch.float64


def test_token_bumps_closed_form_and_gradients_in_all_inputs():
    inputs = [
        torch.tensor([[0.0, 0.0], [1.0, 0.5]], dtype=torch.float64),
        torch.tensor([[1.0, 0.2], [0.3, 1.0]], dtype=torch.float64),
        torch.tensor([0.0, 0.7], dtype=torch.float64),
        torch.tensor([0.6, 0.9], dtype=torch.float64),
    ]
    x = torch.tensor([0.3, -0.2], dtype=torch.float64)
    expected = torch.eye(2, dtype=torch.float64)
    for mu, v, a, s in zip(*inputs, strict=True):
        expected = expected + a * math.exp(-float((x - mu).square().sum() / (2 * s**2))) * v.outer(
            v
        )
    torch.testing.assert_close(TokenBumps(*inputs).metric(x), expected)
    leaves = [t.clone().requires_grad_() for t in inputs]

    def f(mu, v, a, s):
        return TokenBumps(mu, v, a.abs(), s).scalar_curvature(x)

    assert torch.autograd.gradcheck(f, (leaves[0], leaves[1], leaves[2].detach() + 0.3, leaves[3]))
    TokenBumps(*leaves).metric(x).sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in leaves)  # alpha = 0 too


def test_token_bumps_take_a_batch_of_token_sets():
    draw = seeded()
    centers, directions = torch.randn(2, 4, 5, 3, generator=draw, dtype=torch.float64)
    heights = torch.rand(4, 5, generator=draw, dtype=torch.float64)
    x, v = torch.randn(2, 4, 3, generator=draw, dtype=torch.float64)
    many = TokenBumps(centers, directions, heights, 0.8)
    end = many.exp(x, 0.3 * v)
    for i in range(4):
        one = TokenBumps(centers[i], directions[i], heights[i], 0.8)
        torch.testing.assert_close(many.metric(x)[i], one.metric(x[i]))
        torch.testing.assert_close(many.acceleration(x, v)[i], one.acceleration(x[i], v[i]))
        torch.testing.assert_close(end[i], one.exp(x[i], 0.3 * v[i]), rtol=1e-9, atol=1e-9)


def test_bumps_are_never_subnormal_far_away():
    space = bumps(dtype=torch.float32)
    heights, _ = space._bumps(torch.full((3,), 1e3))
    tiny = torch.finfo(torch.float32).tiny
    assert ((heights == 0) | (heights >= tiny)).all()
    torch.testing.assert_close(
        space.metric(torch.full((3,), 1e3)), torch.eye(3), rtol=0, atol=1e-30
    )


# -- decoders -----------------------------------------------------------------------------


def test_decoder_metric_is_the_expected_pullback():
    space = decoder()
    x = points(space, 3)
    one = torch.func.vmap(torch.func.jacrev(lambda z: space.mean(z)))(x)
    # the single deviation stands for all six outputs
    std = space.std
    assert std is not None
    two = torch.func.vmap(torch.func.jacrev(lambda z: std(z).expand(6)))(x)
    expected = one.mT @ one + two.mT @ two + space.floor * torch.eye(2, dtype=x.dtype)
    torch.testing.assert_close(space.metric(x), expected)


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Sequential(nn.Linear(4, 3), nn.Sigmoid())),
        nn.Sequential(nn.Linear(2, 4), nn.SiLU(), nn.Linear(4, 3)),
        nn.Sequential(nn.Linear(2, 2), act := nn.Tanh(), nn.Linear(2, 3), act),
        RBFUncertainty(torch.randn(5, 2, generator=seeded()), 0.8, outputs=3),
    ],
)
def test_derivatives_by_hand_equal_autodiff(module):
    module = module.double()
    x, u, v, w = torch.randn(4, 3, 2, generator=seeded(), dtype=torch.float64)
    jet = push(module, Jet(x, torch.stack([u, v]), w))

    def curve(t):  # velocity v, acceleration w
        return module(x + t * v + 0.5 * t**2 * w)

    zero = torch.zeros((), dtype=torch.float64)
    first = torch.func.jacfwd(curve)
    torch.testing.assert_close(jet.value, module(x))
    torch.testing.assert_close(jet.first[0], torch.func.jvp(module, (x,), (u,))[1])
    torch.testing.assert_close(jet.first[1], first(zero))
    torch.testing.assert_close(jet.second, torch.func.jacfwd(first)(zero))


def test_hooks_are_not_bypassed():
    layer = nn.Linear(2, 3).double()
    layer.register_forward_hook(lambda *call: 2 * call[-1])
    x = torch.randn(4, 2, generator=seeded(), dtype=torch.float64)
    jet = push(layer, Jet(x, torch.ones(1, 4, 2, dtype=torch.float64), None))
    torch.testing.assert_close(jet.first[0], (2 * layer.weight.sum(-1)).expand(4, 3))


def test_modules_may_bring_their_own_derivatives():
    class Square(nn.Module):
        def forward(self, x):
            raise AssertionError("push is asked instead")

        def push(self, jet):
            x, first, _ = jet
            return Jet(x.square(), 2 * x * first, 2 * first[-1].square())

    x, v = torch.randn(2, 4, 3, generator=seeded(), dtype=torch.float64)
    linear = nn.Linear(3, 3).double()
    jet = push(nn.Sequential(linear, Square()), Jet(x, v.unsqueeze(0), torch.zeros_like(x)))
    torch.testing.assert_close(jet.value, linear(x).square())
    torch.testing.assert_close(jet.second, 2 * (v @ linear.weight.mT).square())


def test_uncertainty_is_small_at_data_and_constant_far_away():
    centers = torch.randn(40, 2, generator=seeded(), dtype=torch.float64)
    spread = RBFUncertainty(centers, 0.5, precision=25.0, floor=0.04)
    assert float(spread(centers).pow(-2).mean().detach()) == pytest.approx(25.04, rel=1e-12)
    far = spread(torch.full((1, 2), 100.0, dtype=torch.float64))
    assert float(far.detach()) == pytest.approx(5.0, rel=1e-12)


def test_geodesics_stay_near_the_data():
    # data on a half circle, a decoder that sees no difference: only uncertainty bends the way
    angle = torch.linspace(0, math.pi, 40, dtype=torch.float64)
    data = torch.stack([angle.cos(), angle.sin()], -1)
    spread = RBFUncertainty(data, 0.25, precision=4.0, floor=0.05).requires_grad_(False)
    space = DecoderPullback(lambda x: 0.3 * x, spread, dim=2)
    x, y = data[2], data[-3]
    found = space.connect(x, y)
    assert found.converged
    assert not found.conjugate
    middle = space.exp(x, 0.5 * found.velocity)
    assert middle[1] > 0.6  # the straight line passes at 0.16
    path = space.shortest_path(x, y)
    assert float(path[32, 1]) == pytest.approx(float(middle[1]), abs=0.02)
    line = torch.linspace(0, 1, 2001, dtype=x.dtype)[:, None] * (y - x) + x
    straight = space.norm((line[1:] + line[:-1]) / 2, line.diff(dim=0)).sum()
    assert space.norm(x, found.velocity) < straight


def test_hard_pairs_have_the_derivatives_of_log():
    space = decoder()
    x, y = points(space, 1, seed=3)[0], points(space, 1, seed=4)[0]
    y = y.requires_grad_()
    assert torch.autograd.gradcheck(lambda b: space.log(x, b), y, atol=1e-5, rtol=1e-4)


# -- errors -------------------------------------------------------------------------------


def test_errors():
    mu, v, a = torch.zeros(3, 2), torch.ones(3, 2), torch.ones(3)
    with pytest.raises(ValueError, match="negative"):
        TokenBumps(mu, v, -a, 1.0)
    with pytest.raises(ValueError, match="sigma must be positive"):
        TokenBumps(mu, v, a, 0.0)
    with pytest.raises(ValueError, match=r"amplitudes has shape \(2,\), expected \(3,\)"):
        TokenBumps(mu, v, a[:2], 1.0)
    with pytest.raises(ValueError, match="floor is 0"):
        CholeskyNetwork(2, floor=0.0)
    with pytest.raises(ValueError, match="ceiling"):
        ConformalNetwork(2, floor=1.0, ceiling=1.0)
    with pytest.raises(ValueError, match="rank is 3"):
        LowRankNetwork(2, 3)
    with pytest.raises(ValueError, match="width and depth"):
        DiagonalNetwork(2, width=0)
    with pytest.raises(ValueError, match="bandwidth is -1"):
        RBFUncertainty(mu, -1.0)
    bad = DecoderPullback(lambda x: x.sum(-1), dim=2)
    with pytest.raises(ValueError, match=r"mean\(x\) has shape"):
        bad.metric(torch.zeros(2))
    with pytest.raises(ValueError, match=r"std\(x\) has shape"):
        DecoderPullback(lambda x: x, lambda x: x[..., :1].expand(3), dim=2).embed(torch.zeros(2))


def test_diverged_parameters_raise_instead_of_nan():
    space = CholeskyNetwork(2, generator=seeded())
    with torch.no_grad():
        space.network.get_parameter("0.bias")[0] = math.nan
    with pytest.raises(GeometryError, match="diverged"):
        space.scalar_curvature(torch.zeros(2))
