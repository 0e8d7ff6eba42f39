"""Mean-curvature flow, curve shortening and heat: closed forms, rates, early ends, gradients."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from darboux._checks import GeometryError
from darboux.flows.heat import dirichlet_energy, heat_flow
from darboux.flows.mean_curvature import (
    curvature_velocity,
    curve_area,
    curve_length,
    curve_shortening,
    mean_curvature_flow,
    turning_angles,
)
from darboux.manifolds.mesh import disk, grid, icosphere, torus_mesh
from darboux.manifolds.spectral import graph_laplacian, stiffness_mass
from darboux.manifolds.spectral.operator import Sparse

F64 = torch.float64


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def ellipsoid(level, *axes):
    mesh = icosphere(level)
    return mesh.move(mesh.vertices * torch.tensor(axes, dtype=F64))


def closed_curve(n, a=1.0, b=1.0, wave=0.0):
    s = torch.arange(n, dtype=F64) * (2 * math.pi / n)
    r = 1 + wave * torch.cos(3 * s)
    return torch.stack([a * r * s.cos(), b * r * s.sin()], -1)


# -- surfaces -------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["semi-implicit", "conformal"])
def test_the_sphere_shrinks_by_its_law_at_first_order(scheme):
    mesh = icosphere(2)

    def square(dt):
        run = mean_curvature_flow(mesh, dt=dt, steps=round(0.1 / dt), scheme=scheme)
        return float(run.vertices[-1].square().sum(-1).mean())

    found = [square(dt) for dt in (0.02, 0.01, 0.005)]
    assert abs(found[-1] - 0.6) < 0.012
    ratio = (found[0] - found[1]) / (found[1] - found[2])
    assert 1.8 < ratio < 2.2
    # the limit of small steps is left with the error of the mesh
    assert abs(2 * found[2] - found[1] - 0.6) < 0.006


def test_a_run_ends_before_the_sphere_is_gone():
    run = mean_curvature_flow(icosphere(1), dt=0.01, steps=60)
    assert run.status == "collapsed"
    assert 0.22 <= float(run.t[-1]) <= 0.27
    assert run.vertices.shape == (len(run.t), 42, 3)
    assert bool(run.vertices.isfinite().all())
    assert float(run.vertices[-1].norm(dim=-1).min()) > 0.05


def test_a_run_ends_before_triangles_are_needles():
    # the waist of a dumbbell shrinks faster than its ends
    mesh = icosphere(2)
    z = mesh.vertices[:, 2:]
    waist = 0.15 + 0.85 * z.square()
    bell = mesh.move(torch.cat([mesh.vertices[:, :2] * waist, 2 * z], 1))
    run = mean_curvature_flow(bell, dt=0.002, steps=200)
    assert run.status == "singular"
    assert bool(run.vertices.isfinite().all())
    last = bell.move(run.vertices[-1])
    assert float(last.volumes().min()) > 0
    # the conformal flow has no neck pinch
    smooth = mean_curvature_flow(bell, dt=0.01, steps=40, scheme="conformal", keep_area=True)
    assert smooth.status == "done"


def test_the_conformal_flow_of_genus_zero_ends_in_a_round_sphere():
    spread = []
    for level in (2, 3):
        mesh = ellipsoid(level, 1.0, 0.7, 1.4)
        run = mean_curvature_flow(
            mesh, dt=2.0, steps=25, scheme="conformal", keep_area=True, save_every=25
        )
        assert run.vertices.shape[0] == 2
        end = mesh.move(run.vertices[-1])
        torch.testing.assert_close(end.volumes().sum(), mesh.volumes().sum())
        share = end.vertex_areas()
        centre = (share @ end.vertices) / share.sum()
        radius = (end.vertices - centre).norm(dim=-1)
        spread.append(float(radius.std() / radius.mean()))
    # round up to the mesh, at its second order; the ellipsoid has 0.17
    assert spread[0] < 0.03
    assert 1.7 < math.log2(spread[0] / spread[1]) < 2.5
    # and conformal: angles change far less than by mapping to the sphere radially
    radial = mesh.move(mesh.vertices / mesh.vertices.norm(dim=-1, keepdim=True))
    moved, plain = ((m.angles() - mesh.angles()).square().mean().sqrt() for m in (end, radial))
    assert float(moved) < 0.4 * float(plain)


def test_area_is_restored_about_the_centre_of_mass():
    mesh = ellipsoid(2, 1.0, 0.7, 1.4)
    bulge = mesh.vertices * (1 + 0.5 * (mesh.vertices[:, :1] > 0)) + 3.0  # lopsided, off the origin
    mesh = mesh.move(bulge)
    plain, kept = (
        mean_curvature_flow(mesh, dt=0.05, steps=1, keep_area=keep).vertices[-1]
        for keep in (False, True)
    )
    cells = plain[mesh.cells]
    area = torch.linalg.cross(cells[:, 1] - cells[:, 0], cells[:, 2] - cells[:, 0]).norm(dim=-1)
    centre = (area[:, None] * cells.mean(1)).sum(0) / area.sum()
    ratio = (kept - centre).norm(dim=-1) / (plain - centre).norm(dim=-1)
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
    assert float(ratio[0]) > 1.01
    torch.testing.assert_close(mesh.move(kept).volumes().sum(), mesh.volumes().sum())


def test_area_falls_and_the_centre_stays():
    mesh = torus_mesh(n=16, m=10)
    run = mean_curvature_flow(mesh, dt=0.01, steps=10)
    areas = torch.stack([mesh.move(x).volumes().sum() for x in run.vertices])
    assert bool((areas.diff() < 0).all())
    # sum M (x+ - x) = -dt sum L x+ = 0: the lumped centre stays in each step
    weights = stiffness_mass(mesh, mass="lumped").mass.diagonal()
    shift = weights @ (run.vertices[1] - run.vertices[0])
    assert float(shift.abs().max()) <= 1e-12


def test_gradients_of_the_surface_flow():
    mesh = ellipsoid(0, 1.0, 0.8, 1.2)
    x = mesh.vertices.clone().requires_grad_()
    for scheme, keep in (("semi-implicit", False), ("conformal", True)):

        def end(x):
            run = mean_curvature_flow(
                mesh.move(x), dt=0.02, steps=2, scheme=scheme, keep_area=keep, save_every=2
            )
            return run.vertices[-1]

        assert gradcheck(end, x, atol=1e-7, fast_mode=True)


def test_errors_of_the_surface_flow():
    flat = disk(1)
    flat = flat.move(torch.cat([flat.vertices, 0 * flat.vertices[:, :1]], 1))
    with pytest.raises(ValueError, match="boundary of 12 vertices, expected a closed surface"):
        mean_curvature_flow(flat, dt=0.1, steps=1)
    with pytest.raises(ValueError, match=r"glued cells of dimension 2 in R\^2"):
        mean_curvature_flow(grid((4, 4), periodic=True), dt=0.1, steps=1)
    with pytest.raises(ValueError, match="scheme is 'explicit'"):
        mean_curvature_flow(icosphere(0), dt=0.1, steps=1, scheme="explicit")
    with pytest.raises(ValueError, match="dt is -1"):
        mean_curvature_flow(icosphere(0), dt=-1, steps=1)
    with pytest.raises(TypeError, match="mesh is a Tensor"):
        mean_curvature_flow(icosphere(0).vertices, dt=0.1, steps=1)  # pyright: ignore[reportArgumentType]


# -- curves ---------------------------------------------------------------------------------


def test_area_falls_at_two_pi_exactly():
    curves = torch.stack([closed_curve(40, 1.5, 0.7, 0.2), closed_curve(40, 1, 1, 0.4).flip(0)])
    area = curve_area(curves)
    assert float(area[0]) > 0 > float(area[1])
    x = curves.requires_grad_()
    slope = torch.autograd.grad(curve_area(x).sum(), x)[0]
    rate = (slope * curvature_velocity(x)).sum((-1, -2))
    expected = torch.tensor([-2 * math.pi, 2 * math.pi], dtype=F64)
    torch.testing.assert_close(rate, expected, atol=1e-12, rtol=0)
    # twice around: -4 pi
    s = torch.arange(80, dtype=F64) * (4 * math.pi / 80)
    limacon = (0.5 + s.div(2).cos().mul(0.3))[:, None] * torch.stack([s.cos(), s.sin()], -1)
    torch.testing.assert_close(turning_angles(limacon).sum(), torch.tensor(4 * math.pi, dtype=F64))
    run = curve_shortening(curves.detach(), dt=0.02, steps=3)
    areas = curve_area(run.vertices)
    law = areas[0] + run.t[:, None] * expected
    torch.testing.assert_close(areas, law, atol=1e-6, rtol=0)


def test_length_falls_at_the_integral_of_the_squared_curvature():
    a, b = 1.5, 0.8

    def error(n):
        x = closed_curve(n, a, b).requires_grad_()
        slope = torch.autograd.grad(curve_length(x), x)[0]
        s = torch.arange(4096, dtype=F64) * (2 * math.pi / 4096)
        speed = (a * s.sin()).square() + (b * s.cos()).square()
        energy = ((a * b) ** 2 * speed.pow(-2.5)).mean() * 2 * math.pi
        return abs(float((slope * curvature_velocity(x)).sum().detach() + energy))

    errors = [error(n) for n in (40, 80, 160)]
    assert errors[-1] < 0.01
    assert 1.8 < math.log2(errors[0] / errors[1]) < 2.2
    assert 1.8 < math.log2(errors[1] / errors[2]) < 2.2


def test_regular_polygons_follow_the_circle_and_collapse():
    n = 24
    run = curve_shortening(closed_curve(n), dt=0.1, steps=30)
    # A = n r^2 sin(2 pi/n)/2 and dA/dt = -2 pi
    gain = (2 * math.pi / n) / math.sin(2 * math.pi / n)
    radius = run.vertices.norm(dim=-1)
    law = (1 - 2 * gain * run.t).sqrt()[:, None].expand_as(radius)
    torch.testing.assert_close(radius, law, atol=1e-6, rtol=0)
    assert run.status == "collapsed"
    assert 0.4 <= float(run.t[-1]) < 0.5 / gain


def test_convex_and_other_embedded_curves_become_round():
    run = curve_shortening(closed_curve(36, 1.0, 1.0, 0.5), dt=0.1, steps=3)
    ratio = curve_length(run.vertices).square() / (4 * math.pi * curve_area(run.vertices))
    assert bool((ratio.diff() < 0).all())
    assert float(ratio[0]) > 1.5
    assert float(ratio[-1]) < 1.06


def test_a_loop_ends_singular_with_its_last_good_state():
    # the inner loop of a limacon is gone long before the area is
    s = torch.arange(60, dtype=F64) * (2 * math.pi / 60)
    x = (0.6 + s.cos())[:, None] * torch.stack([s.cos(), s.sin()], -1)
    run = curve_shortening(x, dt=0.005, steps=60)
    assert run.status == "singular"
    assert 0.0 < float(run.t[-1]) < float(curve_area(x).abs()) / (4 * math.pi)
    assert bool(run.vertices.isfinite().all())


def test_gradients_of_the_curve_flow_also_under_transforms():
    x = closed_curve(8, 1.2, 0.9).requires_grad_()

    def end(x):
        return curve_shortening(x, dt=0.02, steps=2).vertices[-1]

    assert gradcheck(end, x, atol=1e-7, fast_mode=True)
    batch = torch.stack([x.detach(), 1.1 * x.detach()])
    mapped = torch.func.vmap(curvature_velocity)(batch)
    torch.testing.assert_close(mapped, curvature_velocity(batch))
    slope = torch.func.grad(lambda x: end(x).square().sum())(x.detach())
    torch.testing.assert_close(slope, torch.autograd.grad(end(x).square().sum(), x)[0])


def test_errors_of_the_curve_flow():
    with pytest.raises(ValueError, match=r"x has shape \(5, 3\), expected \(\.\.\., 2\)"):
        curve_shortening(torch.zeros(5, 3), dt=0.1, steps=1)
    with pytest.raises(ValueError, match=r"n >= 3"):
        curve_shortening(torch.zeros(2, 2), dt=0.1, steps=1)
    with pytest.raises(GeometryError, match="neighbouring vertices that coincide"):
        curve_shortening(torch.zeros(5, 2), dt=0.1, steps=1)
    with pytest.raises(ValueError, match="NaN"):
        curve_shortening(torch.full((5, 2), math.nan), dt=0.1, steps=1)


# -- heat -----------------------------------------------------------------------------------


def eigenpair(operator, k):
    stiffness, mass = operator.stiffness.dense(), operator.mass.dense()
    half = torch.linalg.cholesky(mass)
    white = torch.linalg.solve_triangular(half, stiffness, upper=False)
    white = torch.linalg.solve_triangular(half, white.mT, upper=False)
    values, vectors = torch.linalg.eigh(white)
    return values[k], torch.linalg.solve_triangular(half.mT, vectors[:, k : k + 1], upper=True)[
        :, 0
    ]


def test_eigenfunctions_decay_by_their_eigenvalue():
    operator = stiffness_mass(icosphere(1))
    value, phi = eigenpair(operator, 7)
    run = heat_flow(operator, phi, dt=0.05, steps=7, save_every=3)
    torch.testing.assert_close(run.t, torch.tensor([0.0, 0.15, 0.3, 0.35], dtype=F64))
    expected = torch.exp(-value * run.t)[:, None] * phi
    torch.testing.assert_close(run.u, expected, atol=1e-11, rtol=0)
    euler = heat_flow(operator, phi, dt=0.05, steps=3, method="euler").u[-1]
    torch.testing.assert_close(euler, phi / (1 + 0.05 * value) ** 3, atol=1e-12, rtol=0)
    nicolson = heat_flow(operator, phi, dt=0.05, steps=3, method="crank-nicolson").u[-1]
    factor = ((1 - 0.025 * value) / (1 + 0.025 * value)) ** 3
    torch.testing.assert_close(nicolson, factor * phi, atol=1e-12, rtol=0)


@pytest.mark.parametrize("method", ["exact", "euler", "crank-nicolson"])
def test_heat_keeps_its_amount_and_loses_its_energy(method):
    mesh = ellipsoid(1, 1.0, 0.7, 1.3)
    operator, u = stiffness_mass(mesh), noise(42, 2)
    run = heat_flow(mesh, u, dt=0.1, steps=5, method=method)
    assert run.u.shape == (6, 42, 2)
    amount = torch.stack([(operator.mass @ v).sum(0) for v in run.u])
    assert float((amount - amount[0]).abs().max()) <= 1e-11
    energy = torch.stack([dirichlet_energy(mesh, v) for v in run.u])
    assert bool((energy.diff(dim=0) < 0).all())


def test_heat_on_a_graph_and_its_gradient():
    edges = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]])
    weights = torch.tensor([1.0, 2.0, 0.5, 1.5], dtype=F64, requires_grad=True)
    u = noise(4).requires_grad_()

    def end(weights, u):
        run = heat_flow(graph_laplacian(edges, weights), u, dt=0.3, steps=2, save_every=2)
        return run.u[-1]

    stiffness = graph_laplacian(edges, weights).stiffness
    assert isinstance(stiffness, Sparse)
    dense = stiffness.dense()
    expected = torch.linalg.matrix_exp(-0.6 * dense) @ u
    torch.testing.assert_close(end(weights, u), expected, atol=1e-11, rtol=0)
    assert gradcheck(end, (weights, u), atol=1e-7, fast_mode=True)


def test_errors_of_the_heat_flow():
    mesh = icosphere(0)
    with pytest.raises(ValueError, match=r"u has shape \(3,\), expected \(12,\)"):
        heat_flow(mesh, torch.zeros(3, dtype=F64), dt=0.1, steps=1)
    with pytest.raises(TypeError, match=r"float32, expected torch\.float64"):
        heat_flow(mesh, torch.zeros(12), dt=0.1, steps=1)
    with pytest.raises(ValueError, match="method is 'rk4'"):
        heat_flow(mesh, torch.zeros(12, dtype=F64), dt=0.1, steps=1, method="rk4")
    with pytest.raises(TypeError, match="domain is a Tensor"):
        heat_flow(torch.eye(3), torch.zeros(3), dt=0.1, steps=1)  # pyright: ignore[reportArgumentType]
