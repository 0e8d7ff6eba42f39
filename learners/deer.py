r"""Newton's method on a whole trajectory: DEER, and quasi-DEER with the blocks of the Jacobians.

.. math:: s_t^{(k+1)} = \Phi_t(s_{t-1}^{(k)}) + J_t\,(s_{t-1}^{(k+1)} - s_{t-1}^{(k)})

Each sweep is an affine scan. Lim, Zhu, Selfridge & Kasim (2024), arXiv 2309.12252; Gonzalez,
Warrington, Smith & Linderman (2024), arXiv 2407.19115. Exact after as many sweeps as there are
steps, and after a few where the largest Lyapunov exponent is negative; where it is positive the
problem is ill-conditioned, exponentially in the length (Gonzalez et al. 2025, arXiv 2508.16817).
An undamped symplectic cell has exponents in pairs of both signs, so zero is the best it can do:
trajectories are cut into chunks, and a chunk that does not settle is stepped through.
"""

import functools
import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from darboux.learners.recurrence import Cell, State, affine_scan, apply, sequential

CHUNK = 128
MAX_SWEEPS = 24


class Report(NamedTuple):
    """How Newton went: sweeps of the worst chunk, largest residual, and what was stepped through.

    ``residual`` is that of the chunks that settled, relative to the states; ``lyapunov`` is the
    growth of a tangent per step along the trajectory, by the Jacobians at hand.
    """

    sweeps: int
    residual: float
    chunks: int
    fallbacks: int
    lyapunov: float


def newton(cell: Cell, inputs: Tensor, state: State, blocks: bool = False) -> State:
    """Return the states of all times; warns where chunks had to be stepped through."""
    path, report = solve(cell, inputs, state, blocks=blocks)
    if report.fallbacks:
        warnings.warn(
            f"DEER did not settle in {report.fallbacks} of {report.chunks} chunks, which were "
            f"stepped through (Lyapunov exponent {report.lyapunov:.3g} a step)",
            RuntimeWarning,
            stacklevel=3,
        )
    return path


def solve(
    cell: Cell,
    inputs: Tensor,
    state: State,
    *,
    blocks: bool = False,
    chunk: int = CHUNK,
    max_sweeps: int = MAX_SWEEPS,
) -> tuple[State, Report]:
    """Return the states of all times and a :class:`Report`.

    With ``blocks``, Jacobians are cut down to a 2 x 2 block for each pair of entries of a state of
    two equal tensors; for cells that are made of such blocks this is Newton itself, at the cost of
    two tangents. The gradient solves the adjoint equation by the same sweeps.
    """
    if blocks and (len(state) != 2 or state[0].shape != state[1].shape):
        raise ValueError(
            f"quasi-deer: the state is {[tuple(x.shape) for x in state]}, expected two tensors of "
            "one shape"
        )
    log: list[tuple[int, float, bool, float]] = []
    pieces = []
    for begin in range(0, inputs.shape[1], chunk):
        flat = _Solve.apply(
            cell,
            blocks,
            max_sweeps,
            log,
            inputs[:, begin : begin + chunk],
            len(state),
            *state,
            *cell.parameters,
        )
        path = _unflatten(flat, state)
        pieces.append(path)
        state = tuple(x[:, -1] for x in path)
    sweeps, residuals, fell, growths = zip(*log, strict=True)
    good = [r for r, f in zip(residuals, fell, strict=True) if not f]
    report = Report(max(sweeps), max(good, default=math.nan), len(log), sum(fell), max(growths))
    joined = tuple(torch.cat(parts, 1) for parts in zip(*pieces, strict=True))
    return cell.wrapped(joined), report


