"""Laying the triangles of a surface side by side, in the plane or in the hyperbolic plane."""

from __future__ import annotations

import heapq
import math

import torch
from torch import Tensor

from darboux._checks import GeometryError, values
from darboux.flows import _discrete_conformal as dc
from darboux.flows.discrete_ricci import Uniformization


def develop(metric: Uniformization, root: int = 0) -> Tensor:
    """Lay the triangles in the plane or the Poincare disk one by one: corners ``(m, 3, 2)``.

    Starting from ``root``, whose first corner is the origin, always the triangle nearest to it is
    laid next to one that lies already. What is flat inside and simply connected closes up: a
    vertex has one position; other surfaces are cut open. Plain numbers without gradients. Raises
    ``GeometryError`` where the surface is not orientable.

    >>> from darboux.flows.discrete_ricci import uniformize
    >>> from darboux.manifolds.mesh import torus_mesh
    >>> develop(uniformize(torus_mesh(n=6, m=5), "flat")).shape
    torch.Size([60, 3, 2])
    """
    where = "develop"
    corner, side = metric.corners.cpu(), metric.sides.cpu()
    m = corner.shape[0]
    if not 0 <= root < m:
        raise ValueError(f"{where}: root is {root}, expected a triangle 0 ... {m - 1}")
    hyperbolic = metric.background == "hyperbolic"
    lengths = values(metric.lengths).to("cpu", torch.float64)
    theta = dc.angles(lengths[side], hyperbolic).tolist()
    l, ends, faces = lengths[side].tolist(), corner.tolist(), side.reshape(-1).tolist()
    beside: dict[int, list[int]] = {}
    for place, edge in enumerate(faces):
        beside.setdefault(edge, []).append(place)
    third = _third_hyperbolic if hyperbolic else _third_flat
    origin = (0.0, 0.0, 1.0)
    d = l[root][2]
    second = (math.sinh(d), 0.0, math.cosh(d)) if hyperbolic else (d, 0.0, 1.0)
    laid: dict[int, list[tuple[float, float, float]]] = {
        root: [origin, second, third(origin, second, d, l[root][1], theta[root][0])]
    }
    waiting = [(0.0, root * 3 + k) for k in range(3)]
    while waiting:
        _, place = heapq.heappop(waiting)
        others = [q for q in beside[faces[place]] if q // 3 not in laid]
        for there in others:
            (old, k), (new, j) = divmod(place, 3), divmod(there, 3)
            a, b = laid[old][(k + 2) % 3], laid[old][(k + 1) % 3]
            shared = ends[new][(j + 1) % 3], ends[new][(j + 2) % 3]
            if shared != (ends[old][(k + 2) % 3], ends[old][(k + 1) % 3]):
                raise GeometryError(f"{where}: neighbouring triangles are not oriented alike")
            at = third(a, b, l[new][j], l[new][(j + 2) % 3], theta[new][(j + 1) % 3])
            spots = [at] * 3
            spots[(j + 1) % 3], spots[(j + 2) % 3] = a, b
            laid[new] = spots
            far = sum(x * x + y * y for x, y, _ in spots)
            for step in (1, 2):
                heapq.heappush(waiting, (far, new * 3 + (j + step) % 3))
    spots = torch.tensor([laid[i] for i in range(m)], dtype=torch.float64)
    flat = spots[..., :2] / (1 + spots[..., 2:]) if hyperbolic else spots[..., :2]
    return flat.to(metric.lengths)


_Point = tuple[float, float, float]


def _third_flat(a: _Point, b: _Point, d: float, r: float, angle: float) -> _Point:
    # at distance r from a, to the left of a -> b by the angle
    x, y = (b[0] - a[0]) / d * r, (b[1] - a[1]) / d * r
    c, s = math.cos(angle), math.sin(angle)
    return a[0] + c * x - s * y, a[1] + s * x + c * y, 1.0


def _third_hyperbolic(a: _Point, b: _Point, d: float, r: float, angle: float) -> _Point:
    # on the hyperboloid x^2 + y^2 - w^2 = -1
    v = [(q - math.cosh(d) * p) / math.sinh(d) for p, q in zip(a, b, strict=True)]
    n = (a[1] * v[2] - a[2] * v[1], a[2] * v[0] - a[0] * v[2], a[1] * v[0] - a[0] * v[1])
    c, s = math.cos(angle) * math.sinh(r), math.sin(angle) * math.sinh(r)
    x, y = (math.cosh(r) * a[i] + c * v[i] + s * n[i] for i in (0, 1))
    return x, y, math.sqrt(1 + x * x + y * y)
