r"""Attention with momentum as a system of particles: the Hamiltonians, and their velocity forms.

With :math:`M_{ij} = e^{x_i \cdot Ax_j}`, its row means :math:`z_i` and softmax
:math:`P`, a symmetric ``A`` and a positive ``B``,

.. math:: H = \tfrac12\sum_i\frac{y_i \cdot By_i}{z_i} - \frac1{2N}\sum_{ij}M_{ij}, \qquad
          \dot x_i = \frac{By_i}{z_i}, \qquad \dot y_i = -\alpha y_i - \partial_{x_i}H

moves, from rest, as softmax attention with values ``V x``, ``V = B A``, accelerates. It is the
damped flow of the potential term in a metric of Wasserstein type whose mobility :math:`B/z`
depends on the state; neither is it the Wasserstein metric, nor is any of this true with a mask, a
matrix ``A`` that is not symmetric, or several heads. The potential is unbounded below: there is
no minimiser to converge to. Particles are ``(..., N, d)``. Stein, Li and Steidl (2026), corrected.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from darboux import _checks
from darboux.flows import gaussian, kernel_sums


class Averages(NamedTuple):
    """What one look of every query at a moving cloud gives, see :func:`look`."""

    values: Tensor  # (..., N, c), P v
    drift: Tensor  # (..., N), the rate of log z along the motion
    weighted: Tensor  # (..., N, c), P (s v)


def look(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, s: Tensor, *, causal: bool = False
) -> Averages:
    r"""Average over the cloud by :math:`P_{ij} \propto e^{q_i \cdot k_j}`, all in one pass.

    The drift :math:`\sum_jP_{ij}(\dot q_i \cdot k_j + q_i \cdot \dot k_j)` needs no second
    matrix of scores: its parts are averages of ``k`` and of ``dk``, further columns of the values.
    """
    c, e = v.shape[-1], k.shape[-1]
    wide = torch.cat([v, s.unsqueeze(-1) * v, k, dk], -1)
    plain, weighted, mean, moved = kernel_sums.attend(q, k, wide, causal=causal).split(
        [c, c, e, e], -1
    )
    return Averages(plain, (dq * mean).sum(-1) + (q * moved).sum(-1), weighted)


# -- softmax -------------------------------------------------------------------------------------


def partition(x: Tensor, A: Tensor) -> Tensor:
    r"""Return :math:`z_i = \frac1N\sum_je^{x_i \cdot Ax_j}`, ``(..., N)``: finite if that is."""
    z = (kernel_sums.log_sum(x @ A, x)).exp() / x.shape[-2]
    _checks.check_finite("partition", z=z)
    return z


def momenta(x: Tensor, u: Tensor, A: Tensor, B: Tensor) -> Tensor:
    r"""Return :math:`y_i = z_iB^{-1}u_i`, the momenta of velocities ``u``."""
    return partition(x, A).unsqueeze(-1) * (u @ gaussian.inverse(B))


def hamiltonian(x: Tensor, y: Tensor, A: Tensor, B: Tensor) -> Tensor:
    r"""Return :math:`H`, shape ``(...)``; along the motion :math:`\dot H = -\alpha\sum y \cdot
    By/z`."""
    z = partition(x, A)
    return ((y @ B * y).sum(-1) / z - z).sum(-1) / 2


def momentum_field(
    x: Tensor, y: Tensor, A: Tensor, B: Tensor, alpha: float | Tensor = 0.0
) -> tuple[Tensor, Tensor]:
    r"""Return :math:`(\dot x, \dot y)` of the Hamiltonian form.

    .. math:: \dot y_i = -\alpha y_i + \frac1{2N}\sum_jM_{ij}(r_i + r_j + 2)\,Ax_j, \qquad
              r_i = y_i \cdot By_i/z_i^2

    A reference: it takes exponentials of scores as they are and holds their matrix. Use
    :func:`velocity_field`.
    """
    M = torch.exp(x @ A @ x.mT) / x.shape[-2]
    z = M.sum(-1, keepdim=True)
    _checks.check_finite("momentum_field", z=z)
    r = (y @ B * y).sum(-1, keepdim=True) / z.square()
    return y @ B / z, -alpha * y + (M * (r + r.mT + 2)) @ x @ A.mT / 2


def connection(
    x: Tensor, u: Tensor, A: Tensor, B: Tensor, *, causal: bool = False
) -> tuple[Tensor, Tensor]:
    r"""Return attention and what the metric :math:`z_iB^{-1}` adds, both ``(..., N, d)``.

    .. math:: F_i = \sum_jP_{ij}Vx_j, \qquad
              \Gamma_i = a_iu_i - \tfrac12\Bigl(s_iF_i + \sum_jP_{ij}s_jVx_j\Bigr)

    with :math:`s = u \cdot B^{-1}u` and :math:`a_i = \sum_jP_{ij}(u_i \cdot Ax_j + x_i \cdot
    Au_j)`. Without a mask this is the Levi-Civita connection, contracted twice with ``u``;
    ``causal`` masks ``P``, which belongs to no Hamiltonian.
    """
    s = (u @ gaussian.inverse(B) * u).sum(-1)
    seen = look(x @ A, x, x @ (B @ A).mT, u @ A, u, s, causal=causal)
    bend = (s.unsqueeze(-1) * seen.values + seen.weighted) / 2
    return seen.values, seen.drift.unsqueeze(-1) * u - bend


def velocity_field(
    x: Tensor,
    u: Tensor,
    A: Tensor,
    B: Tensor,
    alpha: float | Tensor = 0.0,
    *,
    causal: bool = False,
    gradient: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Return :math:`(\dot x, \dot u) = (u, -\alpha u + F - \Gamma)`, the velocity form.

    The same motion as :func:`momentum_field` with :math:`u = By/z`, but it takes only softmax:
    scores of any size do not overflow. With the ``gradient`` of another potential ``U``, summed
    over particles, the force is :math:`-B\nabla U/z` in the place of ``F``.
    """
    force, bend = connection(x, u, A, B, causal=causal)
    if gradient is not None:
        force = -gradient(x) @ B / partition(x, A).unsqueeze(-1)
    return u, force - bend - alpha * u


