"""Cotangents of a pencil from those of its eigenpairs, with truncated spectra made exact.

With ``φᵢᵀ M φⱼ = δᵢⱼ`` and symmetric ``dK``, ``dM``,

    dλᵢ = φᵢᵀ (dK - λᵢ dM) φᵢ,
    dφᵢ = Σ_j φⱼ φⱼᵀ (dK - λᵢ dM) φᵢ / (λᵢ - λⱼ) - ½ φᵢ (φᵢᵀ dM φᵢ),

the sum over all ``j`` with ``λⱼ ≠ λᵢ``. Those beyond the computed ones enter through solves with
``K - λᵢ M`` on their span, where it is positive definite. Everything here takes numbers and
returns numbers, except :func:`place`, :func:`average` and :func:`same`, which are differentiable.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from darboux._checks import ConvergenceError, GeometryError
from darboux.manifolds.spectral.factor import Array, Factor, Matrix
from darboux.manifolds.spectral.operator import Operator, Sparse, outer_on

_SOLVE_TOLERANCE = 1e-11
_SOLVE_STEPS = 400
_GAUGE = 1e-6


@dataclass(frozen=True, eq=False)
class Modes:
    """All computed modes of an operator, wanted and guard, as plain numbers.

    ``values (..., p)`` ascending, ``functions (..., n, p)``, ``labels (..., p)`` equal within a
    cluster. ``factor`` and the two matrices serve the solves; they are absent where p = n.
    """

    values: Tensor
    functions: Tensor
    labels: Tensor
    wanted: int
    factor: Factor | None = None
    stiffness: Matrix | None = None
    mass: Matrix | None = None

    def cast(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return self.values.to(like), self.functions.to(like)


def numbers(matrix: Sparse | Tensor) -> Tensor:
    """Return the tensor through which the derivatives of a matrix flow."""
    return matrix.values if isinstance(matrix, Sparse) else matrix


def same(labels: Tensor) -> Tensor:
    """Say which pairs of modes lie in one cluster: ``(..., p, p)``."""
    return labels[..., :, None] == labels[..., None, :]


def average(x: Tensor, labels: Tensor) -> Tensor:
    """Replace each entry of ``x`` ``(..., p)`` by the mean over its cluster."""
    weight = same(labels).to(x.dtype)
    return (weight @ x[..., None])[..., 0] / weight.sum(-1)


def place(matrix: Sparse | Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return the symmetric part of ``left rightᵀ`` at the places of the matrix."""
    if isinstance(matrix, Sparse):
        pattern = matrix.pattern
        entries = outer_on(pattern, left, right)
        mirror = torch.argsort(pattern.cols * pattern.size + pattern.rows)
        return 0.5 * (entries + entries[mirror])
    full = left @ right.mT
    return 0.5 * (full + full.mT)


def check_gauge(modes: Modes, to_values: Tensor | None, to_functions: Tensor) -> Tensor:
    """Return ``B = Φᵀ Ū``; raise where the loss depends on the basis inside a cluster.

    A loss that does not has a symmetric ``B`` there, and its cotangents of equal eigenvalues
    are equal: where they are not, the derivative needs more than eigenpairs can tell.
    """
    b = modes.functions.mT @ to_functions
    pairs = same(modes.labels)
    off = pairs & ~torch.eye(pairs.shape[-1], dtype=torch.bool, device=pairs.device)
    lengths = modes.functions.norm(dim=-2)[..., :, None] * to_functions.norm(dim=-2)[..., None, :]
    turned = torch.where(off, (b - b.mT).abs(), 0)
    bad = turned > _GAUGE * (lengths.amax((-1, -2), keepdim=True) + 1e-300)
    if to_values is not None:
        used = to_functions.abs().amax(-2) > 0
        spread = (to_values[..., :, None] - to_values[..., None, :]).abs()
        uneven = spread > _GAUGE * to_values.abs().amax(-1)[..., None, None]
        bad |= off & uneven & (used[..., :, None] | used[..., None, :])
    if bad.any():
        first = int(torch.nonzero(bad)[0, -2])
        row = bad.nonzero()[0][:-2]
        labels, values = modes.labels[tuple(row)], modes.values[tuple(row)]
        copies = torch.nonzero(labels == labels[first])[:, 0]
        start, stop = int(copies[0]), int(copies[-1]) + 1
        cut = f", of which k = {modes.wanted} keeps a part," if stop > modes.wanted > start else ""
        raise GeometryError(
            f"eigenpairs: the loss depends on the basis of functions[:, {start}:{stop}], whose "
            f"{stop - start} eigenvalues are equal ({float(values[first]):.6g}){cut} so that the "
            "basis is arbitrary and the derivative does not exist; use what does not depend on it: "
            "trace, diagonal, apply, projector of darboux.manifolds.spectral"
        )
    return b


