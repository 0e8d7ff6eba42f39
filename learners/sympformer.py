r"""Transformers whose tokens have a velocity: attention accelerates them (SympFormer and kin).

.. math:: \dot x = u, \qquad \dot u = -\alpha(t)\,u + F(x) - \Gamma(x, u)

``F`` is attention and :math:`\Gamma` the connection of the metric in which softmax attention is
a gradient, :mod:`darboux.flows.accelerated_attention`. The published first version takes the
gradient of a sum over tokens of masked energies as its force, and so moves early tokens by later
ones; that form is not offered. With a causal mask, several heads, or layer norms nothing here is
Hamiltonian, and its author finds no significant gain of the connection over plain momentum.

A block maps a :class:`~darboux.learners.schemes.Phase`, features and velocities, to the next;
:class:`SympFormer` stacks blocks behind the interface of every layer.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from darboux.learners import base
from darboux.learners.flow_block import FlowBlock
from darboux.learners.moving_attention import (
    CAUSALITIES,
    MovingAttention,
    check_causality,
    check_choice,
    feed_forward,
    layer_norm,
)
from darboux.learners.schemes import SCHEDULES, Damping, Phase

PREFIX_LIMIT = 128


class Past(NamedTuple):
    """All tokens so far, ``(batch, time, width)``: every prefix starts afresh."""

    tokens: Tensor


class SympState(NamedTuple):
    """The states of the blocks."""

    layers: tuple[Any, ...]


# -- momentum --------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """A row of :data:`KINDS`: where attention looks, and at which velocity it connects."""

    ahead: bool
    connection: str | None


KINDS = {
    "Y": Kind(True, None),  # YuriiFormer
    "H0": Kind(False, None),
    "H1": Kind(False, "incoming"),
    "R2": Kind(False, "proposal"),
}


class MomentumBlock(nn.Module):
    r"""Heavy-ball attention, then a heavy-ball feed-forward part looked at ahead.

    .. math:: v' = N(\beta_1v + \gamma_1F(x + \mu_1v)), \quad x' = x + v', \qquad
              v'' = N(\beta_2v' + \gamma_2M(x' + \mu_2v')), \quad x'' = x' + v''

    ``F`` and ``M`` begin with norms of their own; the ``N`` of velocities is one for both. It
    starts with velocities of length one, as the rows of an embedding have here; the published
    models start :math:`\sqrt{width}` times as fast, which drowns the tokens and learns later.
    ``kind="Y"`` is this; ``"H0"`` has :math:`\mu_1 = 0`; ``"H1"`` subtracts the connection at
    ``v``; ``"R2"`` takes it at the proposal :math:`w = \beta_1v + \gamma_1F`, with velocity
    :math:`N(w - \Gamma)` and position :math:`x + N(w - \Gamma/2)`. All :math:`\mu, \beta` start at
    0.9, the gains at 1. With ``damping`` the :math:`\beta` are :math:`e^{-\int\alpha}`, a half
    block being one unit of time. ``hidden=0`` leaves the second half out.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kind: str = "H0",
        *,
        causality: str = "row_local",
        damping: Damping | None = None,
        rotary: bool = True,
        theta: float = 1e4,
        hidden: int | None = None,
    ):
        super().__init__()
        check_choice("MomentumBlock", "kind", kind, tuple(KINDS))
        check_causality("MomentumBlock", causality, KINDS[kind].connection is not None)
        self.width, self.kind, self.causality, self.damping = width, kind, causality, damping
        self.attention = MovingAttention(
            width, heads, causality=causality, rotary=rotary, theta=theta
        )
        self.norm, self.velocity_norm = layer_norm(width), layer_norm(width)
        nn.init.constant_(self.velocity_norm.weight, width**-0.5)
        self.mlp = feed_forward(width, hidden)
        halves = 1 if self.mlp is None else 2
        first = 0 if KINDS[kind].ahead else 1
        if halves > first:
            self.raw_ahead = nn.Parameter(torch.full((halves - first,), math.log(9.0)))
        if damping is None:
            self.raw_keep = nn.Parameter(torch.full((halves,), math.log(9.0)))
        self.raw_gain = nn.Parameter(torch.full((halves,), math.log(math.expm1(1.0))))

    def forward(self, phase: Phase, state: Any = None) -> tuple[Phase, Any]:
        """Return the phase after both halves, and the state of attention."""
        x, v, t = phase.x, phase.u, phase.t
        kind = KINDS[self.kind]
        gain = functional.softplus(self.raw_gain)
        if self.damping is None:
            keep = torch.sigmoid(self.raw_keep)
        else:
            later = self.damping.integral(t + 1, 1.0)
            keep = torch.stack([self.damping.integral(t, 1.0), later]).neg().exp().to(x.dtype)
        if kind.connection is None:
            z = self.norm(x + torch.sigmoid(self.raw_ahead[0]) * v if kind.ahead else x)
            force, _, state = self.attention(z, state)
            v = self.velocity_norm(keep[0] * v + gain[0] * force)
            x = x + v
        else:
            proposal: Callable[[Tensor], Tensor] = lambda f: keep[0] * v + gain[0] * f  # noqa: E731
            late = kind.connection == "proposal"
            given = proposal if late else lambda f: phase.u
            force, bend, state = self.attention(self.norm(x), state, given)
            w = proposal(force)
            v = self.velocity_norm(w - bend)
            x = x + (self.velocity_norm(w - bend / 2) if late else v)
        if self.mlp is not None:
            force = self.mlp(x + torch.sigmoid(self.raw_ahead[-1]) * v)
            v = self.velocity_norm(keep[1] * v + gain[1] * force)
            x = x + v
        return Phase(x, v, t + (1 if self.mlp is None else 2)), state

    def check(self, where: str, state: Any, x: Tensor) -> None:
        """Raise unless ``state`` is one of this block."""
        self.attention.check(where, state, x, KINDS[self.kind].connection is not None)


