"""Functions that stay smooth where their textbook form divides zero by zero.

All take the *square* of their argument, ``s``, and are entire (or analytic near ``s = 0``)
in it, so that values and all derivatives are finite at coincident points and zero vectors.
``torch.where`` differentiates both branches, so each branch gets a harmless argument where
the other one is used.
"""

import math
from fractions import Fraction

import torch
from torch import Tensor

# |s| below which the series is used; eleven terms reach float64 round-off up to |s| = 1.
_SERIES_RADIUS = 0.5


def stumpff(s: Tensor, k: int) -> Tensor:
    r"""Return :math:`c_k(s) = \sum_j (-s)^j/(2j + k)!` by its series, for ``|s| <= 1``."""
    terms = 11
    total = torch.full_like(s, 1.0 / math.factorial(2 * terms + k))
    for j in range(terms - 1, -1, -1):
        total = total * -s + 1.0 / math.factorial(2 * j + k)
    return total


def _by_region(s: Tensor, k: int, trig, hyper) -> Tensor:
    small = s.abs() < _SERIES_RADIUS
    series = stumpff(torch.where(small, s, 0.0), k)
    r_trig = torch.where(~small & (s > 0), s, 1.0).sqrt()
    r_hyper = torch.where(~small & (s < 0), -s, 1.0).sqrt()
    far = torch.where(s > 0, trig(r_trig), hyper(r_hyper))
    return torch.where(small, series, far)


def cosc(s: Tensor) -> Tensor:
    r"""Return :math:`c_0(s) = \cos\sqrt s` (:math:`\cosh\sqrt{-s}` for negative ``s``)."""
    return _by_region(s, 0, torch.cos, torch.cosh)


def sinc(s: Tensor) -> Tensor:
    r"""Return :math:`c_1(s) = \sin\sqrt s/\sqrt s` (:math:`\sinh\sqrt{-s}/\sqrt{-s}` below 0)."""
    return _by_region(s, 1, lambda r: torch.sin(r) / r, lambda r: torch.sinh(r) / r)


def versinc(s: Tensor) -> Tensor:
    r"""Return :math:`c_2(s) = (1 - \cos\sqrt s)/s`, continued through ``s = 0`` and below."""
    half = sinc(s / 4)
    return half * half / 2


def _tan_coefficients(n: int) -> list[float]:
    # t' = 1 + t^2 for t = sum c_j r^(2j+1)
    c = [Fraction(1)]
    for k in range(1, n):
        total = sum((c[i] * c[k - 1 - i] for i in range(k)), Fraction(0))
        c.append(total / (2 * k + 1))
    return [float(q) for q in c]


# f(r) = sum c_j r^(2j+1), for f with imaginary argument the hyperbolic f
_TAN = _tan_coefficients(13)
_ATAN = [(-1.0) ** j / (2 * j + 1) for j in range(18)]
_ASIN = [math.comb(2 * j, j) / 4**j / (2 * j + 1) for j in range(18)]
_ODD_RADIUS = 0.1


def _odd_ratio(s: Tensor, coefficients: list[float], trig, hyper) -> Tensor:
    # f(sqrt s)/sqrt s for an odd f, by its Taylor series near s = 0; without ``trig`` s <= 0
    small = s.abs() < _ODD_RADIUS
    inner = torch.where(small, s, 0.0)
    series = torch.full_like(s, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        series = series * inner + c
    r = torch.where(~small & (s < 0), -s, _ODD_RADIUS).sqrt()
    far = hyper(r) / r
    if trig is not None:
        r = torch.where(~small & (s > 0), s, _ODD_RADIUS).sqrt()
        far = torch.where(s > 0, trig(r) / r, far)
    return torch.where(small, series, far)


def tanc(s: Tensor) -> Tensor:
    r"""Return :math:`\tan\sqrt s/\sqrt s` (:math:`\tanh\sqrt{-s}/\sqrt{-s}` for negative ``s``)."""
    return _odd_ratio(s, _TAN, torch.tan, torch.tanh)


def tanhc(s: Tensor) -> Tensor:
    r"""Return :math:`\tanh\sqrt s/\sqrt s` for ``s >= 0``."""
    return _odd_ratio(-s, _TAN, None, torch.tanh)


def atanc(s: Tensor) -> Tensor:
    r"""Return :math:`\arctan\sqrt s/\sqrt s` (:math:`\operatorname{artanh}` for ``-1 < s < 0``)."""
    return _odd_ratio(s, _ATAN, torch.atan, torch.atanh)


def asinc(s: Tensor, complement: Tensor | None = None) -> Tensor:
    r"""Return :math:`\arcsin\sqrt s/\sqrt s` (:math:`\operatorname{arsinh}` for negative ``s``).

    ``complement`` is ``1 - s``, known more accurately than by subtraction: it decides near
    ``s = 1``, where the arcsine is computed as :math:`\operatorname{atan2}(\sqrt s, \sqrt{1-s})`.
    """
    cosine = sqrt(1 - s if complement is None else complement)
    return _odd_ratio(s, _ASIN, lambda r: torch.atan2(r, cosine), torch.asinh)


def asinhc(s: Tensor) -> Tensor:
    r"""Return :math:`\operatorname{arsinh}\sqrt s/\sqrt s` for ``s >= 0``."""
    return _odd_ratio(-s, _ASIN, None, torch.asinh)


def sqrt(s: Tensor) -> Tensor:
    r"""Return :math:`\sqrt s` with derivative 0, not infinity, at ``s = 0``.

    A distance has no derivative at coincident points; 0 is the least-norm element of its
    subdifferential and keeps NaN out of a training step.
    """
    zero = s <= 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, s).sqrt())
