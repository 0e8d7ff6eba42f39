"""Implicit Runge-Kutta methods: symplectic, symmetric, any order, any Hamiltonian.

:func:`solve_stages` solves the stage equations to round-off and differentiates through the
solution; :class:`ImplicitRungeKutta` steps with it. Both treat leading dimensions as independent
copies. A method is a :class:`Tableau`: Gauss collocation, or one of Lobatto's pairs, which treat
``q`` and ``p`` differently. To add one, add its tableau and a row.
"""

import math
from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import cache, cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.polynomial.legendre import legvander
from numpy.typing import NDArray
from torch import Tensor

from darboux._autodiff import Field
from darboux._checks import values
from darboux.integrators.base import Integrator
from darboux.integrators.fixed_point import Equations, dense_jacobian, solve_fixed_point
from darboux.integrators.systems import System, packed

# The starting guess extrapolates a polynomial of at most this degree: the full one of many
# stages magnifies its errors by 10^6 and can throw the first sweep out of the domain.
_GUESS_DEGREE = 4


@dataclass(frozen=True, eq=False)
class Tableau:
    r"""An implicit Runge-Kutta method, with :math:`\mu_{ij} = a_{ij}/b_j`.

    A pair takes ``mu`` for ``q`` and ``mu_hat`` for ``p``. Its symplecticity
    :math:`b_i \hat a_{ij} + b_j a_{ji} = b_i b_j` reads :math:`\hat\mu_{ij} + \mu_{ji} = 1`,
    which floating point can keep exactly: Antonana, Makazaga & Murua, Numer. Algorithms 74
    (2017) 575. One method for both has ``mu_hat = mu``.
    """

    c: NDArray[np.float64]  # (s,)
    b: NDArray[np.float64]  # (s,)
    mu: NDArray[np.float64]  # (s, s)
    mu_hat: NDArray[np.float64]  # (s, s)

    @property
    def A(self) -> NDArray[np.float64]:
        """Return the Butcher matrix ``(s, s)`` of ``q``."""
        return self.mu * self.b

    @property
    def A_hat(self) -> NDArray[np.float64]:
        """Return the Butcher matrix ``(s, s)`` of ``p``."""
        return self.mu_hat * self.b

    @cached_property
    def is_pair(self) -> bool:
        """Say whether ``q`` and ``p`` are treated differently."""
        return not np.array_equal(self.mu, self.mu_hat)

    @property
    def ahead(self) -> NDArray[np.float64]:
        """Return the map ``(s, s)`` from the slopes of a step to a guess for the next one's."""
        return extrapolation(self, 1.0)


@lru_cache(maxsize=256)
def extrapolation(tableau: Tableau, ratio: float) -> NDArray[np.float64]:
    """Return :attr:`Tableau.ahead` where the next step is ``ratio`` times as long.

    It is the polynomial that fits the slopes best, in the Legendre basis, which the weights of
    the nodes make orthogonal.
    """
    degree = min(len(tableau.b) - 1, _GUESS_DEGREE)
    here = legvander(2 * tableau.c - 1, degree)
    there = legvander(1 + 2 * ratio * tableau.c, degree)
    norms = tableau.b @ here**2
    return (there / norms) @ (here.T * tableau.b)


