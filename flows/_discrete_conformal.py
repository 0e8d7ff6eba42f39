r"""Triangles given by side lengths: schemes of conformal change, angles, curvature, flips.

A *scheme* says how the length of an edge follows from numbers ``u`` at its ends and a datum of
the edge that conformal change leaves alone. Angles are half-angle formulas,

.. math:: \tan^2\frac{\theta_a}2 = \frac{S(s-b)\,S(s-c)}{S(s)\,S(s-a)}, \qquad
          S(x) = x \text{ or } \sinh x, \quad 2s = a + b + c,

with negative factors put to zero: a triangle that breaks its inequality has the angles
:math:`(\pi, 0, 0)`, which keeps the curvature continuous and monotone in u. Bobenko, Pinkall and
Springborn (2015), Geom. Topol. 19; Chow and Luo (2003), J. Differential Geom. 63.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from darboux import _smooth
from darboux._checks import ConvergenceError, values
from darboux.manifolds._simplices import Topology
from darboux.manifolds.spectral import delaunay
from darboux.manifolds.spectral.operator import Pattern, Sparse

_ROUNDS = 10_000


@dataclass(frozen=True, eq=False)
class Triangles:
    """Triangles on ``points`` vertices with ``edges`` edges; one may meet itself.

    ``corner (m, 3)`` are vertices, ``side (m, 3)`` the edges facing them, ``ends (e, 2)`` the
    vertices of the edges, ``full (points,)`` the angle sum that is flat: 2 pi, on a rim pi.
    """

    corner: Tensor
    side: Tensor
    ends: Tensor
    full: Tensor

    @property
    def points(self) -> int:
        return self.full.shape[0]

    @cached_property
    def places(self) -> tuple[Pattern, Tensor]:
        """The pattern of matrices on vertices and the place ``(m, 3, 3)`` of entries of cells."""
        shape = (*self.corner.shape, 3)
        rows = self.corner[:, :, None].expand(shape).reshape(-1)
        columns = self.corner[:, None].expand(shape).reshape(-1)
        pattern, where = Pattern.of(rows, columns, self.points)
        return pattern, where.reshape(shape)


def triangles_of(topology: Topology) -> Triangles:
    """Return the triangles of a mesh on the CPU, turned alike where that is possible."""
    corner, side = topology.glued.cpu(), topology.edges[1].cpu().flip(-1)
    if topology.orientation is not None:
        turned = (topology.orientation < 0).cpu()[:, None]
        swap = [0, 2, 1]
        corner = torch.where(turned, corner[:, swap], corner)
        side = torch.where(turned, side[:, swap], side)
    full = torch.full((topology.points,), 2 * math.pi, dtype=torch.float64)
    full[topology.boundary.reshape(-1).cpu()] = math.pi
    return Triangles(corner, side, topology.edges[0].cpu(), full)


# -- schemes ----------------------------------------------------------------------------------


class Scheme(NamedTuple):
    """How lengths follow from ``u``; functions of the datum and of u at both ends of edges."""

    data: Callable[[Tensor, Triangles], tuple[Tensor, Tensor]]  # lengths -> datum, u at the start
    length: Callable[[Tensor, Tensor, Tensor], Tensor]
    slope: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # dl/du at the first end, given l
    negative: bool = False  # u must stay below zero


def _scaling(lengths: Tensor, tri: Triangles) -> tuple[Tensor, Tensor]:
    return lengths.log(), lengths.new_zeros(tri.points)


def _radii(lengths: Tensor, tri: Triangles, reduce: str) -> Tensor:
    # the circles of one triangle that touch each other have radii s - a
    l = lengths[tri.side]
    own = l.sum(-1, keepdim=True) / 2 - l
    start = lengths.new_full((tri.points,), math.inf if reduce == "amin" else 0.0)
    index = tri.corner.reshape(-1)
    return start.scatter_reduce(0, index, own.reshape(-1), reduce, include_self=reduce == "amin")


def _packing(kind: str, hyperbolic: bool) -> Callable[[Tensor, Triangles], tuple[Tensor, Tensor]]:
    def data(lengths: Tensor, tri: Triangles) -> tuple[Tensor, Tensor]:
        # touching circles at the least radii keep apart: inversive distances are at least 1
        r = _radii(lengths, tri, "amin" if kind == "inversive" else "mean")
        start = (r / 2).tanh().log() if hyperbolic else r.log()
        if kind == "tangential":
            return torch.ones_like(lengths), start
        a, b = r[tri.ends].unbind(-1)
        if hyperbolic:
            # cosh l - cosh(a - b), by a product that keeps its digits
            excess = 2 * ((lengths + a - b) / 2).sinh() * ((lengths - a + b) / 2).sinh()
            distance = excess / (a.sinh() * b.sinh()) - 1
        else:
            distance = (lengths - a + b) * (lengths + a - b) / (2 * a * b) - 1
        return (distance.clamp(0, 1) if kind == "thurston" else distance), start

    return data


def _circle_length(distance: Tensor, u: Tensor, v: Tensor) -> Tensor:
    a, b = u.exp(), v.exp()
    return ((a - b).square() + 2 * a * b * (1 + distance)).sqrt()


def _circle_slope(distance: Tensor, u: Tensor, v: Tensor, l: Tensor) -> Tensor:
    a, b = u.exp(), v.exp()
    return a * (a + b * distance) / l


def _hyper_radius(u: Tensor) -> Tensor:
    return 2 * u.exp().atanh()


def _hyper_circle_length(distance: Tensor, u: Tensor, v: Tensor) -> Tensor:
    a, b = _hyper_radius(u), _hyper_radius(v)
    # 2 sinh^2(l/2) = cosh l - 1
    square = ((a - b) / 2).sinh().square() + a.sinh() * b.sinh() * (1 + distance) / 2
    return 2 * square.sqrt().asinh()


def _hyper_circle_slope(distance: Tensor, u: Tensor, v: Tensor, l: Tensor) -> Tensor:
    a, b = _hyper_radius(u), _hyper_radius(v)
    rise = a.sinh() * b.cosh() + a.cosh() * b.sinh() * distance
    return a.sinh() * rise / l.sinh()


SCHEMES: dict[tuple[str, str], Scheme] = {
    ("luo", "euclidean"): Scheme(
        _scaling, lambda d, u, v: (d + (u + v) / 2).exp(), lambda d, u, v, l: l / 2
    ),
    # sinh(l/2) = exp((u + v)/2) l0/2: Euclidean chords l0 and hyperbolic lengths in one class
    ("luo", "hyperbolic"): Scheme(
        _scaling,
        lambda d, u, v: 2 * ((d + (u + v) / 2).exp() / 2).asinh(),
        lambda d, u, v, l: (l / 2).tanh(),
    ),
}
for _kind in ("tangential", "thurston", "inversive"):
    SCHEMES[_kind, "euclidean"] = Scheme(_packing(_kind, False), _circle_length, _circle_slope)
    SCHEMES[_kind, "hyperbolic"] = Scheme(
        _packing(_kind, True), _hyper_circle_length, _hyper_circle_slope, negative=True
    )


# -- angles and curvature ---------------------------------------------------------------------


def angles(sides: Tensor, hyperbolic: bool = False) -> Tensor:
    """Return the angles ``(..., 3)`` facing sides ``(..., 3)``; gradients are finite throughout."""
    half = sides.sum(-1, keepdim=True) / 2
    rest = ((sides.roll(-1, -1) + sides.roll(-2, -1) - sides) / 2).clamp(min=0)
    if hyperbolic:
        half, rest = half.sinh(), rest.sinh()
    opposite = rest.roll(-1, -1) * rest.roll(-2, -1)
    return 2 * torch.atan2(_smooth.sqrt(opposite), _smooth.sqrt(half * rest))


def curvature(tri: Triangles, lengths: Tensor, hyperbolic: bool = False) -> Tensor:
    """Return the angle defects ``(points,)`` of triangles with edge lengths ``(e,)``."""
    theta = angles(lengths[tri.side], hyperbolic)
    return tri.full.to(theta).index_add(0, tri.corner.reshape(-1), -theta.reshape(-1))


def broken(tri: Triangles, lengths: Tensor) -> Tensor:
    """Return the triangles that break the triangle inequality."""
    l = lengths[tri.side]
    return torch.nonzero(2 * l.amax(-1) >= l.sum(-1))[:, 0]


def jacobian(
    tri: Triangles, scheme: Scheme, datum: Tensor, u: Tensor, hyperbolic: bool = False
) -> Sparse:
    """Return ``dK/du``, symmetric positive semi-definite; broken triangles give zero.

    For vertex scaling of Euclidean triangles it is the cotan Laplacian.
    """
    one, two = u[tri.corner].roll(-1, -1), u[tri.corner].roll(-2, -1)  # the ends of each side
    datum = datum[tri.side]
    l = scheme.length(datum, one, two)
    at_one, at_two = scheme.slope(datum, one, two, l), scheme.slope(datum, two, one, l)
    theta = angles(l, hyperbolic)
    s = l.sinh() if hyperbolic else l
    # d alpha / da = S(a) / D, d alpha / db = -cos(gamma) S(a) / D with D = S(b) S(c) sin(alpha);
    # D from the smallest angle, whose sine has all its digits
    least = l.argmin(-1, keepdim=True)
    area = s.prod(-1, keepdim=True) / s.gather(-1, least) * theta.gather(-1, least).sin()
    whole = (2 * l.amax(-1, keepdim=True) < l.sum(-1, keepdim=True)) & (area > 0)
    own = torch.where(whole, s / torch.where(whole, area, 1.0), 0.0)
    cosine = theta.cos()
    third = torch.tensor([[0, 2, 1], [2, 1, 0], [1, 0, 2]])
    turn = torch.where(torch.eye(3, dtype=torch.bool), 1.0, -cosine[:, third])
    by_side = own[:, :, None] * turn  # (m, angle, side)
    by_end = torch.diag_embed(at_one).roll(1, -1) + torch.diag_embed(at_two).roll(2, -1)
    local = -by_side @ by_end
    pattern, where = tri.places
    return pattern.assemble(where, (local + local.mT) / 2)


# -- flips ------------------------------------------------------------------------------------


def ptolemy(datum: Tensor, step: delaunay.Round) -> Tensor:
    """Flip edges: their log-lengths become those that Ptolemy's relation gives, ef = ac + bd."""
    e, p, q, r, s = (datum[i] for i in step)
    # sides p, q of one triangle and r, s of the other; p meets r and q meets s: p faces s
    return datum.scatter(0, step[0], torch.logaddexp(p + s, q + r) - e)


