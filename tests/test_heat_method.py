"""Gradient and divergence as exact adjoints; distances by heat against closed forms."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from darboux._checks import GeometryError
from darboux.manifolds import mesh as meshes
from darboux.manifolds.spectral.finite_elements import stiffness_mass
from darboux.manifolds.spectral.heat_method import divergence, geodesic_distance, gradient
from darboux.manifolds.spectral.operator import Sparse
from darboux.manifolds.spectral.solve import solver

F64 = torch.float64


def rough(mesh, size=0.1):
    random = torch.Generator().manual_seed(0)
    x = mesh.vertices
    noise = size * torch.randn(x.shape, generator=random, dtype=F64)
    return mesh.move(x + noise * (mesh.volumes().mean() ** (1 / mesh.dim)))


MESHES = {
    "curve": lambda: rough(meshes.grid((7,))),
    "surface": lambda: rough(meshes.icosphere(2)),
    "with boundary": lambda: rough(meshes.hemisphere(2)),
    "glued": lambda: meshes.grid((5, 4), (1.0, 1.3), periodic=True),
    "one-sided": lambda: meshes.projective_plane(2),
    "solid": lambda: rough(meshes.grid((3, 2, 3))),
    "in four dimensions": lambda: meshes.three_sphere(0),
}


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("mass", ["lumped", "consistent", "mixed"])
def test_divergence_is_the_adjoint_of_the_gradient(name, mass):
    mesh = MESHES[name]()
    operator = stiffness_mass(mesh, mass=mass)
    n, (m, _), space = operator.size, mesh.cells.shape, mesh.vertices.shape[1]
    random = torch.Generator().manual_seed(1)
    u = torch.randn(n, 2, generator=random, dtype=F64)
    field = torch.randn(m, space, 2, generator=random, dtype=F64)
    one = (u * (operator.mass @ divergence(mesh, field, mass=mass))).sum(0)
    other = -(gradient(mesh, u) * field).sum(1).T @ mesh.volumes()
    torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    through = operator.mass @ divergence(mesh, gradient(mesh, u), mass=mass)
    torch.testing.assert_close(through, -(operator.stiffness @ u), rtol=1e-11, atol=1e-11)


def test_gradient_of_a_linear_function_is_its_tangential_part():
    a = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    mesh = meshes.icosphere(2)
    normal = mesh.normals()
    tangential = a - (normal @ a)[:, None] * normal
    torch.testing.assert_close(gradient(mesh, mesh.vertices @ a), tangential)
    box = rough(meshes.grid((3, 3, 3)))
    found = gradient(box, box.vertices @ a)
    torch.testing.assert_close(found, a.expand_as(found))


# -- distances --------------------------------------------------------------------------------


def on_sphere(level):
    mesh = meshes.icosphere(level)
    return mesh, torch.acos((mesh.vertices @ mesh.vertices[0]).clamp(-1, 1))


def on_torus(n):
    mesh = meshes.grid((n, n), (1.0, 1.0), periodic=True)
    return mesh, torch.minimum(mesh.vertices, 1 - mesh.vertices).norm(dim=-1)


def on_square(n):
    mesh = meshes.rectangle((n, n))
    return mesh, mesh.vertices.norm(dim=-1)


def in_cube(n):
    mesh = meshes.grid((n, n, n))
    return mesh, mesh.vertices.norm(dim=-1)


def edge(mesh):
    ends = mesh.vertices[mesh.edges]
    return float((ends[:, 1] - ends[:, 0]).norm(dim=-1).mean())


def errors(maker, sizes, time=None):
    found = []
    for size in sizes:
        mesh, exact = maker(size)
        t = None if time is None else time(edge(mesh))
        error = (geodesic_distance(mesh, 0, t=t) - exact).abs()
        found.append((float(error.mean()), float(error.max())))
    print(maker.__name__, [f"{mean:.4f} (at most {worst:.4f})" for mean, worst in found])
    return found


@pytest.mark.parametrize(
    ("maker", "sizes", "mean", "worst"),
    [
        (on_sphere, (2, 3, 4), 0.015, 0.032),
        (on_torus, (12, 24, 48), 0.007, 0.021),
        (on_square, (8, 16), 0.015, 0.055),
        (in_cube, (4, 8), 0.035, 0.13),
    ],
)
def test_distances_at_the_default_time(maker, sizes, mean, worst):
    found = errors(maker, sizes)
    assert all(b[0] < 0.75 * a[0] for a, b in pairwise(found))
    assert found[-1][0] < mean
    assert found[-1][1] < worst


@pytest.mark.parametrize(
    ("maker", "sizes"), [(on_sphere, (3, 4, 5)), (on_torus, (16, 64)), (on_square, (16, 64))]
)
def test_distances_converge_with_a_time_that_falls_slower(maker, sizes):
    found = errors(maker, sizes, lambda h: h**1.5 / 3)
    rate = math.log2(found[0][0] / found[-1][0]) / math.log2(sizes[-1] / sizes[0])
    if maker is on_sphere:
        rate = math.log2(found[0][0] / found[-1][0]) / (sizes[-1] - sizes[0])
    print(f"order {rate:.2f}")
    assert rate > 0.45


def test_boundary_does_not_bend_the_distance():
    """Heat without flux alone would be ten times worse in the mean (0.044, at most 0.12)."""
    mesh = meshes.disk(4)
    x = mesh.vertices
    source = int((x - torch.tensor([0.5, 0.2], dtype=F64)).norm(dim=-1).argmin())
    found = geodesic_distance(mesh, source, t=4 * edge(mesh) ** 2)
    error = (found - (x - x[source]).norm(dim=-1)).abs()
    print(f"disk: {error.mean():.4f}, at most {error.max():.4f}")
    assert error.mean() < 0.01
    assert error.max() < 0.03


def test_distance_of_the_hyperbolic_plane():
    """From the centre of the Bolza surface: artanh r in the Klein model, up to half its size."""

    def klein(x):
        s = 1 / (1 - x.square().sum(-1))[..., None, None]
        return s * torch.eye(2, dtype=x.dtype) + s**2 * x[..., None] * x[..., None, :]

    mesh = meshes.bolza(4)
    radius = mesh.vertices.norm(dim=-1)
    found, exact = geodesic_distance(mesh, 0, metric=klein), torch.atanh(radius)
    near = exact < 1.4  # within the inscribed circle, 1.5286
    error = (found - exact)[near].abs()
    print(f"hyperbolic: {error.mean():.4f}, at most {error.max():.4f}")
    assert error.mean() < 0.02
    assert error.max() < 0.05


def test_many_sources_and_sets_of_sources():
    mesh, exact = on_sphere(2)
    every = geodesic_distance(mesh, [0, 5, 9])
    for column, source in enumerate([0, 5, 9]):
        torch.testing.assert_close(every[:, column], geodesic_distance(mesh, source))
    assert torch.equal(geodesic_distance(mesh, torch.tensor([0, 5, 9])), every)
    # two poles: the distance from the nearer
    pole = int(exact.argmax())
    both = geodesic_distance(mesh, [[0, pole], 0])
    nearer = torch.minimum(exact, math.pi - exact)
    assert (both[:, 0] - nearer).abs().mean() < 0.05
    assert (every[[0, 5, 9], [0, 1, 2]] == 0).all()


def test_components_and_gluing():
    one = meshes.icosphere(1)
    n = one.vertices.shape[0]
    two = meshes.Mesh(
        torch.cat([one.vertices, 2 * one.vertices + 5]), torch.cat([one.cells, one.cells + n])
    )
    found = geodesic_distance(two, [0, n, [0, n]], t=0.1)
    assert (found[n:, 0] == math.inf).all()
    assert (found[:n, 1] == math.inf).all()
    torch.testing.assert_close(found[:n, 0], geodesic_distance(one, 0, t=0.1))
    torch.testing.assert_close(found[:, 2], torch.cat([found[:n, 0], found[n:, 1]]))
    # glued vertices are one point
    mesh, _ = on_torus(6)
    d = geodesic_distance(mesh, mesh.vertices.shape[0] - 1)
    torch.testing.assert_close(d, geodesic_distance(mesh, 0))
    assert d[0] == d[-1] == 0


def test_distance_scales_and_moves_with_the_mesh():
    mesh = rough(meshes.icosphere(2), 0.05)
    d = geodesic_distance(mesh, 3)
    torch.testing.assert_close(geodesic_distance(mesh.move(7 * mesh.vertices + 1), 3), 7 * d)
    far = geodesic_distance(mesh, 3, t=float(edge(mesh)) ** 2)
    torch.testing.assert_close(far, d)


@pytest.mark.parametrize("name", ["surface", "with boundary", "solid"])
def test_gradient_in_the_vertices(name):
    mesh = MESHES[name]()
    random = torch.Generator().manual_seed(3)
    n = mesh.vertices.shape[0]
    weight = torch.randn(n, 2, generator=random, dtype=F64)
    direction = torch.randn(mesh.vertices.shape, generator=random, dtype=F64)

    def f(x):
        return (geodesic_distance(mesh.move(x), [0, n - 1]) * weight).sum()

    x = mesh.vertices.clone().requires_grad_()
    exact = float((torch.autograd.grad(f(x), x)[0] * direction).sum())
    h = 1e-5
    near, far = (
        float(f(mesh.vertices + s * direction) - f(mesh.vertices - s * direction))
        for s in (h, 2 * h)
    )
    measured = (8 * near - far) / (12 * h)
    print(f"{name}: {abs(exact / measured - 1):.1e}")
    assert exact == pytest.approx(measured, rel=1e-6)


def test_distances_are_exact_on_a_curve_and_right_where_the_heat_is_nearly_nothing():
    """The heat falls by e for each edge: distance and gradient stay right to the far end."""
    line = meshes.grid((400,), (7.0,))
    x = (line.vertices * 3 + line.vertices.square()).requires_grad_()
    found = geodesic_distance(line.move(x), 100)
    exact = (x - x[100]).abs()[:, 0]
    torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-11)
    weight = torch.linspace(-1, 2, 401, dtype=F64)
    one, other = (torch.autograd.grad((d * weight).sum(), x)[0] for d in (found, exact))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-7)
    strip = rough(meshes.rectangle((300, 2), (300.0, 2.0)))
    direction = torch.randn(
        strip.vertices.shape, generator=torch.Generator().manual_seed(0), dtype=F64
    )

    def f(x):
        return geodesic_distance(strip.move(x), 0)[-1]

    y = strip.vertices.clone().requires_grad_()
    reverse = float((torch.autograd.grad(f(y), y)[0] * direction).sum())
    z, h = strip.vertices, 1e-4
    measured = float(f(z + h * direction) - f(z - h * direction)) / (2 * h)
    print(f"strip: {float(f(z)):.4f}, gradient {abs(reverse / measured - 1):.1e}")
    assert float(f(z)) == pytest.approx(300, rel=0.01)
    assert reverse == pytest.approx(measured, rel=1e-6)


def test_derivatives_of_a_solve():
    operator = stiffness_mass(rough(meshes.icosphere(0)))
    stiffness, mass = operator.stiffness, operator.mass
    assert isinstance(stiffness, Sparse)
    assert isinstance(mass, Sparse)
    pattern = mass.pattern
    size = pattern.size
    mirror = torch.argsort(pattern.cols * size + pattern.rows)
    b = torch.randn(size, 2, generator=torch.Generator().manual_seed(0), dtype=F64)

    def f(values, b):
        symmetric = 0.5 * (values + values[mirror])
        return solver(Sparse(pattern, symmetric))(b)

    values = (mass.values + stiffness.values).requires_grad_()
    assert torch.autograd.gradcheck(f, (values, b.requires_grad_()), fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (values, b), fast_mode=True)
    dense = Sparse(pattern, values).dense()
    torch.testing.assert_close(dense @ f(values, b), b)


def test_float32():
    mesh = meshes.icosphere(3)
    found = geodesic_distance(mesh.to(dtype=torch.float32), 0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), geodesic_distance(mesh, 0), rtol=0, atol=1e-3)


def test_bad_input():
    mesh, line = meshes.icosphere(1), meshes.grid((2000,))
    n, m = mesh.vertices.shape[0], mesh.cells.shape[0]
    flat: Any = torch.eye(2, dtype=F64)
    vertices: Any = mesh.vertices
    cases = [
        (TypeError, "mesh is a Tensor", lambda: geodesic_distance(vertices, 0)),
        (ValueError, f"vertices in 0 ... {n - 1}", lambda: geodesic_distance(mesh, n)),
        (ValueError, "vertices in 0", lambda: geodesic_distance(mesh, [-1])),
        (TypeError, "a vertex or a list", lambda: geodesic_distance(mesh, [[]])),
        (TypeError, "a vertex or a list", lambda: geodesic_distance(mesh, [[0.5]])),
        (ValueError, "sources is empty", lambda: geodesic_distance(mesh, [])),
        (ValueError, "one positive number", lambda: geodesic_distance(mesh, 0, t=-1.0)),
        (ValueError, "one positive number", lambda: geodesic_distance(mesh, 0, t=math.nan)),
        (ValueError, "needs a mesh in its chart", lambda: geodesic_distance(mesh, 0, metric=flat)),
        (GeometryError, "no heat reaches", lambda: geodesic_distance(line, 0)),
        (ValueError, "u has shape", lambda: gradient(mesh, torch.zeros(3, dtype=F64))),
        (ValueError, "field has shape", lambda: divergence(mesh, torch.zeros(m, 2, dtype=F64))),
        (TypeError, "u has dtype", lambda: gradient(mesh, torch.zeros(n))),
        (TypeError, "field has dtype", lambda: divergence(mesh, torch.ones(m, 3))),
        (
            ValueError,
            "mass is 'full'",
            lambda: divergence(mesh, torch.ones(m, 3, dtype=F64), mass="full"),
        ),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
    indefinite = stiffness_mass(mesh).stiffness
    assert isinstance(indefinite, Sparse)
    with pytest.raises(GeometryError, match="not positive definite"):
        solver(Sparse(indefinite.pattern, -indefinite.values))
