r"""A layer that is one step of the differential equation of tokens with momentum.

Softmax attention in the velocity form, or linear attention in the bilinear Stein form, of
:mod:`darboux.flows.accelerated_attention`, by a row of
:data:`~darboux.learners.schemes.SCHEMES`.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from darboux.flows.kernel_sums import causal_linear_sum
from darboux.learners import base
from darboux.learners.attention import check_heads, join_heads, split_heads
from darboux.learners.moving_attention import (
    MovingAttention,
    check_causality,
    check_choice,
    feed_forward,
    layer_norm,
)
from darboux.learners.schemes import SCHEMES, Damping, Phase, step


class LinearState(NamedTuple):
    """The sums ``(batch, calls, heads, e, e)`` of a linear block, and of how many tokens."""

    sums: Tensor
    tokens: Tensor  # (batch, 1)


class FlowBlock(nn.Module):
    r"""One step of the differential equation by a row of ``SCHEMES``, then a feed-forward part.

    ``form="softmax"`` is :math:`\dot u = -\alpha u + F(x) - \Gamma(x, u)`, plain acceleration with
    ``connection=False``. ``form="linear"`` is the bilinear Stein form, in time linear in the
    number of tokens and with a state of constant size,

    .. math:: \dot x_i = \frac1i\sum_{j \le i}\sum_h\frac{W_hx_i \cdot W_hx_j}e\,V_h^TV_hu_j, \quad
              \dot u_i = -\alpha u_i + (M + M^T)x_i - \frac1i\sum_{j \le i}\sum_h
              \frac{V_hu_i \cdot V_hu_j}e\,W_h^TW_hx_j:

    all matrices are products with transposes, as a kernel must be positive and a Hamiltonian
    symmetric, so that without a mask and norms this is the Hamiltonian system of ``energy``. It
    has no positions but those that the mask gives.
    Forces are taken at the layer norm of ``x``; ``norm=False`` leaves it out. The step, from
    ``dt``, is learned. The last force of the rows that drift by the old velocity, ``"euler"`` and
    ``"ab2"``, changes only velocities: in the last block of a stack it is lost.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        form: str = "softmax",
        *,
        damping: Damping,
        scheme: str = "strang",
        dt: float = 0.3,
        causality: str = "row_local",
        connection: bool = True,
        norm: bool = True,
        rotary: bool = True,
        theta: float = 1e4,
        hidden: int | None = None,
    ):
        super().__init__()
        where = "FlowBlock"
        check_choice(where, "form", form, ("softmax", "linear"))
        check_choice(where, "scheme", scheme, tuple(SCHEMES))
        check_causality(where, causality, form == "softmax" and connection)
        if not 0 < dt < math.inf:
            raise ValueError(f"{where}: dt is {dt}, expected a positive number")
        check_heads(where, width, heads, rotary and form == "softmax")
        self.width, self.heads, self.form, self.scheme = width, heads, form, scheme
        self.causality, self.connection, self.damping = causality, connection, damping
        self.norm = layer_norm(width) if norm else nn.Identity()
        if form == "softmax":
            self.attention = MovingAttention(
                width, heads, causality=causality, rotary=rotary, theta=theta
            )
        else:
            self.kernel = nn.Linear(width, width, bias=False)  # W
            self.mass = nn.Linear(width, width, bias=False)  # V
            self.potential = nn.Linear(width, width, bias=False)  # M
        self.mlp = feed_forward(width, hidden)
        self.raw_dt = nn.Parameter(torch.tensor(math.log(math.expm1(dt))))

    def forward(self, phase: Phase, state: Any = None) -> tuple[Phase, Any]:
        """Return the phase after one step, and the state."""
        dt = functional.softplus(self.raw_dt)
        row = SCHEMES[self.scheme]
        if self.form == "softmax":
            after: list[Any] = []

            def force(x: Tensor, u: Tensor) -> Tensor:
                along = (lambda _: u) if self.connection else None
                push, bend, seen = self.attention(self.norm(x), state, along)
                after.append(seen)
                return push if bend is None else push - bend

            phase = step(row, phase, force, self.damping, dt)
            new = after[0]
        else:
            sums = _Sums(self, phase.x, state)
            phase = step(row, phase, sums.force, self.damping, dt, sums.velocity)
            new = sums.state()
        if self.mlp is not None:
            phase = phase._replace(x=phase.x + self.mlp(phase.x))
        return phase, new

    def energy(self, x: Tensor, u: Tensor) -> Tensor:
        """Return what the linear form conserves without mask, norm and damping, ``(batch,)``."""
        if self.form != "linear":
            raise ValueError("FlowBlock.energy: form is 'softmax', expected 'linear'")
        q, p = (split_heads(f(z), self.heads) for f, z in ((self.kernel, x), (self.mass, u)))
        kinetic = (q.mT @ p).square().sum((-1, -2, -3)) / (q.shape[-1] * q.shape[-2])
        return kinetic / 2 - (x * self.potential(x)).sum((-1, -2))

    def calls(self) -> int:
        """Return how many sums over tokens a step of the linear form takes."""
        row = SCHEMES[self.scheme]
        ends = (*row.drift, 0.0)
        return 1 + (row.before != 0) + (ends[0] != 0) + (ends[1] != 0)

    def check(self, where: str, state: Any, x: Tensor) -> None:
        """Raise unless ``state`` is one of this block."""
        if self.form == "softmax":
            self.attention.check(where, state, x, self.connection)
        else:
            e = self.width // self.heads
            shapes = ((self.calls(), self.heads, e, e), (1,))
            base.check_state(where, state, LinearState, *shapes, x=x)


class _Sums:
    """The sums over tokens of a linear block, in the order in which a step asks for them."""

    def __init__(self, block: FlowBlock, x: Tensor, state: LinearState | None):
        self.block, self.new = block, []
        batch, time, width = x.shape
        e = width // block.heads
        if state is None:
            sums = x.new_zeros(batch, block.calls(), block.heads, e, e)
            state = LinearState(sums, x.new_zeros(batch, 1))
        self.old, self.tokens = state.sums.unbind(1), state.tokens + time
        place = torch.arange(1, time + 1, dtype=x.dtype, device=x.device)
        self.among = (state.tokens + place)[:, None, :, None]

    def _heads(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        b = self.block
        scale = (b.width // b.heads) ** -0.5
        return split_heads(b.kernel(b.norm(x)), b.heads), split_heads(scale * b.mass(u), b.heads)

    def _attend(self, q: Tensor, v: Tensor, transposed: bool) -> Tensor:
        # sums of (q_i . q_j) v_j; the matrix kept is that of kernel x mass
        if self.block.causality == "bidirectional":
            return q @ (q.mT @ v) / q.shape[-2]
        old = self.old[len(self.new)]
        out, end = causal_linear_sum(q, q, v, old.mT if transposed else old)
        self.new.append(end.mT if transposed else end)
        return out / self.among

    def velocity(self, x: Tensor, u: Tensor) -> Tensor:
        q, p = self._heads(x, u)
        scale = (self.block.width // self.block.heads) ** -0.5
        return scale * join_heads(self._attend(q, p, False)) @ self.block.mass.weight

    def force(self, x: Tensor, u: Tensor) -> Tensor:
        b = self.block
        q, p = self._heads(x, u)
        z, M = b.norm(x), b.potential.weight
        bend = join_heads(self._attend(p, q, True)) @ b.kernel.weight
        return z @ (M + M.mT) - bend

    def state(self) -> LinearState | None:
        if not self.new:
            return None
        return LinearState(torch.stack(self.new, 1), self.tokens)
