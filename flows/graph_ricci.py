r"""Ricci curvature of weighted graphs and the flow of the weights by it.

Ollivier's curvature compares transport with distance; Forman's counts neighbours:

.. math:: \kappa_{xy} = 1 - \frac{W_1(m_x, m_y)}{d(x, y)}, \qquad
          F_e = w_e\Big(\frac2{w_e} - \sum_{e' \sim e} \frac1{\sqrt{w_e w_{e'}}}\Big)

with the lazy walk :math:`m_x = \alpha\,\delta_x + (1 - \alpha)\,\text{uniform on neighbours}`. The
weights are lengths; the flow :math:`\dot w = -\kappa w` moves their logarithms, so that they stay
positive. Ollivier (2009), J. Funct. Anal. 256; Forman (2003), Discrete Comput. Geom. 29;
Ni, Lin, Luo and Gao (2019), Sci. Rep. 9.
"""

from typing import NamedTuple

import numpy as np
import scipy.sparse
import torch
from scipy.optimize import linprog
from scipy.sparse.csgraph import shortest_path
from torch import Tensor

from darboux import _checks
from darboux._checks import ConvergenceError, GeometryError, values
from darboux.flows import _metric_march

_KINDS = ("ollivier", "forman")


class GraphRicciRun(NamedTuple):
    """A flow of the weights of a graph, saved states time first."""

    t: Tensor  # (time,)
    weights: Tensor  # (time, e)
    curvature: Tensor  # (time, e)


def ollivier_curvature(edges: Tensor, weights: Tensor, *, idleness: float = 0.0) -> Tensor:
    r"""Return Ollivier's curvature ``(e,)`` of the edges ``(e, 2)`` of lengths ``weights (e,)``.

    Distances are those of shortest paths. One linear programme finds the optimal plans of all
    edges; the derivative in the weights is that of :math:`\langle\pi, d\rangle` with plans and
    paths held (envelope theorem), so it is once differentiable, and where plans or paths tie it is
    one of the subgradients. ``idleness`` is :math:`\alpha`, in [0, 1).

    >>> triangle = torch.tensor([[0, 1], [1, 2], [0, 2]])
    >>> ollivier_curvature(triangle, torch.ones(3, dtype=torch.float64))
    tensor([0.5000, 0.5000, 0.5000], dtype=torch.float64)
    """
    where = "ollivier_curvature"
    _check_graph(where, edges, weights)
    if not 0 <= idleness < 1:
        raise ValueError(f"{where}: idleness is {idleness}, expected a number in [0, 1)")
    ends = edges.detach().cpu().numpy()
    plain = values(weights).double().cpu().numpy()
    n = int(ends.max()) + 1
    lengths, previous = _paths(where, ends, plain, n)
    around: list[list[int]] = [[] for _ in range(n)]
    for i, j in ends:
        around[i].append(int(j))
        around[j].append(int(i))

    def walk(x: int) -> tuple[list[int], np.ndarray]:
        share = (1 - idleness) / len(around[x])
        spots = [x, *around[x]] if idleness else around[x]
        return spots, np.array(([idleness] if idleness else []) + [share] * len(around[x]))

    walks = [walk(x) for x in range(n)]
    sources, targets, owner, masses, rows = [], [], [], [], []
    row = 0
    for e, (x, y) in enumerate(ends):
        (here, p), (there, q) = walks[x], walks[y]
        a, b = len(here), len(there)
        i, j = np.repeat(np.arange(a), b), np.tile(np.arange(b), a)
        sources.append(np.array(here)[i])
        targets.append(np.array(there)[j])
        owner.append(np.full(a * b, e))
        rows.append(np.stack([row + i, row + a + j]))
        masses += [p, q]
        row += a + b
    start, stop, edge = (np.concatenate(part) for part in (sources, targets, owner))
    place = np.concatenate(rows, 1)
    columns = np.tile(np.arange(len(start)), 2)
    marginals = scipy.sparse.csr_array(
        (np.ones(place.size), (place.reshape(-1), columns)), shape=(row, len(start))
    )
    solved = linprog(
        lengths[start, stop], A_eq=marginals, b_eq=np.concatenate(masses), method="highs-ds"
    )
    if solved.x is None:
        raise ConvergenceError(f"{where}: the transport problem was not solved: {solved.message}")
    # W_1 of each edge is linear in the weights of the paths that its plan takes
    used = np.flatnonzero(solved.x > 1e-14)
    number = {
        pair: e for e, (x, y) in enumerate(ends) for pair in ((int(x), int(y)), (int(y), int(x)))
    }
    out, into, mass = [], [], []

    def lay(pair_owner: int, x: int, y: int, amount: float) -> None:
        while y != x:
            before = int(previous[x, y])
            out.append(pair_owner)
            into.append(number[before, y])
            mass.append(amount)
            y = before

    for k in used:
        lay(int(edge[k]), int(start[k]), int(stop[k]), float(solved.x[k]))
    cost = _linear(out, into, mass, weights)
    out, into, mass = [], [], []
    for e, (x, y) in enumerate(ends):
        lay(e, int(x), int(y), 1.0)
    return 1 - cost / _linear(out, into, mass, weights)


