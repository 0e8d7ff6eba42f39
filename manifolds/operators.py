r"""Differential operators on functions and vector fields over a metric field.

A function is a callable ``(..., d) -> (...)``, a vector field ``(..., d) -> (..., d)``.
Sign: the Laplace-Beltrami operator is :math:`\Delta = \operatorname{div}\operatorname{grad}`.
"""

from collections.abc import Callable

from torch import Tensor

from darboux import _autodiff
from darboux.manifolds.connection import Metric
from darboux.manifolds.linalg import log_det, solve, solve_vector

Function = Callable[[Tensor], Tensor]
VectorField = Callable[[Tensor], Tensor]


def log_volume(metric: Metric, x: Tensor, positive: bool = True) -> Tensor:
    r"""Return :math:`\log\sqrt{|\det g|}`."""
    return 0.5 * log_det(metric(x), positive)


def gradient(metric: Metric, f: Function, x: Tensor, positive: bool = True) -> Tensor:
    r"""Return :math:`\operatorname{grad} f = g^{-1} df`, ``(..., d)``."""
    return solve_vector(metric(x), _autodiff.gradient(f, x), positive)


def divergence(metric: Metric, field: VectorField, x: Tensor, positive: bool = True) -> Tensor:
    r"""Return :math:`\operatorname{div} V = \partial_i V^i + V^i \partial_i \log\sqrt{|g|}`."""
    v, dv = _autodiff.jacobian(field, x)
    _, d_log = _autodiff.directional(lambda z: log_volume(metric, z, positive), x, v)
    return dv.diagonal(dim1=-2, dim2=-1).sum(-1) + d_log


def hessian(metric: Metric, f: Function, x: Tensor, positive: bool = True) -> Tensor:
    r"""Return the covariant Hessian :math:`\partial_i\partial_j f - \Gamma^k_{ij}\partial_k f`.

    The contraction needs only ``dg`` paired with :math:`w = \operatorname{grad} f`:
    :math:`\Gamma_{l,ij} w^l = \tfrac12(\partial_i (g w)_j + \partial_j (g w)_i - D_w g_{ij})`.
    """
    _, df, d2f = _autodiff.jet(f, x)
    g, dg = _autodiff.jacobian(metric, x)
    w = solve_vector(g, df, positive)
    d_gw = (dg * w[..., None, :, None]).sum(-2)
    return d2f - 0.5 * (d_gw + d_gw.mT - (dg * w[..., None, None, :]).sum(-1))


def laplacian(metric: Metric, f: Function, x: Tensor, positive: bool = True) -> Tensor:
    r"""Return :math:`\Delta f = g^{ij}\nabla_i\nabla_j f`, ``(...)``."""
    hess = hessian(metric, f, x, positive)
    return solve(metric(x), hess, positive).diagonal(dim1=-2, dim2=-1).sum(-1)
