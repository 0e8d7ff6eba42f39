r"""Energies of measures, evaluated on weighted particles; they add and scale.

An energy gives its ``value`` :math:`E_N(x, w)`, and the ``velocity`` of its steepest descent in
the Wasserstein metric, :math:`-\nabla\frac{\delta E}{\delta\rho}(x_i) = -w_i^{-1}\,
\partial E_N/\partial x_i`, in a form that stays finite for particles of weight zero. The first
``variation`` :math:`\delta E/\delta\rho(x_i) = \partial E_N/\partial w_i`, up to a constant, is
what flows of weights need. Particles are ``x (..., N, d)``, weights ``w (..., N)`` sum to one and
are ``1/N`` by default; a value has shape ``(...)``. A new energy defines ``_value``.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from darboux import _autodiff, _checks
from darboux._checks import GeometryError
from darboux.flows import gaussian, kernel_sums, kernels
from darboux.manifolds import linalg

SCORES = ("gaussian", "kde", "blob", "stein")


def check_particles(where: str, x: Tensor, w: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return particles and weights, checked; equal weights for ``None``."""
    _checks.check_tensor(where, "x", x)
    if x.dim() < 2 or x.shape[-2] == 0:
        raise ValueError(f"{where}: x has shape {tuple(x.shape)}, expected (..., N, d) with N > 0")
    _checks.check_finite(where, x=x)
    if w is None:
        return x, x.new_full((x.shape[-2],), 1.0 / x.shape[-2])
    _checks.check_last(where, "w", w, x.shape[-2])
    if w.dtype != x.dtype or w.device != x.device:
        raise TypeError(f"{where}: w is {w.dtype} on {w.device}, expected {x.dtype} on {x.device}")
    _checks.check_that(where, lambda: w >= 0, "weights must not be negative")
    _checks.check_that(where, lambda: (w.sum(-1) - 1).abs() <= 1e-3, "weights must sum to one")
    return x, w


class Energy(nn.Module, ABC):
    """A functional of measures. ``exact`` says that velocity and value belong together."""

    exact = True

    def value(self, x: Tensor, w: Tensor | None = None) -> Tensor:
        """Return the energy ``(...)`` of the particles."""
        return self._value(*check_particles(f"{type(self).__name__}.value", x, w))

    def velocity(self, x: Tensor, w: Tensor | None = None) -> Tensor:
        """Return the velocity ``(..., N, d)`` of steepest descent."""
        return self._velocity(*check_particles(f"{type(self).__name__}.velocity", x, w))

    def variation(self, x: Tensor, w: Tensor | None = None) -> Tensor:
        """Return the first variation ``(..., N)`` at the particles, up to a constant."""
        x, w = check_particles(f"{type(self).__name__}.variation", x, w)
        return self._variation(x, w.expand(x.shape[:-1]))

    forward = value

    @abstractmethod
    def _value(self, x: Tensor, w: Tensor) -> Tensor: ...

    def _velocity(self, x: Tensor, w: Tensor) -> Tensor:
        g = _autodiff.gradient(lambda z: self._value(z, w), x)
        some = (w > 0).unsqueeze(-1)
        return -torch.where(some, g / torch.where(some, w.unsqueeze(-1), 1.0), 0.0)

    def _variation(self, x: Tensor, w: Tensor) -> Tensor:
        return _autodiff.gradient(lambda z: self._value(x, z), w)

    def terms(self) -> list[tuple[float | Tensor, "Energy"]]:
        """Return what it is the sum of, with coefficients."""
        return [(1.0, self)]

    def __add__(self, other: "Energy") -> "Energy":
        if not isinstance(other, Energy):
            return NotImplemented
        return Sum(self.terms() + other.terms())

    def __mul__(self, c: float | Tensor) -> "Energy":
        return Sum([(c * a, e) for a, e in self.terms()])

    __rmul__ = __mul__

    def __neg__(self) -> "Energy":
        return self * -1.0

    def __sub__(self, other: "Energy") -> "Energy":
        return self + -other


