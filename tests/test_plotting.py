"""Pictures: the scene holds the right numbers, and the files hold the scene."""

import base64
import io
import json
import math
import os
import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from darboux import _plot_scene, plotting
from darboux.integrators import audit, catalogue


def _can_draw():
    try:
        _plot_scene.load_pyvista()
    except (RuntimeError, ImportError):
        return False
    return True


needs_gl = pytest.mark.skipif(not _can_draw(), reason="no PyVista, or no display and no OpenGL")
PI2 = 2 * math.pi


class Torus:
    dim, bounds, R, r = 2, ((0.0, PI2), (0.0, PI2)), 2.0, 0.8

    def embedding(self, x):
        u, v = x.unbind(-1)
        w = self.R + self.r * v.cos()
        return torch.stack((w * u.cos(), w * u.sin(), self.r * v.sin()), -1)

    def scalar_curvature(self, x):
        c = x[..., 1].cos()
        return 2 * c / (self.r * (self.R + self.r * c))


class Sphere(torch.nn.Module):
    """Polar chart, singular at both poles, with a float32 parameter that wants a gradient."""

    bounds = ((0.0, math.pi), (0.0, PI2))

    def __init__(self):
        super().__init__()
        self.radius = torch.nn.Parameter(torch.tensor(2.0))

    def embedding(self, x):
        t, p = x.unbind(-1)
        return self.radius * torch.stack((t.sin() * p.cos(), t.sin() * p.sin(), t.cos()), -1)

    def scalar_curvature(self, x):
        return 2 / self.radius**2 * (x[..., 0].sin() / x[..., 0].sin())  # 0 / 0 at a pole


class Bump:
    """A metric without an embedding, without bounds."""

    def metric(self, x):
        return torch.eye(2, dtype=x.dtype) * (1 + x.square().sum(-1))[..., None, None]


def mesh(plotter, name):
    return plotter.actors[name].mapper.dataset


def distance_to_torus(p):
    ring = np.hypot(p[:, 0], p[:, 1]) - Torus.R
    return np.hypot(ring, p[:, 2]) - Torus.r


def picture(plotter, path):
    import pyvista

    plotting.save(plotter, path)
    return np.asarray(pyvista.read(path)["PNGImage"]).reshape(-1, 3)


def path_on_torus(n=3, time=80):
    t = torch.linspace(0, 2, time, dtype=torch.float64)[:, None]
    slope = torch.linspace(0.3, 1.5, n, dtype=torch.float64)
    return torch.stack((t - 1.2 + 0 * slope, t * slope), -1)


def test_import_leaves_vtk_alone():
    code = "import sys, darboux.plotting; print([m for m in ('pyvista', 'vtkmodules') "
    code += "if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the probe is for Linux")
def test_a_machine_without_opengl_gets_an_error_not_a_crash(monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "VTK_DEFAULT_OPENGL_WINDOW"):
        monkeypatch.delenv(name, raising=False)

    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(_plot_scene.ctypes, "CDLL", missing)
    with pytest.raises(RuntimeError, match="apt install libegl1"):
        plotting.surface(Torus())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the probe is for Linux")
def test_a_libegl_without_a_driver_counts_no_device():
    env = os.environ | {"__EGL_VENDOR_LIBRARY_DIRS": "/nonexistent"}
    env = {k: v for k, v in env.items() if k != "VTK_DEFAULT_OPENGL_WINDOW"}
    code = "from darboux import _plot_scene; print(_plot_scene._egl_devices())"
    run = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "0"


@needs_gl
def test_surface_holds_gauss_curvature(tmp_path):
    torus = Torus()
    plotter = plotting.surface(torus, resolution=(61, 41))
    grid = mesh(plotter, "surface")
    assert grid.n_points == 61 * 41
    assert tuple(grid.dimensions) == (61, 41, 1)
    inner = -1 / (torus.r * (torus.R - torus.r))
    outer = 1 / (torus.r * (torus.R + torus.r))
    np.testing.assert_allclose(grid.get_data_range("values"), (inner, outer), rtol=1e-12)
    np.testing.assert_allclose(distance_to_torus(grid.points), 0, atol=1e-6)
    # the curvature sits on its own point: K = cos v / (r (R + r cos v)), R + r cos v = distance
    away = np.hypot(grid.points[:, 0], grid.points[:, 1])
    expected = (away - torus.R) / torus.r / (torus.r * away)
    np.testing.assert_allclose(grid["values"], expected, atol=1e-6)
    low, high = plotter.actors["surface"].mapper.scalar_range
    assert low == -high == pytest.approx(inner)  # symmetric around zero
    assert [bar.strip() for bar in plotter.scalar_bars.keys()] == ["Gauss curvature"]
    pixels = picture(plotter, tmp_path / "torus.png")
    assert len(pixels) == 1400 * 1000
    assert pixels.std() > 20
    assert (pixels[0] == 255).all()


