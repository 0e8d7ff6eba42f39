r"""Finite elements: the Laplace-Beltrami operator on simplicial meshes, any order and dimension.

.. math:: K_{ab} = \int g^{ij}\,\partial_i\varphi_a\,\partial_j\varphi_b\,\sqrt{|g|}\,dx, \qquad
          M_{ab} = \int \varphi_a\varphi_b\,\sqrt{|g|}\,dx

The metric of a cell is the one its embedding induces, or the one given on a chart. What depends
on the cells alone, the *layout*, is found once and kept as long as they live: it turns the
entries of the cells into the values of a sparse matrix by one sum and one gather. The stiffness
is kept as edge weights, so its rows add up to zero.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from darboux import _checks
from darboux._checks import GeometryError
from darboux.manifolds._mesh import Columns, Mesh, Projection, inner, root_gram
from darboux.manifolds._simplices import constant, first_seen
from darboux.manifolds.base import Manifold
from darboux.manifolds.linalg import is_positive
from darboux.manifolds.spectral import delaunay as intrinsic
from darboux.manifolds.spectral.elements import HIGHEST, lagrange, quadrature
from darboux.manifolds.spectral.layout import Assembly, assembly_of, layout
from darboux.manifolds.spectral.operator import Operator

Metric = Callable[[Tensor], Tensor]  # (..., d) -> (..., d, d)


def stiffness_mass(
    mesh: Mesh,
    *,
    order: int = 1,
    mass: str = "consistent",
    boundary: str = "neumann",
    metric: Metric | Manifold | None = None,
    project: Projection | None = None,
    delaunay: bool = False,
    degree: int | None = None,
) -> Operator:
    r"""Return the Laplace-Beltrami operator of a mesh on polynomials of degree ``order``.

    ``mass`` is ``"consistent"``, ``"lumped"`` (row sums) or ``"mixed"`` (the mean of both, whose
    errors nearly cancel); the last two for order 1. ``boundary`` is ``"neumann"`` or
    ``"dirichlet"``. With ``metric`` the mesh lies in a chart, and the metric is taken at points of
    quadrature. ``project`` carries nodes to the surface, or, where the mesh fills its space, nodes
    on the boundary to the boundary; cells are then curved (isoparametric). ``delaunay`` flips
    edges inside the surface until no weight is negative; gradients hold the flips.
    ``degree`` is that of the quadrature, by default ``2 order``, with a metric ``2 order + 2``.

    Eigenvalues err by :math:`h^{2p}` where the geometry is exact (flat cells of flat space, or
    ``metric``); straight cells on a curved space add :math:`h^2`, isoparametric ones
    :math:`h^{p+1}`, or :math:`h^{p+2}` for even p. Differentiable in the vertices and in the
    parameters of ``metric`` and ``project``, also under ``torch.func``.

    Raises ``ValueError`` or ``TypeError`` for arguments that do not fit, ``GeometryError`` for a
    metric that is not positive and for cells without volume after ``project``.
    Strang and Fix (1973); Dziuk (1988); Demlow (2009), SIAM J. Numer. Anal. 47.

    >>> from darboux.manifolds.mesh import icosphere, to_sphere
    >>> operator = stiffness_mass(icosphere(3), order=2, project=to_sphere)
    >>> operator.size, round(float(operator.mass.values.sum() / torch.pi), 5)  # the area, 4 pi
    (2562, 3.99998)
    """
    _check(mesh, order, mass, boundary, metric, project, delaunay, degree)
    if boundary == "dirichlet" and not mesh.topology.boundary.numel():
        raise ValueError("stiffness_mass: boundary='dirichlet', but the mesh has no boundary")
    where = layout(mesh.topology, order, boundary)
    if not where.assembly.pattern.size:
        raise ValueError("stiffness_mass: no node is inside the boundary; refine the mesh")
    space = FiniteElements(mesh, order, where.index, project, where.nodes.T)
    points = 0 if metric is None and (project is None or order == 1) else degree
    if points is None:
        points = 2 * order + (0 if metric is None else 2)
    table = _table(mesh.dim, order, points, mesh.vertices.dtype, mesh.vertices.device)
    if delaunay:
        x = mesh.vertices if project is None else project(mesh.vertices)
        squares, corners, turned = intrinsic.flip(mesh.topology, x)
        flipped = assembly_of(corners.T, mesh.topology.points, where.rim, boundary)
        return _assembled(flipped, table, *_from_lengths(squares, turned), mass, space)
    sides, places = _sides(mesh, space, table)
    root, gram = root_gram(sides), _gram(sides)
    if metric is not None:
        root, gram = _measured(metric, places, sides, root)
    return _assembled(where.assembly, table, root, gram, mass, space)


@dataclass(frozen=True, eq=False)
class FiniteElements:
    """The functions that are polynomials of degree ``order`` on each cell of ``mesh``.

    ``index (nodes,)`` is the unknown of each node, -1 on a Dirichlet boundary; ``elements
    (m, a)`` are the nodes of each cell, the corners first. The first nodes are the vertices.
    """

    mesh: Mesh
    order: int
    index: Tensor
    project: Projection | None
    elements: Tensor

    def extend(self, u: Tensor) -> Tensor:
        """Return the values ``(nodes, ...)`` at all nodes of the coefficients ``u (n, ...)``."""
        padded = torch.cat([u, u.new_zeros(1, *u.shape[1:])])
        return padded.index_select(0, self.index % padded.shape[0])

    def restrict(self, values: Tensor) -> Tensor:
        """Return the coefficients ``(n, ...)`` of the function with these values at the nodes."""
        free = self.index >= 0
        first = first_seen(self.index[free], int(self.index.max()) + 1)
        return values[torch.nonzero(free)[:, 0][first]]

    def nodes(self) -> Tensor:
        """Return the positions ``(nodes, N)`` of all nodes."""
        mesh, x = self.mesh, self.mesh.vertices
        element = lagrange(mesh.dim, self.order)
        if self.order > 1:
            count = self.index.numel()
            place = first_seen(self.elements.reshape(-1), count)
            cell, local = place // self.elements.shape[1], place % self.elements.shape[1]
            weights = x.new_tensor(element.exponents / self.order)[local]
            corners = x.index_select(0, mesh.cells[cell].reshape(-1)).unflatten(0, (count, -1))
            x = (weights[..., None] * corners).sum(1)
        if self.project is None:
            return x
        moved = self.project(x)
        if moved.shape != x.shape:
            raise ValueError(
                f"stiffness_mass: project returned shape {tuple(moved.shape)}, expected "
                f"{tuple(x.shape)} as it was given"
            )
        if x.shape[1] > mesh.dim:
            return moved
        whole = layout(mesh.topology, self.order, "neumann")
        return torch.where(whole.rim[whole.index][:, None], moved, x)


# -- the entries of the cells -----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Table:
    """Constants of the reference cell; the degree 0 means straight cells, all integrals done.

    ``values (q, a)`` and ``slopes (d, q, a)`` at the points; ``stiffness (P, s q)`` takes the
    symmetric coefficients to the pairs of nodes and ``mass (P + a, q)`` the densities to pairs,
    then nodes.
    """

    degree: int
    values: Tensor
    slopes: Tensor
    stiffness: Tensor
    mass: Tensor


@lru_cache(maxsize=64)
@constant
def _table(dim: int, order: int, degree: int, dtype: torch.dtype, device: torch.device) -> _Table:
    element = lagrange(dim, order)
    points, weights = quadrature(dim, degree or 2 * order)
    values, slopes = element.tabulate(points)
    a, b = np.triu_indices(values.shape[1], 1)
    stiffness = []
    for i, j in _upper(dim):
        product = slopes[:, a, i] * slopes[:, b, j]
        if i != j:
            product = product + slopes[:, a, j] * slopes[:, b, i]
        stiffness.append(weights[:, None] * product)
    mass = weights[:, None] * np.concatenate([values[:, a] * values[:, b], values**2], 1)
    if not degree:
        stiffness, mass = [s.sum(0, keepdims=True) for s in stiffness], mass.sum(0, keepdims=True)
    parts = (values, slopes.transpose(2, 0, 1), np.concatenate(stiffness).T, mass.T)
    return _Table(
        degree, *(torch.tensor(part.copy(), dtype=dtype, device=device) for part in parts)
    )


def _upper(dim: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(dim) for j in range(i, dim)]


Gram = dict[tuple[int, int], Tensor]  # the entries i <= j of a symmetric matrix, each (q, m)


def _sides(mesh: Mesh, space: FiniteElements, table: _Table) -> tuple[Columns, list[Tensor]]:
    """Return the derivatives of the map from the reference cell, and its values."""
    curved = table.degree > 0 and space.project is not None and space.order > 1
    x = space.nodes() if curved or space.project is not None else mesh.vertices
    nodes = (space.elements if curved else mesh.cells).T.contiguous()
    columns: Columns = [[] for _ in range(mesh.dim)]
    places: list[Tensor] = []
    linear = lagrange(mesh.dim, 1)
    for coordinate in x.unbind(1):
        at = coordinate.index_select(0, nodes.reshape(-1)).reshape(nodes.shape)
        for i in range(mesh.dim):
            columns[i].append(table.slopes[i] @ at if curved else (at[i + 1] - at[0])[None])
        if table.degree:
            points = quadrature(mesh.dim, table.degree)[0]
            values = table.values if curved else at.new_tensor(linear.tabulate(points)[0])
            places.append(values @ at)
    return columns, places


def _gram(sides: Columns) -> Gram:
    return {(i, j): inner(sides[i], sides[j]) for i, j in _upper(len(sides))}


def _measured(
    metric: Metric | Manifold, places: list[Tensor], sides: Columns, root: Tensor
) -> tuple[Tensor, Gram]:
    """Return density and Gram matrix in the metric of the chart."""
    x = torch.stack(places, -1)
    g = (metric.metric if isinstance(metric, Manifold) else metric)(x.flatten(0, 1))
    d = x.shape[-1]
    if not isinstance(g, Tensor) or g.shape != (x[..., 0].numel(), d, d):
        seen = tuple(g.shape) if isinstance(g, Tensor) else type(g).__name__
        raise ValueError(
            f"stiffness_mass: metric returned {seen}, expected ({x[..., 0].numel()}, {d}, {d})"
        )
    g = g.unflatten(0, x.shape[:2])
    if _checks.checks_values():
        bad = _checks.values(~is_positive(g)).any(0)
        if bad.any():
            raise GeometryError(
                f"stiffness_mass: the metric is not positive definite in {int(bad.sum())} cells, "
                f"among them {torch.nonzero(bad.reshape(-1))[:5, 0].tolist()}"
            )
    rows = [[inner([g[..., k, l] for l in range(d)], side) for k in range(d)] for side in sides]
    gram = {(i, j): inner(sides[i], rows[j]) for i, j in _upper(d)}
    entries = {(i, j): g[..., i, j] for i, j in _upper(d)}
    return root * _determinant(entries, d).sqrt(), gram


def _determinant(g: Gram, d: int) -> Tensor:
    cofactors = _cofactors(g, d)
    return inner([g[0, j] for j in range(d)], [cofactors[0, j] for j in range(d)])


def _cofactors(g: Gram, d: int) -> Gram:
    if d == 1:
        return {(0, 0): torch.ones_like(g[0, 0])}
    if d == 2:
        return {(0, 0): g[1, 1], (0, 1): -g[0, 1], (1, 1): g[0, 0]}
    (a, b, c), (e, f), i = (g[0, 0], g[0, 1], g[0, 2]), (g[1, 1], g[1, 2]), g[2, 2]
    return {
        **{(0, 0): e * i - f * f, (0, 1): c * f - b * i, (0, 2): b * f - c * e},
        **{(1, 1): a * i - c * c, (1, 2): b * c - a * f, (2, 2): a * e - b * b},
    }


def _from_lengths(squares: Tensor, sides: Tensor) -> tuple[Tensor, Gram]:
    """Return density and Gram matrix of triangles from the squared lengths of their sides."""
    c, b, a = (squares.index_select(0, sides[:, k])[None] for k in range(3))  # 01, 02, 12
    gram = {(0, 0): c, (0, 1): (b + c - a) / 2, (1, 1): b}
    return intrinsic.twice_area(a, b, c), gram


def _assembled(
    to: Assembly, table: _Table, root: Tensor, gram: Gram, mass: str, space: FiniteElements
) -> Operator:
    d = len(table.slopes)
    cofactors = _cofactors(gram, d)
    if _checks.checks_values() and space.project is not None:
        bad = _checks.values(~(root > 0)).any(0)
        if bad.any():
            raise GeometryError(
                f"stiffness_mass: {int(bad.sum())} cells have no volume after project, among them "
                f"{torch.nonzero(bad.reshape(-1))[:5, 0].tolist()}"
            )
    # straight cells in a metric have one row of sides and many of densities
    coefficients = torch.cat([cofactors[ij] / root for ij in _upper(d)])
    stiff = to.sum_edges(table.stiffness @ coefficients)
    entries = table.mass @ root
    pairs = to.edge.shape[0]
    heavy, weight = to.sum_edges(entries[:pairs]), to.sum_corners(entries[pairs:])
    if to.loops is not None:  # an edge from a point to itself
        weight = weight + to.sum_rows(torch.where(to.loops, heavy, 0.0))
        stiff, heavy = torch.where(to.loops, 0.0, stiff), torch.where(to.loops, 0.0, heavy)
    if mass != "consistent":
        share = 1.0 if mass == "lumped" else 0.5
        weight = weight + share * to.sum_rows(heavy)
        heavy = (1 - share) * heavy
    stiffness = to.matrix(stiff, -to.sum_rows(stiff))
    return Operator(stiffness, to.matrix(heavy, weight), space)


# -- the door ---------------------------------------------------------------------------------


def _check(
    mesh: Any, order: int, mass: str, boundary: str, metric: Any, project: Any, delaunay: bool,
    degree: int | None,
) -> None:  # fmt: skip
    where = "stiffness_mass"
    if not isinstance(mesh, Mesh):
        raise TypeError(f"{where}: mesh is a {type(mesh).__name__}, expected a Mesh")
    if order not in range(1, HIGHEST + 1):
        raise ValueError(f"{where}: order is {order}, expected 1 ... {HIGHEST}")
    if mass not in ("consistent", "lumped", "mixed"):
        raise ValueError(f"{where}: mass is {mass!r}, expected 'consistent', 'lumped' or 'mixed'")
    if mass != "consistent" and order > 1:
        raise ValueError(
            f"{where}: mass is {mass!r} with order {order}, expected order 1: row sums of higher "
            "order vanish at corners"
        )
    if boundary not in ("neumann", "dirichlet"):
        raise ValueError(f"{where}: boundary is {boundary!r}, expected 'neumann' or 'dirichlet'")
    if degree is not None and degree < 1:
        raise ValueError(f"{where}: degree is {degree}, expected at least 1")
    d, n = mesh.dim, mesh.vertices.shape[1]
    if metric is not None and n != d:
        raise ValueError(
            f"{where}: a metric needs a mesh in its chart, cells of dimension {d} in R^{d}, but "
            f"the vertices are in R^{n}"
        )
    if delaunay and (d != 2 or order != 1 or metric is not None):
        raise ValueError(
            f"{where}: delaunay=True with cells of dimension {d}, order {order} and "
            f"{'a' if metric is not None else 'no'} metric, expected triangles, order 1, no metric"
        )
