r"""The Ricci flow of a surface within its conformal class, :math:`g = e^{2u}\bar g`.

.. math:: \partial_t u = -K = e^{-2u}(\bar\Delta u - \bar K), \qquad
          \text{normalised: } \partial_t u = 2\pi\chi/\mathrm{Area} - K

It is integrated for :math:`v = e^{2u}`, logarithmic diffusion
:math:`v_t = \bar\Delta\log v - 2\bar K`: the area is then linear in the unknown and Runge-Kutta
steps keep it, or its exact slope :math:`-4\pi\chi`, to round-off. A background is anything with a
Laplacian, a curvature and quadrature weights, meshes and charts included. Hamilton (1988), "The
Ricci flow on surfaces".
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from darboux import _checks
from darboux._checks import checks_values, values
from darboux.flows import _metric_march


@dataclass(frozen=True, eq=False)
class Background:
    r"""A fixed metric :math:`\bar g` on a surface, sampled at nodes of shape ``(*nodes)``.

    ``laplacian`` maps ``(..., *nodes)`` to the same shape and is :math:`\mathrm{div\,grad}`;
    functions are integrated with ``weights``, and the Laplacian of any function must integrate
    to zero for the conservation laws to be exact.
    """

    laplacian: Callable[[Tensor], Tensor]
    curvature: Tensor  # (*nodes), Gauss curvature
    weights: Tensor  # (*nodes), areas of the nodes
    largest: float  # a bound of the eigenvalues of -laplacian: it limits the step

    def integral(self, f: Tensor) -> Tensor:
        """Return the integral over the background ``(...)`` of ``f (..., *nodes)``."""
        return (f * self.weights).flatten(-self.weights.dim()).sum(-1)

    def gauss_curvature(self, u: Tensor) -> Tensor:
        r"""Return :math:`K = e^{-2u}(\bar K - \bar\Delta u)` of :math:`e^{2u}\bar g`."""
        return (self.curvature - self.laplacian(u)) * torch.exp(-2 * u)

    def area(self, u: Tensor) -> Tensor:
        r"""Return the area ``(...)`` of :math:`e^{2u}\bar g`."""
        return self.integral(torch.exp(2 * u))


class ConformalRun(NamedTuple):
    """A conformal Ricci flow, saved states time first."""

    t: Tensor  # (time,)
    u: Tensor  # (time, ..., *nodes)
    status: str  # "done", or "extinct" if the area was about to reach zero
    extinction: Tensor  # (...), the time at which it does; infinite unless chi > 0


def conformal_flow(
    u: Tensor,
    background: Background,
    *,
    dt: float,
    steps: int,
    normalized: bool = False,
    save_every: int = 1,
) -> ConformalRun:
    r"""Flow the conformal factor ``u (..., *nodes)`` by classical Runge-Kutta steps.

    Unnormalised, the area changes at the rate :math:`-4\pi\chi` exactly; a run of a sphere ends
    with the status ``extinct`` before it vanishes. ``normalized`` keeps the area. Copies of a
    batch end together. Raises ``ValueError`` with the bound if ``dt`` is unstable at the start,
    ``ConvergenceError`` with the trajectory so far if it becomes so.

    >>> torus = flat_torus((17, 17))
    >>> u = 0.3 * torch.cos(torus_nodes((17, 17))[..., 0])
    >>> run = conformal_flow(u, torus, dt=5e-3, steps=20)
    >>> bool((run.u[-1].std() < u.std()) & (torus.area(run.u).std() < 1e-12))
    True
    """
    where = "conformal_flow"
    shape = background.weights.shape
    _checks.check_tensor(where, "u", u)
    if u.dim() < len(shape) or u.shape[u.dim() - len(shape) :] != shape:
        raise ValueError(
            f"{where}: u has shape {tuple(u.shape)}, expected (..., {', '.join(map(str, shape))})"
        )
    if u.dtype != background.weights.dtype:
        raise TypeError(
            f"{where}: u has dtype {u.dtype}, expected {background.weights.dtype} like the "
            "background"
        )
    _checks.check_finite(where, u=u)
    _metric_march.check_run(where, dt, steps, save_every)

    def bound(v: Tensor) -> float:
        return _metric_march.RK4_REAL * float(v.min()) / background.largest

    if checks_values():
        _metric_march.check_stable(where, dt, bound(values(u).mul(2).exp()))
    total = background.integral(background.curvature)  # 2 pi chi
    trailing = (..., *[None] * len(shape))

    def field(v: Tensor) -> Tensor:
        slope = background.laplacian(v.log()) - 2 * background.curvature
        if normalized:
            slope = slope + 2 * (total / background.integral(v))[trailing] * v
        return slope

    chi_pi = float(values(total))
    spherical = chi_pi > 1e-6 and not normalized

    def verdict(v: Tensor) -> str | None:
        if not bool(v.isfinite().all()) or float(v.min()) <= 0:
            return "diverged"
        if spherical:
            left = float(background.integral(v).min()) / (2 * chi_pi)
            if left < 4 * dt:
                return "extinct"
        # beyond the bound for real, not by a rounding
        return "unstable" if dt > 1.0001 * bound(v) else None

    v = torch.exp(2 * u)
    extinction = torch.full_like(v[(..., *[0] * len(shape))], math.inf)
    if spherical:
        extinction = background.integral(v) / (2 * total)
    t, saved, word = _metric_march.march(
        lambda v: _metric_march.rk4(field, v, dt), v, dt, steps, save_every, verdict
    )
    status = word if word == "extinct" else "done"
    run = ConformalRun(t, saved.log() / 2, status, extinction)
    if word in ("diverged", "unstable"):
        raise _metric_march.stopped(
            where,
            "the state is no longer finite"
            if word == "diverged"
            else f"dt = {dt:.6g} exceeds the stability bound {bound(values(saved[-1])):.6g}",
            run,
        )
    return run


# -- backgrounds ---------------------------------------------------------------------------


def torus_nodes(
    shape: Sequence[int],
    periods: Sequence[float] | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return the nodes ``(*shape, d)`` of a periodic grid; periods are 2 pi unless given."""
    periods = _periods("torus_nodes", shape, periods)
    axes = [
        torch.arange(n, dtype=dtype, device=device) * (p / n)
        for n, p in zip(shape, periods, strict=True)
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)


