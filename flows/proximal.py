r"""The proximal step of an energy of measures on particles: implicit, and stable at every length.

.. math:: x_{k+1} = \arg\min_x \frac1{2\tau}\sum_i w_i|x_i - x_{k,i}|^2 + E_N(x, w)

Jordan, Kinderlehrer and Otto (1998), with each particle bound to itself, which is the optimal
coupling while particles do not cross. The energy cannot rise, however long ``tau``.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from darboux import _checks
from darboux._checks import ConvergenceError
from darboux.flows.energies import Energy, check_particles


def jko_step(
    energy: Energy,
    x: Tensor,
    tau: float,
    *,
    w: Tensor | None = None,
    tol: float | None = None,
    max_iter: int = 500,
    memory: int = 10,
) -> Tensor:
    r"""Return the particles ``(..., N, d)`` after one proximal step of length ``tau``.

    By L-BFGS with backtracking, in the geometry of the weights. Stops where the root mean square
    of :math:`x - x_k - \tau v(x)` is below ``tol`` (1e-10, float32 1e-4) times the size of the
    cloud, and raises ``ConvergenceError`` otherwise. First derivatives in particles and in
    what the energy hangs on are those of the exact minimum, by the implicit function theorem;
    they need positive weights. Needs an ``exact`` energy, whose velocity is its gradient.
    """
    where = "jko_step"
    x, w = check_particles(where, x, w)
    if not 0 < tau < float("inf"):
        raise ValueError(f"{where}: tau is {tau}, expected a positive number")
    if not energy.exact:
        raise ValueError(
            f"{where}: the velocity of this energy is not its gradient, expected an exact one "
            "(scores 'gaussian' or 'blob')"
        )
    if _checks.in_transform():
        raise NotImplementedError(
            f"{where}: the line search branches on data and does not run under torch.func; use "
            "torch.autograd"
        )
    w = w.expand(x.shape[:-1])
    tol = (1e-4 if x.dtype == torch.float32 else 1e-10) if tol is None else tol
    with torch.no_grad():
        y = _minimise(energy, x.detach(), w.detach(), tau, tol, max_iter, memory)
    if not torch.is_grad_enabled():
        return y
    residual = (y - x) - tau * energy._velocity(y, w)
    if not residual.requires_grad:
        return y
    _checks.check_that(where, lambda: w > 0, "derivatives need positive weights")
    out = _Root.apply(residual, y, w.detach(), energy, tau)
    assert isinstance(out, Tensor)
    return out


def _minimise(
    energy: Energy, start: Tensor, w: Tensor, tau: float, tol: float, max_iter: int, memory: int
) -> Tensor:
    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (w * (a * b).sum(-1)).sum(-1)[..., None, None]

    def value(y: Tensor) -> Tensor:
        return dot(y - start, y - start) / (2 * tau) + energy._value(y, w)[..., None, None]

    def slope(y: Tensor) -> Tensor:  # the gradient in the inner product of the weights
        return (y - start) / tau - energy._velocity(y, w)

    centred = start - start.mean(-2, keepdim=True)
    scale = (
        torch.finfo(start.dtype).tiny
        + dot(centred, centred).sqrt()
        + tau * dot(slope(start), slope(start)).sqrt()
    )
    y, f, g = start, value(start), slope(start)
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    off = torch.full_like(f, torch.inf)
    for _ in range(max_iter):
        off = tau * dot(g, g).sqrt() / scale
        going = off > tol
        if not bool(going.any()):
            return y
        p = -_inverse_hessian(g, pairs, dot, tau)
        p = torch.where(dot(p, g) < 0, p, -tau * g)
        descent, step = dot(p, g), torch.ones_like(f)
        slack = 16 * torch.finfo(f.dtype).eps * f.abs()
        new_y = y + step * p
        new_f = value(new_y)
        good = new_f <= f + 1e-4 * step * descent + slack
        for _ in range(40):
            if bool((good | ~going).all()):
                break
            step = torch.where(good, step, step / 2)
            new_y = y + step * p
            new_f = value(new_y)
            good = new_f <= f + 1e-4 * step * descent + slack
        moved = good & going
        new_y = torch.where(moved, new_y, y)
        new_g = slope(new_y)
        s, d = new_y - y, new_g - g
        curve = dot(s, d)
        # a flow that has stopped, or meets negative curvature, gives no pair
        useful = curve > 1e-10 * dot(s, s) / tau
        pairs = [*pairs, (s, d, torch.where(useful, 1 / torch.where(useful, curve, 1.0), 0.0))]
        pairs = pairs[-memory:]
        if not bool(moved.any()):
            break
        y, f, g = new_y, torch.where(moved, new_f, f), new_g
    worst = float(off.max())
    raise ConvergenceError(
        f"jko_step: the step of length {tau:g} is off by {worst:.1e} of the cloud's size, expected "
        f"{tol:g}: singular energy, or raise tol or max_iter",
        residual=worst,
        iterations=max_iter,
    )


def _inverse_hessian(
    g: Tensor,
    pairs: list[tuple[Tensor, Tensor, Tensor]],
    dot: Callable[[Tensor, Tensor], Tensor],
    tau: float,
) -> Tensor:
    used = []
    for s, d, r in reversed(pairs):
        a = r * dot(s, g)
        g = g - a * d
        used.append(a)
    size = torch.full_like(g[..., :1, :1], tau)
    for s, d, r in pairs:  # the latest scale that is known, per flow
        size = torch.where(r > 0, dot(s, d) / dot(d, d).clamp_min(torch.finfo(d.dtype).tiny), size)
    g = size * g
    for (s, d, r), a in zip(pairs, reversed(used), strict=True):
        g = g + (a - r * dot(d, g)) * s
    return g


class _Root(torch.autograd.Function):
    """The minimum as a function of the residual at it: its derivative is minus the inverse."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, y: Tensor, w: Tensor, energy: Energy, tau: float):
        ctx.save_for_backward(y, w)
        ctx.energy, ctx.tau = energy, tau
        return y.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        y, w = ctx.saved_tensors
        with torch.enable_grad():
            z = y.clone().requires_grad_()
            v = ctx.energy._velocity(z, w)
        if not v.requires_grad:
            return -grads[0], None, None, None, None
        w = w.unsqueeze(-1)

        def hessian(m: Tensor) -> Tensor:  # of the objective, symmetric and positive
            (back,) = torch.autograd.grad(v, z, w * m, retain_graph=True, materialize_grads=True)
            return w * m - ctx.tau * back

        return -w * conjugate_gradients(hessian, grads[0], w, 2), None, None, None, None


