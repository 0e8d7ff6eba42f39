r"""Ricci flows that are a few numbers: products of constant curvature, homogeneous 3-geometries.

Here :math:`\partial_t g = -2\,\mathrm{Ric}` is an ordinary differential equation for positive
scales. It is integrated in their logarithms, so that scales stay positive for every step; closed
forms beside it, solitons among them, are oracles. Normalised flows add
:math:`\tfrac2n R\,g` and keep the volume, a sum of the logarithms, to round-off. Chow and Knopf
(2004), "The Ricci Flow: An Introduction", ch. 1-2.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from darboux import _checks
from darboux.flows import _metric_march

# Structure constants (lambda, mu, nu) of [F2, F3] = 2 lambda F1 and its cyclic permutations.
# Milnor, Adv. Math. 21 (1976) 293, section 4.
MILNOR = {
    "flat": (0.0, 0.0, 0.0),
    "nil": (1.0, 0.0, 0.0),
    "sol": (1.0, 0.0, -1.0),
    "e2": (1.0, 1.0, 0.0),
    "su2": (1.0, 1.0, 1.0),
    "sl2": (1.0, 1.0, -1.0),
}


class ReducedRun(NamedTuple):
    """A Ricci flow of positive scales, saved states time first."""

    t: Tensor  # (time,)
    scales: Tensor  # (time, ..., k)
    status: str  # "done", or "extinct" if the run ended before a scale reached zero
    extinction: Tensor  # (...), estimated time of the collapse; infinite unless extinct


# -- products ------------------------------------------------------------------------------


def product_solution(
    scales: Tensor, curvatures: Sequence[float], dims: Sequence[int], t: Tensor | float
) -> Tensor:
    r"""Return :math:`a_i(t) = a_i - 2(n_i - 1)k_i t`, the flow of a product of space forms.

    The metric is :math:`\sum_i a_i\,g_i` with ``scales (..., k)`` holding the :math:`a_i`, and
    :math:`g_i` of dimension ``dims[i]`` and constant sectional curvature ``curvatures[i]``: the
    sphere of radius r is ``a = r^2``, ``k = 1``. For ``t (time,)`` the result is
    ``(time, ..., k)``. Not positive from the time on at which a factor has collapsed.
    """
    rates = _einstein_constants("product_solution", scales, curvatures, dims)[0]
    time = torch.as_tensor(t, dtype=scales.dtype, device=scales.device)
    return scales - 2 * rates * time[(..., *[None] * scales.dim())]


def product_flow(
    scales: Tensor,
    curvatures: Sequence[float],
    dims: Sequence[int],
    *,
    dt: float,
    steps: int,
    normalized: bool = False,
    save_every: int = 1,
) -> ReducedRun:
    """Integrate the flow of a product of space forms; see :func:`product_solution`.

    ``normalized`` keeps the volume. All copies of a batch end when the first collapses.

    >>> sphere = torch.tensor([1.0], dtype=torch.float64)  # the unit 2-sphere: a = 1 - 2t
    >>> run = product_flow(sphere, [1.0], [2], dt=1e-3, steps=1000)
    >>> run.status, round(float(run.extinction), 6)
    ('extinct', 0.5)
    """
    where = "product_flow"
    rates, n = _einstein_constants(where, scales, curvatures, dims)

    def field(c: Tensor) -> Tensor:
        ricci = rates * torch.exp(-c)
        slope = -2 * ricci
        if normalized:
            slope = slope + 2 * (n * ricci).sum(-1, keepdim=True) / n.sum()
        return slope

    return _run(where, field, scales, dt, steps, save_every)


def _einstein_constants(
    where: str, scales: Tensor, curvatures: Sequence[float], dims: Sequence[int]
) -> tuple[Tensor, Tensor]:
    _checks.check_last(where, "scales", scales, len(dims))
    _check_positive(where, scales)
    if len(curvatures) != len(dims):
        raise ValueError(
            f"{where}: {len(curvatures)} curvatures for {len(dims)} dims, expected one for each"
        )
    if not dims or any(not isinstance(n, int) or n < 1 for n in dims):
        raise ValueError(f"{where}: dims is {list(dims)}, expected positive integers")
    n = torch.tensor(dims, dtype=scales.dtype, device=scales.device)
    k = torch.as_tensor(curvatures, dtype=scales.dtype, device=scales.device)
    return (n - 1) * k, n


# -- homogeneous 3-geometries --------------------------------------------------------------


def milnor_ricci(scales: Tensor, geometry: str | Sequence[float]) -> Tensor:
    r"""Return the Ricci tensor's diagonal ``(..., 3)`` in a Milnor frame.

    .. math:: \mathrm{Ric}_{11} = 2\,\frac{(\lambda A)^2 - (\mu B - \nu C)^2}{BC}
        \quad\text{and cyclically}

    for the left-invariant metric ``diag(A, B, C)``, ``scales (..., 3)``, in a frame with
    :math:`[F_2, F_3] = 2\lambda F_1` and so on. ``geometry`` is a name of ``MILNOR`` or
    :math:`(\lambda, \mu, \nu)`.
    """
    _checks.check_last("milnor_ricci", "scales", scales, 3)
    return _milnor_ricci(scales, _constants("milnor_ricci", geometry, scales))


def _milnor_ricci(scales: Tensor, constants: Tensor) -> Tensor:
    s = constants * scales
    # (s_2 - s_3)^2 - s_1^2, factored: differences of nearly equal scales keep their digits
    b, c = s.roll(-1, -1), s.roll(-2, -1)
    numerator = (s - b + c) * (s + b - c)
    return 2 * numerator / (scales.roll(-1, -1) * scales.roll(-2, -1))


def homogeneous_flow(
    scales: Tensor,
    geometry: str | Sequence[float],
    *,
    dt: float,
    steps: int,
    normalized: bool = False,
    save_every: int = 1,
) -> ReducedRun:
    r"""Integrate the Ricci flow of a left-invariant metric on a 3-dimensional Lie group.

    Arguments as in :func:`milnor_ricci`. Conserved: AB and AC on Nil, AC on Sol, AB on E(2),
    and for B = C on SU(2) :math:`A^2B/(B - A)`, for A = B on SL(2) :math:`C^2A/(A + C)`.
    ``normalized`` keeps ABC. All copies of a batch end when the first collapses.

    >>> metric = torch.ones(3, dtype=torch.float64)
    >>> homogeneous_flow(metric, "nil", dt=0.05, steps=10).scales.shape
    torch.Size([11, 3])
    """
    where = "homogeneous_flow"
    _checks.check_last(where, "scales", scales, 3)
    _check_positive(where, scales)
    constants = _constants(where, geometry, scales)

    def field(c: Tensor) -> Tensor:
        scales = c.exp()
        ricci = _milnor_ricci(scales, constants) / scales
        slope = -2 * ricci
        if normalized:
            slope = slope + 2 / 3 * ricci.sum(-1, keepdim=True)
        return slope

    return _run(where, field, scales, dt, steps, save_every)


def homogeneous_solution(scales: Tensor, geometry: str, t: Tensor | float) -> Tensor:
    r"""Return the flow in closed form, ``(time, ..., 3)`` for ``t (time,)``.

    Known for ``flat``; ``nil``: :math:`(A s^{-1/3}, B s^{1/3}, C s^{1/3})`,
    :math:`s = 1 + 12 A t/BC`; ``sol`` with A = C: B + 16t; ``e2`` with A = B: constant; ``su2``
    with A = B = C: A - 4t. Raises ``ValueError`` for other scales and geometries.
    """
    where = "homogeneous_solution"
    _checks.check_last(where, "scales", scales, 3)
    time = torch.as_tensor(t, dtype=scales.dtype, device=scales.device)
    time = time[(..., *[None] * (scales.dim() - 1))]
    a, b, c = scales.unbind(-1)
    equal = {"sol": (a, c), "e2": (a, b), "su2": (a, b)}
    if geometry not in ("flat", "nil", *equal):
        raise ValueError(
            f"{where}: geometry is {geometry!r}, expected one of flat, nil, sol, e2, su2"
        )
    if geometry in equal:
        same = [equal[geometry], (b, c)] if geometry == "su2" else [equal[geometry]]
        for u, v in same:
            _checks.check_that(
                where,
                lambda u=u, v=v: u == v,
                f"scales of {geometry} are not of the symmetric form that has a closed form",
            )
    if geometry == "nil":
        s = (1 + 12 * a * time / (b * c)) ** (1 / 3)
        return torch.stack([a / s, b * s, c * s], -1)
    if geometry == "sol":
        a, b, c = torch.broadcast_tensors(a, b + 16 * time, c)
        return torch.stack([a, b, c], -1)
    shrink = 4 * time if geometry == "su2" else 0 * time
    return scales - shrink[..., None]


def _constants(where: str, geometry: str | Sequence[float], like: Tensor) -> Tensor:
    if isinstance(geometry, str):
        if geometry not in MILNOR:
            raise ValueError(
                f"{where}: geometry is {geometry!r}, expected one of {', '.join(MILNOR)}"
            )
        geometry = MILNOR[geometry]
    constants = torch.as_tensor(geometry, dtype=like.dtype, device=like.device)
    if constants.shape != (3,):
        raise ValueError(
            f"{where}: geometry has shape {tuple(constants.shape)}, expected three constants"
        )
    return constants


# -- what all share ------------------------------------------------------------------------


def _check_positive(where: str, scales: Tensor) -> None:
    _checks.check_finite(where, scales=scales)
    _checks.check_that(where, lambda: scales > 0, "scales are not positive")


def _run(
    where: str,
    field: Callable[[Tensor], Tensor],
    scales: Tensor,
    dt: float,
    steps: int,
    save_every: int,
) -> ReducedRun:
    _metric_march.check_run(where, dt, steps, save_every)

    def verdict(c: Tensor) -> str | None:
        # A scale that vanishes linearly has -1/c' left to live. Relative rates that grow at all
        # grow towards a collapse; within four steps of it they are resolved no longer.
        with torch.no_grad():
            slope = _checks.values(field(c))
        if bool((c.isfinite() & slope.isfinite()).all()) and float(-slope.min()) * dt < 0.25:
            return None
        return "extinct"

    c = scales.log()
    if _checks.checks_values() and verdict(_checks.values(c)):
        fastest = float(-_checks.values(field(c)).min())
        raise ValueError(
            f"{where}: dt is {dt}, but a scale falls at the relative rate {fastest:.6g}: expected "
            f"dt below {0.25 / fastest:.6g}"
        )
    t, logs, word = _metric_march.march(
        lambda c: _metric_march.rk4(field, c, dt), c, dt, steps, save_every, verdict
    )
    if word is None:
        return ReducedRun(t, logs.exp(), "done", torch.full_like(scales[..., 0], math.inf))
    slope = field(logs[-1]).min(-1).values
    left = torch.where(slope < 0, -1 / torch.where(slope < 0, slope, -1.0), math.inf)
    return ReducedRun(t, logs.exp(), word, t[-1] + left)


# -- solitons ------------------------------------------------------------------------------


def cigar(x: Tensor, t: Tensor | float) -> Tensor:
    r"""Return Hamilton's cigar on the plane, ``(..., 2, 2)`` at ``x (..., 2)``.

    .. math:: g = \frac{dx^2 + dy^2}{e^{4t} + x^2 + y^2}, \qquad K = 2e^{4t}/(e^{4t} + r^2)

    A steady soliton: the flow moves it by :math:`x \mapsto e^{-2t}x` alone. Hamilton (1988).
    """
    _checks.check_last("cigar", "x", x, 2)
    time = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    return _conformal(1 / (torch.exp(4 * time) + x.square().sum(-1)), x)


def sausage(x: Tensor, t: Tensor | float) -> Tensor:
    r"""Return the ancient King-Rosenau solution on ``x = (height, angle) (..., 2)``, t < 0.

    .. math:: g = \frac{\sinh(-t)}{\cosh x + \cosh t}\,(dx^2 + d\theta^2)

    Two cigars glued end to end; it closes smoothly at both ends if the angle has period
    :math:`4\pi`, and shrinks to a round point at t = 0. Rosenau (1995).
    """
    _checks.check_last("sausage", "x", x, 2)
    time = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    _checks.check_that("sausage", lambda: time < 0, "t is not negative")
    return _conformal(torch.sinh(-time) / (torch.cosh(x[..., 0]) + torch.cosh(time)), x)


def _conformal(factor: Tensor, x: Tensor) -> Tensor:
    return factor[..., None, None] * torch.eye(2, dtype=x.dtype, device=x.device)