@needs_gl
def test_normals_point_outward_with_unit_length():
    for surface, centre in ((Torus(), None), (Sphere(), 0)):
        grid = mesh(plotting.surface(surface, resolution=(31, 30)), "surface")
        normals, points = np.asarray(grid.point_data.active_normals), np.asarray(grid.points)
        out = points.copy()
        if centre is None:
            out[:, :2] *= 1 - Torus.R / np.hypot(out[:, 0], out[:, 1])[:, None]
        out /= np.linalg.norm(out, axis=1)[:, None]
        assert (normals * out).sum(1).min() > 0.999


@needs_gl
def test_a_surface_is_lit_alike_whichever_way_its_chart_turns(tmp_path):
    class Swapped(Torus):
        def embedding(self, x):
            return super().embedding(x.flip(-1))

        def scalar_curvature(self, x):
            return super().scalar_curvature(x.flip(-1))

    plotters = [plotting.surface(s, resolution=(61, 61)) for s in (Torus(), Swapped())]
    one, two = (picture(p, tmp_path / "a.png").mean() for p in plotters)
    assert one == pytest.approx(two, abs=1)
    grid = mesh(plotters[1], "surface")
    away = np.hypot(grid.points[:, 0], grid.points[:, 1])
    expected = (away - Torus.R) / Torus.r / (Torus.r * away)
    np.testing.assert_allclose(grid["values"], expected, atol=1e-6)


@needs_gl
def test_surface_reads_a_singular_chart_inside_and_keeps_a_constant_calm():
    plotter = plotting.surface(Sphere(), resolution=(21, 20))
    np.testing.assert_allclose(mesh(plotter, "surface")["values"], 0.25, rtol=1e-6)
    low, high = plotter.actors["surface"].mapper.scalar_range
    assert low == pytest.approx(0.125)
    assert high == pytest.approx(0.375)


@needs_gl
def test_surface_scalars_may_be_a_function_a_tensor_or_none():
    height = mesh(
        plotting.surface(Torus(), scalars=lambda x: x[..., 0], resolution=(5, 4)), "surface"
    )
    np.testing.assert_allclose(height["values"][:5], np.linspace(0, PI2, 5))
    table = torch.arange(12.0).reshape(3, 4).requires_grad_()
    given = mesh(plotting.surface(Torus(), scalars=table), "surface")
    assert tuple(given.dimensions) == (3, 4, 1)
    np.testing.assert_array_equal(given["values"][:3], [0, 4, 8])
    plain = plotting.surface(Torus(), scalars=None, u=(0, 1), v=(0, 1), resolution=(3, 3))
    assert "values" not in mesh(plain, "surface").point_data


@needs_gl
def test_curves_are_tubes_of_the_given_radius():
    t = torch.linspace(0, 1, 50)[:, None]
    line = (t * torch.tensor([1.0, 0.0, 0.0])).requires_grad_()
    plotter = plotting.curves(line, radius=0.1, markers=None)
    tube = mesh(plotter, "curves")
    np.testing.assert_allclose(np.hypot(*tube.points[:, 1:].T).max(), 0.1, rtol=1e-5)
    stack = torch.stack((line, line + 1, line + 2), 1)  # (time, n, 3)
    plotter = plotting.curves(stack, markers="both", labels=["a", "b", "c"], plotter=plotter)
    assert {"curves", "curves-1", "markers", "markers-1"} <= set(plotter.actors)
    rgb = {tuple(c) for c in mesh(plotter, "curves-1")["rgb"]}
    assert len(rgb) == 3
    assert plotter.legend is not None
    ragged = plotting.curves([line, line[:7] + 1, line[:1] + 2], color="red")
    assert {tuple(c) for c in mesh(ragged, "curves")["rgb"]} == {(255, 0, 0)}
    valued = plotting.curves(stack, scalars=t.expand(50, 3), title="time")
    assert mesh(valued, "curves").get_data_range("values") == (0, 1)
    shown = plotting.curves(10 * stack, markers=None)  # the camera knows where the scene is
    np.testing.assert_allclose(shown.camera.focal_point, [15, 10, 10], atol=1.5)
    still = plotting.curves(torch.zeros(5, 3))
    assert "curves" not in still.actors
    assert "markers" in still.actors


