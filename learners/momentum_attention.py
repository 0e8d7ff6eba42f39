r"""Attention whose queries, keys and values pass a short causal filter first; momentum is one.

The momentum shear of Maitra (arXiv 2602.04902) is, in each head,

.. math:: \hat k_t = k_t + \gamma\,(k_t - k_{t-1}) = (1 + \gamma)\,k_t - \gamma\,k_{t-1},

so that a query may look for what stood *before* a key: one layer then finds ``A B ... A -> B``.
It is a filter of two taps, and so are its relatives: KV-shifting, smeared keys, short convolutions.
What the text says about it and does not hold is measured in :mod:`darboux.learners.forensics`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from darboux.learners import base
from darboux.learners.attention import (
    KeyValue,
    angles,
    attend,
    check_heads,
    join_heads,
    remember,
    rotate,
    split_heads,
)

PARTS = "qkv"
PLACEMENTS = ("post_rope", "pre_rope", "embedding")

# raw numbers (n, heads, 1, 1 or e) -> taps; tap j weighs the token j steps back
FORMS: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "momentum": lambda raw: (1 + raw[0], -raw[0]),
    "free": lambda raw: raw.unbind(0),
    "smear": lambda raw: (torch.sigmoid(raw[0]), torch.sigmoid(-raw[0])),
}


class FilteredState(NamedTuple):
    """The keys and values of all tokens as attention sees them, and the last raw ones.

    ``keys`` and ``values (batch, heads, time, e)`` are filtered; ``q``, ``k`` and ``v`` of shape
    ``(batch, heads, n - 1, e)`` are what a filter of ``n`` taps still needs, newest first: one
    token for momentum, none where nothing is filtered.
    """

    keys: Tensor
    values: Tensor
    q: Tensor
    k: Tensor
    v: Tensor


class Filter(nn.Module):
    """The taps of a causal filter, made from ``raw (n, heads, 1, 1 or e)`` by one of ``FORMS``."""

    def __init__(self, form: str, raw: Tensor, *, learned: bool = True):
        super().__init__()
        self.form = form
        if learned:
            self.raw = nn.Parameter(raw)
        else:
            self.register_buffer("raw", raw)

    def forward(self) -> tuple[Tensor, ...]:
        """Return the taps, each ``(heads, 1, 1 or e)``."""
        return FORMS[self.form](self.raw)

    def extra_repr(self) -> str:
        return f"{self.form}, learned={isinstance(self.raw, nn.Parameter)}"


def filter_tokens(
    x: Tensor, taps: Sequence[Tensor], past: Tensor | None = None, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Return :math:`\hat x_t = \sum_j c_j x_{t-j}` of ``x (..., time, e)``, and the new ``past``.

    What would lie before a start, and before the first token where there is no ``past``, counts as
    the token of the start: momentum is zero there. ``starts`` broadcasts with ``x``.
    """
    n, time = len(taps) - 1, x.shape[-2]
    if past is None:
        past = x[..., :1, :].expand(*x.shape[:-2], n, -1)
    # views of one tensor: learned taps keep it, and no shifted copies, for the backward pass
    padded = torch.cat([past.flip(-2), x], -2)
    line = [padded[..., n - j : n - j + time, :] for j in range(n + 1)]
    if starts is not None:
        for j in range(1, n + 1):
            before = torch.cat([past[..., j - 1 : j, :], line[j - 1][..., :-1, :]], -2)
            line[j] = torch.where(starts, x, before)
    y = taps[0] * line[0]
    for tap, before in zip(taps[1:], line[1:], strict=True):
        y = torch.addcmul(y, tap, before)
    last = torch.cat([z[..., -1:, :] for z in line[:n]], -2) if n else past
    return y, last


