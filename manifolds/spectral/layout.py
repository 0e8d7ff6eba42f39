"""Where the nodes of finite elements are and where the entries of the cells go.

What depends on the cells alone is found once, and kept as long as their topology lives.
"""

from dataclasses import dataclass
from itertools import combinations
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from darboux.manifolds._simplices import Topology, constant, unique_rows
from darboux.manifolds.spectral.elements import Lagrange, lagrange
from darboux.manifolds.spectral.operator import Pattern, Sparse


@dataclass(frozen=True, eq=False)
class Assembly:
    """Where the entries of the cells go.

    ``edge (P, m)`` is the edge of each pair of nodes of a cell, ``corner (a, m)`` the point of
    each node; ``ends (2, e)`` the points of each edge, ``loops`` the edges with equal ends if
    there are any. ``source (nnz,)`` points into the edge values followed by the diagonal.
    """

    corner: Tensor
    edge: Tensor
    ends: Tensor
    loops: Tensor | None
    size: int
    pattern: Pattern
    source: Tensor

    def sum_edges(self, entries: Tensor) -> Tensor:
        total = entries.new_zeros(self.ends.shape[1])
        return total.scatter_add(0, self.edge.reshape(-1), entries.reshape(-1))

    def sum_corners(self, entries: Tensor) -> Tensor:
        total = entries.new_zeros(self.size)
        return total.scatter_add(0, self.corner.reshape(-1), entries.reshape(-1))

    def sum_rows(self, edges: Tensor) -> Tensor:
        total = edges.new_zeros(self.size)
        return total.scatter_add(0, self.ends.reshape(-1), torch.cat([edges, edges]))

    def matrix(self, edges: Tensor, diagonal: Tensor) -> Sparse:
        values = torch.cat([edges, diagonal]).index_select(0, self.source)
        return Sparse(self.pattern, values)


@dataclass(frozen=True, eq=False)
class Layout:
    """The nodes of one kind of elements on one topology, and how to assemble them."""

    nodes: Tensor  # (a, m) the nodes of each cell
    index: Tensor  # (nodes,) the unknown of each node, -1 on a Dirichlet boundary
    rim: Tensor  # (points,) whether a point is on the boundary
    assembly: Assembly


_LAYOUTS: WeakKeyDictionary[Topology, dict[tuple[int, str], Layout]] = WeakKeyDictionary()


def layout(topology: Topology, order: int, boundary: str) -> Layout:
    """Return the layout of elements of this order; found at the first call."""
    known = _LAYOUTS.setdefault(topology, {})
    if (order, boundary) not in known:
        known[order, boundary] = _find(topology, order, boundary)
    return known[order, boundary]


@constant
def _find(topology: Topology, order: int, boundary: str) -> Layout:
    element = lagrange(topology.dim, order)
    nodes, count = _number(topology, element, glued=False)
    every = torch.arange(topology.vertices, device=nodes.device)
    if torch.equal(topology.unknown, every):
        corner, size = nodes, count
    else:
        corner, size = _number(topology, element, glued=True)
    point = torch.empty(count, dtype=torch.int64, device=nodes.device)
    point[nodes.reshape(-1)] = corner.reshape(-1)
    rim = _rim(topology, element, corner, size)
    edges = topology.edges if order == 1 else None
    assembly = assembly_of(corner, size, rim, boundary, edges)
    index = point if boundary == "neumann" else _renumber(rim)[point]
    return Layout(nodes, index, rim, assembly)


def _renumber(rim: Tensor) -> Tensor:
    return torch.where(rim, -1, torch.cumsum(~rim, 0) - 1)


@constant
def assembly_of(
    corner: Tensor, size: int, rim: Tensor, boundary: str,
    edges: tuple[Tensor, Tensor] | None = None,
) -> Assembly:  # fmt: skip
    """Return the assembly for cells with the points ``corner (a, m)``.

    ``rim (points,)`` says which points a Dirichlet condition takes away.
    """
    if edges is None:
        i, j = np.triu_indices(corner.shape[0], 1)
        pairs = torch.stack([corner[i], corner[j]], -1).sort(-1).values
        ends, edge = unique_rows(pairs.reshape(-1, 2), size)
        ends, edge = ends.T.contiguous(), edge.reshape(pairs.shape[:2])
    else:
        ends, edge = edges[0].T.contiguous(), edges[1].T.contiguous()
    count, every = ends.shape[1], torch.arange(size, device=ends.device)
    pattern, where = Pattern.of(
        torch.cat([ends[0], ends[1], every]), torch.cat([ends[1], ends[0], every]), size
    )
    source = torch.empty_like(pattern.rows)
    numbers = torch.arange(count, device=ends.device)
    # the diagonal last: it takes the place of an edge with equal ends
    source[where[: 2 * count]] = torch.cat([numbers, numbers])
    source[where[2 * count :]] = count + every
    if boundary == "dirichlet":
        pattern, taken = pattern.restrict(torch.nonzero(~rim)[:, 0])
        source = source[taken]
    loops = ends[0] == ends[1]
    return Assembly(corner, edge, ends, loops if loops.any() else None, size, pattern, source)


def _number(topology: Topology, element: Lagrange, glued: bool) -> tuple[Tensor, int]:
    """Return the nodes ``(a, m)`` of the cells and their number; vertices come first.

    Nodes inside a face are counted from its corners in ascending order, so that all cells with
    the face agree.
    """
    cells = topology.glued if glued else topology.cells
    size, p = topology.points if glued else topology.vertices, element.order
    nodes = cells.new_empty(len(element.exponents), cells.shape[0])
    for corners in range(1, min(p, topology.dim + 1) + 1):
        if corners == 1:
            found, which = size, cells
        else:
            faces, which = topology.faces(corners, glued)
            found = faces.shape[0]
        start = 0 if corners == 1 else size
        inside = 0
        for column, face in enumerate(combinations(range(topology.dim + 1), corners)):
            local = dict(element.faces())[face]
            inside = len(local)
            exponents = torch.tensor(element.exponents[local][:, list(face)], device=cells.device)
            order = cells[:, list(face)].argsort(-1)
            powers = (p + 1) ** torch.arange(corners, device=cells.device)
            names = (exponents * powers).sum(-1)
            rank = torch.empty(int(names.max()) + 1, dtype=torch.int64, device=cells.device)
            rank[names] = torch.arange(inside, device=cells.device)
            turned = (exponents[:, order] * powers).sum(-1)  # (inside, m)
            nodes[local] = start + which[:, column] * inside + rank[turned]
        size = start + found * inside
    return nodes, size


def _rim(topology: Topology, element: Lagrange, corner: Tensor, size: int) -> Tensor:
    rim = torch.zeros(size, dtype=torch.bool, device=corner.device)
    on_rim = (topology.sharing == 1)[topology.facets[1]]
    for column in range(topology.dim + 1):
        on_facet = np.flatnonzero(element.exponents[:, topology.dim - column] == 0)
        cells = torch.nonzero(on_rim[:, column])[:, 0]
        rim[corner[on_facet][:, cells].reshape(-1)] = True
    return rim
