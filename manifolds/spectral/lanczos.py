"""Block Lanczos in shift-invert mode: the lowest eigenpairs of a large sparse pencil.

The operator is ``S = (K - σM)⁻¹ M``, self-adjoint in the inner product of M, whose largest
eigenvalues ``1/(λ - σ)`` belong to the lowest ``λ``. A block sees multiple eigenvalues that a
single vector cannot, its solves share passes over the factor, and full reorthogonalisation is
matrix products. Float64 numpy. Golub and Van Loan (2013), 10.3.6; thick restart: Wu and Simon
(2000).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from darboux._checks import GeometryError
from darboux.manifolds.spectral.factor import Array, Matrix

# A block is orthogonalised again when it lost more than this factor of its length.
_LOSS = 0.02
# Directions below this fraction of the largest in a block are rounding errors.
_RANK = 1e-12


class BlockLanczos:
    """A growing basis ``V`` ``(m, n)``, M-orthonormal, with ``T = V M S Vᵀ`` and the next block.

    The relation ``S Vᵀ = Vᵀ T + Q R Eᵀ`` holds throughout, ``E`` the last columns, so that the
    residual of a Ritz vector ``Vᵀ y`` is ``|R y_last|`` in the norm of M, with no further product.
    """

    def __init__(
        self,
        solve: Callable[[Array], Array],
        mass: Matrix,
        start: Array,
        random: np.random.Generator,
    ):
        self.solve, self.mass, self.random = solve, mass, random
        self.size = 0
        self._basis = np.empty((0, len(start)))
        self._projected = np.zeros((0, 0))
        self._next, self._mass_next, _ = self._orthonormal(start, self.mass @ start)
        self._coupling = np.zeros((self.block, 0))

    @property
    def block(self) -> int:
        return self._next.shape[1]

    def extend(self) -> None:
        """Take the next block into the basis and make a new one."""
        first, block = self.size, self.block
        self._reserve(first + block)
        self._basis[first : first + block] = self._next.T
        self.size = first + block
        near = slice(first - self._coupling.shape[1], first)
        self._projected[first : self.size, near] = self._coupling
        self._projected[near, first : self.size] = self._coupling.T
        w = self.solve(self._mass_next)
        own = self._mass_next.T @ w
        own = 0.5 * (own + own.T)
        self._projected[first : self.size, first : self.size] = own
        # The recurrence first, then the whole basis: one pass is then enough, as what it removes
        # is of the size of rounding errors. Alone it would amplify them in every step.
        w -= self._next @ own + _product(self._coupling, self._basis[near]).T
        mass_w = self.mass @ w
        before = _lengths(w, mass_w)
        w = self._without(w, self._components(mass_w))
        mass_w = self.mass @ w
        if (_lengths(w, mass_w) < _LOSS * before).any():
            w = self._without(w, self._components(mass_w))
            mass_w = self.mass @ w
        self._next, self._mass_next, self._coupling = self._orthonormal(w, mass_w)

    def ritz(self) -> tuple[Array, Array, Array]:
        """Return the Ritz values of S, descending, their coordinates and their residuals."""
        theta, y = np.linalg.eigh(self._projected[: self.size, : self.size])
        theta, y = theta[::-1].copy(), y[:, ::-1].copy()
        last = y[self.size - self._coupling.shape[1] :]
        return theta, y, np.linalg.norm(self._coupling @ last, axis=0)

    def vectors(self, y: Array) -> Array:
        """Return the functions ``(n, p)`` of coordinates ``(m, p)``."""
        return _product(self._basis[: self.size].T, y)

    def restart(self, theta: Array, y: Array) -> None:
        """Shrink the basis to the Ritz vectors given; the next block stays what it was."""
        kept = y.shape[1]
        self._coupling = self._coupling @ y[self.size - self._coupling.shape[1] :]
        self._basis[:kept] = self.vectors(y).T
        self._projected[:] = 0
        np.fill_diagonal(self._projected[:kept, :kept], theta)
        self.size = kept

    def widen(self, columns: int) -> None:
        """Add random directions to the next block: copies that no vector so far has seen."""
        extra = self.random.standard_normal((self._basis.shape[1], columns))
        both, mass_both = np.hstack([self._next, extra]), self.mass @ extra
        old = self.block
        for _ in range(2):
            extra = self._without(extra, self._components(mass_both))
            extra -= self._next @ (self._mass_next.T @ extra)
            mass_both = self.mass @ extra
        extra, mass_both, _ = self._orthonormal(extra, mass_both)
        both[:, old:] = extra
        self._next, self._mass_next = both, np.hstack([self._mass_next, mass_both])
        self._coupling = np.vstack([self._coupling, np.zeros((columns, self._coupling.shape[1]))])

    def _reserve(self, rows: int) -> None:
        have = len(self._basis)
        if rows <= have:
            return
        more = max(rows, 2 * have, 16 * self.block)
        basis = np.empty((more, self._basis.shape[1]))
        basis[: self.size] = self._basis[: self.size]
        projected = np.zeros((more, more))
        projected[: self.size, : self.size] = self._projected[: self.size, : self.size]
        self._basis, self._projected = basis, projected

    def _components(self, mass_w: Array) -> Array:
        return _product(self._basis[: self.size], mass_w)

    def _without(self, w: Array, components: Array) -> Array:
        # w is (n, b) in C order; its transpose times rows is the layout BLAS is quick in.
        return w - _product(components.T, self._basis[: self.size]).T

    def _orthonormal(self, w: Array, mass_w: Array) -> tuple[Array, Array, Array]:
        """Return ``Q``, ``M Q`` and ``R`` with ``w = Q R``; lost directions become random ones."""
        r = np.eye(w.shape[1])
        for _ in range(2):
            gram = w.T @ mass_w
            gram = 0.5 * (gram + gram.T)
            s, u = np.linalg.eigh(gram)
            if not np.isfinite(s).all() or s[-1] < 0 or s[0] < -1e-8 * s[-1]:
                raise GeometryError("eigenpairs: the mass matrix is not positive definite")
            lost = int((s <= _RANK**2 * s[-1]).sum()) if s[-1] > 0 else len(s)
            if lost:
                return self._replaced(w, u, s, lost, r)
            change = u / np.sqrt(s)
            w, mass_w = w @ change, mass_w @ change
            r = (np.sqrt(s)[:, None] * u.T) @ r
            if s[0] > 1e-6 * s[-1]:
                break
        return w, mass_w, r

    def _replaced(
        self, w: Array, u: Array, s: Array, lost: int, r: Array
    ) -> tuple[Array, Array, Array]:
        root = np.sqrt(np.maximum(s, 0))
        r = root[:, None] * u.T @ r
        r[:lost] = 0
        w = np.hstack(
            [self.random.standard_normal((len(w), lost)), w @ (u[:, lost:] / root[lost:])]
        )
        for _ in range(2):
            w = self._without(w, self._components(self.mass @ w))
            gram = w.T @ (self.mass @ w)
            # Cholesky from the kept columns on: they change by rounding only.
            order = np.r_[lost : w.shape[1], :lost]
            factor = np.linalg.cholesky(gram[np.ix_(order, order)])
            w[:, order] = np.linalg.solve(factor, w[:, order].T).T
        return w, self.mass @ w, r


def _lengths(w: Array, mass_w: Array) -> Array:
    return np.sqrt(np.maximum((w * mass_w).sum(0), 0))


def _product(a: Array, b: Array) -> Array:
    # torch's BLAS is twice as fast as numpy's on these tall thin shapes.
    return (torch.from_numpy(a) @ torch.from_numpy(b)).numpy()


def lowest(
    lanczos: BlockLanczos,
    wanted: int,
    spare: int,
    tolerance: float,
    limit: int,
    steps: int,
    least: int = 0,
) -> tuple[Array, Array, Array, int]:
    """Iterate until ``wanted`` Ritz pairs are converged and ``spare`` more nearly so.

    A pair is converged when its residual is at most ``tolerance`` of its value, nearly so at a
    thousand times that, after ``least`` steps or more. The basis is restarted when it reaches
    ``limit`` vectors.
    Returns the values of S, the coordinates, the relative residuals and the steps made.
    """
    total = wanted + spare
    allowed = np.full(total, tolerance)
    allowed[wanted:] *= 1e3
    made, check, before = 0, least, None
    while True:
        lanczos.extend()
        made += 1
        full = lanczos.size + lanczos.block > limit
        if lanczos.size < total + lanczos.block or (made < check and not full):
            continue
        theta, y, residual = lanczos.ritz()
        relative = residual / np.abs(theta)
        far = np.log(max(float((relative[:total] / allowed).max()), 1e-300))
        if far <= 0 or made >= steps:
            return theta, y, relative, made
        # The last pair loses digits at a steady rate: look again when it may be done.
        rate = (before[1] - far) / (made - before[0]) if before else far / 2
        check = made + max(1, min(int(far / rate), 8)) if rate > 0 else made + 2
        before = made, far
        if full:
            kept = min(total + (limit - total) // 3, lanczos.size)
            lanczos.restart(theta[:kept], y[:, :kept])
