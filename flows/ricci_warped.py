r"""The Ricci flow of a rotationally symmetric metric on S^1 x S^n, up to its neck pinch.

.. math:: g = ds^2 + \psi(s)^2 g_{S^n}, \qquad
          \psi_t = \psi_{ss} - (n - 1)\frac{1 - \psi_s^2}{\psi}

with s the arclength, of period L(t), which shrinks or grows at the rate :math:`n\psi_{ss}/\psi`
of every piece. The unknowns are :math:`y = \psi^2` on an equispaced grid of
:math:`\sigma = s/L` and log L: y stays smooth at the neck, and its equation is linear for n = 2
but for the drift of :math:`\sigma`. Derivatives are spectral. Angenent and Knopf, Math. Res.
Lett. 11 (2004) 493. Profiles that close at poles are not covered: there these variables grow
cone angles, and the flow needs a gauge of its own.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from darboux._checks import values
from darboux.flows import _profile
from darboux.flows._metric_march import RK4_REAL, rk4, stopped

# Share of the explicit stability bound that a step takes, and share of the neck's remaining life.
_CFL = 0.8
_LIFE = 0.05


class WarpedRun(NamedTuple):
    """A warped Ricci flow, saved states time first; estimates are NaN unless pinched."""

    t: Tensor  # (time,)
    psi: Tensor  # (time, ..., N), the radius at the arclengths L i/N
    length: Tensor  # (time, ...)
    status: str  # "done" or "pinched"
    pinch_time: Tensor  # (...)
    pinch_place: Tensor  # (...), the arclength that the point had at the start


def warped_curvatures(psi: Tensor, length: Tensor | float, n: int = 2) -> tuple[Tensor, Tensor]:
    r"""Return :math:`K_0 = -\psi_{ss}/\psi` and :math:`K_1 = (1 - \psi_s^2)/\psi^2`, ``(..., N)``.

    The sectional curvatures of planes along and across s. The scalar curvature is
    :math:`2nK_0 + n(n - 1)K_1`. ``psi (..., N)`` is sampled at equal arclengths of the circle.
    """
    length = _profile.check_profile("warped_curvatures", psi, length, n, 4)
    y, y_s, y_ss = _jet(psi.square(), length)
    slope = y_s.square() / (4 * y)  # psi_s^2
    return (slope - y_ss / 2) / y, (1 - slope) / y


def warped_flow(
    psi: Tensor,
    length: Tensor | float,
    t: float,
    *,
    n: int = 2,
    dt: float | None = None,
    pinched_below: float = 0.1,
    save_every: int = 1,
    max_steps: int = 100_000,
) -> WarpedRun:
    r"""Flow ``psi (..., N)``, given at equal arclengths of a circle, up to the time ``t``.

    Explicit Runge-Kutta steps of at most ``dt``, shortened to what stability and the life of
    the neck allow. A run ends with the status ``pinched`` as soon as a radius is below
    ``pinched_below`` times the smallest at the start; the remaining life is estimated from the
    rate of the neck there, :math:`\partial_t\psi^2 = (\psi^2)_{ss} - 2(n - 1)`, its place by a
    parabola. Copies of a batch move with common steps and end together. Differentiable in
    ``psi`` and ``length``, the sequence of steps held; that makes the derivative of the pinching
    time right to the slow change of the neck's rate, a per cent or two.

    Raises ``ConvergenceError`` with the trajectory so far after ``max_steps``.

    >>> cylinder = torch.ones(16, dtype=torch.float64)  # psi^2 = 1 - 2t
    >>> run = warped_flow(cylinder, 6.0, 1.0)
    >>> run.status, round(float(run.pinch_time), 6)
    ('pinched', 0.5)
    """
    where = "warped_flow"
    length = _profile.check_profile(where, psi, length, n, 4)
    _profile.check_run(where, t, dt, pinched_below, save_every)
    size = psi.shape[-1]
    floor = pinched_below**2 * float(values(psi).min()) ** 2
    filtered = _filter(psi)

    def field(state: Tensor) -> Tensor:
        y, shift, length = state[..., :size], state[..., size:-1], state[..., -1].exp()
        y, y_s, y_ss = _jet(y, length)
        _, shift_s, _ = _jet(shift, length)
        rate = n * (y_ss - y_s.square() / (2 * y)) / (2 * y)  # of each piece of length
        stretch = rate.mean(-1, keepdim=True)
        drift = _antiderivative(rate - stretch) * length[..., None]
        y_t = y_ss - 2 * (n - 1) + (n - 2) * y_s.square() / (2 * y) - y_s * drift
        # the label of a point, sigma + shift, moves with it
        shift_t = -(1 / length[..., None] + shift_s) * drift
        return torch.cat([y_t, shift_t, stretch], -1)

    state = torch.cat([psi.square(), torch.zeros_like(psi), length.log()[..., None]], -1)
    kept, times = [state], [0.0]
    now, count, status = 0.0, 0, "done"
    while now < t and status == "done":
        if count == max_steps:
            run = _result(kept, times, "done", n)
            raise stopped(where, f"{max_steps} steps were not enough", run)
        plain = values(state)
        finest = float(plain[..., -1].min().exp()) / size
        h = min(
            t - now,
            dt or math.inf,
            _CFL * RK4_REAL * (finest / math.pi) ** 2,
            _LIFE * float(plain[..., :size].min()) / max(1, 2 * (n - 1)),
        )
        new = rk4(field, state, h)
        fields = filtered(new[..., :-1].unflatten(-1, (2, size))).flatten(-2)
        new = torch.cat([fields, new[..., -1:]], -1)
        plain = values(new)
        if not bool(plain.isfinite().all()) or float(plain[..., :size].min()) <= 0:
            if count and times[-1] != now:
                kept.append(state)
                times.append(now)
            run = _result(kept, times, "done", n)
            raise stopped(where, "the grid no longer resolves the metric", run)
        state, count = new, count + 1
        # the last step ends at t, not within a rounding error of it
        now = t if h == t - now else now + h
        if float(plain[..., :size].min()) < floor:
            status = "pinched"
        if count % save_every == 0 or status != "done" or now >= t:
            kept.append(state)
            times.append(now)
    return _result(kept, times, status, n)


def _result(kept: list[Tensor], times: list[float], status: str, n: int) -> WarpedRun:
    states = torch.stack(kept)
    last = kept[-1]
    t = torch.tensor(times, dtype=last.dtype, device=last.device)
    size = last.shape[-1] // 2
    y, length = states[..., :size], states[..., -1].exp()
    if status != "pinched":
        nothing = torch.full_like(last[..., 0], math.nan)
        return WarpedRun(t, y.sqrt(), length, status, nothing, nothing)
    _, _, y_ss = _jet(y[-1], length[-1])
    lowest = y[-1].argmin(-1, keepdim=True)
    offset = _profile.vertex(y[-1], lowest)
    rate = (2 * (n - 1) - y_ss.gather(-1, lowest)) / y[-1].gather(-1, lowest)
    life = _profile.life(rate[..., 0])
    label = (lowest[..., 0] + offset) / size + _profile.between(last[..., size:-1], lowest, offset)
    place = length[0] * (label % 1)
    return WarpedRun(t, y.sqrt(), length, status, t[-1] + life, place)


# -- Fourier series on the circle of unit length -------------------------------------------


def _waves(y: Tensor) -> Tensor:
    size = y.shape[-1]
    return 2 * math.pi * torch.arange(size // 2 + 1, dtype=y.dtype, device=y.device)


def _jet(y: Tensor, length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # y and its first two derivatives in arclength
    size, k = y.shape[-1], _waves(y)
    once = k.clone()
    if size % 2 == 0:
        once[-1] = 0  # the sawtooth has no first derivative on the grid
    spectrum = torch.fft.rfft(y)
    first = torch.fft.irfft(1j * once * spectrum, size) / length[..., None]
    second = torch.fft.irfft(-k.square() * spectrum, size) / length[..., None].square()
    return y, first, second


def _antiderivative(f: Tensor) -> Tensor:
    # of a function without mean; zero at 0
    size, k = f.shape[-1], _waves(f)
    inverse = torch.where(k > 0, 1 / torch.where(k > 0, k, 1.0), 0.0)
    if size % 2 == 0:
        inverse[-1] = 0
    whole = torch.fft.irfft(-1j * inverse * torch.fft.rfft(f), size)
    return whole - whole[..., :1]


def _filter(y: Tensor):
    # order 16: takes the last few waves, which products alias into, and leaves the others alone
    size = y.shape[-1]
    k = _waves(y)
    gain = torch.exp(-36 * (k / k[-1]) ** 16)
    return lambda z: torch.fft.irfft(gain * torch.fft.rfft(z), size)
