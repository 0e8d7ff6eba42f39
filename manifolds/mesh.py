r"""Meshes of the usual spaces and of any surface.

Makers return a :class:`Mesh` in float64 on the CPU unless ``dtype`` and ``device`` say otherwise.
Where a curved space is approximated, the docstring gives the ``project`` that carries nodes to it
for elements of higher order.
"""

import math
from collections.abc import Sequence
from itertools import permutations, product
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from darboux import _checks
from darboux.manifolds._mesh import Mesh, compact
from darboux.manifolds._mesh_files import load, save
from darboux.manifolds._simplices import first_seen, labels

__all__ = [
    "Mesh",
    "bolza",
    "disk",
    "ellipsoid",
    "equilateral_triangle",
    "grid",
    "hemisphere",
    "icosphere",
    "klein_bottle",
    "l_shape",
    "load",
    "of_pullback",
    "projective_plane",
    "rectangle",
    "save",
    "three_sphere",
    "to_sphere",
    "torus_mesh",
]


def to_sphere(x: Tensor) -> Tensor:
    """Return ``x / |x|``: the projection to the unit sphere of R^N."""
    return normalize(x, dim=-1)


# -- spheres and what they cover --------------------------------------------------------------


def icosphere(level: int, *, dtype: Any = None, device: Any = None) -> Mesh:
    """Return the unit sphere from the icosahedron: ``10 4^level + 2`` vertices.

    Use ``project=to_sphere`` for elements of higher order.

    >>> mesh = icosphere(2)
    >>> mesh.vertices.shape[0], mesh.euler_characteristic, abs(float(mesh.gauss_bonnet())) < 1e-12
    (162, 2, True)
    """
    ratio = (1 + math.sqrt(5)) / 2
    signs = list(product((-1.0, 1.0), (-ratio, ratio)))
    corners = [turn for a, b in signs for turn in ([0, a, b], [a, b, 0], [b, 0, a])]
    return _refined(_convex(np.array(corners)), level, "icosphere", to_sphere, dtype, device)


def three_sphere(level: int = 0, *, dtype: Any = None, device: Any = None) -> Mesh:
    """Return the unit sphere of R^4 from the 600-cell: tetrahedra, 120 vertices at level 0.

    Use ``project=to_sphere`` for elements of higher order. Coxeter, "Regular Polytopes", 8.7.
    """
    ratio = (1 + math.sqrt(5)) / 2
    corners = [np.array(x) / 2 for x in product((-1.0, 1.0), repeat=4)]
    corners += [s * x for x in np.eye(4) for s in (-1.0, 1.0)]
    even = [p for p in permutations(range(4)) if _parity(p) == 1]
    for a, b, c in product((-1.0, 1.0), repeat=3):
        x = np.array([a * ratio, b, c / ratio, 0.0]) / 2
        corners += [x[list(p)] for p in even]
    return _refined(_convex(np.array(corners)), level, "three_sphere", to_sphere, dtype, device)


def ellipsoid(
    level: int, axes: Sequence[float] | Tensor = (1.0, 1.0, 1.0), *, dtype: Any = None
) -> Mesh:
    """Return the ellipsoid with the given half-axes, which may require gradients.

    It is the icosphere, stretched: project with ``lambda x: to_sphere(x / axes) * axes``.
    """
    sphere = icosphere(level, dtype=axes.dtype if isinstance(axes, Tensor) else dtype)
    if not isinstance(axes, Tensor):
        axes = sphere.vertices.new_tensor(axes)
    if axes.shape != (3,) or not (axes > 0).all():
        raise ValueError(f"ellipsoid: axes is {axes.tolist()}, expected three positive numbers")
    return sphere.to(device=axes.device).move(sphere.vertices.to(axes.device) * axes)


def projective_plane(level: int, *, dtype: Any = None, device: Any = None) -> Mesh:
    """Return the projective plane: half the icosphere, opposite points of its rim glued.

    Use ``project=to_sphere`` for elements of higher order.
    """
    if level < 1:
        raise ValueError(f"projective_plane: level is {level}, expected at least 1 for gluing")
    sphere = icosphere(level, dtype=dtype, device=device)
    x = sphere.vertices
    side = x[sphere.cells].sum(1) @ x.new_tensor([0.1, 0.5, 0.86])
    half = compact(x, sphere.cells[side > 0])
    x, glue = half.vertices, torch.arange(half.vertices.shape[0], device=x.device)
    rim = torch.unique(half.boundary)
    opposite = torch.cdist(x[rim], -x[rim]).argmin(1)
    glue[rim] = torch.minimum(rim, rim[opposite])
    return Mesh(x, half.cells, glue)


