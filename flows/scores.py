r"""Further energies against a known target: Renyi divergences and proximal and neighbour scores.

They know ``log_prob`` of the target up to a constant, and add and scale as those of
:mod:`darboux.flows.energies` do.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from darboux import _autodiff
from darboux.flows import kernel_sums, kernels
from darboux.flows.energies import Energy


class Renyi(Energy):
    r"""The Renyi divergence of order ``m`` from the target, by blobs.

    .. math:: E = \frac1{m - 1}\log\sum_iw_i
              \Bigl(\frac{(\phi_h * \rho)(x_i)}{\pi(x_i)}\Bigr)^{m - 1}

    The limit ``m = 1`` is the KL divergence with the blob entropy, whose bias it shares: the
    density is smoothed by the variance ``h``. The velocity is the exact gradient.
    """

    def __init__(
        self, log_prob: Callable[[Tensor], Tensor], m: float, bandwidth: kernels.Width = "median"
    ):
        super().__init__()
        if not (m > 0 and m != 1):
            raise ValueError(f"Renyi: m is {m}, expected a positive order other than 1; use KL")
        self.log_prob, self.m = log_prob, m
        self.kernel = kernels.Gaussian(bandwidth)

    def _value(self, x: Tensor, w: Tensor) -> Tensor:
        h = self.kernel.width(x)
        constant = x.shape[-1] / 2 * (2 * math.pi * h).log().unsqueeze(-1)
        density = kernel_sums.gaussian_log_sum(x, x, h, w) - constant
        ratio = (self.m - 1) * (density - self.log_prob(x)) + kernel_sums.log_weights(w)
        return ratio.logsumexp(-1) / (self.m - 1)


class ProximalKL(Energy):
    r"""KL to the target with the score of the regularised Wasserstein proximal of the particles.

    .. math:: v_i = \tfrac12\nabla\log\pi(x_i) + \frac{x_i - \bar x_i}{2T}, \qquad
              \bar x_i = \sum_j \mathrm{softmax}_j\Bigl(-\frac{|x_i - x_j|^2}{4T}
              - \tfrac12\log\pi(x_j) - \frac T4|\nabla\log\pi(x_j)|^2\Bigr)x_j

    Tan, Osher and Li: the density a step ``T`` ahead in place of a smoothed one, with its
    normalising integrals by expansion at :math:`x_j`. For the target N(b, Q) it comes to rest
    at covariance :math:`Q(1 + \tfrac12u^2/(1 - u))^{-1}`, :math:`u = TQ^{-1}`: a bias of
    second order where that of ``"kde"`` is of first. Needs ``T`` below the least variance. No
    gradient of an energy (``exact`` is false); its value is KL with a density of width ``2T``.
    """

    exact = False

    def __init__(self, log_prob: Callable[[Tensor], Tensor], T: float | Tensor):
        super().__init__()
        if not isinstance(T, Tensor) and not 0 < T < math.inf:
            raise ValueError(f"ProximalKL: T is {T}, expected a positive time")
        self.log_prob, self.T = log_prob, T

    def _density(self, x: Tensor, w: Tensor) -> Tensor:
        h = 2 * torch.as_tensor(self.T, dtype=x.dtype, device=x.device)
        constant = x.shape[-1] / 2 * (2 * math.pi * h).log()
        return kernel_sums.gaussian_log_sum(x, x, h, w) - constant.unsqueeze(-1)

    def _variation(self, x: Tensor, w: Tensor) -> Tensor:
        return self._density(x, w) - self.log_prob(x)

    def _value(self, x: Tensor, w: Tensor) -> Tensor:
        return (w * self._variation(x, w)).sum(-1)

    def _velocity(self, x: Tensor, w: Tensor) -> Tensor:
        T = torch.as_tensor(self.T, dtype=x.dtype, device=x.device)
        p, g = _autodiff.pullback(self.log_prob, x, torch.ones_like)
        bias = -p / 2 - T / 4 * g.square().sum(-1)
        z = x - x.mean(-2, keepdim=True).detach()
        q, k = kernel_sums.gaussian_logits(z, z, 2 * T, w, bias)
        return g / 2 + (z - kernel_sums.attend(q, k, z)) / (2 * T)


class NeighbourEntropy(Energy):
    r"""The negative entropy by the distance to the ``k``-th neighbour, Kozachenko and Leonenko.

    .. math:: E = -d\sum_iw_i\log r_i + \psi(k) - \psi(N) - \log V_d

    No width to choose. Unbiased to order :math:`N^{-1/d}` for equal weights; for others the
    count of neighbours ignores them. Pairs repel by 1/r and the value is piecewise smooth, so
    that a flow needs small steps; copies of a particle count as no neighbours. Blocks of rows.
    """

    def __init__(self, k: int = 3):
        super().__init__()
        if k < 1:
            raise ValueError(f"NeighbourEntropy: k is {k}, expected at least 1")
        self.k = k

    def _value(self, x: Tensor, w: Tensor) -> Tensor:
        n, d = x.shape[-2:]
        if n <= self.k:
            raise ValueError(f"NeighbourEntropy: {n} particles, expected more than k = {self.k}")
        with torch.no_grad():
            y = x.detach()

            def rows(part: Tensor, _: int) -> Tensor:
                s = (part.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)
                s = torch.where(s > 0, s, torch.inf)
                return s.topk(self.k, -1, largest=False).indices[..., -1:].to(y.dtype)

            pick = kernel_sums.by_rows(rows, y, n * d * max(1, y[..., 0, 0].numel())).long()
        other = x.gather(-2, pick.expand(x.shape))
        s = (x - other).square().sum(-1)
        apart = s > 0
        logs = torch.where(apart, torch.where(apart, s, 1.0).log() / 2, 0.0)
        ball = d / 2 * math.log(math.pi) - math.lgamma(d / 2 + 1)
        psi = [torch.digamma(torch.tensor(float(m), dtype=torch.float64)) for m in (self.k, n)]
        return -d * (w * logs).sum(-1) + float(psi[0] - psi[1]) - ball
