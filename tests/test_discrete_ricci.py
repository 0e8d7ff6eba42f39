"""Ricci flow of triangle meshes and uniformisation: conservation, limits, flips, gradients."""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from darboux._checks import ConvergenceError, GeometryError
from darboux.flows import _discrete_conformal as dc
from darboux.flows.discrete_ricci import discrete_ricci_flow, uniformize
from darboux.flows.unfolding import develop
from darboux.manifolds.mesh import Mesh, bolza, disk, grid, icosphere, klein_bottle, torus_mesh
from darboux.manifolds.spectral import stiffness_mass
from darboux.manifolds.spectral.operator import Sparse

F64 = torch.float64
SCHEMES = ("luo", "tangential", "thurston", "inversive")


def double_torus(level=0):
    """A slab of cubes with two holes: 48 vertices, genus 2."""
    rows = ("#####", "#.#.#", "#####")
    cubes = {(i, j, 0) for j, row in enumerate(rows) for i, c in enumerate(row) if c == "#"}
    quads = []
    for cube in cubes:
        for axis in range(3):
            for side in (0, 1):
                near = list(cube)
                near[axis] += 2 * side - 1
                if tuple(near) in cubes:
                    continue
                corners = []
                for s, t in ((0, 0), (1, 0), (1, 1), (0, 1)):
                    x = list(cube)
                    x[axis] += side
                    x[(axis + 1) % 3] += s
                    x[(axis + 2) % 3] += t
                    corners.append(tuple(x))
                quads.append(corners if side else corners[::-1])
    names = {x: k for k, x in enumerate(sorted({x for quad in quads for x in quad}))}
    cells = [[names[quad[i]] for i in part] for quad in quads for part in ((0, 1, 2), (0, 2, 3))]
    mesh = Mesh(torch.tensor(sorted(names), dtype=F64), torch.tensor(cells))
    for _ in range(level):
        mesh = mesh.refine()
    return mesh


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def bumpy_torus(n=8, m=6):
    mesh = torus_mesh(n=n, m=m)
    return mesh.move(mesh.vertices + 0.1 * noise(*mesh.vertices.shape))


def bumpy_sphere(level=2):
    mesh = icosphere(level)
    return mesh.move(mesh.vertices * torch.tensor([1.0, 1.5, 0.6], dtype=F64))


def edge_lengths(mesh):
    ends = mesh.vertices[mesh.edges]
    return (ends[:, 1] - ends[:, 0]).norm(dim=-1)


def klein_chords(mesh):
    # |X - Y| = 2 sinh(d/2) on the hyperboloid, from the Klein model
    x = mesh.vertices
    height = (1 - x.square().sum(-1)).rsqrt()[:, None]
    lifted = torch.cat([x * height, height], -1)
    a, b = lifted[mesh.edges].unbind(1)
    square = (a - b).square()
    return (square[:, :2].sum(-1) - square[:, 2]).sqrt()


def hyperbolic_area(lengths):
    # L'Huilier's formula, from the sides alone
    s = lengths.sum(-1) / 2
    product = (s / 2).tanh() * ((s[:, None] - lengths) / 2).tanh().prod(-1)
    return 4 * product.clamp(min=0).sqrt().atan().sum()


# -- angles, curvature and its derivative ---------------------------------------------------


def test_angles_are_those_of_the_law_of_cosines_and_degenerate_gently():
    sides = 1 + torch.rand(50, 3, dtype=F64, generator=torch.Generator().manual_seed(0)) * 0.9
    a, b, c = sides.unbind(-1)
    flat = ((b * b + c * c - a * a) / (2 * b * c)).acos()
    torch.testing.assert_close(dc.angles(sides)[:, 0], flat, atol=1e-12, rtol=0)
    bent = ((b.cosh() * c.cosh() - a.cosh()) / (b.sinh() * c.sinh())).acos()
    torch.testing.assert_close(dc.angles(sides, True)[:, 0], bent, atol=1e-12, rtol=0)
    needles = torch.tensor(
        [[2.0, 1.0, 1.0], [3.0, 1.0, 1.0], [1.0, 1.0, 5.0]], dtype=F64, requires_grad=True
    )
    theta = dc.angles(needles)
    expected = torch.tensor([[1, 0, 0], [1, 0, 0], [0, 0, 1]], dtype=F64) * math.pi
    torch.testing.assert_close(theta, expected, atol=1e-15, rtol=0)
    assert bool(torch.autograd.grad(theta.square().sum(), needles)[0].isfinite().all())


