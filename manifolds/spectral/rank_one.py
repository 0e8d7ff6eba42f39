r"""Eigenvalues after a change of rank one, by the secular equation: a spring, a point mass.

O(n) a root, without the matrices. Golub, SIAM Rev. 15 (1973) 318; Gu & Eisenstat, SIAM J. Matrix
Anal. Appl. 15 (1994) 1266.
"""

from __future__ import annotations

import torch
from torch import Tensor

from darboux import _checks

_EQUAL = 1e-13


def rank_one(values: Tensor, z: Tensor, rho: float, *, change: str = "stiffness") -> Tensor:
    r"""Return all eigenvalues ``(n,)`` of a pencil after a change of rank one.

    ``values (n,)`` are all eigenvalues before, :math:`z = \Phi^T k` the vector in their
    M-orthonormal eigenvectors. With ``change="stiffness"``, :math:`K + \rho\,kk^T`:

    .. math:: 1 + \rho\sum_j \frac{z_j^2}{\lambda_j - x} = 0

    (a spring between two nodes: :math:`z_j = \varphi_j(a) - \varphi_j(b)`). With "mass",
    :math:`M + \rho\,mm^T` and :math:`1 - \rho x\sum_j z_j^2/(\lambda_j - x) = 0`, :math:`\rho\ge 0`
    (a point mass: :math:`z_j = \varphi_j(v)`). The roots interlace the values. With part of a
    spectrum the result is that of Ritz, an upper bound.
    """
    where = "rank_one"
    _checks.check_like(where, "z", z, "values", values)
    if values.dim() != 1 or z.shape != values.shape:
        raise ValueError(
            f"{where}: values and z have shapes {tuple(values.shape)} and {tuple(z.shape)}, "
            "expected both (n,)"
        )
    _checks.check_finite(where, values=values, z=z)
    d, order = values.detach().double().sort()
    w = z.detach().double()[order].square()
    if change == "mass":
        if rho < 0 or bool((d < -1e-9 * d.abs().max()).any()):
            raise ValueError(
                f"{where}: with change='mass' rho = {rho} and values must not be negative"
            )
        # -rho x / (l - x) = rho - rho l / (l - x): a change of the stiffness again
        rho = -rho / (1 + rho * float(w.sum()))
        w = w * d.clamp(min=0)
    elif change != "stiffness":
        raise ValueError(f"{where}: change is {change!r}, expected 'stiffness' or 'mass'")
    if rho < 0:
        found = -_roots(-d.flip(0), -rho * w.flip(0)).flip(0)
    else:
        found = _roots(d, rho * w)
    return found.sort().values.to(values)


def _roots(d: Tensor, w: Tensor) -> Tensor:
    """Return the roots of ``1 + sum w / (d - x)``, d ascending and w non-negative."""
    total = float(w.sum())
    scale = max(float(d.abs().max()), total)
    if total <= 1e-300 or scale == 0:
        return d.clone()
    # poles that coincide move together, one root a group; poles without weight stay
    fresh = torch.ones_like(d, dtype=torch.bool)
    fresh[1:] = d.diff() > _EQUAL * scale
    group = fresh.cumsum(0) - 1
    weights = w.new_zeros(int(group[-1]) + 1).index_add(0, group, w)
    moving = weights > _EQUAL * _EQUAL * total
    stays = ~(fresh & moving[group])
    poles, weights = d[fresh][moving], weights[moving]
    tops = torch.cat([poles[1:], poles[-1:] + weights.sum()])
    # Root i lies between pole i and tops i. It is found as a distance from the nearer of them,
    # which keeps all its digits when it is close.
    middle = 0.5 * (poles + tops)
    above = 1 + (weights / (poles - middle[:, None])).sum(-1) < 0
    origin = torch.where(above, tops, poles)
    offsets = poles - origin[:, None]
    low, high = poles - origin, tops - origin
    low, high = torch.where(above, 0.5 * low, low), torch.where(above, high, 0.5 * high)
    x = 0.5 * (low + high)
    for _ in range(100):
        terms = weights / (offsets - x[:, None])
        value = 1 + terms.sum(-1)  # increasing between two poles
        low, high = torch.where(value < 0, x, low), torch.where(value < 0, high, x)
        # a Newton step for the equation multiplied by both poles' factors
        near, far = x - (poles - origin), tops - origin - x
        slope = (terms / (offsets - x[:, None])).sum(-1) * near * far + value * (far - near)
        step = x - value * near * far / slope
        inside = (step > low) & (step < high)
        fresh_x = torch.where(inside, step, 0.5 * (low + high))
        done = (fresh_x - x).abs() <= 2e-16 * fresh_x.abs()
        x = fresh_x
        if bool(done.all()):
            break
    return torch.cat([origin + x, d[stays]])
