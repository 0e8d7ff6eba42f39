"""Spectral attention: streams, closed forms, perturbation, positivity, and what it cannot do."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from darboux.learners import _spectral_basis as parts
from darboux.learners.spectral_attention import (
    PerturbedMemory,
    Relaxation,
    SpectralAttention,
    SpectralMemory,
)
from darboux.manifolds import Euclidean, FlatTorus, Sphere, TokenBumps
from darboux.manifolds.spectral import Fourier, Operator, bases, bump_elements, eigenpairs, kernel
from darboux.manifolds.spectral.bumps import periodised

SKEW = FlatTorus(lattice=torch.tensor([[3.0, 0.9], [-0.6, 4.2]], dtype=torch.float64))
TWO = FlatTorus(2)
LAYERS: dict[str, dict[str, Any]] = {
    "exact": {"base": TWO, "modes": 25},
    "three": {"modes": 27},
    "skew": {"base": SKEW, "modes": 9},
    "sphere": {"base": Sphere(2), "modes": 16},
    "points": {"base": FlatTorus(1), "modes": 13, "nodes": 3},
    "band": {"base": TWO, "modes": 9, "filter": "band"},
    "plain": {"base": TWO, "modes": 9, "filter": None},
    "any": {"base": TWO, "modes": 9, "filter": lambda values: 1 / (1 + values)},
    "frozen": {"base": TWO, "modes": 25, "strength": 0.0, "rotary": True},
    "relaxed": {"base": TWO, "modes": 9, "relaxation": Relaxation()},
    "relaxed circle": {"base": FlatTorus(1), "modes": 9, "relaxation": Relaxation(dt=0.2)},
    "perturbed": {"base": TWO, "modes": 25, "mode": "perturbative", "tolerance": 0.005},
    "perturbed sphere": {"base": Sphere(2), "modes": 16, "mode": "perturbative"},
    "perturbed band": {
        "base": SKEW,
        "modes": 9,
        "mode": "perturbative",
        "filter": "band",
        "nodes": 2,
        "tolerance": 0.005,
    },
}
EACH = pytest.mark.parametrize("name", LAYERS)


def build(name: str = "exact", width: int = 8, seed: int = 0, **more: Any) -> Any:
    torch.manual_seed(seed)
    options: dict[str, Any] = {"heads": 2, "chunk": 5} | LAYERS[name] | more
    return SpectralAttention(width, **options).double()


def sequence(time: int = 17, batch: int = 2, width: int = 8, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, time, width, dtype=torch.float64, generator=g)


def bump_weights(layer: Any) -> None:
    # tokens at full strength, in directions that differ
    with torch.no_grad():
        layer.bumps.bias.view(layer.heads, -1)[:, -1] = 4.0


def without_head(layer: Any) -> Any:
    eye = torch.eye(layer.width, dtype=torch.float64)
    with torch.no_grad():
        layer.values.weight.copy_(eye)
        layer.out.weight.copy_(eye)
    return layer


# -- streams -------------------------------------------------------------------------------


@EACH
def test_whole_and_pieces_and_tokens_agree(name):
    layer, x = build(name), sequence(11)
    with torch.no_grad():
        whole, end = layer(x)
        for cuts in ([1, 5, 9], range(1, 11)):
            state: Any = None
            pieces = []
            for piece in x.tensor_split(torch.tensor(list(cuts)), 1):
                y, state = layer(piece, state)
                pieces.append(y)
            assert (torch.cat(pieces, 1) - whole).abs().max() < 1e-12
            for one, two in zip(state, end, strict=True):
                assert one.shape == two.shape
                if not isinstance(end, PerturbedMemory):  # frames are unique up to their gauge
                    assert torch.allclose(one, two, atol=1e-11)
    if name in ("perturbed", "perturbed band"):
        assert end.solves.min() >= 1


@EACH
def test_later_tokens_change_nothing_before(name):
    layer, x = build(name), sequence(11)
    for train, cut in ((True, 7), (False, 5)):
        y, _ = layer.train(train)(x)
        other = x.clone()
        other[:, cut:] = sequence(11, seed=5)[:, cut:]
        z, _ = layer(other)
        assert torch.equal(z[:, :cut], y[:, :cut])
        assert not torch.equal(z[:, cut:], y[:, cut:])


@EACH
def test_state_does_not_grow(name):
    layer = build(name)
    with torch.no_grad():
        short, long = layer(sequence(3))[1], layer(sequence(40))[1]
    assert [a.shape for a in short] == [b.shape for b in long]


@pytest.mark.parametrize("name", ["exact", "sphere", "relaxed", "perturbed"])
def test_single_precision(name):
    layer, x = build(name), sequence()
    with torch.no_grad():
        y, _ = layer(x)
        z, state = layer.float()(x.float())
    assert z.dtype == torch.float32
    assert state.moments.dtype == torch.float32
    assert (z - y).abs().max() < 2e-4 * y.abs().max()


# -- closed forms --------------------------------------------------------------------------


def test_frozen_torus_is_a_kernel_of_differences():
    layer = without_head(build("frozen", rotary=False, bias=True, heads=1))
    x = sequence()
    with torch.no_grad():
        for part in (layer.keys.bias, layer.queries.bias, layer.values.bias, layer.out.bias):
            part.zero_()
        y, _ = layer(x)
        q, mu = layer.places(x)
        tau = float(layer.times.exp())
        apart = q[:, 0, :, None] - mu[:, 0, None]  # (b, t, j, 2)
        n = torch.arange(-2.0, 3.0, dtype=torch.float64)
        theta = [
            (torch.exp(-tau * n * n) * torch.cos(apart[..., i, None] * n)).sum(-1) for i in (0, 1)
        ]
        weight = (theta[0] * theta[1]).tril()
        least = 0.01 * torch.exp(-tau * n * n).sum() ** 2
        slow = weight @ x / weight.sum(-1, keepdim=True).clamp(min=least)
        assert (y - slow).abs().max() < 1e-10
        # a common translation of keys and queries is not seen
        for part in (layer.keys.bias, layer.queries.bias):
            part.copy_(torch.tensor([0.123, -4.56], dtype=torch.float64))
        assert (layer(x)[0] - y).abs().max() < 1e-10


def test_rotary_positions_are_relative():
    layer = without_head(build("frozen", heads=1, normalize=False))
    with torch.no_grad():
        layer.keys.weight.zero_()
        layer.queries.weight.zero_()
        pulse = torch.zeros(1, 40, 8, dtype=torch.float64)
        pulse[0, 3, 0] = 1
        y = layer(pulse)[0][0, :, 0]
        later = layer(pulse.roll(9, 1))[0][0, :, 0]
        assert (later[12:] - y[3:31]).abs().max() < 1e-10
        assert y[3:].std() > 0.01
        basis = layer.basis(y)
        rate = 2 * math.pi * layer.rates[0].double() * torch.arange(37)[:, None]
        levels = layer.response(parts.flat_levels(basis)[None])[0]
        waves = basis.evaluate(rate) * basis.evaluate(torch.zeros(2, dtype=torch.float64))
        assert (y[3:] - (waves * levels).sum(-1)).abs().max() < 1e-10


def test_without_a_filter_it_is_linear_attention_with_a_gram_matrix():
    layer = without_head(build("plain", heads=1))
    bump_weights(layer)
    x = sequence(10)
    with torch.no_grad():
        y, _ = layer(x)
        state = layer(x[:, :5])[1]
        mass = layer.operator(state).mass[:, 0]
        assert (mass - torch.eye(9)).abs().max() > 0.01
        q, mu = (layer.basis(x).evaluate(u)[:, 0] for u in layer.places(x))
        for t in range(5, 10):
            moment = mu[:, : t + 1].mT @ x[:, : t + 1]
            slow = q[:, t, None] @ torch.linalg.solve(mass, moment)
            assert (y[:, t] - slow[:, 0]).abs().max() < 1e-10


def test_on_a_circle_it_is_a_warp_of_time():
    # every metric of one dimension is flat in its arc length s: the heat kernel of length L in s
    layer = build("relaxed circle", modes=61, heads=1, relaxation=Relaxation(dt=1.0))
    bump_weights(layer)
    with torch.no_grad():
        layer.log_sigma.fill_(math.log(0.7))
        layer.times.fill_(math.log(0.05))
        state = layer(sequence(16, 1))[1]
        basis = layer.basis(state.moments)
        speed = state.metric[0, 0, :, 0, 0].sqrt()
        assert speed.max() / speed.min() > 1.1
        # arc length by the Fourier series of the speed
        modes = torch.fft.rfft(speed) / len(speed)
        k = torch.arange(1, len(modes), dtype=torch.float64)
        x = torch.linspace(0, 6, 25, dtype=torch.float64)
        total = 2 * math.pi * modes[0].real
        wave = (torch.exp(1j * k * x[:, None]) - 1) / (1j * k)
        s = modes[0].real * x + 2 * (modes[1:] * wave).real.sum(-1)
        n = torch.arange(-40.0, 41.0, dtype=torch.float64) * 2 * math.pi / total
        exact = (torch.exp(-0.05 * n * n) * torch.cos((s[:, None] - s)[..., None] * n)).sum(
            -1
        ) / total
        phi = basis.evaluate(x[:, None])
        seen = phi @ state.kernel[0, 0] @ phi.mT
        error = (seen - exact).abs().max()
        print("warp", float(error))
        assert error < 1e-10


# -- perturbation --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["heat", "band"])
def test_divided_differences(kind):
    times = torch.tensor([[0.3], [0.7]], dtype=torch.float64)[: len(parts.FILTERS[kind])]
    levels = torch.tensor([[0.0, 1.0, 1.0 + 1e-9, 2.5, 40.0]], dtype=torch.float64)
    plain, weighted = parts.differences(kind, times, levels)

    def f(x: Tensor) -> Tensor:
        return parts.respond(kind, times, x)

    a, b = levels[0, :, None], levels[0]
    for found, g in ((plain[0], f), (weighted[0], lambda x: x * f(x))):
        middle = 0.5 * (a + b)
        slope = torch.func.jvp(g, (middle[None].flatten(1),), (torch.ones(1, 25).double(),))[1]
        quotient = (g(levels)[0][:, None] - g(levels)[0]) / torch.where(a == b, 1, a - b)
        near = (a - b).abs() < 1e-6
        assert (found - torch.where(near, slope.view(5, 5), quotient)).abs().max() < 1e-12


def exactly(layer: Any, x: Tensor) -> Tensor:
    """Return the output at the last token, read in the solved metric of all tokens."""
    state = layer(x)[1]
    operator = layer.operator(state)
    q, mu = (layer.basis(x).evaluate(u) for u in layer.places(x))
    v = layer.values(x).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
    found = kernel(operator, layer.response, mu.mT @ v)
    return layer.out((q[:, :, -1:] @ found).transpose(1, 2).flatten(2))[:, 0]


@pytest.mark.parametrize("name", ["perturbed", "perturbed sphere", "perturbed band"])
def test_perturbation_is_right_to_second_order(name):
    # the first order expands around a base whose levels are degenerate
    errors, sizes = [], torch.tensor([0.4, 0.2, 0.1, 0.05])
    x = sequence(4)
    with torch.no_grad():
        for strength in sizes.tolist():
            options = {"strength": strength, "tolerance": 1e9, "normalize": False}
            layer = build(name, **options)
            bump_weights(layer)
            y, state = layer(x)
            assert int(state.solves.max()) == 0
            errors.append(float((y[:, -1] - exactly(layer, x)).abs().max()))
    slope = float((torch.tensor(errors).log().diff() / sizes.log().diff()).mean())
    print("order", slope, errors)
    assert abs(slope - 2) < 0.1


def test_a_stale_solve_is_noticed_and_made_again():
    # tokens that gather at one place: the error follows the square of the tolerance
    errors, solves = [], []
    options = {"normalize": False, "inertia": 10.0, "chunk": 2, "strength": 1.9}
    x = 0.1 * sequence(50, 1) + 1
    with torch.no_grad():
        for tolerance in (1e9, 0.05, 0.01):
            layer = build("perturbed", modes=9, tolerance=tolerance, **options)
            layer.bumps.weight.mul_(0.1)
            bump_weights(layer)
            y, state = layer(x)
            errors.append(float((y[:, -1] - exactly(layer, x)).norm() / y[:, -1].norm()))
            solves.append(int(state.solves.max()))
    print("drift", errors, solves)
    assert solves[0] == 0 < solves[1] < solves[2] < 25
    assert errors[0] > 0.1
    assert errors[2] < errors[1] < 0.05**2


def test_the_printed_sign_of_the_mixing_coefficients_is_wrong():
    # c = <m|dA - l dM|k> / (l_k - l_m) for eigenvalues of -Laplace; the text prints the opposite
    basis = Fourier(2, nodes=24)
    g = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=g)

    some = TokenBumps(6 * random(4, 2), 2 * random(4, 2) - 1, 2 * random(4), 0.9)
    start: Any = bases.galerkin(periodised(some, basis), basis)
    before = eigenpairs(start, basis.size)
    other = TokenBumps(6 * random(1, 2), random(1, 2), torch.ones(1).double(), 0.9)
    change = bump_elements(basis, other)
    w, levels = before.functions, before.values
    a, m = w.mT @ change.d_stiffness @ w, w.mT @ change.d_mass @ w
    gaps = levels - levels[:, None] + torch.eye(len(levels))
    mixing = (a - levels * m) / gaps
    mixing = mixing - torch.diag(mixing.diagonal() + 0.5 * m.diagonal())
    errors = {1: [], -1: []}
    for eps in (1e-3, 5e-4):
        moved = Operator(start.stiffness + eps * change[0], start.mass + eps * change[1])
        exact = eigenpairs(moved, 6).functions
        for sign, found in errors.items():
            turned = torch.where(torch.eye(len(levels)) > 0, mixing, sign * mixing)
            series = (w + eps * w @ turned)[:, :6]
            found.append(float((series - exact).norm()))
    right, printed = [math.log2(e[0] / e[1]) for e in errors.values()]
    assert abs(right - 2) < 0.05
    assert abs(printed - 1) < 0.05


# -- positive metrics ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["exact", "sphere", "points", "skew"])
def test_no_stream_of_tokens_makes_the_metric_indefinite(name):
    layer = build(name, heads=1, strength=1.9)
    bump_weights(layer)
    with torch.no_grad():
        layer.bumps.weight.zero_()  # all along one direction, at one place
        layer.bumps.bias[:-1] = 1.0
        layer.bumps.bias[-1] = 50.0
        state = layer(torch.ones(1, 100, 8, dtype=torch.float64))[1]
        operator = layer.operator(state)
        stiffness, mass = operator.stiffness[0, 0], operator.mass[0, 0]
        levels = parts.flat_levels(layer.basis(mass))
        scaled = stiffness[1:, 1:] / torch.outer(levels[1:], levels[1:]).sqrt()
        least = float(torch.linalg.eigvalsh(scaled)[0])
        assert 1 - 1.9 / 2 - 1e-9 < least < 0.9
        # a sum of first-order changes, which the text writes, has left the cone long ago
        total = torch.diag(levels) + state.stiffness[0, 0]
        assert float(torch.linalg.eigvalsh(total)[0]) < -1


def test_relaxation_settles_between_source_and_sink():
    # on a circle there is no curvature: r (1 + T - g^2) vanishes at g = sqrt(1 + T)
    errors = []
    for dt in (0.2, 0.1):
        flow = Relaxation(dt=dt, steps=round(2 / dt), rate=2.0)
        layer = build("relaxed circle", heads=1, relaxation=flow)
        bump_weights(layer)
        with torch.no_grad():
            layer.log_sigma.fill_(0.0)
            state = layer(torch.ones(1, 16, 8, dtype=torch.float64))[1]
            stress = state.stress[0, 0, :, 0, 0]  # of the one token after the last chunk
            assert stress.max() > 0.3
            metric = state.metric[0, 0, :, 0, 0]
            errors.append(float((metric - (1 + stress).sqrt()).abs().max()))
    assert errors[1] < 0.02  # the splitting is of second order
    assert abs(math.log2(errors[0] / errors[1]) - 2) < 0.1
    with torch.no_grad():
        # and a surface, with curvature, keeps its form however long the stream
        state = build("relaxed", chunk=2)(sequence(60, 1))[1]
        assert torch.linalg.eigvalsh(state.metric).min() > 0.5
        assert torch.linalg.eigvalsh(state.metric).max() < 4


# -- gradients -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["exact", "sphere", "relaxed", "plain", "perturbed band"])
def test_gradients_at_degenerate_spectra(name):
    options: dict[str, Any] = {"heads": 1, "chunk": 2, "tolerance": 1e9}
    layer = build(name, width=4, **options | ({"modes": 9} if name != "sphere" else {"modes": 4}))
    weights = sequence(4, 1, 4, seed=3)
    x = 0.5 * sequence(4, 1, 4)
    if name == "exact":
        with torch.no_grad():  # no bump at all: the pencil solved has the base's levels
            layer.bumps.bias[-1] = -40.0
    names = [n for n, _ in layer.named_parameters()]
    point = [p.detach().clone() for p in layer.parameters()]
    g = torch.Generator().manual_seed(4)
    ways = [torch.randn(p.shape, dtype=torch.float64, generator=g) for p in point]
    way = torch.randn(x.shape, dtype=torch.float64, generator=g)

    def loss(step: float) -> Tensor:
        moved = {n: p + step * w for n, p, w in zip(names, point, ways, strict=True)}
        for p in moved.values():
            p.requires_grad_()
        start = (x + step * way).requires_grad_()
        y, _ = torch.func.functional_call(layer, moved, (start,))
        value = (weights * y).sum()
        value.backward()
        slopes = [(p.grad, w) for p, w in zip(moved.values(), ways, strict=True)]
        rate = sum((a * b).sum() for a, b in [*slopes, (start.grad, way)] if a is not None)
        return torch.stack([value.detach(), torch.as_tensor(rate)])

    h = 1e-4
    far, near = (loss(s)[0] - loss(-s)[0] for s in (2 * h, h))
    slope = (8 * near - far) / (12 * h)
    rate = loss(0.0)[1]
    assert rate.isfinite()
    assert abs(float(slope - rate)) < 1e-7 * max(1, abs(float(rate)))


def test_a_band_does_not_see_constants():
    layer = without_head(build("band", heads=1))
    with torch.no_grad():
        response = layer.response(torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64))
        assert float(response[0, 0]) == 0
        assert float(response.min()) >= 0


# -- what a memory of K functions can hold -------------------------------------------------


@pytest.mark.parametrize(("power", "rate"), [(0.5, 0.5), (1.5, 1.0)])
def test_rates_of_projection(power, rate):
    # |sin(x/2)|^a is at the border of H^(a + 1/2): the error falls as lambda_K^(-s/2), s = 1, 2;
    # so for s = 1 lambda_K times the error grows: the rate 1 / lambda_K of the text needs H^2
    basis = Fourier(256, 1, nodes=2**13)
    f = (basis.points[:, 0] / 2).sin().abs() ** power
    c = basis.values.mT @ (basis.weights * f)
    levels = parts.flat_levels(basis)
    total = basis.weights @ f.square()
    degrees = torch.tensor([8, 16, 32, 64])
    errors = torch.stack([total - c[levels <= n * n].square().sum() for n in degrees]).sqrt()
    slopes = errors.log().diff() / (degrees.double() ** 2).log().diff()
    print("rate", slopes.tolist())
    assert (slopes + rate).abs().max() < 0.1
    grows = errors * degrees**2
    assert (float(grows[-1] / grows[0]) > 5) == (power == 0.5)


@pytest.mark.parametrize("count", [20, 25, 26, 40])
def test_exact_recall_needs_as_many_functions_as_values(count):
    # The best readout of K moments, the same for all values: all of N <= K, K / N of more.
    g = torch.Generator().manual_seed(0)
    basis = Fourier(2)
    phi = basis.evaluate(2 * math.pi * torch.rand(count, 2, dtype=torch.float64, generator=g))
    values = torch.randn(count, 4000, dtype=torch.float64, generator=g)
    found = phi @ (torch.linalg.pinv(phi) @ values)  # what K numbers a column can keep at best
    missed = float((found - values).square().mean())
    if count <= 25:
        assert missed < 1e-16
    else:
        assert abs(missed - (1 - 25 / count)) < 0.01


class Recall(nn.Module):
    """Tokens of key and value, then keys alone; one layer of mixing."""

    def __init__(self, mixer: nn.Module, width: int, keys: int, values: int):
        super().__init__()
        self.keys, self.values = nn.Embedding(keys, width), nn.Embedding(values + 1, width)
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mixer, self.head = mixer, nn.Linear(width, values)

    def forward(self, keys: Tensor, values: Tensor) -> Tensor:
        x = self.keys(keys) + self.values(values)
        return self.head(self.after(x + self.mixer(self.before(x))[0]))


def recall(mixer: nn.Module, steps: int, pairs: int = 8, keys: int = 24, values: int = 8) -> float:
    g = torch.Generator().manual_seed(0)
    model = Recall(mixer, 24, keys, values)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=steps)

    def batch(size: int) -> tuple[Tensor, Tensor, Tensor]:
        k = torch.rand(size, keys, generator=g).argsort(-1)[:, :pairs]
        v = torch.randint(values, (size, pairs), generator=g)
        order = torch.rand(size, pairs, generator=g).argsort(-1)
        shown = torch.cat([v, torch.full_like(v, values)], 1)
        return torch.cat([k, k.gather(1, order)], 1), shown, v.gather(1, order)

    for _ in range(steps):
        k, v, target = batch(32)
        loss = nn.functional.cross_entropy(model(k, v)[:, pairs:].flatten(0, 1), target.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        k, v, target = batch(256)
        return float((model(k, v)[:, pairs:].argmax(-1) == target).float().mean())


def test_it_learns_to_recall():
    torch.manual_seed(0)
    found = recall(SpectralAttention(24, 27, heads=3, strength=0.0), 90)
    print("recall", found)
    assert found > 0.9  # one guess in eight is right


# -- the door ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"modes": 24}, ValueError, r"modes is 24, expected \(2 N \+ 1\)\^2"),
        ({"modes": 1}, ValueError, "at least one harmonic"),
        ({"modes": 9, "heads": 3}, ValueError, "width 8 and heads 3"),
        ({"modes": 9, "mode": "fast"}, ValueError, "mode is 'fast'"),
        ({"modes": 9, "filter": "low"}, ValueError, "filter is 'low'"),
        ({"modes": 9, "filter": None, "mode": "perturbative"}, ValueError, "perturbative"),
        ({"modes": 9, "filter": "band", "normalize": True}, ValueError, "normalize"),
        ({"modes": 9, "strength": 2.0}, ValueError, "strength is 2.0"),
        ({"modes": 9, "strength": 0.0, "mode": "perturbative"}, ValueError, "strength is 0"),
        ({"modes": 9, "chunk": 0}, ValueError, "chunk is 0"),
        ({"modes": 9, "base": Sphere(2), "nodes": 2}, ValueError, "on the sphere"),
        ({"modes": 9, "base": Sphere(2), "rotary": True}, ValueError, "rotary"),
        ({"modes": 9, "base": Sphere(3)}, ValueError, r"expected Sphere\(2\)"),
        ({"modes": 9, "base": Euclidean(2)}, TypeError, "expected a FlatTorus"),
        ({"modes": 9, "base": SKEW, "relaxation": Relaxation()}, ValueError, "rectangular"),
    ],
)
def test_bad_layers(options, error, words):
    with pytest.raises(error, match=words):
        SpectralAttention(8, **({"base": TWO} | options))


def test_bad_input_and_states():
    layer, other, x = build(), build("perturbed"), sequence(3)
    state = layer(x)[1]
    for bad, error, words in (
        ((x[..., :7], None), ValueError, "expected"),
        ((x.float(), None), TypeError, "float32"),
        ((x[:, :0], None), ValueError, "time > 0"),
        ((x, other(x)[1]), TypeError, "PerturbedMemory, expected SpectralMemory"),
        ((x, build(modes=9)(x)[1]), ValueError, "moments of the state"),
        ((x[:1], state), ValueError, "another layer or batch"),
        ((x, build("frozen")(x)[1]), ValueError, "stiffness of the state"),
        ((x, SpectralMemory(*(s.float() for s in state))), TypeError, "the state has dtype"),
        ((x, state._replace(position=torch.tensor([3, 4]))), ValueError, "position of the state"),
    ):
        with pytest.raises(error, match=words):
            layer(*bad)
    with pytest.raises(TypeError, match="expected PerturbedMemory"):
        other(x, state)
