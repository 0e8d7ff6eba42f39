"""Functions of the operator: closed forms, and derivatives exact at multiple eigenvalues."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from darboux._checks import GeometryError
from darboux.manifolds import mesh as meshes
from darboux.manifolds.spectral.eigen import eigenpairs
from darboux.manifolds.spectral.finite_elements import stiffness_mass
from darboux.manifolds.spectral.functions import apply, diagonal, kernel, projector, trace
from darboux.manifolds.spectral.operator import Operator, Sparse

F64 = torch.float64
N = 162
MESH = meshes.icosphere(2)
RANDOM = torch.Generator().manual_seed(0)
W, U = (torch.randn(N, *m, generator=RANDOM, dtype=F64) for m in ((), (2,)))
D = torch.randn(N, 3, generator=RANDOM, dtype=F64)


def operator_of(x, mesh=MESH) -> Any:
    return stiffness_mass(replace(mesh, vertices=x))


def heat(t):
    return lambda values: torch.exp(-t * values)


def slope(f, x, direction, h=2e-5):
    with torch.no_grad():
        near, far = (f(x + s * direction) - f(x - s * direction) for s in (h, 2 * h))
        return ((8 * near - far) / (12 * h)).item()


def along(f, x, direction):
    leaf = x.clone().requires_grad_()
    return (torch.autograd.grad(f(leaf), leaf)[0] * direction).sum().item()


TIMES = torch.tensor([0.1, 0.3, 1.0], dtype=F64)[:, None]
LOSSES = {
    "trace": lambda s: trace(s, heat(0.3)),
    "diagonal": lambda s: diagonal(s, heat(0.3)) @ W,
    "several times": lambda s: diagonal(s, heat(TIMES)).square().sum(),
    "apply": lambda s: apply(s, lambda v: 1 / (1 + v), U).pow(3).sum(),
    "apply several": lambda s: apply(s, heat(TIMES), U[:, 0]).pow(3).sum(),
    "kernel": lambda s: kernel(s, lambda v: v.cos(), U[:, 0]).pow(3).sum(),
    "projector": lambda s: projector(s, slice(1, 4), U).pow(3).sum(),
}


@pytest.mark.parametrize("method", ["dense", "lanczos"])
@pytest.mark.parametrize("name", LOSSES)
def test_gradient_at_exact_clusters(name, method):
    # Truncated at a whole cluster: 21 = 1 + 3 + 5 + (3 + 4) + 5.
    def f(x):
        return LOSSES[name](eigenpairs(operator_of(x), 21, method=method))

    exact, measured = along(f, MESH.vertices, D), slope(f, MESH.vertices, D)
    print(f"{name} {method}: {abs(exact / measured - 1):.1e}")
    assert exact == pytest.approx(measured, rel=1e-7)


def test_signature_where_masked_eigenvectors_are_wrong():
    """The usual remedy, dropping pairs of equal eigenvalues in the derivative, fails; this not."""
    operator = operator_of(MESH.vertices)
    size, moved = N, operator_of(MESH.vertices + 1e-3 * D)

    def loss(stiffness, mass):
        return diagonal(Operator(stiffness, mass), heat(0.3)) @ W

    stiffness, mass = operator.stiffness.dense(), operator.mass.dense()
    directions = [moved.stiffness.dense() - stiffness, moved.mass.dense() - mass]
    leaves = [stiffness.clone().requires_grad_(), mass.clone().requires_grad_()]
    gradients = torch.autograd.grad(loss(*leaves), leaves)
    exact = sum((g * d).sum().item() for g, d in zip(gradients, directions, strict=True))

    def f(e):
        return loss(stiffness + e * directions[0], mass + e * directions[1])

    one, zero = torch.ones((), dtype=F64), torch.zeros((), dtype=F64)
    measured = slope(f, zero, one, h=1e-1)
    print(f"signature: {abs(exact / measured - 1):.1e}")
    assert exact == pytest.approx(measured, rel=1e-8)

    # dK, dM in the eigenbasis; pairs of equal values masked
    spectrum = eigenpairs(operator, size - 1, method="dense")
    phi, values = spectrum._modes.functions, spectrum._modes.values
    a, b = (phi.mT @ d @ phi for d in directions)
    gap = values[None, :] - values[:, None]
    equal = gap.abs() < 1e-8
    turn = (a - values * b) / torch.where(equal, 1, gap)
    turn = torch.where(equal, 0, turn) - 0.5 * torch.diag(b.diagonal())
    d_phi, d_values = phi @ turn, (a - values * b).diagonal()
    e = heat(0.3)(values)
    masked = ((2 * phi * d_phi * e) - 0.3 * phi.square() * e * d_values).sum(1) @ W
    assert abs(masked.item() / measured - 1) > 1e-2


def symmetric(n, *batch):
    a = torch.randn(*batch, n, n, generator=RANDOM, dtype=F64)
    return a + a.mT


def degenerate(*values):
    """A pencil with the eigenvalues given, in a random basis."""
    n = len(values)
    basis = torch.linalg.qr(symmetric(n))[0] @ torch.diag(torch.linspace(0.7, 1.4, n, dtype=F64))
    inverse = torch.linalg.inv(basis)
    return inverse.mT @ torch.diag(torch.tensor(values, dtype=F64)) @ inverse, inverse.mT @ inverse


def test_complete_spectrum_is_the_matrix_exponential():
    stiffness, mass = (x.requires_grad_() for x in degenerate(0, 1, 1, 1, 2, 2, 3))
    u, weight = torch.randn(2, 7, generator=RANDOM, dtype=F64)
    t = torch.tensor(0.7, dtype=F64, requires_grad=True)
    found = apply(Operator(stiffness, mass), lambda v: torch.exp(-t * v), u)
    expected = torch.matrix_exp(-t * torch.linalg.inv(mass) @ stiffness) @ u
    assert (found - expected).abs().max() < 1e-13
    ours = torch.autograd.grad(found @ weight, (stiffness, mass, t))
    theirs = torch.autograd.grad(expected @ weight, (stiffness, mass, t))
    for a, b in zip(ours, theirs, strict=True):
        if b.dim():  # only the symmetric part of the gradient means anything
            a, b = 0.5 * (a + a.mT), 0.5 * (b + b.mT)
        assert (a - b).abs().max() < 1e-11 * b.abs().max().clamp(min=1)


@pytest.mark.parametrize("gap", [0.0, 1e-9, 1e-7, 1e-5, 1e-4, 1e-3])
def test_near_crossings_lose_no_digits(gap):
    # Divided differences against the matrix exponential on both sides of every threshold.
    basis = torch.linalg.qr(symmetric(4))[0]
    values = torch.tensor([1.0, 1.0 + gap, 2.0, 5.0], dtype=F64)
    stiffness = ((basis * values) @ basis.mT).requires_grad_()
    stiffness_too = stiffness.detach().clone().requires_grad_()
    u, weight = torch.randn(2, 4, generator=RANDOM, dtype=F64)
    eye = torch.eye(4, dtype=F64)
    ours = torch.autograd.grad(
        apply(Operator(0.5 * (stiffness + stiffness.mT), eye), heat(3.0), u) @ weight, stiffness
    )[0]
    full = torch.matrix_exp(-3 * 0.5 * (stiffness_too + stiffness_too.mT))
    theirs = torch.autograd.grad(full @ u @ weight, stiffness_too)[0]
    print(f"gap {gap}: {((ours - theirs).abs().max() / theirs.abs().max()).item():.1e}")
    assert (ours - theirs).abs().max() < 1e-10 * theirs.abs().max()


def test_gradcheck_on_degenerate_pencils_in_a_batch():
    stiffness, mass = (torch.stack([x, x]) for x in degenerate(0, 1, 1, 3))
    stiffness[1] += 0.1 * symmetric(4)
    w = torch.randn(4, generator=RANDOM, dtype=F64)
    t = torch.tensor([[[0.2]], [[0.9]]], dtype=F64)

    def f(k, m, load, t):
        operator = Operator(0.5 * (k + k.mT), 0.5 * (m + m.mT))
        both = lambda v: torch.exp(-t * v)  # noqa: E731
        at = diagonal(operator, both) @ w
        return at, trace(operator, both), apply(operator, both, load).square().sum((-1, -2))

    load = torch.randn(2, 4, 2, generator=RANDOM, dtype=F64)
    leaves = [x.clone().requires_grad_() for x in (stiffness, mass, load, t)]
    assert torch.autograd.gradcheck(f, leaves, eps=1e-6, atol=1e-7, rtol=1e-6)


def test_heat_on_the_sphere():
    operator = stiffness_mass(meshes.icosphere(3), mass="mixed")
    spectrum = eigenpairs(operator, 100)
    # Z(t) = 1/t + 1/3 + t/15 + 4 t²/315 + ..., and the kernel is constant on the diagonal
    t = 0.3
    exact = sum((2 * l + 1) * math.exp(-t * l * (l + 1)) for l in range(20))
    total, at = trace(spectrum, heat(t)), diagonal(spectrum, heat(t))
    assert total.item() == pytest.approx(exact, rel=5e-3)
    assert (at * 4 * math.pi / exact - 1).abs().max() < 2e-2
    one = torch.ones(operator.size, dtype=F64)
    assert (apply(spectrum, heat(t), one) - 1).abs().max() < 1e-10
    # a level of linear functions decays with its eigenvalue
    z = meshes.icosphere(3).vertices[:, 2]
    assert (apply(spectrum, heat(t), z) - math.exp(-2 * t) * z).abs().max() < 2e-3
    # semigroup, and M-symmetry of the kernel against its trace
    twice = apply(spectrum, heat(0.1), apply(spectrum, heat(0.2), z))
    assert (twice - apply(spectrum, heat(t), z)).abs().max() < 1e-12


def test_projector_projects_and_commutes():
    operator = operator_of(MESH.vertices)
    spectrum = eigenpairs(operator, 9)
    p = projector(spectrum, slice(1, 4))
    assert (p @ p - p).abs().max() < 1e-12
    assert p.trace().item() == pytest.approx(3, abs=1e-12)
    mp, kp = operator.mass @ p, operator.stiffness @ p
    assert (mp - mp.mT).abs().max() < 1e-13
    assert (kp - kp.mT).abs().max() < 1e-12
    assert (projector(spectrum, slice(1, 4), U) - p @ U).abs().max() < 1e-12


def test_a_cut_cluster_is_completed():
    operator = operator_of(MESH.vertices)
    whole, part = eigenpairs(operator, 9), eigenpairs(operator, 6, method="lanczos")
    assert part.cut == 3
    assert (diagonal(part, heat(0.1)) - diagonal(whole, heat(0.1))).abs().max() < 1e-12
    assert trace(part, heat(0.1)).item() == pytest.approx(trace(whole, heat(0.1)).item(), abs=1e-12)


def test_truncated_derivative_through_solves_equals_the_full_sum():
    x = (MESH.vertices + 0.02 * D).requires_grad_()
    found = [
        torch.autograd.grad(LOSSES[name](eigenpairs(operator_of(x), 12, method=method)), x)[0]
        for name in ("several times", "apply several")
        for method in ("dense", "lanczos")
    ]
    for dense, lanczos in (found[:2], found[2:]):
        assert (dense - lanczos).abs().max() < 1e-8 * dense.abs().max()


def test_second_derivatives():
    # of trace in the stiffness: f'' and divided differences of f', here by differences
    operator = operator_of(MESH.vertices + 0.02 * D)
    pattern = operator.stiffness.pattern
    weight = operator.mass.values.detach()

    def gradient(values):
        leaf = values.detach().requires_grad_()
        moved = Operator(Sparse(pattern, leaf), operator.mass)
        return torch.autograd.grad(trace(moved, heat(0.3)), leaf, create_graph=True)[0], leaf

    g, leaf = gradient(operator.stiffness.values)
    second = torch.autograd.grad(g @ weight, leaf)[0]
    h = 1e-4
    ends = [gradient(operator.stiffness.values + s * h * weight)[0] for s in (1, -1)]
    assert (second - (ends[0] - ends[1]) / (2 * h)).abs().max() < 1e-6 * second.abs().max()
    leaf = operator.stiffness.values.detach().requires_grad_()
    at = diagonal(Operator(Sparse(pattern, leaf), operator.mass), heat(0.3)) @ W
    once = torch.autograd.grad(at, leaf, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="second derivatives .* of spectral functions"):
        once.sum().backward()


def test_float32():
    operator = operator_of(MESH.vertices)
    single: Any = operator.map(lambda m: Sparse(m.pattern, m.values.float().requires_grad_()))
    for method in ("dense", "lanczos"):
        spectrum = eigenpairs(single, 9, method=method)
        at = diagonal(spectrum, heat(0.1))
        expected = diagonal(eigenpairs(operator, 9), heat(0.1))
        assert at.dtype == torch.float32
        assert (at - expected).abs().max() < 1e-4
        gradient = torch.autograd.grad(at @ W.float(), single.stiffness.values)[0]
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda s: diagonal(s, lambda v: v.sum()), ValueError, r"f gave \(\) for values"),
        (lambda s: trace(s, lambda v: v[:2]), ValueError, r"f gave \(2,\) for values"),
        (lambda s: diagonal(s, lambda v: 1 / (v * 0)), ValueError, "not finite at the eigenvalue"),
        (lambda s: apply(s, heat(1), W[:5]), ValueError, r"u has shape \(5,\)"),
        (lambda s: apply(s, heat(1), W.float()), TypeError, "float32, expected torch.float64"),
        (lambda s: projector(s, slice(1, 3)), GeometryError, "cuts a cluster"),
        (lambda s: projector(s, slice(4, 6)), GeometryError, "cuts a cluster"),
        (lambda s: projector(s, slice(3, 3)), ValueError, "holds none"),
        (lambda s: trace(s.cut, heat(1)), TypeError, "got a int, expected a Spectrum"),
    ],
)
def test_the_door(call, error, match):
    with pytest.raises(error, match=match):
        call(eigenpairs(operator_of(MESH.vertices), 6))