def conjugate_gradients(
    matrix: Callable[[Tensor], Tensor], r: Tensor, w: Tensor, dims: int
) -> Tensor:
    """Solve for a symmetric positive ``matrix`` like diag(``w``), batched over leading dimensions.

    The last ``dims`` dimensions of ``r`` are one vector. Entries where ``w`` is 0 stay 0.
    """
    over = tuple(range(-dims, 0))
    some = w > 0
    scale = torch.where(some, 1 / torch.where(some, w, 1.0), 0.0)

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(over, keepdim=True)

    m, p = torch.zeros_like(r), scale * r
    rho = dot(r, p)
    tiny = torch.finfo(r.dtype).tiny
    small = (100 * torch.finfo(r.dtype).eps) ** 2 * rho
    for _ in range(10 * math.prod(r.shape[-dims:])):
        ap = matrix(p)
        bend = dot(p, ap)
        going = (rho > small) & (bend > 0)
        if not bool(going.any()):
            break
        a = torch.where(going, rho / bend.clamp_min(tiny), 0.0)
        m, r = m + a * p, r - a * ap
        q = scale * r
        new = dot(r, q)
        p = torch.where(going, q + new / rho.clamp_min(tiny) * p, 0.0)
        rho = torch.where(going, new, 0.0)
    return m
