r"""Intrinsic Delaunay triangulations: flips that change the edges but not the surface.

An edge is flipped where the angles facing it add up to more than :math:`\pi`; the new edge is the
geodesic across its two triangles. In the end no cotangent weight is negative. Bobenko and
Springborn (2007), Discrete Comput. Geom. 38; Fisher et al. (2007), Computing 81.
"""

import numpy as np
import torch
from torch import Tensor

from darboux import _checks
from darboux._checks import ConvergenceError, GeometryError
from darboux.manifolds._simplices import Topology, constant
from darboux.manifolds.linalg import dot

_TOLERANCE = 1e-9  # of a sum of two cotangents: co-circular corners are left as they are
_ROUNDS = 10_000

# the edges of one round of flips: the one flipped, then those of its quadrilateral
Round = tuple[Tensor, ...]


def flip(topology: Topology, vertices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the intrinsic Delaunay triangulation of an orientable triangle mesh.

    The squared lengths ``(e,)`` of its edges, differentiable in the vertices with the flips held;
    the glued corners ``(m, 3)`` of its triangles, and their sides 01, 02, 12 ``(m, 3)``. A
    triangle may meet itself. Raises ``GeometryError`` for a surface that is not orientable.
    """
    if topology.orientation is None:
        raise GeometryError("delaunay: the surface is not orientable, expected an orientable one")
    ends = vertices[topology.representatives(2)]
    across = ends[:, 1] - ends[:, 0]
    squares = dot(across, across)
    numbers = _checks.values(squares)
    if numbers.ndim > 1:
        raise ValueError("delaunay: under vmap each mesh has its own flips, expected one mesh")
    corners, sides, rounds = flip_rounds(topology, numbers)
    for step in rounds:
        squares = squares.scatter(0, step[0], other_diagonal(*(squares[e] for e in step)))
    return squares, corners, sides


def twice_area(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return twice the areas of triangles with these squared sides; Kahan's stable formula."""
    sides = torch.stack([a, b, c]).sqrt().sort(0, descending=True).values
    a, b, c = sides.unbind(0)
    product = (a + (b + c)) * (c - (a - b)) * (c + (a - b)) * (a + (b - c))
    return product.clamp(min=0).sqrt() / 2


def other_diagonal(l: Tensor, p: Tensor, q: Tensor, r: Tensor, s: Tensor) -> Tensor:
    # edge ab with |ab|^2 = l, and c, d on either side: p, q = |ca|^2, |cb|^2; r, s those of d
    along = (p + l - q) * (r + l - s) / 4
    upward = twice_area(l, p, q) * twice_area(l, r, s)
    return p + r - 2 * (along - upward) / l


@constant
def flip_rounds(topology: Topology, squares: Tensor) -> tuple[Tensor, Tensor, list[Round]]:
    """Flip on numbers: return corners and sides of the triangles, and the edges of each round.

    A round flips edges that share no triangle, the most obtuse first.
    """
    assert topology.orientation is not None
    corner, side = topology.glued.cpu().numpy(), topology.edges[1].cpu().numpy()[:, ::-1]
    turned = (topology.orientation < 0).cpu().numpy()[:, None]
    corner = np.where(turned, corner[:, [0, 2, 1]], corner)
    side = np.where(turned, side[:, [0, 2, 1]], side)  # facing each corner
    device = squares.device
    square = squares.to("cpu", torch.float64, copy=True)
    halves = half_edges(side, len(square))
    inner = np.flatnonzero(halves[:, 1] < side.size)
    rounds: list[Round] = []
    while True:
        around = quadrilaterals(side, halves, inner)
        l, p, q, r, s = (square[torch.from_numpy(e)] for e in around)
        cotangents = (p + q - l) / twice_area(l, p, q) + (r + s - l) / twice_area(l, r, s)
        chosen = independent(cotangents.numpy(), halves[inner] // 3)
        if not len(chosen):
            sides = torch.from_numpy(side[:, ::-1].copy())
            return torch.from_numpy(corner).to(device), sides.to(device), rounds
        if len(rounds) == _ROUNDS:
            raise ConvergenceError(
                f"delaunay: edges are left to flip after {_ROUNDS} rounds", iterations=_ROUNDS
            )
        step = tuple(torch.from_numpy(e[chosen]) for e in around)
        square[step[0]] = other_diagonal(*(square[e] for e in step))
        rounds.append(tuple(e.to(device) for e in step))
        halves = turn(corner, side, halves, inner[chosen])


def half_edges(side: np.ndarray, edges: int) -> np.ndarray:
    """Return the places ``(e, 2)`` of each edge in ``side.flat``; the end where there is one."""
    order = np.argsort(side, axis=None, kind="stable")
    count = np.bincount(side.reshape(-1), minlength=edges)
    start = np.cumsum(count) - count
    padded = np.append(order, side.size)
    return np.stack([order[start], np.where(count > 1, padded[start + count - 1], side.size)], 1)


def _next(place: np.ndarray, steps: int) -> np.ndarray:
    return place // 3 * 3 + (place + steps) % 3


def quadrilaterals(
    side: np.ndarray, halves: np.ndarray, edges: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Return ``edges`` and the four around each: of triangles (c, a, b), (d, b, a) on edge ab."""
    flat, (c, d) = side.reshape(-1), halves[edges].T
    ca, cb = flat[_next(c, 2)], flat[_next(c, 1)]
    da, db = flat[_next(d, 1)], flat[_next(d, 2)]
    return edges, ca, cb, da, db


def independent(cotangents: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """Return edges to flip, the worst first, of which no two share a triangle."""
    bad = np.flatnonzero((cotangents < -_TOLERANCE) & (triangles[:, 0] != triangles[:, 1]))
    bad = bad[np.argsort(cotangents[bad], kind="stable")]
    rank, (one, two) = np.arange(len(bad)), triangles[bad].T
    best = np.full(triangles.max(initial=0) + 1, len(bad))
    np.minimum.at(best, one, rank)
    np.minimum.at(best, two, rank)
    return bad[(best[one] == rank) & (best[two] == rank)]


def turn(corner: np.ndarray, side: np.ndarray, halves: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Flip edges that share no triangle, in place; return where the halves of edges are now."""
    _, ca, cb, da, db = quadrilaterals(side, halves, edges)
    at_c, at_d = halves[edges].T
    one, two = at_c // 3, at_d // 3
    flat = corner.reshape(-1)
    c, a, b, d = flat[at_c], flat[_next(at_c, 1)], flat[_next(at_c, 2)], flat[at_d]
    moved = np.arange(side.size + 1)
    moved[at_c], moved[at_d] = 3 * one + 1, 3 * two + 1
    moved[_next(at_d, 1)], moved[_next(at_c, 2)] = 3 * one, 3 * one + 2
    moved[_next(at_c, 1)], moved[_next(at_d, 2)] = 3 * two, 3 * two + 2
    corner[one], side[one] = np.stack([c, a, d], 1), np.stack([da, edges, ca], 1)
    corner[two], side[two] = np.stack([d, b, c], 1), np.stack([cb, edges, db], 1)
    return moved[halves]
