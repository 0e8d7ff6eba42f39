r"""The Ricci flow of a rotationally symmetric metric on the sphere S^{n+1}, up to its neck pinch.

.. math:: g = e^{2X}\bigl(e^{-2W}dx^2 + e^{2W}\sin^2\!x\;g_{S^n}\bigr), \qquad W = S\sin^2\!x

in DeTurck's gauge relative to a nearly round sphere. In arclength the profile would grow cone
angles at its poles; here X and S are smooth there, even, and both obey heat equations. Derivatives
are spectral, on the nodes :math:`x_j = (j + 1/2)\pi/N` that avoid the poles. Garfinkle and
Isenberg, Contemp. Math. 367 (2005) 49.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from darboux import _checks
from darboux._checks import checks_values, values
from darboux.flows import _profile
from darboux.flows._metric_march import RK4_REAL, rk4, stopped

# Share of the explicit stability bound that a step takes, and share of the neck's remaining life.
_CFL = 0.5
_LIFE = 0.02
# The metric that DeTurck's gauge refers to has this share of the fields at the start. The round
# sphere (0) lets the nodes leave the bulges of a pinching metric, the metric itself (1) its neck.
_BACKGROUND = 0.15
# Share of the variation in the upper third of the waves from which on a metric is not resolved.
_ROUGH = 0.02


class RotationalRun(NamedTuple):
    """A rotationally symmetric Ricci flow, saved states time first; estimates are NaN if done."""

    t: Tensor  # (time,)
    psi: Tensor  # (time, ..., N), the radius of the sphere over each node
    arclength: Tensor  # (time, ..., N), the nodes' distance from the pole x = 0
    length: Tensor  # (time, ...), from pole to pole
    status: str  # "done", "pinched" or "extinct"
    pinch_time: Tensor  # (...), of the neck's pinch or of extinction
    pinch_place: Tensor  # (...), the arclength that the pinching point had at the start


def rotational_flow(
    psi: Tensor,
    length: Tensor | float,
    t: float,
    *,
    n: int = 2,
    dt: float | None = None,
    pinched_below: float = 0.1,
    save_every: int = 1,
    max_steps: int = 100_000,
) -> RotationalRun:
    r"""Flow the profile ``psi (..., N)`` of a metric on S^{n+1} up to the time ``t``.

    ``psi`` is the radius at the arclengths :math:`(j + 1/2)L/N` from one pole to the other; for a
    smooth metric :math:`\psi \approx s` at both. Explicit Runge-Kutta steps of at most ``dt``,
    shortened to what stability and the life of the neck allow. The run ends as ``pinched`` when
    a radius between two bulges falls below ``pinched_below`` times the narrowest at the start,
    as ``extinct`` when the widest does so; the remaining life is estimated from
    :math:`\partial_t\psi^2 = (\psi^2)_{ss} - 2(n - 1)` there. Copies of a batch end together.
    Differentiable in ``psi`` and ``length``, the sequence of steps held.

    Raises ``ConvergenceError`` with the trajectory so far after ``max_steps`` or where the grid no
    longer resolves the metric.

    >>> s = (torch.arange(16, dtype=torch.float64) + 0.5) * torch.pi / 16
    >>> run = rotational_flow(s.sin(), torch.pi, 1.0)  # r^2 = 1 - 2nt
    >>> run.status, round(float(run.pinch_time), 5)
    ('extinct', 0.25)
    """
    where = "rotational_flow"
    length = _check(where, psi, length, n)
    _profile.check_run(where, t, dt, pinched_below, save_every)
    grid = _Nodes(psi)
    size = psi.shape[-1]
    first = values(psi)
    floor = pinched_below * float(_narrowest(first))
    gone = pinched_below * float(first.max())

    start = torch.stack([*_fields(psi, length, grid), torch.zeros_like(psi)], -2)
    state, background = start, _BACKGROUND * start
    kept, times = [state], [0.0]
    now, count, status = 0.0, 0, "done"
    while now < t and status == "done":
        if count == max_steps:
            run = _result(kept, times, "done", n, length, grid)
            raise stopped(where, f"{max_steps} steps were not enough", run)
        u, v = _exponents(values(state), grid)
        narrow = float(_narrowest(v.exp() * grid.sin))
        h = min(
            t - now,
            dt or math.inf,
            _CFL * RK4_REAL * float(u.min().exp()) ** 2 / size**2,
            _LIFE * narrow**2 / max(1, 2 * (n - 1)),
        )
        new = grid.filtered(rk4(lambda y: _rate(y, background, grid, n), state, h))
        plain = values(new)
        if not bool(plain.isfinite().all()) or grid.roughness(plain) > _ROUGH:
            if count and times[-1] != now:
                kept.append(state)
                times.append(now)
            run = _result(kept, times, "done", n, length, grid)
            raise stopped(where, "the grid no longer resolves the metric", run)
        state, count = new, count + 1
        # the last step ends at t, not within a rounding error of it
        now = t if h == t - now else now + h
        radius = _exponents(plain, grid)[1].exp() * grid.sin
        if float(radius.amax(-1).min()) < gone:
            status = "extinct"
        elif float(_narrowest(radius)) < floor:
            status = "pinched"
        if count % save_every == 0 or status != "done" or now >= t:
            kept.append(state)
            times.append(now)
    return _result(kept, times, status, n, length, grid)


def rotational_rate(fields: Tensor, background: Tensor, n: int = 2) -> Tensor:
    r"""Return the rate of ``fields (..., 2, N)``, X and S on the nodes, in DeTurck's gauge.

    The flow :math:`-2\,\mathrm{Ric} + \mathcal L_V g`, V relative to the metric of the fields
    ``background (..., 2, N)``; zeros are the round sphere.
    """
    state = torch.cat([fields, torch.zeros_like(fields[..., :1, :])], -2)
    return _rate(state, background, _Nodes(fields), n)[..., :2, :]


def _rate(state: Tensor, fixed: Tensor, grid: "_Nodes", n: int) -> Tensor:
    return _rate_and_shrinking(state, fixed, grid, n)[0]


def _rate_and_shrinking(
    state: Tensor, fixed: Tensor, grid: "_Nodes", n: int
) -> tuple[Tensor, Tensor]:
    # the latter is the rate of log psi at a fixed point, without the gauge
    # chi = e^u, psi = e^v sin x; every 1/sin^2 x is cancelled by hand, for W = S sin^2 x
    sin, cos = grid.sin, grid.cos
    cot = cos / sin
    _, S, drift = state.unbind(-2)
    u = _exponents(state, grid)[0]
    u_x, v_x = _slopes(state, grid)
    S_0 = fixed[..., 1, :]
    u_0x, v_0x = _slopes(fixed, grid)
    factor = torch.exp(-2 * u)
    excess = torch.expm1(-4 * S * sin**2)  # chi^2 sin^2 x / psi^2 - 1
    bend = factor * (grid.odd(v_x) + 2 * v_x * cot + v_x**2 - 1 - u_x * (v_x + cot))  # psi_ss/psi
    # DeTurck's field V^x = g^{pq} (Gamma - Gamma_bar)^x_pq
    ratio = -4 * (S - S_0) * sin**2
    field = factor * (u_x - u_0x + n * (ratio.exp() * v_0x - v_x + cot * torch.expm1(ratio)))
    slope = factor * (v_x**2 + 2 * v_x * cot - 1 - excess / sin**2)  # (psi_s^2 - 1)/psi^2
    u_t = n * bend + grid.odd(field) + field * u_x
    shrinking = bend + (n - 1) * slope
    v_t = shrinking + field * (v_x + cot)
    # a point keeps its label x + drift
    drift_t = field * (1 + grid.odd(drift))
    return torch.stack([(u_t + v_t) / 2, (v_t - u_t) / (2 * sin**2), drift_t], -2), shrinking


def _slopes(state: Tensor, grid: "_Nodes") -> tuple[Tensor, Tensor]:
    X_x, S_x = grid.even(state[..., :2, :]).unbind(-2)
    W_x = S_x * grid.sin**2 + 2 * state[..., 1, :] * grid.sin * grid.cos
    return X_x - W_x, X_x + W_x


def _fields(psi: Tensor, length: Tensor, grid: "_Nodes") -> tuple[Tensor, Tensor]:
    u = (length / math.pi).log().unsqueeze(-1)
    v = (psi / grid.sin).log()
    return (u + v) / 2, (v - u) / (2 * grid.sin**2)


def _exponents(state: Tensor, grid: "_Nodes") -> tuple[Tensor, Tensor]:
    X, W = state[..., 0, :], state[..., 1, :] * grid.sin**2
    return X - W, X + W


def _narrowest(psi: Tensor) -> Tensor:
    """The least radius between two bulges of any copy; that of the widest where there is none."""
    inner = psi[..., 1:-1]
    neck = (inner < psi[..., :-2]) & (inner <= psi[..., 2:])
    return torch.minimum(torch.where(neck, inner, math.inf).amin(-1), psi.amax(-1)).min()


def _result(
    kept: list[Tensor], times: list[float], status: str, n: int, length: Tensor, grid: "_Nodes"
) -> RotationalRun:
    states = torch.stack(kept)
    last = kept[-1]
    t = torch.tensor(times, dtype=last.dtype, device=last.device)
    u, v = _exponents(states, grid)
    psi = v.exp() * grid.sin
    arclength, whole = grid.integral(u.exp())
    if status == "done":
        nothing = torch.full_like(last[..., 0, 0], math.nan)
        return RotationalRun(t, psi, arclength, whole, status, nothing, nothing)
    radius, plain = psi[-1], values(psi[-1])
    inner = plain[..., 1:-1]
    neck = (inner < plain[..., :-2]) & (inner <= plain[..., 2:])
    index = plain.argmax(-1, keepdim=True)
    if status == "pinched":
        lowest = torch.where(neck, inner, math.inf).argmin(-1, keepdim=True) + 1
        index = torch.where(neck.any(-1, keepdim=True), lowest, index)
    rate = -2 * _rate_and_shrinking(last, last, grid, n)[1].gather(-1, index)[..., 0]
    life = _profile.life(rate)
    offset = _profile.vertex(radius.square(), index)
    place = _profile.between(grid.x + last[..., 2, :], index, offset)
    return RotationalRun(t, psi, arclength, whole, status, t[-1] + life, place * length / math.pi)


def _check(where: str, psi: Tensor, length: Tensor | float, n: int) -> Tensor:
    length = _profile.check_profile(where, psi, length, n, 8)
    if checks_values():
        # psi = s + O(s^3) at a smooth pole; half a cell from it a cone of another angle shows
        ends = values(psi[..., [0, -1]]) / (values(length)[..., None] / (2 * psi.shape[-1]))
        _checks.check_that(
            where,
            lambda: (ends - 1).abs() < 0.5,
            f"psi does not close smoothly: at half a cell from the poles it is {ends.tolist()} "
            "times the arclength, expected about 1",
        )
    return length


class _Nodes:
    """The nodes between the poles, derivatives of even and odd fields, and the filter."""

    def __init__(self, like: Tensor):
        size = like.shape[-1]
        kwargs = {"dtype": like.dtype, "device": like.device}
        j = torch.arange(size, dtype=torch.float64)
        x = (j + 0.5) * (math.pi / size)
        cosines, sines = torch.cos(x[:, None] * j), torch.sin(x[:, None] * (j + 1))
        # exact inverses: the cosine transform, and the sine transform, on these nodes
        weight = (2 - (j == 0).to(j.dtype)) / size
        to_cosines = weight[:, None] * cosines.T
        to_sines = weight.flip(0)[:, None] * sines.T
        gain = torch.exp(-36 * (j / (size - 1)) ** 16)[:, None]
        later = ((j + 1) / size).clamp_max(1.0)[:, None]
        self._even = (-sines[:, :-1] @ (j[1:, None] * to_cosines[1:])).to(**kwargs)
        self._odd = (torch.cos(x[:, None] * (j + 1)) @ ((j + 1)[:, None] * to_sines)).to(**kwargs)
        self._smooth_even = (cosines @ (gain * to_cosines)).to(**kwargs)
        self._smooth_odd = (sines @ (torch.exp(-36 * later**16) * to_sines)).to(**kwargs)
        self._sum = ((sines[:, :-1] / j[1:]) @ to_cosines[1:] + x[:, None] * to_cosines[0]).to(
            **kwargs
        )
        self._to_cosines = to_cosines.to(**kwargs)
        self.x, self.sin, self.cos = (f.to(**kwargs) for f in (x, x.sin(), x.cos()))

    def even(self, f: Tensor) -> Tensor:
        """The derivative of a field that is even at the poles, an odd one."""
        return f @ self._even.T

    def odd(self, f: Tensor) -> Tensor:
        """The derivative of a field that is odd at the poles, an even one."""
        return f @ self._odd.T

    def filtered(self, state: Tensor) -> Tensor:
        """Take the last few waves, which products alias into; order 16."""
        even = state[..., :2, :] @ self._smooth_even.T
        return torch.cat([even, state[..., 2:, :] @ self._smooth_odd.T], -2)

    def roughness(self, state: Tensor) -> float:
        """The largest share of the upper third of the waves in the variation of log psi/sin x."""
        waves = (_exponents(state, self)[1] @ self._to_cosines.T).square()[..., 1:]
        whole, upper = waves.sum(-1), waves[..., 2 * waves.shape[-1] // 3 :].sum(-1)
        # a round sphere varies by round-off alone
        return float((upper.sqrt() / (whole.sqrt() + 0.01)).max())

    def integral(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """The integral of an even field from 0 to each node, and to pi."""
        return f @ self._sum.T, f.mean(-1) * math.pi
