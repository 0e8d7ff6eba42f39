"""Gauss collocation: symplectic, symmetric, any order, any Hamiltonian.

:func:`solve_stages` solves the stage equations to round-off and differentiates through the
solution; :class:`Gauss` steps with it. Both treat leading dimensions as independent copies.
"""

import math
from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd import forward_ad

from darboux._autodiff import Field, jacobian
from darboux._checks import ConvergenceError, corrections, in_transform, values
from darboux.integrators.base import Integrator
from darboux.integrators.systems import System, packed

_MAX_SWEEPS = 100
# Stage equations of at most this many unknowns a row are differentiated by a dense matrix.
_DENSE_UP_TO = 128
# An increment this many ulps of the state large is not yet round-off.
_ROUND_OFF = 1e3
# The starting guess extrapolates a polynomial of at most this degree: the full one of many
# stages magnifies its errors by 10^6 and can throw the first sweep out of the domain.
_GUESS_DEGREE = 4


@dataclass(frozen=True, eq=False)
class Tableau:
    r"""An implicit Runge-Kutta method, with :math:`\mu_{ij} = a_{ij}/b_j`.

    Symplecticity :math:`b_i a_{ij} + b_j a_{ji} = b_i b_j` reads
    :math:`\mu_{ij} + \mu_{ji} = 1`, which floating point can keep exactly: Antonana, Makazaga
    & Murua, Numer. Algorithms 74 (2017) 575. ``ahead`` maps the slopes of a step to a guess for
    those of the next step of equal length.
    """

    c: NDArray[np.float64]  # (s,)
    b: NDArray[np.float64]  # (s,)
    mu: NDArray[np.float64]  # (s, s)
    ahead: NDArray[np.float64]  # (s, s)

    @property
    def A(self) -> NDArray[np.float64]:
        """Return the Butcher matrix ``(s, s)``."""
        return self.mu * self.b


def _legendre(n: int, x: Decimal) -> list[Decimal]:
    # P_0 ... P_n at x
    values = [Decimal(1), x]
    for k in range(1, n):
        values.append(((2 * k + 1) * x * values[k] - k * values[k - 1]) / (k + 1))
    return values[: n + 1]


@cache
def gauss_legendre(s: int) -> Tableau:
    r"""Return the Gauss tableau with ``s`` stages, of order ``2 s``, rounded from 50 digits.

    With the Legendre polynomials :math:`P_k` at the nodes :math:`x_i = 2 c_i - 1`,

    .. math:: \mu_{ij} = c_i + \tfrac12 \sum_{k=1}^{s-1} P_k(x_j)
              \bigl(P_{k+1}(x_i) - P_{k-1}(x_i)\bigr).

    Hairer & Wanner, Solving ODEs II (1996), IV.5 (the W-transformation).
    """
    if s < 1:
        raise ValueError(f"gauss_legendre: s is {s}, expected at least 1 stage")
    with localcontext() as context:
        context.prec = 50
        nodes, weights = [], []
        for i in range(s, 0, -1):
            x, slope = Decimal(math.cos(math.pi * (i - 0.25) / (s + 0.5))), Decimal(1)
            for _ in range(8):  # Newton: doubles the 2 or more digits of the start each time
                *_, before, here = _legendre(s, x)
                slope = s * (before - x * here) / (1 - x * x)
                x -= here / slope
            nodes.append(x)
            weights.append(1 / ((1 - x * x) * slope * slope))
        at = [_legendre(s, x) for x in nodes]
        after = [_legendre(s, x + 2) for x in nodes]
        mu = np.full((s, s), 0.5)
        ahead = np.empty((s, s))
        for i in range(s):
            for j in range(s):
                terms = (at[j][k] * (at[i][k + 1] - at[i][k - 1]) for k in range(1, s))
                m = (1 + nodes[i] + sum(terms)) / 2
                if m > Decimal("0.5"):  # then 1 - m is exact in floating point (Sterbenz)
                    mu[i, j] = float(m)
                    mu[j, i] = 1 - mu[i, j]
                degrees = range(min(s, _GUESS_DEGREE + 1))
                ahead[i, j] = weights[j] * sum(
                    (2 * k + 1) * at[j][k] * after[i][k] for k in degrees
                )
        c = np.array([float((1 + x) / 2) for x in nodes])
    return Tableau(c, np.array([float(w) for w in weights]), mu, ahead)


class Stages(NamedTuple):
    """The solved stages of one step ``z -> z + increment``."""

    increment: Tensor  # (..., m)
    slopes: Tensor  # (s, ..., m) the field at the stages
    iterations: int  # sweeps of the fixed point
    residual: float  # largest last change of a stage


