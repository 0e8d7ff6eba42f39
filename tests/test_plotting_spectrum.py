"""Pictures of spectra: the scene holds the functions, the film holds the frames."""

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from test_plotting import mesh, needs_gl, picture

from darboux import _plot_film, _plot_spectrum, plotting
from darboux.manifolds import mesh as meshes
from darboux.manifolds.spectral.finite_elements import stiffness_mass


def wave(x):
    """Return a function that vanishes for z = 0 alone."""
    return x[:, 2] * (2 + x[:, 0])


@needs_gl
def test_functions_hold_their_values_side_by_side(tmp_path):
    sphere = meshes.icosphere(3)
    table = torch.stack([wave(sphere.vertices), sphere.vertices[:, 0], sphere.vertices[:, 1]], 1)
    labels = ["λ = 2", "b", "c"]
    plotter = plotting.functions(sphere, table.requires_grad_(), columns=2, labels=labels)
    shown = [mesh(plotter, name) for name in ("functions", "functions-1", "functions-2")]
    for k, (sheet, column) in enumerate(zip(shown, table.detach().T, strict=True)):
        np.testing.assert_allclose(sheet["values"], column)
        low, high = plotter.actors[f"functions{f'-{k}' if k else ''}"].mapper.scalar_range
        assert -low == high == pytest.approx(float(column.abs().max()))
    # equal shapes, apart by more than a diameter; the third starts a new row
    one, two, three = (np.asarray(sheet.points) for sheet in shown)
    for other in (two, three):
        step = other - one
        np.testing.assert_allclose(step, step[:1].repeat(len(step), 0), atol=1e-6)
        assert np.linalg.norm(step[0]) > 2
    assert (two - one)[0] @ (three - one)[0] == pytest.approx(0, abs=1e-6)
    assert plotter.camera.parallel_projection
    pixels = picture(plotter, tmp_path / "functions.png")
    assert pixels.std() > 20
    frame = pixels.reshape(plotter.window_size[1], plotter.window_size[0], 3)
    assert (frame[0] == 255).all()  # nothing is cut off
    assert (frame[:, 0] == 255).all()
    bare = plotting.functions(sphere, table, columns=2)
    assert len(bare.renderer.actors) == len(plotter.renderer.actors) - 1  # the labels


@needs_gl
def test_nodal_lines_are_where_the_function_vanishes():
    sphere = meshes.icosphere(4)
    plotter = plotting.functions(sphere, wave(sphere.vertices), title="f")
    tube = np.asarray(mesh(plotter, "nodal").points)
    size = 2 * math.sqrt(3)
    assert abs(tube[:, 2]).max() < 0.0016 * size + 1e-3
    angle = np.sort(np.arctan2(tube[:, 1], tube[:, 0]))
    assert np.diff(angle).max() < 0.2  # all the way round
    assert [bar.strip() for bar in plotter.scalar_bars.keys()] == ["f"]
    positive = plotting.functions(sphere, wave(sphere.vertices) + 4)
    assert "nodal" not in positive.actors
    assert "nodal" not in plotting.functions(sphere, wave(sphere.vertices), nodal=False).actors


@needs_gl
def test_the_rim_of_a_fixed_drum_is_no_nodal_line():
    operator = stiffness_mass(
        meshes.disk(3), order=2, boundary="dirichlet", project=meshes.to_sphere
    )
    x = operator.space.nodes()
    bump = 1 - x.square().sum(-1)
    first, second = (operator.space.restrict(f) for f in (bump, bump * x[:, 0]))
    plotter = plotting.functions(operator, torch.stack([second, first], 1))
    assert "nodal-1" not in plotter.actors
    sheet, tube = mesh(plotter, "functions"), np.asarray(mesh(plotter, "nodal").points)
    assert sheet.n_points == len(x)  # all nodes, on the circle too
    assert abs(tube[:, 0]).max() < 0.1
    np.testing.assert_allclose(sheet.area, math.pi, rtol=3e-3)
    rim = np.asarray(mesh(plotter, "rim").points)
    assert abs(np.hypot(rim[:, 0], rim[:, 1]) - 1).max() < 0.02


@pytest.mark.parametrize("order", [1, 2, 3, 6])
def test_pieces_cover_an_element(order):
    nodes = _plot_spectrum.lagrange(2, order).exponents[:, 1:] / order
    a, b, c = (nodes[_plot_spectrum._pieces(order)][:, k] for k in range(3))
    areas = _area(b - a, c - a)
    assert len(areas) == order**2
    np.testing.assert_allclose(areas, 0.5 / order**2)


def _area(u, v):
    return (u[:, 0] * v[:, 1] - u[:, 1] * v[:, 0]) / 2


@needs_gl
def test_relief_is_a_part_of_the_size():
    square = meshes.rectangle((8, 8))
    x = square.vertices
    plotter = plotting.functions(square, x[:, 0] * x[:, 1], relief=0.2)
    height = np.asarray(mesh(plotter, "functions").points)[:, 2]
    np.testing.assert_allclose(height, 0.2 * math.sqrt(2) * (x[:, 0] * x[:, 1]).numpy(), atol=1e-6)


def film(path):
    from PIL import Image, ImageSequence

    with Image.open(path) as image:
        pages = ImageSequence.Iterator(image)
        return [np.asarray(p.convert("RGB")) for p in pages], image.info["duration"]