class FilteredAttention(nn.Module):
    r"""Causal multi-head softmax attention, with :class:`Filter` on queries, keys or values.

    ``filters`` maps letters of ``"qkv"`` to filters. ``placement`` says where those of q and k
    act: after the rotation of positions (``post_rope``: the neighbour keeps its own angle), before
    it (``pre_rope``), or on the ``embedding``, the text's Algorithm 1. The projections are linear
    and have no bias, so the last two are one function, and run the same code.
    ``qk_norm`` scales what enters the scores to unit mean square, *after* the filter, times a
    learned number per head: the filter multiplies the energy (see
    :func:`~darboux.learners.forensics.energy_gain`), and with it the temperature.

    The state is a :class:`FilteredState`. ``starts (batch, time)`` marks first tokens of documents:
    a filter does not see across them; attention does. Raises as
    :class:`~darboux.learners.SoftmaxAttention`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        filters: Mapping[str, Filter],
        *,
        placement: str = "post_rope",
        rotary: bool = True,
        theta: float = 1e4,
        qk_norm: bool = False,
    ):
        super().__init__()
        where = type(self).__name__
        check_heads(where, width, heads, rotary)
        if placement not in PLACEMENTS:
            raise ValueError(f"{where}: placement is {placement!r}, expected one of {PLACEMENTS}")
        for part, filter in filters.items():
            size = tuple(filter.raw.shape[1:])
            if part not in (*PARTS,) or size not in ((heads, 1, 1), (heads, 1, width // heads)):
                raise ValueError(
                    f"{where}: a filter of {part!r} with raw {tuple(filter.raw.shape)}, expected "
                    f"one of q, k, v with (n, {heads}, 1, 1 or {width // heads})"
                )
        self.width, self.heads, self.placement = width, heads, placement
        self.rotary, self.theta = rotary, theta
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.filters = nn.ModuleDict(dict(filters))
        self.scale = nn.Parameter(torch.ones(heads, 1, 1)) if qk_norm else None

    def forward(
        self, x: Tensor, state: FilteredState | None = None, *, starts: Tensor | None = None
    ) -> tuple[Tensor, FilteredState]:
        """Return ``(batch, time, width)`` and the state after it."""
        q, k, v, *past = self.features(x, state, starts=starts)
        q, k = self.normalise(q, k)
        kept = None if state is None else KeyValue(state.keys, state.values)
        kept = remember(kept, k, v)
        return self.out(join_heads(attend(q, *kept))), FilteredState(*kept, *past)

    def normalise(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys of unit mean square, where ``qk_norm`` says so."""
        if self.scale is None:
            return q, k
        return self.scale * rms_norm(q, q.shape[-1:]), rms_norm(k, k.shape[-1:])

    def taps(self, part: str) -> tuple[Tensor, ...]:
        """Return the taps on ``part``, one of q, k, v, each ``(heads, 1, 1 or e)``."""
        if part in self.filters:
            return self.filters[part]()
        return (torch.ones_like(self.out.weight[: self.heads, :1, None]),)

    def features(
        self,
        x: Tensor,
        state: FilteredState | None = None,
        *,
        starts: Tensor | None = None,
        filtered: bool = True,
    ) -> tuple[Tensor, ...]:
        """Return q, k and v ``(batch, heads, time, e)``, rotated, and what the next token needs.

        Without the norm; ``filtered=False`` leaves the filters out too.
        """
        where = type(self).__name__
        base.check_input(where, x, self.width)
        base.check_dtype(where, x, self.out.weight)
        e, start = self.width // self.heads, 0
        past: list[Tensor | None] = [None] * 3
        if state is not None:
            sizes = [len(self.taps(part)) - 1 for part in PARTS]
            shapes = [(self.heads, None, e)] * 2 + [(self.heads, n, e) for n in sizes]
            base.check_state(where, state, FilteredState, *shapes, x=x)
            past[:], start = state[2:], state.keys.shape[2]
        if starts is not None:
            check_starts(where, starts, x)
            starts = starts[:, None, :, None]
        parts = [split_heads(z, self.heads) for z in self.qkv(x).chunk(3, -1)]
        angle = angles(start, x.shape[1], e, x, self.theta) if self.rotary else None
        kept = []
        for i, part in enumerate(PARTS):
            turn = None if part == "v" else angle
            if turn is not None and self.placement == "post_rope":
                parts[i] = rotate(parts[i], turn)
            if filtered and part in self.filters:
                parts[i], last = filter_tokens(parts[i], self.taps(part), past[i], starts)
            else:
                last = parts[i][..., :0, :]
            kept.append(last)
            if turn is not None and self.placement != "post_rope":
                parts[i] = rotate(parts[i], turn)
        return *parts, *kept