@needs_gl
def test_geodesics_lie_on_the_surface_within_lift_and_radius(tmp_path):
    path = path_on_torus().requires_grad_()
    plotter = plotting.geodesics(
        Torus(), path, radius=0.01, lift=0.003, markers=None, background={"resolution": (60, 60)}
    )
    tube = mesh(plotter, "curves")
    size = math.hypot(2 * 2.8, 2 * 2.8, 2 * 0.8)
    away = distance_to_torus(tube.points)
    assert away.min() > 0.003 * size - 0.0101
    assert away.max() < 0.003 * size + 0.0101
    assert "surface" in plotter.actors
    assert picture(plotter, tmp_path / "geodesics.png").std() > 20
    bare = plotting.geodesics(Torus(), path[:, 0], plotter=_plot_scene.new_plotter())
    assert "surface" not in bare.actors


@needs_gl
def test_arrows_are_the_pushforward():
    torus = Torus()
    x = torch.tensor([[0.3, 0.2], [1.0, 2.0], [2.0, 4.0]], requires_grad=True).double()
    v = torch.tensor([[0.1, 0.0], [0.0, 0.2], [0.1, -0.1]]).double()
    plotter = plotting.vectors(torus, x, v, lift=0.0, plotter=_plot_scene.new_plotter())
    push = torch.func.jvp(torus.embedding, (x.detach(),), (v,))[1]
    points = mesh(plotter, "vectors").points.reshape(3, -1, 3)
    for body, base, arrow in zip(points, torus.embedding(x.detach()), push, strict=True):
        along = (body - base.numpy()) @ arrow.numpy() / float(arrow.norm())
        assert along.min() == pytest.approx(0, abs=1e-5)
        assert along.max() == pytest.approx(float(arrow.norm()), rel=1e-4)
        tip = body[along.argmax()] - base.numpy()
        np.testing.assert_allclose(tip, arrow.numpy(), atol=1e-5)
    doubled = plotting.vectors(torus, x, v, scale=2.0, lift=0.0, plotter=_plot_scene.new_plotter())
    assert mesh(doubled, "vectors").length > mesh(plotter, "vectors").length
    zero = plotting.vectors(torus, x, 0 * v, plotter=_plot_scene.new_plotter())
    assert "vectors" not in zero.actors


