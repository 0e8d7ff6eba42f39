"""The pencil ``K φ = λ M φ`` of a discrete Laplace-Beltrami operator, sparse or dense.

``K_ij = ∫ ⟨∇φ_i, ∇φ_j⟩`` is the stiffness, ``M_ij = ∫ φ_i φ_j`` the mass: both symmetric, K
positive semi-definite and M positive definite, so the spectrum is that of -Δ, ascending from
zero. A sparse matrix is a fixed :class:`Pattern` of places, which depends on topology alone,
and a tensor of values, through which all derivatives flow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from darboux._checks import in_transform

_PLACES = 2048


@dataclass(frozen=True, eq=False)
class Pattern:
    """The places of a sparse ``size x size`` matrix, sorted by row and then by column.

    ``rows``, ``cols`` ``(nnz,)`` and ``indptr`` ``(size + 1,)`` are int64: CSR and COO at once.
    The set of places is symmetric and holds the whole diagonal.
    """

    size: int
    rows: Tensor
    cols: Tensor
    indptr: Tensor

    @staticmethod
    def of(rows: Tensor, cols: Tensor, size: int) -> tuple[Pattern, Tensor]:
        """Return the pattern of the places given and, for each of them, its position in it."""
        every = torch.arange(size, device=rows.device)
        keys = torch.cat([rows * size + cols, every * (size + 1)])
        kept, where = torch.unique(keys, return_inverse=True)
        found = kept // size
        indptr = torch.searchsorted(found, torch.arange(size + 1, device=rows.device))
        return Pattern(size, found, kept % size, indptr), where[: rows.numel()]

    def assemble(self, where: Tensor, entries: Tensor) -> Sparse:
        """Add up ``entries`` ``(...)`` at the positions ``where`` ``(...)`` of this pattern."""
        values = entries.new_zeros(self.rows.numel())
        return Sparse(self, values.index_add(0, where.reshape(-1), entries.reshape(-1)))

    @property
    def diagonal(self) -> Tensor:
        """The positions ``(size,)`` of the diagonal."""
        return torch.nonzero(self.rows == self.cols)[:, 0]

    def restrict(self, keep: Tensor) -> tuple[Pattern, Tensor]:
        """Return the pattern of the rows and columns ``keep`` and the positions it takes."""
        new = torch.full((self.size,), -1, dtype=torch.int64, device=keep.device)
        new[keep] = torch.arange(keep.numel(), device=keep.device)
        taken = torch.nonzero((new[self.rows] >= 0) & (new[self.cols] >= 0))[:, 0]
        pattern, where = Pattern.of(new[self.rows[taken]], new[self.cols[taken]], keep.numel())
        order = torch.empty_like(taken)
        order[where] = taken
        return pattern, order


@dataclass(frozen=True, eq=False)
class Sparse:
    """A symmetric sparse matrix: ``values`` ``(nnz,)`` at the places of ``pattern``."""

    pattern: Pattern
    values: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.pattern.size, self.pattern.size

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    def __matmul__(self, x: Tensor) -> Tensor:
        """Return ``A x`` for ``x`` ``(n,)`` or ``(n, m)``, differentiable in both to any order."""
        columns = x if x.ndim == 2 else x[:, None]
        if in_transform():
            product = _gathered(self.pattern, self.values, columns)
        else:
            product = _Product.apply(self.values, columns, self.pattern)
        return product if x.ndim == 2 else product[:, 0]

    def dense(self) -> Tensor:
        """Return the matrix ``(n, n)``, differentiable in the values."""
        p = self.pattern
        flat = self.values.new_zeros(p.size * p.size)
        return flat.index_add(0, p.rows * p.size + p.cols, self.values).reshape(p.size, p.size)

    def diagonal(self) -> Tensor:
        return self.values[self.pattern.diagonal]

    def scipy(self) -> scipy.sparse.csr_array:
        """Return the numbers as a float64 scipy matrix, cut off from every graph.

        Rows of a float32 matrix that add up to zero within its rounding do so exactly here: the
        constant then has eigenvalue zero, and the others ten more bits.
        """
        p = self.pattern
        parts = (self.values.detach(), p.cols, p.indptr)
        values, cols, indptr = (part.cpu().numpy() for part in parts)
        index = np.int32 if p.rows.numel() < 2**31 else np.int64
        matrix = scipy.sparse.csr_array(
            (values.astype(np.float64), cols.astype(index), indptr.astype(index)), shape=self.shape
        )
        if self.dtype != torch.float64:
            total, size = matrix.sum(1), abs(matrix).sum(1)
            meant = abs(total) <= 4 * torch.finfo(self.dtype).eps * size
            matrix.data[p.diagonal.cpu().numpy()] -= np.where(meant, total, 0.0)
        return matrix

    def restrict(self, keep: Tensor) -> Sparse:
        """Return the block of the rows and columns ``keep`` ``(m,)``."""
        pattern, taken = self.pattern.restrict(keep)
        return Sparse(pattern, self.values[taken])


def outer_on(pattern: Pattern, x: Tensor, y: Tensor) -> Tensor:
    """Return ``Σ_m x_rm y_cm`` at the places (r, c) of the pattern: ``(nnz,)``.

    The cotangent of a sparse matrix is needed only where the matrix has places. Works in
    slices of places that stay in the cache: memory is O(nnz).
    """
    places = zip(pattern.rows.split(_PLACES), pattern.cols.split(_PLACES), strict=True)
    return torch.cat([(x[rows] * y[cols]).sum(-1) for rows, cols in places])


def _gathered(pattern: Pattern, values: Tensor, x: Tensor) -> Tensor:
    terms = values[:, None] * x[pattern.cols]
    return x.new_zeros(x.shape).index_add(0, pattern.rows, terms)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, x: Tensor, pattern: Pattern) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(values, x)
        ctx.pattern = pattern
        if values.device.type == "cpu":  # scipy's product is twice as fast as torch's
            parts = (part.numpy() for part in (values.detach(), pattern.cols, pattern.indptr))
            matrix = scipy.sparse.csr_array(tuple(parts), (pattern.size, pattern.size))
            return torch.from_numpy(matrix @ x.detach().numpy())
        return _gathered(pattern, values, x)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        values, x = ctx.saved_tensors
        to_values, to_x, _ = ctx.needs_input_grad
        return (
            outer_on(ctx.pattern, cotangent, x) if to_values else None,
            Sparse(ctx.pattern, values) @ cotangent if to_x else None,
            None,
        )


@dataclass(frozen=True, eq=False)
class Operator:
    """The Laplace-Beltrami operator as the pencil ``(stiffness, mass)``.

    Both are :class:`Sparse`, or both dense ``(..., n, n)``. ``space`` says what the n unknowns
    are: it has ``extend(u)``, which takes coefficients ``(n, ...)`` to values at all nodes of a
    mesh ``(nodes, ...)`` (zero on a Dirichlet boundary, equal on glued nodes), or
    ``evaluate(x)``, which gives the n basis functions at points ``(..., d)`` as ``(..., n)``.
    """

    stiffness: Sparse | Tensor
    mass: Sparse | Tensor
    space: Any = field(default=None, repr=False)

    @property
    def size(self) -> int:
        """The number n of unknowns."""
        return self.stiffness.shape[-1]

    @property
    def sparse(self) -> bool:
        return isinstance(self.stiffness, Sparse)

    def extend(self, u: Tensor) -> Tensor:
        """Return the values at all nodes of the coefficients ``u`` ``(n, ...)``."""
        return u if self.space is None else self.space.extend(u)

    def map(self, change: Callable[[Sparse | Tensor], Sparse | Tensor]) -> Operator:
        """Return the operator with both matrices changed alike."""
        return Operator(change(self.stiffness), change(self.mass), self.space)
