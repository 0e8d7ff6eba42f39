"""Pictures of spectra: functions and their nodal lines, heat in motion, branches of eigenvalues."""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from darboux._plot_chart import _chart
from darboux._plot_film import film_path, write_film
from darboux._plot_input import PALETTE, color_limits, need, read_names, to_numbers
from darboux._plot_panels import add_labels, camera_frame, fit, turned
from darboux._plot_scene import (
    GLOSS,
    INK,
    add_mesh,
    bar_options,
    blend,
    load_pyvista,
    new_plotter,
)
from darboux._plot_space import DIVERGING, SEQUENTIAL, VIEW
from darboux.manifolds._mesh import Mesh
from darboux.manifolds.spectral.elements import lagrange
from darboux.manifolds.spectral.finite_elements import FiniteElements
from darboux.manifolds.spectral.operator import Operator

HEAT = ("#17203D", "#7A2E6E", "#E2583D", "#FFE08A")  # dark to light, as embers


# -- functions --------------------------------------------------------------------------------


def functions(
    mesh: Mesh | Operator, values: Tensor, *, labels: Sequence[str] | None = None,
    columns: int | None = None, nodal: bool = True, relief: float = 0.0,
    direction: Sequence[float] | None = None, cmap: Any = None,
    clim: tuple[float, float] | None = None, title: str = "", plotter: Any = None,
) -> Any:  # fmt: skip
    """Draw functions on a surface, ``(n,)`` or several ``(n, k)`` side by side.

    ``mesh`` is a triangle mesh in R^2 or R^3 with values at its vertices, or an operator made on
    one with the coefficients of its unknowns, such as ``spectrum.functions``: elements of higher
    order are then drawn with all their nodes. What changes sign gets a diverging map symmetric
    around zero and, with ``nodal``, its zero set as black lines. Each panel has its own limits
    unless ``clim`` gives them; one alone in a new window gets a colour bar.

    ``relief`` moves points along the normal, by up to that part of the size of the mesh.
    ``direction`` points to the eye, by default from above for a plane mesh. ``labels`` stand
    below the panels, in PNG only.
    """
    where = "functions"
    points, triangles, extend = _read_surface(where, mesh)
    table = to_numbers(where, "values", extend(values)).numpy()
    need(table.ndim in (1, 2) and table.shape[0] == len(points) and table.size,
          f"{where}: values has shape {tuple(values.shape)}, expected ({len(points)},) or "
          f"({len(points)}, k), one value for each point of the mesh")  # fmt: skip
    table = table.reshape(len(points), -1)
    count = table.shape[1]
    names = read_names(where, labels, count)
    plane = not np.ptp(points[:, 2]) and not relief
    axes = camera_frame(direction or ((0.0, 0.0, 1.0) if plane else VIEW))
    size = float(np.linalg.norm(np.ptp(points, axis=0)))
    sheets = [_sheet(points, triangles, column, relief * size) for column in table.T]
    seen = np.concatenate([sheet.points for sheet in sheets]) @ np.stack(axes).T
    low, high = seen.min(0), seen.max(0)
    width, height = (high - low)[:2]
    columns = columns or min(count, max(1, round(math.sqrt(1.6 * count * height / width))))
    step = (width + 0.08 * size) * axes[0], -(height + (0.16 if names else 0.08) * size) * axes[1]
    foot = np.array([(low[0] + high[0]) / 2, low[1] - 0.03 * size, low[2]]) @ np.stack(axes)
    limits = [color_limits(torch.from_numpy(column)) for column in table.T]
    diverging = any(signed for *_, signed in limits)
    shades = cmap or (DIVERGING if diverging else blend(*SEQUENTIAL))
    look: dict[str, Any] = {"scalars": "values", "cmap": shades, "render": False}
    look |= {"smooth_shading": not plane}
    look |= {"lighting": False} if plane else GLOSS
    look |= bar_options(title) if count == 1 and plotter is None else {}
    thick = 0.0016 * size * math.sqrt(columns)
    fresh, plotter = plotter is None, plotter or new_plotter()
    feet = []
    for k, (sheet, (bottom, top, signed)) in enumerate(zip(sheets, limits, strict=True)):
        shift = k % columns * step[0] + k // columns * step[1]
        sheet.points += shift
        if diverging:
            top = abs(table[:, k]).max() or 1.0
            bottom = -top
        add_mesh(plotter, "functions", sheet, clim=clim or (bottom, top), **look)
        if nodal and signed:
            _tubes(plotter, "nodal", _inner_contour(sheet, [0.0]), thick)
        _tubes(plotter, "rim", _rim(sheet), thick)
        feet.append(shift + foot)
    add_labels(plotter, np.array(feet), names)
    if fresh:
        seen = np.concatenate([mesh.points for mesh in plotter.meshes]) @ np.stack(axes).T
        low, high = seen.min(0), seen.max(0)
        low[1] -= 0.07 * size if names else 0.0
        fit(plotter, axes, low, high, bar=count == 1)
    return plotter