@needs_gl
def test_latent_shows_log_volume_points_and_paths(tmp_path):
    points = torch.rand(30, 2, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(30) % 10
    path = torch.stack((torch.linspace(0, 1, 40), torch.linspace(0, 1, 40) ** 2), -1)
    plotter = plotting.latent(
        Bump(), points=points, labels=labels, paths=path[:, None], straight=True,
        bounds=((-1, 1), (-0.5, 0.5)), resolution=41, images=torch.rand(2, 6, 8, 8),
        image_labels=["along the geodesic", "along the straight line"],
    )  # fmt: skip
    sheet = mesh(plotter, "latent")
    assert tuple(sheet.dimensions) == (41, 20, 1)
    expected = np.log1p((sheet.points[:, :2] ** 2).sum(1))  # metric (1 + |x|^2) I
    np.testing.assert_allclose(sheet["log volume"], expected, atol=1e-6)
    assert len({tuple(c) for c in mesh(plotter, "points")["rgb"]}) == 10
    assert {"paths", "straight", "key", "bar", "film", "film-1"} <= set(plotter.actors)
    pieces = mesh(plotter, "straight").split_bodies()
    assert len(pieces) > 10  # dashed
    ends = mesh(plotter, "straight").points[:, 0] - mesh(plotter, "straight").points[:, 1]
    assert abs(ends).max() < 0.05  # on the chord y = x
    assert mesh(plotter, "paths").points[:, :2].min() > -0.05
    assert plotter.camera.parallel_projection
    assert picture(plotter, tmp_path / "latent.png").std() > 20


@needs_gl
def test_latent_relief_and_a_given_log_volume():
    class Known:
        bounds = ((0.0, 1.0), (0.0, 1.0))

        def log_volume(self, x):
            return 3 * x[..., 0]

    plotter = plotting.latent(Known(), relief=True, resolution=11)
    sheet = mesh(plotter, "latent")
    np.testing.assert_allclose(np.ptp(sheet.points[:, 2]), 0.25 * math.sqrt(2), rtol=1e-6)
    np.testing.assert_allclose(sheet["log volume"], 3 * sheet.points[:, 0], atol=1e-6)


@needs_gl
def test_filmstrip_keeps_every_pixel():
    rows = [torch.rand(3, 8, 8), torch.rand(2, 8, 8)]
    plotter = plotting.filmstrip(rows, ["geodesic", "straight line"], width=3.0)
    film = mesh(plotter, "film")
    assert film.n_cells == 3 * 64
    np.testing.assert_allclose(np.sort(film["grey"]), np.sort(rows[0].ravel()), atol=1e-7)
    top = film.cell_centers().points[:, 1].argmax()
    assert film["grey"][top] in rows[0][:, 0].double()  # the first image row is on top
    assert film.bounds[1] == pytest.approx(3.0)


@needs_gl
def test_orbits_end_in_balls_with_names(tmp_path):
    t = torch.linspace(0, 6, 200)[:, None]
    radii = torch.tensor([0.01, 1.0, 2.0])
    points = torch.stack((radii * t.cos(), radii * t.sin(), 0 * t * radii), -1)
    plotter = plotting.orbits(points, names=["Sun", "Earth", "Mars"], sizes=[0.2, 0.1, 0.1])
    balls = mesh(plotter, "bodies").points.reshape(3, -1, 3)
    np.testing.assert_allclose(balls.mean(1), points[-1], atol=0.01)
    np.testing.assert_allclose(np.ptp(balls[0][:, 2]), 0.4, rtol=1e-4)
    assert picture(plotter, tmp_path / "orbits.png").std() > 5


@needs_gl
def test_an_audit_is_four_charts_of_what_was_measured(tmp_path):
    system, methods = catalogue.oscillator(), ["rk4", "leapfrog", "gauss4"]
    q, p = torch.tensor([1.0], dtype=torch.float64), torch.tensor([0.3], dtype=torch.float64)
    report = audit.report(system, q, p, dt=0.2, steps=50, methods=methods)
    plotter = plotting.audit(report)
    energy, order, work, defects = (r._charts._charts[0] for r in plotter.renderers)
    assert [len(list(chart.plots())) for chart in (energy, order, work)] == [3, 3, 3]
    assert len(list(defects.plots())) == 6
    for row, line in zip(report.rows, energy.plots("line"), strict=True):
        np.testing.assert_allclose(line.y, np.maximum(row.energy_errors, 1e-17))
    assert [line.label for line in work.plots("line")] == methods
    file = plotting.save(plotter, tmp_path / "audit.png")
    assert file.stat().st_size > 20_000


@needs_gl
def test_a_section_has_the_points_of_every_orbit():
    orbits = [torch.rand(n, 2, dtype=torch.float64) for n in (5, 0, 3)]
    plotter = plotting.section(orbits, axes=("y", "p_y"))
    chart = plotter.renderer._charts._charts[0]
    seen = [np.stack([plot.x, plot.y], -1) for plot in chart.plots("scatter")]
    for found, orbit in zip(seen, (orbits[0], orbits[2]), strict=True):
        np.testing.assert_allclose(found, orbit.numpy())
    assert (chart.x_label, chart.y_label) == ("y", "p_y")


def test_charts_refuse_nothing_to_draw():
    with pytest.raises(ValueError, match="report has no rows"):
        plotting.audit(audit.Report(()))
    with pytest.raises(ValueError, match="no orbits"):
        plotting.section([])


@needs_gl
def test_html_is_one_page_that_holds_the_scene(tmp_path):
    pytest.importorskip("trame_vtk", reason="the web extra is not installed")
    plotter = plotting.geodesics(Torus(), path_on_torus(), background={"resolution": (40, 30)})
    target = plotting.save(plotter, tmp_path / "scene.html")
    page = target.read_text(encoding="utf-8")
    assert len(page) > _plot_scene.SMALLEST_HTML
    data = re.search(r'base64Str = "([^"]+)"', page)
    assert data is not None
    scene = zipfile.ZipFile(io.BytesIO(base64.b64decode(data[1]))).read("index.json")
    index = json.loads(scene)
    sizes = [len(a["content"]) for a in index["hashes"].values()]
    assert max(sizes) > 40 * 30 * 12  # three float32 for each of the points
    assert '"vtkPolyData"' in scene.decode()
    assert '"vtkScalarBarActor"' in scene.decode()
    assert [p.name for p in tmp_path.iterdir()] == ["scene.html"]


@needs_gl
def test_a_bad_page_raises_and_leaves_nothing(tmp_path, monkeypatch):
    tool = pytest.importorskip("trame_vtk.tools.vtksz2html")
    plotter = plotting.surface(Torus(), resolution=(10, 10))
    (tmp_path / "a.html").write_text("before")
    monkeypatch.setattr(tool, "write_html", lambda data, out: out.write("404 not found"))
    with pytest.raises(RuntimeError, match="13 bytes and 1 meshes"):
        plotting.save(plotter, tmp_path / "a.html")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["before"]
    with pytest.raises(RuntimeError, match="0 meshes"):
        plotting.save(_plot_scene.new_plotter(), tmp_path / "b.html")
    monkeypatch.setitem(sys.modules, "trame_vtk.tools.vtksz2html", None)
    with pytest.raises(ImportError, match=r"pip install darboux\[web\]"):
        plotting.save(plotter, tmp_path / "c.html")


@needs_gl
def test_save_says_what_it_cannot_save(tmp_path):
    plotter = plotting.surface(Torus(), resolution=(10, 10))
    with pytest.raises(ValueError, match=r"neither .png nor .html"):
        plotting.save(plotter, tmp_path / "a.pdf")
    plotter.close()
    with pytest.raises(ValueError, match="closed"):
        plotting.save(plotter, tmp_path / "a.png")


@needs_gl
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: plotting.surface(Bump()), TypeError, "Bump without embedding"),
        (lambda: plotting.surface(Torus(), u=(1, 0)), ValueError, "expected finite lo < hi"),
        (lambda: plotting.surface(Torus(), resolution=(1, 9)), ValueError, "resolution"),
        (lambda: plotting.surface(Torus(), scalars="ricci"), ValueError, "expected 'curvature'"),
        (lambda: plotting.surface(Torus(), scalars=torch.ones(4)), ValueError, r"\(nu, nv\)"),
        (lambda: plotting.surface(Torus(), scalars=lambda x: x), ValueError, "has shape"),
        (lambda: plotting.curves(torch.ones(5, 2)), ValueError, r"expected \(..., 3\)"),
        (lambda: plotting.curves(torch.ones(3)), ValueError, r"expected \(time, 3\)"),
        (lambda: plotting.curves(torch.ones(2, 3).int()), TypeError, "floating"),
        (lambda: plotting.curves(torch.full((2, 3), math.nan)), ValueError, "NaN"),
        (lambda: plotting.curves([]), ValueError, "no curve"),
        (lambda: plotting.curves(torch.rand(4, 3), markers="mid"), ValueError, "markers"),
        (lambda: plotting.curves(torch.rand(4, 3), labels=["a", "b"]), ValueError, "2 names"),
        (lambda: plotting.curves(torch.rand(4, 2, 3), color=["red"]), ValueError, "1 entries"),
        (lambda: plotting.curves(torch.rand(4, 3), scalars=torch.ones(3)), ValueError, "scalars"),
        (lambda: plotting.geodesics(Torus(), torch.ones(2)), ValueError, r"\(time, ..., 2\)"),
        (lambda: plotting.geodesics(Torus(), torch.ones(4, 3)), ValueError, r"\(..., 2\)"),
        (lambda: plotting.vectors(Torus(), torch.ones(3, 2), torch.ones(4, 2)), ValueError, "v h"),
        (lambda: plotting.latent(Bump()), ValueError, "no bounds"),
        (lambda: plotting.latent(object()), TypeError, "without metric"),
        (lambda: plotting.latent(Bump(), straight=True), ValueError, "without paths"),
        (lambda: plotting.latent(Bump(), points=torch.rand(4, 2), labels=[1]), ValueError, "label"),
        (lambda: plotting.filmstrip([torch.ones(8, 8)]), ValueError, r"\(n, h, w\)"),
        (lambda: plotting.filmstrip([]), ValueError, "empty"),
        (lambda: plotting.orbits(torch.ones(5, 3)), ValueError, r"\(time, bodies, 3\)"),
    ],
)
def test_bad_input_is_told_what_was_expected(call, error, message):
    with pytest.raises(error, match=message):
        call()