@lru_cache(maxsize=256)
def rounded(
    tableau: Tableau, dtype: torch.dtype
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    r"""Return ``mu`` and ``mu_hat`` in the precision of ``dtype``.

    Of :math:`\hat\mu_{ij} + \mu_{ji} = 1` the larger one is rounded and gives the other: rounded
    each for itself, they made energies drift in float32.
    """
    kind = {torch.float32: np.float32, torch.float16: np.float16}.get(dtype, np.float64)
    mu, mu_hat = (x.astype(kind).astype(np.float64) for x in (tableau.mu, tableau.mu_hat))
    return np.where(mu > 0.5, mu, 1 - mu_hat.T), np.where(mu_hat >= 0.5, mu_hat, 1 - mu.T)


def _legendre(n: int, x: Decimal) -> list[Decimal]:
    # P_0 ... P_n at x
    values = [Decimal(1), x]
    for k in range(1, n):
        values.append(((2 * k + 1) * x * values[k] - k * values[k - 1]) / (k + 1))
    return values[: n + 1]


def _collocation(nodes: list[Decimal], weights: list[Decimal], pair: bool) -> Tableau:
    # The method that collocates q at nodes in [-1, 1]. Polynomials of degree s - 1 at most are
    # orthogonal under the weights, which gives the Lagrange basis in Legendre polynomials and
    #   mu_ij = (1 + x_i + sum_k P_k(x_j) (P_{k+1}(x_i) - P_{k-1}(x_i)) / ((2k+1) |P_k|^2)) / 2.
    s = len(nodes)
    at = [_legendre(s, x) for x in nodes]
    norms = [sum(w * p[k] ** 2 for w, p in zip(weights, at, strict=True)) for k in range(s)]
    mu, mu_hat = np.full((s, s), 0.5), np.full((s, s), 0.5)
    for i in range(s):
        for j in range(s):
            terms = (
                at[j][k] * (at[i][k + 1] - at[i][k - 1]) / ((2 * k + 1) * norms[k])
                for k in range(1, s)
            )
            m = (1 + nodes[i] + sum(terms)) / 2
            # The larger of the two is rounded; then 1 minus it is exact (Sterbenz).
            if m > Decimal("0.5"):
                mu[i, j] = float(m)
                mu_hat[j, i] = 1 - mu[i, j]
            else:
                mu_hat[j, i] = float(1 - m)
                mu[i, j] = 1 - mu_hat[j, i]
    c = np.array([float((1 + x) / 2) for x in nodes])
    b = np.array([float(w) for w in weights])
    return Tableau(c, b, mu, mu_hat if pair else mu)


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
        return _collocation(nodes, weights, pair=False)


@cache
def lobatto_pair(s: int, swapped: bool = False) -> Tableau:
    r"""Return Lobatto IIIA for ``q`` and IIIB for ``p``, of order ``2 s - 2``, from 50 digits.

    The nodes are the zeros of :math:`(x^2 - 1) P_{s-1}'(x)`; IIIA collocates there and IIIB is
    :math:`\hat a_{ij} = b_j (1 - a_{ji}/b_i)`. ``s = 2`` is the generalised leapfrog. ``swapped``:
    IIIB for ``q``. Hairer, Lubich & Wanner (2006), II.1.4, table II.2.2 and theorem VI.4.5.
    """
    if s < 2:
        raise ValueError(f"lobatto_pair: s is {s}, expected at least 2 stages")
    with localcontext() as context:
        context.prec = 50
        nodes, weights = [], []
        for i in range(s):
            x = Decimal(-math.cos(math.pi * i / (s - 1)))
            for _ in range(8 if 0 < i < s - 1 else 0):
                # (1 - x^2) P'' = 2 x P' - s (s - 1) P and (1 - x^2) P' = (s - 1) (P_{s-2} - x P)
                *_, before, here = _legendre(s - 1, x)
                slope = (s - 1) * (before - x * here) / (1 - x * x)
                x -= slope * (1 - x * x) / (2 * x * slope - s * (s - 1) * here)
            nodes.append(x)
            weights.append(1 / (s * (s - 1) * _legendre(s - 1, x)[-1] ** 2))
        pair = _collocation(nodes, weights, pair=True)
    return Tableau(pair.c, pair.b, pair.mu_hat, pair.mu) if swapped else pair


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
    split: int | None = None,
    guess: Stages | None = None,
    ratio: float = 1.0,
    rows_alone: bool = False,
) -> Stages:
    r"""Solve the stage equations of one step from ``z (..., m)`` to round-off.

    .. math:: k_i = f\Bigl(z + \sum_j \mu_{ij}\, h b_j k_j\Bigr), \qquad
              z' = z + \sum_j h b_j k_j

    ``field`` is called once a sweep, on all stages stacked in front, ``(s, ..., m)``. With a
    pair, the first ``split`` components of ``z`` are ``q`` and the others ``p``. ``guess``, the
    previous step of the same ``field``, saves sweeps by extrapolation; this step is ``ratio``
    times as long.

    Stops where sweeps stop improving and differentiates through the solution, in ``z``, ``dt``
    and whatever ``field`` depends on: see :func:`~darboux.integrators.solve_fixed_point`, also
    for ``rows_alone``, which promises that leading dimensions do not act on each other.

    Raises ``ConvergenceError`` when the sweeps do not settle: ``dt`` is too large for them.
    """
    split = z.shape[-1] if split is None else split

    def equations(z: Tensor, dt: float | Tensor) -> Equations:
        step = _Step(z, dt, tableau, split)
        return Equations(field, step.stages, lambda k: step.matrix(field, k))

    with torch.no_grad():
        start = z.expand(len(tableau.b), *z.shape)
        if guess is not None:
            ahead = torch.from_numpy(extrapolation(tableau, ratio)).to(z)
            slopes = (ahead @ guess.slopes.detach().flatten(1)).reshape(guess.slopes.shape)
            start = _Step(z, dt, tableau, split).stages(slopes)
    k, sweeps, residual = solve_fixed_point(
        "solve_stages", equations, z, dt, start, rows_alone=rows_alone, staged=True
    )
    return Stages(_Step(z, dt, tableau, split).increment(k), k, sweeps, residual)