class MomentumAttention(FilteredAttention):
    r"""Causal softmax attention with the momentum shear on queries, keys and, if asked, values.

    ``gamma_q``, ``gamma_k``, ``gamma_v`` are numbers or one for each head; ``learned`` is a string
    of the parts whose numbers are learned from there on, per head, ``True`` meaning ``"qk"``. A
    part with fixed 0 is left alone. ``gamma_k=-1`` is exactly the key of the previous token.

    Keys only, by default: with one gamma for both the score of the token just before the query,
    :math:`-\gamma(1+\gamma)\,q_{t-1}\cdot k_j` at ``j = t - 1``, ties with that of the induction
    target, and no choice of :math:`W_Q^T W_K = \pm I` tells them apart. For the rest see
    :class:`FilteredAttention`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        gamma_q: float | Sequence[float] = 0.0,
        gamma_k: float | Sequence[float] = 1.0,
        gamma_v: float | Sequence[float] = 0.0,
        *,
        placement: str = "post_rope",
        learned: bool | str = False,
        rotary: bool = True,
        theta: float = 1e4,
        qk_norm: bool = False,
    ):
        where = "MomentumAttention"
        check_heads(where, width, heads, rotary)
        if isinstance(learned, bool):
            learned = "qk" if learned else ""
        if not isinstance(learned, str) or set(learned) - set(PARTS):
            raise ValueError(f"{where}: learned is {learned!r}, expected a bool or letters of qkv")
        filters = {}
        for part, gamma in zip(PARTS, (gamma_q, gamma_k, gamma_v), strict=True):
            raw = per_head(where, f"gamma_{part}", gamma, heads)
            if part in learned or raw.any():
                filters[part] = Filter("momentum", raw, learned=part in learned)
        super().__init__(
            width, heads, filters, placement=placement, rotary=rotary, theta=theta, qk_norm=qk_norm
        )


def scaling_law(layers: int) -> float:
    r"""Return :math:`\gamma^* = 4.17\,N^{-0.74}`, the text's best gamma for ``N`` layers.

    Maitra (2026), fitted to six depths with gamma on queries *and* keys (R^2 0.947), of which no
    code or data are public: a number to start from, not a law.
    """
    if layers < 1:
        raise ValueError(f"scaling_law: layers is {layers}, expected at least 1")
    return 4.17 * layers**-0.74


# -- relatives, as controls -----------------------------------------------------------------

_BEFORE: dict[str, Any] = {"placement": "pre_rope"}  # the rotation, where their sources put them


def key_value_shift(
    width: int, heads: int, *, generator: torch.Generator | None = None, **options: Any
) -> FilteredAttention:
    r"""Return KV-shifting attention: :math:`a k_t + b k_{t-1}`, :math:`c v_t + d v_{t-1}`, learned.

    Per head, from ``a, c`` uniform in (0, 1) and ``b = 1 - a``, ``d = 1 - c``, before the
    rotation: Xu et al. (ICML 2025). The first token has itself as predecessor (there: zero).
    ``options`` are those of :class:`FilteredAttention`.
    """
    check_heads("key_value_shift", width, heads, False)
    filters = {}
    for part in "kv":
        a = torch.rand(heads, 1, 1, generator=generator)
        filters[part] = Filter("free", torch.stack([a, 1 - a]))
    return FilteredAttention(width, heads, filters, **(_BEFORE | options))


def convolved_keys(
    width: int,
    heads: int,
    taps: int = 4,
    *,
    generator: torch.Generator | None = None,
    **options: Any,
) -> FilteredAttention:
    """Return attention with a learned short convolution of each number of the keys.

    Before the rotation, as in H3 and Mamba; it starts as the identity and a little noise.
    ``options`` are those of :class:`FilteredAttention`.
    """
    check_heads("convolved_keys", width, heads, False)
    if taps < 2:
        raise ValueError(f"convolved_keys: taps is {taps}, expected at least 2")
    raw = 0.1 * torch.randn(taps, heads, 1, width // heads, generator=generator)
    raw[0] += 1
    filters = {"k": Filter("free", raw)}
    return FilteredAttention(width, heads, filters, **(_BEFORE | options))


def smeared_keys(width: int, heads: int, **options: Any) -> FilteredAttention:
    r"""Return attention with smeared keys :math:`s k_t + (1-s) k_{t-1}`, ``0 < s < 1`` learned.

    A low-pass, from ``s = 1/2``, before the rotation: Olsson et al. (2022), argument 2. ``options``
    are those of :class:`FilteredAttention`.
    """
    check_heads("smeared_keys", width, heads, False)
    filters = {"k": Filter("smear", torch.zeros(1, heads, 1, 1))}
    return FilteredAttention(width, heads, filters, **(_BEFORE | options))


# -- the door -----------------------------------------------------------------------------------


def per_head(where: str, name: str, value: float | Sequence[float], heads: int) -> Tensor:
    """Return ``(1, heads, 1, 1)`` from one finite number or one for each head."""
    raw = torch.as_tensor(value, dtype=torch.get_default_dtype()).detach().clone()
    if raw.shape not in ((), (heads,)):
        raise ValueError(
            f"{where}: {name} has shape {tuple(raw.shape)}, expected a number or {heads}"
        )
    if not all(map(math.isfinite, raw.reshape(-1).tolist())):
        raise ValueError(f"{where}: {name} is {value}, expected finite numbers")
    return raw.expand(heads).clone().view(1, heads, 1, 1)


def check_starts(where: str, starts: object, x: Tensor) -> None:
    """Raise unless ``starts`` is boolean ``(batch, time)`` on the device of ``x``."""
    if not isinstance(starts, Tensor) or starts.dtype != torch.bool:
        seen = starts.dtype if isinstance(starts, Tensor) else type(starts).__name__
        raise TypeError(f"{where}: starts is {seen}, expected a boolean tensor")
    if starts.shape != x.shape[:2] or starts.device != x.device:
        raise ValueError(
            f"{where}: starts has shape {tuple(starts.shape)} on {starts.device}, expected "
            f"{tuple(x.shape[:2])} on {x.device}"
        )
