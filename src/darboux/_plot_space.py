"""Pictures in space: surfaces, curves, geodesics, tangent vectors, orbits."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from darboux._plot_input import (
    Range,
    color_limits,
    extent,
    match,
    need,
    need_method,
    push_forward,
    read_colors,
    read_domain,
    read_names,
    read_values,
    rectangle,
    to_numbers,
)
from darboux._plot_scene import (
    GLOSS,
    INK,
    add_mesh,
    bar_options,
    blend,
    fit_camera,
    load_pyvista,
    new_plotter,
)

DIVERGING = "coolwarm"  # Moreland (2009), made for shaded surfaces: its middle is grey, not white
SEQUENTIAL = ("#FFEFB0", "#72C9A5", "#2B6CA3")  # light to dark, never too dark for black on top
VIEW = (1.0, -1.5, 1.15)


def surface(
    manifold: Any, *, scalars: str | Callable[[Tensor], Tensor] | Tensor | None = "curvature",
    u: Range | None = None, v: Range | None = None, resolution: tuple[int, int] = (160, 160),
    cmap: Any = None, clim: Range | None = None, title: str | None = None,
    color: str = "#DCE3EA", opacity: float = 1.0, plotter: Any = None,
) -> Any:  # fmt: skip
    """Draw an embedded surface, coloured by its Gauss curvature K = scal/2.

    ``scalars`` may also be a function ``(..., 2) -> (...)``, a tensor ``(nu, nv)`` over the
    domain (it then sets the resolution), or ``None`` for one plain ``color``. The domain is
    ``u`` by ``v``, by default ``manifold.bounds``. Values that change sign get a diverging map
    symmetric around zero. Normals are exact; where the chart is singular (a pole), normals and
    scalars are read a thousandth of the domain inside.
    """
    need_method("surface", manifold, "embedding")
    if isinstance(scalars, Tensor):
        seen = tuple(scalars.shape)
        need(len(seen) == 2, f"surface: scalars has shape {seen}, expected (nu, nv)")
        resolution = (seen[0], seen[1])
    need(min(resolution) > 1, f"surface: resolution is {resolution}, expected at least (2, 2)")
    x = rectangle(read_domain("surface", manifold, u, v), resolution)
    point, cross = _frame("surface", manifold, x)
    area = cross.norm(dim=-1, keepdim=True)
    singular = area < 1e-6 * area.max()
    if singular.any():
        centre = x.mean((0, 1))
        x = torch.where(singular, centre + (x - centre) * 0.999, x)
        cross = _frame("surface", manifold, x)[1]
    sign = _outward(point, cross)
    normal = sign * normalize(cross, dim=-1)
    values = None if scalars is None else _surface_scalars(manifold, scalars, x)
    if sign < 0:  # VTK lights a face by its winding too, so that has to be outward as well
        point, normal = point.flip(1), normal.flip(1)
        values = None if values is None else values.flip(1)
    grid = load_pyvista().StructuredGrid()
    grid.points, grid.dimensions = point.reshape(-1, 3).numpy(), (*resolution, 1)
    grid.point_data.active_normals = normal.reshape(-1, 3).numpy()
    options: dict[str, Any] = {"color": color}
    if values is not None:
        title = ("Gauss curvature" if scalars == "curvature" else "") if title is None else title
        grid["values"] = values.reshape(-1).numpy()
        low, high, signed = color_limits(values)
        cmap = cmap or (DIVERGING if signed else blend(*SEQUENTIAL))
        options = {"scalars": "values", "cmap": cmap, "clim": clim or (low, high)} | bar_options(
            title
        )
    fresh, plotter = plotter is None, plotter or new_plotter()
    actor = add_mesh(plotter, "surface", grid, opacity=opacity, **options, **GLOSS)
    actor.prop.interpolation = "Phong"
    if fresh:
        fit_camera(plotter, VIEW)
    return plotter


def _surface_scalars(manifold: Any, scalars: Any, x: Tensor) -> Tensor:
    """Evaluate what colours a surface at ``x (nv, nu, 2)``, as ``(nv, nu)``."""
    if isinstance(scalars, Tensor):
        return to_numbers("surface", "scalars", scalars).T
    if callable(scalars):
        values = scalars(match(manifold, x))
    else:
        need(scalars == "curvature", f"surface: scalars is {scalars!r}, expected 'curvature', "
              "a function, a tensor or None")  # fmt: skip
        need_method("surface", manifold, "scalar_curvature")
        values = manifold.scalar_curvature(match(manifold, x)) / 2
    return read_values("surface", "scalars(x)", values, x)


def _frame(where: str, manifold: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the embedded points and the cross products of the coordinate vectors there."""
    point, along_u = push_forward(where, manifold, x, x.new_tensor([1.0, 0.0]).expand_as(x))
    along_v = push_forward(where, manifold, x, x.new_tensor([0.0, 1.0]).expand_as(x))[1]
    return point, torch.linalg.cross(along_u, along_v)


