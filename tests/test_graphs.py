"""Graphs with known spectra, and point clouds."""

import importlib.util
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from darboux.manifolds.spectral.eigen import eigenpairs
from darboux.manifolds.spectral.graphs import graph_laplacian, point_cloud_laplacian

ROBUST = importlib.util.find_spec("robust_laplacian") is not None


def cycle(n: int) -> Tensor:
    nodes = torch.arange(n)
    return torch.stack([nodes, (nodes + 1) % n], -1)


def complete(n: int) -> Tensor:
    return torch.combinations(torch.arange(n))


def close(a: Tensor, b: Tensor) -> None:
    assert (a - b).abs().max() < 1e-11


@pytest.mark.parametrize("n", [9, 400])
def test_cycle(n):
    # dense and Lanczos
    angles = torch.arange(n, dtype=torch.float64) * 2 * math.pi / n
    expected = (2 - 2 * angles.cos()).sort().values
    spectrum = eigenpairs(graph_laplacian(cycle(n)), 7)
    close(spectrum.values, expected[:7])
    normalised = eigenpairs(graph_laplacian(cycle(n), normalised=True), 7)
    close(normalised.values, expected[:7] / 2)


def test_path_and_complete_graph():
    path = graph_laplacian(cycle(8)[:-1], n=8)
    steps = torch.arange(8, dtype=torch.float64) * math.pi / 8
    close(eigenpairs(path, 7).values, (2 - 2 * steps.cos())[:7])
    values = eigenpairs(graph_laplacian(complete(6)), 5).values
    close(values, torch.tensor([0.0, 6, 6, 6, 6], dtype=torch.float64))
    values = eigenpairs(graph_laplacian(complete(6), normalised=True), 5).values
    close(values, torch.tensor([0.0, 1.2, 1.2, 1.2, 1.2], dtype=torch.float64))


def test_bipartite_graph_has_normalised_eigenvalue_two():
    edges = torch.cartesian_prod(torch.arange(2), torch.arange(2, 5))
    full: Any = graph_laplacian(edges, normalised=True)
    values = torch.linalg.eigvalsh(
        full.stiffness.dense() / full.mass.diagonal().sqrt().outer(full.mass.diagonal().sqrt())
    )
    close(values[[0, -1]], torch.tensor([0.0, 2.0], dtype=torch.float64))


def test_energy_weights_masses_and_repeated_edges():
    edges = torch.tensor([[0, 1], [1, 2], [2, 1], [0, 3]])
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    mass = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
    op: Any = graph_laplacian(edges, weights, 5, mass=mass)
    u = torch.tensor([0.3, -1.0, 2.0, 0.7, 5.0], dtype=torch.float64)
    energy = (weights * (u[edges[:, 0]] - u[edges[:, 1]]).square()).sum()
    close(u @ (op.stiffness @ u), energy)
    close(op.mass.dense(), torch.diag(mass))
    # two components: two zero modes
    assert eigenpairs(op, 4).components == 2


def test_gradient_in_the_weights():
    weights = torch.linspace(1.0, 2.0, 9, dtype=torch.float64, requires_grad=True)
    for normalised in (False, True):

        def values(w: Tensor) -> Tensor:
            return eigenpairs(graph_laplacian(cycle(9), w, normalised=normalised), 5).values

        assert torch.autograd.gradcheck(values, weights)


def test_errors():
    edges = cycle(4)
    with pytest.raises(TypeError, match="integers"):
        graph_laplacian(edges.double())
    with pytest.raises(ValueError, match="expected \\(m, 2\\)"):
        graph_laplacian(edges.T)
    with pytest.raises(ValueError, match="edge 2 is \\[2, 3\\], expected nodes 0 to 2"):
        graph_laplacian(edges, n=3)
    with pytest.raises(ValueError, match="joins node 1 to itself"):
        graph_laplacian(torch.tensor([[0, 1], [1, 1]]))
    with pytest.raises(ValueError, match="not positive"):
        graph_laplacian(edges, -torch.ones(4))
    with pytest.raises(ValueError, match="node 4 has no edge"):
        graph_laplacian(edges, n=5, normalised=True)
    with pytest.raises(ValueError, match="expected one of them"):
        graph_laplacian(edges, normalised=True, mass=torch.ones(4))
    with pytest.raises(ValueError, match="no edges"):
        graph_laplacian(edges[:0])
    with pytest.raises(ValueError, match="n at least 8"):
        point_cloud_laplacian(torch.zeros(3, 3))


@pytest.mark.skipif(ROBUST, reason="robust_laplacian is installed")
def test_missing_package_is_named():
    with pytest.raises(ModuleNotFoundError, match="darboux\\[robust\\]"):
        point_cloud_laplacian(torch.randn(10, 3))


@pytest.mark.skipif(not ROBUST, reason="needs robust_laplacian")
def test_sphere_from_points():
    # a Fibonacci lattice
    i = torch.arange(2000, dtype=torch.float64) + 0.5
    z, phi = 1 - 2 * i / 2000, math.pi * (1 + 5**0.5) * i
    radius = (1 - z * z).sqrt()
    op = point_cloud_laplacian(torch.stack([radius * phi.cos(), radius * phi.sin(), z], -1))
    values = eigenpairs(op, 9).values
    assert abs(float(values[0])) < 1e-10
    expected = torch.tensor([2.0] * 3 + [6.0] * 5, dtype=torch.float64)
    assert ((values[1:] - expected) / expected).abs().max() < 0.02
    assert (op.mass.diagonal().sum() - 4 * math.pi).abs() < 0.05