def lyapunov(cell: Cell, inputs: Tensor, state: State, seed: int = 0) -> Tensor:
    """Return the largest Lyapunov exponent per step ``(batch,)``, by one tangent carried along."""
    generator = torch.Generator(inputs.device).manual_seed(seed)
    tangent = tuple(
        torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator) for x in state
    )
    total = torch.zeros(inputs.shape[0], dtype=inputs.dtype, device=inputs.device)
    for f in inputs.unbind(1):
        state, tangent = torch.func.jvp(  # type: ignore[misc]
            lambda *s, f=f: cell.step(cell.parameters, f, s), tuple(state), tuple(tangent)
        )
        size = _flatten(tangent).norm(dim=-1)
        total = total + size.log()
        tangent = tuple(x / size.view(-1, *[1] * (x.dim() - 1)) for x in tangent)
        state = cell.wrapped(state)
    return total / inputs.shape[1]


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        cell: Cell,
        blocks: bool,
        max_sweeps: int,
        log: list,
        inputs: Tensor,
        parts: int,
        *rest: Tensor,
    ) -> Tensor:
        state: State = rest[:parts]
        start = _flatten(state)
        path = start.unsqueeze(1).expand(-1, inputs.shape[1], -1)
        floor = 100 * torch.finfo(path.dtype).eps
        step = _Steps(cell, inputs, state)
        jacobian, residual, sweep, least = None, math.inf, 0, math.inf
        # Settled: at round-off, or at a floor just above it that further sweeps do not lower.
        for sweep in range(1, max_sweeps + 1):  # noqa: B007
            before = torch.cat([start.unsqueeze(1), path[:, :-1]], 1)
            value, jacobian = step.linearised(before, blocks)
            residual = float((value - path).abs().max() / (1 + value.abs().max()))
            if not residual > floor or not residual < math.inf:
                break
            if residual < 1e3 * floor and residual >= least:
                break
            least = min(least, residual)
            path = _scan(jacobian, value, before, start, blocks)
        settled = residual <= 1e3 * floor
        growth = math.nan if jacobian is None else _growth(jacobian, blocks)
        log.append((sweep, residual, not settled, growth))
        if not settled:
            lifted = Cell(step=cell.step, parameters=cell.parameters)
            path = _flatten_path(sequential(lifted, inputs, state))
        ctx.step, ctx.blocks, ctx.parts, ctx.sweeps = cell.step, blocks, parts, max_sweeps
        ctx.save_for_backward(inputs, path, *rest)
        return path.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        inputs, path, *rest = ctx.saved_tensors
        state, parameters = tuple(rest[: ctx.parts]), tuple(rest[ctx.parts :])
        cell = Cell(step=ctx.step, parameters=parameters)
        start = _flatten(state)
        before = torch.cat([start.unsqueeze(1), path[:, :-1]], 1)
        _, jacobian = _Steps(cell, inputs, state).linearised(before, ctx.blocks)
        leaves = [x.detach().requires_grad_() for x in (inputs, before, *parameters)]
        with torch.enable_grad():
            again = Cell(step=ctx.step, parameters=tuple(leaves[2:]))
            value = _Steps(again, leaves[0], state).at(leaves[1])
        # lambda_t = slope_t + J_{t+1}^T lambda_{t+1}, by sweeps with the blocks of J
        adjoint = _adjoint_scan(jacobian, slope, ctx.blocks)
        grads: Any = ()
        for _ in range(ctx.sweeps):
            grads = torch.autograd.grad(
                value, leaves, adjoint, retain_graph=True, materialize_grads=True
            )
            pulled = torch.cat([grads[1][:, 1:], torch.zeros_like(slope[:, :1])], 1)
            rest_of = slope + pulled - adjoint
            limit = 100 * torch.finfo(slope.dtype).eps * float(adjoint.abs().max())
            if not float(rest_of.abs().max()) > limit:
                break
            adjoint = adjoint + _adjoint_scan(jacobian, rest_of, ctx.blocks)
        else:
            adjoint = _adjoint_loop(cell, inputs, state, before, slope)
            grads = torch.autograd.grad(value, leaves, adjoint, materialize_grads=True)
        of_state = _unflatten(grads[1][:, :1], state)
        return (
            None,
            None,
            None,
            None,
            grads[0],
            None,
            *(x[:, 0] for x in of_state),
            *grads[2:],
        )