def row_field(
    x: Tensor, u: Tensor, keys: Tensor, A: Tensor, B: Tensor, alpha: float | Tensor = 0.0
) -> tuple[Tensor, Tensor]:
    r"""Return the velocity form of particles that move each alone among fixed ``keys``.

    .. math:: H_i = \tfrac12y_i \cdot By_i/z_i(x_i) - z_i(x_i), \qquad
              \dot u_i = -\alpha u_i + (1 + s_i/2)F_i - (u_i \cdot A\bar x_i)u_i

    with the average :math:`\bar x_i = \sum_jP_{ij}k_j`. Each row has its own Hamiltonian, so
    that row ``i`` may look at keys ``j <= i`` without moving them. ``A`` need not be symmetric.
    """
    mean = kernel_sums.attend(x @ A, keys, keys)
    force = mean @ (B @ A).mT
    s = (u @ gaussian.inverse(B) * u).sum(-1, keepdim=True)
    a = (u @ A * mean).sum(-1, keepdim=True)
    return u, (1 + s / 2) * force - a * u - alpha * u


# -- linear --------------------------------------------------------------------------------------


def stein_hamiltonian(x: Tensor, y: Tensor, A: Tensor, V: Tensor) -> Tensor:
    r"""Return :math:`\frac1{2N}\sum_{ij}(x_i \cdot Ax_j)(y_i \cdot y_j) - \frac12\sum x_i \cdot
    Vx_i`."""
    C = x.mT @ y
    return ((C * (A @ C)).sum((-1, -2)) / x.shape[-2] - (x @ V * x).sum((-1, -2))) / 2


def stein_field(
    x: Tensor,
    y: Tensor,
    A: Tensor,
    V: Tensor,
    alpha: float | Tensor = 0.0,
    *,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Return the accelerated flow of a quadratic potential in the bilinear Stein metric.

    .. math:: \dot x_i = \frac1N\sum_j(x_i \cdot Ax_j)\,y_j, \qquad
              \dot y_i = -\alpha y_i - \frac1N\sum_j(y_i \cdot y_j)\,Ax_j + Vx_i

    With ``y = V x`` the velocity is linear attention. ``A`` and ``V`` are symmetric. O(N).
    Without a mask the velocity is a linear map of ``x`` whatever ``y`` is, so that elliptical
    laws stay elliptical. ``causal`` averages over ``j <= i``: that preserves no such law and is no
    Hamiltonian system.
    """
    if causal:
        count = torch.arange(1, x.shape[-2] + 1, dtype=x.dtype, device=x.device).unsqueeze(-1)
        start = x.new_zeros(*x.shape[:-2], x.shape[-1], y.shape[-1])
        v, _ = kernel_sums.causal_linear_sum(x @ A, x, y, start)
        bend, _ = kernel_sums.causal_linear_sum(y, y, x @ A.mT, start.mT)
        return v / count, -alpha * y - bend / count + x @ V.mT
    C = x.mT @ y / x.shape[-2]
    return x @ A @ C, -alpha * y - y @ (C.mT @ A) + x @ V.mT


def stein_closure(
    C: Tensor, S: Tensor, A: Tensor, V: Tensor, alpha: float | Tensor = 0.0
) -> tuple[Tensor, Tensor]:
    r"""Return the rates of :math:`C = \frac1NX^TX` and ``S`` while :math:`y_i = Sx_i`.

    .. math:: \dot C = SCAC + CACS^T, \qquad \dot S = -\alpha S - ACS^TS + V - SSCA
    """
    G = S @ C @ A @ C
    return G + G.mT, -alpha * S - A @ C @ S.mT @ S + V - S @ S @ C @ A
