r"""Instruments for attention: the frequency response of a head, its scores, its map, its geometry.

The shear :math:`\hat k_t = k_t + \gamma (k_t - k_{t-1})` is a filter with the response

.. math:: H(\omega) = 1 + \gamma - \gamma e^{-i\omega},\qquad
          |H|^2 = 1 + 4\gamma(1 + \gamma)\sin^2(\omega/2).

What is constant passes unchanged, whatever gamma: it is no high-pass. Above 0 and below -1 it lifts
high frequencies, up to :math:`|1 + 2\gamma|`; between, it lowers them; at -1 it is a pure delay.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from darboux._checks import check_tensor
from darboux.integrators import audit
from darboux.learners.attention import angles, rotate
from darboux.learners.head_maps import attention_maps, induction_score, previous_token_score
from darboux.learners.momentum_attention import FilteredAttention, filter_tokens

# -- frequencies --------------------------------------------------------------------------------


def frequency_response(taps: Sequence[Tensor | float], omega: Tensor) -> Tensor:
    r"""Return :math:`H(\omega) = \sum_j c_j e^{-ij\omega}`, complex; taps broadcast with it."""
    check_tensor("frequency_response", "omega", omega)
    return sum(c * torch.exp(-1j * j * omega) for j, c in enumerate(taps))  # type: ignore[return-value]


def momentum_gain(gamma: Tensor | float, omega: Tensor) -> Tensor:
    r"""Return :math:`|H|^2 = 1 + 4\gamma(1+\gamma)\sin^2(\omega/2)` of the momentum shear."""
    return 1 + 4 * gamma * (1 + gamma) * (omega / 2).sin().square()


def energy_gain(gamma: Tensor | float) -> Tensor | float:
    r"""Return :math:`1 + 2\gamma + 2\gamma^2`, what the shear makes of the energy of white noise.

    It is the mean of :math:`|H|^2` over frequencies, 41 at gamma = 4. With both sides sheared the
    variance of the scores grows by its square.
    """
    return 1 + 2 * gamma + 2 * gamma * gamma


class Bode(NamedTuple):
    """Response of each head of a layer to sinusoids, against that of its taps.

    ``frequencies (places, F)`` are those at which the filter works: places are the planes of the
    rotation where the filter comes after it, else the numbers of a head.
    """

    frequencies: Tensor
    measured: Tensor  # (heads, places, F), complex
    theory: Tensor  # (heads, places, F), complex
    correlation: Tensor  # (heads,), of magnitudes: Pearson's, 1 where both are constant
    error: Tensor  # (heads,), largest |measured - theory|


def bode(
    layer: FilteredAttention,
    part: str = "k",
    *,
    taps: Sequence[Tensor | float] | None = None,
    frequencies: int = 33,
    time: int = 24,
    generator: torch.Generator | None = None,
) -> Bode:
    r"""Measure the response of the filters of ``part`` by feeding sinusoids to the layer itself.

    Tokens :math:`u\cos\omega t` and :math:`u\sin\omega t` in a random direction ``u`` go through
    projection, rotation and filter, and once more without the filter; the ratio of the two complex
    signals is the response (the text's Algorithm 2). A plane of the rotation turns content of
    frequency :math:`\omega` to :math:`\omega + \theta_i`: there a filter after the rotation is at
    work, while one before it meets :math:`\omega` itself. Constant content thus has gain one before
    the rotation, :math:`1 + 4\gamma(1+\gamma)\sin^2(\theta_i/2)` after it.

    The theory is that of the layer's taps, or of the ``taps`` given, such as those before training.
    Raises ``ValueError`` for a convolution of each number after the rotation, which is no scalar
    filter of a plane.
    """
    where = "bode"
    check_layer(where, layer, part)
    own = layer.taps(part)
    if time <= len(own) or frequencies < 2:
        raise ValueError(
            f"{where}: time is {time} and frequencies {frequencies}, expected more than "
            f"{len(own)} and at least 2"
        )
    weight, e = layer.out.weight, layer.width // layer.heads
    turned = layer.rotary and part != "v"
    planes = turned and layer.placement == "post_rope"
    if not _has_response(layer, part):
        raise ValueError(
            f"{where}: {part} is convolved number by number after the rotation, which has no "
            "response of planes; expected one filter a head"
        )
    omega = torch.linspace(0, math.pi, frequencies, dtype=weight.dtype, device=weight.device)
    t = torch.arange(time, dtype=weight.dtype, device=weight.device)
    u = torch.randn(layer.width, generator=generator, dtype=weight.dtype).to(weight.device)
    phase = omega[:, None, None] * t[:, None]
    probe = torch.cat([phase.cos() * u, phase.sin() * u])
    angle = angles(0, time, e, probe, layer.theta) if turned else torch.zeros_like(t[:, None])
    i = "qkv".index(part)
    signals = []
    with torch.no_grad():
        for filtered in (False, True):
            z = layer.features(probe, filtered=filtered)[i]
            if turned and not planes:
                z = rotate(z, -angle)
            z = torch.complex(*z.chunk(2, 0))
            if planes:
                a, b = z.chunk(2, -1)
                z = a + 1j * b
            signals.append(z[..., len(own) - 1 :, :])  # past the start
        raw, out = signals
        measured = ((raw.conj() * out).sum(2) / raw.abs().square().sum(2)).permute(1, 2, 0)
        rates = angle[1].to(omega) if planes else torch.zeros_like(omega[:1])
        at = (omega + rates[:, None]).expand(rates.numel() if planes else e, -1)
        # taps (heads, 1, 1 or e) as (heads, places, 1)
        shown = [c.mT if isinstance(c, Tensor) and c.dim() == 3 else c for c in taps or own]
        theory = frequency_response(shown, at).expand_as(measured)
    pairs = zip(measured.abs().flatten(1), theory.abs().flatten(1), strict=True)
    r = torch.stack([correlation(a, b) for a, b in pairs])
    return Bode(at, measured, theory, r, (measured - theory).abs().amax((-2, -1)))


def _has_response(layer: FilteredAttention, part: str) -> bool:
    """Say whether the filter is one for a whole plane, or comes before planes are turned."""
    after = layer.rotary and part != "v" and layer.placement == "post_rope"
    return not after or layer.taps(part)[0].shape[-1] == 1


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Return Pearson's r of two vectors; one where both are constant, zero where one is."""
    a, b = a - a.mean(), b - b.mean()
    tiny = 1e3 * torch.finfo(a.dtype).eps * math.sqrt(len(a))
    flat = int(a.norm() < tiny) + int(b.norm() < tiny)
    return a.new_tensor(flat - 1.0) if flat else a @ b / (a.norm() * b.norm())


def unfilter(y: Tensor, taps: Sequence[Tensor | float]) -> Tensor:
    r"""Undo :func:`~darboux.learners.momentum_attention.filter_tokens` on ``y (..., time, e)``.

    :math:`x_t = (y_t - \sum_{j>0} c_j x_{t-j}) / c_0`, token by token. For momentum an error
    in ``y`` is multiplied by :math:`|\gamma/(1+\gamma)|` a token: it dies away for
    :math:`\gamma > -1/2` alone. Raises ``ValueError`` where :math:`c_0` (a pure delay, which has
    lost the last token) or the sum of the taps is zero.
    """
    first = sum(taps)
    if not torch.as_tensor(taps[0]).all() or not torch.as_tensor(first).all():
        raise ValueError("unfilter: the first tap or the sum of taps is zero: nothing undoes that")
    found = [y[..., :1, :] / first]
    for t in range(1, y.shape[-2]):
        rest = y[..., t : t + 1, :]
        for j, tap in enumerate(taps[1:], 1):
            rest = rest - tap * found[max(t - j, 0)]
        found.append(rest / taps[0])
    return torch.cat(found, -2)


# -- scores ---------------------------------------------------------------------------------------


class Terms(NamedTuple):
    """Four parts of the scores, each ``(batch, heads, time, time)``; they sum to them."""

    static: Tensor  # q . k
    anticipation: Tensor  # q . dk
    drift: Tensor  # dq . k
    kinematic: Tensor  # dq . dk

    def total(self) -> Tensor:
        """Return the scores, not masked."""
        return self.static + self.anticipation + self.drift + self.kinematic


def score_terms(layer: FilteredAttention, x: Tensor) -> Terms:
    r"""Split the scores :math:`\hat q_t\cdot\hat k_j/\sqrt e` of ``x`` by :math:`\hat q = q + dq`.

    For momentum dq is :math:`\gamma(q_t - q_{t-1})`. Norms and scales of the layer are those of the
    whole, applied to every part. Forms all ``time x time`` scores.
    """
    check_layer("score_terms", layer)
    q, k = layer.features(x, filtered=False)[:2]
    q_hat, k_hat = layer.features(x)[:2]
    dq, dk = q_hat - q, k_hat - k
    if layer.scale is not None:
        eps = torch.finfo(q.dtype).eps  # of the norm
        up = layer.scale * (q_hat.square().mean(-1, keepdim=True) + eps).rsqrt()
        down = (k_hat.square().mean(-1, keepdim=True) + eps).rsqrt()
        q, dq, k, dk = q * up, dq * up, k * down, dk * down
    root = math.sqrt(q.shape[-1])
    return Terms(q @ k.mT / root, q @ dk.mT / root, dq @ k.mT / root, dq @ dk.mT / root)


# -- phase space ----------------------------------------------------------------------------------


def shear_map(kick: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    r"""Return the map :math:`(q, p) \mapsto (q + f(p), p)` of packed states, for audits.

    Its determinant is one for *every* f; it is symplectic where the Jacobian of f is symmetric.
    """

    def step(z: Tensor) -> Tensor:
        q, p = z.chunk(2, -1)
        return torch.cat([q + kick(p), p], -1)

    return step


class PhaseSpace(NamedTuple):
    """The shear as a map of (q, p) and as the map of sequences that a layer applies."""

    symplecticity: float  # defect of (q, p) -> (q + gamma p, p)
    volume: float  # |det - 1| of it
    sequence_volume: float  # |det| of q_1 ... q_T -> q^_1 ... q^_T
    expected: float  # |1 + gamma|^(d (T - 1))


def phase_space(gamma: float, *, dim: int = 3, time: int = 6) -> PhaseSpace:
    r"""Audit the shear: symplectic where p is free, but here p is a function of the sequence.

    The map that a layer applies, :math:`\hat q_t = q_t + \gamma(q_t - q_{t-1})`, has determinant
    :math:`(1+\gamma)^{d(T-1)}`: no volume is conserved. Jacobians are exact.
    """
    if dim < 1 or time < 1:
        raise ValueError(f"phase_space: dim is {dim} and time {time}, expected at least 1")
    z = torch.linspace(-1, 1, 2 * dim, dtype=torch.float64)
    step = shear_map(lambda p: gamma * p)
    taps = [z.new_tensor(1 + gamma), z.new_tensor(-gamma)]
    x = torch.zeros(time, dim, dtype=torch.float64)
    jacobian: Any = torch.func.jacfwd(lambda x: filter_tokens(x, taps)[0])(x)
    return PhaseSpace(
        float(audit.symplecticity_defect(step, z)),
        float(audit.volume_defect(step, z)),
        float(torch.linalg.svdvals(jacobian.reshape(x.numel(), -1)).prod()),
        abs(1 + gamma) ** (dim * (time - 1)),
    )


# -- the report -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """One head, measured: a row of the report. NaN where the layer filters nothing."""

    layer: str
    head: int
    gamma_q: float  # less the second tap; for momentum, its gamma
    gamma_k: float
    energy: float  # of white keys, out over in
    bode: float  # correlation of measured and theoretical |H| of the keys
    previous: float
    induction: float
    shares: tuple[float, ...]  # root mean squares of the four terms, over their sum


_COLUMNS = (
    f"{'layer':20}head  gamma q  gamma k   energy    bode  previous  induction"
    "  static  anticip.   drift  kinematic"
)


@dataclass(frozen=True)
class Report:
    """What :func:`report` measured; ``str`` prints a table."""

    heads: tuple[Head, ...]
    bodes: dict[str, Bode]  # of the keys, by layer
    maps: dict[str, Tensor]
    before: "Report | None" = None

    def __str__(self) -> str:
        lines = [_COLUMNS]
        for row in self.heads:
            numbers = (row.gamma_q, row.gamma_k, row.energy, row.bode, row.previous, row.induction)
            cells = [f"{x:{w}.3f}" for x, w in zip(numbers, (9, 9, 9, 8, 10, 11), strict=True)]
            cells += [f"{x:{w}.3f}" for x, w in zip(row.shares, (8, 10, 8, 11), strict=True)]
            lines.append(f"{row.layer:20}{row.head:4}" + "".join(cells).replace("nan", "  -"))
        return "\n".join(lines)


def report(
    model: nn.Module,
    tokens: Tensor,
    *,
    before: Report | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Report:
    """Examine all heads of a model on ``tokens (batch, time)``, such as repeated ones.

    ``before`` is an earlier report, of the untrained model, to compare with. With a ``path`` that
    ends in ``.png`` one page is drawn there.
    """
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _, args: kept.__setitem__(name, args[0].detach())

    hooks = [
        layer.register_forward_pre_hook(keep(name))
        for name, layer in model.named_modules()
        if isinstance(layer, FilteredAttention)
    ]
    try:
        maps = attention_maps(model, tokens)
    finally:
        for hook in hooks:
            hook.remove()
    if not maps:
        raise ValueError("report: no layer called scaled_dot_product_attention")
    rows: list[Head] = []
    bodes: dict[str, Bode] = {}
    for name, shown in maps.items():
        layer = model.get_submodule(name.split("#")[0])
        columns = [torch.full((shown.shape[1],), math.nan) for _ in range(4)]
        shares = torch.full((shown.shape[1], 4), math.nan)
        if isinstance(layer, FilteredAttention):
            columns[:3] = _taps(layer)
            if _has_response(layer, "k"):
                bodes[name] = bode(layer, generator=torch.Generator().manual_seed(0))
                columns[3] = bodes[name].correlation
            shares = _shares(layer, kept[name.split("#")[0]])
        columns += [previous_token_score(shown), induction_score(shown, tokens)]
        rows += [
            Head(name, h, *(float(c[h]) for c in columns), shares=tuple(shares[h].tolist()))
            for h in range(shown.shape[1])
        ]
    found = Report(tuple(rows), bodes, maps, before)
    if path is not None:
        from darboux import _plot_forensics

        _plot_forensics.page(found, path)
    return found


@torch.no_grad()
def _taps(layer: FilteredAttention) -> list[Tensor]:
    """Return, per head, less the second tap on q and on k, and the energy gain of the keys."""
    nothing = layer.out.weight.new_zeros(layer.heads)
    both = layer.taps("q"), layer.taps("k")
    seconds = [-taps[1].mean((-2, -1)) if len(taps) > 1 else nothing for taps in both]
    return [*seconds, torch.stack([tap.square().mean((-2, -1)) for tap in both[1]]).sum(0)]


@torch.no_grad()
def _shares(layer: FilteredAttention, x: Tensor) -> Tensor:
    """Return the root mean squares ``(heads, 4)`` of the terms over their sum."""
    seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
    terms = score_terms(layer, x)
    sizes = torch.stack([(t * seen).square().mean((0, -2, -1)).sqrt() for t in terms], -1)
    return sizes / sizes.sum(-1, keepdim=True)


def check_layer(where: str, layer: object, part: str = "k") -> None:
    """Raise unless ``layer`` is a :class:`FilteredAttention` and ``part`` one of q, k, v."""
    if not isinstance(layer, FilteredAttention):
        raise TypeError(
            f"{where}: layer is a {type(layer).__name__}, expected a FilteredAttention, such as "
            "MomentumAttention"
        )
    if part not in ("q", "k", "v"):
        raise ValueError(f"{where}: part is {part!r}, expected one of q, k, v")