def hemisphere(level: int, *, dtype: Any = None, device: Any = None) -> Mesh:
    """Return the upper half of the unit sphere, ``6 4^level`` triangles in rings.

    Use ``project=to_sphere`` for elements of higher order.
    """
    flat, radius, direction = _rings(level, "hemisphere", dtype, device)
    angle = (math.pi / 2 * radius)[:, None]
    # sine before cosine: the rim lies in z = 0 exactly
    height = torch.where(radius[:, None] == 1, 0.0, angle.cos())
    return flat.move(torch.cat([angle.sin() * direction, height], 1))


# -- plane domains ----------------------------------------------------------------------------


def disk(level: int, *, dtype: Any = None, device: Any = None) -> Mesh:
    """Return the unit disk in R^2, ``6 4^level`` triangles in rings.

    Use ``project=to_sphere`` for elements of higher order: it is applied to the rim only.
    """
    flat, radius, direction = _rings(level, "disk", dtype, device)
    return Mesh(radius[:, None] * direction, flat.cells)


def equilateral_triangle(
    level: int, side: float = 1.0, *, dtype: Any = None, device: Any = None
) -> Mesh:
    """Return the equilateral triangle in R^2, ``4^level`` equal triangles."""
    corners = side * np.array([[0, 0], [1, 0], [0.5, math.sqrt(0.75)]])
    one = Mesh(torch.tensor(corners), torch.tensor([[0, 1, 2]]))
    return _refined(one, level, "equilateral_triangle", None, dtype, device)


def rectangle(
    shape: tuple[int, int], lengths: Sequence[float] = (1.0, 1.0), *, dtype: Any = None,
    device: Any = None,
) -> Mesh:  # fmt: skip
    """Return the rectangle ``[0, a] x [0, b]`` in R^2, ``2 shape[0] shape[1]`` triangles."""
    if len(shape) != 2:
        raise ValueError(f"rectangle: shape is {tuple(shape)}, expected two numbers of cells")
    return grid(shape, lengths, dtype=dtype, device=device)


def l_shape(n: int, *, dtype: Any = None, device: Any = None) -> Mesh:
    """Return ``[-1, 1]^2`` less its lower right quadrant, ``6 n^2`` triangles of side ``1 / n``."""
    square = grid((2 * n, 2 * n), (2.0, 2.0), dtype=dtype, device=device)
    x = square.vertices - 1
    middle = x[square.cells].mean(1)
    return compact(x, square.cells[~((middle[:, 0] > 0) & (middle[:, 1] < 0))])


def klein_bottle(
    shape: tuple[int, int], lengths: tuple[float, float] = (1.0, 1.0), *, dtype: Any = None,
    device: Any = None,
) -> Mesh:  # fmt: skip
    """Return the flat Klein bottle: a rectangle with (0, y) ~ (a, b - y) and (x, 0) ~ (x, b)."""
    flat = rectangle(shape, lengths, dtype=dtype, device=device)
    n, m = shape
    i, j = torch.meshgrid(torch.arange(n + 1), torch.arange(m + 1), indexing="ij")
    j = torch.where(i == n, m - j, j)
    return Mesh(flat.vertices, flat.cells, ((i % n) * m + j % m).reshape(-1).to(flat.cells.device))


# -- charts -----------------------------------------------------------------------------------


