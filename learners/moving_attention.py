r"""Softmax attention of tokens in motion, and the connection of the metric it is a gradient in.

The layer of :func:`darboux.flows.accelerated_attention.connection`: several heads, positions, a
causal mask, a cache.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

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

CAUSALITIES = ("row_local", "row_hamiltonian", "prefix", "bidirectional")


class MovingKeyValue(NamedTuple):
    """What a connection remembers of all tokens: ``(batch, heads or 1, time, e or 1)`` each."""

    keys: Tensor
    values: Tensor
    moving: Tensor  # the keys of the velocities
    speeds: Tensor  # |u|^2


class MovingAttention(nn.Module):
    r"""Softmax attention ``F`` and, where asked, the connection along a velocity ``u``.

    With the scores :math:`x_i \cdot A_hx_j` of head ``h``, the metric of :math:`B = 1`, drifts
    averaged over heads and values summed, as in the author's study of 2026,

    .. math:: \Gamma_i = a_iu_i - \tfrac12\Bigl(|u_i|^2F_i + \sum_jP_{ij}|u_j|^2Vx_j\Bigr), \qquad
              a_i = \sum_jP_{ij}\,(u_i \cdot Ax_j + x_i \cdot Au_j).

    ``causality="row_hamiltonian"`` holds what a row looks at fixed, so that :math:`\Gamma_i =
    (\sum_jP_{ij}\,u_i \cdot Ax_j)\,u_i - \frac12|u_i|^2F_i`. Everything is an average of values by
    one softmax: twice the width of a head at a time, which the fused kernels like better than four
    times at once.
    """

    def __init__(
        self, width: int, heads: int, *, causality: str, rotary: bool = True, theta: float = 1e4
    ):
        super().__init__()
        check_heads("MovingAttention", width, heads, rotary)
        check_choice("MovingAttention", "causality", causality, CAUSALITIES)
        self.width, self.heads, self.rotary, self.theta = width, heads, rotary, theta
        self.causality = causality
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(
        self, z: Tensor, state: Any = None, velocity: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None, Any]:
        """Return ``F``, the connection and the state; ``velocity`` gives ``u``, which may use F."""
        q, k, v = self._heads(self.qkv(z), 3)
        angle = None
        if self.rotary:
            start = 0 if state is None else state.keys.shape[2]
            angle = angles(start, z.shape[1], self.width // self.heads, z, self.theta)
            q, k = rotate(q, angle), rotate(k, angle)
        seen = remember(None if state is None else KeyValue(*state[:2]), k, v)
        causal, e = self.causality != "bidirectional", q.shape[-1]
        if velocity is None:
            y = attend(q, seen.keys, seen.values, causal=causal)
            return self.out(join_heads(y)), None, seen
        # the fused kernels want queries as wide as values, and scale by that width
        wide_q = functional.pad(q * math.sqrt(2), (0, e))
        wide_k = functional.pad(seen.keys, (0, e))
        both = attend(wide_q, wide_k, torch.cat([seen.values, seen.keys], -1), causal=causal)
        values, mean = both.chunk(2, -1)
        force = self.out(join_heads(values))
        u = velocity(force)
        dq, dk = self._heads(functional.linear(u, self.qkv.weight[: 2 * self.width]), 2)
        if angle is not None:
            dq, dk = rotate(dq, angle), rotate(dk, angle)
        speed = u.square().sum(-1, keepdim=True)
        drift = dq * mean
        bend = speed * force
        if self.causality != "row_hamiltonian":
            moving, speeds = dk, speed.unsqueeze(1)
            if state is not None:
                moving = torch.cat([state.moving, moving], 2)
                speeds = torch.cat([state.speeds, speeds], 2)
            wide = torch.cat([speeds * seen.values, moving], -1)
            weighted, moved = attend(wide_q, wide_k, wide, causal=causal).chunk(2, -1)
            drift = torch.addcmul(drift, q, moved)
            bend = bend + self.out(join_heads(weighted))
            seen = MovingKeyValue(*seen, moving, speeds)
        rate = drift.sum((1, 3)).unsqueeze(-1) / (self.heads * math.sqrt(e))
        return force, rate * u - bend / 2, seen

    def _heads(self, x: Tensor, parts: int) -> list[Tensor]:
        return [split_heads(part, self.heads) for part in x.chunk(parts, -1)]

    def check(self, where: str, state: Any, x: Tensor, moving: bool) -> None:
        """Raise unless ``state`` is one of this layer."""
        row = (self.heads, None, self.width // self.heads)
        if moving and self.causality != "row_hamiltonian":
            shapes = (row, row, row, (1, None, 1))
            base.check_state(where, state, MovingKeyValue, *shapes, x=x)
        else:
            base.check_state(where, state, KeyValue, row, row, x=x)


def check_choice(where: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{where}: unknown {name} {value!r}, expected one of {choices}")


def check_causality(where: str, causality: str, connected: bool) -> None:
    check_choice(where, "causality", causality, CAUSALITIES)
    if causality == "row_hamiltonian" and not connected:
        raise ValueError(
            f"{where}: causality is 'row_hamiltonian', which is a form of the connection, and "
            "this block has none"
        )


def layer_norm(width: int) -> nn.LayerNorm:
    """Return a layer norm without bias."""
    return nn.LayerNorm(width, bias=False)


def feed_forward(width: int, hidden: int | None) -> nn.Sequential | None:
    """Return a normed MLP without biases, four times as wide inside by default; none for 0."""
    hidden = 4 * width if hidden is None else hidden
    if hidden < 0:
        raise ValueError(f"feed_forward: hidden is {hidden}, expected at least 0")
    if not hidden:
        return None
    up, down = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)
    return nn.Sequential(layer_norm(width), up, nn.GELU(), down)
