r"""Entropic optimal transport with the cost half the squared distance, and its debiased divergence.

.. math:: \mathrm{OT}_s(\alpha, \beta) = \min_\pi \int\tfrac12|x - y|^2\,d\pi +
          s^2\,\mathrm{KL}(\pi\,|\,\alpha \otimes \beta), \qquad
          S = \mathrm{OT}(\alpha, \beta) - \tfrac12\mathrm{OT}(\alpha, \alpha)
              - \tfrac12\mathrm{OT}(\beta, \beta)

``s`` is ``blur``, a length. Each half step is a log-sum-exp of attention and each barycentric map
attention itself, so that memory is linear in the number of particles. Derivatives are those of
the optimum, by the envelope theorem: nothing is kept of the iterations. Feydy et al. (2019).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from darboux import _checks
from darboux._checks import ConvergenceError
from darboux.flows import kernel_sums
from darboux.flows.energies import Energy, check_particles


class Potentials(NamedTuple):
    """Dual potentials ``f (..., N)`` and ``g (..., M)``, and the error in the first marginal."""

    f: Tensor
    g: Tensor
    residual: Tensor
    iterations: int


def soft_min(x: Tensor, y: Tensor, g: Tensor, b: Tensor, eps: Tensor) -> Tensor:
    r"""Return :math:`-\epsilon\log\sum_j b_je^{(g_j - |x_i - y_j|^2/2)/\epsilon}`."""
    q, k = kernel_sums.gaussian_logits(x, y, eps, b, g / eps)
    return -eps * kernel_sums.log_sum(q, k)


def barycentric_map(x: Tensor, y: Tensor, g: Tensor, b: Tensor, eps: Tensor) -> Tensor:
    r"""Return :math:`T(x_i) = \sum_j \pi_{ij}y_j/\sum_j \pi_{ij}`, ``(..., N, d)``."""
    centre = y.mean(-2, keepdim=True).detach()
    q, k = kernel_sums.gaussian_logits(x, y, eps, b, g / eps)
    return kernel_sums.attend(q, k, y - centre) + centre


def _schedule(x: Tensor, y: Tensor, blur: float, scaling: float) -> list[float]:
    points = torch.cat([_checks.values(x).flatten(0, -2), _checks.values(y).flatten(0, -2)])
    size = float((points.amax(0) - points.amin(0)).norm())
    out, s = [], max(size, blur)
    while s > blur:
        out.append(s**2)
        s *= scaling
    return [*out, blur**2]


def potentials(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    blur: float,
    *,
    scaling: float = 0.5,
    tol: float | None = 1e-4,
    max_iter: int = 1000,
) -> Potentials:
    """Solve the dual problem, by averaged half steps of falling blur first; no part of any graph.

    Stops where the first marginal is right to ``tol`` in total variation, and raises
    ``ConvergenceError`` after ``max_iter`` steps; ``tol=None`` makes the steps of the schedule
    only.
    """
    with torch.no_grad():
        x, y, a, b = (z.detach() for z in (x, y, a, b))
        a, b = a.expand(x.shape[:-1]), b.expand(y.shape[:-1])
        own = x is y or (x.shape == y.shape and torch.equal(x, y) and torch.equal(a, b))
        schedule = _schedule(x, y, blur, scaling)
        eps = x.new_tensor(schedule[0])
        f = soft_min(x, y, torch.zeros_like(b), b, eps)
        g = f if own else soft_min(y, x, torch.zeros_like(a), a, eps)
        made, defect = 0, torch.full_like(f[..., 0], torch.inf)
        while True:
            last = made >= len(schedule) - 1
            eps = x.new_tensor(schedule[min(made, len(schedule) - 1)])
            new_f = soft_min(x, y, g, b, eps)
            new_g = new_f if own or last else soft_min(y, x, f, a, eps)
            # the mass that row i lacks or has too much is a (e^{(f - new_f)/eps} - 1)
            defect = (a * ((f - new_f) / eps).clamp_max(50.0).expm1().abs()).sum(-1)
            if own or not last:
                f, g = (f + new_f) / 2, (g + new_g) / 2
            else:  # one after the other: a mode that shrinks by s each time shrinks by s^2
                f = new_f
                g = soft_min(y, x, f, a, eps)
            made += 1
            if last and (tol is None or bool((defect <= tol).all())):
                break
            if made >= max_iter + len(schedule):
                raise ConvergenceError(
                    f"sinkhorn: the marginal is off by {float(defect.max()):.1e} after {made} "
                    f"steps with blur {blur:g}, expected {tol:g}: raise blur, tol or max_iter",
                    residual=float(defect.max()),
                    iterations=made,
                )
    return Potentials(f, g, defect, made)


class SinkhornDivergence(Energy):
    r"""The debiased entropic divergence to ``y (..., M, d)`` with weights ``u``.

    The velocity is :math:`T_{xy}(x_i) - T_{xx}(x_i)`, a difference of barycentric maps.
    Derivatives of the value in particles and weights are exact at convergence; those of the
    velocity hold the potentials fixed.
    """

    def __init__(
        self,
        y: Tensor,
        blur: float = 0.05,
        u: Tensor | None = None,
        *,
        scaling: float = 0.5,
        tol: float | None = 1e-4,
        max_iter: int = 1000,
    ):
        super().__init__()
        if not blur > 0:
            raise ValueError(f"SinkhornDivergence: blur is {blur}, expected a positive length")
        if not 0 < scaling < 1:
            raise ValueError(f"SinkhornDivergence: scaling is {scaling}, expected 0 < scaling < 1")
        self.y, self.u = check_particles("SinkhornDivergence", y, u)
        self.blur = blur
        self.options = {"scaling": scaling, "tol": tol, "max_iter": max_iter}

    def _solve(self, x: Tensor, w: Tensor, y: Tensor, u: Tensor) -> Potentials:
        if _checks.in_transform():
            raise NotImplementedError(
                "SinkhornDivergence: the iterations stop on data and do not run under torch.func; "
                "use torch.autograd"
            )
        return potentials(x, y, w, u, self.blur, **self.options)

    def _dual(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        # potentials as functions of their own particles, the others held: f_xy - f_xx, g_yx - g_yy
        y, u = self.y, self.u
        eps = x.new_tensor(self.blur**2)
        xy, xx = self._solve(x, w, y, u), self._solve(x, w, x, w)
        yy = self._solve(y, u, y, u)
        still_x, still_w = x.detach(), w.detach().expand(x.shape[:-1])
        still_y, still_u = y.detach(), u.detach().expand(y.shape[:-1])
        f = soft_min(x, still_y, xy.g, still_u, eps) - soft_min(x, still_x, xx.g, still_w, eps)
        g = soft_min(y, still_x, xy.f, still_w, eps) - soft_min(y, still_y, yy.g, still_u, eps)
        return f, g

    def _value(self, x: Tensor, w: Tensor) -> Tensor:
        f, g = self._dual(x, w)
        return (w * f).sum(-1) + (self.u * g).sum(-1)

    def _velocity(self, x: Tensor, w: Tensor) -> Tensor:
        w = w.expand(x.shape[:-1])
        u = self.u.expand(self.y.shape[:-1])
        eps = x.new_tensor(self.blur**2)
        g = self._solve(x, w, self.y, u).g
        own = self._solve(x, w, x, w).g
        return barycentric_map(x, self.y, g, u, eps) - barycentric_map(x, x, own, w, eps)

    def _variation(self, x: Tensor, w: Tensor) -> Tensor:
        return self._dual(x, w)[0]