def grid(
    shape: Sequence[int],
    lengths: Sequence[float] | None = None,
    periodic: bool | Sequence[bool] = False,
    *,
    origin: Sequence[float] | None = None,
    dtype: Any = None,
    device: Any = None,
) -> Mesh:
    """Return the box ``[0, lengths]`` in R^d, d = 1, 2, 3, cut into ``d! prod(shape)`` simplices.

    ``shape`` counts cells along each axis. Along periodic axes, opposite sides are glued, which
    needs at least three cells. Vertices are in row-major order. Kuhn (1960).
    """
    d = len(shape)
    lengths = [1.0] * d if lengths is None else list(lengths)
    turns = [periodic] * d if isinstance(periodic, bool) else list(periodic)
    start = [0.0] * d if origin is None else list(origin)
    if d not in (1, 2, 3) or not len(lengths) == len(turns) == len(start) == d:
        raise ValueError(
            f"grid: shape {tuple(shape)}, lengths {tuple(lengths)}, periodic {tuple(turns)}, "
            f"origin {tuple(start)}: expected the same number of entries, 1, 2 or 3"
        )
    if min(lengths) <= 0 or any(
        n < (3 if turn else 1) for n, turn in zip(shape, turns, strict=True)
    ):
        raise ValueError(
            f"grid: shape {tuple(shape)} with lengths {tuple(lengths)}, expected positive lengths, "
            "at least one cell along each axis and three along a periodic one"
        )
    dtype = dtype or torch.float64
    axes = [
        torch.linspace(o, o + l, n + 1, dtype=dtype)
        for o, l, n in zip(start, lengths, shape, strict=True)
    ]
    vertices = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, d)
    index = torch.arange(vertices.shape[0]).reshape([n + 1 for n in shape])
    cells = []
    for order in permutations(range(d)):
        # one step along each axis in turn, from the low corner of each box to the high one
        steps = [np.zeros(d, int)]
        for axis in order:
            steps.append(steps[-1] + np.eye(d, dtype=int)[axis])
        if _parity(order) < 0:
            steps[-2:] = steps[:-3:-1]
        corner = [
            index[tuple(slice(s, n + s) for s, n in zip(step, shape, strict=True))]
            for step in steps
        ]
        cells.append(torch.stack(corner, -1).reshape(-1, d + 1))
    glue = None
    if any(turns):
        places = [
            torch.arange(n + 1) % n if turn else torch.arange(n + 1)
            for n, turn in zip(shape, turns, strict=True)
        ]
        glue = index[torch.meshgrid(*places, indexing="ij")].reshape(-1).to(device)
    mixed = torch.stack(cells, 1).reshape(-1, d + 1)
    return Mesh(vertices.to(device), mixed.to(device), glue)


def torus_mesh(
    R: float | Tensor = 2.0, r: float | Tensor = 1.0, n: int = 48, m: int = 24, *, dtype: Any = None
) -> Mesh:
    """Return the torus in R^3 of radii R > r: n cells around the axis, m around the tube."""
    if not float(R) > float(r) > 0:
        raise ValueError(f"torus_mesh: R is {float(R)} and r is {float(r)}, expected R > r > 0")
    turn = 2 * math.pi
    chart = grid((n, m), (turn, turn), periodic=True, dtype=dtype)
    glue = chart.glue
    assert glue is not None
    kept, which = torch.unique(glue, return_inverse=True)
    u, v = chart.vertices[kept].unbind(-1)
    ring = R + r * v.cos()
    return Mesh(torch.stack([ring * u.cos(), ring * u.sin(), r * v.sin()], -1), which[chart.cells])


def of_pullback(
    surface: Any,
    shape: Sequence[int],
    bounds: Sequence[tuple[float, float]] | None = None,
    *,
    dtype: Any = None,
    device: Any = None,
) -> Mesh:
    """Return the mesh of ``surface.embedding`` over a grid of its chart, dimension 1, 2 or 3.

    Over ``bounds``, or those of the surface. Points of the rim of the chart that the embedding
    brings together become one vertex (periods, poles), and cells that lose a dimension are left
    out. Vertices carry the gradients of the parameters of the surface.
    """
    ranges = surface.bounds if bounds is None else bounds
    if ranges is None or len(ranges) != len(shape):
        raise ValueError(
            f"of_pullback: bounds is {ranges}, expected one pair (low, high) for each of the "
            f"{len(shape)} axes of shape"
        )
    origin, lengths = [a for a, _ in ranges], [b - a for a, b in ranges]
    chart = grid(shape, lengths, origin=origin, dtype=dtype, device=device)
    x = surface.embedding(chart.vertices)
    _checks.check_finite("of_pullback", embedding=x)
    rim = torch.unique(chart.boundary)
    y = x[rim].detach()
    near = 1e-7 if y.dtype == torch.float64 else 1e-4
    extent = (y.amax(0) - y.amin(0)).norm()
    met = torch.nonzero(
        torch.cdist(y, y, compute_mode="donot_use_mm_for_euclid_dist") <= near * extent
    )
    count, which = labels(rim[met], x.shape[0])
    cells = which[chart.cells]
    corners = cells.sort(-1).values
    whole = (corners[:, 1:] != corners[:, :-1]).all(1)
    return compact(x[first_seen(which, count)], cells[whole])


