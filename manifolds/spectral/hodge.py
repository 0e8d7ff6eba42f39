r"""The Hodge Laplacian on 1-forms: :math:`\Delta = d\,\delta + \delta\,d`.

A 1-form is its integrals ``(edges,)`` along the edges ``mesh.topology.edges``, each from its lower
numbered point to the higher. With d the differences along edges and the circulations around
triangles, which depend on the cells alone, and the mass matrices ``M_k`` of k-forms,

.. math:: K = d_1^T M_2\,d_1 + M_1 d_0 M_0^{-1} d_0^T M_1 , \qquad M = M_1 .

As :math:`d_1 d_0 = 0` exactly, the spectrum is that of functions (exact forms, :math:`d_0 f`), that
of coexact forms, and as many zeros as the first Betti number :math:`b_1`, to rounding.
Hirani (2003); Arnold, Falk and Winther (2006), Acta Numerica 15.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from darboux import _checks
from darboux._checks import GeometryError
from darboux.manifolds._mesh import Mesh
from darboux.manifolds._simplices import Topology, constant
from darboux.manifolds.base import Manifold
from darboux.manifolds.spectral.cells import cell_metric, check_metric
from darboux.manifolds.spectral.elements import quadrature
from darboux.manifolds.spectral.finite_elements import Metric
from darboux.manifolds.spectral.heat_method import _sides
from darboux.manifolds.spectral.operator import Operator, Pattern


def exterior_derivative(mesh: Mesh, form: Tensor, degree: int) -> Tensor:
    """Return d of a function ``(points, ...)`` or of a 1-form ``(edges, ...)``, degree 0 or 1.

    A 1-form, or the circulations ``(triangles, ...)`` around triangles from their lowest point to
    the next one. Twice is zero, up to rounding.
    """
    where, t = "exterior_derivative", mesh.topology
    _checks.check_tensor(where, "form", form)
    if degree not in (0, 1) or degree >= mesh.dim:
        raise ValueError(
            f"{where}: degree is {degree} on cells of dimension {mesh.dim}, expected 0"
            + (" or 1" if mesh.dim > 1 else "")
        )
    expected = (t.points, t.edges[0].shape[0])[degree]
    if form.dim() == 0 or form.shape[0] != expected:
        raise ValueError(f"{where}: form has shape {tuple(form.shape)}, expected ({expected}, ...)")
    if degree == 0:
        return form[t.edges[0][:, 1]] - form[t.edges[0][:, 0]]
    ab, ac, bc = _triangle_edges(t).unbind(-1)
    return form[ab] + form[bc] - form[ac]


@constant
def _triangle_edges(t: Topology) -> Tensor:
    faces = t.faces(3)[0]
    size = t.points
    keys = t.edges[0][:, 0] * size + t.edges[0][:, 1]
    pairs = [faces[:, i] * size + faces[:, j] for i, j in combinations(range(3), 2)]
    return torch.stack([torch.searchsorted(keys, pair) for pair in pairs], -1)


def hodge_laplacian(
    mesh: Mesh,
    *,
    star: str = "whitney",
    boundary: str = "absolute",
    metric: Metric | Manifold | None = None,
    degree: int = 4,
) -> Operator:
    r"""Return the Hodge Laplacian on the 1-forms of a mesh of dimension 1, 2 or 3, sparse.

    ``star`` gives the masses: ``"whitney"``, those of Whitney's forms :math:`\lambda_a d\lambda_b -
    \lambda_b d\lambda_a`, good on every mesh, or ``"circumcentric"``, diagonal with the cotangent
    weights, on triangles without negative ones. The mass of functions is lumped, so exact forms
    have the eigenvalues of ``stiffness_mass(mesh, mass="lumped")``. ``boundary`` is ``"absolute"``
    (no normal part, functions are free) or ``"relative"`` (no tangential part; functions vanish).
    ``metric`` on a mesh in its chart is integrated to ``degree``. The mesh need not be orientable.

    Eigenvalues err by h². On the unit sphere they are :math:`l(l+1)`, each :math:`2(2l+1)` times;
    zeros are as many as the first Betti number. Differentiable in vertices and metric.

    Raises ``ValueError`` for arguments that do not fit, ``GeometryError`` for cotangent weights
    that are not positive.
    """
    where = "hodge_laplacian"
    check_metric(where, mesh, metric)
    for name, seen, known in (
        ("star", star, ("whitney", "circumcentric")),
        ("boundary", boundary, ("absolute", "relative")),
    ):
        if seen not in known:
            raise ValueError(f"{where}: {name} is {seen!r}, expected {known[0]!r} or {known[1]!r}")
    if star == "circumcentric" and (mesh.dim != 2 or metric is not None):
        raise ValueError(
            f"{where}: star='circumcentric' with cells of dimension {mesh.dim} and "
            f"{'no' if metric is None else 'a'} metric, expected triangles without a metric"
        )
    if boundary == "relative" and not mesh.topology.boundary.numel():
        raise ValueError(f"{where}: boundary='relative', but the mesh has no boundary")
    root, inverse = cell_metric(mesh, metric, degree)
    mass, curl = _whitney(mesh.dim, root, inverse, degree)
    if star == "circumcentric":
        mass = _cotangents(root, inverse)
    t, plan = mesh.topology, _plan(mesh.topology, star == "circumcentric")
    signs = _edge_signs(t).to(root.dtype)
    turned = signs[:, :, None] * signs[:, None, :]
    inertia = plan.mass.assemble(plan.to_mass, turned * mass)
    if star == "circumcentric" and _checks.checks_values():
        _check_weights(where, mesh, _checks.values(inertia.diagonal()))
    share = _volumes(mesh.dim, root, degree) / (mesh.dim + 1)
    points = share.new_zeros(t.points)
    points = points.index_add(
        0, t.glued.reshape(-1), share[:, None].expand(t.glued.shape).flatten()
    )
    weight = 1 / points
    if boundary == "relative":
        weight = weight.index_fill(0, torch.unique(t.boundary), 0.0)
    codifferential = share.new_zeros(plan.point.numel())
    pair = torch.cat([-inertia.values, inertia.values])
    codifferential = codifferential.index_add(0, plan.to_codifferential, pair)
    one, two = codifferential[plan.left], codifferential[plan.right]
    exact = weight[plan.point[plan.left]] * one * two
    entries = torch.cat([(turned * curl).reshape(-1), exact])
    stiffness = plan.stiffness.assemble(plan.to_stiffness, entries)
    index = torch.arange(t.edges[0].shape[0], device=root.device)
    if boundary == "relative":
        keep = torch.nonzero(~_rim_edges(t))[:, 0]
        index = torch.full_like(index, -1)
        index[keep] = torch.arange(keep.numel(), device=root.device)
        inertia, stiffness = inertia.restrict(keep), stiffness.restrict(keep)
    return Operator(stiffness, inertia, EdgeForms(mesh, index))


@dataclass(frozen=True, eq=False)
class EdgeForms:
    """The 1-forms on the edges of ``mesh``; ``index (edges,)`` are the unknowns, -1 where zero."""

    mesh: Mesh
    index: Tensor

    def extend(self, u: Tensor) -> Tensor:
        """Return the values ``(edges, ...)`` on all edges of the coefficients ``u (n, ...)``."""
        padded = torch.cat([u, u.new_zeros(1, *u.shape[1:])])
        return padded.index_select(0, self.index % padded.shape[0])

    def vectors(self, u: Tensor) -> Tensor:
        """Return the vector fields ``(m, N, ...)`` at the centres of cells, as R^N measures."""
        t = self.mesh.topology
        signs = _edge_signs(t).to(u.dtype)
        form = self.extend(u)[t.edges[1]]
        form = form * signs.reshape(*signs.shape, *(1,) * (u.dim() - 1))
        # at the centre a form of Whitney is (dλ_b - dλ_a) / (d + 1)
        d = self.mesh.dim
        table = u.new_zeros(len(_pairs(d)), d + 1)
        for k, (a, b) in enumerate(_pairs(d)):
            table[k, a], table[k, b] = -1 / (d + 1), 1 / (d + 1)
        reference = table[:, 1:] - table[:, :1]
        covector = torch.einsum("ki,mk...->mi...", reference, form)
        _, inverse = cell_metric(self.mesh)
        return torch.einsum("mij,min,mj...->mn...", inverse[0], _sides(self.mesh), covector)


# -- cells ------------------------------------------------------------------------------------


def _pairs(dim: int) -> list[tuple[int, int]]:
    return list(combinations(range(dim + 1), 2))


def _barycentric(inverse: Tensor) -> Tensor:
    """Return the inner products ``(q, m, d + 1, d + 1)`` of the barycentric differentials."""
    first = -inverse.sum(-2, keepdim=True)
    rows = torch.cat([first, inverse], -2)
    return torch.cat([-rows.sum(-1, keepdim=True), rows], -1)


def _whitney(dim: int, root: Tensor, inverse: Tensor, degree: int) -> tuple[Tensor, Tensor]:
    """Return ``∫ ⟨w_e, w_f⟩`` and ``∫ ⟨dw_e, dw_f⟩``, each ``(m, edges, edges)``."""
    points, weights = (root.new_tensor(x) for x in quadrature(dim, max(degree, 2)))
    moments = weights[:, None, None] * points[:, :, None] * points[:, None, :]
    if root.shape[0] == 1:
        moments, weights = moments.sum(0, keepdim=True), weights.sum(0, keepdim=True)
    p = root[..., None, None] * _barycentric(inverse)
    a, b = (torch.tensor(x, device=root.device) for x in zip(*_pairs(dim), strict=True))

    def term(x: Tensor, y: Tensor, z: Tensor, w: Tensor) -> Tensor:
        return torch.einsum("qef,qmef->mef", moments[:, x][..., y], p[:, :, z][..., w])

    mass = term(a, a, b, b) - term(a, b, b, a) - term(b, a, a, b) + term(b, b, a, a)
    minors = p[:, :, a][..., a] * p[:, :, b][..., b] - p[:, :, a][..., b] * p[:, :, b][..., a]
    curl = 4 * torch.einsum("q,qmef->mef", weights, minors / root[..., None, None])
    return mass, curl


def _cotangents(root: Tensor, inverse: Tensor) -> Tensor:
    p = root[0, :, None, None] * _barycentric(inverse)[0] / 2
    a, b = (torch.tensor(x, device=root.device) for x in zip(*_pairs(2), strict=True))
    return torch.diag_embed(-p[:, a, b])


def _volumes(dim: int, root: Tensor, degree: int) -> Tensor:
    if root.shape[0] == 1:
        return root[0] / math.factorial(dim)
    return root.new_tensor(quadrature(dim, degree)[1]) @ root


def _check_weights(where: str, mesh: Mesh, weights: Tensor) -> None:
    bad = torch.nonzero(~(weights > 1e-12 * weights.abs().amax()))[:, 0]
    if bad.numel():
        raise GeometryError(
            f"{where}: {bad.numel()} edges have cotangent weights that are not positive, among "
            f"them {mesh.topology.edges[0][bad[:5]].tolist()}; use star='whitney'"
        )


# -- what depends on the cells alone ----------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Plan:
    """Where the entries go.

    The codifferential ``d_0^T M_1`` has entries at ``point`` and an edge; the stiffness has one
    product of entries ``left`` and ``right`` for each two edges with a point in common.
    """

    mass: Pattern
    to_mass: Tensor
    point: Tensor
    to_codifferential: Tensor
    left: Tensor
    right: Tensor
    stiffness: Pattern
    to_stiffness: Tensor


_PLANS: WeakKeyDictionary[Topology, dict[bool, _Plan]] = WeakKeyDictionary()


def _plan(topology: Topology, diagonal: bool) -> _Plan:
    known = _PLANS.setdefault(topology, {})
    if diagonal not in known:
        known[diagonal] = _find(topology, diagonal)
    return known[diagonal]


@constant
def _find(t: Topology, diagonal: bool) -> _Plan:
    ends, which = t.edges
    size, each = ends.shape[0], which.shape[1]
    rows = which[:, :, None].expand(-1, -1, each).reshape(-1)
    cols = which[:, None, :].expand(-1, each, -1).reshape(-1)
    if diagonal:
        mass, _ = Pattern.of(rows[:0], cols[:0], size)
        # entries off the diagonal of a cell are zero: they may go anywhere
        to_mass = rows
    else:
        mass, to_mass = Pattern.of(rows, cols, size)
    keys = torch.cat([ends[mass.rows, side] * size + mass.cols for side in (0, 1)])
    kept, to_codifferential = torch.unique(keys, return_inverse=True)
    point, edge = kept // size, kept % size
    count = torch.bincount(point, minlength=t.points)
    start = torch.cumsum(count, 0) - count
    # all pairs of entries in the row of each point
    left = torch.repeat_interleave(torch.arange(point.numel(), device=point.device), count[point])
    first = torch.cumsum(count[point], 0) - count[point]
    place = torch.arange(left.numel(), device=point.device) - first[left]
    right = start[point[left]] + place
    stiffness, to_stiffness = Pattern.of(
        torch.cat([rows, edge[left]]), torch.cat([cols, edge[right]]), size
    )
    return _Plan(mass, to_mass, point, to_codifferential, left, right, stiffness, to_stiffness)


@constant
def _edge_signs(t: Topology) -> Tensor:
    """Return ±1 ``(m, edges of a cell)``: whether the corners of each edge ascend."""
    a, b = zip(*_pairs(t.dim), strict=True)
    return torch.where(t.glued[:, list(a)] < t.glued[:, list(b)], 1, -1)


@constant
def _rim_edges(t: Topology) -> Tensor:
    """Say which edges lie in the boundary."""
    size = t.points
    keys = t.edges[0][:, 0] * size + t.edges[0][:, 1]
    facets = t.boundary
    found = torch.zeros_like(keys, dtype=torch.bool)
    for i, j in combinations(range(facets.shape[1]), 2):
        found[torch.searchsorted(keys, facets[:, i] * size + facets[:, j])] = True
    return found
