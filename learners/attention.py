r"""Softmax attention with rotary positions: the baseline, and the parts other attention shares.

.. math:: y_t = \sum_{j \le t}\mathrm{softmax}_j(q_t \cdot k_j/\sqrt e)\,v_j
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from darboux.learners import base


class KeyValue(NamedTuple):
    """What attention remembers: ``keys`` and ``values (batch, heads, time, e)`` of all tokens."""

    keys: Tensor
    values: Tensor


def angles(start: int, time: int, width: int, like: Tensor, theta: float = 1e4) -> Tensor:
    r"""Return the rotary angles :math:`t\,\theta^{-2i/e}`, ``(time, e/2)``, from ``start`` on.

    Su et al. (2021). Computed in float64: at a million tokens float32 is off by a twentieth of a
    radian.
    """
    t = torch.arange(start, start + time, dtype=torch.float64, device=like.device)
    rates = theta ** -(torch.arange(0, width, 2, dtype=torch.float64, device=like.device) / width)
    return t.unsqueeze(-1) * rates


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate the planes ``(i, i + e/2)`` of ``x (..., time, e)`` by ``angle (time, e/2)``."""
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Return ``(batch, heads, time, width/heads)`` from ``(batch, time, width)``."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """Undo :func:`split_heads`."""
    return x.transpose(1, 2).flatten(2)


def remember(state: KeyValue | None, k: Tensor, v: Tensor) -> KeyValue:
    """Append keys and values to those of the ``state``."""
    if state is None:
        return KeyValue(k, v)
    return KeyValue(torch.cat([state.keys, k], 2), torch.cat([state.values, v], 2))


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True) -> Tensor:
    """Return softmax attention of the last tokens ``q (batch, heads, n, e)`` to all ``m >= n``.

    Query ``i`` sees the keys up to ``m - n + i``. The matrix of scores is never formed; past the
    first chunk a boolean mask ``(n, m)`` is.
    """
    n, m = q.shape[-2], k.shape[-2]
    if not causal or n == 1:
        return scaled_dot_product_attention(q, k, v)
    if n == m:
        return scaled_dot_product_attention(q, k, v, is_causal=True)
    seen = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
    return scaled_dot_product_attention(q, k, v, seen)


class SoftmaxAttention(nn.Module):
    """Causal multi-head softmax attention; ``rotary=False`` leaves positions out (NoPE).

    The state is a :class:`KeyValue`, which grows by one row a token. Raises ``ValueError`` where
    ``width`` is not a multiple of ``heads`` or, with ``rotary``, a head is odd.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        rotary: bool = True,
        theta: float = 1e4,
        causal: bool = True,
        bias: bool = False,
    ):
        super().__init__()
        check_heads("SoftmaxAttention", width, heads, rotary)
        self.width, self.heads, self.rotary, self.theta = width, heads, rotary, theta
        self.causal = causal
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor, state: KeyValue | None = None) -> tuple[Tensor, KeyValue]:
        """Return ``(batch, time, width)`` and the state after it."""
        where = "SoftmaxAttention"
        base.check_input(where, x, self.width)
        base.check_dtype(where, x, self.out.weight)
        e = self.width // self.heads
        if state is not None and not self.causal:
            raise ValueError(f"{where}: got a state, expected None: causal=False sees all at once")
        if state is not None:
            base.check_state(where, state, KeyValue, *[(self.heads, None, e)] * 2, x=x)
        q, k, v = map(functools.partial(split_heads, heads=self.heads), self.qkv(x).chunk(3, -1))
        if self.rotary:
            start = 0 if state is None else state.keys.shape[2]
            angle = angles(start, x.shape[1], e, x, self.theta)
            q, k = rotate(q, angle), rotate(k, angle)
        state = remember(state, k, v)
        y = attend(q, state.keys, state.values, causal=self.causal)
        return self.out(join_heads(y)), state


def check_heads(where: str, width: int, heads: int, rotary: bool) -> None:
    """Raise unless ``width`` is a multiple of ``heads``, even with ``rotary``."""
    if heads < 1 or width < 1 or width % heads:
        raise ValueError(
            f"{where}: width {width} and heads {heads}, expected the first to be a positive "
            "multiple of the second"
        )
    if rotary and width // heads % 2:
        raise ValueError(
            f"{where}: heads of {width // heads} numbers cannot be rotated, expected an even size"
        )
