r"""Simplicial meshes of curves, surfaces and solids in R^N: checks, topology, measures.

A mesh is its vertices ``(n, N)``, which may carry gradients, and its cells ``(m, d + 1)``. Vertices
may be *glued*: they then share one unknown of any function space on the mesh, and the mesh
stands for the quotient by isometries of its boundary (a flat torus, the Klein bottle, the
projective plane, a hyperbolic surface from a polygon).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from darboux import _checks
from darboux._checks import GeometryError
from darboux.manifolds._simplices import Topology, constant
from darboux.manifolds.linalg import dot

Projection = Callable[[Tensor], Tensor]  # (..., N) -> (..., N)
Columns = list[list[Tensor]]  # d vectors by their N components


@dataclass(frozen=True, eq=False, repr=False)
class Mesh:
    """A mesh of dimension d = 1, 2 or 3 in R^N.

    ``vertices (n, N)``, ``cells (m, d + 1)`` int64; ``glue (n,)`` int64, if given, is equal on
    vertices that are one point. ``topology`` is found from the cells, and kept by :meth:`move`.

    Raises ``TypeError`` or ``ValueError`` for wrong types, shapes, indices or NaN, for vertices
    without a cell and facets with more than two, and ``GeometryError`` for cells without volume.
    """

    vertices: Tensor
    cells: Tensor
    glue: Tensor | None = None
    topology: Topology = field(default=None)  # pyright: ignore[reportAssignmentType]

    def __post_init__(self) -> None:
        _check_arrays(self)
        if self.topology is None:
            object.__setattr__(self, "topology", _topology(self))
        if _checks.checks_values():
            _checks.check_finite("Mesh", vertices=self.vertices)
            flat = _checks.values(_flat_cells(self.vertices, self.cells))
            if flat.any():
                raise GeometryError(
                    f"Mesh: cells {_some(flat)} have no volume, expected corners in general "
                    "position"
                )

    def __repr__(self) -> str:
        (n, space), (m, corners) = self.vertices.shape, self.cells.shape
        glued = "" if self.glue is None else f" glued to {self.topology.points}"
        return f"Mesh({m} cells of dimension {corners - 1}, {n} vertices{glued} in R^{space})"

    def move(self, vertices: Tensor) -> "Mesh":
        """Return the mesh with the same cells and other vertices; shares all that is symbolic."""
        return Mesh(vertices, self.cells, self.glue, self.topology)

    def to(self, *, dtype: torch.dtype | None = None, device: Any = None) -> "Mesh":
        """Return the mesh in another dtype or on another device."""
        vertices = self.vertices.to(device=device, dtype=dtype)
        if vertices.device == self.vertices.device:
            return self.move(vertices)
        glue = None if self.glue is None else self.glue.to(vertices.device)
        return Mesh(vertices, self.cells.to(vertices.device), glue)

    # -- topology -------------------------------------------------------------------------

    @property
    def dim(self) -> int:
        return self.topology.dim

    @property
    def edges(self) -> Tensor:
        """The edges ``(e, 2)`` by vertices; one of them for each edge of a glued space."""
        return self.topology.representatives(2)

    @property
    def boundary(self) -> Tensor:
        """The facets ``(b, d)`` that have one cell only, by vertices."""
        return self.topology.representatives(self.dim, self.topology.sharing == 1)

    @property
    def components(self) -> int:
        """The number of connected components."""
        return self.topology.components[0]

    @property
    def component_of(self) -> Tensor:
        """The component ``(n,)`` of each vertex, numbered from zero."""
        return self.topology.components[1][self.topology.unknown]

    @property
    def euler_characteristic(self) -> int:
        return self.topology.euler_characteristic

    @property
    def orientable(self) -> bool:
        return self.topology.orientation is not None

    @property
    def oriented(self) -> bool:
        """Whether neighbouring cells are oriented alike."""
        return bool((self.topology.neighbours[1] > 0).all())

    def orient(self) -> "Mesh":
        """Return the mesh with cells turned where needed, so that all are oriented alike.

        The first cell of each component keeps its orientation. Raises ``GeometryError`` where
        the space is not orientable.
        """
        signs = self.topology.orientation
        if signs is None:
            raise GeometryError("Mesh.orient: this mesh is not orientable (a one-sided surface)")
        turned = torch.cat([self.cells[:, :-2], self.cells[:, -2:].flip(-1)], -1)
        return Mesh(self.vertices, torch.where(signs[:, None] > 0, self.cells, turned), self.glue)

    def check_oriented(self, where: str = "Mesh") -> None:
        """Raise ``GeometryError`` unless neighbouring cells are oriented alike."""
        cells, signs = self.topology.neighbours
        if (signs < 0).any():
            pairs = cells[signs < 0][:5].tolist()
            hint = "orient() turns them" if self.orientable else "it is not orientable"
            raise GeometryError(
                f"{where}: {int((signs < 0).sum())} pairs of neighbouring cells are oriented "
                f"against each other, among them {pairs}; {hint}"
            )

    # -- measures -------------------------------------------------------------------------

    def volumes(self) -> Tensor:
        """Return the lengths, areas or volumes ``(m,)`` of the cells."""
        return root_gram(cell_sides(self.vertices, self.cells)) / math.factorial(self.dim)

    def vertex_areas(self) -> Tensor:
        """Return the area (length, volume) of each vertex ``(n,)``: a (d + 1)-th of its cells."""
        share = self.volumes() / (self.dim + 1)
        return self._per_vertex(share[:, None].expand(-1, self.dim + 1))

    def normals(self) -> Tensor:
        """Return the unit normals ``(m, 3)`` of an oriented triangle mesh in R^3."""
        cross = self._normal_vectors("normals")
        return cross / dot(cross, cross).sqrt()[:, None]

    def vertex_normals(self) -> Tensor:
        """Return unit normals ``(n, 3)`` at the vertices, weighted by area."""
        cross = self._normal_vectors("vertex_normals")
        total = self._per_vertex(cross[:, None].expand(-1, 3, -1))
        return total / dot(total, total).sqrt()[:, None]

    def _normal_vectors(self, method: str) -> Tensor:
        if (self.dim, self.vertices.shape[1]) != (2, 3):
            raise ValueError(
                f"Mesh.{method}: cells of dimension {self.dim} in R^{self.vertices.shape[1]}, "
                "expected triangles in R^3"
            )
        self.check_oriented(f"Mesh.{method}")
        u, v = (torch.stack(side, -1) for side in cell_sides(self.vertices, self.cells))
        return torch.linalg.cross(u, v)

    def angles(self) -> Tensor:
        """Return the angles ``(m, 3)`` of the triangles at their corners."""
        self._needs_triangles("angles")
        u, v = sides = cell_sides(self.vertices, self.cells)
        w = [b - a for a, b in zip(u, v, strict=True)]
        cosines = torch.stack([inner(u, v), -inner(u, w), inner(v, w)], -1)
        return torch.atan2(root_gram(sides)[:, None], cosines)

    def angle_defects(self) -> Tensor:
        r"""Return the integrated Gauss curvature ``(points,)``, one number for a glued point.

        :math:`2\pi - \sum\theta` inside and :math:`\pi - \sum\theta` on the boundary, where it is
        the turning of the boundary curve. Their sum is :math:`2\pi\chi` exactly (Gauss-Bonnet).
        """
        angles = self.angles()
        total = angles.new_full((self.topology.points,), 2 * math.pi)
        rim = self.topology.boundary.reshape(-1)
        total = total.index_fill(0, rim, math.pi)
        return total.index_add(0, self.topology.glued.reshape(-1), -angles.reshape(-1))

    def gauss_bonnet(self) -> Tensor:
        r"""Return :math:`\sum K - 2\pi\chi`, which is zero to rounding for any triangle mesh."""
        return self.angle_defects().sum() - 2 * math.pi * self.euler_characteristic

    def _needs_triangles(self, method: str) -> None:
        if self.dim != 2:
            raise ValueError(f"Mesh.{method}: cells of dimension {self.dim}, expected triangles")

    def _per_vertex(self, corners: Tensor) -> Tensor:
        t = self.topology
        total = corners.new_zeros(t.points, *corners.shape[2:])
        return total.index_add(0, t.glued.reshape(-1), corners.flatten(0, 1))[t.unknown]

    # -- refinement -----------------------------------------------------------------------

    def refine(self, project: Projection | None = None) -> "Mesh":
        """Cut every cell into 2^d by the midpoints of its edges, moved by ``project`` if given.

        Tetrahedra are cut along the shortest diagonal of their inner octahedron, so that their
        shapes do not degenerate (Bey 1995). The new vertices follow the old ones.
        """
        cells, x = self.cells, self.vertices
        if self.dim == 3:
            cells = _shortest_diagonal(x.detach(), cells)
        t = Topology(cells, x.shape[0], self.topology.unknown, self.topology.points)
        ends, which = t.faces(2, glued=False)
        middle = (x[ends[:, 0]] + x[ends[:, 1]]) / 2
        middle = middle if project is None else project(middle)
        corners = torch.cat([cells, which + x.shape[0]], 1)
        children = torch.tensor(_CHILDREN[self.dim], device=cells.device)
        glue = None
        if self.glue is not None:
            shared = torch.empty_like(ends[:, 0])
            shared[which.reshape(-1)] = t.edges[1].reshape(-1)
            glue = torch.cat([t.unknown, shared + t.points])
        return Mesh(torch.cat([x, middle]), corners[:, children].flatten(0, 1), glue)


# corners, then edge midpoints in the order of itertools.combinations: for tetrahedra
# 01 02 03 12 13 23 are 4 5 6 7 8 9, and the inner octahedron is cut along 02 - 13
_CHILDREN = {
    1: [[0, 2], [2, 1]],
    2: [[0, 3, 4], [3, 1, 5], [4, 5, 2], [3, 5, 4]],
    3: [
        *([0, 4, 5, 6], [4, 1, 7, 8], [5, 7, 2, 9], [6, 8, 9, 3]),
        *([4, 5, 6, 8], [4, 7, 5, 8], [5, 9, 6, 8], [5, 7, 9, 8]),
    ],
}


def _shortest_diagonal(x: Tensor, cells: Tensor) -> Tensor:
    # even relabellings that make the shortest diagonal the one between 02 and 13
    order = torch.tensor([[0, 1, 2, 3], [0, 2, 3, 1], [0, 3, 1, 2]], device=cells.device)
    corners = x[cells[:, order]]
    diagonal = corners[:, :, 0] + corners[:, :, 2] - corners[:, :, 1] - corners[:, :, 3]
    return cells.gather(1, order[diagonal.square().sum(-1).argmin(1)])


# -- the geometry of cells --------------------------------------------------------------------


def cell_sides(vertices: Tensor, cells: Tensor) -> Columns:
    """Return the sides from the first corner of each cell, component by component."""
    columns: Columns = [[] for _ in range(cells.shape[1] - 1)]
    index = cells.T.reshape(-1)
    for x in vertices.unbind(1):
        corners = x.index_select(0, index).unflatten(0, cells.T.shape)
        for i, column in enumerate(columns):
            column.append(corners[i + 1] - corners[0])
    return columns


def inner(u: list[Tensor], v: list[Tensor]) -> Tensor:
    """Return the inner product of two vectors given by their components."""
    total = u[0] * v[0]
    for x, y in zip(u[1:], v[1:], strict=True):
        total = total + x * y
    return total


def root_gram(rows: Columns) -> Tensor:
    """Return the root of the Gram determinant: d! times the volume that the vectors span.

    By orthogonalising: the determinant itself has half the digits of a sliver.
    """
    rows = list(rows)
    square = inner(rows[0], rows[0])
    total = square
    for k in range(1, len(rows)):
        for i in range(k, len(rows)):
            part = inner(rows[k - 1], rows[i]) / square
            rows[i] = [y - part * x for x, y in zip(rows[k - 1], rows[i], strict=True)]
        square = inner(rows[k], rows[k])
        total = total * square
    return total.sqrt()


def _flat_cells(vertices: Tensor, cells: Tensor) -> Tensor:
    sides = cell_sides(vertices.detach(), cells)
    longest = torch.stack([inner(side, side) for side in sides]).amax(0)
    bound = 16 * torch.finfo(vertices.dtype).eps * longest ** (len(sides) / 2)
    return ~(root_gram(sides) > bound)


def compact(vertices: Tensor, cells: Tensor) -> Mesh:
    """Return the mesh of some cells, without the vertices they do not use."""
    used, which = torch.unique(cells, return_inverse=True)
    return Mesh(vertices[used], which)


# -- the door ---------------------------------------------------------------------------------


def _some(bad: Tensor) -> str:
    found = torch.nonzero(bad.reshape(-1))[:, 0]
    more = f" and {found.numel() - 5} more" if found.numel() > 5 else ""
    return f"{found[:5].tolist()}{more}"


def _check_arrays(mesh: Mesh) -> None:
    x, cells, glue = mesh.vertices, mesh.cells, mesh.glue
    _checks.check_tensor("Mesh", "vertices", x)
    for name, index in (("cells", cells), ("glue", glue)):
        if index is None:
            continue
        if not isinstance(index, Tensor) or index.dtype != torch.int64:
            seen = index.dtype if isinstance(index, Tensor) else type(index).__name__
            raise TypeError(f"Mesh: {name} is {seen}, expected an int64 tensor")
        if index.device != x.device:
            raise ValueError(f"Mesh: {name} is on {index.device}, expected {x.device} as vertices")
    if cells.ndim != 2 or cells.shape[1] not in (2, 3, 4) or not cells.shape[0]:
        raise ValueError(
            f"Mesh: cells has shape {tuple(cells.shape)}, expected (m, 2), (m, 3) or (m, 4), m > 0"
        )
    d = cells.shape[1] - 1
    if x.ndim != 2 or x.shape[1] < d:
        raise ValueError(
            f"Mesh: vertices has shape {tuple(x.shape)}, expected (n, N) with N >= {d} to match "
            f"cells of dimension {d}"
        )
    if mesh.topology is not None and mesh.topology.vertices != x.shape[0]:
        raise ValueError(
            f"Mesh: vertices has shape {tuple(x.shape)}, expected ({mesh.topology.vertices}, N) as "
            "before"
        )
    if glue is not None and glue.shape != x.shape[:1]:
        raise ValueError(f"Mesh: glue has shape {tuple(glue.shape)}, expected ({x.shape[0]},)")


@constant
def _topology(mesh: Mesh) -> Topology:
    n, cells = mesh.vertices.shape[0], _checks.values(mesh.cells)
    outside = ((cells < 0) | (cells >= n)).any(1)
    if outside.any():
        raise ValueError(
            f"Mesh: cells {_some(outside)} have indices outside 0 ... {n - 1}, the {n} vertices"
        )
    lonely = torch.bincount(cells.reshape(-1), minlength=n) == 0
    if lonely.any():
        raise ValueError(f"Mesh: vertices {_some(lonely)} belong to no cell, expected none such")
    if mesh.glue is None:
        unknown, points = torch.arange(n, device=cells.device), n
    else:
        kept, unknown = torch.unique(mesh.glue, return_inverse=True)
        points = kept.numel()
    topology = Topology(cells, n, unknown, points)
    corners = topology.glued.sort(-1).values
    twice = (corners[:, 1:] == corners[:, :-1]).any(1)
    if twice.any():
        raise ValueError(
            f"Mesh: cells {_some(twice)} have one vertex twice"
            + (", counting glued vertices as one: refine before gluing" if points < n else "")
        )
    crowded = topology.sharing > 2
    if crowded.any():
        facets = topology.representatives(topology.dim, crowded)[:5].tolist()
        raise ValueError(
            f"Mesh: {int(crowded.sum())} facets have more than two cells, among them {facets}: "
            "not a manifold"
            + (", or glued too coarsely: refine before gluing" if points < n else "")
        )
    return topology
