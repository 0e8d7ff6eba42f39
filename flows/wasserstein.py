r"""Particles that flow down an energy of measures: a metric, and a dynamics.

The energy gives a force :math:`u = -\nabla\frac{\delta E}{\delta\rho}` at the particles, the
metric turns it into a velocity, and the dynamics steps. Along every gradient flow
:math:`\frac{dE}{dt} = -\sum_i w_i\,u_i \cdot \dot x_i`. Particles are ``(..., N, d)``; leading
dimensions are independent flows. On a manifold the energy is a function of the coordinates of its
points; estimates of entropy hold in R^d only.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from darboux import _autodiff, _checks
from darboux._checks import ConvergenceError
from darboux.flows import _stepping, gaussian, kernels, proximal
from darboux.flows.energies import KL, Energy, Entropy, Sum, check_particles
from darboux.manifolds import Manifold


class Metric:
    """How a force becomes a velocity. Subclasses define ``lift``."""

    manifold: Manifold | None = None

    def lift(self, x: Tensor, w: Tensor, u: Tensor) -> Tensor:
        """Return the velocity ``G(x) u``, linear in ``u (..., N, d)``."""
        raise NotImplementedError

    def force(self, energy: Energy, x: Tensor, w: Tensor) -> Tensor:
        """Return the force ``u`` of the energy at the particles."""
        return energy._velocity(x, w)

    def velocity(self, energy: Energy, x: Tensor, w: Tensor) -> Tensor:
        """Return the velocity of the gradient flow."""
        return self.lift(x, w, self.force(energy, x, w))

    def rate(self, energy: Energy, x: Tensor, w: Tensor) -> Tensor:
        """Return the velocity of the weights."""
        return torch.zeros_like(w)

    def bend(self, x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        r"""Return :math:`-\frac1{w_i}\partial_{x_i}\frac12\sum_j w_jv_j \cdot (Gv)_j`."""
        return torch.zeros_like(v)

    def inner(self, x: Tensor, w: Tensor, u: Tensor, v: Tensor) -> Tensor:
        r"""Return :math:`\sum_i w_i\,u_i \cdot (Gv)_i`, shape ``(...)``."""
        return (w * (u * self.lift(x, w, v)).sum(-1)).sum(-1)


class W2(Metric):
    """The Wasserstein metric, on R^d or on a ``manifold`` with its exp and transport."""

    def __init__(self, manifold: Manifold | None = None):
        self.manifold = manifold

    def lift(self, x: Tensor, w: Tensor, u: Tensor) -> Tensor:
        return u

    def force(self, energy: Energy, x: Tensor, w: Tensor) -> Tensor:
        u = energy._velocity(x, w)
        return u if self.manifold is None else self.manifold._sharp(x, u)

    def inner(self, x: Tensor, w: Tensor, u: Tensor, v: Tensor) -> Tensor:
        inner = (u * v).sum(-1) if self.manifold is None else self.manifold._inner(x, u, v)
        return (w * inner).sum(-1)


class KalmanW2(Metric):
    r"""The Kalman-Wasserstein metric: :math:`G = S + \lambda I` with the covariance ``S``.

    Invariant under affine maps when ``ridge`` (:math:`\lambda`) is 0. An explicit step must be
    below 2 over the largest eigenvalue of ``S`` times the Hessian.
    """

    def __init__(self, ridge: float = 0.0):
        if not ridge >= 0:
            raise ValueError(f"KalmanW2: ridge is {ridge}, expected at least 0")
        self.ridge = ridge

    def lift(self, x: Tensor, w: Tensor, u: Tensor) -> Tensor:
        return u @ gaussian.moments(x, w).cov + self.ridge * u

    def bend(self, x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        second = v.mT @ (w.unsqueeze(-1) * v)
        return -(x - (w.unsqueeze(-1) * x).sum(-2, keepdim=True)) @ second


class Stein(Metric):
    r"""The Stein metric of a kernel: :math:`(Gu)_i = \sum_j w_jk(x_i, x_j)u_j`.

    In a gradient flow an :class:`Entropy` of any score acts through the derivative of the
    kernel, :math:`\sum_j w_j\nabla_{x_j}k(x_i, x_j)`, which needs no density: Stein variational
    gradient descent, Liu and Wang (2016).
    """

    def __init__(self, kernel: kernels.Kernel | None = None):
        self.kernel = kernels.Gaussian("median") if kernel is None else kernel

    def lift(self, x: Tensor, w: Tensor, u: Tensor) -> Tensor:
        return self.kernel.frozen(x).sum(x, x, w.unsqueeze(-1) * u)

    def velocity(self, energy: Energy, x: Tensor, w: Tensor) -> Tensor:
        kernel = self.kernel.frozen(x)
        rest = Sum([(c, e) for c, e in energy.terms() if not isinstance(e, Entropy)])
        share = sum(c for c, e in energy.terms() if isinstance(e, Entropy))
        u = rest._velocity(x, w)
        if isinstance(kernel, kernels.Gaussian) and type(kernel) is kernels.Gaussian:
            # one pass: sum_j w_j k_ij (u_j - c x_j/h, c/h), centred against cancellation
            c = share / kernel.width(x)[..., None, None]
            z = x - x.mean(-2, keepdim=True).detach()
            b = torch.cat([u - c * z, torch.ones_like(z[..., :1])], -1)
            s = kernel.sum(z, z, w.unsqueeze(-1) * b)
            return s[..., :-1] + c * s[..., -1:] * z
        v = kernel.sum(x, x, w.unsqueeze(-1) * u)
        return v + share * kernel.repulsion(x, x, w.expand(x.shape[:-1]))

    def bend(self, x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        # sum_j w_j (v_i . v_j) grad_1 k_ij: the derivative of the sum in its first place alone
        kernel, b = self.kernel.frozen(x), w.unsqueeze(-1) * v
        return -_autodiff.pullback(lambda z: kernel.sum(z, x, b), x, lambda _: v)[1]


class FisherRao(Metric):
    r"""The Fisher-Rao metric: weights react, :math:`\dot w_i = -\beta w_i(\phi_i - \bar\phi)`.

    ``phi`` is the first variation. With ``transport`` the particles move in that metric as well
    (Wasserstein-Fisher-Rao). See :func:`resample` for births and deaths.
    """

    def __init__(self, beta: float = 1.0, transport: Metric | None = None):
        self.beta, self.transport = beta, transport
        self.manifold = None if transport is None else transport.manifold

    def lift(self, x: Tensor, w: Tensor, u: Tensor) -> Tensor:
        return torch.zeros_like(u) if self.transport is None else self.transport.lift(x, w, u)

    def velocity(self, energy: Energy, x: Tensor, w: Tensor) -> Tensor:
        if self.transport is None:
            return torch.zeros_like(x)
        return self.transport.velocity(energy, x, w)

    def rate(self, energy: Energy, x: Tensor, w: Tensor) -> Tensor:
        phi = energy._variation(x, w)
        return -self.beta * w * (phi - (w * phi).sum(-1, keepdim=True))


# -- gradient flow ---------------------------------------------------------------------------


class ParticleFlow(NamedTuple):
    """Times ``t (time,)``, particles ``x (time, ..., N, d)``, weights, velocities, energies."""

    t: Tensor
    x: Tensor
    w: Tensor
    v: Tensor | None
    energy: Tensor | None


class _Record:
    def __init__(self, energy: Energy, keep: bool, x: Tensor):
        self.energy, self.keep, self.rows = energy, keep, []
        self.reach = 1e6 * (1.0 + float(_checks.values(x).abs().max()))

    def add(self, t: float, x: Tensor, w: Tensor, v: Tensor | None = None) -> None:
        e = self.energy._value(x, w) if self.keep else None
        self.rows.append((t, x, w, v, e))

    def flow(self) -> ParticleFlow:
        t, x, w, v, e = zip(*self.rows, strict=True)
        stack = [None if part[0] is None else torch.stack(part) for part in (x, w, v, e)]
        times = torch.tensor(t, dtype=stack[0].dtype, device=stack[0].device)  # pyright: ignore
        return ParticleFlow(times, *stack)  # pyright: ignore

    def watch(self, where: str, step: int, dt: float, x: Tensor, f: Callable) -> None:
        """Raise where the particles have left, with the bound on the step and the good part."""
        if not _checks.checks_values():
            return
        far = _checks.values(x).abs().max()
        if bool(far <= self.reach):
            return
        start = self.rows[0]
        message = f"{where}: particles left every bound in step {step} with dt={dt:g}"
        if not _checks.in_transform():
            bound = 2 / max(_stiffness(lambda z: f(z, start[2]), start[1]), 1e-300)
            message += f"; at the start an explicit Euler step is stable below about {bound:.2g}"
        error = ConvergenceError(message, iterations=step)
        error.trajectory = self.flow()
        raise error


def _stiffness(f: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Return the largest rate of the field at ``x``, by twenty power iterations."""
    with torch.no_grad():
        x = x.detach()
        e = torch.cos(torch.arange(x.numel(), dtype=x.dtype, device=x.device)).reshape(x.shape)
        size = torch.finfo(x.dtype).eps ** 0.5 * (1 + x.norm())
        f0, rate = f(x), 0.0
        for _ in range(20):
            df = (f(x + size * e / e.norm()) - f0) / size
            rate, e = float(df.norm()), df
            if not 0 < rate < math.inf:
                break
        return rate


