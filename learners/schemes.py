r"""Time in the depth of a network: damping schedules, and steps that cost one force each.

.. math:: \dot x = v(x, u), \qquad \dot u = a(x, u) - \alpha(t)\,u

A layer is a step and a step a row of :data:`SCHEMES`. The damping enters by its integral over the
step, :math:`D = \int\alpha`; what is kept of the velocity is :math:`\sigma = e^{-D}` exactly.
Where ``v = u`` and the force depends on ``x`` alone, a step of a row marked ``conformal`` has
:math:`J^T\Omega J = \sigma\Omega`. With a force that depends on the velocity, as that of softmax
attention does, none has, nor does a network whose layers normalise or feed forward.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from darboux._smooth import sinc


class Scheme(NamedTuple):
    """One step: a drift, a kick, a drift. Weights of what is newer come first."""

    before: float  # the part of dt drifted before the force is taken
    keep: Callable[[Tensor], Tensor]  # what is kept of u, of D
    kick: Callable[[Tensor], tuple[Tensor | float, ...]]  # weights of the last forces, of D
    drift: tuple[float, ...]  # weights of v after, at and before the step
    explicit: bool  # the damping is a part of the force
    order: int
    conformal: bool


def _keep(D: Tensor) -> Tensor:
    return (-D).exp()


def _phi(D: Tensor) -> Tensor:
    # (1 - e^-D)/D
    return (-D / 2).exp() * sinc(-D * D / 4)


def _psi(D: Tensor) -> Tensor:
    # (e^-D - 1 + D)/D^2, by its series where that cancels
    near = D < 0.5
    small = torch.where(near, D, 0.0)
    total = torch.ones_like(D)
    for k in range(15, 2, -1):
        total = 1 - total * small / k
    far = torch.where(near, 1.0, D)
    return torch.where(near, total / 2, (1 - _phi(far)) / far)


SCHEMES = {
    "euler": Scheme(0.0, torch.ones_like, lambda D: (1.0,), (0.0, 1.0), True, 1, False),
    # the force of the old place, damped with the velocity: presymplectic Euler
    "kick_damp_drift": Scheme(0.0, _keep, lambda D: (_keep(D),), (1.0,), False, 1, True),
    # the damping solved along with a constant force: exponential Euler
    "exponential": Scheme(0.0, _keep, lambda D: (_phi(D),), (1.0,), False, 1, True),
    "strang": Scheme(0.5, _keep, lambda D: (_keep(D / 2),), (0.5,), False, 2, True),
    # Adams-Bashforth, and with the damping solved: Cox and Matthews (2002)
    "ab2": Scheme(0.0, torch.ones_like, lambda D: (1.5, -0.5), (0.0, 1.5, -0.5), True, 2, False),
    "etd_ab2": Scheme(
        0.0, _keep, lambda D: (_phi(D) + _psi(D), -_psi(D)), (0.5, 0.5), False, 2, False
    ),
}


class Phase(NamedTuple):
    """Features and velocities ``(batch, time, width)``, the time in depth, what was before."""

    x: Tensor
    u: Tensor
    t: Tensor  # ()
    slope: Tensor | None = None  # the last force
    v: Tensor | None = None  # the last velocity of x


Field = Callable[[Tensor, Tensor], Tensor]


def step(
    scheme: Scheme,
    phase: Phase,
    force: Field,
    damping: "Damping",
    dt: float | Tensor,
    velocity: Field = lambda x, u: u,
) -> Phase:
    """Return the phase after one step of ``dt``; the first of a multi-step row is of order one."""
    x, u, t, old_slope, old_v = phase
    D = damping.integral(t, dt)
    x = x + scheme.before * dt * velocity(x, u) if scheme.before else x
    slope = force(x, u)
    if scheme.explicit:
        slope = slope - damping.rate(t) * u
    kick = scheme.kick(D)
    total = sum(kick) if old_slope is None else kick[0]
    push = total * slope
    if old_slope is not None and len(kick) > 1:
        push = push + kick[1] * old_slope
    new = scheme.keep(D) * u + dt * push
    late, now, before = (*scheme.drift, 0.0, 0.0)[:3]
    v = velocity(x, u) if now else None
    if late:
        x = x + late * dt * velocity(x, new)
    if v is not None:
        back = before if old_v is not None else 0.0
        x = x + (now + before - back) * dt * v
        x = x + back * dt * old_v if old_v is not None and back else x
    keep = len(kick) > 1
    return Phase(x, new, t + dt, slope if keep else None, v if before else None)


# -- damping -------------------------------------------------------------------------------------

SCHEDULES = ("nesterov", "constant", "learned")


class Damping(nn.Module):
    r"""The damping :math:`\alpha(t) = a/t + b`, whose integral is :math:`a\log t + bt`.

    ``"nesterov"``: ``a = 3``, ``b = 0``; ``"constant"``: ``a = 0``, ``b = alpha``; ``"learned"``:
    both are learned, positive, from ``3`` and ``1e-4`` (Stein, Li and Steidl 2026). With ``a > 0``
    times are positive: nothing is clamped.
    """

    def __init__(self, schedule: str = "nesterov", alpha: float = 1.0):
        super().__init__()
        if schedule not in SCHEDULES:
            raise ValueError(f"Damping: unknown schedule {schedule!r}, expected one of {SCHEDULES}")
        if not 0 <= alpha < float("inf"):
            raise ValueError(f"Damping: alpha is {alpha}, expected at least 0")
        self.schedule, self.alpha = schedule, alpha
        if schedule == "learned":
            # the inverse of softplus
            self.raw = nn.Parameter(torch.tensor([3.0, 1e-4], dtype=torch.float64).expm1().log())
            self.raw.data = self.raw.data.to(torch.get_default_dtype())

    def coefficients(self, t: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Return ``a`` and ``b``."""
        if self.schedule == "learned":
            a, b = softplus(self.raw).to(t.dtype).unbind()
            return a, b
        return (3.0, 0.0) if self.schedule == "nesterov" else (0.0, self.alpha)

    def rate(self, t: Tensor) -> Tensor:
        r"""Return :math:`\alpha(t)`."""
        a, b = self.coefficients(t)
        return a / t + b

    def integral(self, t: Tensor, dt: float | Tensor) -> Tensor:
        """Return the integral of the damping from ``t`` to ``t + dt``."""
        a, b = self.coefficients(t)
        return a * torch.log1p(dt / t) + b * dt
