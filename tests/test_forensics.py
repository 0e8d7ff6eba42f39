"""Instruments for attention: each against closed forms, and the text's claims against them."""

import math
from typing import Any

import pytest
import torch
from test_plotting import needs_gl
from torch import nn

from darboux.integrators import audit
from darboux.learners.attention import SoftmaxAttention, angles, rotate
from darboux.learners.forensics import (
    bode,
    correlation,
    energy_gain,
    frequency_response,
    momentum_gain,
    phase_space,
    report,
    score_terms,
    shear_map,
    unfilter,
)
from darboux.learners.head_maps import (
    attention_maps,
    induction_score,
    previous_token_score,
    repeated_tokens,
)
from darboux.learners.momentum_attention import (
    FilteredAttention,
    MomentumAttention,
    convolved_keys,
    filter_tokens,
    key_value_shift,
    smeared_keys,
)

GAMMAS = (-1.5, -1.0, -0.5, -0.25, 0.3, 1.0, 4.0)
OMEGA = torch.linspace(0, math.pi, 65, dtype=torch.float64)


def build(make):
    torch.manual_seed(0)
    return make().double()


def tokens(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def taps(gamma):
    return [torch.tensor(1 + gamma).double(), torch.tensor(-gamma).double()]


# -- frequencies --------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", GAMMAS)
def test_momentum_is_no_high_pass(gamma):
    gain = frequency_response([1 + gamma, -gamma], OMEGA).abs().square()
    torch.testing.assert_close(gain, momentum_gain(gamma, OMEGA), rtol=0, atol=1e-12)
    assert gain[0] == pytest.approx(1, abs=1e-14)  # constant content is not rejected
    assert gain[-1] == pytest.approx((1 + 2 * gamma) ** 2)
    slope = gain.diff()
    if gamma == -1:
        assert slope.abs().max() < 1e-14  # a pure delay
    elif -1 < gamma < 0:
        assert (slope[:32] < 0).all()  # it even lowers high frequencies
    else:
        assert (slope > 0).all()
    torch.testing.assert_close(frequency_response([0.5, 0.5], OMEGA)[-1].abs(), gain[0] * 0)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_energy_of_white_noise_grows_by_the_mean_gain(gamma):
    around = torch.arange(64, dtype=torch.float64) * math.tau / 64
    assert float(momentum_gain(gamma, around).mean()) == pytest.approx(energy_gain(gamma))
    x = tokens(4, 20_000, 1)
    y = filter_tokens(x, taps(gamma))[0]
    assert float(y.square().mean() / x.square().mean()) == pytest.approx(
        energy_gain(gamma), rel=0.03
    )


def test_power_complement_of_the_difference_is_the_sum():
    # not what is low-pass about the rotation: the text's equation of complementarity
    difference = frequency_response([1, -1], OMEGA).abs().square()
    both = difference + frequency_response([1, 1], OMEGA).abs().square()
    torch.testing.assert_close(both, torch.full_like(OMEGA, 4))
    torch.testing.assert_close(difference.sqrt(), 2 * (OMEGA / 2).sin())


def test_slow_content_and_differences_are_not_orthogonal():
    # int_0^c 2 sin(w/2) dw = 4 (1 - cos(c/2)): small, but zero for c = 0 alone; no gamma in it
    for c in (0.1, 0.5, 1.0):
        w = (torch.arange(2000, dtype=torch.float64) + 0.5) * c / 2000
        found = float(frequency_response([1, -1], w).abs().sum() * c / 2000)
        assert found == pytest.approx(4 * (1 - math.cos(c / 2)), rel=1e-6)
        assert found > 0.4 * c * c


def test_rotation_shifts_spectra_and_filters_nothing():
    n, e = 64, 8
    t = torch.arange(n, dtype=torch.float64)
    angle = torch.stack([math.tau * k / n * t for k in (5, 11, 0, 20)], -1)
    x = (math.tau * 3 / n * t).cos()[:, None] * tokens(e)
    before, after = (
        torch.fft.fft(torch.complex(*z.chunk(2, -1)), dim=0).abs() for z in (x, rotate(x, angle))
    )
    for plane, k in enumerate((5, 11, 0, 20)):
        moved = before[:, plane].roll(k)
        torch.testing.assert_close(after[:, plane], moved, rtol=0, atol=1e-10)


LAYERS = {
    "after": lambda: MomentumAttention(12, 2, 0.3, [1.0, -0.4], 2.0),
    "before": lambda: MomentumAttention(12, 2, 0.3, [1.0, -0.4], 2.0, placement="pre_rope"),
    "norm": lambda: MomentumAttention(12, 2, 4.0, 4.0, 0.1, qk_norm=True),
    "KV-shifting": lambda: key_value_shift(12, 2),
    "smeared": lambda: smeared_keys(12, 2),
    "4 taps": lambda: convolved_keys(12, 2, 4),
    "no rotation": lambda: MomentumAttention(12, 2, 1.0, learned=True, rotary=False),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_measured_response_is_that_of_the_taps(name, part):
    layer = build(LAYERS[name])
    found = bode(layer, part)
    assert found.error.max() < 1e-10
    assert (found.correlation >= 0.999).all()
    assert (found.measured.angle() - found.theory.angle()).sin().abs().max() < 1e-9  # phase too
    if "-" not in name and part == "k" and name in ("after", "before"):
        for h, gamma in enumerate((1.0, -0.4)):
            gain = found.measured[h].abs().square()
            expected = momentum_gain(gamma, found.frequencies)
            torch.testing.assert_close(gain, expected, rtol=1e-6, atol=0)


def test_after_the_rotation_the_filter_meets_shifted_frequencies():
    gamma, e = 1.0, 6
    theta = angles(1, 1, e, OMEGA)[0]
    # frequencies start at 0: constant content
    after = bode(build(lambda: MomentumAttention(12, 2, 0, gamma)))
    expected = 1 + 4 * gamma * (1 + gamma) * (theta / 2).sin().square()
    gain = after.measured[:, :, 0].abs().square()
    torch.testing.assert_close(gain, expected.expand(2, 3), rtol=1e-10, atol=0)
    before = bode(build(lambda: MomentumAttention(12, 2, 0, gamma, placement="pre_rope")))
    assert (before.measured[:, :, 0].abs() - 1).abs().max() < 1e-12
    # a theory without the shift fails
    wrong = momentum_gain(gamma, OMEGA[::2]).sqrt().expand(2, 3, -1)
    assert correlation(after.measured.abs()[0, 0], wrong[0, 0]) < 0.95


def test_response_after_training_is_that_of_the_new_taps():
    layer = build(lambda: MomentumAttention(12, 2, 0.0, 0.3, learned="k"))
    start = [tap.detach().clone() for tap in layer.taps("k")]
    raw, x = next(layer.filters["k"].parameters()), tokens(2, 8, 12)
    for _ in range(5):
        loss = (layer(x)[0] - x.roll(1, 1)).square().mean()
        raw.data -= 0.1 * torch.autograd.grad(loss, raw)[0].sign()
    assert bode(layer).error.max() < 1e-10
    moved = bode(layer, taps=start).error
    shift = (layer.taps("k")[1] - start[1]).abs().flatten()
    assert (shift > 0.02).all()
    # at w = pi, |H - H_0| = 2 |gamma - gamma_0|
    torch.testing.assert_close(moved, 2 * shift.detach(), rtol=1e-3, atol=0)


def test_float32_response():
    torch.manual_seed(0)
    found = bode(MomentumAttention(12, 2, 0, 1.0))
    assert found.measured.dtype == torch.complex64
    assert found.error.max() < 1e-5


def test_correlation_of_what_is_constant():
    one, up = torch.ones(5), torch.arange(5.0)
    assert correlation(one, one) == 1
    assert correlation(one, up) == 0
    assert correlation(2 * up + 1, -up) == pytest.approx(-1)


@pytest.mark.parametrize("gamma", [0.3, 4.0, -0.4])
def test_the_filter_has_an_exact_causal_inverse(gamma):
    x = tokens(2, 30, 3)
    y = filter_tokens(x, taps(gamma))[0]
    torch.testing.assert_close(unfilter(y, taps(gamma)), x, rtol=0, atol=1e-12)
    # an error dies away by g/(1+g) a token
    other = y.clone()
    other[:, 5] += 1e-3
    apart = (unfilter(other, taps(gamma)) - x)[0, 5:, 0]
    torch.testing.assert_close(apart[4] / apart[3], torch.tensor(gamma / (1 + gamma)).double())


def test_a_delay_cannot_be_undone():
    with pytest.raises(ValueError, match="nothing undoes that"):
        unfilter(tokens(4, 2), taps(-1.0))
    with pytest.raises(ValueError, match="nothing undoes that"):
        unfilter(tokens(4, 2), [1.0, -1.0])
    filters = [t.reshape(1, 1, 1) for t in (torch.tensor(0.8), torch.tensor(0.1))]
    x = tokens(2, 7, 3)
    y = filter_tokens(x, [*filters, filters[1]])[0]
    torch.testing.assert_close(unfilter(y, [*filters, filters[1]]), x, rtol=0, atol=1e-7)


# -- scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_four_terms_sum_to_the_scores(name):
    layer = build(LAYERS[name])
    x = tokens(2, 7, 12)
    q, k = layer.normalise(*layer.features(x)[:2])
    terms = score_terms(layer, x)
    torch.testing.assert_close(terms.total(), q @ k.mT / math.sqrt(6), rtol=0, atol=1e-12)
    seen = torch.ones(7, 7, dtype=torch.bool).tril()
    masked = terms.total().masked_fill(~seen, -math.inf).softmax(-1)
    torch.testing.assert_close(attention_maps(layer, x)[""], masked, rtol=0, atol=1e-12)


def test_terms_are_those_of_the_text():
    g = 0.5
    layer = build(lambda: MomentumAttention(12, 2, g, g))
    x = tokens(2, 7, 12)
    q, k = layer.features(x, filtered=False)[:2]
    s = q @ k.mT / math.sqrt(6)  # s[t, j]
    now, one = slice(1, None), slice(None, -1)
    static, anticipation, drift, kinematic = (z[..., now, now] for z in score_terms(layer, x))
    torch.testing.assert_close(static, s[..., now, now])
    torch.testing.assert_close(anticipation, g * (s[..., now, now] - s[..., now, one]))
    torch.testing.assert_close(drift, g * (s[..., now, now] - s[..., one, now]))
    cross = s[..., now, now] - s[..., now, one] - s[..., one, now] + s[..., one, one]
    torch.testing.assert_close(kinematic, g * g * cross)


# -- phase space ----------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [-1.0, -0.3, 0.5, 4.0])
def test_the_shear_is_symplectic_and_the_layer_is_not(gamma):
    found = phase_space(gamma)
    assert found.symplecticity < 1e-12
    assert found.volume < 1e-12
    assert found.sequence_volume == pytest.approx(abs(1 + gamma) ** (3 * 5), rel=1e-10)
    assert found.expected == pytest.approx(found.sequence_volume, rel=1e-10)
    assert abs(found.sequence_volume - 1) > 0.9  # no volume is conserved


def test_every_shear_has_determinant_one_also_a_nonlinear_one():
    # the text: "a non-linear augmentation has determinant 1 + df/dp"
    z = tokens(4, 6)
    a = tokens(3, 3)
    for kick in (torch.sin, lambda p: p**3, lambda p: p @ a, lambda p: (p @ a).sin()):
        assert audit.volume_defect(shear_map(kick), z).max() < 1e-12
    # symplectic is what has a symmetric Jacobian
    for kick, symmetric in (
        (torch.sin, True), (lambda p: p @ (a + a.T), True), (lambda p: p @ a, False),
        (lambda p: (p @ a).sin() @ a.T, True),
    ):  # fmt: skip
        defect = audit.symplecticity_defect(shear_map(kick), z).max()
        assert (defect < 1e-12) == symmetric


def test_momentum_is_not_the_only_causal_difference():
    # p_t = A (x_t - x_{t-1}) with any symmetric A, and longer differences: causal, zero on what is
    # constant, a symplectic shear on (q, p)
    x = torch.ones(1, 9, 3, dtype=torch.float64)
    for longer in ([1.5, 0.0, -0.5], [1.3, -0.6, 0.3], [1.5, -0.25, -0.25]):
        filters = [torch.tensor(c).double() for c in longer]
        torch.testing.assert_close(filter_tokens(x, filters)[0], x)
        gain = frequency_response(longer, OMEGA).abs().square()
        best = min(float((gain - momentum_gain(g, OMEGA)).abs().max()) for g in
                   torch.linspace(-2, 2, 81).tolist())  # fmt: skip
        assert best > 0.05  # no gamma gives this filter


# -- maps -----------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.embedding = nn.Embedding(16, layers[0].width)
        self.layers = nn.ModuleList(layers)

    def forward(self, words):
        x = self.embedding(words)
        for layer in self.layers:
            x = x + layer(x)[0]
        return x


def test_maps_are_those_that_the_model_uses():
    model = build(lambda: Small([SoftmaxAttention(12, 2), MomentumAttention(12, 2)]))
    words = repeated_tokens(3, 5, 16, generator=torch.Generator().manual_seed(0))
    maps = attention_maps(model, words)
    assert list(maps) == ["layers.0", "layers.1"]
    for shown in maps.values():
        assert shown.shape == (3, 2, 10, 10)
        torch.testing.assert_close(shown.sum(-1), torch.ones(3, 2, 10).double())
        assert (shown.triu(1) == 0).all()
    first: Any = model.layers[0]
    v = first.qkv(model.embedding(words)).chunk(3, -1)[2].unflatten(-1, (2, 6)).transpose(1, 2)
    y = first.out((maps["layers.0"] @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(y, first(model.embedding(words))[0])
    # a later chunk comes with a mask
    x = tokens(1, 6, 12)
    state = first(x[:, :4])[1]
    late = attention_maps(first, x[:, 4:], state)[""]
    torch.testing.assert_close(late, attention_maps(first, x)[""][:, :, 4:])
    assert not first._forward_pre_hooks  # nothing is left behind


def test_scores_of_heads_by_hand():
    words = torch.tensor([[1, 2, 3, 1, 2]])
    maps = torch.zeros(1, 2, 5, 5)
    maps[0, 0] = torch.eye(5).roll(-1, -1).tril() + torch.eye(5)[0] * torch.eye(5)[:, :1]
    maps[0, 1, 3, 1] = 1.0  # after 1 came 2
    maps[0, 1, 4, 2] = 0.5  # after 2 came 3
    assert previous_token_score(maps).tolist() == [1, 0]
    assert induction_score(maps, words).tolist() == [0, 0.75]


def test_repeated_words():
    words = repeated_tokens(6, 7, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(words[:, :7], words[:, 7:])
    assert all(len(set(row[:7].tolist())) == 7 for row in words)
    with pytest.raises(ValueError, match="period is 10, expected 1 to 9"):
        repeated_tokens(6, 10, 9)


def key_shift(gamma, sign):
    """Return a model whose head is an induction head by construction."""
    layer = MomentumAttention(16, 1, 0, gamma, rotary=False)
    model = Small([layer])
    eye = torch.eye(16)
    with torch.no_grad():
        model.embedding.weight.copy_(torch.linalg.qr(torch.randn(16, 16))[0])
        layer.qkv.weight.copy_(torch.cat([500 * eye, sign * eye, eye]))
    return model.double()


def test_the_constructed_head_is_an_induction_head():
    torch.manual_seed(0)
    words = repeated_tokens(4, 8, 16, generator=torch.Generator().manual_seed(0))
    words = torch.cat([torch.full((4, 1), 15), words % 15], 1)  # the first is its own predecessor
    for gamma, sign, least in ((-1.0, 1, 0.99), (1.0, -1, 0.99)):
        maps = attention_maps(key_shift(gamma, sign), words)["layers.0"]
        assert induction_score(maps, words) > least
    plain = attention_maps(key_shift(0.0, 1), words)["layers.0"]
    assert induction_score(plain, words) < 0.05


# -- the report -----------------------------------------------------------------------------------


def trained(seed=0):
    torch.manual_seed(seed)
    layers = [MomentumAttention(12, 2, 0.0, 0.5, learned=True), SoftmaxAttention(12, 2)]
    return Small([*layers, convolved_keys(12, 2, 4)])


def test_report_says_what_was_measured():
    words = repeated_tokens(3, 5, 16, generator=torch.Generator().manual_seed(0))
    model = trained()
    found = report(model, words)
    assert [row.layer for row in found.heads] == [f"layers.{i}" for i in (0, 0, 1, 1, 2, 2)]
    row = found.heads[0]
    assert row.gamma_k == pytest.approx(0.5)
    assert row.gamma_q == 0
    assert row.energy == pytest.approx(energy_gain(0.5))
    assert row.bode > 0.999
    assert sum(row.shares) == pytest.approx(1, abs=1e-5)
    assert row.shares[2] == row.shares[3] == 0  # queries are left alone
    maps = attention_maps(model, words)["layers.1"]
    assert found.heads[3].previous == pytest.approx(float(previous_token_score(maps)[1]))
    assert math.isnan(found.heads[3].bode)  # which filters nothing
    lines = str(found).splitlines()
    assert len(lines) == 7
    assert lines[4].split()[2] == "-"
    model.layers[2] = convolved_keys(12, 2, 2, placement="post_rope")
    after = report(model, words)  # no response, and the rest
    assert math.isnan(after.heads[4].bode)
    assert after.heads[4].energy > 0


@needs_gl
def test_report_draws_a_page(tmp_path):
    from darboux._plot_forensics import forensics

    words = repeated_tokens(3, 5, 16, generator=torch.Generator().manual_seed(0))
    before = report(trained(1), words)
    found = report(trained(), words, before=before, path=tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 20_000
    plotter = forensics(found)
    gain = plotter.renderers[0]._charts._charts[0]
    # both reports: two filtered layers of two heads, lines and dots
    assert len([*gain.plots("line")]) == len([*gain.plots("scatter")]) == 8
    plotter.close()


# -- the door -------------------------------------------------------------------------------------


def test_bad_input_is_refused():
    layer = MomentumAttention(12, 2)
    with pytest.raises(TypeError, match="layer is a SoftmaxAttention, expected a Filtered"):
        bode(SoftmaxAttention(12, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="part is 'x', expected one of q, k, v"):
        bode(layer, "x")
    with pytest.raises(ValueError, match="time is 2 and frequencies 33, expected more than 2"):
        bode(layer, time=2)
    with pytest.raises(ValueError, match="convolved number by number after the rotation"):
        bode(convolved_keys(12, 2, 2, placement="post_rope"))
    with pytest.raises(ValueError, match="dim is 0 and time 6"):
        phase_space(1.0, dim=0)
    with pytest.raises(ValueError, match=r"maps has shape \(2, 3\)"):
        previous_token_score(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="no token occurs twice"):
        induction_score(torch.ones(1, 1, 3, 3), torch.tensor([[1, 2, 3]]))
    with pytest.raises(ValueError, match=r"tokens \(1, 4\), expected"):
        induction_score(torch.ones(1, 1, 3, 3), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="no layer called"):
        report(nn.Embedding(4, 2), torch.tensor([[1, 1]]))
    assert issubclass(MomentumAttention, FilteredAttention)