@pytest.mark.parametrize("background", ["euclidean", "hyperbolic"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_jacobian_is_the_derivative_of_the_curvature(scheme, background):
    mesh = bumpy_sphere(1)
    tri, table = dc.triangles_of(mesh.topology), dc.SCHEMES[scheme, background]
    hyperbolic = background == "hyperbolic"
    datum, start = table.data(edge_lengths(mesh), tri)
    u = start + 0.05 * noise(tri.points)

    def curvature(u):
        return dc.curvature(tri, table.length(datum, *u[tri.ends].unbind(-1)), hyperbolic)

    expected = torch.autograd.functional.jacobian(curvature, u)
    found = dc.jacobian(tri, table, datum, u, hyperbolic).dense()
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    lowest = torch.linalg.eigvalsh(found)[0]
    assert lowest > 1e-2 if hyperbolic else abs(lowest) <= 1e-12
    # Gauss-Bonnet, with the area from the sides
    lengths = table.length(datum, *u[tri.ends].unbind(-1))[tri.side]
    area = hyperbolic_area(lengths) if hyperbolic else 0.0
    assert abs(float(curvature(u).sum() - area) - 4 * math.pi) <= 1e-12


def test_vertex_scaling_has_the_cotan_laplacian_of_finite_elements():
    mesh = bumpy_sphere(2)
    tri, table = dc.triangles_of(mesh.topology), dc.SCHEMES["luo", "euclidean"]
    datum, start = table.data(edge_lengths(mesh), tri)
    found = dc.jacobian(tri, table, datum, start).dense()
    stiffness = stiffness_mass(mesh).stiffness
    assert isinstance(stiffness, Sparse)
    expected = stiffness.dense()
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("background", ["euclidean", "hyperbolic"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_energy_is_convex_also_through_broken_triangles(scheme, background):
    mesh = bumpy_sphere(1)
    tri, table = dc.triangles_of(mesh.topology), dc.SCHEMES[scheme, background]
    hyperbolic = background == "hyperbolic"
    datum, start = table.data(edge_lengths(mesh), tri)
    shattered = 0
    for seed in range(3):
        near, far = start + noise(tri.points, seed=seed), start + noise(tri.points, seed=seed + 50)
        if table.negative:
            near, far = near.clamp(max=-0.01), far.clamp(max=-0.01)
        # the gradient K is monotone along the segment
        slopes = []
        for s in torch.linspace(0, 1, 13, dtype=F64):
            u = near + s * (far - near)
            lengths = table.length(datum, *u[tri.ends].unbind(-1))
            shattered += len(dc.broken(tri, lengths))
            slopes.append(dc.curvature(tri, lengths, hyperbolic) @ (far - near))
        assert float(torch.stack(slopes).diff().min()) >= -1e-12
    # touching and overlapping circles never break a triangle, the others did
    assert (shattered > 0) == (scheme in ("luo", "inversive"))


# -- the flow -------------------------------------------------------------------------------


@pytest.mark.parametrize("flips", [True, False])
def test_the_flow_keeps_the_sum_of_u_and_the_total_curvature(flips):
    mesh = bumpy_sphere(1)
    run = discrete_ricci_flow(mesh, dt=0.3, steps=30, flips=flips, save_every=5)
    assert float(run.u.sum(-1).abs().max()) <= 1e-12
    assert float((run.curvature.sum(-1) - 4 * math.pi).abs().max()) <= 1e-12 * 4 * math.pi
    spread = (run.curvature - run.curvature.mean(-1, keepdim=True)).norm(dim=-1)
    assert bool((spread.diff() < 0).all())
    assert float(spread[-1] / spread[0]) < 0.05
    assert run.t.shape == (7,)
    assert run.u.shape == (7, 42)


def test_the_flow_has_the_order_of_its_method():
    mesh = bumpy_torus()

    def end(steps):
        return discrete_ricci_flow(mesh, "flat", dt=0.4 / steps, steps=steps, flips=False).u[-1]

    exact = end(32)
    errors = [float((end(n) - exact).norm()) for n in (4, 8)]
    assert 3.6 < math.log2(errors[0] / errors[1]) < 4.6


@pytest.mark.parametrize(
    ("mesh", "target", "scheme"),
    [
        (bumpy_torus(5, 4), "flat", "luo"),
        (bumpy_sphere(1), None, "luo"),
        (icosphere(1), None, "thurston"),
        (bumpy_sphere(1), None, "inversive"),
        (double_torus(), "hyperbolic", "luo"),
        (double_torus(), "hyperbolic", "tangential"),
    ],
)
def test_newton_finds_the_limit_of_the_flow(mesh, target, scheme):
    newton = uniformize(mesh, target, scheme=scheme)
    flow = uniformize(mesh, target, scheme=scheme, method="flow")
    torch.testing.assert_close(newton.u, flow.u, atol=1e-8, rtol=0)
    assert newton.iterations <= 8 < flow.iterations
    assert newton.status == "converged"
    mean = newton.curvature.mean()
    assert float(newton.curvature.max() - mean) <= 1e-12
    assert float(flow.curvature.max() - mean) <= 1e-10


@pytest.mark.parametrize("flips", [True, False])
def test_gradients_pass_through_time(flips):
    mesh = bumpy_torus(5, 4)
    x = mesh.vertices.clone().requires_grad_()

    def end(x):
        run = discrete_ricci_flow(mesh.move(x), "flat", dt=0.2, steps=3, flips=flips)
        return run.u[-1]

    assert gradcheck(end, x, atol=1e-6, fast_mode=True)


# -- uniformisation -------------------------------------------------------------------------


@pytest.mark.parametrize("flips", [True, False])
@pytest.mark.parametrize("level", [0, 1])
def test_genus_two_gets_constant_curvature_minus_one(level, flips):
    found = uniformize(double_torus(level), "hyperbolic", flips=flips)
    assert found.background == "hyperbolic"
    # cone angles 2 pi, from the law of cosines rather than from the half-angles
    a, b, c = (found.lengths[found.sides].roll(-k, -1) for k in range(3))
    theta = ((b.cosh() * c.cosh() - a.cosh()) / (b.sinh() * c.sinh())).acos()
    around = torch.zeros_like(found.u).index_add(0, found.corners.reshape(-1), theta.reshape(-1))
    assert float((around - 2 * math.pi).abs().max()) <= 1e-10
    area = hyperbolic_area(found.lengths[found.sides])
    assert abs(float(area) - 4 * math.pi) <= 1e-10


@pytest.mark.parametrize("scheme", SCHEMES[1:])
def test_circle_packings_of_genus_two(scheme):
    found = uniformize(double_torus(), "hyperbolic", scheme=scheme)
    assert found.residual <= 1e-12
    assert abs(float(hyperbolic_area(found.lengths[found.sides])) - 4 * math.pi) <= 1e-10
    assert float(found.u.max()) < 0
    if scheme == "tangential":
        r = 2 * found.u.exp().atanh()
        ends = double_torus().edges
        torch.testing.assert_close(found.lengths, r[ends].sum(-1), atol=1e-13, rtol=1e-13)


def test_the_bolza_surface_is_found_from_its_conformal_class():
    # the geodesic mesh has cone angles 2 pi already, so scaling it by v is undone by u = -v
    mesh = bolza(3)
    chords = klein_chords(mesh)
    v = 0.1 * noise(mesh.topology.points)
    scaled = chords * (v[mesh.topology.edges[0]].sum(-1) / 2).exp()
    found = uniformize(mesh, "hyperbolic", lengths=scaled, flips=False)
    torch.testing.assert_close(found.u, -v, atol=1e-12, rtol=0)
    torch.testing.assert_close(found.lengths, 2 * (chords / 2).asinh(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("flips", [True, False])
def test_conformal_changes_are_found_again(flips):
    # equal lattice triangles: flat; in one class with what v makes of them, flipped or not
    mesh = grid((6, 5), (6.0, 5.0), periodic=True)
    shear = torch.tensor([[1.0, 0.0], [-0.5, math.sqrt(0.75)]], dtype=F64)
    mesh = mesh.move(mesh.vertices @ shear)
    v = 0.1 * noise(mesh.topology.points)
    scaled = edge_lengths(mesh) * (v[mesh.topology.edges[0]].sum(-1) / 2).exp()
    found = uniformize(mesh, "flat", lengths=scaled, flips=flips)
    torch.testing.assert_close(found.u, v.mean() - v, atol=1e-12, rtol=0)


def test_flips_reach_what_one_triangulation_cannot():
    # five triangles around a vertex have at most the angle 5 pi, so its defect is above -3 pi
    mesh = icosphere(2)
    n = mesh.topology.points
    target = torch.full((n,), (4 * math.pi + 20) / (n - 1), dtype=F64)
    target[0] = -20.0
    with pytest.raises(ConvergenceError, match="break the triangle inequality") as caught:
        uniformize(mesh, target, flips=False, max_iterations=30)
    good = caught.value.trajectory
    assert good.status == "failed"
    assert bool(good.u.isfinite().all())
    sides = good.lengths[good.sides]
    assert bool((2 * sides.amax(-1) < sides.sum(-1)).all())
    found = uniformize(mesh, target)
    assert found.flips > 10
    assert float((found.curvature - target).abs().max()) <= 1e-12
    sides = found.lengths[found.sides]
    assert bool((2 * sides.amax(-1) < sides.sum(-1)).all())
    assert int((found.corners == 0).sum()) > 8
    assert abs(float(found.u.mean())) <= 1e-13


def test_flips_end_in_a_delaunay_triangulation_of_the_same_class():
    mesh = bumpy_sphere(1)
    tri, table = dc.triangles_of(mesh.topology), dc.SCHEMES["luo", "euclidean"]
    tri, lengths, count = dc.straighten(tri, mesh.topology, edge_lengths(mesh))
    assert count > 0
    before, start = table.data(lengths, tri)
    datum, u = before, start + 0.7 * noise(tri.points)
    new, rounds = dc.flip(tri, datum, u)
    for step in rounds:
        datum = dc.ptolemy(datum, step)
    lengths = table.length(datum, *u[new.ends].unbind(-1))
    assert len(dc.broken(new, lengths)) == 0
    opposite = torch.zeros(len(lengths), dtype=F64)
    opposite = opposite.index_add(0, new.side.reshape(-1), dc.angles(lengths[new.side]).reshape(-1))
    assert float(opposite.max()) <= math.pi + 1e-6
    # the way back: a Delaunay triangulation and its log-lengths are unique
    _, back = dc.flip(new, datum, start)
    for step in back:
        datum = dc.ptolemy(datum, step)
    assert len(rounds) > 0
    torch.testing.assert_close(datum.sort().values, before.sort().values, atol=1e-12, rtol=0)


def test_a_klein_bottle_needs_no_orientation_without_flips():
    mesh = klein_bottle((6, 5))
    v = 0.1 * noise(mesh.topology.points)
    scaled = edge_lengths(mesh) * (v[mesh.topology.edges[0]].sum(-1) / 2).exp()
    found = uniformize(mesh, "flat", lengths=scaled, flips=False)
    torch.testing.assert_close(found.u, v.mean() - v, atol=1e-12, rtol=0)


def test_float32_follows_the_input():
    mesh = bumpy_torus()
    exact = uniformize(mesh, "flat")
    found = uniformize(mesh.to(dtype=torch.float32), "flat")
    assert found.u.dtype == found.lengths.dtype == torch.float32
    torch.testing.assert_close(found.u.double(), exact.u, atol=1e-5, rtol=0)


# -- gradients by the implicit function theorem ---------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "flips"),
    [("luo", True), ("luo", False), ("thurston", True), ("inversive", True), ("tangential", True)],
)
def test_gradients_in_vertices(scheme, flips):
    mesh = bumpy_torus(5, 4)
    x = mesh.vertices.clone().requires_grad_()

    def solved(x):
        found = uniformize(mesh.move(x), "flat", scheme=scheme, flips=flips)
        return found.u, found.lengths

    if scheme == "luo":
        assert (uniformize(mesh, "flat", flips=flips).flips > 0) == flips
    assert gradcheck(solved, x, atol=1e-6, fast_mode=True)


def test_gradients_in_the_hyperbolic_background():
    mesh = double_torus()
    lengths = edge_lengths(mesh) * torch.exp(0.1 * noise(len(mesh.edges)))
    lengths.requires_grad_()

    def solved(lengths):
        return uniformize(mesh, "hyperbolic", lengths=lengths).u

    assert gradcheck(solved, lengths, atol=1e-6, fast_mode=True)


def test_first_and_second_derivatives_in_the_target():
    mesh = bumpy_torus(5, 4)
    n = mesh.topology.points
    basis = noise(n, 3)
    basis = basis - basis.mean(0)
    weight = noise(n, seed=2)
    z = torch.full((3,), 0.05, dtype=F64, requires_grad=True)

    def loss(z):
        return (uniformize(mesh, basis @ z).u * weight).sum()

    assert gradcheck(loss, z, atol=1e-7, fast_mode=True)
    assert gradgradcheck(loss, z, atol=1e-6, fast_mode=True)
    # du/dK is the inverse of the cotan Laplacian of the solution
    found = uniformize(mesh, basis @ z)
    tri = dc.Triangles(found.corners, found.sides, torch.empty(0), torch.zeros(n))
    table = dc.SCHEMES["luo", "euclidean"]
    (slope,) = torch.autograd.grad((found.u * weight).sum(), z)
    flat = torch.zeros(n, dtype=F64)
    laplacian = dc.jacobian(tri, table, found.lengths.detach().log(), flat).dense()
    expected = basis.T @ torch.linalg.pinv(laplacian) @ weight
    torch.testing.assert_close(slope, expected, atol=1e-10, rtol=1e-10)


# -- layouts --------------------------------------------------------------------------------


def spots(metric, layout):
    first = torch.full((len(metric.u), 2), math.nan, dtype=F64)
    first[metric.corners.reshape(-1)] = layout.reshape(-1, 2)
    return (layout - first[metric.corners]).norm(dim=-1).max()


def test_a_bent_disk_is_laid_flat():
    flat = disk(2)
    x = flat.vertices
    bent = flat.move(torch.cat([x, 0.6 * x[:, :1].square() - 0.3 * x[:, 1:] * x[:, :1]], 1))
    found = uniformize(bent, "flat")
    rim = bent.boundary.unique()
    assert float(found.u[rim].abs().max()) == 0.0
    assert float(found.u.abs().max()) > 1e-3
    layout = develop(found)
    assert float(spots(found, layout)) <= 1e-12
    one, two = layout[:, [1, 2, 0]], layout[:, [2, 0, 1]]
    torch.testing.assert_close((one - two).norm(dim=-1), found.lengths[found.sides])
    side = layout[:, 1:] - layout[:, :1]
    assert float(torch.linalg.det(side).min()) > 0


def test_genus_two_unfolds_in_the_disk():
    found = uniformize(double_torus(), "hyperbolic")
    z = torch.view_as_complex(develop(found, root=3).contiguous())
    assert float(z.abs().max()) < 1
    assert abs(complex(z[3, 0])) == 0.0
    one, two = z[:, [1, 2, 0]], z[:, [2, 0, 1]]
    distance = 2 * ((one - two) / (1 - one.conj() * two)).abs().atanh()
    torch.testing.assert_close(distance, found.lengths[found.sides], atol=1e-10, rtol=0)
    with pytest.raises(ValueError, match="root is 999"):
        develop(found, root=999)


def test_a_moebius_strip_cannot_be_laid():
    mesh = klein_bottle((4, 4))
    with pytest.raises(GeometryError, match="oriented alike"):
        develop(uniformize(mesh, "flat", flips=False))


# -- the door -------------------------------------------------------------------------------


def test_errors_at_the_door():
    sphere, torus = icosphere(1), bumpy_torus()
    n = sphere.topology.points
    with pytest.raises(ValueError, match=r"sums to 0, expected 2 pi chi = 12\.566"):
        uniformize(sphere, torch.zeros(n, dtype=F64))
    with pytest.raises(ValueError, match=r"'flat' sums to 0, expected 2 pi chi = 12\.566"):
        uniformize(sphere, "flat")
    with pytest.raises(ValueError, match="characteristic 0 in the hyperbolic background"):
        uniformize(torus, "hyperbolic")
    with pytest.raises(ValueError, match="area of hyperbolic triangles is the difference"):
        uniformize(torus, torch.zeros(48, dtype=F64), background="hyperbolic")
    with pytest.raises(ValueError, match="boundary of 12 vertices, expected a closed one"):
        uniformize(disk(1), "hyperbolic")
    with pytest.raises(ValueError, match="boundary of 12 vertices"):
        discrete_ricci_flow(disk(1), dt=0.1, steps=2)
    with pytest.raises(ValueError, match=r"target has shape \(3,\), expected \(42,\)"):
        uniformize(sphere, torch.zeros(3))
    spike = torch.full((n,), (4 * math.pi - 6.5) / (n - 1), dtype=F64)
    spike[0] = 6.5
    with pytest.raises(ValueError, match=r"defects of 2 pi or more .*1 of 42"):
        uniformize(sphere, spike)
    with pytest.raises(ValueError, match="target is 'round'"):
        uniformize(sphere, "round")
    with pytest.raises(ValueError, match="scheme is 'yamabe'"):
        uniformize(sphere, scheme="yamabe")
    with pytest.raises(ValueError, match="method is 'adam'"):
        uniformize(sphere, method="adam")
    with pytest.raises(ValueError, match="tolerance is 0"):
        uniformize(sphere, tolerance=0)
    with pytest.raises(ValueError, match=r"lengths has shape \(3,\), expected \(120,\)"):
        uniformize(sphere, lengths=torch.ones(3, dtype=F64))
    lengths = edge_lengths(sphere)
    lengths[0] *= 5
    with pytest.raises(GeometryError, match="2 triangles break the triangle inequality"):
        uniformize(sphere, lengths=lengths)
    big = double_torus()
    big = big.move(1e3 * big.vertices)
    assert uniformize(big, "hyperbolic").residual <= 1e-12
    with pytest.raises(ValueError, match="lengths go up to .* expected less than about 50"):
        uniformize(big, "hyperbolic", scheme="tangential")
    with pytest.raises(ValueError, match="not orientable"):
        uniformize(klein_bottle((4, 4)), "flat")
    with pytest.raises(TypeError, match=r"torch\.func"):
        torch.func.grad(lambda x: uniformize(sphere.move(x)).u.sum())(sphere.vertices)
    with pytest.raises(ValueError, match="stability bound"):
        discrete_ricci_flow(sphere, dt=5.0, steps=2)
    x, cells = sphere.vertices, sphere.cells
    two = Mesh(torch.cat([x, x + 5]), torch.cat([cells, cells + n]))
    with pytest.raises(ValueError, match="2 components, expected one"):
        uniformize(two)


def test_impossible_angles_end_in_an_error_with_the_last_good_state():
    # Thurston: circles that touch cannot leave so little angle to a neighbourhood
    mesh = icosphere(1)
    n = mesh.topology.points
    target = torch.full((n,), (4 * math.pi + 20) / (n - 1), dtype=F64)
    target[0] = -20.0
    for scheme in ("tangential", "thurston", "inversive"):
        with pytest.raises(ConvergenceError, match="last state without broken triangles") as caught:
            uniformize(mesh, target, scheme=scheme, max_iterations=20)
        assert bool(caught.value.trajectory.u.isfinite().all())
        assert caught.value.residual > 1
