"""Pictures of particles: clouds over a density or on the unit sphere, and films of them."""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from darboux._plot_film import film_path, write_film
from darboux._plot_input import PALETTE, Range, need, read_colors, read_names, to_numbers
from darboux._plot_panels import Frame, add_labels, camera_frame, fit, turned
from darboux._plot_scene import add_mesh, blend, load_pyvista, new_plotter
from darboux._plot_space import VIEW

Density = Callable[[Tensor], Tensor]
LEVELS = ("#FFFFFF", "#DCE6F0", "#A9C0D8", "#7396BB")  # light enough for dots on top
PAPER = (232, 236, 241)  # the far side of a sphere, and what particles there fade to


def particles(
    x: Tensor | Sequence[Tensor], *, density: Density | None = None,
    bounds: Sequence[Range] | None = None, labels: Sequence[str] | None = None,
    columns: int | None = None, color: str | Sequence[str] | None = None,
    groups: Tensor | Sequence[int] | None = None, size: float = 0.012,
    direction: Sequence[float] = VIEW,
) -> Any:  # fmt: skip
    """Draw clouds of particles side by side: ``(N, d)``, ``(panels, N, d)`` or a list of clouds.

    In the plane, d = 2, over filled contours of the ``density``, a callable ``(..., 2) -> (...)``
    that may lack a factor: each shade ends where the density has fallen by another factor e.
    ``bounds`` are ``((left, right), (low, high))``, by default what holds all particles; those
    outside are not drawn. On the unit sphere, d = 3, what is on the far side is seen through it,
    faded. ``color`` is one for all or one for each particle, ``groups (N,)`` chooses colours by
    number, ``size`` is the radius of a particle in parts of a panel. ``labels`` stand below the
    panels, in PNG only.
    """
    where = "particles"
    clouds, plane = _read_clouds(where, x)
    names = read_names(where, labels, len(clouds))
    rgb = [_shades(where, len(cloud), color, groups) for cloud in clouds]
    box = _box(where, clouds, plane, density, bounds)
    axes = camera_frame((0.0, 0.0, 1.0) if box is not None else direction)
    low, high = (np.array(b, float) for b in (box if box is not None else _round(size)))
    width, height = high - low
    some = round(math.sqrt(1.8 * len(clouds) * height / width))
    across = columns or (len(clouds) if len(clouds) <= 4 else max(1, some))
    span = float(max(width, height))
    step = (width + 0.06 * span, height + (0.14 if names else 0.06) * span)
    plotter, feet = new_plotter(), []
    ground = None if box is None or density is None else _ground(where, density, low, high)
    for k, (cloud, shades) in enumerate(zip(clouds, rgb, strict=True)):
        place = np.array([k % across * step[0], -(k // across) * step[1]])
        shift = place @ np.stack(axes[:2])
        if box is not None:
            _sheet(plotter, ground, low, high, shift)
            seen = ((cloud[:, :2] >= low) & (cloud[:, :2] <= high)).all(1)
            _dots(plotter, cloud[seen], shades[seen], axes, size * span, shift)
        else:
            _ball(plotter, shift, size * span)
            _dots(plotter, cloud, _faded(cloud, shades, axes), axes, size * span, shift)
        middle = place + (low + high) / 2
        feet.append([middle[0], place[1] + low[1] - 0.03 * span] @ np.stack(axes[:2]))
    rows = -(-len(clouds) // across)
    drop = (rows - 1) * step[1] + (0.09 * span if names else 0.0)
    first = low - np.array([0.0, drop])
    last = high + np.array([(min(across, len(clouds)) - 1) * step[0], 0.0])
    add_labels(plotter, np.array(feet), names)
    fit(plotter, axes, np.append(first, -1.0), np.append(last, 1.0))
    return plotter


def particle_film(
    frames: Tensor, path: str | os.PathLike[str], *, density: Density | None = None,
    bounds: Sequence[Range] | None = None, color: str | Sequence[str] | None = None,
    groups: Tensor | Sequence[int] | None = None, size: float = 0.018, trail: int = 0,
    fps: int = 20, width: int = 480, turn: float = 0.0, direction: Sequence[float] = VIEW,
) -> Path:  # fmt: skip
    """Write a film of moving particles ``(time, N, d)`` as ``.gif`` or ``.mp4``.

    The options are those of :func:`particles`. Behind each particle is drawn where it was in the
    last ``trail`` frames; ``turn`` is the angle, in degrees, by which the camera goes around the
    sphere. MP4 needs ``pip install darboux[animate]``. The file appears whole or not at all.
    """
    where = "particle_film"
    target = film_path(where, path, fps, width)
    shape = tuple(getattr(frames, "shape", ()))
    need(len(shape) == 3 and 0 not in shape,
         f"{where}: frames has shape {shape}, expected (time, N, 2) or (time, N, 3)")  # fmt: skip
    need(trail >= 0, f"{where}: trail is {trail}, expected at least 0")
    clouds, plane = _read_clouds(where, frames)
    shades = _shades(where, len(clouds[0]), color, groups)
    box = _box(where, clouds, plane, density, bounds)
    axes = camera_frame((0.0, 0.0, 1.0) if plane else direction)
    low, high = (np.array(b, float) for b in (box if plane else _round(size)))
    span, still = float((high - low).max()), np.zeros(3)
    ground = None if not plane or density is None else _ground(where, density, low, high)
    images, plotter = [], new_plotter()
    try:
        for i, cloud in enumerate(clouds):
            view = axes if plane else turned(axes, math.radians(turn) * i / len(clouds))
            plotter.clear_actors()
            _sheet(plotter, ground, low, high, still) if plane else _ball(
                plotter, still, size * span
            )
            look = shades if plane else _faded(cloud, shades, view)
            tail = np.stack(clouds[max(0, i - trail) : i + 1], 1)
            _tails(plotter, tail, look, view, 0.35 * size * span)
            _dots(plotter, cloud, look, view, size * span, still)
            fit(plotter, view, np.append(low, -1.0), np.append(high, 1.0), width=width)
            plotter.render()
            images.append(np.asarray(plotter.screenshot(return_img=True)))
    finally:
        plotter.close()
    return write_film(target, images, fps, dither=False)


# -- input ------------------------------------------------------------------------------------


def _read_clouds(where: str, x: Any) -> tuple[list[np.ndarray], bool]:
    """Return clouds ``(N, 3)``, and whether they are of the plane, at height 0."""
    if isinstance(x, Tensor):
        x = x[None] if x.dim() == 2 else x
    clouds = [to_numbers(where, f"x[{i}]", cloud).numpy() for i, cloud in enumerate(x)]
    shapes = [cloud.shape for cloud in clouds]
    dims = {shape[-1] for shape in shapes if len(shape) == 2 and shape[0]}
    need(len(dims) == 1 and dims <= {2, 3} and all(len(s) == 2 and s[0] for s in shapes),
         f"{where}: clouds have shapes {shapes[:4]}, expected (N, 2) or (N, 3), N > 0, all "
         "alike")  # fmt: skip
    if dims == {3}:
        off = max(float(abs(np.linalg.norm(cloud, axis=1) - 1).max()) for cloud in clouds)
        need(off < 1e-3, f"{where}: particles in space are off the unit sphere by {off:.1e}, "
             "expected on it; draw them with plotting.orbits")  # fmt: skip
        return clouds, False
    return [np.pad(cloud, ((0, 0), (0, 1))) for cloud in clouds], True


def _shades(where: str, n: int, color: Any, groups: Any) -> np.ndarray:
    """Return one colour ``(n, 3)`` for each particle."""
    if groups is None:
        return read_colors(where, "#B3261E" if color is None else color, n)
    numbers = torch.as_tensor(groups).tolist()
    need(len(numbers) == n, f"{where}: groups has {len(numbers)} entries, expected {n}")
    kinds = {kind: i for i, kind in enumerate(dict.fromkeys(sorted(numbers)))}
    return read_colors(where, [PALETTE[1:][kinds[k] % (len(PALETTE) - 1)] for k in numbers], n)


def _box(where: str, clouds: list[np.ndarray], plane: bool, density: Any, bounds: Any) -> Any:
    """Return the two corners of a plane panel, ``None`` for the sphere."""
    if not plane:
        need(density is None and bounds is None,
             f"{where}: a density or bounds are given with particles on the sphere, expected "
             "particles in the plane")  # fmt: skip
        return None
    if bounds is not None:
        (a, b), (c, d) = bounds
        need(-math.inf < a < b < math.inf and -math.inf < c < d < math.inf,
             f"{where}: bounds are ({a}, {b}), ({c}, {d}), expected finite lo < hi")  # fmt: skip
        return (a, c), (b, d)
    every = np.concatenate(clouds)[:, :2]
    low, high = every.min(0), every.max(0)
    edge = 0.06 * float((high - low).max()) or 1.0
    return low - edge, high + edge


def _round(size: float) -> tuple[list[float], list[float]]:
    """Return the box of a sphere whose particles have the radius ``size`` times its width."""
    reach = 1 + 3 * size
    return [-reach] * 2, [reach] * 2


# -- parts of the scene -----------------------------------------------------------------------


def _ground(where: str, density: Density, low: np.ndarray, high: np.ndarray) -> Any:
    """Return the density as bands on a fine grid, at height 0."""
    n = np.maximum(2, np.round(240 * (high - low) / (high - low).max())).astype(int)
    u, v = (torch.linspace(float(a), float(b), int(k), dtype=torch.float64)
            for a, b, k in zip(low, high, n, strict=True))  # fmt: skip
    x = torch.stack(torch.meshgrid(u, v, indexing="xy"), -1)
    values = to_numbers(where, "density(x)", density(x))
    need(tuple(values.shape) == tuple(x.shape[:-1]) and float(values.min()) >= 0 < values.max(),
         f"{where}: density(x) has shape {tuple(values.shape)} and least value "
         f"{float(values.min()):.3g}, expected {tuple(x.shape[:-1])} and no negative ones, not all "
         "zero")  # fmt: skip
    pv = load_pyvista()
    grid = pv.StructuredGrid(*(g.numpy()[None] for g in (x[..., 0], x[..., 1], 0 * x[..., 0])))
    grid["density"] = (values / values.max()).clamp_min(math.exp(-10)).log().numpy().ravel("F")
    return grid


def _sheet(plotter: Any, ground: Any, low: np.ndarray, high: np.ndarray, shift: np.ndarray) -> None:
    if ground is not None:
        # as many colours as bands, and pixels are coloured by the value that they show
        add_mesh(plotter, "density", ground.copy().translate(shift), scalars="density",
                 cmap=blend(*LEVELS)[::51], clim=(-6.0, 0.0), lighting=False,
                 interpolate_before_map=True, render=False)  # fmt: skip
    corners = [[low[0], low[1]], [high[0], low[1]], [high[0], high[1]], [low[0], high[1]]]
    rim = np.pad(np.array([*corners, corners[0]], float), ((0, 0), (0, 1))) + shift
    line = load_pyvista().lines_from_points(rim)
    add_mesh(plotter, "rim", line, color="#9AA3AD", line_width=2, lighting=False, render=False)


def _ball(plotter: Any, shift: np.ndarray, size: float) -> None:
    """Draw the inside of the far half of the sphere, behind disks of the given size."""
    pv = load_pyvista()
    sphere = pv.Sphere(radius=1 + 1.3 * size, theta_resolution=90, phi_resolution=90)
    add_mesh(plotter, "sphere", sphere.translate(shift), color=PAPER, culling="front",
             lighting=False, render=False)  # fmt: skip
    turn = np.linspace(0, 2 * math.pi, 121)
    circles = []
    for tilt in np.radians((-60, -30, 0, 30, 60)):
        ring = [math.cos(tilt) * np.cos(turn), math.cos(tilt) * np.sin(turn)]
        circles.append(np.stack([*ring, np.full_like(turn, math.sin(tilt))], 1))
    for angle in np.radians(range(0, 180, 30)):
        ring = [math.cos(angle) * np.cos(turn), math.sin(angle) * np.cos(turn)]
        circles.append(np.stack([*ring, np.sin(turn)], 1))
    net = pv.merge([pv.lines_from_points(0.999 * c + shift) for c in circles])
    add_mesh(plotter, "net", net, color="#C3CBD4", line_width=1.2, lighting=False, render=False)


def _faded(cloud: np.ndarray, rgb: np.ndarray, axes: Frame) -> np.ndarray:
    """Return colours that fade toward the far side."""
    depth = cloud @ axes[2]
    share = np.clip(0.5 + 2.0 * depth, 0.28, 1.0)[:, None]
    return (share * rgb + (1 - share) * np.array(PAPER)).round().astype(np.uint8)


def _dots(
    plotter: Any, cloud: np.ndarray, rgb: np.ndarray, axes: Frame, radius: float, shift: np.ndarray
) -> None:
    """Draw disks that face the eye, each with a thin edge; the near ones above."""
    if not len(cloud):
        return
    turn = np.linspace(0, 2 * math.pi, 20, endpoint=False)
    circle = np.cos(turn)[:, None] * axes[0] + np.sin(turn)[:, None] * axes[1]
    hub, right = np.zeros((len(cloud), 1), int), np.arange(1, 21)
    start = 21 * np.arange(len(cloud))[:, None, None]
    fan = np.stack([0 * right, right, right % 20 + 1], 1) + start + hub[..., None]
    for kind, size, lift, shades in (
        ("edges", 1.22, 0.0, (0.45 * rgb).astype(np.uint8)),
        ("particles", 1.0, 0.25, rgb),
    ):
        # a little nearer to the eye one by one, so that disks at one depth do not flicker
        order = lift * radius + 1e-3 * radius * np.arange(len(cloud))[:, None] / len(cloud)
        middle = cloud + shift + order * axes[2]
        points = np.concatenate([middle[:, None], middle[:, None] + size * radius * circle], 1)
        mesh = load_pyvista().PolyData.from_regular_faces(points.reshape(-1, 3), fan.reshape(-1, 3))
        mesh["rgb"] = np.repeat(shades, 21, 0)
        add_mesh(plotter, kind, mesh, lighting=False, render=False)


def _tails(plotter: Any, tail: np.ndarray, rgb: np.ndarray, axes: Frame, radius: float) -> None:
    """Draw where particles ``(N, time, 3)`` were, as tapering bands that face the eye."""
    n, time = tail.shape[:2]
    if time < 2:
        return
    along = np.gradient(tail, axis=1)
    across = np.cross(axes[2], along)
    across /= np.linalg.norm(across, axis=-1, keepdims=True) + 1e-300
    half = radius * np.linspace(0.0, 1.0, time)[:, None] * across
    points = np.stack([tail - half, tail + half], 2) + 0.3 * radius * axes[2]
    pair = np.array([[0, 1, 3], [0, 3, 2]]) + 2 * np.arange(time - 1)[:, None, None]
    faces = pair + 2 * time * np.arange(n)[:, None, None, None]
    mesh = load_pyvista().PolyData.from_regular_faces(points.reshape(-1, 3), faces.reshape(-1, 3))
    mesh["rgb"] = np.repeat(rgb, 2 * time, 0)
    add_mesh(plotter, "tails", mesh, lighting=False, render=False)
