"""Charts: what an audit measured, and Poincare sections."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from darboux._plot_input import PALETTE, need, to_numbers
from darboux._plot_scene import INK, load_pyvista, new_plotter
from darboux.integrators.audit import Report

DEFECTS = "o symplectic form   x volume"
_ROUND_OFF = 1e-17  # where a logarithmic axis shows an error of zero


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
    chart.legend_visible = False
    plotter.add_chart(chart)
    return chart
