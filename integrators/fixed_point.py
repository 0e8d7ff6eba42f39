"""The solver behind every implicit step: to round-off, and differentiable through the solution.

An implicit step asks for ``k = slope(place(k))``: ``place``, affine, puts the unknowns into the
state, ``slope`` evaluates there. :func:`solve_fixed_point` finds ``k`` without a graph and then
gives it the derivatives of the implicit function theorem.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd import forward_ad

from darboux._autodiff import Field, jacobian
from darboux._checks import ConvergenceError, corrections, in_transform, values

MAX_SWEEPS = 100
# Equations of at most this many unknowns a copy are differentiated by a dense matrix.
_DENSE_UP_TO = 128
# A change this many ulps of the state large is not yet round-off.
ROUND_OFF = 1e3
# Sweeps that contract no better than this are slow enough to be worth a matrix.
_SLOW = 0.3


class Equations(NamedTuple):
    """The equations ``k = slope(place(k))`` of one step."""

    slope: Field  # x -> k
    place: Field  # k -> x, affine
    matrix: Callable[[Tensor], Tensor] | None = None  # k -> d slope(place(k))/dk (..., n, n)


class Solution(NamedTuple):
    """The solved unknowns, and how they were found."""

    k: Tensor
    iterations: int
    residual: float  # largest last change of place(k)


def solve_fixed_point(
    where: str,
    equations: Callable[[Tensor, float | Tensor], Equations],
    z: Tensor,
    dt: float | Tensor,
    start: Tensor,
    *,
    rows_alone: bool = False,
    staged: bool = False,
    scale: Tensor | None = None,
) -> Solution:
    r"""Solve ``k = slope(place(k))`` of ``equations(z, dt)`` to round-off.

    ``start`` is a guess for ``place(k)``, of shape ``(..., n)``, or ``(s, ..., n)`` if
    ``staged``: leading dimensions are copies. The sweeps stop where they stop improving, for
    every copy, not at a tolerance: a tolerance makes the energy drift (Hairer, McLachlan &
    Razakarivony, BIT 48 (2008) 231). ``scale`` is that whose round-off counts, ``place(k)``
    unless given.

    The solution is found without a graph. If a derivative is wanted (``z``, ``dt`` or something
    inside the equations requires grad or is being transformed), more sweeps are made from the
    solution with a graph: right in reverse and forward mode and any nesting, and of a length
    that does not depend on how the solution was found.

    - ``rows_alone`` promises that copies do not act on each other. Small systems then take
      chord steps with the exact inverse of :math:`I - \partial k/\partial k`, exact for
      derivatives up to third order and for those of any order that nested ``torch.func``
      transforms take. The same inverse speeds up sweeps that contract slowly.
    - Otherwise plain sweeps sum the Neumann series of the implicit function theorem. The
      ``m``-th derivative after ``n`` sweeps of contraction ``rho`` is off by about
      ``n^m rho^n``; ``n`` is measured so that this is round-off for the first few.

    Raises ``ConvergenceError`` when the sweeps do not settle: ``dt`` is too large for them.
    """
    wanted = _derivative_wanted(equations, z, dt, start)
    with torch.no_grad():
        step_size = dt.detach() if isinstance(dt, Tensor) else dt
        still = equations(z.detach(), step_size)
        unknowns = start.shape[-1] * (start.shape[0] if staged else 1)
        dense = rows_alone and unknowns <= _DENSE_UP_TO and not torch.is_inference_mode_enabled()
        found = _sweep(where, still, step_size, start.detach(), staged, dense, scale)
        k = found.k
        inverse = _inverse(still, k, staged) if wanted and dense else None
        terms = _neumann_terms(still, k, staged) if wanted and not dense else 0
    if not wanted:
        return found
    slope, place, _ = equations(z, dt)
    if inverse is not None:
        for _ in range(corrections()):
            k = k + _apply(inverse, slope(place(k)) - k, staged)
    for _ in range(terms):
        k = slope(place(k))
    return found._replace(k=k)


def _sweep(
    where: str,
    equations: Equations,
    dt: float | Tensor,
    x: Tensor,
    staged: bool,
    dense: bool,
    scale: Tensor | None,
) -> Solution:
    slope, place, _ = equations
    k, inverse, least, settled = x, None, None, None
    sweep, limit, worst, before = 0, 0.0, 0.0, 0.0
    while sweep < MAX_SWEEPS:
        sweep += 1
        found = slope(x).detach()
        k = found if inverse is None else k + _apply(inverse, found - k, staged)
        moved = place(k)
        # One number for each copy; values() shows those of a whole vmapped batch.
        change = values((moved - x).abs().amax((0, -1) if staged else -1))
        x = moved
        before, worst = worst, float(change.max()) if change.numel() else 0.0
        if worst == 0.0:
            return Solution(k, sweep, worst)
        if sweep == 1:
            size = float(values(x if scale is None else scale).abs().max())
            limit = ROUND_OFF * torch.finfo(x.dtype).eps * size
        if not math.isfinite(worst):
            break
        if worst <= limit and least is not None:
            stalled = (change >= least) | (change == 0)
            settled = stalled if settled is None else settled | stalled
            if settled.all():
                return Solution(k, sweep, worst)
        elif dense and sweep > 2 and _SLOW * before < worst < before:
            # Only what contracts is sped up: Newton's method could jump to another solution.
            inverse = _inverse(equations, k, staged)
        least = change if least is None else torch.minimum(change, least)
    if worst <= limit:
        return Solution(k, sweep, worst)
    raise ConvergenceError(
        f"{where}: after {sweep} sweeps of a step dt = {_show(dt)} the stages still change "
        f"by {worst:.3g}: take a smaller dt",
        worst,
        sweep,
    )


def _show(dt: float | Tensor) -> str:
    # Under vmap there is one for each copy.
    sizes = values(dt).flatten().tolist() if isinstance(dt, Tensor) else [dt]
    return ", ".join(f"{size:g}" for size in sizes[:3])


def _inverse(equations: Equations, k: Tensor, staged: bool) -> Tensor:
    # (I - d slope(place(k))/dk)^-1 for each copy: (..., n, n)
    if equations.matrix is not None:
        matrix = equations.matrix(k)
    else:
        assert not staged
        matrix = dense_jacobian(lambda k: equations.slope(equations.place(k)), k)
    eye = torch.eye(matrix.shape[-1], dtype=k.dtype, device=k.device)
    return torch.linalg.inv(eye - matrix)


def dense_jacobian(f: Field, x: Tensor) -> Tensor:
    """Return the Jacobian ``(..., n, n)`` of ``f``, which treats leading dimensions alike.

    Outside transforms it is found by reverse mode, which saved-tensor hooks allow (checkpointing
    rests on them) and ``torch.func`` does not.
    """
    if in_transform():
        return jacobian(f, x)[1]
    n = x.shape[-1]
    with torch.enable_grad():
        copies = x.detach().expand(n, *x.shape).clone().requires_grad_()
        y = f(copies)
    basis = torch.eye(n, dtype=x.dtype, device=x.device)
    basis = basis.reshape(n, *[1] * (x.dim() - 1), n).expand(copies.shape)
    if not y.requires_grad:
        return basis.new_zeros(*x.shape, n)
    rows = torch.autograd.grad(y, copies, basis, materialize_grads=True)[0]
    return rows.movedim(0, -2)


def _apply(inverse: Tensor, k: Tensor, staged: bool) -> Tensor:
    # (..., n, n) times (..., n), or (..., s n, s n) times (s, ..., n)
    if not staged:
        return (inverse @ k.unsqueeze(-1)).squeeze(-1)
    column = k.movedim(0, -2).flatten(-2).unsqueeze(-1)
    return (inverse @ column).squeeze(-1).unflatten(-1, (k.shape[0], k.shape[-1])).movedim(-2, 0)


def _neumann_terms(equations: Equations, k: Tensor, staged: bool) -> int:
    # Count the terms that the Neumann series needs at the solution, by summing its transpose on
    # a generic cotangent. The sweeps of the solution itself tell nothing: at an equilibrium, or
    # in any plane that the motion does not leave, it took few.
    if k.numel() == 0:
        return 1

    def sweep(k: Tensor) -> Tensor:
        return equations.slope(equations.place(k))

    if in_transform():
        pull_through = torch.func.vjp(sweep, k)[1]

        def pull(w: Tensor) -> Tensor:
            return pull_through(w)[0].detach()
    else:
        with torch.enable_grad():
            x = k.detach().requires_grad_()
            y = sweep(x)
        if not y.requires_grad:
            return 1

        def pull(w: Tensor) -> Tensor:
            return torch.autograd.grad(y, x, w, retain_graph=True, materialize_grads=True)[0]

    s, n = (k.shape[0] if staged else 1), k.shape[-1]
    pattern = torch.arange(1, s * n + 1, dtype=k.dtype, device=k.device).cos()
    term = pattern.reshape(s, *[1] * (k.dim() - 2), n) if staged else pattern
    term = term.expand(k.shape)
    total = term.abs()
    # A third of the digits are watched; the others take as many terms again each.
    enough = torch.finfo(k.dtype).eps ** (1 / 3)
    for n in range(1, MAX_SWEEPS // 3):
        term = pull(term)
        total = total + term.abs()
        left = values((term.abs() - enough * total).amax())
        if float(left.max()) <= 0:
            return 3 * n + 2
    return MAX_SWEEPS


def _derivative_wanted(
    equations: Callable[[Tensor, float | Tensor], Equations],
    z: Tensor,
    dt: float | Tensor,
    start: Tensor,
) -> bool:
    if forward_ad._current_level >= 0:
        return True
    levels = (_functorch.get_interpreter_stack() or []) if in_transform() else []
    if any(level.key() != _functorch.TransformType.Vmap for level in levels):
        return True
    if not torch.is_grad_enabled():
        return False
    if _tracked(z) or (isinstance(dt, Tensor) and _tracked(dt)):
        return True
    return _tracked(equations(z, dt).slope(start.detach()))  # a parameter inside


def _tracked(x: Tensor) -> bool:
    # Under vmap a wrapper does not show that the tensor inside requires grad.
    while _functorch.is_functorch_wrapped_tensor(x):
        x = _functorch.get_unwrapped(x)
    return x.requires_grad
