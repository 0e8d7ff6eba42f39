"""Ricci curvature and flow of graphs: closed forms of Ollivier's and Forman's, gradients."""

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from scipy.sparse.csgraph import shortest_path
from torch.autograd import gradcheck

from darboux._checks import GeometryError
from darboux.flows.graph_ricci import forman_curvature, graph_ricci_flow, ollivier_curvature

F64 = torch.float64


def complete(n):
    return torch.tensor(list(itertools.combinations(range(n), 2)))


def ring(n):
    return torch.tensor([[k, (k + 1) % n] for k in range(n)])


def torus_grid(n, m):
    edges = [[i * m + j, i * m + (j + 1) % m] for i in range(n) for j in range(m)]
    edges += [[i * m + j, (i + 1) % n * m + j] for i in range(n) for j in range(m)]
    return torch.tensor(edges)


def ones(edges):
    return torch.ones(len(edges), dtype=F64)


def rand(edges, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 0.5 + torch.rand(len(edges), dtype=F64, generator=generator)


def degrees(edges):
    return torch.bincount(edges.reshape(-1)).to(F64)[edges]


# a tree with vertices of degree 1, 2, 3 and 4
TREE = torch.tensor([[0, 1], [0, 2], [0, 3], [0, 4], [1, 5], [1, 6], [2, 7], [7, 8]])
# two triangles and a square around a bridge
MIXED = torch.tensor(
    [[0, 1], [1, 2], [0, 2], [2, 3], [3, 4], [4, 5], [3, 5], [5, 6], [6, 7], [4, 7]]
)


@pytest.mark.parametrize("alpha", [0.0, 0.25])
@pytest.mark.parametrize("n", [3, 5, 6])
def test_complete_graphs(n, alpha):
    # moving mass between the two ends alone: W = |alpha - (1 - alpha)/(n - 1)|
    edges = complete(n)
    expected = 1 - abs(alpha - (1 - alpha) / (n - 1))
    found = ollivier_curvature(edges, ones(edges), idleness=alpha)
    torch.testing.assert_close(found, torch.full_like(found, expected), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("n", "expected"), [(4, 0.0), (5, 0.0), (6, 0.0), (9, 0.0), (3, 0.5)])
def test_rings_and_grids_are_flat(n, expected):
    edges = ring(n)
    found = ollivier_curvature(edges, ones(edges))
    torch.testing.assert_close(found, torch.full_like(found, expected), atol=1e-12, rtol=0)
    square = torus_grid(6, 7)
    assert float(ollivier_curvature(square, ones(square), idleness=0.2).abs().max()) <= 1e-12


def test_trees():
    # Jost and Liu: -2 (1 - 1/d_x - 1/d_y)_+ ; equality on trees
    found = ollivier_curvature(TREE, ones(TREE))
    inverse = (1 / degrees(TREE)).sum(-1)
    torch.testing.assert_close(found, -2 * (1 - inverse).clamp(min=0), atol=1e-12, rtol=0)


def test_weighted_graphs_agree_with_one_programme_for_each_edge():
    weights = rand(MIXED)
    dense = np.zeros((8, 8))
    for (i, j), w in zip(MIXED.tolist(), weights.tolist(), strict=True):
        dense[i, j] = dense[j, i] = w
    lengths = shortest_path(dense)
    around = (dense > 0).astype(float)
    walk = 0.3 * np.eye(8) + 0.7 * around / around.sum(1, keepdims=True)
    expected = []
    for i, j in MIXED.tolist():
        # the dual: the largest difference of a 1-Lipschitz function
        pairs = list(itertools.permutations(range(8), 2))
        steep = np.zeros((len(pairs), 8))
        for k, (a, b) in enumerate(pairs):
            steep[k, a], steep[k, b] = 1, -1
        solved = linprog(
            walk[j] - walk[i], A_ub=steep, b_ub=[lengths[p] for p in pairs], bounds=(-50, 50)
        )
        expected.append(1 + solved.fun / lengths[i, j])
    found = ollivier_curvature(MIXED, weights, idleness=0.3)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=F64), atol=1e-9, rtol=0)