def solve_stages(
    field: Field,
    z: Tensor,
    dt: float | Tensor,
    tableau: Tableau,
    *,
    guess: Stages | None = None,
    rows_alone: bool = False,
) -> Stages:
    r"""Solve the stage equations of one step from ``z (..., m)`` to round-off.

    .. math:: k_i = f\Bigl(z + \sum_j \mu_{ij}\, h b_j k_j\Bigr), \qquad
              z' = z + \sum_j h b_j k_j

    ``field`` is called once a sweep, on all stages stacked in front, ``(s, ..., m)``. The
    fixed-point sweeps stop where they stop improving, not at a tolerance: a tolerance makes the
    energy drift (Hairer, McLachlan & Razakarivony, BIT 48 (2008) 231). ``guess``, the previous
    step of the same ``field`` and ``dt``, saves sweeps by extrapolation.

    The solution is found without a graph. If a derivative is wanted (``z``, ``dt`` or something
    inside ``field`` requires grad or is being transformed), further sweeps are made from the
    solution with a graph, which sums the Neumann series of the implicit function theorem: right
    for ``z``, ``dt``, parameters and closures, in reverse and forward mode and any nesting. The
    ``k``-th derivative after ``m`` sweeps of contraction ``rho`` is off by about ``m^k rho^m``;
    ``m`` is measured so that this is round-off for the first few.

    ``rows_alone`` promises that leading dimensions do not act on each other. Small systems are
    then differentiated by chord steps with the exact matrix of the stage equations, at a
    fraction of the cost of the series: exact for derivatives up to third order, and for those of
    any order that nested ``torch.func`` transforms take.

    Raises ``ConvergenceError`` when the sweeps do not settle: ``dt`` is too large for them.
    """
    differentiate = _derivative_wanted(field, z, dt)
    with torch.no_grad():
        still = dt.detach() if isinstance(dt, Tensor) else dt
        step = _Step(z.detach(), still, tableau)
        k, sweeps, residual = _fixed_point(field, step, guess)
        dense = rows_alone and len(tableau.b) * z.shape[-1] <= _DENSE_UP_TO
        inverse = _newton_inverse(field, step, k) if differentiate and dense else None
        terms = _neumann_terms(field, step, k) if differentiate and not dense else 0
    step = _Step(z, dt, tableau)
    if inverse is not None:
        for _ in range(corrections()):
            k = k + _apply(inverse, field(step.stages(k)) - k)
    for _ in range(terms):
        k = field(step.stages(k))
    return Stages(step.increment(k), k, sweeps, residual)


class _Step:
    # The linear part of the stage equations, for one z and dt.
    def __init__(self, z: Tensor, dt: float | Tensor, tableau: Tableau):
        self.z, self.dt, self.tableau = z, dt, tableau
        self.mu = torch.from_numpy(tableau.mu).to(z)
        self.hb = (dt * torch.from_numpy(tableau.b).to(z))[:, None]

    def stages(self, k: Tensor) -> Tensor:
        return self.z + (self.mu @ (self.hb * k.flatten(1))).reshape(k.shape)

    def pull(self, w: Tensor) -> Tensor:
        # The transpose of stages(): from cotangents of stages to those of slopes.
        return (self.hb * (self.mu.T @ w.flatten(1))).reshape(w.shape)

    def increment(self, k: Tensor) -> Tensor:
        return (self.hb * k.flatten(1)).sum(0).reshape(self.z.shape)


def _fixed_point(field: Field, step: _Step, guess: Stages | None) -> tuple[Tensor, int, float]:
    z, dt = step.z, step.dt
    if guess is None:
        stages = z.expand(len(step.mu), *z.shape)
    else:
        ahead = torch.from_numpy(step.tableau.ahead).to(z)
        slopes = guess.slopes.detach()
        stages = step.stages((ahead @ slopes.flatten(1)).reshape(slopes.shape))
    k, sweep, limit, worst, least, settled = stages, 0, 0.0, 0.0, None, None
    while sweep < _MAX_SWEEPS:
        sweep += 1
        k = field(stages).detach()
        moved = step.stages(k)
        # One number for each copy; values() shows those of a whole vmapped batch.
        change = values((moved - stages).abs().amax((0, -1)))
        stages = moved
        worst = float(change.max()) if change.numel() else 0.0
        if worst == 0.0:
            return k, sweep, worst
        if sweep == 1:
            limit = _ROUND_OFF * torch.finfo(z.dtype).eps * float(values(stages).abs().max())
        if not math.isfinite(worst):
            break
        if worst <= limit and least is not None:
            stalled = (change >= least) | (change == 0)
            settled = stalled if settled is None else settled | stalled
            if settled.all():
                return k, sweep, worst
        least = change if least is None else torch.minimum(change, least)
    if worst <= limit:
        return k, sweep, worst
    size = float(values(dt)) if isinstance(dt, Tensor) else dt
    raise ConvergenceError(
        f"solve_stages: after {sweep} sweeps of a step dt = {size:g} the stages still change "
        f"by {worst:.3g}: take a smaller dt",
        worst,
        sweep,
    )


