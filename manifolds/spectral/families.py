"""Operators that depend on a parameter: their derivatives, and their spectra along a path."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import scipy.optimize
import torch
from torch import Tensor

from darboux._checks import ConvergenceError
from darboux.manifolds.spectral.eigen import Spectrum, eigenpairs
from darboux.manifolds.spectral.operator import Operator, Sparse
from darboux.manifolds.spectral.perturbation import Matrix

Family = Callable[[Tensor], Operator]


class Derivatives(NamedTuple):
    r"""An operator and the Taylor coefficients of a family through it.

    The second ones are halves of second derivatives, as ``perturb`` takes them.
    """

    operator: Operator
    d_stiffness: Matrix
    d_mass: Matrix
    d2_stiffness: Matrix
    d2_mass: Matrix


def derivatives(family: Family, at: Tensor | float, direction: Tensor | None = None) -> Derivatives:
    r"""Differentiate ``family`` twice at ``at`` along ``direction``, by nested forward mode.

    ``at`` is a number or any tensor: a parameter, the vertices of a mesh. The result describes
    ``family(at + eps * direction)``; ``direction`` is 1 unless told. A sparse family must keep its
    pattern.

    >>> def family(t):
    ...     return Operator(torch.diag(torch.stack([t, t * t])), torch.eye(2))
    >>> derivatives(family, 3.0).d2_stiffness.diagonal()
    tensor([0., 1.], dtype=torch.float64)
    """
    point = torch.as_tensor(at, dtype=None if isinstance(at, Tensor) else torch.float64).detach()
    along = torch.ones_like(point) if direction is None else direction.detach()
    if along.shape != point.shape:
        raise ValueError(
            f"derivatives: direction has shape {tuple(along.shape)}, expected "
            f"{tuple(point.shape)} to match at"
        )
    frames: list[Operator] = []

    def numbers(t: Tensor) -> tuple[Tensor, Tensor]:
        operator = family(t)
        frames.append(operator)
        both = (operator.stiffness, operator.mass)
        stiffness, mass = (a.values if isinstance(a, Sparse) else a for a in both)
        return stiffness, mass

    def rates(t: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        value, rate, *_ = torch.func.jvp(numbers, (t,), (along,))
        return value, rate

    (value, first), (_, second) = torch.func.jvp(rates, (point,), (along,))[:2]
    frame = frames[0]

    def wrap(like: Matrix, x: Tensor) -> Matrix:
        return Sparse(like.pattern, x) if isinstance(like, Sparse) else x

    stiffness, mass = (
        [wrap(like, x) for x in (value[i], first[i], 0.5 * second[i])]
        for i, like in enumerate((frame.stiffness, frame.mass))
    )
    operator = Operator(stiffness[0], mass[0], frame.space)
    return Derivatives(operator, stiffness[1], mass[1], stiffness[2], mass[2])


class Track(NamedTuple):
    """A spectrum along a path: ``values (T, k)`` and ``functions (T, n, k)`` at ``ts (T,)``.

    Column i is one branch throughout. ``overlaps (T, k)`` are the squared M-overlaps with the point
    before, 1 at the first.
    """

    ts: Tensor
    values: Tensor
    functions: Tensor
    overlaps: Tensor


def track(
    family: Family,
    ts: Tensor,
    k: int,
    *,
    solve: Callable[[Operator, int], Spectrum] | None = None,
    extra: int | None = None,
    overlap: float = 0.7,
    halvings: int = 8,
) -> Track:
    r"""Follow the ``k`` lowest eigenpairs of ``family(ts[0])`` along the path, through crossings.

    Branches are matched by :math:`\langle\varphi_a(t), \varphi_b(t')\rangle_M^2`, by the best
    assignment; multiple eigenvalues are matched as a whole and their functions rotated to those of
    the point before. A step on which some branch keeps less than ``overlap`` is halved, up to
    ``halvings`` times. Where two branches avoid each other at a distance small against the step,
    labels cross, as without the coupling.

    ``solve(operator, m)`` gives the m lowest eigenpairs, :func:`eigenpairs` unless told; ``extra``
    more than k are computed, from which branches may come down. Raises ``ConvergenceError`` where
    a branch is lost: it left the states computed, or the path is not continuous.
    """
    if ts.dim() != 1 or len(ts) < 1:
        raise ValueError(f"track: ts has shape {tuple(ts.shape)}, expected (T,)")
    if k < 1:
        raise ValueError(f"track: k is {k}, expected at least 1")
    more = max(4, k // 2) if extra is None else extra
    run = _Run(family, solve or eigenpairs, k + more, overlap)
    here = run.at(ts[0])
    branches = _Branches(here.values[:k], here.functions[:, :k], here.functions.new_ones(k))
    found = [branches]
    with torch.no_grad():
        for i, (a, b) in enumerate(itertools.pairwise(ts)):
            there = run.at(b)
            if i == 0:
                found[0] = branches = branches._replace(functions=_split(here, there, k))
            branches = run.advance(here, branches, there, a, b, halvings)
            here = there
            found.append(branches)
    columns = [torch.stack(c) for c in zip(*found, strict=True)]
    return Track(ts, *columns)


class _Branches(NamedTuple):
    values: Tensor
    functions: Tensor
    overlaps: Tensor


class _Point(NamedTuple):
    values: Tensor
    functions: Tensor
    mass: Matrix
    clusters: Sequence[slice]


@dataclass(frozen=True)
class _Run:
    family: Family
    solve: Callable[[Operator, int], Spectrum]
    count: int
    overlap: float

    def at(self, t: Tensor) -> _Point:
        operator = self.family(t)
        spectrum = self.solve(operator, min(self.count, operator.size))
        values = spectrum.values.detach()
        return _Point(values, spectrum.functions.detach(), operator.mass, spectrum.clusters)

    def advance(
        self, here: _Point, branches: _Branches, there: _Point, a: Tensor, b: Tensor, halvings: int
    ) -> _Branches:
        moved = _match(branches, here, there)
        if bool((moved.overlaps >= self.overlap).all()):
            return moved
        if halvings == 0:
            worst = int(moved.overlaps.argmin())
            raise ConvergenceError(
                f"track: branch {worst} keeps an overlap of {float(moved.overlaps[worst]):.3f} "
                f"from t = {float(a):.6g} to {float(b):.6g}; take a larger extra if it has left "
                f"the {self.count} states computed"
            )
        half = 0.5 * (a + b)
        middle = self.at(half)
        first = self.advance(here, branches, middle, a, half, halvings - 1)
        second = self.advance(middle, first, there, half, b, halvings - 1)
        return second._replace(overlaps=torch.minimum(first.overlaps, second.overlaps))


def _overlaps(left: Tensor, here: _Point, there: _Point) -> Tensor:
    # in the mean of the two masses
    right = there.functions
    return 0.5 * (left.mT @ (here.mass @ right) + left.mT @ (there.mass @ right))


def _rotation(overlaps: Tensor) -> Tensor:
    # the matrix with orthonormal rows or columns that is nearest
    u, _, v = torch.linalg.svd(overlaps, full_matrices=False)
    return u @ v


def _match(branches: _Branches, here: _Point, there: _Point) -> _Branches:
    overlaps = _overlaps(branches.functions, here, there)
    weights = torch.empty_like(overlaps)
    for cluster in there.clusters:
        weights[:, cluster] = overlaps[:, cluster].square().sum(-1, keepdim=True)
    rows, columns = scipy.optimize.linear_sum_assignment(-weights.cpu().numpy())
    values, functions = torch.empty_like(branches.values), torch.empty_like(branches.functions)
    kept = torch.empty_like(branches.overlaps)
    for cluster in there.clusters:
        mine = rows[(columns >= cluster.start) & (columns < cluster.stop)]
        if len(mine):
            index = torch.as_tensor(mine, device=values.device)
            rotation = _rotation(overlaps[index, cluster])
            functions[:, index] = there.functions[:, cluster] @ rotation.mT
            values[index] = rotation.square() @ there.values[cluster]
            kept[index] = weights[index, cluster.start]
    return _Branches(values, functions, kept)


def _split(here: _Point, there: _Point, k: int) -> Tensor:
    """Return the first k functions, multiple ones in the basis to which the next point tends."""
    overlaps = _overlaps(here.functions, here, there)
    functions = here.functions.clone()
    for cluster in here.clusters:
        size = cluster.stop - cluster.start
        if size > 1:
            best = overlaps[cluster].square().sum(0).topk(size).indices.sort().values
            functions[:, cluster] = here.functions[:, cluster] @ _rotation(
                overlaps[cluster][:, best]
            )
    return functions[:, :k]