def forman_curvature(edges: Tensor, weights: Tensor) -> Tensor:
    """Return Forman's curvature ``(e,)`` of a graph without faces, vertices of weight one.

    With equal weights it is 4 less the degrees of the ends. Differentiable to any order.

    >>> path = torch.tensor([[0, 1], [1, 2], [2, 3]])
    >>> forman_curvature(path, torch.ones(3))
    tensor([1., 0., 1.])
    """
    _check_graph("forman_curvature", edges, weights)
    root = weights.sqrt()
    ends = edges.to(weights.device)
    n = int(values(ends).max()) + 1
    star = weights.new_zeros(n).index_add(0, ends.reshape(-1), (1 / root).repeat_interleave(2))
    others = star[ends].sum(-1) - 2 / root
    return 2 - root * others


def graph_ricci_flow(
    edges: Tensor,
    weights: Tensor,
    *,
    dt: float,
    steps: int,
    kind: str = "ollivier",
    idleness: float = 0.0,
    normalized: bool = True,
    w_min: float = 1e-3,
    save_every: int = 1,
) -> GraphRicciRun:
    r"""Flow the weights by :math:`\dot w = -\kappa w`, in Euler steps of :math:`\log w`.

    ``kind`` is ``"ollivier"`` or ``"forman"``. ``normalized`` keeps the sum of the weights; none
    falls below ``w_min`` times the mean weight of the start before that. Differentiable through
    time in the weights, wherever the curvature is.

    >>> ring = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 4], [4, 5], [5, 0]])
    >>> run = graph_ricci_flow(ring, torch.ones(6), dt=0.1, steps=3)
    >>> run.weights[-1].tolist()  # no curvature
    [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """
    where = "graph_ricci_flow"
    _check_graph(where, edges, weights)
    _metric_march.check_run(where, dt, steps, save_every)
    if kind not in _KINDS:
        raise ValueError(f"{where}: kind is {kind!r}, expected one of {_KINDS}")
    if not 0 < w_min < 1:
        raise ValueError(f"{where}: w_min is {w_min}, expected a number in (0, 1)")
    total = weights.sum()
    floor = (w_min * total / len(weights)).log()

    def curvature(w: Tensor) -> Tensor:
        if kind == "forman":
            return forman_curvature(edges, w)
        return ollivier_curvature(edges, w, idleness=idleness)

    def step(w: Tensor) -> Tensor:
        log = torch.maximum(w.log() - dt * curvature(w), floor)
        return total * torch.softmax(log, 0) if normalized else log.exp()

    def verdict(w: Tensor) -> str | None:
        return None if bool((w.isfinite() & (w > 0)).all()) else "the weights left (0, inf)"

    t, saved, word = _metric_march.march(step, weights, dt, steps, save_every, verdict)
    run = GraphRicciRun(t, saved, torch.stack([curvature(w) for w in saved.unbind()]))
    if word is not None:
        raise _metric_march.stopped(where, word, run)
    return run


def _linear(rows: list[int], columns: list[int], entries: list[float], w: Tensor) -> Tensor:
    taken = w[torch.tensor(columns, dtype=torch.int64, device=w.device)]
    terms = taken * torch.tensor(entries, dtype=w.dtype, device=w.device)
    index = torch.tensor(rows, dtype=torch.int64, device=w.device)
    return torch.zeros_like(w).index_add(0, index, terms)


def _paths(where: str, ends: np.ndarray, plain: np.ndarray, n: int) -> tuple[np.ndarray, ...]:
    graph = scipy.sparse.csr_array((plain, (ends[:, 0], ends[:, 1])), shape=(n, n))
    lengths, previous = shortest_path(graph, directed=False, return_predecessors=True)
    if not np.isfinite(lengths).all():
        raise GeometryError(f"{where}: the graph is not connected, expected one component")
    return lengths, previous


def _check_graph(where: str, edges: Tensor, weights: Tensor) -> None:
    if not isinstance(edges, Tensor) or edges.dtype != torch.int64:
        seen = edges.dtype if isinstance(edges, Tensor) else type(edges).__name__
        raise TypeError(f"{where}: edges is {seen}, expected an int64 tensor")
    if edges.dim() != 2 or edges.shape[1] != 2 or not len(edges):
        raise ValueError(f"{where}: edges has shape {tuple(edges.shape)}, expected (e, 2), e > 0")
    _checks.check_tensor(where, "weights", weights)
    if weights.shape != edges.shape[:1]:
        raise ValueError(
            f"{where}: weights has shape {tuple(weights.shape)}, expected ({len(edges)},)"
        )
    _checks.check_finite(where, weights=weights)
    _checks.check_that(where, lambda: weights > 0, "weights holds numbers that are not positive")
    if not _checks.checks_values():
        return
    plain = values(edges)
    if bool((plain[:, 0] == plain[:, 1]).any()) or int(plain.min()) < 0:
        raise ValueError(f"{where}: edges has loops or negative nodes, expected neither")
    if len(torch.unique(plain.sort(-1).values, dim=0)) < len(plain):
        raise ValueError(f"{where}: edges holds an edge twice, expected each once")