def _newton_inverse(field: Field, step: _Step, k: Tensor) -> Tensor:
    # (I - J_i h b_j mu_ij)^-1 for each row of the batch: (..., s m, s m)
    jac = jacobian(field, step.stages(k))[1]
    coupling = step.mu * step.hb.T
    matrix = torch.einsum("ij,i...kl->...ikjl", coupling, jac).flatten(-4, -3).flatten(-2)
    eye = torch.eye(matrix.shape[-1], dtype=k.dtype, device=k.device)
    return torch.linalg.inv(eye - matrix)


def _apply(inverse: Tensor, k: Tensor) -> Tensor:
    # (..., s m, s m) times (s, ..., m)
    column = k.movedim(0, -2).flatten(-2).unsqueeze(-1)
    return (inverse @ column).squeeze(-1).unflatten(-1, (k.shape[0], k.shape[-1])).movedim(-2, 0)


def _neumann_terms(field: Field, step: _Step, k: Tensor) -> int:
    # Count the terms that the Neumann series of the stage equations needs at their solution, by
    # summing its transpose on a generic cotangent. The sweeps of the solution itself tell
    # nothing: at an equilibrium, or in any plane that the motion does not leave, it took few.
    stages = step.stages(k)
    if stages.numel() == 0:
        return 1
    if in_transform():
        pull_through = torch.func.vjp(field, stages)[1]

        def pull(w: Tensor) -> Tensor:
            return pull_through(w)[0].detach()
    else:
        with torch.enable_grad():
            x = stages.requires_grad_()
            slopes = field(x)
        if not slopes.requires_grad:
            return 1

        def pull(w: Tensor) -> Tensor:
            return torch.autograd.grad(slopes, x, w, retain_graph=True, materialize_grads=True)[0]

    s, m = len(step.mu), stages.shape[-1]
    pattern = torch.arange(1, s * m + 1, dtype=stages.dtype, device=stages.device).cos()
    term = pattern.reshape(s, *[1] * (stages.dim() - 2), m).expand(stages.shape)
    total = term.abs()
    # A third of the digits are watched; the others take as many terms again each.
    enough = torch.finfo(stages.dtype).eps ** (1 / 3)
    for n in range(1, _MAX_SWEEPS // 3):
        term = pull(step.pull(term))
        total = total + term.abs()
        left = values((term.abs() - enough * total).amax())
        if float(left.max()) <= 0:
            return 3 * n + 2
    return _MAX_SWEEPS


def _derivative_wanted(field: Field, z: Tensor, dt: float | Tensor) -> bool:
    if forward_ad._current_level >= 0:
        return True
    levels = (_functorch.get_interpreter_stack() or []) if in_transform() else []
    if any(level.key() != _functorch.TransformType.Vmap for level in levels):
        return True
    if not torch.is_grad_enabled():
        return False
    if _tracked(z) or (isinstance(dt, Tensor) and _tracked(dt)):
        return True
    return _tracked(field(z[None]))  # a parameter inside the field


def _tracked(x: Tensor) -> bool:
    # Under vmap a wrapper does not show that the tensor inside requires grad.
    while _functorch.is_functorch_wrapped_tensor(x):
        x = _functorch.get_unwrapped(x)
    return x.requires_grad


@dataclass(frozen=True, kw_only=True, eq=False)
class Gauss(Integrator):
    """Gauss collocation with the stages of ``tableau``, on the packed state ``(q, p)``.

    What each addition to the state rounds off is carried to the next step (Kahan), at no cost
    beside the stages: angles that grow through many turns would otherwise spoil the energy.
    """

    symplectic: bool = True
    symmetric: bool = True
    explicit: bool = False
    source: str = "Butcher, Math. Comp. 18 (1964) 50; Hairer, Lubich & Wanner (2006), II.1.3"
    tableau: Tableau

    def check(self, system: System) -> None:
        """Accept every system."""

    def advance(
        self,
        system: System,
        q: Tensor,
        p: Tensor,
        dt: float | Tensor,
        steps: int,
        memory: Any = None,
    ) -> tuple[Tensor, Tensor, tuple[Stages | None, Tensor]]:
        """Take ``steps`` steps; the memory is the last stages and what the state rounded off."""
        d = q.shape[-1]
        field = packed(system, d)
        z = torch.cat([q, p], -1)
        stages, lost = (None, torch.zeros_like(z)) if memory is None else memory
        for _ in range(steps):
            stages = solve_stages(field, z, dt, self.tableau, guess=stages)
            increment = stages.increment + lost
            moved = z + increment
            lost = (increment - (moved - z)).detach()
            z = moved
        return z[..., :d], z[..., d:], (stages, lost)


GAUSSES = tuple(
    Gauss(
        name="implicit_midpoint" if s == 1 else f"gauss{2 * s}",
        order=2 * s,
        tableau=gauss_legendre(s),
    )
    for s in range(1, 9)
)