class Sum(Energy):
    """A linear combination of energies."""

    def __init__(self, terms: list[tuple[float | Tensor, Energy]]):
        super().__init__()
        self.coefficients = [c for c, _ in terms]
        self.parts = nn.ModuleList([e for _, e in terms])
        self.exact = all(e.exact for _, e in terms)

    def terms(self) -> list[tuple[float | Tensor, Energy]]:
        return list(zip(self.coefficients, self.parts, strict=True))  # pyright: ignore

    def _value(self, x: Tensor, w: Tensor) -> Tensor:
        return sum((c * e._value(x, w) for c, e in self.terms()), x.new_zeros(()))

    def _velocity(self, x: Tensor, w: Tensor) -> Tensor:
        return sum((c * e._velocity(x, w) for c, e in self.terms()), x.new_zeros(()))

    def _variation(self, x: Tensor, w: Tensor) -> Tensor:
        return sum((c * e._variation(x, w) for c, e in self.terms()), x.new_zeros(()))


class Potential(Energy):
    r"""The potential energy :math:`\int V\,d\rho` of ``V: (..., d) -> (...)``."""

    def __init__(self, V: Callable[[Tensor], Tensor]):
        super().__init__()
        self.V = V

    def _value(self, x: Tensor, w: Tensor) -> Tensor:
        return (w * self.V(x)).sum(-1)

    def _velocity(self, x: Tensor, w: Tensor) -> Tensor:
        return -_autodiff.gradient(self.V, x)

    def _variation(self, x: Tensor, w: Tensor) -> Tensor:
        return self.V(x).expand(x.shape[:-1])


class Interaction(Energy):
    r"""The interaction :math:`\frac12\sum_{i \ne j} w_iw_jW(x_i - x_j)` of an even function ``W``.

    A particle does not meet itself, so that ``W`` may be singular at 0, where it is not called.
    Blocks of rows: memory O(N d), by recomputation.
    """

    def __init__(self, W: Callable[[Tensor], Tensor]):
        super().__init__()
        self.W = W

    def _pairs(self, f: Callable[[Tensor], Tensor], x: Tensor, w: Tensor) -> Tensor:
        n, d = x.shape[-2:]

        def rows(part: Tensor, start: int) -> Tensor:
            i = torch.arange(start, start + part.shape[-2], device=x.device)
            own = (i.unsqueeze(-1) == torch.arange(n, device=x.device)).unsqueeze(-1)
            z = torch.where(own, 1.0, part.unsqueeze(-2) - x.unsqueeze(-3))
            return (torch.where(own, 0.0, f(z)) * w[..., None, :, None]).sum(-2)

        return kernel_sums.by_rows(rows, x, n * d * max(1, x[..., 0, 0].numel()))

    def _potential(self, x: Tensor, w: Tensor) -> Tensor:
        return self._pairs(lambda z: self.W(z).unsqueeze(-1), x, w).squeeze(-1)

    def _value(self, x: Tensor, w: Tensor) -> Tensor:
        return (w * self._potential(x, w)).sum(-1) / 2

    def _velocity(self, x: Tensor, w: Tensor) -> Tensor:
        return -self._pairs(lambda z: _autodiff.gradient(self.W, z), x, w)

    def _variation(self, x: Tensor, w: Tensor) -> Tensor:
        return self._potential(x, w)