@needs_gl
def test_heat_is_a_film_of_all_frames(tmp_path):
    sphere = meshes.icosphere(2)
    ts = torch.linspace(0.1, 2, 5, dtype=torch.float64)
    frames = 1 + torch.exp(-ts[:, None]) * sphere.vertices[:, 0]
    target = plotting.heat(
        sphere, frames, tmp_path / "a.gif", width=120, turn=90.0, lines=3, fps=10
    )
    assert [p.name for p in tmp_path.iterdir()] == ["a.gif"]
    pages, duration = film(target)
    assert (len(pages), duration) == (5, 100)
    for page in pages:
        assert page.shape[1] == 120
        rim = np.concatenate([page[0], page[-1], page[:, 0], page[:, -1]])
        assert rim.min() > 250  # turning, the sphere stays in the window
    assert abs(pages[0].astype(int) - pages[-1]).mean() > 2
    still = plotting.heat(sphere, frames[:1].expand(2, -1), tmp_path / "b.gif", width=120)
    assert len(film(still)[0]) == 1  # Pillow joins frames that are equal


@needs_gl
def test_heat_writes_mp4(tmp_path):
    pytest.importorskip("imageio_ffmpeg", reason="the animate extra is not installed")
    import imageio_ffmpeg  # pyright: ignore[reportMissingImports]

    square = meshes.rectangle((6, 6))
    frames = torch.linspace(0, 1, 6, dtype=torch.float64)[:, None] * square.vertices[:, 0]
    target = plotting.heat(square, frames, tmp_path / "a.mp4", width=128, clim=(0, 1))
    count, seconds = imageio_ffmpeg.count_frames_and_secs(str(target))
    assert count == 6
    assert seconds == pytest.approx(0.3, abs=0.06)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


@needs_gl
def test_a_film_that_fails_leaves_nothing(tmp_path, monkeypatch):
    sphere = meshes.icosphere(1)
    (tmp_path / "a.gif").write_text("before")

    def broken(name, *rest):
        with open(name, "w") as file:
            file.write("half")
        raise OSError("disk full")

    monkeypatch.setattr(_plot_film, "_gif", broken)
    with pytest.raises(OSError, match="disk full"):
        plotting.heat(sphere, sphere.vertices.T, tmp_path / "a.gif", width=64)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["before"]
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(ImportError, match=r"pip install darboux\[animate\]"):
        plotting.heat(sphere, sphere.vertices.T, tmp_path / "b.mp4")


@needs_gl
def test_a_spectrum_is_a_chart_of_its_branches():
    ts = torch.linspace(0, 1, 7, dtype=torch.float64)
    values = torch.stack([1 + ts, 2 - ts, 3 + 0 * ts], 1)
    plotter = plotting.spectrum(
        (ts, values, "more"), dots=(ts[::3], values[::3]), groups=[0, 0, 1], labels=["a", "b"]
    )
    chart = plotter.renderer._charts._charts[0]
    for line, branch in zip(chart.plots("line"), values.T, strict=True):
        np.testing.assert_allclose(line.x, ts)
        np.testing.assert_allclose(line.y, branch)
    for dots, branch in zip(chart.plots("scatter"), values.T, strict=True):
        np.testing.assert_allclose(dots.y, branch[::3])
    colors = [line.color.hex_rgb for line in chart.plots("line")]
    assert colors[0] == colors[1] != colors[2]
    assert [line.label for line in chart.plots("line")] == ["a", "", "b"]
    assert chart.x_axis.range[0] < 0 < 1 < chart.x_axis.range[1]


square = meshes.rectangle((2, 2))
ones = torch.ones(9, dtype=torch.float64)
number: Any = 3


@needs_gl
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: plotting.functions(number, ones), TypeError, "expected a Mesh"),
        (lambda p: plotting.functions(square, ones[:4]), ValueError, r"shape \(4,\), expected"),
        (lambda p: plotting.functions(square, ones * math.nan), ValueError, "NaN"),
        (lambda p: plotting.functions(square, ones.int()), TypeError, "floating"),
        (lambda p: plotting.functions(square, ones, labels=["a", "b"]), ValueError, "2 names"),
        (lambda p: plotting.functions(meshes.grid((3, 3, 3)), ones), ValueError, "dimension 3"),
        (lambda p: plotting.functions(stiffness_mass(square), ones[:3]), ValueError, "coeffic"),
        (lambda p: plotting.heat(square, ones, p / "a.gif"), ValueError, r"expected \(time, n\)"),
        (lambda p: plotting.heat(square, ones[None, :5], p / "a.gif"), ValueError, r"\(time, 9\)"),
        (lambda p: plotting.heat(square, ones[None], p / "a.avi"), ValueError, "neither .gif"),
        (lambda p: plotting.heat(square, ones[None], p / "a.gif", fps=0), ValueError, "fps"),
        (lambda p: plotting.spectrum((ones, ones)), ValueError, r"expected \(T,\) and"),
        (lambda p: plotting.spectrum((ones, ones[:, None]), groups=[1, 2]), ValueError, "2 groups"),
    ],
)
def test_bad_input_is_told_what_was_expected(call, error, message, tmp_path):
    with pytest.raises(error, match=message):
        call(tmp_path)
    assert not list(tmp_path.iterdir())
