"""The scene behind :mod:`darboux.plotting`: window, meshes, camera, colour bar, files.

PyVista is imported where the first thing is drawn, and only after a look for a display or an
OpenGL library, without which VTK kills the process; then ``RuntimeError`` is raised.
"""

import ctypes
import io
import json
import math
import os
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

INK = "#1A1A1A"
GLOSS = {"ambient": 0.33, "diffuse": 0.78, "specular": 0.2, "specular_power": 25}
SMALLEST_HTML = 200_000  # bytes; the viewer alone is larger


def _egl_devices() -> int:
    """Count the devices that EGL offers; a libEGL without a driver has none and kills VTK."""
    try:
        egl = ctypes.CDLL("libEGL.so.1")
        egl.eglGetProcAddress.restype = ctypes.c_void_p
        address = egl.eglGetProcAddress(b"eglQueryDevicesEXT")
    except (OSError, AttributeError):
        return 0
    arguments = (ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int))
    count = ctypes.c_int(0)
    ok = address and ctypes.CFUNCTYPE(ctypes.c_uint, *arguments)(address)(0, None, count)
    return count.value if ok else 0


def _window() -> str | None:
    """Name the VTK window class for a headless machine, ``None`` where VTK may choose.

    Raises ``RuntimeError`` where drawing would end the process.
    """
    if not sys.platform.startswith("linux"):
        return None
    if os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        return None
    if chosen := os.environ.get("VTK_DEFAULT_OPENGL_WINDOW"):
        return chosen
    if _egl_devices():
        return "vtkEGLRenderWindow"
    for name in ("libOSMesa.so.8", "libOSMesa.so.6"):
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return "vtkOSOpenGLRenderWindow"
    raise RuntimeError(
        "darboux.plotting: no display, and no OpenGL library to draw without one; on Debian or "
        "Ubuntu: apt install libegl1 libegl-mesa0 libgl1-mesa-dri (or libosmesa6)"
    )


def load_pyvista() -> Any:
    """Import PyVista, safely on a headless machine."""
    if window := _window():
        os.environ["VTK_DEFAULT_OPENGL_WINDOW"] = window
    try:
        import pyvista
    except ImportError as error:
        raise ImportError("darboux.plotting needs PyVista: pip install pyvista") from error
    return pyvista


def new_plotter(shape: tuple[int, int] = (1, 1), *, smooth: bool = True) -> Any:
    """Return a white window; a chart misplaces itself in a smooth one, which is drawn larger."""
    pv = load_pyvista()
    plotter = pv.Plotter(
        off_screen=True if _window() else None, window_size=[1400, 1000], shape=shape, border=False
    )
    plotter.set_background("white")
    if smooth:
        plotter.enable_anti_aliasing("ssaa")
    return plotter


def add_mesh(plotter: Any, kind: str, mesh: Any, **options: Any) -> Any:
    """Add a mesh under the first free name among ``kind``, ``kind-1``, ``kind-2``..."""
    names = [kind, *(f"{kind}-{i}" for i in range(1, len(plotter.actors) + 1))]
    name = next(n for n in names if n not in plotter.actors)
    if "rgb" in mesh.array_names:
        options = {"scalars": "rgb", "rgb": True} | options
    options = {"show_scalar_bar": False, "reset_camera": False} | options
    actor = plotter.add_mesh(mesh, name=name, **options)
    actor.mapper.Update()  # else plotter.meshes stays empty until the first frame
    return actor


def fit_camera(
    plotter: Any, direction: Sequence[float] = (0.0, 0.0, 1.0), top: bool = False
) -> None:
    """Look from ``direction`` so that the scene just fills the window (room for a bar spared).

    ``top`` looks straight down in parallel projection instead, and shapes the window too.
    """
    back = np.array((0.0, 0.0, 1.0)) if top else np.asarray(direction) / np.linalg.norm(direction)
    upward = np.array((0.0, 1.0, 0.0) if top else (0.0, 0.0, 1.0))
    right = np.cross(upward, back) / np.linalg.norm(np.cross(upward, back))
    axes = np.stack((right, np.cross(back, right), back))
    seen = np.concatenate([mesh.points for mesh in plotter.meshes]) @ axes.T
    centre = (seen.min(0) + seen.max(0)) / 2
    x, y, z = (seen - centre).T
    if top:
        shape = (np.ptp(y) or 1.0) / (np.ptp(x) or 1.0)
        plotter.window_size = [1400, int(min(max(1400 * shape, 280), 1700))]
        plotter.enable_parallel_projection()
    aspect = plotter.window_size[0] / plotter.window_size[1]
    slope = math.tan(math.radians(plotter.camera.view_angle / 2))
    share, shift = (0.78, 0.15) if plotter.scalar_bars else (0.92, 0.0)
    wide = aspect * slope
    away = max((abs(x) / (share * wide) + z).max(), (abs(y) / (0.9 * slope) + z).max())
    focus, camera = centre @ axes + shift * wide * away * right, plotter.camera
    camera.focal_point, camera.position = focus, focus + away * back
    camera.up = tuple(upward)
    camera.parallel_scale = 1.04 * max(abs(y).max(), abs(x).max() / aspect)
    camera.is_set = True
    plotter.reset_camera_clipping_range()