class _Step:
    # The linear part of the stage equations, for one z and dt.
    def __init__(self, z: Tensor, dt: float | Tensor, tableau: Tableau, split: int):
        self.z, self.split = z, split if tableau.is_pair else z.shape[-1]
        self.mu, self.mu_hat = (torch.from_numpy(x).to(z) for x in rounded(tableau, z.dtype))
        self.hb = (dt * torch.from_numpy(tableau.b).to(z))[:, None]

    def stages(self, k: Tensor) -> Tensor:
        scaled = self.hb * k.flatten(1)
        if self.split == self.z.shape[-1]:
            return self.z + (self.mu @ scaled).reshape(k.shape)
        q, p = scaled.reshape(k.shape).tensor_split([self.split], -1)
        moved = [(m @ x.flatten(1)).reshape(x.shape) for m, x in ((self.mu, q), (self.mu_hat, p))]
        return self.z + torch.cat(moved, -1)

    def increment(self, k: Tensor) -> Tensor:
        return (self.hb * k.flatten(1)).sum(0).reshape(self.z.shape)

    def matrix(self, field: Field, k: Tensor) -> Tensor:
        # J_i h b_j mu_ij for each copy: (..., s m, s m)
        jac = dense_jacobian(field, self.stages(k))
        m = self.z.shape[-1]
        widths = ((self.mu, self.split), (self.mu_hat, m - self.split))
        coupling = torch.cat([(mu * self.hb.T).expand(n, *mu.shape) for mu, n in widths])
        matrix = torch.einsum("lij,i...kl->...ikjl", coupling, jac)
        return matrix.flatten(-4, -3).flatten(-2)


class Memory(NamedTuple):
    """What a step leaves to the next one."""

    stages: Stages | None
    dt: float | Tensor  # of those stages
    lost: Tensor  # what the additions to the state rounded off
    rows_alone: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class ImplicitRungeKutta(Integrator):
    """The method of ``tableau``, on ``q`` and ``p`` of any widths.

    What each addition to the state rounds off is carried to the next step (Kahan), at no cost
    beside the stages: angles that grow through many turns would otherwise spoil the energy.
    """

    symplectic: bool = True
    symmetric: bool = True
    explicit: bool = False
    tableau: Tableau

    def check(self, system: System) -> None:
        """Accept every system; one without ``p`` is moved by the coefficients of ``q``."""

    def advance(
        self,
        system: System,
        q: Tensor,
        p: Tensor,
        dt: float | Tensor,
        steps: int,
        memory: Memory | None = None,
    ) -> tuple[Tensor, Tensor, Any]:
        """Take ``steps`` steps; the memory is the last stages and what the state rounded off."""
        d = q.shape[-1]
        field = packed(system, d)
        z = torch.cat([q, p], -1)
        if memory is None:
            memory = Memory(None, dt, torch.zeros_like(z), are_rows_alone(system, q, p))
        stages, last, lost, rows_alone = memory
        ratio = step_ratio(dt, last)
        for _ in range(steps):
            stages = solve_stages(
                field,
                z,
                dt,
                self.tableau,
                split=d,
                guess=stages,
                ratio=ratio,
                rows_alone=rows_alone,
            )
            z, lost = add_compensated(z, stages.increment, lost)
            ratio = 1.0
        return z[..., :d], z[..., d:], Memory(stages, dt, lost, rows_alone)


Gauss = ImplicitRungeKutta  # the name it had when Gauss collocation was all of it


def are_rows_alone(system: System, q: Tensor, p: Tensor) -> bool:
    """Say whether every vector of ``q`` is a system of its own: its energy then tells."""
    try:
        with torch.no_grad():
            bare, _, _ = system.lower(q, p)
            energy = system.energy(bare, p, *((q[..., -1],) if system.time else ()))
    except ValueError:  # it has none
        return False
    return energy.dim() == q.dim() - 1


def step_ratio(dt: float | Tensor, last: float | Tensor) -> float:
    """Return how many times longer than the last step this one is."""
    if dt is last:
        return 1.0
    sizes = [values(x).flatten()[:1] if isinstance(x, Tensor) else x for x in (dt, last)]
    ratio = float(sizes[0]) / (float(sizes[1]) or 1.0)
    return round(ratio, 12) if math.isfinite(ratio) else 1.0


def add_compensated(z: Tensor, increment: Tensor, lost: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``z + increment`` and what that rounded off, ``lost`` being the last loss (Kahan)."""
    increment = increment + lost
    moved = z + increment
    return moved, (increment - (moved - z)).detach()


GAUSSES = tuple(
    ImplicitRungeKutta(
        name="implicit_midpoint" if s == 1 else f"gauss{2 * s}",
        order=2 * s,
        tableau=gauss_legendre(s),
        source="Butcher, Math. Comp. 18 (1964) 50; Hairer, Lubich & Wanner (2006), II.1.3",
    )
    for s in range(1, 9)
)

LOBATTOS = (
    ImplicitRungeKutta(
        name="generalized_leapfrog",
        order=2,
        tableau=lobatto_pair(2),
        source="Hairer, Lubich & Wanner (2006), VI.3.4; Leimkuhler & Reich (2004), 4.2; kick first",
    ),
    ImplicitRungeKutta(
        name="generalized_position_leapfrog",
        order=2,
        tableau=lobatto_pair(2, swapped=True),
        source="the same with q and p exchanged; drift first",
    ),
    *(
        ImplicitRungeKutta(
            name=f"lobatto{2 * s - 2}",
            order=2 * s - 2,
            tableau=lobatto_pair(s),
            source="Lobatto IIIA-IIIB: Sun 1993; Jay, SIAM J. Numer. Anal. 33 (1996) 368",
        )
        for s in (3, 4)
    ),
)
