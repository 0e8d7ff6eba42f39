r"""Curvature of a metric field from one second-order jet (g, dg, d2g).

Convention: :math:`R^l{}_{kij}` is stored as ``(..., l, k, i, j)`` with
:math:`R(\partial_i, \partial_j)\partial_k = R^l{}_{kij}\partial_l`; the unit sphere has
positive curvature. do Carmo (1992), ch. 4, up to his opposite sign of R.
"""

import torch
from torch import Tensor

from darboux._autodiff import jet, pullback, second
from darboux.manifolds.connection import Metric, first_kind
from darboux.manifolds.linalg import matvec, outer, solve, solve_vector


def _riemann_lowered(metric: Metric, x: Tensor, positive: bool) -> tuple[Tensor, Tensor]:
    g, dg, d2g = jet(metric, x)
    first = first_kind(dg)
    gamma = solve(g, first.flatten(-2), positive).unflatten(-1, (x.shape[-1],) * 2)
    # R_lkij = 1/2 (d_k d_i g_lj + d_l d_j g_ki - d_k d_j g_li - d_l d_i g_kj)
    #          - F_{m,il} Gamma^m_jk + F_{m,jl} Gamma^m_ik
    a = torch.einsum("...ljki->...lkij", d2g)
    a = a - a.transpose(-4, -3)
    b = torch.einsum("...mil,...mjk->...lkij", first, gamma)
    return g, 0.5 * (a - a.transpose(-1, -2)) - b + b.transpose(-1, -2)


def riemann(metric: Metric, x: Tensor, positive: bool = True) -> Tensor:
    """Return the Riemann tensor with first index raised, ``(..., l, k, i, j)``."""
    g, lowered = _riemann_lowered(metric, x, positive)
    return solve(g, lowered.flatten(-3), positive).unflatten(-1, (x.shape[-1],) * 3)


def ricci(metric: Metric, x: Tensor, positive: bool = True) -> Tensor:
    r"""Return :math:`\mathrm{Ric}_{kj} = R^i{}_{kij}` as ``(..., k, j)``."""
    return torch.einsum("...ikij->...kj", riemann(metric, x, positive))


def scalar(metric: Metric, x: Tensor, positive: bool = True) -> Tensor:
    r"""Return the scalar curvature :math:`g^{kj}\mathrm{Ric}_{kj}` as ``(...)``."""
    ric = ricci(metric, x, positive)
    return solve(metric(x), ric, positive).diagonal(dim1=-2, dim2=-1).sum(-1)


def sectional(metric: Metric, x: Tensor, u: Tensor, v: Tensor, positive: bool = True) -> Tensor:
    r"""Return the sectional curvature of the plane of ``u`` and ``v``, matrix-free.

    .. math:: K |u\wedge v|^2 = -\tfrac12\bigl(D^2_{uu} g(v,v) + D^2_{vv} g(u,u)
        - 2 D^2_{uv} g(u,v)\bigr) + |\Gamma(u,v)|^2 - \langle\Gamma(u,u), \Gamma(v,v)\rangle

    Three second directional derivatives of g whatever the dimension.
    """
    # rows: the pairs (u, u), (v, v), (u, v)
    a, b = torch.stack([u, v, u]), torch.stack([u, v, v])
    xs = x.expand(3, *x.shape).contiguous()

    gs, dg_b, d2g = second(metric, xs, b, a)
    dg_a = dg_b[[0, 1, 0]]  # the first of each pair: u, v, u
    _, grad = pullback(metric, xs, lambda _: 0.5 * (outer(a, b) + outer(b, a)))
    low = 0.5 * (matvec(dg_a, b) + matvec(dg_b, a) - grad)
    high = solve_vector(gs, low, positive)
    g = gs[0]

    def form(m: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return (s * matvec(m, t)).sum(-1)

    bend = form(d2g[0], v, v) + form(d2g[1], u, u) - 2 * form(d2g[2], u, v)
    area = form(g, u, u) * form(g, v, v) - form(g, u, v).square()
    gammas = (low[2] * high[2]).sum(-1) - (low[0] * high[1]).sum(-1)
    return (gammas - 0.5 * bend) / area
