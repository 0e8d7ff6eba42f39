r"""The connection Laplacian :math:`\nabla^*\nabla` on the tangent vectors of a surface.

The unknowns are two components of a vector at the middle of each edge: along the edge, from its
lower numbered point to the higher, and across. In a triangle, which is flat, these frames differ by
the angles between the edges, and Crouzeix-Raviart's functions (linear, one at the middle of one
edge and zero at the others) give

.. math:: K_{ef} = \int \langle\nabla\psi_e, \nabla\psi_f\rangle\, R(\theta_f - \theta_e), \qquad
          M_{ee} = \tfrac13 \sum |T| ,

with no tangent plane needed at the vertices, where the curvature sits. Stein, Wardetzky, Jacobson
and Grinspun (2020), Computer Graphics Forum 39(5).
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from darboux.manifolds._mesh import Mesh
from darboux.manifolds._simplices import Topology, constant
from darboux.manifolds.spectral.cells import cell_metric, check_metric
from darboux.manifolds.spectral.heat_method import _sides
from darboux.manifolds.spectral.hodge import _barycentric, _edge_signs, _rim_edges
from darboux.manifolds.spectral.operator import Operator, Pattern

# sides 01, 02, 12 in reference coordinates, and the corners opposite to them
_DIRECTIONS = ((1.0, 0.0), (0.0, 1.0), (-1.0, 1.0))
_OPPOSITE = [2, 1, 0]


def connection_laplacian(mesh: Mesh, *, boundary: str = "neumann") -> Operator:
    r"""Return the connection (Bochner) Laplacian on tangent vectors of a triangle mesh, sparse.

    Real, of size ``2 edges``: the components of edge e are the unknowns 2e and 2e + 1. The mass is
    diagonal. ``boundary`` is ``"neumann"`` or ``"dirichlet"``. The mesh may be glued and need not
    be orientable; where it is, a quarter turn commutes with the operator and all eigenvalues are
    double.

    Eigenvalues err by h². On the unit sphere they are :math:`l(l+1) - 1`, :math:`2(2l+1)` times for
    l = 1, 2, ...: those of the Hodge Laplacian less the curvature (Weitzenböck). Differentiable in
    the vertices.

    Raises ``ValueError`` for meshes that are not of triangles.
    """
    where = "connection_laplacian"
    check_metric(where, mesh, None)
    if mesh.dim != 2:
        raise ValueError(f"{where}: cells of dimension {mesh.dim}, expected triangles")
    if boundary not in ("neumann", "dirichlet"):
        raise ValueError(f"{where}: boundary is {boundary!r}, expected 'neumann' or 'dirichlet'")
    if boundary == "dirichlet" and not mesh.topology.boundary.numel():
        raise ValueError(f"{where}: boundary='dirichlet', but the mesh has no boundary")
    root, inverse = cell_metric(mesh)
    frames = _frames(mesh)
    weights = 2 * root[0, :, None, None] * _barycentric(inverse)[0]
    weights = weights[:, _OPPOSITE][:, :, _OPPOSITE]
    blocks = weights[..., None, None] * torch.einsum("menx,mfny->mefxy", frames, frames)
    plan = _plan(mesh.topology)
    stiffness = plan.stiffness.assemble(plan.to_stiffness, blocks.transpose(2, 3))
    area = root[0] / 2
    mass = plan.mass.assemble(plan.to_mass, (area[:, None, None] / 3).expand(-1, 3, 2))
    edges = mesh.topology.edges[0].shape[0]
    index = torch.arange(edges, device=root.device)
    if boundary == "dirichlet":
        keep = torch.nonzero(~_rim_edges(mesh.topology))[:, 0]
        index = torch.full_like(index, -1)
        index[keep] = torch.arange(keep.numel(), device=root.device)
        both = torch.stack([2 * keep, 2 * keep + 1], 1).reshape(-1)
        stiffness, mass = stiffness.restrict(both), mass.restrict(both)
    return Operator(stiffness, mass, EdgeVectors(mesh, index))


@dataclass(frozen=True, eq=False)
class EdgeVectors:
    """Tangent vectors at the middles of edges; ``index (edges,)`` numbers them, -1 where zero."""

    mesh: Mesh
    index: Tensor

    def extend(self, u: Tensor) -> Tensor:
        """Return the components ``(edges, 2, ...)`` of the coefficients ``u (n, ...)``."""
        pairs = u.unflatten(0, (-1, 2))
        padded = torch.cat([pairs, pairs.new_zeros(1, *pairs.shape[1:])])
        return padded.index_select(0, self.index % padded.shape[0])

    def vectors(self, u: Tensor) -> Tensor:
        """Return the vector fields ``(m, N, ...)`` at the centres of the cells."""
        components = self.extend(u)[self.mesh.topology.edges[1]]
        return torch.einsum("menx,mex...->mn...", _frames(self.mesh), components) / 3


def _frames(mesh: Mesh) -> Tensor:
    """Return the frames ``(m, 3, N, 2)`` of the edges of each cell: along and across."""
    sides = _sides(mesh)
    root, inverse = cell_metric(mesh)
    directions = sides.new_tensor(_DIRECTIONS)
    along = torch.einsum("ei,min->men", directions, sides)
    # a quarter turn takes the side i to root times the i-th row of the inverse Gram matrix, turned
    turned = root[0, :, None, None] * torch.einsum("mij,mjn->min", inverse[0], sides)
    across = torch.einsum("ei,min->men", directions, torch.stack([turned[:, 1], -turned[:, 0]], 1))
    length = along.square().sum(-1, keepdim=True).sqrt()
    signs = _edge_signs(mesh.topology)[..., None].to(sides.dtype)
    normal = _plan(mesh.topology).normals[..., None].to(sides.dtype)
    return torch.stack([signs * along / length, signs * normal * across / length], -1)


@dataclass(frozen=True, eq=False)
class _Plan:
    """Where the blocks go; ``normals (m, 3)`` are -1 where a cell sees that of an edge turned."""

    stiffness: Pattern
    to_stiffness: Tensor
    mass: Pattern
    to_mass: Tensor
    normals: Tensor


_PLANS: WeakKeyDictionary[Topology, _Plan] = WeakKeyDictionary()


def _plan(topology: Topology) -> _Plan:
    if topology not in _PLANS:
        _PLANS[topology] = _find(topology)
    return _PLANS[topology]


@constant
def _find(t: Topology) -> _Plan:
    which = t.edges[1]
    size, both = 2 * t.edges[0].shape[0], torch.arange(2, device=which.device)
    places = 2 * which[:, :, None] + both  # (m, 3, 2)
    shape = (-1, 3, 2, 3, 2)
    rows = places[:, :, :, None, None].expand(shape).reshape(-1)
    cols = places[:, None, None].expand(shape).reshape(-1)
    stiffness, to_stiffness = Pattern.of(rows, cols, size)
    mass, to_mass = Pattern.of(places.reshape(-1), places.reshape(-1), size)
    # the first cell of an edge says which side its normal points to
    order = torch.argsort(which.reshape(-1), stable=True)
    inner = t.sharing == 2
    second = order[(torch.cumsum(t.sharing, 0) - t.sharing)[inner] + 1]
    normals = torch.ones(which.numel(), dtype=torch.int64, device=which.device)
    normals[second] = t.neighbours[1]
    return _Plan(stiffness, to_stiffness, mass, to_mass, normals.reshape(which.shape))
