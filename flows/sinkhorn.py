r"""Entropic optimal transport with the cost half the squared distance, and its debiased divergence.

.. math:: \mathrm{OT}_s(\alpha, \beta) = \min_\pi \int\tfrac12|x - y|^2\,d\pi +
          s^2\,\mathrm{KL}(\pi\,|\,\alpha \otimes \beta), \qquad
          S = \mathrm{OT}(\alpha, \beta) - \tfrac12\mathrm{OT}(\alpha, \alpha)
              - \tfrac12\mathrm{OT}(\beta, \beta)

``s`` is ``blur``, a length. Each half step is a log-sum-exp of attention and each barycentric map
attention itself, so that memory is linear in the number of particles. Derivatives are those of
the optimum, by the envelope theorem or an implicit solve: nothing is kept of the iterations.
Feydy et al. (2019).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]

from darboux import _checks
from darboux._checks import ConvergenceError
from darboux.flows import _blocks, kernel_sums
from darboux.flows.energies import Energy, check_particles
from darboux.flows.proximal import conjugate_gradients


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


def _both(
    x: Tensor, y: Tensor, f: Tensor, g: Tensor, a: Tensor, b: Tensor, eps: Tensor, own: bool
) -> tuple[Tensor, Tensor]:
    """Return both soft minima, from the marginals of one plan while its sums stay in range."""
    if x.device.type == "cpu" and not _checks.in_transform():
        q, k = kernel_sums.gaussian_logits(x, y, eps, bias=g / eps)
        q[..., -1] += f / eps
        lead = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2])
        q, k = (z.expand(*lead, *z.shape[-2:]) for z in (q, k))
        p, r = (z.expand(*lead, z.shape[-1]) for z in (a, b))
        sums = _blocks.marginals(q, k, p, r, own)
        if all(bool(((s > 1e-12) & (s < 1e12)).all()) for s in sums):
            return f - eps * sums[0].log(), g - eps * sums[1].log()
    new_f = soft_min(x, y, g, b, eps)
    return new_f, new_f if own else soft_min(y, x, f, a, eps)


def barycentric_map(x: Tensor, y: Tensor, g: Tensor, b: Tensor, eps: Tensor) -> Tensor:
    r"""Return :math:`T(x_i) = \sum_j \pi_{ij}y_j/\sum_j \pi_{ij}`, ``(..., N, d)``."""
    centre = y.mean(-2, keepdim=True).detach()
    q, k = kernel_sums.gaussian_logits(x, y, eps, b, g / eps)
    return kernel_sums.attend(q, k, y - centre) + centre


def _diameter(x: Tensor, y: Tensor) -> float:
    lead = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    points = torch.cat([z.expand(*lead, *z.shape[-2:]) for z in (x, y)], -2)
    return float(_checks.values((points.amax(-2) - points.amin(-2)).norm(dim=-1)).max())


def _schedule(size: float, blur: float, scaling: float) -> list[float]:
    out, s = [max(size, blur) ** 2], max(size, blur)
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
    diameter: float | None = None,
) -> Potentials:
    """Solve the dual problem, by averaged half steps of falling blur first; no part of any graph.

    The blur falls from ``diameter``, that of all particles by default, by ``scaling`` each step.
    Stops where the first marginal is right to ``tol`` in total variation, and raises
    ``ConvergenceError`` after ``max_iter`` steps; ``tol=None`` makes the steps of the schedule
    only, as geomloss does. One schedule and one stop serve a whole batch.
    """
    own = x is y and a is b
    if not (own or _checks.in_transform()) and x.shape == y.shape:
        own = torch.equal(x, y) and torch.equal(*torch.broadcast_tensors(a, b))
    with torch.no_grad():
        x, y, a, b = (z.detach() for z in (x, y, a, b))
        a, b = a.expand(x.shape[:-1]), b.expand(y.shape[:-1])
        schedule = _schedule(_diameter(x, y) if diameter is None else diameter, blur, scaling)
        eps = x.new_tensor(schedule[0])
        f = soft_min(x, y, torch.zeros_like(b), b, eps)
        g = f if own else soft_min(y, x, torch.zeros_like(a), a, eps)
        made, defect = 0, torch.full_like(f[..., 0], torch.inf)
        while True:
            last = made >= len(schedule) - 1
            eps = x.new_tensor(schedule[min(made, len(schedule) - 1)])
            alternate = last and tol is not None and not own
            if alternate:
                new_f, new_g = soft_min(x, y, g, b, eps), g
            else:
                new_f, new_g = _both(x, y, f, g, a, b, eps, own)
            # the mass that row i lacks or has too much is a (e^{(f - new_f)/eps} - 1)
            defect = (a * ((f - new_f) / eps).clamp_max(50.0).expm1().abs()).sum(-1)
            if not alternate:
                f, g = (f + new_f) / 2, (g + new_g) / 2
            else:  # one after the other: a mode that shrinks by s each time shrinks by s^2
                f = new_f
                g = soft_min(y, x, f, a, eps)
            made += 1
            if last and (tol is None or bool((_checks.values(defect) <= tol).all())):
                break
            if made >= max_iter + len(schedule):
                off = float(_checks.values(defect).max())
                raise ConvergenceError(
                    f"sinkhorn: the marginal is off by {off:.1e} after {made} "
                    f"steps with blur {blur:g}, expected {tol:g}: raise blur, tol or max_iter",
                    residual=off,
                    iterations=made,
                )
    return Potentials(f, g, defect, made)


class _Root(torch.autograd.Function):
    """A potential that its own half steps reproduce, with the derivative of the fixed point."""

    @staticmethod
    def forward(
        ctx: Any, again: Tensor, g: Tensor, w: Tensor, leaf: Tensor, step: Tensor, own: bool
    ) -> Tensor:
        ctx.save_for_backward(w)
        ctx.own = own
        ctx.leaf, ctx.step = leaf, step  # the same step as a function of the potential alone
        return g.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (w,) = ctx.saved_tensors

        def matrix(m: Tensor) -> Tensor:
            (back,) = torch.autograd.grad(ctx.step, ctx.leaf, w * m, retain_graph=True)
            if ctx.own:
                return w * m - back
            # a constant is free where two potentials share it; the gradient has none
            return w * m - back + w * (w * m).sum(-1, keepdim=True)

        found = w * conjugate_gradients(matrix, grads[0], w, 1)
        return found, None, None, None, None, None


def _attached(
    g: Tensor, x: Tensor, y: Tensor, a: Tensor, b: Tensor, eps: Tensor, own: bool
) -> Tensor:
    """Return the potential at ``y``, with its derivative in particles and weights if asked for."""
    wanted = any(z.requires_grad for z in (x, y, a, b))
    if not (torch.is_grad_enabled() and wanted) or _checks.in_transform():
        return g

    def again(x: Tensor, y: Tensor, a: Tensor, b: Tensor, g: Tensor) -> Tensor:
        f = g if own else soft_min(x, y, g, b, eps)
        return soft_min(y, x, f, a, eps)

    leaf = g.detach().requires_grad_()
    step = again(x.detach(), y.detach(), a.detach(), b.detach(), leaf)
    out = _Root.apply(again(x, y, a, b, g.detach()), g.detach(), b.detach(), leaf, step, own)
    assert isinstance(out, Tensor)
    return out


class SinkhornDivergence(Energy):
    r"""The debiased entropic divergence to ``y (..., M, d)`` with weights ``u``.

    The velocity is :math:`T_{xy}(x_i) - T_{xx}(x_i)`, a difference of barycentric maps.
    Derivatives of the value in particles and weights are exact at convergence, under
    ``torch.func`` too, and hold the potentials fixed if taken twice. Those of the velocity are
    exact, and first ones only; ``torch.func`` has none and says so.
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

    def _solve(self, x: Tensor, w: Tensor, y: Tensor, u: Tensor, size: float) -> Potentials:
        return potentials(x, y, w, u, self.blur, diameter=size, **self.options)

    def _dual(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        # potentials as functions of their own particles, the others held: f_xy - f_xx, g_yx - g_yy
        y, u = self.y, self.u
        eps = x.new_tensor(self.blur**2)
        size = _diameter(x.detach(), y.detach())
        xy, xx = self._solve(x, w, y, u, size), self._solve(x, w, x, w, size)
        yy = self._solve(y, u, y, u, size)
        still_x, still_w = x.detach(), w.detach().expand(x.shape[:-1])
        still_y, still_u = y.detach(), u.detach().expand(y.shape[:-1])
        f = soft_min(x, still_y, xy.g, still_u, eps) - soft_min(x, still_x, xx.g, still_w, eps)
        g = soft_min(y, still_x, xy.f, still_w, eps) - soft_min(y, still_y, yy.g, still_u, eps)
        return f, g

    def _value(self, x: Tensor, w: Tensor) -> Tensor:
        f, g = self._dual(x, w)
        return (w * f).sum(-1) + (self.u * g).sum(-1)

    def _velocity(self, x: Tensor, w: Tensor) -> Tensor:
        if _differentiated(x) or _differentiated(w):
            raise NotImplementedError(
                "SinkhornDivergence.velocity: the derivative of the potentials is a solve that "
                "does not run under torch.func; use torch.autograd"
            )
        w = w.expand(x.shape[:-1])
        y, u = self.y, self.u.expand(self.y.shape[:-1])
        eps = x.new_tensor(self.blur**2)
        size = _diameter(x.detach(), y.detach())
        g = _attached(self._solve(x, w, y, u, size).g, x, y, w, u, eps, False)
        own = _attached(self._solve(x, w, x, w, size).g, x, x, w, w, eps, True)
        return barycentric_map(x, y, g, u, eps) - barycentric_map(x, x, own, w, eps)

    def _variation(self, x: Tensor, w: Tensor) -> Tensor:
        return self._dual(x, w)[0]


def _differentiated(x: Tensor) -> bool:
    # a level of torch.func.grad or jvp at or below the outermost batch
    while _functorch.is_functorch_wrapped_tensor(x):
        if _functorch.is_gradtrackingtensor(x):
            return True
        x = _functorch.get_unwrapped(x)
    return False