def _outward(point: Tensor, cross: Tensor) -> float:
    """Return the sign that turns the normals of a closed surface outward (Gauss's theorem)."""
    return -1.0 if float(((point - point.reshape(-1, 3).mean(0)) * cross).sum()) < 0 else 1.0


def _lifted(where: str, manifold: Any, x: Tensor, lift: float, look: dict[str, Any]) -> Tensor:
    """Embed ``x``, moved along the normal by ``lift`` times the size of the surface."""
    point, cross = whole = _frame(where, manifold, x)
    if getattr(manifold, "bounds", None) is not None or {"u", "v"} <= set(look):
        grid = rectangle(read_domain(where, manifold, look.get("u"), look.get("v")), (25, 25))
        whole = _frame(where, manifold, grid)
    return point + lift * extent(whole[0]) * _outward(*whole) * normalize(cross, dim=-1)


def curves(
    points: Tensor | Sequence[Tensor], *, radius: float | None = None,
    color: str | Sequence[str] | None = None, scalars: Tensor | None = None, cmap: Any = None,
    title: str = "", markers: str | None = "end", labels: Sequence[str] | None = None,
    plotter: Any = None,
) -> Any:  # fmt: skip
    """Draw curves as tubes: ``(time, 3)``, ``(time, ..., 3)`` or a list of ``(time_i, 3)``.

    ``scalars (time, ...)`` colour them by a value, else ``color`` (one, or one each), else a
    palette safe for colour-blind readers. ``markers`` puts balls at the ``"start"``, the
    ``"end"`` or ``"both"``; ``labels`` makes a legend.
    """
    need(markers in (None, "start", "end", "both"),
          f"curves: markers is {markers!r}, expected None, 'start', 'end' or 'both'")  # fmt: skip
    if isinstance(points, (list, tuple)):
        lines = [to_numbers("curves", f"points[{i}]", p, 3) for i, p in enumerate(points)]
    else:
        whole = to_numbers("curves", "points", points, 3)
        lines = list(whole.reshape(len(whole), -1, 3).unbind(1)) if whole.dim() > 1 else [whole]
    need(lines, "curves: points holds no curve")
    for p in lines:
        ok = p.dim() == 2 and len(p) > 0
        need(ok, f"curves: a curve has shape {tuple(p.shape)}, expected (time, 3)")
    names = read_names("curves", labels, len(lines))
    values: Sequence[Tensor] = ()
    if scalars is not None:
        s = to_numbers("curves", "scalars", scalars)
        values = s.reshape(len(s), -1).unbind(1) if s.dim() else ()
        need([len(s) for s in values] == [len(p) for p in lines],
              f"curves: scalars has shape {tuple(s.shape)}, expected (time, ...) "
              "like points")  # fmt: skip
    radius = radius or 0.004 * extent(torch.cat(lines))
    rgb = read_colors("curves", INK if values and color is None else color, len(lines))
    fresh, plotter = plotter is None, plotter or new_plotter()
    tubes = tubes_mesh(lines, radius, rgb, values)
    if tubes is not None:
        shown = {"scalars": "values", "rgb": False, "cmap": cmap or blend(*SEQUENTIAL)}
        shown |= bar_options(title) if title else {}
        add_mesh(plotter, "curves", tubes, **GLOSS, **(shown if values else {}))
    for at, ends, scale in ((0, ("start", "both"), 1.8), (-1, ("end", "both"), 2.6)):
        if markers in ends:
            _balls(plotter, "markers", torch.stack([p[at] for p in lines]), scale * radius, rgb)
    if names:
        _legend(plotter, names, rgb)
    if fresh:
        fit_camera(plotter, VIEW)
    return plotter