def _adjoint_loop(cell: Cell, inputs: Tensor, state: State, before: Tensor, slope: Tensor):
    out, carried = [], torch.zeros_like(slope[:, 0])
    for t in reversed(range(inputs.shape[1])):
        out.append(slope[:, t] + carried)
        with torch.enable_grad():
            at = before[:, t : t + 1].detach().requires_grad_()
            value = _Steps(cell, inputs[:, t : t + 1], state).at(at)[:, 0]
        (carried,) = torch.autograd.grad(value, at, out[-1])
        carried = carried[:, 0]
    return torch.stack(out[::-1], 1)


class _Steps:
    """All steps at once, on flat states ``(batch, time, n)``."""

    def __init__(self, cell: Cell, inputs: Tensor, state: State):
        self.cell, self.inputs, self.state = cell, inputs, state

    def at(self, before: Tensor) -> Tensor:
        f = self.inputs.flatten(0, 1)
        parts = tuple(x.flatten(0, 1) for x in _unflatten(before, self.state))
        value = _flatten(self.cell.step(self.cell.parameters, f, parts))
        return value.unflatten(0, before.shape[:2])

    def along(self, before: Tensor, one: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(self.at, (before,), (one.expand_as(before),))  # type: ignore[return-value]

    def linearised(self, before: Tensor, blocks: bool) -> tuple[Tensor, Tensor]:
        n = before.shape[-1]
        m = n // 2
        if blocks and self.cell.blocks:
            ones = torch.zeros(2, n, dtype=before.dtype, device=before.device)
            ones[0, :m], ones[1, m:] = 1, 1
            pushed = [self.along(before, one) for one in ones]
            columns = [column.unflatten(-1, (2, m)).mT for _, column in pushed]
            return pushed[0][0], torch.stack(columns, -1)  # (batch, time, m, 2, 2)
        eye = torch.eye(n, dtype=before.dtype, device=before.device)

        along = functools.partial(self.along, before)
        value, j = torch.func.vmap(along, out_dims=(None, -1))(eye)  # type: ignore[arg-type]
        if blocks:
            j = j.unflatten(-1, (2, m)).unflatten(-3, (2, m))  # (..., 2, m, 2, m)
            j = j.diagonal(dim1=-3, dim2=-1).movedim(-1, -3)
        return value, j


def _scan(j: Tensor, value: Tensor, before: Tensor, start: Tensor, blocks: bool) -> Tensor:
    if blocks:
        value, before, start = (_pairs(x) for x in (value, before, start))
    out = affine_scan(j, value - apply(j, before), start)
    return out.mT.flatten(-2) if blocks else out


def _adjoint_scan(j: Tensor, slope: Tensor, blocks: bool) -> Tensor:
    if blocks:
        slope = _pairs(slope)
    last = torch.zeros_like(j[:, :1])
    turned = torch.cat([j[:, 1:], last], 1).flip(1).mT
    out = affine_scan(turned, slope.flip(1), torch.zeros_like(slope[:, 0])).flip(1)
    return out.mT.flatten(-2) if blocks else out


def _growth(j: Tensor, blocks: bool) -> float:
    # the product of the Jacobians, rescaled as it grows
    size = torch.zeros(j.shape[:1] + j.shape[2:-2], dtype=j.dtype, device=j.device)
    v = torch.ones(j.shape[:1] + j.shape[2:-1], dtype=j.dtype, device=j.device)
    for one in j.unbind(1):
        v = apply(one, v)
        norm = v.norm(dim=-1)
        size, v = size + norm.log(), v / norm.unsqueeze(-1)
    return float(size.max()) / j.shape[1]


def _pairs(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, -1)).mT


def _flatten(state: State) -> Tensor:
    return torch.cat([x.flatten(1) for x in state], -1)


def _flatten_path(path: State) -> Tensor:
    return torch.cat([x.flatten(2) for x in path], -1)


def _unflatten(flat: Tensor, state: State) -> State:
    sizes = [x[0].numel() for x in state]
    pieces = flat.split(sizes, -1)
    return tuple(x.unflatten(-1, y.shape[1:]) for x, y in zip(pieces, state, strict=True))
