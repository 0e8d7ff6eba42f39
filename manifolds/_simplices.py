"""The combinatorics of simplicial complexes: faces, boundary, orientation, components.

Everything here depends on the cells ``(m, d + 1)`` and on the gluing alone, never on where the
vertices are, so it is computed once and shared by all meshes with the same cells.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, wraps
from itertools import combinations
from math import comb
from typing import ParamSpec, TypeVar

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

P = ParamSpec("P")
T = TypeVar("T")


def constant(f: Callable[P, T]) -> Callable[P, T]:
    """Run ``f`` outside every transform and graph: what it returns is kept for later calls."""

    @wraps(f)
    def outside(*args: P.args, **kwargs: P.kwargs) -> T:
        with temporarily_clear_interpreter_stack(), torch.inference_mode(False), torch.no_grad():
            return f(*args, **kwargs)

    return outside


def unique_rows(rows: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the distinct rows of ``(r, k)`` with entries below ``size``, and where each went."""
    width = rows.shape[1]
    if size**width >= 2**63:
        return torch.unique(rows, dim=0, return_inverse=True)
    powers = [size**j for j in reversed(range(width))]
    keys = sum((rows[:, j] * p for j, p in enumerate(powers)), torch.zeros_like(rows[:, 0]))
    kept, where = torch.unique(keys, return_inverse=True)
    return torch.stack([kept // p % size for p in powers], 1), where


def labels(pairs: Tensor, size: int) -> tuple[int, Tensor]:
    """Return the number of connected components of a graph and the component of each node."""
    i, j = pairs.detach().cpu().numpy().T
    graph = coo_array((np.ones(len(i), bool), (i, j)), shape=(size, size))
    count, label = connected_components(graph, directed=False)
    return int(count), torch.from_numpy(label.astype(np.int64)).to(pairs.device)


def first_seen(which: Tensor, size: int) -> Tensor:
    """Return for each of ``size`` labels the first position in ``which`` that carries it."""
    positions = torch.arange(which.numel(), device=which.device)
    start = torch.full((size,), which.numel(), device=which.device)
    return start.scatter_reduce(0, which.reshape(-1), positions, "amin")


@dataclass(frozen=True, eq=False)
class Topology:
    """The cells ``(m, d + 1)`` of a mesh with ``vertices`` vertices, some of them glued.

    ``unknown (vertices,)`` numbers the points of the glued space. A face is known by its glued
    corners, so no two faces of the glued space may have the same corners.
    """

    cells: Tensor
    vertices: int
    unknown: Tensor
    points: int

    @property
    def dim(self) -> int:
        return self.cells.shape[1] - 1

    @cached_property
    @constant
    def glued(self) -> Tensor:
        """The cells with glued corners ``(m, d + 1)``."""
        return self.unknown[self.cells]

    @constant
    def faces(self, corners: int, glued: bool = True) -> tuple[Tensor, Tensor]:
        """Return the faces with so many corners ``(f, corners)`` and those of each cell.

        The second tensor ``(m, C(d + 1, corners))`` follows :func:`itertools.combinations`.
        """
        cells = self.glued if glued else self.cells
        subsets = list(combinations(range(self.dim + 1), corners))
        rows = torch.stack([cells[:, list(s)] for s in subsets], 1)
        rows = rows.sort(-1).values.reshape(-1, corners)
        found, where = unique_rows(rows, self.points if glued else self.vertices)
        return found, where.reshape(-1, comb(self.dim + 1, corners))

    @cached_property
    @constant
    def edges(self) -> tuple[Tensor, Tensor]:
        return self.faces(2)

    @cached_property
    @constant
    def facets(self) -> tuple[Tensor, Tensor]:
        """The faces of codimension one and, in column j, those without corner ``d - j``."""
        return self.edges if self.dim == 2 else self.faces(self.dim)

    @cached_property
    @constant
    def sharing(self) -> Tensor:
        """How many cells each facet has ``(f,)``: one on the boundary, two inside."""
        return torch.bincount(self.facets[1].reshape(-1), minlength=self.facets[0].shape[0])

    @cached_property
    @constant
    def boundary(self) -> Tensor:
        """The facets on the boundary by their glued corners ``(b, d)``."""
        return self.facets[0][self.sharing == 1]

    @constant
    def representatives(self, corners: int, kept: Tensor | None = None) -> Tensor:
        """Return the vertices ``(f, corners)`` of one face of the mesh for each glued face."""
        found, which = self.edges if corners == 2 else self.faces(corners)
        subsets = torch.tensor(list(combinations(range(self.dim + 1), corners)))
        places = first_seen(which, found.shape[0])
        places = places if kept is None else places[kept]
        cell, subset = places // len(subsets), places % len(subsets)
        local = subsets.to(cell.device)[subset]
        return self.cells[cell[:, None], local]

    @cached_property
    @constant
    def euler_characteristic(self) -> int:
        counts = [self.points, self.edges[0].shape[0]]
        counts += [self.faces(k)[0].shape[0] for k in range(3, self.dim + 1)]
        counts = [*counts[: self.dim], self.cells.shape[0]]
        return sum((-1) ** k * count for k, count in enumerate(counts))

    @cached_property
    @constant
    def components(self) -> tuple[int, Tensor]:
        """The number of connected components and that of each glued point."""
        return labels(self.edges[0], self.points)

    @cached_property
    @constant
    def neighbours(self) -> tuple[Tensor, Tensor]:
        """The pairs of cells across the inner facets ``(f, 2)``, and the sign of each facet.

        The sign is +1 where the two cells induce opposite orientations of the facet, as they do
        when they are oriented alike, and -1 where they induce the same.
        """
        which = self.facets[1]
        signs = torch.stack([self._induced(j) for j in range(self.dim + 1)], 1).reshape(-1)
        order = torch.argsort(which.reshape(-1), stable=True)
        inner = self.sharing == 2
        start = (torch.cumsum(self.sharing, 0) - self.sharing)[inner]
        one, two = order[start], order[start + 1]
        return torch.stack([one, two], 1) // which.shape[1], -signs[one] * signs[two]

    def _induced(self, column: int) -> Tensor:
        # (-1)^i for the missing corner i, times the parity of sorting the others
        missing = self.dim - column
        rest = self.glued[:, [k for k in range(self.dim + 1) if k != missing]]
        sign = torch.full_like(rest[:, 0], (-1) ** missing)
        for i, j in combinations(range(self.dim), 2):
            sign = torch.where(rest[:, i] > rest[:, j], -sign, sign)
        return sign

    @cached_property
    @constant
    def orientation(self) -> Tensor | None:
        """Signs ``(m,)`` that orient all cells alike, ``None`` where none do.

        In the double cover a cell and its mirror image lie in one component exactly where the
        space is not orientable. The first cell of each component keeps its orientation.
        """
        m = self.cells.shape[0]
        cells, signs = self.neighbours
        one, two = cells.unbind(1)
        turned = torch.where(signs > 0, 0, m)
        sheets = torch.stack(
            [torch.cat([one, one + m]), torch.cat([two + turned, two + m - turned])]
        )
        count, label = labels(sheets.T, 2 * m)
        if (label[:m] == label[m:]).any():
            return None
        first = first_seen(label, count)
        return torch.where(first[label[:m]] < first[label[m:]], 1, -1)
