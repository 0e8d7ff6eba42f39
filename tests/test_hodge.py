"""Hodge and connection Laplacians: spectra in closed form, Betti numbers, exactness, gradients."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from darboux._checks import GeometryError
from darboux.manifolds import mesh as meshes
from darboux.manifolds.spectral.connection import connection_laplacian
from darboux.manifolds.spectral.eigen import eigenpairs
from darboux.manifolds.spectral.finite_elements import stiffness_mass
from darboux.manifolds.spectral.functions import trace
from darboux.manifolds.spectral.hodge import exterior_derivative, hodge_laplacian

F64 = torch.float64
RANDOM = torch.Generator().manual_seed(0)
SPHERES = [meshes.icosphere(level) for level in (1, 2, 3)]


def klein(x):
    s = 1 / (1 - x.square().sum(-1))[..., None, None]
    return s * torch.eye(2, dtype=x.dtype) + s**2 * x[..., None] * x[..., None, :]


def lowest(operator, k):
    return eigenpairs(operator, k, method="dense" if operator.size < 600 else "lanczos").values


def orders(found, exact):
    errors = [float((values - exact).abs().max()) for values in found]
    rate = [math.log2(a / b) for a, b in pairwise(errors)]
    print([f"{e:.4f}" for e in errors], "orders", [f"{r:.2f}" for r in rate])
    return errors, rate


def annulus():
    square = meshes.rectangle((6, 6), (3.0, 3.0))
    middle = square.vertices[square.cells].mean(1) - 1.5
    kept = square.cells[middle.abs().amax(1) > 0.5]
    used, which = torch.unique(kept, return_inverse=True)
    return meshes.Mesh(square.vertices[used], which)


# -- the complex ------------------------------------------------------------------------------


@pytest.mark.parametrize("maker", [lambda: SPHERES[1], lambda: meshes.grid((2, 3, 2)), annulus])
def test_the_derivative_twice_is_zero(maker):
    mesh = maker()
    u = torch.randint(-9, 9, (mesh.topology.points, 2), generator=RANDOM).to(F64)
    du = exterior_derivative(mesh, u, 0)
    assert (exterior_derivative(mesh, du, 1) == 0).all()
    # Stokes: the integral of a constant vector field along edges is the difference of a function
    a = torch.randn(mesh.vertices.shape[1], generator=RANDOM, dtype=F64)
    ends = mesh.vertices[mesh.topology.edges[0]]
    along = (ends[:, 1] - ends[:, 0]) @ a
    torch.testing.assert_close(exterior_derivative(mesh, mesh.vertices @ a, 0), along)
    assert exterior_derivative(mesh, along, 1).abs().max() < 1e-14


BETTI: dict[str, tuple[Any, int, int]] = {
    "sphere": (lambda: SPHERES[0], 0, 0),
    "torus": (lambda: meshes.torus_mesh(n=9, m=6), 2, 2),
    "bolza, genus 2": (lambda: meshes.bolza(2), 4, 4),
    "klein bottle": (lambda: meshes.klein_bottle((4, 4)), 1, 1),
    "projective plane": (lambda: meshes.projective_plane(1), 0, 0),
    "annulus": (annulus, 1, 1),
    "disk": (lambda: meshes.disk(2), 0, 0),
    "circle": (lambda: meshes.grid((9,), periodic=True), 1, 1),
    "solid torus": (lambda: meshes.grid((3, 2, 2), periodic=(True, False, False)), 1, 0),
    "three-torus": (lambda: meshes.grid((3, 3, 3), periodic=True), 3, 3),
}


@pytest.mark.parametrize("name", BETTI)
def test_zeros_count_the_first_betti_number(name):
    """Absolute and relative cohomology, which Lefschetz duality exchanges with other degrees."""
    maker, absolute, relative = BETTI[name]
    mesh = maker()
    for boundary, expected in (("absolute", absolute), ("relative", relative)):
        if boundary == "relative" and not mesh.topology.boundary.numel():
            continue
        values = lowest(hodge_laplacian(mesh, boundary=boundary), expected + 3)
        gap = values[expected] / values[-1]
        assert (values[:expected].abs() < 1e-10 * values[-1]).all()
        assert gap > 1e-3


# -- spectra ----------------------------------------------------------------------------------


@pytest.mark.parametrize("star", ["whitney", "circumcentric"])
def test_hodge_spectrum_of_the_sphere(star):
    exact = torch.tensor([2.0] * 6 + [6.0] * 10 + [12.0] * 14, dtype=F64)
    found = [lowest(hodge_laplacian(mesh, star=star), 30) for mesh in SPHERES]
    errors, rate = orders([v[:16] for v in found], exact[:16])
    assert min(rate) > 1.7
    assert errors[-1] < 0.06
    # the level l = 3 is whole: 2 (2 l + 1) copies, and the next is 20
    assert (found[-1] - exact).abs().max() < 0.5


def test_exact_forms_have_the_spectrum_of_functions():
    mesh = SPHERES[1].move(SPHERES[1].vertices * torch.tensor([1.0, 1.2, 1.5], dtype=F64))
    functions = eigenpairs(stiffness_mass(mesh, mass="lumped"), 6, method="dense")
    for star in ("whitney", "circumcentric"):
        operator = hodge_laplacian(mesh, star=star)
        form = exterior_derivative(mesh, functions.functions, 0)
        image = operator.stiffness @ form
        expected = (operator.mass @ form) * functions.values
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-11)
        # and their energy is the Dirichlet energy
        energy = (form * (operator.mass @ form)).sum(0)
        torch.testing.assert_close(energy, functions.values, rtol=1e-10, atol=1e-11)


def test_hodge_spectrum_in_a_metric():
    """The hyperbolic metric of the Bolza surface: 4 harmonic forms, then 2 x 3 of 3.8388873."""
    values = lowest(hodge_laplacian(meshes.bolza(3), metric=klein), 10)
    print(f"bolza: {values[4:10].tolist()}")
    assert (values[:4].abs() < 1e-9).all()
    assert (values[4:10] / 3.8388872588 - 1).abs().max() < 0.035


def test_one_forms_of_a_flat_torus_are_pairs_of_functions():
    """Every eigenvalue twice, for each of the two coordinates; parallel fields are harmonic."""
    k = torch.tensor([0.0] * 2 + [1.0] * 8 + [2.0] * 8, dtype=F64) * 4 * math.pi**2
    for build in (hodge_laplacian, connection_laplacian):
        grids = [meshes.grid((n, n), (1.0, 1.0), periodic=True) for n in (8, 16)]
        found = [lowest(build(mesh), 18) for mesh in grids]
        assert all((v[:2].abs() < 1e-9).all() for v in found)
        errors, rate = orders([v[:10] for v in found], k[:10])
        assert min(rate) > 1.8
        assert errors[-1] < 0.03 * 4 * math.pi**2


def test_hodge_spectrum_of_the_cube():
    r"""Absolute conditions: :math:`\pi^2 |k|^2`, twice for each k with no zero, once with one."""
    found = lowest(hodge_laplacian(meshes.grid((4, 4, 4))), 6) / math.pi**2
    exact = torch.tensor([1.0, 1.0, 1.0, 2.0, 2.0, 2.0], dtype=F64)
    print(f"cube: {found.tolist()}")
    assert ((found / exact) - 1).abs().max() < 0.15


def test_connection_spectrum_of_the_sphere():
    exact = torch.tensor([1.0] * 6 + [5.0] * 10 + [11.0] * 14, dtype=F64)
    found = [lowest(connection_laplacian(mesh), 30) for mesh in SPHERES]
    errors, rate = orders(found, exact)
    assert rate[-1] > 1.8
    assert errors[-1] < 0.05
    # a quarter turn commutes with the operator: all values are double
    torch.testing.assert_close(found[-1][::2], found[-1][1::2], rtol=1e-9, atol=0)


@pytest.mark.parametrize("build", [hodge_laplacian, connection_laplacian])
def test_lowest_fields_of_the_sphere_are_rotations_and_gradients(build):
    mesh = SPHERES[1]
    operator = build(mesh)
    spectrum = eigenpairs(operator, 6)
    fields = operator.space.vectors(spectrum.functions)
    centre, normal = mesh.vertices[mesh.cells].mean(1), mesh.normals()
    axes = torch.eye(3, dtype=F64)
    turning = torch.linalg.cross(
        axes[None].expand(len(centre), 3, 3), centre[:, None].expand(-1, 3, 3)
    )
    rising = axes - normal[:, :, None] * normal[:, None, :]
    basis = torch.cat([turning.transpose(1, 2), rising], 2).flatten(0, 1)
    flat = fields.flatten(0, 1)
    rest = flat - basis @ torch.linalg.lstsq(basis, flat).solution
    print(f"{build.__name__}: {rest.norm() / flat.norm():.4f}")
    assert (fields * normal[..., None]).sum(1).abs().max() < 1e-12
    assert rest.norm() < 0.1 * flat.norm()


def test_connection_needs_no_orientation():
    """On the flat Klein bottle one parallel field is left, and the spectrum is that of 1-forms."""
    mesh = meshes.klein_bottle((10, 10))
    found = lowest(connection_laplacian(mesh), 8) / math.pi**2
    assert abs(float(found[0])) < 1e-11
    exact = torch.tensor([1.0, 1.0, 4.0, 4.0, 4.0, 4.0, 5.0], dtype=F64)
    torch.testing.assert_close(found[1:], exact, rtol=0.03, atol=0)
    # cells oriented against each other change nothing
    sphere = SPHERES[0]
    turned = sphere.cells.clone()
    turned[::3] = turned[::3][:, [0, 2, 1]]
    mixed = meshes.Mesh(sphere.vertices, turned)
    torch.testing.assert_close(
        lowest(connection_laplacian(mixed), 20), lowest(connection_laplacian(sphere), 20)
    )


def test_boundary_conditions():
    """On the disk components are functions, free or fixed: the zeros of Bessel functions."""
    mesh = meshes.disk(3)
    free, fixed = (
        lowest(connection_laplacian(mesh, boundary=b), 8) for b in ("neumann", "dirichlet")
    )
    bessel = torch.tensor([3.3899577] * 4 + [9.3283632] * 2, dtype=F64)
    torch.testing.assert_close(free[2:8], bessel, rtol=0.04, atol=0)
    assert free[:2].abs().max() < 1e-10
    exact = torch.tensor([5.7831860] * 2 + [14.6819706] * 4, dtype=F64)
    torch.testing.assert_close(fixed[:6], exact, rtol=0.04, atol=0)
    space = connection_laplacian(mesh, boundary="dirichlet").space
    assert space.extend(torch.ones(2 * int(space.index.max() + 1), 3, dtype=F64)).shape[1:] == (
        2,
        3,
    )
    one = lowest(hodge_laplacian(mesh, boundary="absolute"), 6)
    # gradients of Neumann functions 3.39 (2), and duals of gradients of Dirichlet ones 5.78 (1)
    absolute = torch.tensor([3.3899577, 3.3899577, 5.7831860, 9.3283632, 9.3283632], dtype=F64)
    torch.testing.assert_close(one[:5], absolute, rtol=0.05, atol=0)
    # the star exchanges them on a surface
    other = lowest(hodge_laplacian(mesh, boundary="relative"), 5)
    torch.testing.assert_close(other, absolute, rtol=0.05, atol=0)


# -- derivatives and errors -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["whitney", "circumcentric", "connection", "tetrahedra"])
def test_gradient_in_the_vertices(name):
    """Of the heat trace at the degenerate sphere, and of a box."""
    mesh = meshes.grid((2, 2, 2)) if name == "tetrahedra" else SPHERES[0]
    direction = torch.randn(
        mesh.vertices.shape, generator=torch.Generator().manual_seed(4), dtype=F64
    )

    def f(x):
        moved = mesh.move(x)
        if name == "connection":
            operator = connection_laplacian(moved)
        else:
            star = name if name == "circumcentric" else "whitney"
            operator = hodge_laplacian(moved, star=star)
        return trace(operator, lambda v: torch.exp(-0.3 * v))

    x = mesh.vertices.clone().requires_grad_()
    exact = float((torch.autograd.grad(f(x), x)[0] * direction).sum())
    h = 1e-4
    with torch.no_grad():
        near, far = (
            float(f(mesh.vertices + s * direction) - f(mesh.vertices - s * direction))
            for s in (h, 2 * h)
        )
    measured = (8 * near - far) / (12 * h)
    print(f"{name}: {abs(exact / measured - 1):.1e}")
    assert exact == pytest.approx(measured, rel=1e-6)


@pytest.mark.parametrize("build", [hodge_laplacian, connection_laplacian])
def test_forward_derivatives_agree_with_reverse(build):
    """Of the assembly, inside torch.func, as perturbation theory takes them."""
    mesh = SPHERES[0]
    d = torch.randn(mesh.vertices.shape, generator=torch.Generator().manual_seed(5), dtype=F64)

    def f(x):
        operator = build(mesh.move(x))
        return torch.cat([operator.stiffness.values, operator.mass.values])

    forward: Tensor = torch.func.jvp(f, (mesh.vertices,), (d,))[1]
    weight = torch.randn(forward.shape, generator=torch.Generator().manual_seed(6), dtype=F64)
    x = mesh.vertices.clone().requires_grad_()
    reverse = (torch.autograd.grad((f(x) * weight).sum(), x)[0] * d).sum()
    torch.testing.assert_close((forward * weight).sum(), reverse, rtol=1e-11, atol=0)


def test_bad_input():
    sphere, cube = SPHERES[0], meshes.grid((2, 2, 2))
    obtuse = meshes.Mesh(
        torch.tensor([[0.0, 0.0], [1, 0], [0.5, 0.1], [0.5, -0.1]], dtype=F64),
        torch.tensor([[0, 1, 2], [1, 0, 3]]),
    )
    form, vertices = torch.zeros(5, dtype=F64), SPHERES[0].vertices
    build: Any = hodge_laplacian

    def negative(x):
        return -torch.eye(2, dtype=x.dtype).expand(*x.shape[:-1], 2, 2)

    cases = [
        (TypeError, "mesh is a Tensor", lambda: build(vertices)),
        (ValueError, "star is 'dual'", lambda: hodge_laplacian(sphere, star="dual")),
        (ValueError, "boundary is 'neumann'", lambda: hodge_laplacian(sphere, boundary="neumann")),
        (ValueError, "has no boundary", lambda: hodge_laplacian(sphere, boundary="relative")),
        (ValueError, "expected triangles", lambda: hodge_laplacian(cube, star="circumcentric")),
        (ValueError, "needs a mesh in its chart", lambda: hodge_laplacian(sphere, metric=klein)),
        (GeometryError, "star='whitney'", lambda: hodge_laplacian(obtuse, star="circumcentric")),
        (GeometryError, "not positive", lambda: hodge_laplacian(meshes.disk(1), metric=negative)),
        (ValueError, "expected triangles", lambda: connection_laplacian(cube)),
        (ValueError, "boundary is 'free'", lambda: connection_laplacian(sphere, boundary="free")),
        (ValueError, "has no boundary", lambda: connection_laplacian(sphere, boundary="dirichlet")),
        (ValueError, "degree is 2", lambda: exterior_derivative(sphere, form, 2)),
        (ValueError, "form has shape", lambda: exterior_derivative(sphere, form, 1)),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
