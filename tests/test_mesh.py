"""Meshes: what is refused at the door, topology and measures of known spaces, files."""

import math
from itertools import product

import numpy as np
import pytest
import torch

from darboux._checks import GeometryError
from darboux.manifolds import Ellipsoid, TorusOfRevolution
from darboux.manifolds.mesh import (
    Mesh,
    bolza,
    disk,
    ellipsoid,
    equilateral_triangle,
    grid,
    hemisphere,
    icosphere,
    klein_bottle,
    l_shape,
    load,
    of_pullback,
    projective_plane,
    rectangle,
    save,
    three_sphere,
    to_sphere,
    torus_mesh,
)

# mesh, dimension, Euler characteristic, whether it has a boundary, whether it is orientable
SPACES = {
    "icosphere": (lambda: icosphere(1), 2, 2, False, True),
    "ellipsoid": (lambda: ellipsoid(1, (1.0, 1.2, 1.5)), 2, 2, False, True),
    "torus": (lambda: torus_mesh(2.0, 0.8, 9, 5), 2, 0, False, True),
    "projective plane": (lambda: projective_plane(1), 2, 1, False, False),
    "Klein bottle": (lambda: klein_bottle((4, 3)), 2, 0, False, False),
    "Bolza": (lambda: bolza(2), 2, -2, False, True),
    "flat torus": (lambda: grid((3, 4), periodic=True), 2, 0, False, True),
    "cylinder": (lambda: grid((3, 4), periodic=(True, False)), 2, 0, True, True),
    "disk": (lambda: disk(2), 2, 1, True, True),
    "hemisphere": (lambda: hemisphere(2), 2, 1, True, True),
    "rectangle": (lambda: rectangle((3, 4), (1.0, 2.0)), 2, 1, True, True),
    "triangle": (lambda: equilateral_triangle(2), 2, 1, True, True),
    "L-shape": (lambda: l_shape(2), 2, 1, True, True),
    "circle": (lambda: grid((5,), periodic=True), 1, 0, False, True),
    "interval": (lambda: grid((5,)), 1, 1, True, True),
    "cube": (lambda: grid((2, 1, 3)), 3, 1, True, True),
    "3-torus": (lambda: grid((3, 3, 3), periodic=True), 3, 0, False, True),
    "S^3": (lambda: three_sphere(0), 3, 0, False, True),
}


@pytest.fixture(params=SPACES, scope="module")
def space(request):
    make, *facts = SPACES[request.param]
    return make(), *facts


def test_topology_of_known_spaces(space):
    mesh, dim, chi, rim, orientable = space
    assert (mesh.dim, mesh.euler_characteristic, mesh.components) == (dim, chi, 1)
    assert bool(mesh.boundary.numel()) is rim
    assert mesh.orientable is orientable
    assert mesh.oriented is orientable
    assert mesh.edges.shape[1] == 2
    assert mesh.boundary.shape[1] == dim


def test_boundary_and_edges_are_those_of_the_cells(space):
    mesh, dim, *_ = space
    count: dict[tuple[int, ...], int] = {}
    for cell in mesh.topology.glued.tolist():
        for missing in range(dim + 1):
            facet = tuple(sorted(cell[:missing] + cell[missing + 1 :]))
            count[facet] = count.get(facet, 0) + 1
    expected = {facet for facet, cells in count.items() if cells == 1}
    unknown = mesh.topology.unknown
    assert {tuple(sorted(f)) for f in unknown[mesh.boundary].tolist()} == expected
    pairs = {(a, b) for c in mesh.topology.glued.tolist() for a, b in product(c, c) if a < b}
    assert {tuple(sorted(e)) for e in unknown[mesh.edges].tolist()} == pairs


def test_gauss_bonnet_is_exact(space):
    mesh, dim, *_ = space
    if dim != 2:
        with pytest.raises(ValueError, match="expected triangles"):
            mesh.gauss_bonnet()
    else:
        assert abs(float(mesh.gauss_bonnet())) < 1e-11


def test_refinement_keeps_topology_and_volume(space):
    mesh, dim, chi, rim, orientable = space
    fine = mesh.refine()
    assert fine.cells.shape[0] == 2**dim * mesh.cells.shape[0]
    assert (fine.euler_characteristic, fine.components) == (chi, 1)
    assert (bool(fine.boundary.numel()), fine.oriented) == (rim, orientable)
    torch.testing.assert_close(fine.volumes().sum(), mesh.volumes().sum())


@pytest.mark.parametrize(
    ("make", "volume", "power"),
    [
        (icosphere, 4 * math.pi, 2),
        (lambda level: disk(level + 1), math.pi, 2),
        (lambda level: hemisphere(level + 1), 2 * math.pi, 2),
        (lambda level: torus_mesh(2.0, 0.8, 12 * 2**level, 6 * 2**level), 6.4 * math.pi**2, 2),
        (three_sphere, 2 * math.pi**2, 2),
    ],
)
def test_volumes_converge(make, volume, power):
    errors = [abs(float(make(level).volumes().sum()) - volume) for level in (1, 2)]
    assert math.log2(errors[0] / errors[1]) > power - 0.2