def _legend(plotter: Any, names: list[str], rgb: np.ndarray) -> None:
    entries = [[n, tuple(c / 255)] for n, c in zip(names, rgb, strict=True)]
    size = (0.16, 0.034 * len(names))
    plotter.add_legend(entries, bcolor=None, face="circle", loc="upper left", size=size)


def tubes_mesh(lines: Sequence[Tensor], radius: float, rgb: np.ndarray, values: Any = ()) -> Any:
    """Return all curves as one mesh of tubes; standing points carry none (VTK cannot)."""
    rows, cells, start = [], [], 0
    for i, line in enumerate(lines):
        step = (line[1:] - line[:-1]).norm(dim=-1)
        keep = torch.cat((torch.tensor([True]), step > 1e-9 * extent(line)))
        n = int(keep.sum())
        if n > 1:
            value = values[i][keep, None] if len(values) else line.new_zeros(n, 1)
            shade = torch.from_numpy(rgb[i]).expand(n, 3)
            rows.append(torch.cat((line[keep], shade, value), -1))
            cells += [n, *range(start, start + n)]
            start += n
    if not rows:
        return None
    table = torch.cat(rows).numpy()
    mesh = load_pyvista().PolyData(table[:, :3].copy(), lines=np.array(cells))
    if len(values):
        mesh["values"] = table[:, 6].copy()
    else:
        mesh["rgb"] = table[:, 3:6].astype(np.uint8)
    return mesh.tube(radius=radius, n_sides=14, capping=True)


def copies_mesh(centres: Tensor, rgb: np.ndarray, shape: Any, diameter: Any = 1.0) -> Any:
    """Return one mesh with a copy of ``shape`` at each of ``centres (n, 3)``."""
    cloud = load_pyvista().PolyData(centres.numpy())
    cloud["rgb"] = np.broadcast_to(rgb, (len(centres), 3)).copy()
    cloud["diameter"] = np.broadcast_to(np.asarray(diameter, float), len(centres)).copy()
    return cloud.glyph(orient=False, scale="diameter", geom=shape)


def _balls(plotter: Any, kind: str, centres: Tensor, radius: Any, rgb: np.ndarray) -> None:
    shape = load_pyvista().Sphere(radius=0.5, theta_resolution=28, phi_resolution=28)
    mesh = copies_mesh(centres, rgb, shape, 2 * np.asarray(radius))
    add_mesh(plotter, kind, mesh, **GLOSS).prop.interpolation = "Phong"


def geodesics(
    manifold: Any, path: Tensor, *, lift: float = 0.003, radius: float | None = None,
    background: dict[str, Any] | None = None, plotter: Any = None, **options: Any,
) -> Any:  # fmt: skip
    """Draw paths in the chart, ``(time, ..., 2)``, as tubes on the embedded surface.

    They are lifted along the normal by ``lift`` times the size of the surface. Without a plotter
    the surface is drawn too, with ``background`` as the options of :func:`surface`; all other
    ``options`` are those of :func:`curves`.
    """
    need_method("geodesics", manifold, "embedding")
    x, look = to_numbers("geodesics", "path", path, 2), background or {}
    need(x.dim() > 1, f"geodesics: path has shape {tuple(x.shape)}, expected (time, ..., 2)")
    points = _lifted("geodesics", manifold, x, lift, look)
    plotter = plotter or surface(manifold, **look)
    radius = radius or 0.004 * max(extent(points), float(plotter.length))
    return curves(points, radius=radius, plotter=plotter, **options)


