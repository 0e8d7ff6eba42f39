r"""Laplacians of weighted graphs and of point clouds.

.. math:: u^TKu = \sum_{(i,j)} w_{ij}\,(u_i - u_j)^2
"""

from __future__ import annotations

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from darboux import _checks
from darboux.manifolds.spectral.operator import Operator, Pattern, Sparse


def graph_laplacian(
    edges: Tensor,
    weights: Tensor | None = None,
    n: int | None = None,
    *,
    normalised: bool = False,
    mass: Tensor | None = None,
) -> Operator:
    """Return the Laplacian ``D - W`` of an undirected graph as a sparse operator.

    ``edges (m, 2)`` are pairs of the ``n`` nodes, each edge once; repeated edges add up. ``weights
    (m,)`` are positive, 1 unless given, and may require a gradient. The mass is the identity, or
    ``mass (n,)``, or with ``normalised`` the degrees D: the pencil then has the eigenvalues of
    ``I - D^{-1/2} W D^{-1/2}``, in [0, 2], and the eigenvectors of the random walk.

    >>> square = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]])
    >>> graph_laplacian(square).stiffness.dense()[0]
    tensor([ 2., -1.,  0., -1.], dtype=torch.float64)
    """
    where = "graph_laplacian"
    if not isinstance(edges, Tensor) or edges.is_floating_point() or edges.dtype == torch.bool:
        raise TypeError(f"{where}: edges is not a tensor of integers")
    if edges.dim() != 2 or edges.shape[1] != 2:
        raise ValueError(f"{where}: edges has shape {tuple(edges.shape)}, expected (m, 2)")
    edges = edges.long()
    size = (int(edges.max()) + 1 if len(edges) else 0) if n is None else n
    if size < 1:
        raise ValueError(f"{where}: n is {n} and there are no edges, expected a node at least")
    bad = torch.nonzero(((edges < 0) | (edges >= size)).any(-1))[:, 0]
    if len(bad):
        raise ValueError(
            f"{where}: edge {int(bad[0])} is {edges[bad[0]].tolist()}, expected nodes 0 to "
            f"{size - 1} ({len(bad)} such edges)"
        )
    loops = torch.nonzero(edges[:, 0] == edges[:, 1])[:, 0]
    if len(loops):
        raise ValueError(
            f"{where}: edge {int(loops[0])} joins node {int(edges[loops[0], 0])} to itself "
            f"({len(loops)} such edges)"
        )
    if weights is None:
        weights = torch.ones(len(edges), dtype=torch.float64, device=edges.device)
    _check_vector(where, "weights", weights, len(edges))
    first, second = edges.unbind(-1)
    degrees = weights.new_zeros(size).index_add(0, torch.cat([first, second]), weights.repeat(2))
    if normalised:
        if mass is not None:
            raise ValueError(f"{where}: mass is given and normalised is true, expected one of them")
        alone = torch.nonzero(_checks.values(degrees) == 0)[:, 0]
        if len(alone):
            raise ValueError(
                f"{where}: node {int(alone[0])} has no edge ({len(alone)} such nodes), expected "
                "none for the normalised Laplacian"
            )
        mass = degrees
    elif mass is None:
        mass = torch.ones_like(degrees)
    else:
        _check_vector(where, "mass", mass, size)
    rows = torch.cat([first, second, first, second])
    columns = torch.cat([second, first, first, second])
    pattern, places = Pattern.of(rows, columns, size)
    stiffness = pattern.assemble(places, torch.cat([-weights, -weights, weights, weights]))
    return Operator(stiffness, pattern.assemble(pattern.diagonal, mass))


def point_cloud_laplacian(points: Tensor) -> Operator:
    """Return the Laplacian of a surface known by points ``(n, 3)`` alone, with a lumped mass.

    By the tufted intrinsic Delaunay triangulation of local neighbourhoods, Sharp & Crane, Comput.
    Graph. Forum 39 (2020) 69; needs the package robust_laplacian and carries no graph. Eigenvalues
    of evenly spread points converge as on a mesh; for independent random points they do not.
    """
    where = "point_cloud_laplacian"
    _checks.check_last(where, "points", points, 3)
    if points.dim() != 2 or len(points) < 8:
        raise ValueError(
            f"{where}: points has shape {tuple(points.shape)}, expected (n, 3) with n at least 8"
        )
    _checks.check_finite(where, points=points)
    try:
        import robust_laplacian  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ModuleNotFoundError(
            f"{where} needs the package robust-laplacian: pip install 'darboux[robust]'"
        ) from None
    plain = np.ascontiguousarray(points.detach().cpu().numpy(), dtype=np.float64)
    stiffness, mass = robust_laplacian.point_cloud_laplacian(plain)
    both = scipy.sparse.coo_array(stiffness)
    rows, columns = (torch.as_tensor(i.astype(np.int64)) for i in (both.row, both.col))
    pattern, places = Pattern.of(rows, columns, len(plain))

    def matrix(entries: np.ndarray, where: Tensor) -> Sparse:
        sparse = pattern.assemble(where, torch.as_tensor(entries))
        return Sparse(sparse.pattern, sparse.values.to(points.dtype))

    # the diagonal is minus the rest of its row, so that constants lie in the kernel to rounding
    flat = matrix(np.where(both.row == both.col, 0.0, both.data), places)
    sums = torch.zeros_like(flat.values[: len(plain)]).index_add(0, pattern.rows, flat.values)
    symmetric = flat.values.index_add(0, pattern.diagonal, -sums)
    return Operator(Sparse(pattern, symmetric), matrix(mass.diagonal(), pattern.diagonal))


def _check_vector(where: str, name: str, x: Tensor, size: int) -> None:
    _checks.check_tensor(where, name, x)
    if x.shape != (size,):
        raise ValueError(f"{where}: {name} has shape {tuple(x.shape)}, expected ({size},)")
    _checks.check_finite(where, **{name: x})
    _checks.check_that(where, lambda: x > 0, f"{name} holds numbers that are not positive")