def test_volumes_of_simplices_in_any_codimension():
    generator = torch.Generator().manual_seed(0)
    for d, n in [(1, 1), (1, 4), (2, 2), (2, 3), (2, 5), (3, 3), (3, 4)]:
        x = torch.randn(d + 1, n, generator=generator, dtype=torch.float64)
        side = (x[1:] - x[0]).numpy()
        expected = math.sqrt(np.linalg.det(side @ side.T)) / math.factorial(d)
        found = float(Mesh(x, torch.arange(d + 1)[None]).volumes())
        assert found == pytest.approx(expected, rel=1e-12)


def test_vertex_areas_share_out_the_volume():
    mesh = torus_mesh(2.0, 0.8, 9, 5)
    torch.testing.assert_close(mesh.vertex_areas().sum(), mesh.volumes().sum())


def test_area_of_a_sliver_has_all_its_digits():
    # twice the area is exactly 1e-9, the Gram determinant would be rounding
    x = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1e-9, 0]], dtype=torch.float64)
    mesh = Mesh(x, torch.tensor([[0, 1, 2]]))
    assert float(mesh.volumes()) == pytest.approx(5e-10, rel=1e-12)


def test_normals_point_outward():
    mesh = icosphere(2)
    x = mesh.vertices
    middle = to_sphere(x[mesh.cells].mean(1))
    assert float((mesh.normals() * middle).sum(-1).min()) > 0.99
    assert float((mesh.vertex_normals() * x).sum(-1).min()) > 0.999


def test_orient_turns_cells_and_refuses_one_sided_surfaces():
    mesh = icosphere(1)
    cells = mesh.cells.clone()
    cells[::3] = cells[::3].flip(-1)
    mixed = Mesh(mesh.vertices, cells)
    with pytest.raises(GeometryError, match=r"oriented\s+against each other.*orient\(\)"):
        mixed.normals()
    inward = (mixed.orient().normals() * mesh.vertices[cells].mean(1)).sum(-1)
    assert mixed.orient().oriented
    assert (inward < 0).all() or (inward > 0).all()
    with pytest.raises(GeometryError, match="not orientable"):
        projective_plane(1).orient()


def test_measures_are_differentiable():
    mesh = icosphere(0)
    x = mesh.vertices.clone().requires_grad_()

    def measures(y):
        moved = mesh.move(y)
        return moved.volumes(), moved.angle_defects(), moved.vertex_normals()

    assert torch.autograd.gradcheck(measures, (x,), fast_mode=True)


def test_components_are_counted():
    one = icosphere(0)
    x = torch.cat([one.vertices, one.vertices + 5])
    two = Mesh(x, torch.cat([one.cells, one.cells + 12]))
    assert (two.components, two.euler_characteristic) == (2, 4)
    assert two.component_of.tolist() == [0] * 12 + [1] * 12


def test_octagon_of_bolza_is_regular_with_hyperbolic_area():
    # density of the Klein model at the centroid, an O(h^2) rule: area 4 pi
    errors = []
    for level in (3, 4):
        mesh = bolza(level)
        r2 = mesh.vertices[mesh.cells].mean(1).square().sum(-1)
        errors.append(abs(float((mesh.volumes() * (1 - r2) ** -1.5).sum()) - 4 * math.pi))
    assert errors[1] < 0.1
    assert errors[0] / errors[1] > 3.5


# -- surfaces ---------------------------------------------------------------------------------


def test_pullback_closes_periods_and_poles():
    torus = of_pullback(TorusOfRevolution(2.0, 0.8), (12, 8))
    ball = of_pullback(Ellipsoid(1.0, 1.2, 1.5), (8, 12))
    flat = of_pullback(TorusOfRevolution(2.0, 0.8), (6, 5), bounds=[(0.0, 3.0), (0.0, 2.0)])
    facts = [(m.euler_characteristic, m.boundary.shape[0], m.oriented) for m in (torus, ball, flat)]
    assert facts == [(0, 0, True), (2, 0, True), (1, 22, True)]
    assert torus.vertices.shape[0] == 96


def test_pullback_carries_gradients_of_parameters():
    def area(radius):
        class Tube:
            bounds = [(0.0, 2 * math.pi), (0.0, 2 * math.pi)]  # noqa: RUF012

            def embedding(self, x):
                ring = 2 + radius * x[..., 1].cos()
                height = radius * x[..., 1].sin()
                return torch.stack([ring * x[..., 0].cos(), ring * x[..., 0].sin(), height], -1)

        return of_pullback(Tube(), (9, 6)).volumes().sum()

    radius = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(area, (radius,))