def vectors(
    manifold: Any, x: Tensor, v: Tensor, *, scale: float = 1.0, color: str = INK,
    lift: float = 0.003, background: dict[str, Any] | None = None, plotter: Any = None,
) -> Any:  # fmt: skip
    """Draw tangent vectors ``v (..., 2)`` at ``x (..., 2)`` as arrows on the embedded surface.

    An arrow is ``scale`` times the pushforward of ``v`` by the embedding. Without a plotter the
    surface is drawn too, with ``background`` as the options of :func:`surface`.
    """
    need_method("vectors", manifold, "embedding")
    at, along, look = to_numbers("vectors", "x", x, 2), to_numbers("vectors", "v", v, 2), background
    try:
        at, along = torch.broadcast_tensors(at, along)
    except RuntimeError:
        raise ValueError(f"vectors: v has shape {tuple(along.shape)}, which does not broadcast "
                         f"with x of shape {tuple(at.shape)}") from None  # fmt: skip
    arrows = scale * push_forward("vectors", manifold, at, along)[1].reshape(-1, 3)
    points = _lifted("vectors", manifold, at, lift, look or {}).reshape(-1, 3)
    moving = arrows.norm(dim=-1) > 0
    plotter = plotter or surface(manifold, **look or {})
    if moving.any():
        cloud = load_pyvista().PolyData(points[moving].numpy())
        cloud["vectors"] = arrows[moving].numpy()
        form = {"tip_radius": 0.08, "tip_length": 0.28, "shaft_radius": 0.028}
        shape = load_pyvista().Arrow(tip_resolution=28, **form)
        mesh = cloud.glyph(orient="vectors", scale="vectors", geom=shape)
        add_mesh(plotter, "vectors", mesh, color=color, **GLOSS)
    return plotter


def orbits(
    points: Tensor, names: Sequence[str] | None = None, *, radius: float | None = None,
    sizes: float | Sequence[float] | None = None, color: str | Sequence[str] | None = None,
    plotter: Any = None,
) -> Any:  # fmt: skip
    """Draw trajectories of bodies ``(time, bodies, 3)``: lines, a ball at the end, names.

    ``sizes`` are the radii of the balls, one or one per body. All names stand in a legend, and
    beside their ball where there is room.
    """
    x = to_numbers("orbits", "points", points, 3)
    ok = x.dim() == 3 and 0 not in x.shape
    need(ok, f"orbits: points has shape {tuple(x.shape)}, expected (time, bodies, 3)")
    bodies, size = x.shape[1], extent(x)
    tags, rgb = read_names("orbits", names, bodies), read_colors("orbits", color, bodies)
    radii = np.asarray(0.009 * size if sizes is None else sizes, float)
    need(radii.shape in ((), (bodies,)), f"orbits: sizes has shape {radii.shape}, expected one "
          f"radius or {bodies}")  # fmt: skip
    fresh, plotter = plotter is None, plotter or new_plotter()
    curves(x, radius=radius or 0.0015 * size, color=color, markers=None, plotter=plotter)
    _balls(plotter, "bodies", x[-1], radii, rgb)
    if tags:
        above = x[-1].numpy() + np.multiply.outer(np.broadcast_to(radii, bodies), (0, 0, 1.5))
        plotter.add_point_labels(
            above, tags, show_points=False, shape=None, font_size=24, text_color=INK, bold=False,
            always_visible=True, justification_horizontal="center", reset_camera=False,
        )  # fmt: skip
        _legend(plotter, tags, rgb)
    if fresh:
        fit_camera(plotter, (0.0, -1.0, 0.9))
    return plotter
