"""Eigenpairs: all copies found and certified, gauge, derivatives, errors at the door."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from darboux._checks import ConvergenceError, GeometryError
from darboux.manifolds import mesh as meshes
from darboux.manifolds.spectral import shift_invert
from darboux.manifolds.spectral.eigen import eigenpairs
from darboux.manifolds.spectral.factor import factorise, inertia
from darboux.manifolds.spectral.finite_elements import stiffness_mass
from darboux.manifolds.spectral.lanczos import BlockLanczos, lowest
from darboux.manifolds.spectral.operator import Operator, Pattern, Sparse

F64 = torch.float64


def sphere(level, noise=0.0):
    mesh = meshes.icosphere(level)
    random = torch.Generator().manual_seed(0)
    wobble = noise * torch.randn(mesh.vertices.shape, generator=random, dtype=F64)
    return replace(mesh, vertices=mesh.vertices + wobble)


def operator_of(mesh, x=None) -> Any:
    return stiffness_mass(mesh if x is None else replace(mesh, vertices=x))


def circle(n):
    """Linear elements on a circle of length 1."""
    i = torch.arange(n)
    j = (i + 1) % n
    rows, cols, one = torch.cat([i, j, i, j]), torch.cat([i, j, j, i]), torch.ones(n, dtype=F64)
    pattern, where = Pattern.of(rows, cols, n)
    stiffness = torch.cat([one, one, -one, -one]) * n
    mass = torch.cat([2 * one, 2 * one, one, one]) / (6 * n)
    return Operator(pattern.assemble(where, stiffness), pattern.assemble(where, mass))


def lattice(m):
    """The graph of the periodic cubic lattice, and its eigenvalues."""
    index = torch.arange(m**3).reshape(m, m, m)
    rows, cols, entries = [], [], []
    one = torch.ones(m**3, dtype=F64)
    for axis in range(3):
        a, b = index.flatten(), index.roll(-1, axis).flatten()
        rows += [a, b, a, b]
        cols += [b, a, a, b]
        entries += [-one, -one, one, one]
    pattern, where = Pattern.of(torch.cat(rows), torch.cat(cols), m**3)
    operator = Operator(
        pattern.assemble(where, torch.cat(entries)), pattern.assemble(pattern.diagonal, one)
    )
    a = 2 - 2 * torch.cos(2 * math.pi * torch.arange(m, dtype=F64) / m)
    return operator, (a[:, None, None] + a[:, None] + a).flatten().sort()[0]


@pytest.mark.parametrize(
    ("method", "factor"),
    [("lanczos", "superlu"), ("lanczos", "auto"), ("arpack", "superlu"), ("lobpcg", "superlu")],
)
def test_methods_agree_with_dense_in_values_basis_and_clusters(method, factor):
    operator = operator_of(sphere(3))
    expected = eigenpairs(operator, 23, method="dense")
    found = eigenpairs(operator, 23, method=method, factor=factor)
    tolerance = 1e-6 if method == "lobpcg" else 1e-9
    assert (found.values - expected.values).abs().max() < 1e-10
    assert (found.functions - expected.functions).abs().max() < tolerance  # one gauge
    assert found.clusters == expected.clusters
    assert (found.certified, found.cut) == (True, expected.cut)
    assert found.residuals.max() < tolerance
    gram = found.functions.mT @ (operator.mass @ found.functions)
    assert (gram - torch.eye(23, dtype=F64)).abs().max() < 1e-12


def test_multiplicities_beyond_the_block_are_all_found():
    operator, exact = lattice(10)
    found = eigenpairs(operator, 100)
    assert found.certified
    assert (found.values - exact[:100]).abs().max() < 1e-10
    sizes = torch.unique((exact * 1e9).round(), return_counts=True)[1].tolist()
    assert max(sizes[:8]) >= 24
    complete = [part.stop - part.start for part in found.clusters]
    complete[-1] += found.cut
    assert complete == sizes[: len(complete)]


@pytest.mark.parametrize("k", [50, 100, 200])
def test_sphere_has_every_copy(k):
    found = eigenpairs(stiffness_mass(sphere(4), mass="mixed"), k)
    level = [l for l in range(15) for _ in range(2 * l + 1)][:k]
    exact = torch.tensor([l * (l + 1.0) for l in level], dtype=F64)
    error = (found.values - exact) / exact.clamp(min=1)
    assert found.certified
    # levels are 2/(l + 1) apart: below half of that none can be mistaken for another
    assert (error.abs() < 0.5 / (torch.tensor(level) + 1)).all()


def test_torus_pairs_and_certificate():
    found = eigenpairs(operator_of(meshes.torus_mesh(2.0, 0.8, 40, 20)), 60)
    assert found.certified
    sizes = [part.stop - part.start for part in found.clusters]
    # cos(mu), sin(mu) for every m > 0
    assert set(sizes[:-1]) <= {1, 2}
    assert sizes.count(2) > 3 * sizes.count(1)


def test_circle_needs_a_nearer_shift():
    n = 4000
    found = eigenpairs(circle(n), 9)
    wave = torch.tensor([0, 1, 1, 2, 2, 3, 3, 4, 4], dtype=F64) * 2 * math.pi / n
    exact = 6 * n**2 * (1 - torch.cos(wave)) / (2 + torch.cos(wave))
    assert (found.values - exact).abs().max() < 1e-6 * exact.max()
    assert found.certified
    assert [part.stop - part.start for part in found.clusters] == [1, 2, 2, 2, 2]


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_scaling_law(scale):
    mesh = sphere(3, noise=0.01)
    near, far = (eigenpairs(operator_of(mesh, mesh.vertices * s), 12) for s in (1.0, scale))
    assert (far.values * scale**2 - near.values).abs().max() < 1e-10
    assert far.certified
    assert far.clusters == near.clusters


def test_a_negative_potential_moves_the_spectrum():
    operator = operator_of(sphere(3))
    pattern = operator.stiffness.pattern
    shifted = Sparse(pattern, operator.stiffness.values - 50 * operator.mass.values)
    moved = eigenpairs(Operator(shifted, operator.mass), 20)
    assert moved.certified
    assert (moved.values + 50 - eigenpairs(operator, 20).values).abs().max() < 1e-10


def test_equal_components_share_every_eigenvalue():
    one, count = meshes.icosphere(2), 12
    n = len(one.vertices)
    x = torch.cat([one.vertices + 3 * i for i in range(count)])
    cells = torch.cat([one.cells + n * i for i in range(count)])
    found = eigenpairs(stiffness_mass(meshes.Mesh(x, cells)), 30)
    assert (found.components, found.certified) == (count, True)
    assert [part.stop - part.start for part in found.clusters] == [count, 30 - count]
    assert found.cut == 4 * count - 30


def test_inertia_counts_or_refuses():
    operator = operator_of(sphere(3))
    stiffness, mass = operator.stiffness.scipy(), operator.mass.scipy()
    values = eigenpairs(operator, 100, method="dense").values
    for shift in (1.0, 4.0, 9.0, 17.0, 55.0):
        assert inertia(stiffness, mass, shift, 0.1) == int((values < shift).sum())
    assert inertia(stiffness, mass, 4.0, 1e-13) is None


@pytest.mark.parametrize("lost", [0, 5, 15])
def test_a_lost_copy_is_not_certified(monkeypatch, lost):
    honest = shift_invert.arpack

    def careless(pencil, k):
        solve = honest(pencil, k)

        def less(guard, missing):
            values, functions = solve(guard + 1, 0)
            return np.delete(values, lost), np.delete(functions, lost, 1)

        return less

    monkeypatch.setattr(shift_invert, "arpack", careless)
    operator = operator_of(sphere(3))
    with pytest.raises(ConvergenceError, match=r"inertia .* counts \d+ eigenvalues"):
        eigenpairs(operator, 16, method="arpack")
    assert not eigenpairs(operator, 16, method="arpack", certify=False).certified


def test_thick_restart_converges_to_the_same():
    operator = operator_of(sphere(3))
    stiffness, mass = operator.stiffness.scipy(), operator.mass.scipy()
    factor = factorise(stiffness, mass, -1.0, "superlu")
    random = np.random.default_rng(1)
    lanczos = BlockLanczos(factor.solve, mass, random.standard_normal((642, 6)), random)
    theta, y, relative, _ = lowest(lanczos, 20, 6, 1e-12, limit=60, steps=200)
    assert lanczos.size <= 60
    expected = eigenpairs(operator, 20, method="dense").values.numpy()
    assert np.abs(-1 + 1 / theta[:20] - expected).max() < 1e-10
    assert relative[:20].max() <= 1e-12
    x = lanczos.vectors(y[:, :20])
    assert np.abs(x.T @ (mass @ x) - np.eye(20)).max() < 1e-12


def test_float32_is_solved_in_float64():
    operator = operator_of(sphere(3))
    single = operator.map(lambda m: Sparse(m.pattern, m.values.float()))
    found = eigenpairs(single, 16)
    assert found.values.dtype == found.functions.dtype == torch.float32
    assert found.certified
    assert (found.values - eigenpairs(operator, 16).values).abs().max() < 2e-5


def test_dense_batches_equal_single_solutions():
    random = torch.Generator().manual_seed(3)
    a, b = torch.randn(2, 2, 3, 9, 9, generator=random, dtype=F64)
    stiffness, mass = a @ a.mT, b @ b.mT + torch.eye(9, dtype=F64)
    stiffness[0, 0], mass[0, 0] = torch.diag(torch.arange(9.0) // 3), torch.eye(9)
    found = eigenpairs(Operator(stiffness, mass), 5)
    assert found.values.shape == (2, 3, 5)
    assert found.functions.shape == (2, 3, 9, 5)
    assert found.clusters[0] == (slice(0, 3), slice(3, 5))
    for i in range(2):
        for j in range(3):
            one = eigenpairs(Operator(stiffness[i, j], mass[i, j]), 5)
            assert (one.values - found.values[i, j]).abs().max() < 1e-12
            assert (one.functions - found.functions[i, j]).abs().max() < 1e-10
            assert one.clusters == found.clusters[3 * i + j]


# Derivatives


def slope(f, x, direction, h=2e-5):
    """Fourth-order central difference of ``f`` along ``direction``."""
    with torch.no_grad():
        near, far = (f(x + s * direction) - f(x - s * direction) for s in (h, 2 * h))
        return ((8 * near - far) / (12 * h)).item()


def along(f, x, direction):
    leaf = x.clone().requires_grad_()
    return (torch.autograd.grad(f(leaf), leaf)[0] * direction).sum().item()


W = torch.randn(162, generator=torch.Generator().manual_seed(5), dtype=F64)
D = torch.randn(162, 3, generator=torch.Generator().manual_seed(6), dtype=F64)


@pytest.mark.parametrize("method", ["dense", "lanczos"])
@pytest.mark.parametrize(
    ("noise", "loss"),
    [
        (0.0, lambda s: s.values[:9].square().sum()),
        (0.0, lambda s: (s.functions[:, 1:4] @ s.functions[:, 1:4].mT)[:9, 3].sum()),
        (0.0, lambda s: (s.functions[:, 0] * W).sum()),
        (0.02, lambda s: s.functions[:, :8].pow(3).sum(1) @ W + s.values[5] ** 2),
    ],
    ids=["sums", "projector", "ground", "functions"],
)
def test_gradient_against_differences(method, noise, loss):
    mesh = sphere(2, noise)

    def f(x):
        return loss(eigenpairs(operator_of(mesh, x), 16, method=method))

    exact, measured = along(f, mesh.vertices, D), slope(f, mesh.vertices, D)
    print(f"{method}: {abs(exact / measured - 1):.1e}")
    assert exact == pytest.approx(measured, rel=1e-6)


def test_gradcheck_of_values_at_exact_clusters():
    mesh = meshes.icosphere(0)

    def f(x):
        values = eigenpairs(operator_of(mesh, x), 9, method="dense").values
        return torch.stack(
            [values[1:4].sum(), values[1:4].square().sum(), (-0.1 * values[4:9]).exp().sum()]
        )

    x = mesh.vertices.clone().requires_grad_()
    assert torch.autograd.gradcheck(f, x, eps=1e-5, atol=1e-6, rtol=1e-6)


def test_a_cut_cluster_gives_the_mean():
    mesh = sphere(2)

    def gradient(k, choose):
        x = mesh.vertices.clone().requires_grad_()
        spectrum = eigenpairs(operator_of(mesh, x), k, method="lanczos")
        return torch.autograd.grad(choose(spectrum.values), x)[0]

    part = gradient(2, lambda values: values[1])
    whole = gradient(9, lambda values: values[1:4].mean())
    assert (part - whole).abs().max() < 1e-9


@pytest.mark.parametrize(
    ("k", "loss"),
    [
        (9, lambda s: (s.functions[:, 1].square() * W).sum()),
        (3, lambda s: (s.functions.square().sum(1) * W).sum()),
        # equal cotangents of the functions, unequal ones of the values: f' would be lost
        (9, lambda s: ((-s.values).exp() * s.functions.square()).sum(1) @ W),
    ],
    ids=["one function", "cut cluster", "heat kernel"],
)
@pytest.mark.parametrize("method", ["dense", "lanczos"])
def test_a_loss_that_depends_on_the_basis_raises(method, k, loss):
    mesh = sphere(2)
    x = mesh.vertices.clone().requires_grad_()
    with pytest.raises(GeometryError, match=r"functions\[:, 1:4\], whose 3 eigenvalues are equal"):
        loss(eigenpairs(operator_of(mesh, x), k, method=method)).backward()


@pytest.mark.parametrize("method", ["dense", "lanczos"])
def test_hessian_of_eigenvalues(method):
    mesh = sphere(2, 0.02)

    def gradient(x):
        leaf = x.detach().requires_grad_()
        total = eigenpairs(operator_of(mesh, leaf), 6, method=method).values.square().sum()
        return torch.autograd.grad(total, leaf, create_graph=True)[0], leaf

    g, x = gradient(mesh.vertices)
    product = torch.autograd.grad((g * D).sum(), x)[0]
    h = 1e-5
    differences = gradient(x + h * D)[0] - gradient(x - h * D)[0]
    assert (product - differences / (2 * h)).abs().max() < 1e-6 * product.abs().max()


def test_functions_are_differentiable_once():
    mesh = sphere(2, 0.02)
    x = mesh.vertices.clone().requires_grad_()
    loss = (eigenpairs(operator_of(mesh, x), 6).functions[:, 2] * W).sum()
    g = torch.autograd.grad(loss, x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="second derivatives of eigenfunctions"):
        g.sum().backward()


# The door


def _changed(operator, name, change) -> Any:
    matrix = getattr(operator, name)
    return replace(operator, **{name: Sparse(matrix.pattern, change(matrix.values.clone()))})


def _set(index, value):
    def change(values):
        values[index] = value
        return values

    return change


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda a: eigenpairs(a, 0), ValueError, "k=0, expected 1 ≤ k ≤ 161"),
        (lambda a: eigenpairs(a, 162), ValueError, "k=162, expected"),
        (lambda a: eigenpairs(a, a.size / 81), ValueError, "k=2.0, expected"),
        (lambda a: eigenpairs(a, 3, guard=0), ValueError, "guard=0"),
        (lambda a: eigenpairs(a, 3, method="qr"), ValueError, "method='qr', expected one of"),
        (lambda a: eigenpairs(a.stiffness, 3), TypeError, "got a Sparse, expected an Operator"),
        (
            lambda a: eigenpairs(_changed(a, "stiffness", _set(3, math.nan)), 3),
            ValueError,
            "stiffness of shape .* has 1 entries that are NaN",
        ),
        (
            lambda a: eigenpairs(_changed(a, "stiffness", _set(1, 3.0)), 3),
            ValueError,
            "stiffness must be symmetric",
        ),
        (
            lambda a: eigenpairs(_changed(a, "mass", lambda v: -v), 3),
            ValueError,
            "162 entries on its diagonal that are not positive",
        ),
        (
            lambda a: eigenpairs(_changed(a, "mass", torch.ones_like), 3),
            GeometryError,
            "mass matrix is not positive definite",
        ),
        (
            lambda a: eigenpairs(_changed(a, "mass", torch.ones_like), 3, method="lanczos"),
            GeometryError,
            "mass matrix is not positive definite",
        ),
        (
            lambda a: torch.func.vmap(lambda c: eigenpairs(a, 3).values * c)(torch.ones(2)),
            TypeError,
            "torch.func",
        ),
    ],
)
def test_the_door(call, error, match):
    with pytest.raises(error, match=match):
        call(operator_of(sphere(2)))
