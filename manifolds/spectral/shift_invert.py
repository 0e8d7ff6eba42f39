"""Solvers of a sparse pencil near the lower end of its spectrum, and the count that checks them.

Each takes a :class:`Pencil` and k, and returns a function of the number of guards wanted and of
the copies found missing, which gives ascending eigenvalues and M-orthonormal functions. Float64
numpy.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import scipy.sparse.linalg
from scipy.sparse.csgraph import connected_components

from darboux._checks import ConvergenceError, GeometryError
from darboux.manifolds.spectral.factor import Array, Factor, Matrix, factorise, inertia
from darboux.manifolds.spectral.lanczos import BlockLanczos, lowest

BLOCK = 8
# Equal components share all eigenvalues: a block starts as wide as there are, up to this.
_WIDEST = 64
# Directions added to the search show no new copies before this many steps.
_FRESH = 8
_TOLERANCE = 1e-12
_STEPS = 400
ROUNDS = 10
_BASIS_BYTES = 2e9


class Pencil:
    """The two matrices and a factor of ``K - σM`` with σ below the spectrum, near its lower end."""

    def __init__(self, stiffness: Matrix, mass: Matrix, method: str):
        self.stiffness, self.mass, self.method = stiffness, mass, method
        self.size = len(mass.diagonal())
        self.components = connected_components(stiffness, directed=False)[0]
        # The highest eigenvalue is a few times tr K / tr M, and in two dimensions λ ~ k.
        total = np.abs(stiffness.diagonal()).sum() / mass.diagonal().sum()
        self.scale = max(total, np.finfo(float).tiny) / self.size
        self.factor: Factor

    def start(self, k: int) -> None:
        """Factor at a first guess: below zero, or the potential if K has one, by a part of λ_k."""
        step = 0.05 * self.scale * k
        try:
            self.factor = factorise(self.stiffness, self.mass, -step, self.method)
        except GeometryError:
            below = (self.stiffness.sum(1) / self.mass.diagonal()).min()
            self.shift(min(float(below), 0.0), step)

    def shift(self, base: float, step: float) -> None:
        """Factor at ``base - step``, or as much further down as positive definiteness asks."""
        for _ in range(_STEPS):
            try:
                self.factor = factorise(self.stiffness, self.mass, base - step, self.method)
                return
            except GeometryError:
                step *= 4
                if step > 1e3 * (self.scale * self.size + abs(base)):
                    break
        raise GeometryError(
            f"eigenpairs: K - σM is not positive definite even at σ = {base - step:.3g}: "
            "the mass matrix is not positive definite"
        )

    def values(self, theta: Array) -> Array:
        return self.factor.shift + 1 / theta


# Takes the number of guards and of missing copies, gives ascending values and their functions.
Solver = Callable[[int, int], tuple[Array, Array]]


def lanczos(pencil: Pencil, k: int) -> Solver:
    """Return a solver that goes on where it stopped, with new directions where copies lack."""
    n, mass, random = pencil.size, pencil.mass, np.random.default_rng(0)
    pencil.start(k)
    state: list[BlockLanczos] = []

    def start(block: Array) -> None:
        state[:] = [BlockLanczos(pencil.factor.solve, mass, block, random)]

    def solve(guard: int, missing: int) -> tuple[Array, Array]:
        total = k + guard
        limit = min(max(3 * total, int(_BASIS_BYTES / (8 * n))), n - 2 * BLOCK)
        if not state:
            start(random.standard_normal((n, min(max(BLOCK, pencil.components), _WIDEST))))
        elif missing:
            # A block holds no more copies of an eigenvalue than it has columns.
            theta, y, _ = state[0].ritz()
            state[0].restart(theta[:total], y[:, :total])
            state[0].widen(min(missing, total))
        steps, worst, made = 1 + 2 * total // BLOCK, float("nan"), 0
        for _ in range(ROUNDS):
            theta, y, relative, made = lowest(
                state[0], k, guard, _TOLERANCE, limit, steps, _FRESH if missing else 0
            )
            values = pencil.values(theta[:total])
            if made < steps:
                return values, state[0].vectors(y[:, :total])
            steps, worst = _STEPS, float(relative[:k].max())
            spread = values[-1] - values[0]
            if values[0] - pencil.factor.shift > 4 * spread > 0:
                # A shift that far down blurs the wanted values. Factor again nearer, and go on
                # from the best block.
                mixed = y[:, :total] @ random.standard_normal((total, BLOCK))
                pencil.shift(float(values[0]), 0.1 * float(spread))
                start(state[0].vectors(mixed))
                steps = 1 + 2 * total // BLOCK
        raise ConvergenceError(
            f"eigenpairs: lanczos left a residual of {worst:.1e}, expected {_TOLERANCE:.0e}",
            worst,
            made,
        )

    return solve


def arpack(pencil: Pencil, k: int) -> Solver:
    """Return ARPACK in shift-invert mode; with a tolerance above 0 it loses copies."""
    pencil.start(k)

    def solve(guard: int, missing: int) -> tuple[Array, Array]:
        guard = min(guard + missing, pencil.size - 1 - k)
        inverse = scipy.sparse.linalg.LinearOperator(
            shape=pencil.stiffness.shape,
            matvec=lambda x: pencil.factor.solve(x.reshape(-1, 1))[:, 0],  # pyright: ignore[reportCallIssue]
            dtype=np.float64,
        )
        try:
            values, functions = scipy.sparse.linalg.eigsh(
                pencil.stiffness,
                k + guard,
                pencil.mass,
                sigma=pencil.factor.shift,
                OPinv=inverse,
                tol=0,
                v0=np.random.default_rng(0).standard_normal(pencil.size),
            )
        except scipy.sparse.linalg.ArpackError as error:
            raise ConvergenceError(f"eigenpairs: arpack: {error}") from None
        order = np.argsort(values)
        return values[order], functions[:, order]

    return solve


def lobpcg(pencil: Pencil, k: int) -> Solver:
    """Return LOBPCG preconditioned by the factor, from a random block."""
    pencil.start(k)

    def solve(guard: int, missing: int) -> tuple[Array, Array]:
        total = min(k + guard + missing, pencil.size - 1)
        start = np.random.default_rng(0).standard_normal((pencil.size, total))
        scale = pencil.scale * k * np.sqrt(pencil.mass.diagonal().mean())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values, functions = scipy.sparse.linalg.lobpcg(
                pencil.stiffness,
                start,
                pencil.mass,
                pencil.factor.solve,
                tol=1e-10 * scale,
                maxiter=_STEPS,
                largest=False,
            )[:2]
        residual = pencil.stiffness @ functions - (pencil.mass @ functions) * values
        worst = float(np.linalg.norm(residual[:, :k], axis=0).max())
        if not worst <= 1e-5 * scale:
            raise ConvergenceError(
                f"eigenpairs: lobpcg left a residual of {worst:.1e}", worst, _STEPS
            )
        order = np.argsort(values)
        return values[order], functions[:, order]

    return solve


def count(pencil: Pencil, values: Array, k: int) -> tuple[int, int | None]:
    """Return how many values found, and how many by inertia, lie below the widest gap above k."""
    gaps = np.diff(values[k - 1 :]) / np.maximum(np.abs(values[k:]), pencil.scale)
    last = k - 1 + int(np.argmax(gaps))
    width = values[last + 1] - values[last]
    middle = values[last] + 0.5 * width
    return last + 1, inertia(pencil.stiffness, pencil.mass, middle, 0.5 * width)
