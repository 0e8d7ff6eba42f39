"""Charts of lines, and pictures and films of particles: they hold the numbers that were given."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from test_plotting import needs_gl, picture
from test_plotting_spectrum import film

from darboux import plotting

t = torch.linspace(0.1, 2, 30, dtype=torch.float64)


def charts(plotter):
    """Return the charts of all panels."""
    return [renderer._charts._charts[0] for renderer in plotter.renderers if renderer._charts]


@needs_gl
def test_lines_hold_curves_bands_and_references(tmp_path):
    one = {"a": (t, t), "b": (t, 2 * t, t, 3 * t), "_limit": (t[:2], 0 * t[:2] + 1)}
    two = {"b": (t, (-t).exp()), "c": (t.requires_grad_(), t.detach())}
    t.requires_grad_(False)
    plotter = plotting.lines(
        [one, two], log=["", "xy"], axes=[("x", "y"), ("u", "v")], titles=["one", "two"], dots=True
    )
    first, second = charts(plotter)
    drawn = {line.label: line for line in first.plots("line")}
    np.testing.assert_allclose(drawn["a"].y, t)
    assert list(drawn) == ["", "a", "b"]  # the reference below, without a name
    assert len(list(first.plots("area"))) == 1
    assert len(list(first.plots("scatter"))) == 2
    again = {line.label: line for line in second.plots("line")}
    assert again["b"].color.hex_rgb == drawn["b"].color.hex_rgb != again["c"].color.hex_rgb
    assert (first.x_axis.label, second.y_axis.label, second.title) == ("x", "v", "two")
    low, high = second.x_axis.range
    assert low < 0.1 < 2 < high < 3
    assert picture(plotter, tmp_path / "lines.png").std() > 10
    scales = [axis.log_scale for c in (first, second) for axis in (c.x_axis, c.y_axis)]
    assert scales == [False, False, True, True]


@needs_gl
def test_the_legend_does_not_cover_a_curve():
    falling = charts(plotting.lines({"a": (t, -t), "b": (t, -2 * t)}))[0]
    assert falling.y_axis.range[1] < 0.1  # free corners: the ranges are those of the data
    everywhere = {str(k): (t, (20 * t + k).sin()) for k in range(6)}
    low, high = charts(plotting.lines(everywhere))[0].y_axis.range
    assert max(high - 1, -1 - low) > 0.5  # no corner was free
    alone = charts(plotting.lines({"": (t, t)}))[0]
    assert not alone.legend_visible


def cloud(n, d, seed=0):
    x = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=-1, keepdim=True) if d == 3 else x


def gauss(x):
    return torch.exp(-x.square().sum(-1) / 2)


@needs_gl
def test_particles_lie_where_they_are(tmp_path):
    x = torch.stack([cloud(40, 2, seed) for seed in range(3)])
    box = ((-2.0, 2.0), (-1.5, 1.5))
    plotter = plotting.particles(
        x, density=gauss, bounds=box, labels=["a", "b", "c"], columns=2, groups=torch.arange(40) % 2
    )
    disks = plotter.actors["particles"].mapper.dataset
    hubs = np.asarray(disks.points)[::21, :2]
    inside = x[0][((x[0].abs() - torch.tensor([2.0, 1.5])) <= 0).all(1)]
    np.testing.assert_allclose(hubs, inside, atol=1e-6)
    colors = np.asarray(disks["rgb"])[::21]
    assert len(np.unique(colors, axis=0)) == 2
    ground = plotter.actors["density"].mapper.dataset
    at = np.asarray(ground.points)[:, :2]
    np.testing.assert_allclose(at.min(0), (-2, -1.5), atol=1e-6)
    expected = np.maximum(-(at**2).sum(1) / 2, -10)
    np.testing.assert_allclose(ground["density"], expected, atol=1e-3)
    # the second panel is beside the first, the third below it
    shifts = [np.asarray(plotter.actors[f"rim-{k}"].mapper.dataset.points)[0] for k in (1, 2)]
    assert shifts[0][0] > 2
    assert shifts[1][1] < -3
    pixels = picture(plotter, tmp_path / "a.png").reshape(*plotter.window_size[::-1], 3)
    assert (pixels[0] == 255).all()
    assert (pixels[:, 0] == 255).all()


@needs_gl
def test_the_far_side_of_a_sphere_is_faded():
    x = torch.tensor([[0.0, -1.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    plotter = plotting.particles(x, color="black", direction=(0.0, -1.0, 0.0))
    near, far = np.asarray(plotter.actors["particles"].mapper.dataset["rgb"])[::21].astype(int)
    assert near.max() == 0
    assert far.min() > 128
    assert plotter.actors["sphere"].prop.culling == "front"


@needs_gl
@pytest.mark.parametrize("d", [2, 3])
def test_a_film_of_particles_has_all_frames(d, tmp_path):
    start, end = cloud(12, d, 1), cloud(12, d, 2)
    s = torch.linspace(0, 1, 4, dtype=torch.float64)[:, None, None]
    x = (1 - s) * start + s * end
    x = x / x.norm(dim=-1, keepdim=True) if d == 3 else x
    options: dict[str, Any] = {"turn": 90.0} if d == 3 else {"density": gauss}
    target = plotting.particle_film(x, tmp_path / "a.gif", trail=2, width=128, fps=10, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["a.gif"]
    pages, duration = film(target)
    assert (len(pages), duration) == (4, 100)
    assert len({page.shape for page in pages}) == 1
    assert abs(pages[0].astype(int) - pages[-1]).mean() > 2
    rim = np.concatenate([pages[0][0], pages[0][:, 0]])
    assert rim.min() > 240


plane = cloud(5, 2)
sphere = cloud(5, 3)


@needs_gl
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: plotting.lines([]), ValueError, "0 panels"),
        (lambda p: plotting.lines([{}]), ValueError, "a curve in each"),
        (lambda p: plotting.lines({"a": (t,)}), ValueError, "'a' has 1 parts"),
        (lambda p: plotting.lines({"a": (t, t[:3])}), ValueError, "has shapes"),
        (lambda p: plotting.lines({"a": (t, -t)}, log="y"), ValueError, "logarithmic y"),
        (lambda p: plotting.lines({"a": (t, t * math.nan)}), ValueError, "NaN"),
        (lambda p: plotting.lines({"a": (t, t)}, titles=["a", "b"]), ValueError, "titles has 2"),
        (lambda p: plotting.particles(plane[:0]), ValueError, "expected \\(N, 2\\)"),
        (lambda p: plotting.particles([plane, sphere]), ValueError, "all alike"),
        (lambda p: plotting.particles(2 * sphere), ValueError, "off the unit sphere"),
        (lambda p: plotting.particles(sphere, density=gauss), ValueError, "in the plane"),
        (lambda p: plotting.particles(plane, labels=["a", "b"]), ValueError, "2 names"),
        (lambda p: plotting.particles(plane, groups=[1, 2]), ValueError, "groups has 2"),
        (lambda p: plotting.particles(plane, bounds=((1, 0), (0, 1))), ValueError, "lo < hi"),
        (lambda p: plotting.particles(plane, density=lambda x: -gauss(x)), ValueError, "negative"),
        (lambda p: plotting.particle_film(plane, p / "a.gif"), ValueError, "time, N, 2"),
        (lambda p: plotting.particle_film(plane[None], p / "a.avi"), ValueError, "neither .gif"),
        (lambda p: plotting.particle_film(plane[None], p / "a.gif", trail=-1), ValueError, "trail"),
    ],
)
def test_bad_input_is_told_what_was_expected(call, error, message, tmp_path):
    with pytest.raises(error, match=message):
        call(tmp_path)
    assert not list(tmp_path.iterdir())
