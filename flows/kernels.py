r"""Kernels between particles: what a flow needs of them, and rules for their width.

A kernel says how it sums, ``sum(x, y, b)`` :math:`= \sum_j k(x_i, y_j)\,b_j`; the rest follows.
It must be symmetric. A width is a variance throughout: ``h`` is the one of the Gaussian
:math:`e^{-|x - y|^2/2h}`, a number, a tensor of the batch's shape, a parameter, or the name of a
rule of :func:`bandwidth`.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from darboux import _autodiff, _checks
from darboux._smooth import sqrt
from darboux.flows import kernel_sums

RULES = ("median", "scott")
Width = float | str | Tensor


def bandwidth(x: Tensor, rule: str = "median") -> Tensor:
    r"""Return a width ``(...)`` for the particles ``x (..., N, d)``, cut off from the graph.

    ``"median"``: :math:`\mathrm{med}_{i \ne j}|x_i - x_j|^2 / 2\log(N + 1)`, Liu and Wang
    (2016), over at most 1000 particles. ``"scott"``: :math:`N^{-2/(d + 4)}` times the mean
    variance. Particles that lie in one point have no width of their own and get 1.
    """
    _check_rule("bandwidth", rule)
    x = x.detach()
    n, d = x.shape[-2:]
    if rule == "scott":
        h = n ** (-2.0 / (d + 4)) * (x - x.mean(-2, keepdim=True)).square().mean((-1, -2))
    else:
        some = x[..., :: -(-n // 1000), :]
        m = some.shape[-2]
        s = kernel_sums.square_distances(some, some)
        i, j = torch.triu_indices(m, m, 1, device=x.device)
        if len(i) == 0:  # one particle
            return torch.ones_like(x[..., 0, 0])
        h = s[..., i, j].median(-1).values / (2 * math.log(n + 1))
    return torch.where(h > torch.finfo(x.dtype).tiny ** 0.5, h, 1.0)


def _check_rule(where: str, rule: str) -> None:
    if rule not in RULES:
        raise ValueError(f"{where}: unknown rule {rule!r}, expected one of {', '.join(RULES)}")


def width(where: str, h: Width, x: Tensor) -> Tensor:
    """Return ``h`` as a positive tensor for the particles ``x``, or raise ``ValueError``."""
    if isinstance(h, str):
        return bandwidth(x, h)
    if not isinstance(h, Tensor):
        if not 0 < h < math.inf:
            raise ValueError(f"{where}: bandwidth is {h}, expected a positive number")
        return torch.as_tensor(h, dtype=x.dtype, device=x.device)
    _checks.check_that(
        where, lambda: (h > 0) & h.isfinite(), "bandwidth must be positive and finite"
    )
    return h


class Kernel(nn.Module, ABC):
    """A symmetric kernel ``k(x, y)`` on R^d."""

    @abstractmethod
    def sum(self, x: Tensor, y: Tensor, b: Tensor) -> Tensor:
        r"""Return :math:`\sum_j k(x_i, y_j)\,b_j` for ``b (..., M, c)``, as ``(..., N, c)``."""

    def gradient_sum(self, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        r"""Return :math:`\sum_j w_j \nabla_x k(x_i, y_j)` for ``w (..., M)``, ``(..., N, d)``."""
        return _autodiff.pullback(
            lambda z: self.sum(z, y, w.unsqueeze(-1)), x, lambda s: torch.ones_like(s)
        )[1]

    def repulsion(self, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        r"""Return :math:`\sum_j w_j \nabla_y k(x_i, y_j)`, here of a kernel of ``x - y``."""
        return -self.gradient_sum(x, y, w)

    def frozen(self, x: Tensor) -> "Kernel":
        """Return the kernel with its width fixed by the particles ``x``."""
        return self

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the matrix ``k(x_i, y_j) (..., N, M)``; for small numbers of particles."""
        eye = torch.eye(y.shape[-2], dtype=y.dtype, device=y.device)
        return self.sum(x, y, eye)


class Gaussian(Kernel):
    r"""The kernel :math:`e^{-|x - y|^2/2h}`."""

    def __init__(self, bandwidth: Width = "median"):
        super().__init__()
        self.bandwidth = _stored(type(self).__name__, bandwidth)

    def width(self, y: Tensor) -> Tensor:
        """Return the width that holds for the particles ``y``."""
        return width(type(self).__name__, self.bandwidth, y)

    def frozen(self, x: Tensor) -> Kernel:
        return type(self)(self.width(x)) if isinstance(self.bandwidth, str) else self

    def sum(self, x: Tensor, y: Tensor, b: Tensor) -> Tensor:
        return kernel_sums.gaussian_sum(x, y, b, self.width(y))

    def gradient_sum(self, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        # centred, or sum(w k) x - sum(w k y) cancels far from the origin
        h = self.width(y)
        centre = y.mean(-2, keepdim=True).detach()
        own, y = x is y, y - centre
        x = y if own else x - centre
        w = w.unsqueeze(-1)
        s = kernel_sums.gaussian_sum(x, y, torch.cat([w * y, w.expand(*y.shape[:-1], 1)], -1), h)
        return (s[..., :-1] - s[..., -1:] * x) / h[..., None, None]


class _Radial(Gaussian):
    smooth = True

    def sum(self, x: Tensor, y: Tensor, b: Tensor) -> Tensor:
        h = self.width(y)[..., None, None]
        return kernel_sums.radial_sum(lambda s: self._profile(s / h), x, y, b, self.smooth)

    def gradient_sum(self, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return Kernel.gradient_sum(self, x, y, w)

    def _profile(self, s: Tensor) -> Tensor:
        raise NotImplementedError


class InverseMultiquadric(_Radial):
    r"""The kernel :math:`(1 + |x - y|^2/h)^{-1/2}`, with tails that a Gaussian lacks."""

    def _profile(self, s: Tensor) -> Tensor:
        return (1 + s).rsqrt()


class Laplace(_Radial):
    r"""The kernel :math:`e^{-|x - y|/\sqrt h}`; its gradient at ``x = y`` is set to 0."""

    smooth = False

    def _profile(self, s: Tensor) -> Tensor:
        return kernel_sums.safe_exp(-sqrt(s))


class Distance(_Radial):
    r"""The kernel :math:`-|x - y|` of the energy distance: no width, conditionally positive."""

    smooth = False

    def __init__(self):
        super().__init__(1.0)

    def frozen(self, x: Tensor) -> Kernel:
        return self

    def _profile(self, s: Tensor) -> Tensor:
        return -sqrt(s)


class Bilinear(Kernel):
    r"""The kernel :math:`x^T A y + 1` with ``A (d, d)`` symmetric: Gaussians stay Gaussian."""

    def __init__(self, A: Tensor):
        super().__init__()
        if A.dim() != 2 or A.shape[0] != A.shape[1]:
            raise ValueError(f"Bilinear: A has shape {tuple(A.shape)}, expected (d, d)")
        self.A = A

    def sum(self, x: Tensor, y: Tensor, b: Tensor) -> Tensor:
        return x @ self.A @ (y.mT @ b) + b.sum(-2, keepdim=True)

    def gradient_sum(self, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return ((w.unsqueeze(-1) * y).sum(-2, keepdim=True) @ self.A).expand_as(x)

    def repulsion(self, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return x @ self.A * w.sum(-1)[..., None, None]


def _stored(where: str, h: Width) -> Width:
    if isinstance(h, str):
        _check_rule(where, h)
    elif not isinstance(h, Tensor) and not 0 < h < math.inf:
        raise ValueError(f"{where}: bandwidth is {h}, expected a positive number")
    return h