def flat_torus(
    shape: Sequence[int],
    periods: Sequence[float] | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> Background:
    """Return the flat torus with nodes :func:`torus_nodes` and the spectral Laplacian."""
    periods = _periods("flat_torus", shape, periods)
    if len(shape) != 2:
        raise ValueError(f"flat_torus: shape is {tuple(shape)}, expected two sizes")
    n, m = shape
    kx = torch.fft.fftfreq(n, 1 / n, dtype=dtype, device=device) * (2 * math.pi / periods[0])
    ky = torch.fft.rfftfreq(m, 1 / m, dtype=dtype, device=device) * (2 * math.pi / periods[1])
    symbol = -(kx[:, None].square() + ky.square())

    def laplacian(f: Tensor) -> Tensor:
        return torch.fft.irfft2(symbol * torch.fft.rfft2(f), s=(n, m))

    node = periods[0] * periods[1] / (n * m)
    zero = torch.zeros(n, m, dtype=dtype, device=device)
    return Background(laplacian, zero, torch.full_like(zero, node), -float(symbol.min()))


def _periods(where: str, shape: Sequence[int], periods: Sequence[float] | None) -> list[float]:
    if any(not isinstance(n, int) or n < 3 for n in shape):
        raise ValueError(f"{where}: shape is {tuple(shape)}, expected sizes of at least 3")
    periods = [2 * math.pi] * len(shape) if periods is None else [float(p) for p in periods]
    if len(periods) != len(shape) or not all(p > 0 and math.isfinite(p) for p in periods):
        raise ValueError(f"{where}: periods is {periods}, expected {len(shape)} positive numbers")
    return periods


def sphere_nodes(
    degree: int, *, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
) -> Tensor:
    """Return the unit vectors ``(degree + 1, 2 degree + 1, 3)``: Gauss latitudes, even longitudes.

    Rows go from the south pole to the north pole, neither included.
    """
    z, _ = _gauss_legendre("sphere_nodes", degree)
    z = z.to(dtype=dtype, device=device)[:, None]
    count = 2 * degree + 1
    angle = 2 * math.pi / count * torch.arange(count, dtype=dtype, device=device)
    radius = (1 - z.square()).sqrt()
    return torch.stack(
        torch.broadcast_tensors(radius * angle.cos(), radius * angle.sin(), z), -1
    ).contiguous()


def round_sphere(
    degree: int, *, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
) -> Background:
    r"""Return the unit sphere with nodes :func:`sphere_nodes` and the spectral Laplacian.

    Exact for spherical harmonics up to ``degree`` (L). What is left of a function on the nodes
    gets the eigenvalue :math:`-L(L + 1)`, so that the flow damps it. The matrices take
    :math:`(L + 1)^3` numbers.
    """
    z, weights = _gauss_legendre("round_sphere", degree)
    top = degree * (degree + 1)
    matrices = []
    for m in range(degree + 1):
        table = _legendre(z, m, degree)  # (l, nodes), orthonormal under the weights
        orders = torch.arange(m, degree + 1, dtype=torch.float64)
        gain = top - orders * (orders + 1)
        matrices.append(table.mT @ (gain[:, None] * table * weights))
    transform = torch.stack(matrices).to(dtype=dtype, device=device)  # (m, nodes, nodes)
    count = 2 * degree + 1

    def laplacian(f: Tensor) -> Tensor:
        waves = torch.fft.rfft(f).movedim(-1, -2)[..., None]  # (..., m, latitude, 1)
        pairs = transform @ torch.cat([waves.real, waves.imag], -1)
        low = torch.complex(pairs[..., 0], pairs[..., 1]).movedim(-2, -1)
        return torch.fft.irfft(low, count) - top * f

    areas = (2 * math.pi / count * weights).to(dtype=dtype, device=device)
    areas = areas[:, None].expand(-1, count).contiguous()
    return Background(laplacian, torch.ones_like(areas), areas, float(top))


def _gauss_legendre(where: str, degree: int) -> tuple[Tensor, Tensor]:
    if not isinstance(degree, int) or degree < 1:
        raise ValueError(f"{where}: degree is {degree}, expected a positive integer")
    # Golub and Welsch (1969): the nodes are the eigenvalues of the Jacobi matrix
    k = torch.arange(1, degree + 1, dtype=torch.float64)
    off = k / (4 * k.square() - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return nodes, 2 * vectors[0].square()


def _legendre(z: Tensor, m: int, degree: int) -> Tensor:
    # Associated Legendre functions of order m, of unit norm on [-1, 1], by the three-term
    # recurrence in l, which is stable upwards.
    sine = (1 - z.square()).sqrt()
    first = torch.full_like(z, math.sqrt(0.5))
    for j in range(1, m + 1):
        first = first * sine * math.sqrt((2 * j + 1) / (2 * j))
    rows = [first]
    before = torch.zeros_like(z)
    for l in range(m + 1, degree + 1):
        a = math.sqrt((4 * l * l - 1) / (l * l - m * m))
        b = math.sqrt(((l - 1) ** 2 - m * m) / (4 * (l - 1) ** 2 - 1)) if l > m + 1 else 0.0
        rows.append(a * (z * rows[-1] - b * before))
        before = rows[-2]
    return torch.stack(rows)
