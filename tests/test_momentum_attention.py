"""Attention with filtered queries, keys and values: causal, chunked, exact; what it finds."""

import math

import pytest
import torch

from darboux.learners.attention import SoftmaxAttention, angles, rotate
from darboux.learners.forensics import score_terms
from darboux.learners.momentum_attention import (
    Filter,
    FilteredAttention,
    FilteredState,
    MomentumAttention,
    convolved_keys,
    filter_tokens,
    key_value_shift,
    scaling_law,
    smeared_keys,
)

LAYERS = {
    "keys": lambda: MomentumAttention(8, 2),
    "all, per head": lambda: MomentumAttention(8, 2, 0.3, [1.0, -0.4], 0.2),
    "before the rotation": lambda: MomentumAttention(8, 2, 0.5, 2.0, placement="pre_rope"),
    "norm": lambda: MomentumAttention(8, 2, 4.0, 4.0, qk_norm=True, placement="embedding"),
    "learned": lambda: MomentumAttention(8, 2, 0.1, 0.5, learned="qkv", rotary=False),
    "unfiltered": lambda: MomentumAttention(8, 2, 0, 0),
    "KV-shifting": lambda: key_value_shift(8, 2),
    "4 taps": lambda: convolved_keys(8, 2, 4),
    "4 taps, after": lambda: convolved_keys(8, 2, 4, placement="post_rope"),
    "smeared": lambda: smeared_keys(8, 2),
}


def build(make):
    torch.manual_seed(0)
    return make().double()


@pytest.fixture(params=LAYERS)
def layer(request):
    return build(LAYERS[request.param])


