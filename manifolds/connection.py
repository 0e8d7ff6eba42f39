r"""The Levi-Civita connection of a metric field ``g(x)``, by automatic differentiation.

Everything is a pure function of a metric ``(..., d) -> (..., d, d)``. First-kind symbols are
:math:`\Gamma_{l,ij} = \tfrac12(\partial_i g_{jl} + \partial_j g_{il} - \partial_l g_{ij})`;
whatever can be had contracted is never formed as a ``d^3`` tensor.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from darboux._autodiff import directional, jacobian, pullback, push_pull
from darboux._checks import in_transform
from darboux.manifolds.linalg import matvec, outer, solve, solve_vector

Metric = Callable[[Tensor], Tensor]

_REVERSE_UP_TO = 3


def first_kind(dg: Tensor) -> Tensor:
    """Return ``(..., l, i, j)`` from ``dg[..., a, b, c]``, the derivative of g_ab along c."""
    return 0.5 * (dg + dg.transpose(-1, -2) - dg.movedim(-1, -3))


def metric_derivative(metric: Metric, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``g (..., a, b)`` and ``dg (..., a, b, c)``, the derivative of g_ab along c."""
    d = x.shape[-1]
    if d > _REVERSE_UP_TO or in_transform():
        return jacobian(metric, x)
    # One reverse pass over the d (d + 1)/2 entries costs less than d derivatives.
    entries, position = _entries(d, x.dtype, x.device)
    copies = x.expand(len(entries), *x.shape)
    entries = entries.reshape(-1, *[1] * (x.dim() - 1), d, d)
    g, rows = pullback(metric, copies, lambda g: entries.expand_as(g))
    return g[0], rows[position].movedim(0, -2).unflatten(-2, (d, d))


@lru_cache
def _entries(d: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    # the unit matrices of the upper triangle, and which of them holds each of the d^2 entries
    with torch.inference_mode(False):
        a, b = torch.triu_indices(d, d, device=device)
        count = torch.arange(len(a), device=device)
        entries = torch.zeros(len(a), d, d, dtype=dtype, device=device)
        entries[count, a, b] = 1.0
        position = torch.empty(d, d, dtype=torch.long, device=device)
        position[a, b] = position[b, a] = count
    return entries, position.flatten()


def christoffel(metric: Metric, x: Tensor, positive: bool = True) -> Tensor:
    r"""Return :math:`\Gamma^k_{ij}` as ``(..., k, i, j)``."""
    g, dg = metric_derivative(metric, x)
    d = x.shape[-1]
    return solve(g, first_kind(dg).flatten(-2), positive).unflatten(-1, (d, d))


def acceleration(metric: Metric, x: Tensor, v: Tensor, positive: bool = True) -> Tensor:
    r"""Return :math:`-\Gamma(v, v)`: one g, two reverse passes, memory O(batch d^2).

    .. math:: -g^{-1}\bigl(D_v g\, v - \tfrac12 \nabla_x (v^T g(x)\, v)\bigr)
    """
    g, dg_v, half_grad = push_pull(metric, x, v, outer(v, 0.5 * v))
    return solve_vector(g, half_grad - matvec(dg_v, v), positive)


def lowered(metric: Metric, x: Tensor, u: Tensor, w: Tensor) -> Tensor:
    r"""Return :math:`\Gamma_{l,ij} u^i w^j` as a covector ``(..., l)``."""
    _, dg_u = directional(metric, x, u)
    _, dg_w, grad = push_pull(metric, x, w, 0.5 * (outer(u, w) + outer(w, u)))
    return 0.5 * (matvec(dg_u, w) + matvec(dg_w, u) - grad)


def covariant_derivative(
    metric: Metric, field: Callable[[Tensor], Tensor], x: Tensor, v: Tensor, positive: bool = True
) -> Tensor:
    r"""Return :math:`\nabla_v W = DW\,v + \Gamma(v, W)` of a vector field ``W``."""
    w, dw = directional(field, x, v)
    return dw + solve_vector(metric(x), lowered(metric, x, v, w), positive)


def geodesic_field(
    metric: Metric, x: Tensor, p: Tensor, positive: bool = True
) -> tuple[Tensor, Tensor]:
    r"""Return Hamilton's equations of :math:`H = \tfrac12 g^{ij}(x) p_i p_j`.

    .. math:: \dot x = v = g^{-1}p, \qquad \dot p = \tfrac12 \nabla_x (v^T g(x)\, v)
        \text{ with } v \text{ held}

    One evaluation of g and one reverse pass: the cheapest right-hand side there is.
    """
    velocity = x

    def cotangent(g: Tensor) -> Tensor:
        nonlocal velocity
        velocity = solve_vector(g, p, positive)
        return outer(velocity, 0.5 * velocity)

    _, force = pullback(metric, x, cotangent)
    return velocity, force