class Entropy(Energy):
    r"""The negative entropy :math:`\int\rho\log\rho`, whose velocity is minus a score.

    Particles have no density; ``score`` says how it is estimated.

    - ``"gaussian"``: of the Gaussian of the same moments, exactly: velocity
      :math:`S^{-1}(x - m)`. Biased unless the law is Gaussian; needs more than ``d`` particles,
      or a ``ridge`` that is added to ``S``.
    - ``"kde"``: the score of a kernel density estimate. Smooths by the width ``h``: for the
      target N(b, Q) it comes to rest at covariance :math:`Q - hI`. No gradient of any energy
      of finitely many particles (``exact`` is false).
    - ``"blob"``: the gradient of :math:`\sum_i w_i\log(\phi_h * \rho)(x_i)`, Carrillo, Craig and
      Patacchini (2019): the former and a second sum. The same value, the same order of bias.
    - ``"stein"``: Li and Turner (2018), :math:`(KW + \eta)^{-1}` of the kernel's gradients.
      Shrinks the score by the ``ridge`` :math:`\eta`; O(N^3); its value is that of ``"kde"``
      (``exact`` is false).

    ``bandwidth`` is the variance of the kernel or a rule; a rule counts as a constant in
    derivatives.
    """

    def __init__(
        self,
        score: str = "blob",
        bandwidth: kernels.Width = "median",
        ridge: float | None = None,
    ):
        super().__init__()
        if score not in SCORES:
            raise ValueError(f"Entropy: unknown score {score!r}, expected one of {SCORES}")
        self.score, self.exact = score, score in ("gaussian", "blob")
        self.kernel = kernels.Gaussian(bandwidth)
        self.ridge = ridge if ridge is not None else 1e-3 if score == "stein" else 0.0

    def _moments(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        if self.ridge == 0 and x.shape[-2] <= x.shape[-1]:
            raise GeometryError(
                f"Entropy: {x.shape[-2]} particles in {x.shape[-1]} dimensions have a singular "
                "covariance, expected more particles or a ridge"
            )
        m, S = gaussian.moments(x, w)
        return m, S + self.ridge * gaussian.eye_like(S)

    def log_density(self, x: Tensor, w: Tensor) -> Tensor:
        """Return the logarithm ``(..., N)`` of the kernel density estimate at the particles."""
        h = self.kernel.width(x)
        constant = x.shape[-1] / 2 * (2 * math.pi * h).log()
        return kernel_sums.gaussian_log_sum(x, x, h, w) - constant.unsqueeze(-1)

    def _value(self, x: Tensor, w: Tensor) -> Tensor:
        if self.score == "gaussian":
            return gaussian.negentropy(self._moments(x, w)[1])
        return (w * self.log_density(x, w)).sum(-1)

    def _variation(self, x: Tensor, w: Tensor) -> Tensor:
        if self.score in ("kde", "stein"):
            return self.log_density(x, w)
        return super()._variation(x, w)

    def _velocity(self, x: Tensor, w: Tensor) -> Tensor:
        if self.score == "gaussian":
            m, S = self._moments(x, w)
            return (x - m.unsqueeze(-2)) @ gaussian.inverse(S)
        if self.score == "stein":
            return self._stein(x, w)
        h = self.kernel.width(x)
        centre = x.mean(-2, keepdim=True).detach()
        z = x - centre
        v = (z - kernel_sums.gaussian_mean(z, z, z, h, w)) / h[..., None, None]
        if self.score == "blob":
            total = kernel_sums.gaussian_log_sum(x, x, h, w)  # at least log w_i
            some = w > 0
            ratio = torch.where(some, torch.where(some, w, 1.0).log() - total, 0.0).exp()
            weight = torch.where(some, ratio, 0.0)
            v = v - kernels.Gaussian(h).gradient_sum(x, x, weight)
        return v

    def _stein(self, x: Tensor, w: Tensor) -> Tensor:
        kernel = self.kernel.frozen(x)
        K = kernel(x, x)
        r = kernel.repulsion(x, x, w.expand(x.shape[:-1]))
        root = w.expand(x.shape[:-1]).unsqueeze(-1)
        some = root > 0
        root = torch.where(some, torch.where(some, root, 1.0).sqrt(), 0.0)
        # (K W + eta) s = -r by a symmetric system that stands weights of zero
        inner = root * K * root.mT + self.ridge * gaussian.eye_like(K)
        return (r - K @ (root * linalg.solve(inner, root * r))) / self.ridge


def KL(
    log_prob: Callable[[Tensor], Tensor],
    score: str = "blob",
    bandwidth: kernels.Width = "median",
    ridge: float | None = None,
) -> Energy:
    r"""Return :math:`\mathrm{KL}(\rho\,|\,\pi)`, up to the constant that ``log_prob`` lacks."""
    return Potential(lambda x: -log_prob(x)) + Entropy(score, bandwidth, ridge)


class Power(Energy):
    r"""The internal energy :math:`\frac1{m-1}\int\rho^m`, by blobs; its flow is porous medium.

    .. math:: E = \frac1{m - 1}\sum_i w_i\,(\phi_h * \rho)(x_i)^{m - 1}

    ``m = 1`` is the entropy. Carrillo, Craig and Patacchini (2019).
    """

    def __init__(self, m: float, bandwidth: kernels.Width):
        super().__init__()
        if not m > 1:
            raise ValueError(f"Power: m is {m}, expected more than 1; use Entropy for m = 1")
        self.m = m
        self.kernel = kernels.Gaussian(bandwidth)

    def _density(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        h = self.kernel.width(x)
        c = (2 * math.pi * h).pow(-x.shape[-1] / 2).unsqueeze(-1)
        w = w.expand(x.shape[:-1]).unsqueeze(-1)
        return c, c * kernel_sums.gaussian_sum(x, x, w, h).squeeze(-1)

    def _value(self, x: Tensor, w: Tensor) -> Tensor:
        return (w * self._density(x, w)[1].pow(self.m - 1)).sum(-1) / (self.m - 1)

    def _velocity(self, x: Tensor, w: Tensor) -> Tensor:
        c, p = self._density(x, w)
        p = torch.where(p > 0, p, torch.finfo(x.dtype).tiny).pow(self.m - 2)
        w = w.expand(x.shape[:-1])
        kernel = self.kernel.frozen(x)
        own = p.unsqueeze(-1) * kernel.gradient_sum(x, x, w)
        return -c.unsqueeze(-1) * (own + kernel.gradient_sum(x, x, w * p))


class MMD(Energy):
    r"""Half the squared maximum mean discrepancy to ``y (..., M, d)`` with weights ``u``.

    .. math:: \tfrac12\|\textstyle\sum_i w_ik(x_i, \cdot) - \sum_j u_jk(y_j, \cdot)\|^2

    A kernel whose width is a rule takes it from ``y``. With ``kernels.Distance`` it is the
    energy distance.
    """

    def __init__(self, y: Tensor, kernel: kernels.Kernel, u: Tensor | None = None):
        super().__init__()
        self.y, self.u = check_particles("MMD", y, u)
        self.kernel = kernel.frozen(y)

    def _value(self, x: Tensor, w: Tensor) -> Tensor:
        y, u = self.y, self.u.expand(self.y.shape[:-1])
        a, b = w.expand(x.shape[:-1]).unsqueeze(-1), u.unsqueeze(-1)
        own = self.kernel.sum(x, x, a) - 2 * self.kernel.sum(x, y, b)
        return ((a * own).sum((-1, -2)) + (b * self.kernel.sum(y, y, b)).sum((-1, -2))) / 2

    def _velocity(self, x: Tensor, w: Tensor) -> Tensor:
        u = self.u.expand(self.y.shape[:-1])
        own = self.kernel.gradient_sum(x, x, w.expand(x.shape[:-1]))
        return self.kernel.gradient_sum(x, self.y, u) - own

    def _variation(self, x: Tensor, w: Tensor) -> Tensor:
        a = w.expand(x.shape[:-1]).unsqueeze(-1)
        own = self.kernel.sum(x, x, a)
        u = self.u.expand(self.y.shape[:-1]).unsqueeze(-1)
        return (own - self.kernel.sum(x, self.y, u)).squeeze(-1)


class SlicedW2(Energy):
    r"""Half the squared Wasserstein distance to ``y (M, d)``, averaged over lines.

    ``directions`` is their number or the unit vectors ``(L, d)``. Sorting makes it piecewise
    smooth. Any numbers and weights: the sorted masses are cut at each other's ends. An equal
    number of equally weighted particles moves each to its partner.
    """

    def __init__(
        self,
        y: Tensor,
        directions: int | Tensor = 64,
        u: Tensor | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.y, self.u = check_particles("SlicedW2", y, u)
        if isinstance(directions, int):
            shape = (directions, y.shape[-1])
            directions = torch.randn(shape, dtype=y.dtype, device=y.device, generator=generator)
            directions = directions / directions.norm(dim=-1, keepdim=True)
        self.directions = directions

    def _sorted(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        s = (x @ self.directions.mT).mT.contiguous()  # (..., L, N)
        s, order = s.sort(-1)
        mass = w.unsqueeze(-2).expand(s.shape).gather(-1, order)
        return s, mass.cumsum(-1)

    def _value(self, x: Tensor, w: Tensor) -> Tensor:
        s, p = self._sorted(x, w)
        t, q = self._sorted(self.y, self.u)
        lead = torch.broadcast_shapes(s.shape[:-1], t.shape[:-1])
        s, p = (a.expand(*lead, a.shape[-1]) for a in (s, p))
        t, q = (a.expand(*lead, a.shape[-1]) for a in (t, q))
        cuts = torch.cat([p, q], -1).sort(-1).values
        length = cuts.diff(dim=-1, prepend=torch.zeros_like(cuts[..., :1]))
        middle = (cuts - length / 2).detach()
        i = torch.searchsorted(p.detach().contiguous(), middle).clamp_max(s.shape[-1] - 1)
        j = torch.searchsorted(q.detach().contiguous(), middle).clamp_max(t.shape[-1] - 1)
        return (length * (s.gather(-1, i) - t.gather(-1, j)).square()).sum(-1).mean(-1) / 2
