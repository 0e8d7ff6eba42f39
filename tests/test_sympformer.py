"""Accelerated attention layers: against the particles, causality, streaming, schedules, doors."""

import itertools
from typing import Any

import pytest
import torch
from torch.nn.functional import gelu, layer_norm, softplus
from torch.utils._pytree import tree_leaves

from darboux.flows import accelerated_attention as aa
from darboux.learners import schemes
from darboux.learners.attention import SoftmaxAttention
from darboux.learners.flow_block import FlowBlock
from darboux.learners.moving_attention import CAUSALITIES, MovingAttention
from darboux.learners.schemes import Damping, Phase
from darboux.learners.sympformer import KINDS, MomentumBlock, SympFormer

F64 = torch.float64
ALL = (*KINDS, "softmax", "plain", "linear")
CONNECTED = ("H1", "R2", "softmax")
PAIRS = [
    (kind, c) for kind, c in itertools.product(ALL, CAUSALITIES)
    if c != "row_hamiltonian" or kind in CONNECTED
]  # fmt: skip


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def stack(kind="R2", width=8, heads=2, layers=2, seed=0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return SympFormer(width, heads, layers, kind, **options).double()


@pytest.mark.parametrize(("kind", "causality"), PAIRS)
@pytest.mark.parametrize("training", [True, False])
def test_later_tokens_do_not_move_earlier_ones(kind, causality, training):
    model = stack(kind, causality=causality, initial_velocity="learned").train(training)
    x = draw(1, 6, 8)
    later = x.clone()
    later[:, 4:] = draw(1, 2, 8, seed=9)
    a, b = (model(z)[0] for z in (x, later))
    if causality == "bidirectional":
        assert not torch.allclose(a[:, :4], b[:, :4], atol=1e-4)
    else:
        assert torch.equal(a[:, :4], b[:, :4])
    assert not torch.allclose(a[:, 4:], b[:, 4:], atol=1e-4)
    # nor are they moved the other way, through gradients
    x.requires_grad_()
    (grad,) = torch.autograd.grad(model(x)[0][:, :4].square().sum(), x)
    assert bool((grad[:, 4:] == 0).all()) == (causality != "bidirectional")
    assert float(grad[:, 0].abs().min()) > 0


@pytest.mark.parametrize(("kind", "causality"), PAIRS)
@torch.no_grad()
def test_whole_in_chunks_and_token_by_token(kind, causality):
    if causality == "bidirectional":
        with pytest.raises(ValueError, match="got a state"):
            stack(kind, causality=causality)(draw(2, 3, 8), ())
        return
    model = stack(kind, causality=causality, initial_velocity="learned")
    x = draw(2, 5, 8)
    whole, end = model(x)
    for sizes in ([2, 1, 2], [1] * 5):
        state, parts = None, []
        for part in x.split(sizes, 1):
            y, state = model(part, state)
            parts.append(y)
        assert float((torch.cat(parts, 1) - whole).abs().max()) <= 1e-10
        one, two = (tree_leaves(s) for s in (state, end))
        assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("scheme", schemes.SCHEMES)
@pytest.mark.parametrize("kind", ["softmax", "linear"])
def test_every_scheme_streams_and_learns(kind, scheme):
    options: dict[str, Any] = {"schedule": "learned", "initial_velocity": "learned", "layers": 3}
    model = stack(kind, scheme=scheme, **options)
    x = draw(2, 5, 8)
    whole, _ = model(x)
    state, parts = None, []
    for part in x.split(2, 1):
        y, state = model(part, state)
        parts.append(y)
    assert torch.allclose(torch.cat(parts, 1), whole, rtol=0, atol=1e-10)
    whole.square().sum().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    if schemes.SCHEMES[scheme].explicit:  # the force of the last layer moves no token any more
        assert silent
        assert all(n.startswith("layers.2.") for n in silent)
    else:
        assert not silent


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", ["free", "nesterov", "constant", "learned"])
def test_momentum_blocks_learn_with_every_schedule(kind, schedule):
    model = stack(kind, schedule=schedule, initial_velocity="learned")
    y = model(draw(2, 5, 8))[0]
    y.square().sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_linear_state_is_of_constant_size():
    model = stack("linear")
    sizes = [sum(t.numel() for t in tree_leaves(model(draw(1, n, 8))[1]))
             for n in (1, 50)]  # fmt: skip
    assert sizes[0] == sizes[1]


# -- against the particles -------------------------------------------------------------------------


def particle_attention(causality, A):
    d = len(A)
    layer: Any = MovingAttention(d, 1, causality=causality, rotary=False).double()
    with torch.no_grad():
        layer.qkv.weight.copy_(torch.cat([A.mT * d**0.5, torch.eye(d), A]))
        layer.out.weight.copy_(torch.eye(d))
    return layer


@pytest.mark.parametrize("causality", ["bidirectional", "row_local"])
def test_one_head_is_the_connection_of_the_particles(causality):
    a = draw(3, 3)
    A, x, u = (a + a.mT) / 2, draw(2, 6, 3, seed=1), draw(2, 6, 3, seed=2)
    force, bend, _ = particle_attention(causality, A)(x, None, lambda f: u)
    exact = aa.connection(x, u, A, torch.eye(3, dtype=F64), causal=causality == "row_local")
    assert torch.allclose(force, exact[0], rtol=0, atol=1e-12)
    assert torch.allclose(bend, exact[1], rtol=0, atol=1e-12)


def test_row_hamiltonian_is_each_row_among_fixed_keys():
    A, x, u = draw(3, 3), draw(6, 3, seed=1), draw(6, 3, seed=2)  # not symmetric
    force, bend, _ = particle_attention("row_hamiltonian", A)(x[None], None, lambda f: u[None])
    for i in range(6):
        row = slice(i, i + 1)
        exact = aa.row_field(x[row], u[row], x[: i + 1], A, torch.eye(3, dtype=F64))[1]
        assert torch.allclose((force - bend)[0, row], exact, rtol=0, atol=1e-12)


def test_heads_and_rotations_against_a_dense_connection():
    layer = MovingAttention(8, 2, causality="row_local").double()
    x, u = draw(1, 5, 8), draw(1, 5, 8, seed=1)
    force, bend, _ = layer(x, None, lambda f: u)

    plain = SoftmaxAttention(8, 2).double()
    plain.qkv.weight, plain.out.weight = layer.qkv.weight, layer.out.weight
    assert torch.allclose(force, plain(x)[0], atol=1e-13)

    # scores with heads and positions by complex numbers; a quadratic form, whose rate is exact
    def scores(x):
        q, k, _ = (z.unflatten(-1, (2, 4)).transpose(1, 2) for z in layer.qkv(x).chunk(3, -1))
        t = torch.arange(5, dtype=F64)[:, None] * torch.tensor([1.0, 1e4**-0.5], dtype=F64)
        turn = torch.polar(torch.ones_like(t), t)
        q, k = (torch.complex(z[..., :2], z[..., 2:]) * turn for z in (q, k))
        return (q @ k.mH).real / 2

    ds = (scores(x + u) - scores(x - u)) / 2
    P = scores(x).masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    a = (P * ds).sum(-1).mean(1).unsqueeze(-1)
    speed = u.square().sum(-1, keepdim=True)
    v = layer.qkv(x)[..., 16:].unflatten(-1, (2, 4)).transpose(1, 2)
    weighted = layer.out((P @ (speed.unsqueeze(1) * v)).transpose(1, 2).flatten(2))
    exact = a * u - (speed * force + weighted) / 2
    assert torch.allclose(bend, exact, rtol=0, atol=1e-12)


def test_linear_block_moves_in_its_hamiltonian():
    torch.manual_seed(0)
    block = FlowBlock(
        6, 2, "linear", damping=Damping("constant", 0.0), scheme="etd_ab2", dt=0.01,
        causality="bidirectional", norm=False, hidden=0,
    ).double()  # fmt: skip
    x, u = draw(1, 5, 6), draw(1, 5, 6, seed=1)
    gx, gu = torch.func.grad(lambda x, u: block.energy(x, u).sum(), (0, 1))(x, u)

    def slope(dt):
        with torch.no_grad():
            block.raw_dt.copy_(torch.tensor(dt, dtype=F64).expm1().log())
            new = block(Phase(x, u, torch.tensor(1.0, dtype=F64)))[0]
        return (new.x - x) / dt, (new.u - u) / dt

    dx, du = ((2 * a - b) for a, b in zip(slope(5e-5), slope(1e-4), strict=True))
    assert torch.allclose(dx, gu, atol=1e-6)
    assert torch.allclose(du, -gx, atol=1e-6)
    with pytest.raises(ValueError, match="expected 'linear'"):
        FlowBlock(6, 1, damping=Damping()).energy(x, u)


def test_linear_block_of_one_head_is_the_stein_form():
    for causality in ("bidirectional", "row_local"):
        block = FlowBlock(
            4, 1, "linear", damping=Damping("constant", 0.5), scheme="euler", dt=0.1,
            causality=causality, norm=False, hidden=0,
        ).double().requires_grad_(False)  # fmt: skip
        block.mass.weight.copy_(2 * torch.eye(4))  # so that V^T V / e is 1
        x, u = draw(1, 70, 4), 0.3 * draw(1, 70, 4, seed=1)
        W, M = block.kernel.weight, block.potential.weight
        rates = aa.stein_field(x, u, W.mT @ W, M + M.mT, 0.5, causal=causality == "row_local")
        new, _ = block(Phase(x, u, torch.tensor(1.0, dtype=F64)))
        assert torch.allclose((new.x - x) / 0.1, rates[0], atol=1e-6)  # dt is kept in float32
        assert torch.allclose((new.u - u) / 0.1, rates[1], atol=1e-6)


def test_yurii_block_as_its_formula():
    torch.manual_seed(0)
    block: Any = MomentumBlock(8, 2, "Y").double()
    x, v = draw(2, 5, 8), draw(2, 5, 8, seed=1)
    mu = beta = 0.9
    up, down = block.mlp[1].weight, block.mlp[3].weight
    plain = SoftmaxAttention(8, 2).double()
    plain.qkv.weight, plain.out.weight = block.attention.qkv.weight, block.attention.out.weight

    def norm(z):
        return layer_norm(z, (8,))

    def slow(z):  # to length one
        return layer_norm(z, (8,)) / 8**0.5

    half = slow(beta * v + plain(norm(x + mu * v))[0])
    y = x + half
    end = slow(beta * half + gelu(norm(y + mu * half) @ up.mT) @ down.mT)
    out, _ = block(Phase(x, v, torch.tensor(1.0, dtype=F64)))
    assert torch.allclose(out.x, y + end, atol=1e-6)  # 0.9 and 1 are kept in float32
    assert torch.allclose(out.u, end, atol=1e-6)
    assert torch.allclose(torch.sigmoid(block.raw_ahead), torch.full((2,), 0.9, dtype=F64))
    assert torch.allclose(softplus(block.raw_gain), torch.ones(2, dtype=F64))


def test_kinds_differ_by_what_they_say():
    x, v = draw(2, 5, 8), draw(2, 5, 8, seed=1)
    outs = {}
    for kind in KINDS:
        block = MomentumBlock(8, 2, kind, hidden=0).double()
        torch.manual_seed(0)
        for p in (block.attention.qkv.weight, block.attention.out.weight):
            torch.nn.init.normal_(p, std=0.3)
        F, at_v, _ = block.attention(layer_norm(x, (8,)), None, lambda f: v)
        w = 0.9 * v + F
        _, at_w, _ = block.attention(layer_norm(x, (8,)), None, lambda f: w)
        out, _ = block(Phase(x, v, torch.tensor(1.0, dtype=F64)))
        outs[kind] = out.x - x, out.u, w, at_v, at_w
    norm = lambda z: layer_norm(z, (8,)) / 8**0.5  # noqa: E731
    dx, u, w, _, _ = outs["H0"]
    assert torch.allclose(u, norm(w), atol=1e-6)
    assert torch.allclose(dx, u, atol=1e-12)
    dx, u, w, bend, _ = outs["H1"]
    assert torch.allclose(u, norm(w - bend), atol=1e-6)
    assert torch.allclose(dx, u, atol=1e-12)
    dx, u, w, _, bend = outs["R2"]
    assert torch.allclose(u, norm(w - bend), atol=1e-6)
    assert torch.allclose(dx, norm(w - bend / 2), atol=1e-6)
    assert not torch.allclose(outs["Y"][1], outs["H0"][1], atol=1e-2)


def test_velocity_starts_as_asked():
    # without a velocity the connection of the first block vanishes
    x = draw(2, 5, 8)
    same = [stack(k, layers=1, hidden=0)(x)[0] for k in ("H0", "H1")]
    assert torch.allclose(*same, atol=1e-14)
    moved = [stack(k, layers=1, hidden=0, initial_velocity="learned") for k in ("H0", "H1")]
    moved[1].load_state_dict(moved[0].state_dict())
    assert not torch.allclose(moved[0](x)[0], moved[1](x)[0], atol=1e-3)


def test_prefix_is_the_bidirectional_stack_of_each_prefix():
    model, whole = (stack("R2", causality=c) for c in ("prefix", "bidirectional"))
    x = draw(2, 5, 8)
    y = model(x)[0]
    for t in range(1, 6):
        assert torch.equal(y[:, t - 1], whole(x[:, :t])[0][:, -1])
    local = stack("R2")(x)[0]
    assert torch.allclose(y[:, 0], local[:, 0], atol=1e-12)
    assert not torch.allclose(y[:, 1:], local[:, 1:], atol=1e-3)
    with pytest.raises(ValueError, match="129 tokens, expected at most 128"):
        model(draw(1, 129, 8))


def test_large_scores_do_not_overflow():
    for kind in (*KINDS, "softmax"):
        model = stack(kind, initial_velocity="learned")
        with torch.no_grad():
            for block in model.layers:
                block.attention.qkv.weight[:16] *= 1e4
        x = draw(2, 5, 8).requires_grad_()
        y, _ = model(x)
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert bool(y.isfinite().all() and grad.isfinite().all())


def test_float32_and_doors():
    y, state = SympFormer(8, 2, 2, "R2", initial_velocity="learned")(draw(2, 5, 8).float())
    assert y.dtype == torch.float32
    model = stack("R2")
    with pytest.raises(TypeError, match="x has dtype torch.float32, expected torch.float64"):
        model(draw(2, 5, 8).float())
    with pytest.raises(ValueError, match=r"expected \(batch, time, 8\)"):
        model(draw(2, 5, 7))
    with pytest.raises(TypeError, match="expected a SympState of 2 layers"):
        model(draw(2, 5, 8), state.layers)
    with pytest.raises(TypeError, match="is a KeyValue, expected MovingKeyValue"):
        model(draw(2, 5, 8), stack("H0")(draw(2, 5, 8))[1])
    with pytest.raises(ValueError, match="the state of another layer or batch"):
        model(draw(3, 5, 8), model(draw(2, 5, 8))[1])
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"kind": "H3"}, "unknown kind 'H3'"),
        ({"causality": "global"}, "unknown causality 'global'"),
        ({"kind": "H0", "causality": "row_hamiltonian"}, "this block has none"),
        ({"initial_velocity": "random"}, "unknown initial_velocity"),
        ({"kind": "softmax", "schedule": "free"}, "unknown schedule 'free'"),
        ({"kind": "softmax", "scheme": "rk4"}, "unknown scheme 'rk4'"),
        ({"kind": "softmax", "dt": 0.0}, "dt is 0.0"),
        ({"t0": 0.0}, "t0 0.0, expected both to be positive"),
        ({"heads": 3}, "positive multiple"),
    ]
    for options, match in wrong:
        with pytest.raises(ValueError, match=match):
            stack(**options)