def _read_surface(where: str, mesh: Any) -> tuple[np.ndarray, np.ndarray, Callable[[Any], Any]]:
    """Return points ``(n, 3)``, triangles, and what takes values to all these points."""
    given: Any = mesh
    space = given.space if isinstance(mesh, Operator) else None
    if not isinstance(mesh, Mesh) and not isinstance(space, FiniteElements):
        raise TypeError(f"{where}: mesh is a {type(mesh).__name__}, expected a Mesh of triangles "
                        "or an Operator made on one")  # fmt: skip
    if isinstance(space, FiniteElements):
        whole, nodes = space.mesh, space.nodes()
        cells = space.elements.cpu().numpy()[:, _pieces(space.order)].reshape(-1, 3)
    else:
        whole, nodes, cells = given, given.vertices, given.cells.cpu().numpy()
    d, n = whole.dim, whole.vertices.shape[1]
    need((d, n) in ((2, 2), (2, 3)),
          f"{where}: mesh has cells of dimension {d} in R^{n}, expected triangles in R^2 or "
          "R^3")  # fmt: skip
    points = to_numbers(where, "vertices", nodes).numpy()

    def extend(values: Any) -> Any:
        if space is None:
            return values
        ok = isinstance(values, Tensor) and values.shape[:1] == (given.size,)
        need(ok, f"{where}: values has shape {tuple(getattr(values, 'shape', ()))}, expected "
             f"({given.size}, ...), one coefficient for each unknown of the operator")  # fmt: skip
        return given.extend(values)

    return np.concatenate([points, np.zeros((len(points), 3 - n))], 1), cells, extend


def _pieces(order: int) -> np.ndarray:
    """Return the small triangles between the nodes of an element, ``(order^2, 3)``."""
    place = {tuple(e): i for i, e in enumerate(lagrange(2, order).exponents[:, 1:].tolist())}
    found = []
    for i, j in place:
        corners = [(i, j), (i + 1, j), (i, j + 1)], [(i + 1, j), (i + 1, j + 1), (i, j + 1)]
        found += [[place[c] for c in piece] for piece in corners if all(c in place for c in piece)]
    return np.array(found)


def _sheet(points: np.ndarray, triangles: np.ndarray, values: np.ndarray, relief: float) -> Any:
    sheet = load_pyvista().PolyData.from_regular_faces(points.copy(), triangles)
    normals = {"split_vertices": False, "auto_orient_normals": False, "cell_normals": False}
    sheet = sheet.compute_normals(**normals)
    if relief:
        raised = values / (abs(values).max() or 1.0)
        sheet.points += relief * raised[:, None] * sheet.point_data["Normals"]
        sheet = sheet.compute_normals(**normals)
    sheet["values"] = values
    sheet["rim"] = np.isin(np.arange(len(points)), _rim(sheet)["index"]).astype(float)
    return sheet


def _rim(sheet: Any) -> Any:
    """Return the boundary edges; what is glued elsewhere is a boundary to the eye."""
    sheet["index"] = np.arange(sheet.n_points)
    return sheet.extract_feature_edges(feature_edges=False, manifold_edges=False)


def _inner_contour(sheet: Any, levels: Any) -> Any:
    """Return level lines without those that run along the rim, as zero on a Dirichlet boundary."""
    lines = sheet.contour(levels, scalars="values")
    if not lines.n_cells:
        return lines
    ends = lines.lines.reshape(-1, 3)[:, 1:]
    inside = (lines["rim"][ends] < 1).any(1)
    return load_pyvista().PolyData(lines.points, lines=lines.lines.reshape(-1, 3)[inside])


def _tubes(plotter: Any, kind: str, lines: Any, radius: float) -> None:
    if lines.n_cells:
        tubes = lines.clean().strip(join=True).tube(radius=radius, n_sides=10)
        add_mesh(plotter, kind, tubes, color=INK, lighting=False, render=False)


# -- heat -------------------------------------------------------------------------------------


