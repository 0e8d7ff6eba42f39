"""Gradients through long runs at the memory of a few states: most are computed twice.

``torch.utils.checkpoint`` will not do: a force that is the derivative of a potential differentiates
within the piece, which makes it repeat the piece there, again and again.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from darboux._checks import ConvergenceError
from darboux.integrators.march import Bar, Run
from darboux.integrators.reversible import captured, gradient_by_tape, still


def march_by_pieces(
    run: Run, stops: Sequence[int], qs: list[Tensor], ps: list[Tensor], bar: Bar | None
) -> None:
    r"""Do what :meth:`Run.march` does, keeping the graph of one piece of the run at a time.

    Of ``n`` steps only the states between pieces of about :math:`\sqrt n` are kept, besides the
    saved ones; the backward pass repeats each piece with a graph. What a method remembers is
    part of these states, and is differentiated. Griewank, Optim. Methods Softw. 1 (1992) 35.
    """
    lists = [qs[-1].detach()], [ps[-1].detach()]
    parameters, _ = captured(run, qs[-1], ps[-1])
    dt = run.dt if isinstance(run.dt, Tensor) else None
    try:
        more: Any = _Pieces.apply(run, stops, lists, bar, qs[-1], ps[-1], dt, *parameters)
    except ConvergenceError:
        qs += lists[0][1:]
        ps += lists[1][1:]
        raise
    qs += more[0].unbind()
    ps += more[1].unbind()


class _Pieces(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        run: Run,
        stops: Sequence[int],
        lists: tuple[list[Tensor], list[Tensor]],
        bar: Bar | None,
        q: Tensor,
        p: Tensor,
        dt: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.run, ctx.stops, ctx.pieces = run, stops, _pieces(stops, max(1, math.isqrt(stops[-1])))
        ctx.starts, (qs, ps), memory = [], lists, None
        saved, here = set(stops), (lists[0][-1], lists[1][-1])
        for piece in ctx.pieces:
            ctx.starts.append((*here, memory))
            some = [here[0]], [here[1]]
            try:
                memory = still(run).march(piece, *some, memory)
            finally:  # on failure too: what is good is kept
                kept = [i for i, stop in enumerate(piece[: len(some[0])]) if i and stop in saved]
                qs += [some[0][i] for i in kept]
                ps += [some[1][i] for i in kept]
            here = some[0][-1], some[1][-1]
            if bar is not None:
                bar.show(piece[-1])
        ctx.save_for_backward(q, p, dt, *parameters)
        return torch.stack(qs[1:]), torch.stack(ps[1:])

    @staticmethod
    def backward(ctx: Any, q_bars: Tensor, p_bars: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        q, p, dt, *_ = ctx.saved_tensors
        inputs = [
            x if need else None
            for x, need in zip(ctx.saved_tensors, ctx.needs_input_grad[4:], strict=True)
        ]
        if torch.is_grad_enabled():  # create_graph=True
            found = gradient_by_tape(ctx.run, ctx.stops, q, p, dt, inputs, q_bars, p_bars)
            return (None, None, None, None, *found)
        index = {stop: i for i, stop in enumerate(ctx.stops[1:])}
        bars: list[Tensor | None] = [None, None]
        sums: list[Tensor | None] = [None] * len(inputs[2:])
        for piece, start in zip(reversed(ctx.pieces), reversed(ctx.starts), strict=True):
            bars, more = _pull(ctx.run, piece, start, index, (q_bars, p_bars), bars, inputs[2:])
            sums = [
                a if b is None else b if a is None else a + b
                for a, b in zip(sums, more, strict=True)
            ]
        return (None, None, None, None, bars[0], bars[1], *sums)


def _pull(
    run: Run,
    piece: list[int],
    start: Any,
    index: dict[int, int],
    saved_bars: tuple[Tensor, Tensor],
    end_bars: list[Tensor | None],
    inputs: Sequence[Tensor | None],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    # Repeat a piece with a graph and pull the cotangents of its end, memory included, and of its
    # saved states back to its start and to dt and the parameters.
    leaves, form = tree_flatten(start)
    with torch.enable_grad():
        leaves = [
            x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
            for x in leaves
        ]
        q, p, memory = tree_unflatten(leaves, form)
        qs, ps = [q], [p]
        memory = run.march(piece, qs, ps, memory)
        ends = tree_flatten((qs[-1], ps[-1], memory))[0]
    pairs = [(x, bar) for x, bar in zip(ends, _padded(end_bars, len(ends)), strict=True)]
    for states, bars in zip((qs, ps), saved_bars, strict=True):
        pairs += [
            (x, bars[index[n]])
            for n, x in zip(piece, states, strict=True)
            if n in index and n > piece[0]
        ]
    live = [
        (x, bar)
        for x, bar in pairs
        if bar is not None and isinstance(x, Tensor) and x.requires_grad
    ]
    state = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    wanted = [x for x in inputs if x is not None]
    grads = torch.autograd.grad(
        [x for x, _ in live],
        [*state, *wanted],
        [bar for _, bar in live],
        # A captured tensor may be made from another, whose graph the next piece needs again.
        retain_graph=True,
        allow_unused=True,
    )
    first, rest = iter(grads[: len(state)]), iter(grads[len(state) :])
    tracked = [isinstance(x, Tensor) and x.requires_grad for x in leaves]
    return (
        [next(first) if live else None for live in tracked],
        [None if x is None else next(rest) for x in inputs],
    )


def _padded(bars: list[Tensor | None], n: int) -> list[Tensor | None]:
    # No cotangent for the memory that the last piece leaves.
    return [*bars, *[None] * (n - len(bars))]


def _pieces(stops: Sequence[int], size: int) -> list[list[int]]:
    # Runs of neighbouring stops at least ``size`` steps long; longer gaps are cut.
    cut = [stops[0]]
    for before, now in pairwise(stops):
        cut += [*range(before + size, now, size), now]
    pieces = [[cut[0]]]
    for stop in cut[1:]:
        if pieces[-1][-1] - pieces[-1][0] >= size:
            pieces.append([pieces[-1][-1]])
        pieces[-1].append(stop)
    return pieces