def gradient_flow(
    energy: Energy,
    x: Tensor,
    *,
    dt: float,
    steps: int,
    w: Tensor | None = None,
    metric: Metric | None = None,
    method: str = "euler",
    rtol: float = 1e-6,
    atol: float = 1e-8,
    save_every: int = 1,
    record_energy: bool = True,
) -> ParticleFlow:
    r"""Follow the gradient flow of ``energy`` for ``steps`` steps of ``dt``; differentiable.

    ``method``: ``"euler"``, ``"heun"``, ``"rk4"``; ``"adaptive"`` (order 3(2)), which divides
    each ``dt`` as the tolerances ask; or ``"jko"``, for W2 on R^d and exact energies, implicit
    of order 1 and stable for every ``dt``. On a manifold ``"euler"`` steps along geodesics and
    is the only one. Raises ``ConvergenceError`` where the particles leave every bound, with the
    ``trajectory`` so far and the step that is stable.

    >>> from darboux.flows.energies import Potential
    >>> E = Potential(lambda x: x.square().sum(-1) / 2)
    >>> gradient_flow(E, torch.ones(1, 2), dt=0.5, steps=2).x[:, 0, 0]
    tensor([1.0000, 0.5000, 0.2500])
    """
    where = "gradient_flow"
    x, w, metric = _start(where, x, w, metric, dt, steps, save_every)
    methods = [*_stepping.TABLEAUS, "jko"]
    if method not in methods:
        raise ValueError(f"{where}: unknown method {method!r}, expected one of {methods}")
    if method == "jko" and not isinstance(metric, W2):
        raise ValueError(
            f"{where}: method is 'jko' with {type(metric).__name__}, expected the metric W2"
        )
    if metric.manifold is not None and method != "euler":
        raise ValueError(f"{where}: method is {method!r}, expected 'euler' on a manifold")
    table = _stepping.TABLEAUS["euler" if method == "jko" else method]
    weighs = isinstance(metric, FisherRao)

    def field(_: float, y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, w = y
        rate = metric.rate(energy, x, w) if weighs else torch.zeros_like(w)
        return metric.velocity(energy, x, w), rate

    record, part = _Record(energy, record_energy, x), dt
    record.add(0.0, x, w)
    for k in range(1, steps + 1):
        if method == "jko":
            x = proximal.jko_step(energy, x, dt, w=w)
        elif table.error is not None:
            (x, w), part = _adaptively(table, field, (x, w), dt, part, rtol, atol)
        elif metric.manifold is None:
            x, w = _stepping.step(table, field, 0.0, (x, w), dt)[0]
        else:
            v, rate = field(0.0, (x, w))
            x, w = metric.manifold._exp(x, dt * v), w + dt * rate
        record.watch(where, k, dt, x, lambda x, w: metric.velocity(energy, x, w))
        if k % save_every == 0:
            record.add(k * dt, x, w)
    return record.flow()


def _start(
    where: str,
    x: Tensor,
    w: Tensor | None,
    metric: Metric | None,
    dt: float,
    steps: int,
    save_every: int,
) -> tuple[Tensor, Tensor, Metric]:
    x, w = check_particles(where, x, w)
    if not 0 < dt < math.inf:
        raise ValueError(f"{where}: dt is {dt}, expected a positive number")
    if steps < 0 or save_every < 1:
        raise ValueError(
            f"{where}: got steps={steps} and save_every={save_every}, expected at least 0 and 1"
        )
    return x, w.expand(x.shape[:-1]), W2() if metric is None else metric


def _adaptively(
    table: _stepping.Tableau,
    field: _stepping.Field,
    y: tuple[Tensor, ...],
    span: float,
    part: float,
    rtol: float,
    atol: float,
) -> tuple[tuple[Tensor, ...], float]:
    assert table.error is not None
    done, tries = 0.0, 0
    while done < span * (1 - 1e-12):
        h = min(part, span - done)
        new, slopes = _stepping.step(table, field, 0.0, y, h)
        zero = tuple(torch.zeros_like(a) for a in y)
        error = _stepping.combine(zero, table.error, slopes, h)
        size = 0.0
        for e, a, b in zip(error, y, new, strict=True):
            e, a, b = (_checks.values(z) for z in (e, a, b))
            scale = atol + rtol * torch.maximum(a.abs(), b.abs())
            size = max(size, float((e / scale).abs().nan_to_num(torch.inf, torch.inf).max()))
        tries += 1
        if size <= 1:
            y, done = new, done + h
        factor = 0.9 * max(size, 1e-8) ** (-1 / 3)
        grown = h * min(5.0, max(0.2, factor))
        part = max(grown, part) if size <= 1 and h < part else grown
        if tries > 10_000 or part < 1e-14 * span:
            raise ConvergenceError(
                f"gradient_flow: the step fell to {part:.1e} of {span:g}: singular or too stiff",
                residual=size,
                iterations=tries,
            )
    return y, part


def svgd(
    log_prob: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    dt: float,
    steps: int,
    kernel: kernels.Kernel | None = None,
    save_every: int = 1,
) -> ParticleFlow:
    """Move particles to the density ``exp(log_prob)`` by Stein variational gradient descent."""
    return gradient_flow(
        KL(log_prob),
        x,
        dt=dt,
        steps=steps,
        metric=Stein(kernel),
        save_every=save_every,
        record_energy=False,
    )


def dissipation(
    energy: Energy, x: Tensor, w: Tensor | None = None, metric: Metric | None = None
) -> Tensor:
    r"""Return :math:`\sum_i w_iu_i \cdot \dot x_i`, that is -dE/dt where the energy is exact."""
    x, w = check_particles("dissipation", x, w)
    metric = W2() if metric is None else metric
    u = metric.force(energy, x, w)
    return metric.inner(x, w, u, u)


def resample(x: Tensor, w: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return equally weighted particles, copies in proportion to ``w``: systematic, unbiased."""
    x, w = check_particles("resample", x, w)
    n = x.shape[-2]
    shift = torch.rand((*x.shape[:-2], 1), dtype=x.dtype, device=x.device, generator=generator)
    places = (torch.arange(n, dtype=x.dtype, device=x.device) + shift) / n
    ends = w.expand(x.shape[:-1]).cumsum(-1).contiguous()
    pick = torch.searchsorted(ends, places.contiguous() * ends[..., -1:]).clamp_max(n - 1)
    return x.gather(-2, pick.unsqueeze(-1).expand(x.shape))