def heat(
    mesh: Mesh | Operator, frames: Tensor, path: str | os.PathLike[str], *, fps: int = 20,
    width: int = 600, turn: float = 0.0, relief: float = 0.0,
    direction: Sequence[float] | None = None, cmap: Any = None,
    clim: tuple[float, float] | None = None, lines: int = 0,
) -> Path:  # fmt: skip
    """Write a film of a function that changes, ``frames (time, n)``, as ``.gif`` or ``.mp4``.

    ``mesh`` and the values of a frame are those of :func:`functions`. All frames share the colour
    limits ``clim``, by default the extremes of all. ``turn`` is the angle, in degrees, by which
    the camera goes around the vertical axis, ``relief`` the height of the largest value in parts
    of the size of the mesh, ``lines`` a number of level lines. MP4 needs
    ``pip install darboux[animate]``. The file appears whole or not at all.
    """
    target = film_path("heat", path, fps, width)
    points, triangles, extend = _read_surface("heat", mesh)
    need(isinstance(frames, Tensor) and frames.dim() == 2 and len(frames),
          f"heat: frames has shape {tuple(getattr(frames, 'shape', ()))}, expected (time, n), "
          "time > 0")  # fmt: skip
    table = to_numbers("heat", "frames", extend(frames.mT)).mT.numpy()
    need(table.shape[1] == len(points),
          f"heat: frames has shape {tuple(frames.shape)}, expected (time, {len(points)}), one "
          "value for each point of the mesh")  # fmt: skip
    bottom, top, signed = color_limits(torch.from_numpy(table))
    limits = clim or (bottom, top)
    plane = not np.ptp(points[:, 2]) and not relief
    axes = camera_frame(direction or ((0.0, 0.0, 1.0) if plane else VIEW))
    views = [turned(axes, math.radians(turn) * i / len(table)) for i in range(len(table))]
    size = float(np.linalg.norm(np.ptp(points, axis=0)))
    unit = relief * size / max(abs(table).max(), 1e-300)
    look: dict[str, Any] = {"cmap": cmap or (DIVERGING if signed else blend(*HEAT))}
    look |= {"clim": limits, "render": False, "smooth_shading": not plane}
    look |= {"lighting": False} if plane else GLOSS

    def sheet(i: int) -> Any:
        return _sheet(points, triangles, table[i], unit * abs(table[i]).max())

    # the camera goes around the middle, and all that is ever seen fits the window
    middle = (points.min(0) + points.max(0)) / 2
    some = range(0, len(table), 1 if relief else 1 + len(table) // 16)
    ranges = [(np.asarray(sheet(i).points) - middle) @ np.stack(views[i]).T for i in some]
    low = np.min([seen.min(0) for seen in ranges], axis=0)
    high = np.max([seen.max(0) for seen in ranges], axis=0)
    levels = np.linspace(*limits, lines + 2)[1:-1]
    images, plotter = [], new_plotter()
    try:
        for i, view in enumerate(views):
            plotter.clear_actors()
            surface = sheet(i)
            add_mesh(plotter, "heat", surface, scalars="values", **look)
            if lines:
                _tubes(plotter, "lines", _inner_contour(surface, levels), 0.0018 * size)
            _tubes(plotter, "rim", _rim(surface), 0.0022 * size)
            shift = np.stack(view) @ middle
            fit(plotter, view, low + shift, high + shift, width=width)
            plotter.render()
            images.append(np.asarray(plotter.screenshot(return_img=True)))
    finally:
        plotter.close()
    return write_film(target, images, fps)


# -- branches ---------------------------------------------------------------------------------


def spectrum(
    branches: Sequence[Any], *, dots: Sequence[Any] | None = None,
    groups: Sequence[int] | None = None, labels: Sequence[str] | None = None,
    axes: Sequence[str] = ("t", "eigenvalue"), title: str = "",
) -> Any:  # fmt: skip
    """Draw branches of eigenvalues: ``(ts (T,), values (T, k))``, or a ``Track``, as lines.

    ``dots`` is another such pair to compare with. Branches of one number in ``groups (k,)`` share
    a colour and one of the ``labels``.
    """
    ts, values = _read_branches("branches", branches)
    pair = None if dots is None else _read_branches("dots", dots)
    kinds = list(range(values.shape[1]) if groups is None else groups)
    widths = {values.shape[1], values.shape[1] if pair is None else pair[1].shape[1]}
    need(widths == {len(kinds)},
          f"spectrum: {len(kinds)} groups and {sorted(widths)} branches, expected as "
          "many")  # fmt: skip
    shades = {kind: PALETTE[i % len(PALETTE)] for i, kind in enumerate(sorted(set(kinds)))}
    names = read_names("spectrum", labels, len(shades)) or [""] * len(shades)
    tags = dict(zip(shades, names, strict=True))
    plotter = new_plotter(smooth=False)
    plotter.window_size = [1300, 1000]
    chart = _chart(plotter, None, title, *axes)
    for kind, line in zip(kinds, values.T, strict=True):
        chart.line(ts, line, color=shades[kind], width=3.0, label=tags.pop(kind, ""))
    if pair is not None:
        for kind, column in zip(kinds, pair[1].T, strict=True):
            chart.scatter(pair[0], column, color=shades[kind], size=9)
    for axis, data in ((chart.x_axis, (ts, pair[0] if pair else ts)), (chart.y_axis, values)):
        low, high = np.min(np.concatenate(data)), np.max(np.concatenate(data))
        axis.range = [low - 0.02 * (high - low), high + 0.02 * (high - low)]
    chart.GetTitleProperties().SetFontSize(24)
    chart.GetLegend().SetLabelSize(20)
    chart.legend_visible = any(names)
    return plotter


def _read_branches(name: str, pair: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    ts, values = (to_numbers("spectrum", name, part).numpy() for part in pair[:2])
    need(ts.ndim == 1 and values.ndim == 2 and len(ts) == len(values) and values.size,
          f"spectrum: {name} has shapes {ts.shape} and {values.shape}, expected (T,) and "
          "(T, k)")  # fmt: skip
    return ts, values
