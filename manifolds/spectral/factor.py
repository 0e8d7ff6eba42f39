"""Sparse factorisation: solves with many right-hand sides, and the inertia of a pencil.

Everything is float64 numpy on the CPU; derivatives are taken by the callers, never through here.
"""

from __future__ import annotations

import importlib.util
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray
from scipy.sparse.linalg import splu

from darboux._checks import GeometryError

Array = NDArray[np.float64]
Matrix = scipy.sparse.csr_array

FACTORS = ("auto", "cholespy", "superlu")
# More columns at once fall out of the cache and cost more each.
_COLUMNS = 8


# cholespy complains at exit of solvers that the graphs of torch still hold: keep them here, where
# the end of the interpreter finds them.
_SOLVERS: dict[int, Callable[[Array], Array]] = {}


class Factor:
    """The factor of ``K - σ M``; its life is that of this object, or of the interpreter."""

    def __init__(self, shift: float, solve: Callable[[Array], Array]):
        self.shift = shift
        _SOLVERS[id(self)] = solve
        weakref.finalize(self, _SOLVERS.pop, id(self), None)

    def solve(self, b: Array) -> Array:
        """Return ``(K - σ M)⁻¹ b`` for ``b`` ``(n, m)``."""
        return _SOLVERS[id(self)](b)


def factorise(stiffness: Matrix, mass: Matrix, shift: float, method: str = "auto") -> Factor:
    """Factor ``K - σ M``; raise :class:`GeometryError` where it is not positive definite.

    ``method`` is ``cholespy`` (three times faster solves), ``superlu``, or ``auto``: the first
    that is installed.
    """
    if method == "auto":
        method = "cholespy" if importlib.util.find_spec("cholespy") else "superlu"
    matrix = scipy.sparse.csr_array(stiffness - shift * mass)
    matrix.sort_indices()
    solve = _cholespy(matrix) if method == "cholespy" else _superlu(matrix)
    return Factor(shift, solve)


def _cholespy(matrix: Matrix) -> Callable[[Array], Array]:
    try:
        import cholespy
    except ImportError:
        raise ModuleNotFoundError(
            "eigenpairs: factor='cholespy' needs the package cholespy: pip install cholespy"
        ) from None
    if matrix.nnz >= 2**31:
        raise ValueError(f"eigenpairs: cholespy takes fewer than 2^31 entries, got {matrix.nnz}")
    # CSR, because cholespy reallocates the arrays of a CSC input in place; int32 and C order,
    # because it takes nothing else.
    index, column = (np.ascontiguousarray(p, np.int32) for p in (matrix.indptr, matrix.indices))
    data = np.ascontiguousarray(matrix.data, np.float64)
    library: Any = cholespy  # a compiled module without types
    try:
        kind = library.MatrixType.CSR
        solver = library.CholeskySolverD(len(index) - 1, index, column, data, kind)
    except ValueError:
        raise GeometryError("K - σM is not positive definite") from None

    def solve(b: Array) -> Array:
        x = np.empty(b.shape)
        for j in range(0, b.shape[1], _COLUMNS):
            part = np.ascontiguousarray(b[:, j : j + _COLUMNS], np.float64)
            out = np.empty_like(part)
            solver.solve(part, out)
            x[:, j : j + _COLUMNS] = out
        return x

    return solve


def _symmetric_lu(matrix: Matrix):
    # In symmetric mode the pivots are taken from the diagonal, so that L U is L D Lᵀ. With
    # relax = 1 no supernode is padded: half the fill and a quarter of the time on surfaces.
    return splu(
        scipy.sparse.csc_array(matrix),
        permc_spec="MMD_AT_PLUS_A",
        diag_pivot_thresh=0.0,
        relax=1,
        options={"SymmetricMode": True, "Equil": False},
    )


def _superlu(matrix: Matrix) -> Callable[[Array], Array]:
    try:
        factor = _symmetric_lu(matrix)
    except RuntimeError:
        raise GeometryError("K - σM is singular") from None
    if not (factor.U.diagonal() > 0).all():
        raise GeometryError("K - σM is not positive definite")
    return lambda b: factor.solve(np.asfortranarray(b))


def inertia(stiffness: Matrix, mass: Matrix, shift: float, gap: float) -> int | None:
    """Return the number of eigenvalues of the pencil below ``shift``, or ``None`` if unsure.

    By Sylvester's law it is the number of negative pivots of ``K - μ M = L D Lᵀ``. Computed
    factors are those of a matrix ``E`` away; the count holds if ``|E|`` in the norm of the mass is
    below ``gap``, the distance from ``μ`` to the next eigenvalue. ``|E z|`` is measured for a
    random ``z``, and twenty times that must still fit.
    """
    matrix = scipy.sparse.csr_array(stiffness - shift * mass)
    try:
        factor = _symmetric_lu(matrix)
    except RuntimeError:
        return None
    if not (factor.perm_r == factor.perm_c).all():
        return None  # a pivot off the diagonal: no longer a congruence
    lower, upper = factor.L, factor.U
    pivots = upper.diagonal()
    order = np.argsort(factor.perm_c)
    z = np.random.default_rng(0).standard_normal(len(pivots))
    # z = D^-1/2 y makes |D^-1/2 E D^-1/2 y| the size that counts; D is the diagonal of the mass.
    scale = 1 / np.sqrt(mass.diagonal())
    defect = (
        scale[order] * (lower @ (upper @ (scale * z)[order]))
        - scale[order] * (matrix @ (scale * z))[order]
    )
    if not 20 * np.linalg.norm(defect) < gap:
        return None
    return int((pivots < 0).sum())