def bolza(level: int = 3, *, dtype: Any = None, device: Any = None) -> Mesh:
    r"""Return the Bolza surface (genus 2) in the Klein model, ``8 4^level`` triangles.

    The regular octagon of angle :math:`\pi/4`, opposite sides glued: geodesics are straight, so
    elements of any order conform with no error of geometry. The metric of the chart is
    :math:`g = I/(1-r^2) + x x^T/(1-r^2)^2`:

    >>> def klein(x):
    ...     s = 1 / (1 - x.square().sum(-1))[..., None, None]
    ...     return s * torch.eye(2, dtype=x.dtype) + s**2 * x[..., None] * x[..., None, :]

    At least level 2. Strohmaier and Uski (2013), Comm. Math. Phys. 317.
    """
    if level < 2:
        raise ValueError(f"bolza: level is {level}, expected at least 2 for gluing")
    poincare = 2**-0.25
    reach = 2 * poincare / (1 + poincare**2)
    angle = math.pi / 8 + math.pi / 4 * torch.arange(8, dtype=torch.float64)
    corners = reach * torch.stack([angle.cos(), angle.sin()], -1)
    fan = torch.tensor([[0, 1 + k, 1 + (k + 1) % 8] for k in range(8)])
    mesh = Mesh(torch.cat([torch.zeros(1, 2, dtype=torch.float64), corners]), fan)
    for _ in range(level):
        mesh = _hyperbolic_refine(mesh)
    x = mesh.vertices
    # a side with outer normal n lies in x.n = distance and is carried to the opposite one
    side = math.pi / 4 * torch.arange(1, 5, dtype=torch.float64)
    normals = torch.stack([side.cos(), side.sin()], -1)
    distance = reach * math.cos(math.pi / 8)
    rim = torch.unique(mesh.boundary)
    pairs = []
    for n in normals:
        here = rim[(x[rim] @ n - distance).abs() < 1e-9]
        moved = x[here] - 2 * distance * n
        pairs.append(torch.stack([here, rim[torch.cdist(moved, x[rim]).argmin(1)]], 1))
    _, glue = labels(torch.cat(pairs), x.shape[0])
    return Mesh(x.to(device=device, dtype=dtype), mesh.cells.to(device), glue.to(device))


def _hyperbolic_refine(mesh: Mesh) -> Mesh:
    # the midpoint of a geodesic is the sum of its ends on the hyperboloid
    height = (1 - mesh.vertices.square().sum(-1, keepdim=True)).rsqrt()
    lifted = Mesh(torch.cat([mesh.vertices * height, height], -1), mesh.cells)
    fine = lifted.refine(
        lambda y: y / (y[:, -1:].square() - y[:, :-1].square().sum(-1, True)).sqrt()
    )
    return Mesh(fine.vertices[:, :-1] / fine.vertices[:, -1:], fine.cells)


# -- what the makers share --------------------------------------------------------------------


def _convex(points: np.ndarray) -> Mesh:
    """Return the boundary of the convex hull of points of a sphere, oriented outward."""
    from scipy.spatial import ConvexHull

    cells = ConvexHull(points).simplices.astype(np.int64)
    inward = np.linalg.det(points[cells]) < 0
    cells[inward, -2:] = cells[inward, :-3:-1]
    return Mesh(to_sphere(torch.tensor(points)), torch.tensor(cells))


def _parity(order: Sequence[int]) -> int:
    swaps = sum(a > b for k, b in enumerate(order) for a in order[:k])
    return -1 if swaps % 2 else 1


def _refined(mesh: Mesh, level: int, where: str, project: Any, dtype: Any, device: Any) -> Mesh:
    if level < 0:
        raise ValueError(f"{where}: level is {level}, expected at least 0")
    for _ in range(level):
        mesh = mesh.refine(project)
    return mesh.to(dtype=dtype or torch.float64, device=device)


def _rings(level: int, where: str, dtype: Any, device: Any) -> tuple[Mesh, Tensor, Tensor]:
    """Return a hexagon, and radius and direction of each vertex when its rings become circles."""
    angle = math.pi / 3 * torch.arange(6, dtype=torch.float64)
    corners = torch.stack([angle.cos(), angle.sin()], -1)
    fan = torch.tensor([[0, 1 + k, 1 + (k + 1) % 6] for k in range(6)])
    hexagon = Mesh(torch.cat([torch.zeros(1, 2, dtype=torch.float64), corners]), fan)
    mesh = _refined(hexagon, level, where, None, None, None)
    x = mesh.vertices
    steps = 2**level
    # the sector of a vertex, and its coordinates along the two corners of the sector
    sector = torch.floor(torch.atan2(x[:, 1], x[:, 0]) / (math.pi / 3) + 1e-9)
    start = sector * math.pi / 3
    along = (
        x[:, 0] * start.cos() + x[:, 1] * start.sin(),
        x[:, 1] * start.cos() - x[:, 0] * start.sin(),
    )
    second = along[1] / math.sqrt(0.75)
    radius = torch.round((along[0] + second / 2) * steps) / steps
    turn = start + math.pi / 3 * second / radius.clamp(min=1 / steps)
    direction = torch.stack([turn.cos(), turn.sin()], -1)
    place = {"device": device, "dtype": dtype}
    return mesh.to(**place), radius.to(**place), direction.to(**place)
