"""Baselines behind the interface of the layers: what any new layer has to beat.

Softmax attention is in ``attention``.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import elu, logsigmoid

from darboux.flows.kernel_sums import causal_linear_sum
from darboux.learners import base
from darboux.learners.attention import check_heads, join_heads, split_heads
from darboux.learners.recurrence import affine_scan


class Hidden(NamedTuple):
    """What a GRU remembers: ``hidden (batch, hidden)``."""

    hidden: Tensor


class HiddenCell(NamedTuple):
    """What an LSTM remembers: ``hidden`` and ``cell``, each ``(batch, hidden)``."""

    hidden: Tensor
    cell: Tensor


class GRU(nn.Module):
    """``nn.GRU`` with one layer; read through a linear map where ``hidden`` is not ``width``."""

    def __init__(self, width: int, hidden: int | None = None):
        super().__init__()
        _check_sizes("GRU", width, width if hidden is None else hidden)
        self.width, self.hidden = width, width if hidden is None else hidden
        self.cell = nn.GRU(width, self.hidden, batch_first=True)
        self.out = nn.Identity() if self.hidden == width else nn.Linear(self.hidden, width)

    def forward(self, x: Tensor, state: Hidden | None = None) -> tuple[Tensor, Hidden]:
        """Return ``(batch, time, width)`` and the state after it."""
        _check("GRU", x, self.width, self.cell.all_weights[0][0], state, Hidden, (self.hidden,))
        y, h = self.cell(x, None if state is None else state.hidden.unsqueeze(0).contiguous())
        return self.out(y), Hidden(h[0])


class LSTM(nn.Module):
    """``nn.LSTM`` with one layer; read through a linear map where ``hidden`` is not ``width``."""

    def __init__(self, width: int, hidden: int | None = None):
        super().__init__()
        _check_sizes("LSTM", width, width if hidden is None else hidden)
        self.width, self.hidden = width, width if hidden is None else hidden
        self.cell = nn.LSTM(width, self.hidden, batch_first=True)
        self.out = nn.Identity() if self.hidden == width else nn.Linear(self.hidden, width)

    def forward(self, x: Tensor, state: HiddenCell | None = None) -> tuple[Tensor, HiddenCell]:
        """Return ``(batch, time, width)`` and the state after it."""
        weight, shape = self.cell.all_weights[0][0], (self.hidden,)
        _check("LSTM", x, self.width, weight, state, HiddenCell, shape, shape)
        before = None
        if state is not None:
            before = tuple(part.unsqueeze(0).contiguous() for part in state)
        y, (h, c) = self.cell(x, before)
        return self.out(y), HiddenCell(h[0], c[0])


class Moments(NamedTuple):
    """What linear attention remembers: ``values (b, heads, e, e)``, ``weights (b, heads, e)``."""

    values: Tensor
    weights: Tensor


class LinearAttention(nn.Module):
    r"""Attention with a kernel of features, so that the past is a sum (Katharopoulos et al., 2020).

    .. math:: y_t = \frac{S_t^T\varphi(q_t)}{z_t\cdot\varphi(q_t)}, \quad
        S_t = \sum_{s\le t}\varphi(k_s)v_s^T, \quad z_t = \sum_{s\le t}\varphi(k_s), \quad
        \varphi = \mathrm{elu} + 1

    Computed in chunks: quadratic inside each, through :math:`S` between them.
    """

    def __init__(self, width: int, heads: int, *, chunk: int = 64, bias: bool = False):
        super().__init__()
        check_heads("LinearAttention", width, heads, rotary=False)
        _check_sizes("LinearAttention", chunk)
        self.width, self.heads, self.chunk = width, heads, chunk
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor, state: Moments | None = None) -> tuple[Tensor, Moments]:
        """Return ``(batch, time, width)`` and the state after it."""
        e = self.width // self.heads
        shapes = (self.heads, e, e), (self.heads, e)
        _check("LinearAttention", x, self.width, self.out.weight, state, Moments, *shapes)
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, -1))
        q, k = elu(q) + 1, elu(k) + 1
        y, state = _kernel_attention(q, k, v, state, self.chunk)
        return self.out(join_heads(y)), state


def _kernel_attention(
    q: Tensor, k: Tensor, v: Tensor, state: Moments | None, chunk: int
) -> tuple[Tensor, Moments]:
    """Return the attention of positive features ``q, k (b, h, time, e)`` and the new moments."""
    one = v.new_ones(())
    v = torch.cat([v, one.expand(*v.shape[:-1], 1)], -1)  # the last column sums the weights
    start = None
    if state is not None:
        start = torch.cat([state.values, state.weights.unsqueeze(-1)], -1)
    total, end = causal_linear_sum(q, k, v, start, chunk)
    # features underflow to zero where all keys are far below zero
    y = total[..., :-1] / total[..., -1:].clamp_min(torch.finfo(total.dtype).tiny ** 0.5)
    return y, Moments(end[..., :-1], end[..., -1])


class Diagonal(NamedTuple):
    """What a diagonal recurrence remembers: ``numbers (batch, size)``."""

    numbers: Tensor


class DiagonalRecurrence(nn.Module):
    r"""A linear recurrence with diagonal eigenvalues that the tokens choose.

    .. math:: h_t = a_t h_{t-1} + \sqrt{1 - a_t^2}\,W x_t, \qquad a_t = \tanh(U x_t)

    Negative eigenvalues are what counting needs: ``negative=False`` takes the logistic function
    instead of tanh, with eigenvalues in [0, 1], and cannot learn parity at finite precision
    (Grazzi et al., 2024, arXiv 2411.12537). The start :math:`h_0` is learned. Computed by an
    associative scan; the state has ``size`` numbers, ``width`` unless given.
    """

    def __init__(self, width: int, size: int | None = None, *, negative: bool = True):
        super().__init__()
        size = width if size is None else size
        _check_sizes("DiagonalRecurrence", width, size)
        self.width, self.size, self.negative = width, size, negative
        self.rates, self.values = nn.Linear(width, size), nn.Linear(width, size)
        self.start = nn.Parameter(torch.ones(size))
        self.out = nn.Linear(size, width)

    def forward(self, x: Tensor, state: Diagonal | None = None) -> tuple[Tensor, Diagonal]:
        """Return ``(batch, time, width)`` and the state after it."""
        where = "DiagonalRecurrence"
        _check(where, x, self.width, self.out.weight, state, Diagonal, (self.size,))
        z = self.rates(x)
        if self.negative:  # the root is sech(z), smooth where tanh is one
            a, scale = z.tanh(), 2 * torch.exp(-torch.logaddexp(z, -z))
        else:
            a = z.sigmoid()
            scale = torch.exp(0.5 * logsigmoid(-z)) * torch.sqrt(1 + a)
        start = self.start.expand(len(x), -1) if state is None else state.numbers
        h = affine_scan(
            a[..., None, None], (scale * self.values(x)).unsqueeze(-1), start.unsqueeze(-1)
        )
        h = h.squeeze(-1)
        return self.out(h), Diagonal(h[:, -1])


class Turns(NamedTuple):
    """What a phase accumulator remembers: ``turns (batch, circles)`` in [0, 1)."""

    turns: Tensor


class CumulativePhase(nn.Module):
    r"""Sum an angle and read its cosine and sine: the trivial solution of parity.

    .. math:: \theta_t = \theta_{t-1} + U x_t, \qquad y_t = W[\cos 2\pi\theta_t, \sin 2\pi\theta_t]

    A control: where it does as well as a layer, the task says nothing about that layer's geometry.
    Angles are summed in float64 and kept in turns modulo one.
    """

    def __init__(self, width: int, circles: int | None = None):
        super().__init__()
        circles = width if circles is None else circles
        _check_sizes("CumulativePhase", width, circles)
        self.width, self.circles = width, circles
        self.turn = nn.Linear(width, circles, bias=False)
        self.out = nn.Linear(2 * circles, width)

    def forward(self, x: Tensor, state: Turns | None = None) -> tuple[Tensor, Turns]:
        """Return ``(batch, time, width)`` and the state after it."""
        _check("CumulativePhase", x, self.width, self.out.weight, state, Turns, (self.circles,))
        turn = self.turn(x)
        turns = turn.cumsum(1, dtype=torch.float64)
        if state is not None:
            turns = turns + state.turns.unsqueeze(1)
        turns = (turns % 1).to(turn.dtype)
        angle = 2 * torch.pi * turns
        return self.out(torch.cat([angle.cos(), angle.sin()], -1)), Turns(turns[:, -1])


def _check_sizes(where: str, *sizes: int) -> None:
    if min(sizes) < 1:
        raise ValueError(f"{where}: sizes {sizes}, expected positive numbers")


def _check(
    where: str,
    x: Tensor,
    width: int,
    parameter: Tensor,
    state: Any,
    kind: type,
    *shapes: tuple[int, ...],
) -> None:
    """Check a token stream and the state, if there is one."""
    base.check_input(where, x, width)
    base.check_dtype(where, x, parameter)
    if state is not None:
        base.check_state(where, state, kind, *shapes, x=x)