def test_curvature_does_not_see_scale():
    weights = rand(MIXED)
    for curvature in (ollivier_curvature, forman_curvature):
        torch.testing.assert_close(curvature(MIXED, 3 * weights), curvature(MIXED, weights))


def test_forman_counts_neighbours():
    for edges in (TREE, MIXED, complete(5), ring(7)):
        found = forman_curvature(edges, 2.5 * ones(edges))
        torch.testing.assert_close(found, 4 - degrees(edges).sum(-1), atol=1e-12, rtol=0)
    # by hand: weights 1, 4 of a path
    path = torch.tensor([[0, 1], [1, 2]])
    found = forman_curvature(path, torch.tensor([1.0, 4.0], dtype=F64))
    torch.testing.assert_close(found, torch.tensor([1.5, 0.0], dtype=F64))


@pytest.mark.parametrize("kind", ["ollivier", "forman"])
def test_gradients_also_through_time(kind):
    weights = rand(MIXED).requires_grad_()
    curvature = ollivier_curvature if kind == "ollivier" else forman_curvature
    assert gradcheck(lambda w: curvature(MIXED, w), weights, eps=1e-7, atol=1e-6)

    def end(w):
        return graph_ricci_flow(MIXED, w, dt=0.05, steps=3, kind=kind).weights[-1]

    assert gradcheck(end, weights, eps=1e-7, atol=1e-6)


def test_the_flow_separates_communities_and_keeps_its_sum():
    # two K_5 and a bridge: the bridge is curved negatively and grows
    block = complete(5)
    edges = torch.cat([block, block + 5, torch.tensor([[0, 5]])])
    run = graph_ricci_flow(edges, ones(edges), dt=0.2, steps=15)
    assert run.weights.shape == run.curvature.shape == (16, 21)
    torch.testing.assert_close(run.weights.sum(-1), torch.full((16,), 21.0, dtype=F64))
    assert float(run.curvature[0, -1]) < 0 < float(run.curvature[0, :-1].min())
    assert bool((run.weights[:, -1].diff() > 0).all())
    assert float(run.weights[-1, -1]) > 3 * float(run.weights[-1, :-1].max())


def test_one_curvature_decays_at_its_rate_down_to_the_floor():
    edges = complete(3)
    run = graph_ricci_flow(edges, ones(edges), dt=0.5, steps=60, normalized=False, w_min=1e-4)
    expected = torch.exp(-run.t / 2).clamp(min=1e-4)[:, None].expand(-1, 3)
    torch.testing.assert_close(run.weights, expected)
    weights = torch.tensor([1.0, 2.0, 1.5])
    kept = graph_ricci_flow(edges, weights, dt=0.5, steps=4, kind="forman", save_every=2)
    assert kept.weights.dtype == torch.float32
    assert kept.t.tolist() == [0.0, 1.0, 2.0]


def test_errors_at_the_door():
    edges = ring(4)
    with pytest.raises(TypeError, match=r"edges is torch\.float32, expected an int64 tensor"):
        ollivier_curvature(edges.float(), ones(edges))
    with pytest.raises(ValueError, match=r"weights has shape \(3,\), expected \(4,\)"):
        ollivier_curvature(edges, torch.ones(3))
    with pytest.raises(ValueError, match="not positive"):
        forman_curvature(edges, 0 * ones(edges))
    with pytest.raises(ValueError, match="idleness is 1"):
        ollivier_curvature(edges, ones(edges), idleness=1)
    with pytest.raises(ValueError, match="loops"):
        forman_curvature(torch.tensor([[0, 0]]), torch.ones(1))
    with pytest.raises(ValueError, match="edge twice"):
        forman_curvature(torch.tensor([[0, 1], [1, 0]]), torch.ones(2))
    with pytest.raises(GeometryError, match="not connected"):
        ollivier_curvature(torch.tensor([[0, 1], [2, 3]]), torch.ones(2))
    with pytest.raises(ValueError, match="kind is 'bakry'"):
        graph_ricci_flow(edges, ones(edges), dt=0.1, steps=1, kind="bakry")
    with pytest.raises(ValueError, match="w_min is 0"):
        graph_ricci_flow(edges, ones(edges), dt=0.1, steps=1, w_min=0)