def flip(tri: Triangles, datum: Tensor, u: Tensor) -> tuple[Triangles, list[delaunay.Round]]:
    """Return the Delaunay triangulation of the metric that ``u`` makes, and the rounds of flips.

    By Ptolemy flips of log-lengths ``datum (e,)``, which commute with vertex scaling: the surface
    of ideal hyperbolic triangles stays the same, and no inequality is needed on the way. In the
    end all hold. The criterion and the flips serve both backgrounds. Springborn (2020), Discrete
    Comput. Geom. 64; Gillespie, Springborn and Crane (2021), ACM Trans. Graph. 40.
    """
    corner, side = tri.corner.numpy().copy(), tri.side.numpy().copy()
    halves = delaunay.half_edges(side, len(datum))
    inner = np.flatnonzero(halves[:, 1] < side.size)
    log = datum + u[tri.ends].sum(-1) / 2
    rounds: list[delaunay.Round] = []
    while True:
        around = delaunay.quadrilaterals(side, halves, inner)
        l, p, q, r, s = (log[torch.from_numpy(i)] for i in around)
        # the sum of the cosines of the angles that face the edge
        faced = (p - q).cosh() + (r - s).cosh() - (
            (2 * l - p - q).exp() + (2 * l - r - s).exp()
        ) / 2  # fmt: skip
        chosen = delaunay.independent(faced.numpy(), halves[inner] // 3)
        if not len(chosen):
            break
        if len(rounds) == _ROUNDS:
            raise ConvergenceError(
                f"uniformize: edges are left to flip after {_ROUNDS} rounds", iterations=_ROUNDS
            )
        step = tuple(torch.from_numpy(i[chosen]) for i in around)
        log = ptolemy(log, step)
        rounds.append(step)
        halves = delaunay.turn(corner, side, halves, inner[chosen])
    if not rounds:
        return tri, rounds
    return _renewed(tri, torch.from_numpy(corner), torch.from_numpy(side)), rounds


def straighten(
    tri: Triangles, topology: Topology, lengths: Tensor
) -> tuple[Triangles, Tensor, int]:
    """Return the intrinsic Delaunay triangulation, its lengths and the number of flips.

    The conformal class is that of ideal triangles over the Delaunay ones, so the first flips are
    those of the given metric, along its geodesics; Ptolemy's come after.
    """
    squares = lengths.square()
    corner, sides, rounds = delaunay.flip_rounds(topology, values(squares))
    if not rounds:
        return tri, lengths, 0
    for step in rounds:
        squares = squares.scatter(0, step[0], delaunay.other_diagonal(*(squares[e] for e in step)))
    count = sum(len(step[0]) for step in rounds)
    return _renewed(tri, corner.cpu(), sides.cpu().flip(-1)), squares.sqrt(), count


def _renewed(tri: Triangles, corner: Tensor, side: Tensor) -> Triangles:
    ends = torch.empty_like(tri.ends)
    for k in range(3):
        ends[side[:, k]] = corner[:, [(k + 1) % 3, (k + 2) % 3]]
    return Triangles(corner, side, ends, tri.full)
