"""Charts: lines, what an audit measured, and Poincare sections."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from darboux._plot_input import PALETTE, need, to_numbers
from darboux._plot_scene import INK, load_pyvista, new_plotter
from darboux.integrators.audit import Report

DEFECTS = "o symplectic form   x volume"
_ROUND_OFF = 1e-17  # where a logarithmic axis shows an error of zero


Curves = Mapping[str, Sequence[Any]]  # label: x (n,), y (n,), and a band low (n,), high (n,)


def lines(
    panels: Curves | Sequence[Curves], *, axes: Sequence[Any] = ("x", "y"),
    log: str | Sequence[str] = "", titles: str | Sequence[str] = "", dots: bool = False,
) -> Any:  # fmt: skip
    """Draw curves ``{label: (x, y)}`` or ``(x, y, low, high)`` with a band, each ``(n,)``.

    Several such mappings are panels side by side; one label has one colour in all of them, and
    dashes when the colours are used up. A label that starts with an underscore is not in the
    legend, and its curve is thin and grey: a reference. ``axes`` are the names of x and y,
    ``log`` is made of ``x`` and ``y``, and ``titles`` are headings: one for all panels or one
    for each. ``dots`` marks the points too. Where no corner is free for the legend, the y axis
    makes room.
    """
    where = "lines"
    maps = [panels] if isinstance(panels, Mapping) else list(panels)
    need(len(maps) > 0 and all(len(curves) > 0 for curves in maps),
         f"{where}: {len(maps)} panels, expected at least one, with a curve in each")  # fmt: skip
    pairs = [axes] * len(maps) if all(isinstance(a, str) for a in axes) else list(axes)
    logs = [log] * len(maps) if isinstance(log, str) else list(log)
    heads = [titles] * len(maps) if isinstance(titles, str) else list(titles)
    for name, found in (("axes", pairs), ("log", logs), ("titles", heads)):
        need(len(found) == len(maps),
             f"{where}: {name} has {len(found)} entries for {len(maps)} panels")  # fmt: skip
    read = [
        {label: _read_curve(where, label, curve, scale) for label, curve in curves.items()}
        for curves, scale in zip(maps, logs, strict=True)
    ]
    shown = dict.fromkeys(k for curves in read for k in curves if not k.startswith("_"))
    looks = {}
    for i, label in enumerate(shown):
        style = "-" if i < len(PALETTE) else "--"
        looks[label] = {"color": PALETTE[i % len(PALETTE)], "width": 3.0, "style": style}
    plotter = new_plotter((1, len(maps)), smooth=False)
    size = [max(1000, 800 * len(maps)), 760]
    plotter.window_size = size
    for i, (curves, pair, scale, head) in enumerate(zip(read, pairs, logs, heads, strict=True)):
        chart = _chart(plotter, (0, i), head, *pair, log=scale)
        _draw_curves(chart, curves, looks, dots)
        pixels = size[0] / len(maps), size[1]
        _place_legend(chart, curves, scale, (pixels[0] - 130, pixels[1] - 160))
    return plotter


def _read_curve(where: str, label: str, curve: Sequence[Any], log: str) -> list[np.ndarray]:
    need(len(curve) in (2, 4),
         f"{where}: {label!r} has {len(curve)} parts, expected x, y and perhaps low, "
         "high")  # fmt: skip
    parts = [to_numbers(where, f"{label}[{i}]", part).numpy() for i, part in enumerate(curve)]
    shapes = [part.shape for part in parts]
    need(len(set(shapes)) == 1 and parts[0].ndim == 1 and parts[0].size,
         f"{where}: {label!r} has shapes {shapes}, expected (n,) of each, n > 0")  # fmt: skip
    for axis, some in (("x", parts[:1]), ("y", parts[1:])):
        if axis in log:
            least = min(float(part.min()) for part in some)
            need(least > 0, f"{where}: {label!r} has {least:g} on the logarithmic {axis} "
                 "axis, expected positive numbers")  # fmt: skip
    return parts


def _draw_curves(chart: Any, curves: dict[str, list[np.ndarray]], looks: Any, dots: bool) -> None:
    for label, (x, *band) in curves.items():
        if len(band) == 3:
            rgb = load_pyvista().Color(looks[label]["color"]).int_rgb if label in looks else None
            chart.area(x, band[1], band[2], color=(*(rgb or (150, 150, 150)), 50))
    # a reference lies below the rest
    for label in sorted(curves, key=lambda k: not k.startswith("_")):
        x, y = curves[label][:2]
        look = looks.get(label, {"color": "#8A8A8A", "width": 2.0, "style": "--"})
        chart.line(x, y, label="" if label.startswith("_") else label, **look)
        if dots and label in looks:
            chart.scatter(x, y, color=look["color"], size=11)


def _place_legend(
    chart: Any, curves: dict[str, list[np.ndarray]], log: str, pixels: tuple[float, float]
) -> None:
    """Set the ranges of both axes, and the legend into the corner that the data leave free."""
    names = [label for label in curves if not label.startswith("_")]
    chart.GetTitleProperties().SetFontSize(24)
    chart.legend_visible = shown = len(names) > 1 or (len(curves) == 1 and any(names))
    ends, path = [], []
    for axis, every in (("x", [c[0] for c in curves.values()]),
                        ("y", [p for c in curves.values() for p in c[1:]])):  # fmt: skip
        data = np.concatenate(every)
        data = np.log10(data) if axis in log else data
        low, high = data.min(), data.max()
        edge = 0.03 * (high - low) or 0.5
        ends.append([low - edge, high + edge])
    for curve in curves.values():
        x = np.log10(curve[0]) if "x" in log else curve[0]
        for y in curve[1:]:
            y = np.log10(y) if "y" in log else y
            # the line between two points may cross the legend too
            t = np.linspace(0, len(x) - 1, 8 * len(x))
            path.append(np.stack([np.interp(t, np.arange(len(x)), z) for z in (x, y)], -1))
    if shown:
        legend = chart.GetLegend()
        legend.SetLabelSize(18)
        legend.GetPen().SetLineType(0)  # no border
        legend.GetBrush().SetOpacityF(0.0)
        wide = min(0.95, (10.5 * max(map(len, names)) + 60) / pixels[0])
        tall = min(0.8, (30.0 * len(names) + 30) / pixels[1])
        at = np.concatenate(path)
        at = (at - [e[0] for e in ends]) / [e[1] - e[0] for e in ends]
        corners = {}
        for right in (True, False):
            inside = at[at[:, 0] > 1 - wide] if right else at[at[:, 0] < wide]
            # what the y axis must grow by for the legend to be free, above or below
            above = max(inside[:, 1].max(initial=0.0), 0.0)
            below = 1 - min(inside[:, 1].min(initial=1.0), 1.0)
            corners[right, True], corners[right, False] = above, below
        (right, top), reach = min(corners.items(), key=lambda kv: kv[1])
        grow = max(0.0, (reach + tall - 1) / (1 - tall)) * (ends[1][1] - ends[1][0])
        ends[1][1 if top else 0] += grow if top else -grow
        legend.SetHorizontalAlignment(2 if right else 0)  # vtkChartLegend.RIGHT, LEFT
        legend.SetVerticalAlignment(3 if top else 4)  # TOP, BOTTOM
    for axis, (low, high), name in zip((chart.x_axis, chart.y_axis), ends, "xy", strict=True):
        axis.range = [10**low, 10**high] if name in log else [low, high]


def audit(report: Report) -> Any:
    """Draw a report: energy error against time, order, work against precision, defects.

    Errors in the second and third panel are those after equal times, relative; the work is the
    number of evaluations of the force or field.
    """
    need(len(report.rows) > 0, "audit: the report has no rows, expected at least one")
    plotter = new_plotter((2, 2), smooth=False)
    energy = _chart(plotter, (0, 0), "energy", "time", "relative error", log="y")
    order = _chart(plotter, (0, 1), "order", "time step", "error", log="xy")
    work = _chart(plotter, (1, 0), "work and precision", "evaluations", "error", log="xy")
    defect = _chart(plotter, (1, 1), "defects of one step", DEFECTS, "largest entry", log="y")
    for i, row in enumerate(report.rows):
        color = PALETTE[i % len(PALETTE)]
        look = {"color": color, "width": 3.0, "style": "-" if i < len(PALETTE) else "--"}
        if row.times:
            energy.line(row.times, [max(e, _ROUND_OFF) for e in row.energy_errors], **look)
        if row.dts and math.isfinite(row.evals):
            order.line(row.dts, row.errors, **look)
            cost = [row.evals * row.dts[0] / dt for dt in row.dts]
            work.line(cost, row.errors, label=row.method, **look)
        for value, marker in ((row.symplecticity, "o"), (row.volume, "x")):
            if math.isfinite(value):
                defect.scatter([i], [max(value, _ROUND_OFF)], color=color, size=14, style=marker)
    work.legend_visible = True
    defect.x_range = [-1, len(report.rows)]
    defect.x_axis.tick_labels_visible = defect.x_axis.ticks_visible = False
    return plotter


def section(
    points: Tensor | Sequence[Tensor], *, axes: Sequence[str] = ("q", "p"), title: str = ""
) -> Any:
    """Draw the crossings ``(n, 2)`` of one orbit with a plane, or of several, each in a colour."""
    orbits = [points] if isinstance(points, Tensor) else list(points)
    need(len(orbits) > 0, "section: no orbits, expected at least one")
    plotter = new_plotter(smooth=False)
    plotter.window_size = [1000, 1000]
    chart = _chart(plotter, None, title, *axes)
    for i, orbit in enumerate(orbits):
        xy = to_numbers("section", f"points[{i}]", orbit, 2).reshape(-1, 2)
        if len(xy):
            chart.scatter(xy[:, 0], xy[:, 1], size=3, color=PALETTE[i % len(PALETTE)])
    chart.legend_visible = False
    return plotter


def _chart(
    plotter: Any, place: tuple[int, int] | None, title: str, x: str, y: str, *, log: str = ""
) -> Any:
    if place is not None:
        plotter.subplot(*place)
    chart = load_pyvista().Chart2D(x_label=x, y_label=y)
    chart.title = title
    chart.background_color = "white"
    chart.x_axis.log_scale, chart.y_axis.log_scale = "x" in log, "y" in log
    for axis in (chart.x_axis, chart.y_axis):
        axis.label_size, axis.tick_label_size = 20, 16
        axis.pen.color = INK
        axis.GetLabelProperties().SetUseTightBoundingBox(1)  # else specks appear below the digits
    chart.legend_visible = False
    plotter.add_chart(chart)
    return chart