# -- the stack -------------------------------------------------------------------------------------


class SympFormer(nn.Module):
    r"""A stack of blocks that hand on features and velocities; a layer like any other.

    ``kind`` is one of ``KINDS`` (:class:`MomentumBlock`), or ``"softmax"``, ``"plain"`` (without
    connection) or ``"linear"`` (:class:`FlowBlock`, with ``scheme``, ``dt`` and ``alpha``).
    ``schedule`` is the damping: one of ``SCHEDULES`` from time ``t0 > 0``, shared by the blocks,
    or ``"free"``, for ``KINDS`` only and their default: each half block learns its own.

    ``initial_velocity="zero"``, or ``"learned"``: a linear map of the normed input. The published
    models learn a separate table of token and position embeddings instead; on a model's first
    layer this is that table restricted to linear images of the features, with ``width**2``
    parameters rather than ``(vocabulary + positions) * width``, and no table at all to leak.

    ``causality``:

    - ``"row_local"``: every average is masked. Causal and cheap; no Hamiltonian.
    - ``"row_hamiltonian"``: each token moves in its own Hamiltonian among the tokens before it,
      held fixed. For kinds with a connection.
    - ``"prefix"``: position t is the last token of a bidirectional stack run on the first t, the
      exact theory for each prefix. T times the cost, so at most ``PREFIX_LIMIT`` tokens; the state
      is the tokens themselves, and every call computes all prefixes that it returns.
    - ``"bidirectional"``: no mask; takes no state and returns ``None``.

    >>> y, state = SympFormer(16, 2, 3, "R2")(torch.randn(4, 10, 16))
    """

    def __init__(
        self,
        width: int,
        heads: int,
        layers: int,
        kind: str = "H0",
        *,
        causality: str = "row_local",
        schedule: str | None = None,
        scheme: str = "strang",
        initial_velocity: str = "zero",
        dt: float = 0.3,
        alpha: float = 1.0,
        t0: float = 1.0,
        rotary: bool = True,
        theta: float = 1e4,
        hidden: int | None = None,
    ):
        super().__init__()
        where = "SympFormer"
        flows = {"softmax": ("softmax", True), "plain": ("softmax", False), "linear": ("linear", 0)}
        check_choice(where, "kind", kind, (*KINDS, *flows))
        check_choice(where, "causality", causality, CAUSALITIES)
        check_choice(where, "initial_velocity", initial_velocity, ("zero", "learned"))
        schedule = ("free" if kind in KINDS else "nesterov") if schedule is None else schedule
        allowed = ("free", *SCHEDULES) if kind in KINDS else SCHEDULES
        check_choice(where, "schedule", schedule, allowed)
        if layers < 1 or not 0 < t0 < math.inf:
            raise ValueError(f"{where}: layers {layers} and t0 {t0}, expected both to be positive")
        self.width, self.kind, self.causality, self.t0 = width, kind, causality, t0
        self.damping = None if schedule == "free" else Damping(schedule, alpha)
        inner = "bidirectional" if causality == "prefix" else causality
        options: dict[str, Any] = {"causality": inner, "rotary": rotary, "theta": theta}
        options |= {"hidden": hidden, "damping": self.damping}
        if kind in flows:
            form, connection = flows[kind]
            options |= {"scheme": scheme, "dt": dt, "connection": bool(connection)}
            self.layers = nn.ModuleList(
                FlowBlock(width, heads, form, **options) for _ in range(layers)
            )
        else:
            self.layers = nn.ModuleList(
                MomentumBlock(width, heads, kind, **options) for _ in range(layers)
            )
        self.start = None
        if initial_velocity == "learned":
            self.start = nn.Sequential(layer_norm(width), nn.Linear(width, width, bias=False))

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Return ``(batch, time, width)`` and the state after it."""
        where = "SympFormer"
        base.check_input(where, x, self.width)
        base.check_dtype(where, x, next(self.layers.parameters()))
        if self.causality == "bidirectional":
            if state is not None:
                raise ValueError(f"{where}: got a state, expected None: 'bidirectional' sees all")
            return self._run(x, None)[0], None
        if self.causality == "prefix":
            return self._prefixes(x, state)
        if state is not None:
            if not isinstance(state, SympState) or len(state.layers) != len(self.layers):
                raise TypeError(
                    f"{where}: state is a {type(state).__name__}, expected a SympState of "
                    f"{len(self.layers)} layers as this stack returns it, or None"
                )
            blocks: Any = self.layers
            for block, part in zip(blocks, state.layers, strict=True):
                block.check(where, part, x)
        return self._run(x, state)

    def _run(self, x: Tensor, state: SympState | None) -> tuple[Tensor, SympState]:
        u = torch.zeros_like(x) if self.start is None else self.start(x)
        phase = Phase(x, u, torch.full((), self.t0, dtype=x.dtype, device=x.device))
        after = []
        for i, block in enumerate(self.layers):
            phase, part = block(phase, None if state is None else state.layers[i])
            after.append(part)
        return phase.x, SympState(tuple(after))

    def _prefixes(self, x: Tensor, state: Any) -> tuple[Tensor, Past]:
        if state is not None:
            base.check_state("SympFormer", state, Past, (None, self.width), x=x)
            x = torch.cat([state.tokens, x], 1)
        if x.shape[1] > PREFIX_LIMIT:
            raise ValueError(
                f"SympFormer: {x.shape[1]} tokens, expected at most {PREFIX_LIMIT} with "
                "causality='prefix', which costs as many times that of a pass"
            )
        first = 0 if state is None else state.tokens.shape[1]
        last = [self._run(x[:, : t + 1], None)[0][:, -1] for t in range(first, x.shape[1])]
        return torch.stack(last, 1), Past(x)
