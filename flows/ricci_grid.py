r"""The Ricci flow of any metric tensor on a periodic grid, in DeTurck's gauge or in none.

.. math:: \partial_t g = -2\,\mathrm{Ric}(g) + \mathcal L_W g, \qquad
          W^k = g^{pq}(\Gamma^k_{pq} - \bar\Gamma^k_{pq})

Without W the flow is only weakly parabolic: what a change of coordinates can make, round-off and
noise included, is not damped and on a grid may grow. DeTurck's vector field makes it strictly
parabolic and changes the metric by diffeomorphisms alone. Metrics are fields ``(..., *nodes, d,
d)`` in the coordinates of the grid. DeTurck, J. Differential Geom. 18 (1983) 157.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from darboux import _checks
from darboux._checks import GeometryError, checks_values, values
from darboux.flows import _metric_march
from darboux.manifolds.connection import first_kind
from darboux.manifolds.linalg import is_positive, matvec, solve

GAUGES = ("deturck", "none")


@dataclass(frozen=True, eq=False)
class PeriodicGrid:
    """A grid on the torus of ``d`` dimensions and its derivative; see :func:`periodic_grid`."""

    shape: tuple[int, ...]
    periods: tuple[float, ...]
    matrices: tuple[Tensor, ...]  # the derivative along each axis, antisymmetric
    largest: float  # of -sum_a D_a^2: it limits the step

    @property
    def dim(self) -> int:
        """The dimension of the torus."""
        return len(self.shape)

    @property
    def cell(self) -> float:
        """The coordinate volume of a node."""
        return math.prod(p / n for p, n in zip(self.periods, self.shape, strict=True))

    def nodes(self) -> Tensor:
        """Return the coordinates ``(*nodes, d)``."""
        axes = [
            torch.arange(n, dtype=m.dtype, device=m.device) * (p / n)
            for n, p, m in zip(self.shape, self.periods, self.matrices, strict=True)
        ]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)

    def derivative(self, f: Tensor, trailing: int) -> Tensor:
        """Return ``(..., *nodes, *components, d)`` of a field with ``trailing`` components axes."""
        first = f.dim() - trailing - self.dim
        parts = [
            (f.movedim(first + a, -1) @ m.mT).movedim(-1, first + a)
            for a, m in enumerate(self.matrices)
        ]
        return torch.stack(parts, -1)


def periodic_grid(
    shape: Sequence[int],
    periods: Sequence[float] | None = None,
    *,
    scheme: str = "spectral",
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> PeriodicGrid:
    """Return the grid of ``shape`` (d sizes) on the torus; periods are 2 pi unless given.

    ``scheme`` is ``spectral``, ``fd2`` or ``fd4`` (central differences). Prefer odd sizes: of an
    even one the sawtooth has no first derivative, so that no flow damps it. Derivatives are
    matrices: exact antisymmetry, and they work under every transform.
    """
    where = "periodic_grid"
    shape = tuple(shape)
    if not shape or any(not isinstance(n, int) or n < 5 for n in shape):
        raise ValueError(f"{where}: shape is {shape}, expected sizes of at least 5")
    if periods is None:
        periods = [2 * math.pi] * len(shape)
    if len(periods) != len(shape) or not all(p > 0 and math.isfinite(p) for p in periods):
        raise ValueError(
            f"{where}: periods is {tuple(periods)}, expected {len(shape)} positive numbers"
        )
    if scheme not in _STENCILS:
        raise ValueError(f"{where}: scheme is {scheme!r}, expected one of {', '.join(_STENCILS)}")
    matrices, largest = [], 0.0
    for n, period in zip(shape, periods, strict=True):
        row = _STENCILS[scheme](n) * (2 * math.pi / period)
        index = torch.arange(n)
        matrices.append(row[(index - index[:, None]) % n].to(dtype=dtype, device=device))
        # a circulant matrix has the Fourier transform of its row as eigenvalues
        largest += float(torch.fft.fft(row).abs().max()) ** 2
    return PeriodicGrid(shape, tuple(float(p) for p in periods), tuple(matrices), largest)


def _spectral(n: int) -> Tensor:
    # Trefethen (2000), "Spectral Methods in MATLAB", ch. 3; of the period 2 pi, entry j the
    # weight of the neighbour at distance j
    j = torch.arange(1, n, dtype=torch.float64)
    angle = j * (math.pi / n)
    sign = 1 - 2 * (j % 2)
    weights = -0.5 * sign / (torch.tan(angle) if n % 2 == 0 else torch.sin(angle))
    weights = (weights - weights.flip(0)) / 2  # antisymmetric to the last bit
    return torch.cat([torch.zeros(1, dtype=torch.float64), weights])


def _central(*weights: float) -> Callable[[int], Tensor]:
    def row(n: int) -> Tensor:
        out = torch.zeros(n, dtype=torch.float64)
        for j, w in enumerate(weights, 1):
            out[j] += w * n / (2 * math.pi)
            out[-j] -= w * n / (2 * math.pi)
        return out

    return row


_STENCILS = {"spectral": _spectral, "fd2": _central(1 / 2), "fd4": _central(2 / 3, -1 / 12)}


# -- geometry on the grid ------------------------------------------------------------------


def grid_christoffel(g: Tensor, grid: PeriodicGrid) -> Tensor:
    r"""Return :math:`\Gamma^k_{ij}` as ``(..., *nodes, k, i, j)``."""
    _check_metric("grid_christoffel", g, grid)
    return _christoffel(g, grid)


def _christoffel(g: Tensor, grid: PeriodicGrid) -> Tensor:
    d = grid.dim
    return solve(g, first_kind(grid.derivative(g, 2)).flatten(-2)).unflatten(-1, (d, d))


def grid_ricci(g: Tensor, grid: PeriodicGrid) -> Tensor:
    r"""Return the Ricci tensor ``(..., *nodes, d, d)``, symmetric.

    .. math:: \mathrm{Ric}_{ij} = \partial_k\Gamma^k_{ij} - \partial_j\Gamma^k_{ik}
        + \Gamma^k_{kl}\Gamma^l_{ij} - \Gamma^k_{jl}\Gamma^l_{ik}
    """
    _check_metric("grid_ricci", g, grid)
    return _ricci(_christoffel(g, grid), grid)


def _ricci(gamma: Tensor, grid: PeriodicGrid) -> Tensor:
    trace = torch.einsum("...kik->...i", gamma)
    spread = torch.einsum("...kijk->...ij", grid.derivative(gamma, 3))
    hessian = grid.derivative(trace, 1)
    product = torch.einsum("...kjl,...lik->...ij", gamma, gamma)
    along = torch.einsum("...l,...lij->...ij", trace, gamma)
    ricci = spread - hessian + along - product
    return (ricci + ricci.mT) / 2


def grid_scalar(g: Tensor, grid: PeriodicGrid) -> Tensor:
    """Return the scalar curvature ``(..., *nodes)``; twice the Gauss curvature for d = 2."""
    return _trace(g, grid_ricci(g, grid))


def _trace(g: Tensor, form: Tensor) -> Tensor:
    return solve(g, form).diagonal(dim1=-2, dim2=-1).sum(-1)


def volume_element(g: Tensor) -> Tensor:
    r"""Return :math:`\sqrt{\det g}` ``(...)`` of ``g (..., d, d)`` with d at most 3."""
    d = g.shape[-1]
    if d == 1:
        return g[..., 0, 0].sqrt()
    det = g[..., 0, 0] * g[..., 1, 1] - g[..., 0, 1] * g[..., 1, 0]
    if d == 3:
        det = (
            det * g[..., 2, 2]
            - g[..., 0, 2] * (g[..., 2, 0] * g[..., 1, 1] - g[..., 1, 0] * g[..., 2, 1])
            - g[..., 1, 2] * (g[..., 2, 1] * g[..., 0, 0] - g[..., 2, 0] * g[..., 0, 1])
        )
    elif d > 3:
        raise ValueError(f"volume_element: g has shape {tuple(g.shape)}, expected d at most 3")
    return det.sqrt()


def grid_integral(f: Tensor, g: Tensor, grid: PeriodicGrid) -> Tensor:
    """Return the integral ``(...)`` of ``f (..., *nodes)`` over the volume of ``g``."""
    return grid.cell * (f * volume_element(g)).flatten(-grid.dim).sum(-1)


def grid_volume(g: Tensor, grid: PeriodicGrid) -> Tensor:
    """Return the volume ``(...)`` of ``g``."""
    return grid.cell * volume_element(g).flatten(-grid.dim).sum(-1)


def ricci_rate(
    g: Tensor,
    grid: PeriodicGrid,
    *,
    gauge: str = "deturck",
    background: Tensor | None = None,
    normalized: bool = False,
) -> Tensor:
    r"""Return :math:`\partial_t g` ``(..., *nodes, d, d)``, the right side of :func:`grid_flow`."""
    _check_metric("ricci_rate", g, grid)
    _check_gauge("ricci_rate", gauge, background, g, grid)
    fixed = None if background is None else _christoffel(background, grid)
    return _rate(g, grid, gauge, fixed, normalized)


def _rate(
    g: Tensor, grid: PeriodicGrid, gauge: str, fixed: Tensor | None, normalized: bool
) -> Tensor:
    d = grid.dim
    dg = grid.derivative(g, 2)
    gamma = solve(g, first_kind(dg).flatten(-2)).unflatten(-1, (d, d))
    ricci = _ricci(gamma, grid)
    rate = -2 * ricci
    if normalized:
        mean = grid_integral(_trace(g, ricci), g, grid) / grid_volume(g, grid)
        rate = rate + (2 / d) * mean[(..., *[None] * (d + 2))] * g
    if gauge == "deturck":
        difference = gamma if fixed is None else gamma - fixed
        # g^{pq} (Gamma - Gamma_bar)^k_pq
        w = _trace(g.unsqueeze(-3), difference)
        lowered = g @ grid.derivative(w, 1)  # g_ik d_j W^k
        rate = rate + matvec(dg, w.unsqueeze(-2)) + lowered + lowered.mT
    return rate


def high_frequency_share(g: Tensor, grid: PeriodicGrid) -> Tensor:
    r"""Return the share ``(...)`` of the variation of ``g`` in its upper half of frequencies.

    The energy of waves with some wave number above a quarter of the grid, over that of all waves
    but the constant.
    """
    _check_metric("high_frequency_share", g, grid)
    d = grid.dim
    fields = g.flatten(-2).movedim(-1, -1 - d)
    energy = torch.fft.fftn(fields, dim=tuple(range(-d, 0))).abs().square().sum(-1 - d)
    high = torch.zeros(grid.shape, dtype=torch.bool, device=g.device)
    for a, n in enumerate(grid.shape):
        k = torch.fft.fftfreq(n, 1 / n, device=g.device).abs()
        high = high | (k > n / 4).reshape([-1 if b == a else 1 for b in range(d)])
    everything = energy.flatten(-d).sum(-1) - energy[(..., *[0] * d)]
    return (energy * high).flatten(-d).sum(-1) / everything


# -- the flow ------------------------------------------------------------------------------


class GridRun(NamedTuple):
    """A flow of metrics on a grid, saved states time first."""

    t: Tensor  # (time,)
    g: Tensor  # (time, ..., *nodes, d, d)


def stable_step(g: Tensor, grid: PeriodicGrid) -> float:
    r"""Return the largest stable ``dt`` of :func:`grid_flow` at ``g``.

    :math:`2.785\,\lambda_{\min}(g)/|\xi|^2_{\max}`: the principal part of the flow in DeTurck's
    gauge is the Laplacian :math:`g^{kl}\partial_k\partial_l` of every component.
    """
    return _metric_march.RK4_REAL * float(_smallest(values(g)).min()) / grid.largest


def _smallest(g: Tensor) -> Tensor:
    if g.shape[-1] != 2:
        return torch.linalg.eigvalsh(g)[..., 0]
    a, b, c = g[..., 0, 0], g[..., 0, 1], g[..., 1, 1]
    return (a * c - b * b) / ((a + c) / 2 + torch.hypot((a - c) / 2, b))


def grid_flow(
    g: Tensor,
    grid: PeriodicGrid,
    *,
    dt: float,
    steps: int,
    gauge: str = "deturck",
    background: Tensor | None = None,
    normalized: bool = False,
    save_every: int = 1,
) -> GridRun:
    r"""Flow the metric ``g (..., *nodes, d, d)`` by classical Runge-Kutta steps, d = 2 or 3.

    ``gauge`` is ``deturck``, relative to the metric field ``background`` (flat unless given), or
    ``none``, for study: it amplifies noise. ``normalized`` adds :math:`\tfrac2d\bar R g`, which
    keeps the volume. Raises ``ValueError`` with the bound if ``dt`` is unstable at the start,
    ``ConvergenceError`` with the trajectory so far if it becomes so or the metric degenerates.

    >>> grid = periodic_grid((9, 9))
    >>> x = grid.nodes()
    >>> g = torch.diag_embed(torch.exp(0.2 * torch.cos(x.flip(-1))))
    >>> grid_flow(g, grid, dt=0.01, steps=5).g.shape
    torch.Size([6, 9, 9, 2, 2])
    """
    where = "grid_flow"
    _check_metric(where, g, grid)
    _check_gauge(where, gauge, background, g, grid)
    _metric_march.check_run(where, dt, steps, save_every)
    if checks_values():
        _metric_march.check_stable(where, dt, stable_step(g, grid))
    fixed = None if background is None else _christoffel(background, grid)

    def field(g: Tensor) -> Tensor:
        return _rate(g, grid, gauge, fixed, normalized)

    def verdict(g: Tensor) -> str | None:
        if not bool(is_positive(g).all()):
            return "the metric is no longer positive definite"
        bound = stable_step(g, grid)
        if dt > 1.0001 * bound:  # not by a rounding
            return f"dt = {dt:.6g} exceeds the stability bound {bound:.6g}"
        return None

    t, saved, word = _metric_march.march(
        lambda g: _metric_march.rk4(field, g, dt), g, dt, steps, save_every, verdict
    )
    run = GridRun(t, saved)
    if word is not None:
        raise _metric_march.stopped(where, word, run)
    return run


def _check_metric(where: str, g: Tensor, grid: PeriodicGrid, name: str = "g") -> None:
    _checks.check_tensor(where, name, g)
    shape = (*grid.shape, grid.dim, grid.dim)
    if g.dim() < len(shape) or tuple(g.shape[g.dim() - len(shape) :]) != shape:
        raise ValueError(
            f"{where}: {name} has shape {tuple(g.shape)}, expected "
            f"(..., {', '.join(map(str, shape))})"
        )
    if g.dtype != grid.matrices[0].dtype:
        raise TypeError(
            f"{where}: {name} has dtype {g.dtype}, expected {grid.matrices[0].dtype} like the grid"
        )
    if not checks_values():
        return
    _checks.check_finite(where, **{name: g})
    slack = 100 * torch.finfo(g.dtype).eps * values(g).abs().max()
    _checks.check_that(where, lambda: (g - g.mT).abs() <= slack, f"{name} is not symmetric")
    _checks.check_that(
        where, lambda: is_positive(values(g)), f"{name} is not positive definite", GeometryError
    )


def _check_gauge(
    where: str, gauge: str, background: Tensor | None, g: Tensor, grid: PeriodicGrid
) -> None:
    if gauge not in GAUGES:
        raise ValueError(f"{where}: gauge is {gauge!r}, expected one of {', '.join(GAUGES)}")
    if background is not None:
        if gauge == "none":
            raise ValueError(
                f"{where}: a background was given, expected one in DeTurck's gauge only"
            )
        _check_metric(where, background, grid, "background")