def of_functions(modes: Modes, b: Tensor, to_functions: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(Y, H)`` with ``dL = Σᵢ yᵢᵀ (dK - λᵢ dM) φᵢ - hᵢᵀ dM φᵢ``, each ``(..., n, p)``."""
    values, phi = modes.values, modes.functions
    inside = same(modes.labels)
    differences = torch.where(inside, 1, values[..., None, :] - values[..., :, None])
    y = phi @ torch.where(inside, 0, b / differences)
    h = 0.5 * (phi @ torch.where(inside, b, 0))
    which = torch.nonzero(to_functions.abs().amax(0) > 0)[:, 0] if modes.factor else None
    if which is not None and which.numel():
        z = beyond(modes, which, to_functions[:, which])
        y = y.index_add(1, which, z, alpha=-1)
    return y, h


def beyond(modes: Modes, which: Tensor, right: Tensor) -> Tensor:
    """Solve ``(K - λᵢ M) zᵢ = rᵢ`` among the functions M-orthogonal to all computed modes.

    ``which (q,)`` names the ``i``, ``right`` is ``(n, q)``. Conjugate gradients on all columns at
    once, with the factor of ``K - σM`` as preconditioner: its condition is that of the gap left by
    the guards. Columns stop at 1e-11 of the largest.
    """
    assert modes.factor is not None
    assert modes.stiffness is not None
    assert modes.mass is not None
    stiffness, mass, solve = modes.stiffness, modes.mass, modes.factor.solve
    phi = modes.functions.cpu().numpy()
    mass_phi = mass @ phi
    values = modes.values.cpu().numpy()[which.cpu().numpy()]
    r = right.detach().cpu().numpy().astype(np.float64)
    r = r - mass_phi @ (phi.T @ r)

    def precondition(x: Array) -> Array:
        z = solve(x)
        return z - phi @ (mass_phi.T @ z)

    found = np.zeros_like(r)
    z = precondition(r)
    rz = (r * z).sum(0)
    floor = _SOLVE_TOLERANCE**2 * max(rz.max(), 0.0)
    live = np.flatnonzero(rz > floor)
    r, z, rz = r[:, live], z[:, live], rz[live]
    direction, x = z, np.zeros_like(r)
    for _ in range(_SOLVE_STEPS):
        if not len(live):
            return torch.from_numpy(found).to(right)
        image = stiffness @ direction - (mass @ direction) * values[live]
        curvature = (direction * image).sum(0)
        if not (curvature > 0).all():
            raise GeometryError(
                "eigenpairs: eigenvalues are missing below the highest computed one; "
                "solve with certify=True before taking derivatives"
            )
        step = rz / curvature
        x, r = x + direction * step, r - image * step
        z = precondition(r)
        before, rz = rz, (r * z).sum(0)
        direction = z + direction * (rz / before)
        done = rz <= floor
        if done.any():
            found[:, live[done]] = x[:, done]
            keep = ~done
            live, rz, r, x, direction = (
                live[keep],
                rz[keep],
                r[:, keep],
                x[:, keep],
                direction[:, keep],
            )
    residual = float(np.sqrt(rz.max() / floor) * _SOLVE_TOLERANCE)
    raise ConvergenceError(
        f"eigenpairs: the adjoint solves reached {residual:.1e} of their right-hand side in "
        f"{_SOLVE_STEPS} steps, expected {_SOLVE_TOLERANCE:.0e}; give more guard vectors",
        residual,
        _SOLVE_STEPS,
    )


class _Pairs(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx, stiffness: Tensor, mass: Tensor, operator: Operator, modes: Modes
    ) -> tuple[Tensor, Tensor]:
        values, functions = modes.cast(stiffness)
        values, functions = values.clone(), functions.clone()
        ctx.save_for_backward(values, functions)
        ctx.set_materialize_grads(False)
        ctx.operator = operator.map(detached)
        ctx.modes = modes
        return values, functions

    @staticmethod
    def backward(ctx, to_values: Tensor | None, to_functions: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        modes, operator = ctx.modes, ctx.operator
        values, functions = ctx.saved_tensors
        dtype = values.dtype
        if not torch.is_grad_enabled():
            values, functions = modes.values, modes.functions
        left, mass_left, uneven = torch.zeros_like(functions), torch.zeros_like(functions), None
        if to_values is not None:
            uneven = to_values.to(values.dtype)
            weight = average(uneven, modes.labels)
            left = functions * weight[..., None, :]
            mass_left = left * values[..., None, :]
        twice = torch.is_grad_enabled() and to_functions is not None
        if to_functions is not None and bool((to_functions != 0).any()):
            cotangent = to_functions.detach().to(modes.functions.dtype)
            given = None if uneven is None else uneven.detach()
            b = check_gauge(modes, given, cotangent)
            y, h = of_functions(modes, b, cotangent)
            left = left + y
            mass_left = mass_left + y * values[..., None, :] + h
        # Guards and unused functions have no cotangent; most losses use few columns.
        used = (left.detach() != 0).flatten(0, -2).any(0) | (mass_left.detach() != 0).flatten(
            0, -2
        ).any(0)
        if not used.all():
            left, mass_left, functions = (x[..., used] for x in (left, mass_left, functions))
        to_stiffness, to_mass = (
            place(operator.stiffness, left, functions).to(dtype)
            if ctx.needs_input_grad[0]
            else None,
            -place(operator.mass, mass_left, functions).to(dtype)
            if ctx.needs_input_grad[1]
            else None,
        )
        if twice:
            to_stiffness, to_mass = once(to_stiffness), once(to_mass)
        return to_stiffness, to_mass, None, None


def detached(matrix: Sparse | Tensor) -> Sparse | Tensor:
    if isinstance(matrix, Sparse):
        return Sparse(matrix.pattern, matrix.values.detach())
    return matrix.detach()


def once(x: Tensor | None) -> Tensor | None:
    if x is None:
        return None
    stop = torch._C._functions.DelayedError(  # pyright: ignore[reportAttributeAccessIssue]
        b"second derivatives of eigenfunctions and of spectral functions are not available; "
        b"those of eigenvalues and of trace are",
        1,
    )
    return stop(x.detach().requires_grad_())


def attach(operator: Operator, modes: Modes) -> tuple[Tensor, Tensor]:
    """Return the values and functions of ``modes``, differentiable in the operator."""
    return _Pairs.apply(numbers(operator.stiffness), numbers(operator.mass), operator, modes)