def bar_options(title: str) -> dict[str, Any]:
    """Return the options of a tidy colour bar."""
    place = {"vertical": True, "position_x": 0.87, "position_y": 0.27, "width": 0.04}
    fonts = {"title_font_size": 26, "label_font_size": 24, "unconstrained_font_size": True}
    bar = place | fonts | {"title": title + "\n", "height": 0.46, "n_labels": 3, "color": INK}
    return {"show_scalar_bar": True, "scalar_bar_args": bar}


def blend(*colors: str) -> list[str]:
    """Return 256 colours that lead through the given ones."""
    stops = np.array([load_pyvista().Color(c).int_rgb for c in colors])
    t, at = np.linspace(0, 1, 256), np.linspace(0, 1, len(colors))
    ramp = np.stack([np.interp(t, at, channel) for channel in stops.T], -1).round().astype(int)
    return ["#{:02x}{:02x}{:02x}".format(*c) for c in ramp]


# --- the files ------------------------------------------------------------------------------------


def save(plotter: Any, path: str | os.PathLike[str]) -> Path:
    """Write the scene as ``.png`` or as one self-contained interactive ``.html``.

    The file appears whole or not at all. HTML needs ``pip install darboux[web]``.
    """
    target = Path(path)
    write = {".png": _png, ".html": _html}.get(target.suffix)
    if write is None:
        raise ValueError(f"save: {target.name!r} ends in neither .png nor .html")
    open_ = getattr(plotter, "render_window", None) is not None
    if not open_:
        raise ValueError("save: the plotter is closed, expected one that was not shown yet")
    handle, name = tempfile.mkstemp(suffix=target.suffix, dir=target.parent)
    os.close(handle)
    try:
        write(plotter, name)
        os.chmod(name, 0o644)
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)
    return target


def _png(plotter: Any, name: str) -> None:
    plotter.off_screen = True
    plotter.render_window.SetOffScreenRendering(True)
    plotter.screenshot(name)


def _html(plotter: Any, name: str) -> None:
    """Write the page with trame's serialisers (PyVista's own way starts a web server for it)."""
    try:
        from trame_vtk.modules.vtk import serializers as trame
        from trame_vtk.tools.vtksz2html import write_html
    except ImportError as error:
        raise ImportError("save: HTML needs the web extra: pip install darboux[web]") from error
    window, camera = plotter.render_window, plotter.camera
    plotter.render()
    trame.initialize_serializers()
    context = trame.SynchronizationContext()
    scene: Any = trame.serialize(None, window, trame.reference_id(window), context, 1)
    scene["extra"] = {"vtkRefId": trame.reference_id(window), "camera": trame.reference_id(camera),
                      "centerOfRotation": camera.focal_point}  # fmt: skip
    meshes, parts = 0, [scene]
    for part in parts:
        parts += part.get("dependencies", [])
        meshes += part["type"] == "vtkPolyData"
        if part["type"].endswith("Camera"):  # trame forgets these
            part["properties"]["parallelProjection"] = bool(camera.parallel_projection)
            part["properties"]["parallelScale"] = camera.parallel_scale
    arrays = {a["hash"]: a | {"content": context.get_cached_data_array(a["hash"], False)}
              for a in trame.extract_array_hash(scene)}  # fmt: skip
    packed, page = io.BytesIO(), io.StringIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("index.json", json.dumps({"hashes": arrays, "scene": scene}))
    write_html(packed.getvalue(), page)
    html = page.getvalue()
    good = meshes and arrays and "OfflineLocalView.load" in html and len(html) > SMALLEST_HTML
    if not good:
        raise RuntimeError(f"save: the page has {len(html)} bytes and {meshes} meshes, expected "
                           f"over {SMALLEST_HTML} bytes and a scene")  # fmt: skip
    Path(name).write_text(html, encoding="utf-8")


def show(plotter: Any, **options: Any) -> Any:
    """Open the interactive window (or the notebook view) and return what PyVista returns."""
    return plotter.show(**options)
