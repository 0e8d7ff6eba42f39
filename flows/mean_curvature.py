r"""Surfaces and curves that move along their curvature vector, :math:`\dot x = \Delta_{g(t)} x`.

Surfaces are triangle meshes, with Dziuk's steps that treat the position implicitly and the metric
explicitly, :math:`(M_t + dt\,L_t)\,x_{t+dt} = M_t x_t`. The conformal variant keeps the stiffness
of the start, :math:`L_0`: it has no neck pinches and takes a surface of genus zero to the sphere.
Curves are closed polygons. Dziuk (1991), Numer. Math. 58; Kazhdan, Solomon and Ben-Chen (2012),
Comput. Graph. Forum 31.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from darboux import _checks
from darboux._checks import GeometryError, values
from darboux.flows import _metric_march
from darboux.manifolds.mesh import Mesh
from darboux.manifolds.spectral import stiffness_mass
from darboux.manifolds.spectral.exponential import add
from darboux.manifolds.spectral.operator import Sparse
from darboux.manifolds.spectral.solve import solver

_THIN = 1e-4  # of the quality of a cell, 1 for an equilateral triangle
_SUBSTEPS = 2000


class MeanCurvatureRun(NamedTuple):
    """A moving surface or curve, saved states time first."""

    t: Tensor  # (time,)
    vertices: Tensor  # (time, ..., n, d)
    status: str  # "done"; "collapsed" before it vanished; "singular" before cells became needles


# -- surfaces ---------------------------------------------------------------------------------


def mean_curvature_flow(
    mesh: Mesh,
    *,
    dt: float,
    steps: int,
    scheme: str = "semi-implicit",
    keep_area: bool = False,
    mass: str = "lumped",
    save_every: int = 1,
) -> MeanCurvatureRun:
    r"""Flow a closed surface in R^3 by its mean curvature; the sphere has :math:`R^2 = R_0^2 - 4t`.

    ``scheme`` is ``"semi-implicit"`` or ``"conformal"``; both are of first order in ``dt`` and
    have no bound on it. ``keep_area`` scales every step back to the first area, about the centre.
    A run ends early with its last good state: ``collapsed`` when no surface of its area can live
    another step, since by Willmore's inequality :math:`-dA/dt \ge 16\pi`, and ``singular`` where
    a triangle is about to become a needle. Differentiable through time by ``torch.autograd``.

    >>> from darboux.manifolds.mesh import icosphere
    >>> run = mean_curvature_flow(icosphere(2), dt=0.01, steps=10)
    >>> radius = run.vertices[-1].norm(dim=-1).mean()
    >>> abs(float(radius**2) - 0.6) < 0.02
    True
    """
    where = "mean_curvature_flow"
    _check_surface(where, mesh)
    _metric_march.check_run(where, dt, steps, save_every)
    if scheme not in ("semi-implicit", "conformal"):
        raise ValueError(f"{where}: scheme is {scheme!r}, expected 'semi-implicit' or 'conformal'")
    first = stiffness_mass(mesh, mass=mass)
    area = mesh.volumes().sum()

    def step(x: Tensor) -> Tensor:
        now = mesh.move(x)
        operator = stiffness_mass(now, mass=mass)
        assert isinstance(operator.mass, Sparse)
        stiffness = first.stiffness if scheme == "conformal" else operator.stiffness
        assert isinstance(stiffness, Sparse)
        new = solver(add(operator.mass, stiffness, dt), where)(operator.mass @ x)
        if not keep_area:
            return new
        with _checks.unchecked():  # the verdict looks at it
            cells = mesh.move(new).volumes()
        total = cells.sum()
        centre = (cells[:, None] * new[mesh.cells].mean(1)).sum(0) / total
        return centre + (area / total).sqrt() * (new - centre)

    def verdict(x: Tensor) -> str | None:
        corners = x[mesh.cells]
        one, two = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
        areas = torch.linalg.cross(one, two).norm(dim=-1) / 2
        squares = one.square().sum(-1) + two.square().sum(-1) + (two - one).square().sum(-1)
        if not bool(areas.isfinite().all()):
            return "singular"
        if not keep_area and float(areas.sum()) <= 16 * math.pi * mesh.components * dt:
            return "collapsed"
        thin = 4 * math.sqrt(3.0) * areas <= _THIN * squares
        return "singular" if bool(thin.any()) else None

    t, x, word = _metric_march.march(step, mesh.vertices, dt, steps, save_every, verdict)
    return MeanCurvatureRun(t, x, word or "done")


def _check_surface(where: str, mesh: Mesh) -> None:
    if _checks.in_transform():
        raise TypeError(
            f"{where}: torch.func transforms and forward mode do not reach sparse solves; use "
            "torch.autograd"
        )
    if not isinstance(mesh, Mesh):
        raise TypeError(f"{where}: mesh is a {type(mesh).__name__}, expected a Mesh")
    if (mesh.dim, mesh.vertices.shape[1]) != (2, 3) or mesh.glue is not None:
        glued = "glued " if mesh.glue is not None else ""
        raise ValueError(
            f"{where}: {glued}cells of dimension {mesh.dim} in R^{mesh.vertices.shape[1]}, "
            "expected triangles in R^3 without gluing"
        )
    rim = mesh.boundary.unique().numel()
    if rim:
        raise ValueError(
            f"{where}: the mesh has a boundary of {rim} vertices, expected a closed surface"
        )


# -- curves -----------------------------------------------------------------------------------


def curve_area(x: Tensor) -> Tensor:
    """Return the signed area ``(...)`` inside closed polygons ``(..., n, 2)``."""
    after = x.roll(-1, -2)
    return _cross(x, after).sum(-1) / 2


def curve_length(x: Tensor) -> Tensor:
    """Return the length ``(...)`` of closed polygons ``(..., n, d)``."""
    return (x.roll(-1, -2) - x).square().sum(-1).sqrt().sum(-1)


def turning_angles(x: Tensor) -> Tensor:
    r"""Return the angles ``(..., n)`` at which closed polygons turn; they sum to :math:`2\pi m`."""
    after = x.roll(-1, -2) - x
    before = after.roll(1, -2)
    return torch.atan2(_cross(before, after), (before * after).sum(-1))


def curvature_velocity(x: Tensor) -> Tensor:
    r"""Return the velocity ``(..., n, 2)`` of curve shortening for closed polygons.

    Vertex i moves along the gradient of the area A by :math:`-\tau_i/|\partial_i A|^2` times it,
    with the turning angle :math:`\tau_i`, so that :math:`dA/dt = -\sum\tau_i = -2\pi` exactly.
    """
    chord = x.roll(-1, -2) - x.roll(1, -2)
    outward = torch.stack([chord[..., 1], -chord[..., 0]], -1) / 2
    return -(turning_angles(x) / outward.square().sum(-1))[..., None] * outward


def curve_shortening(x: Tensor, *, dt: float, steps: int, save_every: int = 1) -> MeanCurvatureRun:
    r"""Flow closed plane curves ``x (..., n, 2)`` by their curvature: :math:`dA/dt = -2\pi`.

    A step of ``dt`` is cut into as many classical Runge-Kutta steps as stability asks, so the area
    follows its law to their fourth order. A run ends early with its last good state: ``collapsed``
    when the area would be gone within the step, ``singular`` where vertices meet. Copies of a
    batch take the same steps and end together. Differentiable through time to any order.
    Gage and Hamilton (1986), J. Differential Geom. 23.

    >>> angle = torch.arange(32) * (2 * torch.pi / 32)
    >>> circle = torch.stack([angle.cos(), angle.sin()], -1).double()
    >>> run = curve_shortening(circle, dt=0.05, steps=4)
    >>> area = curve_area(run.vertices) / torch.pi
    >>> round(float(area[0] - area[-1]), 6)
    0.4
    """
    where = "curve_shortening"
    _checks.check_last(where, "x", x, 2)
    if x.dim() < 2 or x.shape[-2] < 3:
        raise ValueError(f"{where}: x has shape {tuple(x.shape)}, expected (..., n, 2) with n >= 3")
    _checks.check_finite(where, x=x)
    _metric_march.check_run(where, dt, steps, save_every)
    _checks.check_that(
        where, lambda: _sides(x) > 0, "x has neighbouring vertices that coincide", GeometryError
    )
    gone = False

    def step(y: Tensor) -> Tensor:
        nonlocal gone
        plain = values(y)
        turning = turning_angles(plain).sum(-1).abs()
        # a curve that turns once or more vanishes with its area
        dying = (turning > 1) & (curve_area(plain).abs() <= dt * turning)
        gone = bool(dying.any())
        # half the bound: the sides shorten within the step
        bound = _metric_march.RK4_REAL / 8 * float(_products(plain).min())
        count = math.ceil(min(dt / bound, _SUBSTEPS + 1)) if bound > 0 else _SUBSTEPS + 1
        if _checks.checks_values() and (gone or count > _SUBSTEPS):
            return y * math.nan  # for the verdict, which drops it
        for _ in range(count):
            y = _metric_march.rk4(curvature_velocity, y, dt / count)
        return y

    def verdict(y: Tensor) -> str | None:
        if bool(y.isfinite().all()) and float(_sides(y).min()) > 0:
            return None
        return "collapsed" if gone else "singular"

    t, saved, word = _metric_march.march(step, x, dt, steps, save_every, verdict)
    return MeanCurvatureRun(t, saved, word or "done")


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def _sides(x: Tensor) -> Tensor:
    return (x.roll(-1, -2) - x).square().sum(-1)


def _products(x: Tensor) -> Tensor:
    # of the two sides at each vertex: the fastest rate of the velocity is 4 over this
    side = _sides(x).sqrt()
    return side * side.roll(1, -1)
