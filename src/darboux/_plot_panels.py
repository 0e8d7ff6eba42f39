"""Panels side by side: the camera that looks straight at them, and the labels below."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from darboux._plot_scene import INK

Frame = tuple[np.ndarray, np.ndarray, np.ndarray]  # right, up, back: an orthonormal frame


def camera_frame(direction: Sequence[float]) -> Frame:
    """Return the frame of an eye that looks from ``direction``, the third axis upward."""
    back = np.asarray(direction, float) / np.linalg.norm(direction)
    upward = np.array((0.0, 0.0, 1.0) if abs(back[2]) < 0.999 else (0.0, 1.0, 0.0))
    right = np.cross(upward, back) / np.linalg.norm(np.cross(upward, back))
    return right, np.cross(back, right), back


def turned(axes: Frame, angle: float) -> Frame:
    """Return the frame turned around the vertical axis."""
    c, s = math.cos(angle), math.sin(angle)
    turn = np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])
    return turn @ axes[0], turn @ axes[1], turn @ axes[2]


def fit(
    plotter: Any, axes: Frame, low: np.ndarray, high: np.ndarray, bar: bool = False,
    width: int = 1400,
) -> None:  # fmt: skip
    """Look along the frame in parallel projection at the box ``low, high`` given in it.

    The window takes its shape, with room at the right for a bar.
    """
    margin = 0.03 * (high - low)[:2].max()
    low, high = low - margin, high + margin
    if bar:
        high[0] += 0.2 * (high[0] - low[0])
    across, tall = (high - low)[:2]
    # even numbers, as films want them
    pixels = [width, min(max(width * tall / across, 0.35 * width), 1.3 * width)]
    shape = [2 * math.ceil(p / 2) for p in pixels]
    if list(plotter.window_size) != shape:
        plotter.window_size = shape
    camera, focus = plotter.camera, (low + high) / 2 @ np.stack(axes)
    camera.focal_point, camera.up = focus, tuple(axes[1])
    camera.position = focus + 2 * np.linalg.norm(high - low) * axes[2]
    plotter.enable_parallel_projection()
    aspect = plotter.window_size[0] / plotter.window_size[1]
    camera.parallel_scale = max(tall, across / aspect) / 2
    camera.is_set = True
    plotter.reset_camera_clipping_range()


def add_labels(plotter: Any, feet: np.ndarray, names: Sequence[str]) -> None:
    """Write names below the points ``feet (n, 3)``, centred; they appear in PNG only."""
    if names:
        plotter.add_point_labels(
            feet, names, show_points=False, shape=None, font_size=26, text_color=INK,
            font_file=_font(), bold=False, always_visible=True, reset_camera=False,
            justification_horizontal="center", justification_vertical="top",
        )  # fmt: skip


def _font() -> str:
    """Return the file of a font with Greek letters, which those inside VTK lack."""
    from matplotlib import get_data_path

    return str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))