# -- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "make", "digits"),
    [
        ("a.vtp", lambda: icosphere(1), 1e-15),
        ("a.vtk", lambda: torus_mesh(2.0, 0.8, 6, 5), 1e-15),
        ("a.ply", lambda: icosphere(1), 1e-7),
        ("a.stl", lambda: icosphere(1), 1e-7),
        ("a.obj", lambda: icosphere(1), 1e-5),
        ("flat.vtp", lambda: disk(1), 1e-15),
        ("a.vtu", lambda: grid((2, 2, 2)), 1e-15),
        ("line.vtp", lambda: grid((5,)), 1e-15),
    ],
)
def test_files_give_back_the_mesh(tmp_path, name, make, digits):
    mesh = make()
    found = load(save(mesh, tmp_path / name))
    facts = [(m.dim, m.cells.shape, m.euler_characteristic, m.components) for m in (mesh, found)]
    assert facts[0] == facts[1]
    old, new = mesh.volumes().sort().values, found.volumes().sort().values
    torch.testing.assert_close(new, old, rtol=10 * digits, atol=10 * digits)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_files_refuse_what_they_cannot_hold(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        load(tmp_path / "none.ply")
    with pytest.raises(ValueError, match=r"dimension 3, expected \('.vtu'"):
        save(grid((1, 1, 1)), tmp_path / "a.stl")
    with pytest.raises(ValueError, match=r"R\^4"):
        save(three_sphere(0), tmp_path / "a.vtu")
    assert not list(tmp_path.iterdir())


# -- the door ---------------------------------------------------------------------------------

X = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]], dtype=torch.float64)
SQUARE = torch.tensor([[0, 1, 2], [1, 3, 2]])


@pytest.mark.parametrize(
    ("vertices", "cells", "glue", "error", "message"),
    [
        (X.tolist(), SQUARE, None, TypeError, "vertices is a list"),
        (X, SQUARE.int(), None, TypeError, "cells is torch.int32, expected an int64"),
        (X, SQUARE[0], None, ValueError, r"cells has shape \(3,\), expected \(m, 2\)"),
        (X[:, :1], SQUARE, None, ValueError, r"vertices has shape \(4, 1\), expected \(n, N\)"),
        (X, SQUARE + 1, None, ValueError, r"cells \[1\] have indices outside 0 \.\.\. 3"),
        (X, SQUARE - 1, None, ValueError, r"cells \[0\] have indices outside"),
        (X, SQUARE[:1], None, ValueError, r"vertices \[3\] belong to no cell"),
        (X * math.nan, SQUARE, None, ValueError, "12 entries that are NaN"),
        (X * 0, SQUARE, None, GeometryError, r"cells \[0, 1\] have no volume"),
        (X[:, [0, 0, 0]], SQUARE, None, GeometryError, "have no volume"),
        (X, torch.tensor([[0, 1, 1], [1, 3, 2]]), None, ValueError, r"cells \[0\] have one vertex"),
        (X, torch.cat([SQUARE, SQUARE[:1]]), None, ValueError, "more than two cells.*a manifold"),
        (X, SQUARE, torch.tensor([0, 1, 2]), ValueError, r"glue has shape \(3,\), expected \(4,\)"),
        (X, SQUARE, torch.tensor([0, 0, 2, 3]), ValueError, "refine before gluing"),
    ],
)
def test_bad_input_is_named(vertices, cells, glue, error, message):
    with pytest.raises(error, match=message):
        Mesh(vertices, cells, glue)


def test_gluing_too_coarsely_is_refused():
    # two cells around: distinct edges would get the same ends
    flat = rectangle((2, 3))
    i, j = torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij")
    with pytest.raises(ValueError, match="refine before gluing"):
        Mesh(flat.vertices, flat.cells, ((i % 2) * 4 + j).reshape(-1))
    for call in (lambda: bolza(1), lambda: projective_plane(0), lambda: grid((2,), periodic=True)):
        with pytest.raises(ValueError, match=r"expected|three"):
            call()


def test_move_checks_the_new_vertices_and_keeps_the_topology():
    mesh = icosphere(1)
    moved = mesh.move(2 * mesh.vertices)
    assert moved.topology is mesh.topology
    torch.testing.assert_close(moved.volumes(), 4 * mesh.volumes())
    with pytest.raises(GeometryError, match="and 75 more have no volume"):
        mesh.move(0 * mesh.vertices)
    with pytest.raises(ValueError, match="shape"):
        mesh.move(mesh.vertices[:-1])


def test_makers_refuse_what_does_not_exist():
    for call, message in [
        (lambda: icosphere(-1), "icosphere: level is -1"),
        (lambda: torus_mesh(0.5, 0.8), r"R is 0.5 and r is 0.8, expected R > r"),
        (lambda: ellipsoid(1, (1.0, 0.0, 1.0)), "expected three positive"),
        (lambda: grid((2, 2), (1.0,)), "same number of entries"),
        (lambda: grid((0, 2)), "at least one cell"),
        (lambda: of_pullback(TorusOfRevolution(2.0, 0.8), (4, 4), [(0.0, 1.0)]), "one pair"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_a_mesh_says_what_it_is():
    assert repr(icosphere(0)) == "Mesh(20 cells of dimension 2, 12 vertices in R^3)"
    assert repr(grid((3,), periodic=True)).endswith("4 vertices glued to 3 in R^1)")


def test_float32_stays_float32():
    mesh = icosphere(2, dtype=torch.float32)
    assert mesh.vertices.dtype == mesh.volumes().dtype == mesh.normals().dtype == torch.float32
    assert mesh.to(dtype=torch.float64).vertices.dtype == torch.float64
