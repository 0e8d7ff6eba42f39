r"""The metric of the cells of a mesh: what fields and forms on them are measured with.

Reference coordinates of a cell run along its sides from the first corner; in them a function
linear on the cell has the differential ``du = (u_1 - u_0, ..., u_d - u_0)``, with the inner product
of the inverse of the Gram matrix of the sides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from darboux.manifolds._mesh import Mesh, cell_sides, inner, root_gram
from darboux.manifolds.base import Manifold
from darboux.manifolds.spectral.elements import quadrature
from darboux.manifolds.spectral.finite_elements import Metric, _cofactors, _measured, _upper


def cell_metric(
    mesh: Mesh, metric: Metric | Manifold | None = None, degree: int = 4
) -> tuple[Tensor, Tensor]:
    """Return the densities ``(q, m)`` and the inverse Gram matrices ``(q, m, d, d)`` of the cells.

    The density is d! times the volume. Without ``metric``, which needs a mesh in its chart, both
    are constant on a cell and q is 1; with it, q points of :func:`quadrature` of the degree.
    """
    sides, d = cell_sides(mesh.vertices, mesh.cells), mesh.dim
    root = root_gram(sides)[None]
    if metric is None:
        gram = {(i, j): inner(sides[i], sides[j])[None] for i, j in _upper(d)}
    else:
        corners = mesh.vertices[mesh.cells]
        points = root.new_tensor(quadrature(d, degree)[0])
        places = list(torch.einsum("qa,man->nqm", points, corners).unbind())
        rows = [[x[None] for x in side] for side in sides]
        root, gram = _measured(metric, places, rows, root)
    cofactors = {ij: part / root.square() for ij, part in _cofactors(gram, d).items()}
    every = [[cofactors[min(i, j), max(i, j)] for j in range(d)] for i in range(d)]
    return root, torch.stack([torch.stack(row, -1) for row in every], -2)


def check_metric(where: str, mesh: object, metric: object) -> None:
    """Raise unless ``mesh`` is a mesh, in the chart of ``metric`` if there is one."""
    if not isinstance(mesh, Mesh):
        raise TypeError(f"{where}: mesh is a {type(mesh).__name__}, expected a Mesh")
    if metric is not None and mesh.vertices.shape[1] != mesh.dim:
        raise ValueError(
            f"{where}: a metric needs a mesh in its chart, cells of dimension {mesh.dim} in "
            f"R^{mesh.dim}, but the vertices are in R^{mesh.vertices.shape[1]}"
        )
