"""One page about the heads of a trained model: responses, scores, maps."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from darboux._plot_chart import _chart
from darboux._plot_input import PALETTE, need
from darboux._plot_scene import blend, load_pyvista, new_plotter, save
from darboux._plot_space import SEQUENTIAL
from darboux.learners.forensics import Bode, Report

TERMS = ("static", "anticipation", "drift", "kinematic")


def forensics(report: Report) -> Any:
    """Draw a report on heads: magnitude and phase of the keys' filters, terms, scores, a map.

    Lines are the theory, dots are measured; the report ``before``, if any, is drawn in dashes and
    crosses. Colours are heads, those of all layers in a row; the map is that of the head with the
    highest induction score.
    """
    need(len(report.heads) > 0, "forensics: the report has no heads, expected at least one")
    plotter = new_plotter((2, 3), smooth=False)
    plotter.window_size = [2100, 1300]
    angle = "frequency over pi"
    gain = _chart(plotter, (0, 0), "magnitude of the keys' filters", angle, "gain")
    phase = _chart(plotter, (0, 1), "phase", angle, "phase over pi")
    for old, found in ((True, report.before), (False, report)):
        if found is not None:
            _responses(gain, phase, _rows(found), old)
    gain.x_range = phase.x_range = [0, 1]
    terms = _chart(plotter, (0, 2), "size of the parts of the scores", "head", "share")
    split = [row.shares for row in report.heads]
    known = [i for i, row in enumerate(split) if not np.isnan(row).any()]
    if known:
        columns = [[split[i][k] for i in known] for k in range(4)]
        terms.bar(known, columns, color=list(PALETTE[1:5]), label=list(TERMS))
        terms.legend_visible = True
        terms.y_range = [0, 1.35]  # room for the legend
    scores = _chart(plotter, (1, 0), "heads", "head", "mean weight on")
    heads = np.arange(len(report.heads))
    columns = [[row.previous for row in report.heads], [row.induction for row in report.heads]]
    names = ["the previous token", "what followed this token"]
    for column, name, color in zip(columns, names, PALETTE[5:7], strict=True):
        scores.bar(heads, column, color=color, label=name)  # bars at one place stand side by side
    scores.legend_visible, scores.y_range = True, [0, 1.25]
    for chart in (gain, phase, terms, scores):
        chart.GetTitleProperties().SetFontSize(24)
        chart.GetLegend().SetLabelSize(18)
    for chart in (terms, scores):
        chart.x_range = [-0.6, len(heads) - 0.4]
        chart.x_axis.tick_locations = heads
        chart.x_axis.tick_labels = [f"{row.layer}:{row.head}" for row in report.heads]
    best = max(report.heads, key=lambda row: row.induction)
    _map(plotter, (1, 1), report.maps[best.layer][0, best.head].cpu().numpy())
    _note(plotter, (1, 1), f"{best.layer}:{best.head}, one sequence: rows look at columns")
    plotter.subplot(1, 2)
    plotter.add_text(_table(report), position=(0.04, 0.4), viewport=True, font_size=12,
                     color=PALETTE[0], font="courier")  # fmt: skip
    return plotter


def page(report: Report, path: str | os.PathLike[str]) -> Path:
    """Draw the report and write it."""
    plotter = forensics(report)
    try:
        return save(plotter, path)
    finally:
        plotter.close()


def _rows(report: Report) -> list[tuple[int, Bode]]:
    """Return the place of each head in the report, its number in the layer and its response."""
    return [
        (row.head, report.bodes[row.layer]) for row in report.heads if row.layer in report.bodes
    ]


def _responses(gain: Any, phase: Any, rows: Sequence[tuple[int, Bode]], old: bool) -> None:
    for i, (head, found) in enumerate(rows):
        at = found.frequencies.double().cpu().numpy()
        # real filters: at -w stands the conjugate of what stands at w
        at = np.angle(np.exp(1j * at))
        flip = at < 0
        measured, theory = (
            np.where(flip, np.conj(z), z)
            for z in (z[head].cpu().numpy() for z in (found.measured, found.theory))
        )
        x, order = np.abs(at).ravel() / np.pi, np.argsort(np.abs(at).ravel())
        few = order[:: max(1, len(order) // 40)]
        color = PALETTE[i % len(PALETTE)]
        line = {"color": color, "width": 2.0, "style": "--" if old else "-"}
        for chart, read in ((gain, np.abs), (phase, lambda z: np.angle(z) / np.pi)):
            chart.line(x[order], read(theory).ravel()[order], **line)
            dots = {"color": color, "size": 9, "style": "x" if old else "o"}
            chart.scatter(x[few], read(measured).ravel()[few], **dots)


def _map(plotter: Any, place: tuple[int, int], weights: np.ndarray) -> None:
    plotter.subplot(*place)
    n, m = weights.shape
    image = load_pyvista().ImageData(dimensions=(m + 1, n + 1, 1))
    image.cell_data["weight"] = weights[::-1].ravel()
    plotter.add_mesh(image, scalars="weight", cmap=blend("#FFFFFF", *SEQUENTIAL),
                     clim=(0, 1), show_scalar_bar=False, lighting=False)  # fmt: skip
    plotter.view_xy()
    plotter.enable_parallel_projection()
    plotter.camera.zoom(1.1)


def _note(plotter: Any, place: tuple[int, int], text: str) -> None:
    plotter.subplot(*place)
    plotter.add_text(text, position="upper_edge", font_size=12, color=PALETTE[0])


def _table(report: Report) -> str:
    """Return the numbers that the charts do not show."""
    lines = [f"{'head':14}{'gamma q':>8}{'gamma k':>8}{'energy':>8}{'bode r':>8}"]
    for row in report.heads[:24]:
        name = f"{row.layer}:{row.head}"[-13:]
        numbers = (row.gamma_q, row.gamma_k, row.energy, row.bode)
        cells = "".join(f"{x:8.3f}" if x == x else f"{'-':>8}" for x in numbers)
        lines.append(f"{name:14}{cells}")
    return "\n".join(lines)
