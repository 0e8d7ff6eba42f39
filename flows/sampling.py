r"""Particles that sample exactly or move mass by copying: Metropolis steps, births and deaths.

Langevin dynamics without correction is :func:`darboux.flows.accelerated.langevin`; here every
step leaves the target in place, or the number of particles.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from darboux import _autodiff
from darboux.flows.energies import Energy, check_particles
from darboux.flows.wasserstein import resample

DEATHS = ("systematic", "clocks")


class Chains(NamedTuple):
    """Samples ``x (time, ..., N, d)``, and the share of accepted steps ``(..., N)``."""

    x: Tensor
    acceptance: Tensor


def mala_log_ratio(log_prob: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, dt: float) -> Tensor:
    r"""Return :math:`\log\frac{\pi(y)\,q(x \mid y)}{\pi(x)\,q(y \mid x)}` of the proposal
    :math:`q(y \mid x) = N(y;\,x + \tau\nabla\log\pi(x),\,2\tau I)`, shape ``(...)``.

    The step is accepted with probability ``min(1, e^ratio)``; swapping ``x`` and ``y`` flips the
    sign, which is detailed balance.
    """
    return _log_ratio(_with_gradient(log_prob, x), _with_gradient(log_prob, y), x, y, dt)


Point = tuple[Tensor, Tensor]


def _with_gradient(log_prob: Callable[[Tensor], Tensor], x: Tensor) -> Point:
    return _autodiff.pullback(log_prob, x, torch.ones_like)


def _log_ratio(at_x: Point, at_y: Point, x: Tensor, y: Tensor, dt: float) -> Tensor:
    (p, g), (q, h) = at_x, at_y
    there = (y - x - dt * g).square().sum(-1)
    back = (x - y - dt * h).square().sum(-1)
    return q - p + (there - back) / (4 * dt)


def mala(
    log_prob: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    dt: float,
    steps: int,
    generator: torch.Generator | None = None,
    save_every: int = 1,
) -> Chains:
    r"""Run the Metropolis-adjusted Langevin algorithm, one chain per particle of ``(..., N, d)``.

    The law :math:`e^{\mathrm{log\_prob}}` is stationary for every ``dt``; a proposal where it is
    not finite is refused. About 0.57 accepted is best in high dimension (Roberts and Rosenthal
    1998). Derivatives are those of the accepted moves, not of the law.
    """
    where = "mala"
    x, _ = check_particles(where, x, None)
    if not 0 < dt < math.inf or steps < 0 or save_every < 1:
        raise ValueError(
            f"{where}: got dt={dt}, steps={steps}, save_every={save_every}, expected a positive "
            "step, at least 0 and at least 1"
        )
    here, rows, taken = _with_gradient(log_prob, x), [x], torch.zeros_like(x[..., 0])
    if not bool(here[0].isfinite().all()):
        raise ValueError(f"{where}: log_prob is not finite at the start, expected a number")
    for k in range(1, steps + 1):
        noise = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
        y = x + dt * here[1] + math.sqrt(2 * dt) * noise
        there = _with_gradient(log_prob, y)
        u = torch.rand(taken.shape, dtype=x.dtype, device=x.device, generator=generator)
        yes = u.log() < _log_ratio(here, there, x, y, dt)  # false where it is NaN
        x = torch.where(yes.unsqueeze(-1), y, x)
        here = (
            torch.where(yes, there[0], here[0]),
            torch.where(yes.unsqueeze(-1), there[1], here[1]),
        )
        taken = taken + yes
        if k % save_every == 0:
            rows.append(x)
    return Chains(torch.stack(rows), taken / max(1, steps))


def birth_death(
    energy: Energy,
    x: Tensor,
    dt: float,
    *,
    method: str = "systematic",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Return as many equally weighted particles after a time ``dt`` of the Fisher-Rao flow.

    Particles where the first variation :math:`\phi` is above its mean die, others are copied.

    - ``"systematic"``: weights :math:`e^{-\tau\phi_i}`, resampled systematically; the expected
      number of copies is N times the weight, and the number differs from that by less than one.
    - ``"clocks"``: each rings with probability :math:`1 - e^{-\tau|\phi_i - \bar\phi|}`; it then
      becomes a copy of another one, or another one becomes its copy, drawn uniformly. Lu, Lu
      and Nolen (2019). Right to first order in ``dt`` and 1/N.
    """
    where = "birth_death"
    x, w = check_particles(where, x, None)
    if not 0 < dt < math.inf:
        raise ValueError(f"{where}: dt is {dt}, expected a positive number")
    if method not in DEATHS:
        raise ValueError(f"{where}: unknown method {method!r}, expected one of {DEATHS}")
    w = w.expand(x.shape[:-1])
    with torch.no_grad():
        phi = energy._variation(x, w).expand(x.shape[:-1])
        if method == "systematic":
            return resample(x, (-dt * phi).softmax(-1), generator)
        excess = phi - phi.mean(-1, keepdim=True)
        n = x.shape[-2]
        u = torch.rand(phi.shape, dtype=x.dtype, device=x.device, generator=generator)
        rings = u < -torch.expm1(-dt * excess.abs())
        own = torch.arange(n, device=x.device).expand(phi.shape)
        other = torch.randint(max(1, n - 1), phi.shape, device=x.device, generator=generator)
        other = (other + (other >= own)).clamp_max(n - 1)
        pick = torch.where(rings & (excess > 0), other, own)
        # births go last; a slot that would be no one's goes to a bin of its own
        slot = torch.where(rings & (excess < 0), other, n)
        pick = torch.cat([pick, torch.zeros_like(pick[..., :1])], -1).scatter(-1, slot, own)
    return x.gather(-2, pick[..., :n].unsqueeze(-1).expand(x.shape))
