"""The baselines: one interface, closed forms beside them, and what each can and cannot do."""

import pytest
import torch
from torch import nn

from darboux.learners import baselines as b
from darboux.learners.attention import SoftmaxAttention

F64 = torch.float64
LAYERS = {
    "gru": lambda: b.GRU(8),
    "gru projected": lambda: b.GRU(8, 6),
    "lstm": lambda: b.LSTM(8),
    "lstm projected": lambda: b.LSTM(8, 5),
    "linear attention": lambda: b.LinearAttention(8, 2, chunk=4),
    "diagonal": lambda: b.DiagonalRecurrence(8, 6),
    "diagonal, positive": lambda: b.DiagonalRecurrence(8, negative=False),
    "phase": lambda: b.CumulativePhase(8, 5),
    "softmax": lambda: SoftmaxAttention(8, 2),
    "softmax without positions": lambda: SoftmaxAttention(8, 2, rotary=False),
}


@pytest.fixture(params=LAYERS, ids=str)
def layer(request):
    torch.manual_seed(0)
    return LAYERS[request.param]().double()


def tokens(batch=2, time=19, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, time, 8, dtype=F64, generator=generator)


def run(layer, x, sizes, state=None):
    parts = []
    for part in x.split(sizes, 1):
        y, state = layer(part, state)
        parts.append(y)
    assert state is not None
    return torch.cat(parts, 1), state


@pytest.mark.parametrize("sizes", [[1] * 19, [7, 1, 11], [4, 4, 4, 4, 3]], ids=str)
def test_chunks_give_what_the_whole_gives(layer, sizes):
    x = tokens()
    whole, state = layer(x)
    parts, after = run(layer, x, sizes)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)
    for got, want in zip(after, state, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
        assert len(got) == 2  # the batch first


@pytest.mark.parametrize("training", [True, False])
def test_no_layer_sees_the_future(layer, training):
    layer.train(training)
    x = tokens()
    other = x.clone()
    other[:, 11:] = 100 * tokens(seed=2)[:, 11:]
    assert torch.equal(layer(other)[0][:, :11], layer(x)[0][:, :11])
    assert not torch.equal(layer(other)[0][:, 11:], layer(x)[0][:, 11:])


def test_recurrent_states_do_not_grow():
    for name, make in LAYERS.items():
        layer = make()
        sizes = [
            sum(part.numel() for part in layer(torch.randn(1, time, 8))[1]) for time in (1, 50)
        ]
        assert (sizes[0] == sizes[1]) != name.startswith("softmax"), name


def test_linear_attention_is_its_formula():
    torch.manual_seed(0)
    layer, x = b.LinearAttention(8, 2, chunk=4).double(), tokens()
    q, k, v = (part.unflatten(-1, (2, 4)) for part in layer.qkv(x).chunk(3, -1))
    q, k = nn.functional.elu(q) + 1, nn.functional.elu(k) + 1
    score = torch.einsum("bthe,bshe->bhts", q, k).tril()
    y = torch.einsum("bhts,bshe->bthe", score / score.sum(-1, keepdim=True), v).flatten(2)
    torch.testing.assert_close(layer(x)[0], layer.out(y), rtol=0, atol=1e-12)


@pytest.mark.parametrize("negative", [True, False])
def test_the_scan_is_the_loop(negative):
    torch.manual_seed(0)
    layer, x = b.DiagonalRecurrence(8, 6, negative=negative).double(), tokens()
    a = layer.rates(x).tanh() if negative else layer.rates(x).sigmoid()
    drive = (1 - a**2).sqrt() * layer.values(x)
    h, found = layer.start, []
    for t in range(x.shape[1]):
        h = a[:, t] * h + drive[:, t]
        found.append(h)
    want = layer.out(torch.stack(found, 1))
    got = layer(x)[0]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    parameters = list(layer.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(got.square().sum(), parameters),
        torch.autograd.grad(want.square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("negative", [True, False])
def test_saturated_eigenvalues_have_finite_gradients(negative):
    layer = b.DiagonalRecurrence(8, negative=negative)
    x = torch.randn(1, 5, 8, requires_grad=True)
    with torch.no_grad():
        layer.rates.weight.mul_(1e4)
    layer(x)[0].sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_linear_attention_of_vanishing_features_is_finite():
    layer = b.LinearAttention(8, 2)
    with torch.no_grad():
        layer.qkv.weight.fill_(-100.0)
    y, _ = layer(torch.ones(1, 5, 8))  # all features underflow to zero
    assert y.isfinite().all()


def test_the_phase_and_negative_eigenvalues_solve_parity_by_construction():
    bits = torch.randint(2, (4, 3000), generator=torch.Generator().manual_seed(0))
    x = torch.stack([bits, 1 - bits], -1).float()
    want = bits.cumsum(1) % 2

    phase = b.CumulativePhase(2, 1)
    with torch.no_grad():
        phase.turn.weight.copy_(torch.tensor([[0.5, 0.0]]))
        phase.out.weight.copy_(torch.tensor([[-1.0, 0.0], [0.0, 0.0]]))
        phase.out.bias.zero_()
    assert torch.equal((run(phase, x, 700)[0][..., 0] > 0).long(), want)

    diagonal = b.DiagonalRecurrence(2, 1)
    with torch.no_grad():  # tanh(20) = 1 in float32
        diagonal.rates.weight.copy_(torch.tensor([[-20.0, 20.0]]))
        diagonal.rates.bias.zero_()
        diagonal.values.weight.zero_()
        diagonal.values.bias.zero_()
        diagonal.out.weight.copy_(torch.tensor([[-1.0], [0.0]]))
        diagonal.out.bias.zero_()
    y, state = run(diagonal, x, 700)
    assert torch.equal((y[..., 0] > 0).long(), want)
    assert torch.equal(state.numbers.abs(), torch.ones(4, 1))


def test_the_gru_is_torchs():
    torch.manual_seed(0)
    layer, x = b.GRU(8), torch.randn(2, 9, 8)
    want, last = layer.cell(x)
    got, state = layer(x)
    assert torch.equal(got, want)
    assert torch.equal(state.hidden, last[0])


def test_errors(layer):
    x = tokens()
    with pytest.raises(ValueError, match=r"expected \(batch, time, 8\)"):
        layer(x[..., :7])
    with pytest.raises(TypeError, match="float32, expected torch.float64"):
        layer(x.float())
    _, state = layer(x)
    with pytest.raises(ValueError, match="the state of another layer or batch"):
        layer(x[:1], state)
    with pytest.raises(TypeError, match="as this layer returns it"):
        layer(x, tuple(state))
    with pytest.raises(ValueError, match="expected positive numbers"):
        b.CumulativePhase(8, 0)
    with pytest.raises(ValueError, match="multiple of the second"):
        b.LinearAttention(7, 2)
