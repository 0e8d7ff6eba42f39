"""Flat pictures: the latent plane of a learned metric, and strips of decoded images."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from darboux._plot_input import (
    Range,
    color_limits,
    match,
    need,
    need_method,
    read_colors,
    read_domain,
    read_names,
    read_values,
    rectangle,
    to_numbers,
)
from darboux._plot_scene import (
    INK,
    add_mesh,
    blend,
    fit_camera,
    load_pyvista,
    new_plotter,
)
from darboux._plot_space import copies_mesh, tubes_mesh

CHORD = "#C8321E"
CLASSES = ("#1F77B4", "#FF7F0E", "#2CA02C", "#D62728", "#9467BD",
           "#8C564B", "#E377C2", "#5F5F5F", "#BCBD22", "#17BECF")  # fmt: skip
DENSITY = ("#FBFCFD", "#6F87A6")


def latent(
    manifold: Any, *, points: Tensor | None = None, labels: Any = None,
    paths: Tensor | None = None, straight: bool | Tensor | None = None, images: Any = None,
    image_labels: Sequence[str] | None = None, bounds: Sequence[Range] | None = None,
    resolution: int = 200, relief: bool = False, title: str = "log volume", plotter: Any = None,
) -> Any:  # fmt: skip
    """Draw a learned metric on its latent plane: log sqrt(det g), data, geodesics, chords.

    ``points (n, 2)`` are coloured by their class ``labels (n,)``; ``paths (time, ..., 2)`` are
    drawn solid and ``straight`` dashed: paths of its own, or ``True`` for the chords of ``paths``.
    ``images`` adds a :func:`filmstrip` below. ``bounds`` are those of the manifold, else 8 %
    around all that is drawn. ``relief`` raises the plane by the log volume, which is
    ``manifold.log_volume(x)`` or else half the log determinant of ``metric(x)``.
    """
    need_method("latent", manifold, "log_volume" if hasattr(manifold, "log_volume") else "metric")
    dots = None if points is None else to_numbers("latent", "points", points, 2).reshape(-1, 2)
    lines = None if paths is None else to_numbers("latent", "paths", paths, 2)
    lines = None if lines is None else lines.reshape(len(lines), -1, 2)
    chords = None
    if isinstance(straight, Tensor):
        chords = to_numbers("latent", "straight", straight, 2).reshape(len(straight), -1, 2)
    elif straight:
        if lines is None:
            raise ValueError("latent: straight is True without paths whose chords to draw")
        t = torch.linspace(0, 1, 100, dtype=torch.float64)[:, None, None]
        chords = lines[:1] + t * (lines[-1:] - lines[:1])
    drawn = [d.reshape(-1, 2) for d in (dots, lines, chords) if d is not None]
    if bounds is None and getattr(manifold, "bounds", None) is None and drawn:
        low, high = torch.cat(drawn).aminmax(dim=0)
        edge = 0.08 * float((high - low).max()) or 1.0
        bounds = list(zip((low - edge).tolist(), (high + edge).tolist(), strict=True))
    domain = u, v = read_domain("latent", manifold, *(bounds or ()))
    width, height = u[1] - u[0], v[1] - v[0]
    size = math.hypot(width, height)
    n = (resolution, max(2, round(resolution * height / width)))
    x = rectangle(domain, n)
    density = _log_volume(manifold, x)
    low, high = color_limits(density)[:2] if density.min() == density.max() else density.aminmax()
    low, high = float(low), float(high)

    def place(z: Tensor, layer: float) -> Tensor:
        level = 1e-3 * size * layer + 0 * z[..., 0]
        if relief:
            level = level + 0.25 * size * (_log_volume(manifold, z) - high) / (high - low)
        return torch.cat((z, level[..., None]), -1)

    fresh, plotter = plotter is None, plotter or new_plotter()
    sheet = load_pyvista().StructuredGrid()
    sheet.points, sheet.dimensions = place(x, 0).reshape(-1, 3).numpy(), (*n, 1)
    sheet[title] = density.reshape(-1).numpy()
    shades = blend(*DENSITY)
    add_mesh(plotter, "latent", sheet, scalars=title, cmap=shades, clim=(low, high),
         lighting=relief, smooth_shading=relief, ambient=0.4 if relief else 0.0)  # fmt: skip
    rings = sheet.contour(np.linspace(low, high, 11)[1:-1], scalars=title)
    if rings.n_points:
        rings.points[:, 2] += 5e-4 * size
        add_mesh(
            plotter, "contours", rings, color="white", line_width=2, lighting=False, opacity=0.7
        )
    entries = [] if dots is None else _dots(plotter, place, dots, labels, 0.0042 * size)
    thick = 0.0022 * size
    if lines is not None:
        for kind, layer, radius, color in (("halo", 2.4, 1.9, "white"), ("paths", 6, 1, INK)):
            if kind == "halo" and relief:
                continue
            solid = [place(line, layer) for line in lines.unbind(1)]
            _ribbon(plotter, kind, solid, radius * thick, color)
        entries.append(("line", INK, "geodesic"))
    if chords is not None:
        dashes = [d for line in chords.unbind(1) for d in _dashes(line, 0.012 * size)]
        _ribbon(plotter, "straight", [place(d, 5) for d in dashes], 0.8 * thick, CHORD)
        entries.append(("dashed", CHORD, "straight line"))
    _key(plotter, entries, (u[1] + 0.025 * size, v[1]), 0.02 * size)
    bar = (u[1] + 0.025 * size, v[0], 0.25 * height, 0.018 * size)
    _color_key(plotter, shades, (low, high), title, *bar)
    if images is not None:
        below = (u[0], v[0] - 0.03 * height)
        filmstrip(images, image_labels, origin=below, width=width, plotter=plotter)
    if fresh:
        fit_camera(plotter, (0.0, -1.0, 1.2), top=not relief)
    return plotter


def _log_volume(manifold: Any, x: Tensor) -> Tensor:
    if hasattr(manifold, "log_volume"):
        return read_values("latent", "log_volume(x)", manifold.log_volume(match(manifold, x)), x)
    factor = torch.linalg.cholesky(manifold.metric(match(manifold, x)))
    half = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return read_values("latent", "log det metric(x) / 2", half, x)


def _dots(plotter: Any, place: Any, dots: Tensor, labels: Any, radius: float) -> list[Any]:
    """Add data points as discs with a white rim; return their legend entries."""
    kinds = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else labels
    kinds = np.zeros(len(dots)) if kinds is None else np.asarray(kinds)
    need(kinds.shape == (len(dots),),
          f"latent: labels has shape {kinds.shape}, expected ({len(dots)},)")  # fmt: skip
    names, index = np.unique(kinds, return_inverse=True)
    rgb = read_colors("latent", None, len(names), CLASSES)
    white = np.full((1, 3), 255, np.uint8)
    for kind, layer, outer, color in (("rims", 2, 1.35, white), ("points", 3, 1.0, rgb[index])):
        disc = load_pyvista().Disc(inner=0.0, outer=outer * radius, c_res=20)
        add_mesh(plotter, kind, copies_mesh(place(dots, layer), color, disc), lighting=False)
    entries = [("disc", tuple(c), str(k)) for c, k in zip(rgb, names, strict=True)]
    return [] if labels is None else entries


def _dashes(line: Tensor, dash: float) -> list[Tensor]:
    """Cut a polyline into dashes by arc length."""
    s = np.concatenate(([0.0], (line[1:] - line[:-1]).norm(dim=-1).cumsum(0).numpy()))
    starts = np.arange(0, s[-1], 2 * dash)
    times = [np.linspace(a, min(a + dash, s[-1]), 8) for a in starts]
    return [torch.from_numpy(np.stack([np.interp(t, s, c) for c in line.T], -1)) for t in times]


def _ribbon(plotter: Any, kind: str, lines: list[Tensor], radius: float, color: str) -> None:
    tubes = tubes_mesh(lines, radius, read_colors("latent", color, len(lines)))
    if tubes is not None:
        add_mesh(plotter, kind, tubes, lighting=False)


def _text(plotter: Any, text: str, x: float, y: float, height: float) -> None:
    """Write ``text`` into the plane of the scene, its base line from ``(x, y)``."""
    from vtkmodules.vtkRenderingFreeType import vtkVectorText

    source = vtkVectorText()
    source.SetText(text)
    source.Update()
    mesh = load_pyvista().PolyData(source.GetOutput())
    if mesh.n_points:
        mesh.points = np.asarray(mesh.points) * height + np.array((x, y, 0.0))
        add_mesh(plotter, "text", mesh, color=INK, lighting=False)


def _tile(x0: float, x1: float, y0: float, y1: float, z: float = 0.0, rows: int = 1) -> Any:
    centre = ((x0 + x1) / 2, (y0 + y1) / 2, z)
    return load_pyvista().Plane(center=centre, i_size=x1 - x0, j_size=y1 - y0,
                            i_resolution=1, j_resolution=rows)  # fmt: skip


def _key(plotter: Any, entries: list[Any], corner: tuple[float, float], em: float) -> None:
    """Write a legend downward from ``corner``."""
    pv = load_pyvista()
    for row, (kind, color, text) in enumerate(entries):
        x, y = corner[0], corner[1] - (1.4 * row + 0.5) * em
        dashes = ((0.0, 0.35), (0.55, 0.9), (1.1, 1.4)) if kind == "dashed" else ((0.0, 1.4),)
        mesh = pv.merge([_tile(x + a * em, x + b * em, y - em / 15, y + em / 15)
                         for a, b in dashes])  # fmt: skip
        if kind == "disc":
            mesh = pv.Disc(center=(x + 0.7 * em, y, 0), inner=0, outer=0.3 * em, c_res=28)
        add_mesh(plotter, "key", mesh, color=color, lighting=False)
        _text(plotter, text, x + 1.9 * em, y - 0.3 * em, 0.8 * em)


def _color_key(plotter: Any, shades: list[str], limits: Range, title: str, x: float, y: float,
               height: float, em: float) -> None:  # fmt: skip
    """Draw a colour bar upward from ``(x, y)``, in the scene."""
    mesh = _tile(x, x + 1.2 * em, y, y + height, rows=100)
    mesh["level"] = np.asarray(mesh.points)[:, 1].copy()
    add_mesh(plotter, "bar", mesh, scalars="level", cmap=shades, lighting=False)
    for t in (0.0, 0.5, 1.0):
        text = f"{limits[0] + t * (limits[1] - limits[0]):.3g}"
        _text(plotter, text, x + 1.7 * em, y + t * height - 0.35 * em, 0.85 * em)
    _text(plotter, title, x, y + height + 1.1 * em, em)


def filmstrip(
    rows: Any, labels: Sequence[str] | None = None, *, origin: tuple[float, float] = (0.0, 0.0),
    width: float = 1.0, cmap: Any = "gray_r", plotter: Any = None,
) -> Any:  # fmt: skip
    """Draw rows of grey images, ``(rows, n, h, w)`` or a list of ``(n, h, w)``, pixel by pixel.

    The strip hangs down from ``origin`` and is ``width`` wide, each of the ``labels`` above its
    row; all rows share one grey scale. Made to compare decoded images along a geodesic with those
    along the straight line.
    """
    strips = [to_numbers("filmstrip", f"rows[{i}]", r) for i, r in enumerate(rows)]
    need(strips, "filmstrip: rows is empty")
    for i, r in enumerate(strips):
        ok = r.dim() == 3 and 0 not in r.shape
        need(ok, f"filmstrip: rows[{i}] has shape {tuple(r.shape)}, expected (n, h, w)")
    names, pv = read_names("filmstrip", labels, len(strips)), load_pyvista()
    fresh, plotter = plotter is None, plotter or new_plotter()
    clim = (min(float(r.min()) for r in strips), max(float(r.max()) for r in strips))
    y, em = origin[1], 0.018 * width
    for i, strip in enumerate(strips):
        n, h, w = strip.shape
        pitch = width / (n - 0.06)
        side, tall = 0.94 * pitch, 0.94 * pitch * h / w
        if names:
            y -= 1.9 * em
            _text(plotter, names[i], origin[0], y + 0.55 * em, em)
        frames, tiles = [], []
        for k, image in enumerate(strip):
            x, rim = origin[0] + k * pitch, 0.015 * side
            where = {"origin": (x, y - tall, 0.0), "spacing": (side / w, tall / h, 1.0)}
            tiles.append(pv.ImageData(dimensions=(w + 1, h + 1, 1), **where))
            tiles[-1].cell_data["grey"] = image.flip(0).reshape(-1).numpy()
            box = (x - rim, x + side + rim, y - tall - rim, y + rim)
            frames.append(_tile(*box, z=-1e-3 * width))
        add_mesh(plotter, "frames", pv.merge(frames), color="#AEB6BF", lighting=False)
        add_mesh(plotter, "film", pv.merge(tiles), scalars="grey", cmap=cmap, clim=clim,
             lighting=False)  # fmt: skip
        y -= tall + 0.06 * side
    if fresh:
        fit_camera(plotter, top=True)
    return plotter