def tokens(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("chunks", [[1] * 9, [4, 1, 4], [8, 1]])
@pytest.mark.parametrize("packed", [False, True])
def test_chunks_agree_with_the_whole(layer, chunks, packed):
    x = tokens(3, 9, 8)
    starts = torch.rand(3, 9, generator=torch.Generator().manual_seed(2)) < 0.4 if packed else None
    whole, end = layer(x, starts=starts)
    state, found = None, []
    for part in torch.arange(9).split(chunks):
        mine = None if starts is None else starts[:, part]
        y, state = layer(x[:, part], state, starts=mine)
        found.append(y)
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=0, atol=1e-10)
    assert isinstance(state, FilteredState)
    for a, b in zip(state, end, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_later_tokens_change_nothing_before_them(layer):
    x = tokens(2, 12, 8)
    other = x.clone()
    other[:, 7:] += 3
    for mode in (True, False):
        layer.train(mode)
        y, z = layer(x)[0], layer(other)[0]
        assert torch.equal(y[:, :7], z[:, :7])
        assert (y[:, 7:] != z[:, 7:]).any(-1).all()


def test_beside_the_cache_one_raw_token_is_kept():
    state = build(LAYERS["keys"])(tokens(2, 5, 8))[1]
    assert [tuple(part.shape) for part in state] == [
        *[(2, 2, 5, 4)] * 2, (2, 2, 0, 4), (2, 2, 1, 4), (2, 2, 0, 4)
    ]  # fmt: skip
    assert build(LAYERS["4 taps"])(tokens(2, 2, 8))[1].k.shape == (2, 2, 3, 4)


def test_without_momentum_it_is_softmax_attention():
    layer, plain = build(LAYERS["unfiltered"]), SoftmaxAttention(8, 2).double()
    plain.load_state_dict(layer.state_dict())
    x = tokens(2, 7, 8)
    assert torch.equal(layer(x)[0], plain(x)[0])


# -- against the formulas ---------------------------------------------------------------------


def slowly(layer, x, gammas, before):
    """Return the output from the formulas, with loops and the whole matrix of scores."""
    batch, time, width = x.shape
    e = width // layer.heads
    y = torch.empty_like(x)
    for b in range(batch):
        for h in range(layer.heads):
            mine = slice(h * e, (h + 1) * e)
            q, k, v = (w[mine] @ x[b].T for w in layer.qkv.weight.chunk(3))  # (e, time)
            q, k, v = q.T, k.T, v.T

            def turn(z):
                return rotate(z, angles(0, time, e, z))

            def shear(z, gamma):
                return torch.stack([z[t] + gamma * (z[t] - z[max(t - 1, 0)]) for t in range(time)])

            if before:
                q, k = turn(shear(q, gammas[0])), turn(shear(k, gammas[1]))
            else:
                q, k = shear(turn(q), gammas[0]), shear(turn(k), gammas[1])
            v = shear(v, gammas[2])
            for t in range(time):
                weight = torch.softmax(k[: t + 1] @ q[t] / math.sqrt(e), 0)
                y[b, t, mine] = weight @ v[: t + 1]
    return y @ layer.out.weight.T


@pytest.mark.parametrize("placement", ["post_rope", "pre_rope"])
def test_output_is_that_of_the_formulas(placement):
    gammas = (0.75, -0.25, 0.5)  # exact in float32 too
    layer = build(lambda: MomentumAttention(8, 2, *gammas, placement=placement))
    x = tokens(2, 6, 8)
    slow = slowly(layer, x, gammas, placement == "pre_rope")
    torch.testing.assert_close(layer(x)[0], slow, rtol=0, atol=1e-12)


def test_shearing_embeddings_is_shearing_before_the_rotation():
    # The text's Algorithm 1 does the first and calls the second wrong: they are one function.
    g = 1.25
    layer = build(lambda: MomentumAttention(8, 2, g, g, placement="embedding"))
    x = tokens(2, 6, 8)
    sheared = x + g * (x - torch.cat([x[:, :1], x[:, :-1]], 1))
    q, k, _ = layer.features(sheared, filtered=False)[:3]
    for mine, other in zip(layer.features(x)[:2], (q, k), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)
    other = build(lambda: MomentumAttention(8, 2, g, g, placement="pre_rope"))
    assert torch.equal(other(x)[0], layer(x)[0])


def test_gamma_minus_one_is_the_key_of_the_previous_token():
    layer = build(lambda: MomentumAttention(8, 2, gamma_k=-1))
    x = tokens(1, 6, 8)
    raw, shifted = layer.features(x, filtered=False)[1], layer.features(x)[1]
    assert torch.equal(shifted[..., 1:, :], raw[..., :-1, :])
    assert torch.equal(shifted[..., 0, :], raw[..., 0, :])  # which has none before it


@pytest.mark.parametrize("name", ["all, per head", "4 taps", "KV-shifting"])
def test_filters_do_not_see_across_documents(name):
    layer = build(LAYERS[name])
    layer.rotary = False  # positions go on through a packed sequence
    documents = [tokens(1, n, 8) + n for n in (3, 1, 4)]
    starts = torch.tensor([[0, 0, 0, 1, 1, 0, 0, 0]], dtype=torch.bool)
    packed = layer.features(torch.cat(documents, 1), starts=starts)[:3]
    alone = [layer.features(document)[:3] for document in documents]
    for whole, parts in zip(packed, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(whole, torch.cat(parts, 2), rtol=0, atol=1e-12)
    mixed = layer.features(torch.cat(documents, 1))[1]
    assert (mixed - packed[1]).abs().amax((0, 1, 3))[3] > 0.1


def test_learned_numbers_have_exact_gradients():
    x = tokens(1, 2, 5, 3)
    start = torch.tensor([0, 0, 1, 0, 0], dtype=torch.bool)[:, None]
    for starts in (None, start):
        for n in (2, 3):
            taps = [torch.randn(2, 1, 1, dtype=torch.float64, requires_grad=True) for _ in range(n)]
            past = tokens(1, 2, n - 1, 3).requires_grad_()
            assert torch.autograd.gradcheck(
                lambda x, p, *taps: filter_tokens(x, taps, p, starts),
                (x.clone().requires_grad_(), past, *taps),
            )


def test_what_is_learned_is_what_was_asked_for():
    def learned(**options):
        layer = MomentumAttention(8, 4, 0.0, 0.5, **options)
        return {n for n, _ in layer.named_parameters()} - {"qkv.weight", "out.weight"}

    assert learned() == set()
    assert learned(learned=True) == {"filters.q.raw", "filters.k.raw"}
    assert learned(learned="kv") == {"filters.k.raw", "filters.v.raw"}
    layer = MomentumAttention(8, 4, 0.0, 0.5, learned=True)
    raws = [next(layer.filters[part].parameters()) for part in "qk"]
    assert [tuple(raw.shape) for raw in raws] == [(1, 4, 1, 1)] * 2  # one for each head
    loss = layer(torch.randn(2, 6, 8))[0].square().sum()
    assert all((g != 0).all() for g in torch.autograd.grad(loss, raws))  # from gamma_q = 0 too


def test_norm_undoes_the_gain_in_energy():
    x = tokens(2, 40, 8)
    for gamma in (0.0, 4.0):
        layer = build(lambda gamma=gamma: MomentumAttention(8, 2, gamma, gamma, qk_norm=True))
        q, k = layer.normalise(*layer.features(x)[:2])
        for z in (q, k):
            torch.testing.assert_close(z.square().mean(-1), torch.ones(2, 2, 40).double())


def test_relatives_have_their_taps():
    a, b = key_value_shift(8, 2).taps("k")
    torch.testing.assert_close(a + b, torch.ones(2, 1, 1))
    assert ((a > 0) & (a < 1)).all()
    s, rest = smeared_keys(8, 2).taps("k")
    assert (s + rest == 1).all()
    assert (s == 0.5).all()
    assert len(convolved_keys(8, 2, 2).taps("k")) == 2
    assert convolved_keys(8, 2, 4).taps("k")[0].shape == (2, 1, 4)
    once, again = (key_value_shift(8, 2, generator=torch.Generator().manual_seed(3)) for _ in "ab")
    assert torch.equal(once.taps("v")[0], again.taps("v")[0])


def test_scaling_law_has_the_values_of_its_text():
    printed = {1: 4.17, 2: 2.50, 3: 1.85, 4: 1.49, 5: 1.27, 8: 0.90}
    for layers, gamma in printed.items():
        assert scaling_law(layers) == pytest.approx(gamma, abs=0.006)


# -- what it can find, and what the text says about it --------------------------------------------


def recalled(gamma_q, gamma_k, sign, vocabulary=400, width=256, time=48, batch=150):
    """Return how often a layer with W_Q^T W_K = sign I finds what followed the query before."""
    g = torch.Generator().manual_seed(0)
    embedding = torch.randn(vocabulary, width, generator=g) / math.sqrt(width)
    layer = MomentumAttention(width, 1, gamma_q, gamma_k, rotary=False)
    eye = torch.eye(width)
    with torch.no_grad():
        layer.qkv.weight.copy_(torch.cat([100 * math.sqrt(width) * eye, sign * eye, eye]))
        layer.out.weight.copy_(eye)
        words = torch.rand(batch, vocabulary, generator=g).argsort(-1)[:, :time]
        # not the first, which is its own predecessor, nor the last, which none follows
        at = torch.randint(1, time - 2, (batch, 1), generator=g)
        asked = torch.cat([words, words.gather(1, at)], 1)
        said = (layer(embedding[asked])[0][:, -1] @ embedding.T).argmax(-1)
    return float((said == words.gather(1, at + 1)[:, 0]).float().mean())


@pytest.mark.parametrize(
    ("gamma_q", "gamma_k", "sign", "low", "high"),
    [
        (0.0, 0.0, 1, 0.0, 0.02),  # no shear
        (0.0, -1.0, 1, 1.0, 1.0),  # the key of the previous token
        (0.0, 1.0, -1, 1.0, 1.0),  # the term is -g(1+g) q_t.k_{j-1}: gamma > 0 wants -I
        (0.0, 1.0, 1, 0.0, 0.02),
        (1.0, 1.0, 1, 0.0, 0.02),
        (1.0, 1.0, -1, 0.35, 0.65),  # ties with the token before the query
        (4.0, 4.0, -1, 0.35, 0.65),
        (1.0, 0.0, -1, 0.0, 0.1),  # queries alone never meet k_{j-1}
    ],
)
def test_keys_alone_find_what_symmetric_momentum_ties(gamma_q, gamma_k, sign, low, high):
    assert low <= recalled(gamma_q, gamma_k, sign) <= high


def test_the_tie_is_exact():
    # q_t.k_{j-1} and q_{t-1}.k_j have one weight, so that position t - 1 scores as the target does
    layer = build(lambda: MomentumAttention(8, 1, 1.0, 1.0, rotary=False))
    with torch.no_grad():
        eye = torch.eye(8).double()
        layer.qkv.weight.copy_(torch.cat([eye, -eye, eye]))
    letters = torch.linalg.qr(tokens(8, 8))[0]  # orthonormal: no noise
    x = letters[[0, 1, 2, 3, 4, 5, 2]][None]  # asked for 2: the answer is 3, at 3
    scores = score_terms(layer, x).total()[0, 0, -1].detach()
    assert scores[3] == pytest.approx(float(scores[5]), abs=1e-12)
    assert float(scores[3]) == pytest.approx(2 / math.sqrt(8), abs=1e-12)  # g(1+g)
    # the rest are zero, but the same token and itself, which are negative
    assert (scores[[0, 1, 4]].abs() < 1e-12).all()
    assert (scores[[2, 6]] < 0).all()


@pytest.mark.parametrize("placement", ["post_rope", "pre_rope"])
def test_scores_are_relative_wherever_the_shear_is(placement):
    # The text says that a shear before the rotation destroys relative positions.
    layer = build(lambda: MomentumAttention(8, 2, 1.3, 0.7, placement=placement))
    content = tokens(1, 6, 8)
    scores = []
    for n in (2, 9):
        x = torch.cat([tokens(1, n, 8), content], 1)
        scores.append(score_terms(layer, x).total()[..., n + 1 :, n + 1 :])
    torch.testing.assert_close(*scores, rtol=0, atol=1e-12)
    # a rotation by the wrong position is seen here
    other = score_terms(layer, torch.cat([content[:, :3], tokens(1, 1, 8), content[:, 3:]], 1))
    apart = (other.total()[..., 5:, 1:3] - scores[0][..., 3:, 0:2]).abs().max()
    assert apart > 1e-3


def test_frame_term_of_the_corollary():
    # (R_t - R_{t-1}) q has the length 2 |sin(theta/2)| |q| in each plane, none at slow ones
    e, q = 8, tokens(8)
    angle = angles(0, 6, e, q)
    turned = rotate(q.expand(6, e), angle)
    moved = (turned[1:] - turned[:-1]).unflatten(-1, (2, -1)).norm(dim=-2)
    length = q.unflatten(-1, (2, -1)).norm(dim=-2)
    expected = 2 * (angle[1] / 2).sin() * length
    torch.testing.assert_close(moved, expected.expand(5, -1), rtol=0, atol=1e-12)


# -- the door -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MomentumAttention(8, 3), ValueError, "width 8 and heads 3"),
        (lambda: MomentumAttention(6, 2), ValueError, "cannot be rotated"),
        (lambda: MomentumAttention(8, 2, placement="after"), ValueError, "'after', expected one"),
        (lambda: MomentumAttention(8, 2, learned="kx"), ValueError, "'kx', expected a bool"),
        (lambda: MomentumAttention(8, 2, [1.0] * 3), ValueError, r"shape \(3,\), expected"),
        (lambda: MomentumAttention(8, 2, math.nan), ValueError, "nan, expected finite"),
        (lambda: convolved_keys(8, 2, 1), ValueError, "taps is 1, expected at least 2"),
        (lambda: scaling_law(0), ValueError, "layers is 0"),
        (
            lambda: FilteredAttention(8, 2, {"k": Filter("free", torch.ones(2, 3, 1, 1))}),
            ValueError,
            r"raw \(2, 3, 1, 1\), expected one of q, k, v with \(n, 2, 1, 1 or 4\)",
        ),
    ],
)
def test_bad_layers_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_bad_input_is_refused():
    layer = MomentumAttention(8, 2)
    x = torch.randn(2, 3, 8)
    with pytest.raises(ValueError, match=r"MomentumAttention: x has shape \(2, 3, 7\)"):
        layer(x[..., :7])
    with pytest.raises(TypeError, match="float64, expected torch.float32"):
        layer(x.double())
    with pytest.raises(TypeError, match="starts is torch.int64, expected a boolean"):
        layer(x, starts=torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"starts has shape \(2, 4\)"):
        layer(x, starts=torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"k of the state has shape \(2, 2, 3, 4\), expected"):
        layer(x, convolved_keys(8, 2, 4)(x)[1])
    with pytest.raises(TypeError, match="state is a KeyValue, expected FilteredState"):
        layer(x, SoftmaxAttention(8, 2)(x)[1])
