"""What happens between the steps: crossings of a section, and states at any time."""

import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from darboux._checks import (
    ConvergenceError,
    check_that,
    checks_values,
    in_transform,
)
from darboux.integrators.base import Integrator, Trajectory
from darboux.integrators.driver import (
    check_count,
    check_state,
    check_step,
    find_method,
    graph_wanted,
)
from darboux.integrators.systems import Pair, Poisson, Separable, Split, System

Section = Callable[[Tensor, Tensor], Tensor]  # (..., d), (..., d) -> (...)

_MAX_SWEEPS = 60


class Crossings(NamedTuple):
    """The crossings of all copies, those of one copy together and in the order of their times."""

    copy: Tensor  # (m,) the copy's place among the flattened leading dimensions
    t: Tensor  # (m,)
    q: Tensor  # (m, d)
    p: Tensor  # (m, d)


def crossings(
    system: System,
    q: Tensor,
    p: Tensor | None = None,
    *,
    dt: float,
    steps: int,
    section: Section,
    direction: int = 0,
    method: str | Integrator | None = None,
    t0: float = 0.0,
) -> Crossings:
    r"""Return where and when orbits from ``q, p (..., d)`` cross ``section(q, p) (...) = 0``.

    ``direction`` is 1 for crossings at which ``section`` grows along the run, -1 for those at
    which it falls, 0 for both. A crossing is seen when the sign differs between two steps. The
    state there is one shorter step of the same method from the step before, so its energy is as
    good as that of the run; the length of that step is found by Newton's iteration, guarded by
    bisection, until ``section`` is zero to round-off. No trajectory is kept.

    Differentiable once in ``q, p`` and the parameters of ``system``, by the implicit function
    theorem; only then the steps are recorded.

    >>> from darboux.integrators import Separable
    >>> pendulum = Separable(lambda q: -torch.cos(q).sum(-1))
    >>> found = crossings(pendulum, torch.tensor([[0.1], [2.0]]), torch.zeros(2, 1), dt=0.05,
    ...                   steps=400, section=lambda q, p: q[..., 0], direction=1, method="bm4")
    >>> found.copy
    tensor([0, 0, 0, 1, 1])
    """
    where = "crossings"
    method = find_method(system.default if method is None else method)
    p = check_state(where, system, q, p)
    check_step(where, dt)
    if isinstance(dt, Tensor) or dt == 0:
        raise ValueError(f"{where}: dt is {dt}, expected a number other than 0")
    check_count(where, "steps", steps, 0)
    if direction not in (-1, 0, 1):
        raise ValueError(f"{where}: direction is {direction!r}, expected 1, -1 or 0")
    if in_transform():
        raise ValueError(
            f"{where}: how many crossings there are depends on the values, which torch.func "
            "cannot follow: give q and p leading dimensions instead, or use torch.autograd"
        )
    method.check(system)
    q, p = system.lift(q, p, t0)
    with torch.set_grad_enabled(graph_wanted(system, q, p, dt)):
        found = list(_Search(system, method, section, dt).run(q, p, steps, direction))
        return _gathered(system, found, q, p, t0)


_Found = tuple[Tensor, Tensor, Tensor, Tensor]  # which copies, then t, q, p of all


class _Search:
    # Each copy waits with its latest crossing until one of them meets its next: then all those
    # that wait are solved at once. So parameters that differ between copies stay in their places.

    def __init__(self, system: System, method: Integrator, section: Section, dt: float):
        self.system, self.method, self.dt = system, method, dt
        self.section = lambda q, p: section(*system.lower(q, p)[:2])

    def run(self, q: Tensor, p: Tensor, steps: int, direction: int) -> Iterator[_Found]:
        g = self.value(q, p)
        waiting = torch.zeros_like(g, dtype=torch.bool)
        self.start, self.first = (q, p), torch.zeros_like(g)  # the step before each crossing
        memory = None
        for n in range(steps):
            before = q, p
            q, p, memory = self.method.advance(self.system, q, p, self.dt, 1, memory)
            now = self.value(q, p)
            up, down = (g < 0) & (now >= 0), (g > 0) & (now <= 0)
            crossed = up if direction > 0 else down if direction < 0 else up | down
            if bool(crossed.any()):
                if bool((crossed & waiting).any()):
                    yield self.solve(waiting)
                    waiting = torch.zeros_like(waiting)
                self.start = _chosen(crossed, before, self.start)
                self.first = torch.where(crossed, float(n), self.first)
                waiting = waiting | crossed
            g = now
        if bool(waiting.any()):
            yield self.solve(waiting)

    def value(self, q: Tensor, p: Tensor) -> Tensor:
        with torch.no_grad():
            g = self.section(q, p)
        if g.dim() >= q.dim() or g.shape != q.shape[: g.dim()]:
            raise ValueError(
                f"crossings: section has shape {tuple(g.shape)} for q of shape "
                f"{tuple(q.shape)}, expected (...) for (..., d)"
            )
        if checks_values() and not bool(g.isfinite().all()):
            raise ConvergenceError("crossings: section is NaN or infinite: take a smaller dt")
        return g

    def moved(self, start: Pair, h: Tensor) -> Pair:
        # One step of length h (...), which differs from copy to copy.
        system = _rescaled(self.system, h, start[0])
        q, p, _ = self.method.advance(system, *start, 1.0, 1, None)
        return q, p

    def solve(self, waiting: Tensor) -> _Found:
        still = self.start[0].detach(), self.start[1].detach()
        with torch.no_grad():
            h = self.root(still, waiting)
        if torch.is_grad_enabled():
            # One Newton step from the root has the derivative of the root.
            free = h.requires_grad_()
            slope = torch.autograd.grad(self.section(*self.moved(still, free)).sum(), free)[0]
            h = h.detach()
            g = self.section(*self.moved(self.start, h))
            h = h - torch.where(waiting, (g - g.detach()) / torch.where(waiting, slope, 1.0), 0.0)
        q, p = self.moved(self.start, h)
        return waiting, self.first * self.dt + h, q, p

    def root(self, start: Pair, waiting: Tensor) -> Tensor:
        near, far = torch.zeros_like(self.first), torch.full_like(self.first, self.dt)
        below = self.value(*start) < 0  # the sign at the near end
        h = far / 2
        best, least = h, torch.full_like(h, torch.inf)
        done = ~waiting
        enough = torch.finfo(h.dtype).eps * abs(self.dt)
        for _ in range(_MAX_SWEEPS):
            g, slope = self.rate(*self.moved(start, h))
            best, least = torch.where(g.abs() < least, h, best), torch.minimum(g.abs(), least)
            change = g / torch.where(slope == 0, 1.0, slope)
            done = done | (g == 0) | (near == far) | ((change.abs() <= enough) & (slope != 0))
            if bool(done.all()):
                break
            before = (g < 0) == below
            near, far = torch.where(before, h, near), torch.where(before, far, h)
            newton, middle = h - change, (near + far) / 2
            # Strictly between the ends, in either direction of time.
            inside = ((newton - near) * (newton - far) < 0) & (slope != 0)
            h = torch.where(inside, newton, middle)
        return torch.where(waiting, best, 0.0)

    def rate(self, q: Tensor, p: Tensor) -> Pair:
        # The section and how fast the motion changes it.
        return torch.func.jvp(self.section, (q, p), self.system.field(q, p))[:2]  # pyright: ignore


def _wide(x: Tensor, like: Tensor) -> Tensor:
    return x.reshape(*x.shape, *[1] * (like.dim() - x.dim()))


def _chosen(mask: Tensor, new: Pair, old: Pair) -> Pair:
    q, p = (torch.where(_wide(mask, x), x, y) for x, y in zip(new, old, strict=True))
    return q, p


def _rescaled(system: System, h: Tensor, like: Tensor) -> System:
    # The system in a time that runs at rate h (...), so that a unit step is one of length h.
    # Methods may stack stages in front, so the rate lines up with the last dimensions.
    scaled = copy.copy(system)
    rate = _wide(h, like)

    def field(q: Tensor, p: Tensor) -> Pair:
        dq, dp = system.field(q, p)
        return rate * dq, rate * dp

    scaled.field = field
    scaled.energy = lambda *z: h * system.energy(*z)
    if isinstance(scaled, Separable):
        force, velocity = scaled.force, scaled.velocity
        scaled.force, scaled.velocity = lambda q: rate * force(q), lambda p: rate * velocity(p)
    elif isinstance(scaled, Split):
        scaled.flows = tuple(
            lambda q, p, s, flow=flow: flow(q, p, s * rate) for flow in scaled.flows
        )
    elif isinstance(scaled, Poisson):
        hamiltonian = scaled.hamiltonian
        scaled.hamiltonian = lambda z: h * hamiltonian(z)
    return scaled


def _gathered(
    system: System, found: list[_Found], q: Tensor, p: Tensor, t0: float | Tensor
) -> Crossings:
    copies, t, qs, ps = [], [], [], []
    for which, times, there_q, there_p in found:
        n = which.dim()
        index = which.flatten().nonzero()[:, 0]
        copies.append(index)
        t.append(times.flatten()[index])
        qs.append(there_q.reshape(-1, *q.shape[n:])[index])
        ps.append(there_p.reshape(-1, *p.shape[n:])[index])
    if not found:
        n = 0 if q.dim() == 1 else 1
        copies, t = [torch.zeros(0, dtype=torch.int64, device=q.device)], [q.new_zeros(0)]
        qs, ps = [q.reshape(-1, *q.shape[n:])[:0]], [p.reshape(-1, *p.shape[n:])[:0]]
    index = torch.cat(copies)
    order = index.argsort(stable=True)
    there_q, there_p, own = system.lower(torch.cat(qs)[order], torch.cat(ps)[order])
    times = t0 + torch.cat(t)[order] if own is None else own
    return Crossings(index[order], times, there_q, there_p)


def interpolate(system: System, trajectory: Trajectory, t: float | Tensor) -> Trajectory:
    r"""Return the states at times ``t (k,)`` or ``()`` between those of a trajectory.

    Each stretch is the cubic that has the states and the slopes of ``system`` at both ends
    (Hermite), which is off by about :math:`h^4/384` times the fourth derivative, ``h`` being the
    time between saved states. Only the stretches asked for are looked at. Raises ``ValueError``
    for times outside the trajectory.

    >>> from darboux.integrators import Separable, integrate
    >>> system = Separable(lambda q: q.square().sum(-1) / 2)
    >>> run = integrate(system, torch.ones(1), torch.zeros(1), dt=0.1, steps=40, method="bm4")
    >>> interpolate(system, run, torch.tensor([torch.pi])).q
    tensor([[-1.0000]])
    """
    where = "interpolate"
    times = trajectory.t
    if times.dim() != 1 or len(times) < 2:
        raise ValueError(
            f"{where}: trajectory.t has shape {tuple(times.shape)}, expected (time,) with at "
            "least two times, the same for all copies"
        )
    t = torch.as_tensor(t, dtype=times.dtype, device=times.device)
    if t.dim() > 1:
        raise ValueError(f"{where}: t has shape {tuple(t.shape)}, expected (k,) or ()")
    single, t = t.dim() == 0, t.reshape(-1)
    sign = torch.sign(times[-1] - times[0])
    ends = times[0], times[-1]
    check_that(
        where,
        lambda: (sign * (t - ends[0]) >= 0) & (sign * (t - ends[1]) <= 0),
        f"t is outside the trajectory, expected times from {float(ends[0]):g} to "
        f"{float(ends[1]):g}",
    )
    after = torch.searchsorted(sign * times.detach(), sign * t.detach(), right=True)
    after = after.clamp(1, len(times) - 1)
    nodes = [(times[i], trajectory.q[i], trajectory.p[i]) for i in (after - 1, after)]
    (a, qa, pa), (b, qb, pb) = nodes
    slopes = []
    for time, q, p in nodes:
        dq, dp = system.field(*system.lift(q, p, time.reshape(-1, *[1] * (q.dim() - 1))))
        slopes.append((dq[..., : q.shape[-1]], dp))
    h = b - a
    s = (t - a) / h

    def cubic(x: Tensor, y: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
        u, k = (c.reshape(-1, *[1] * (x.dim() - 1)) for c in (s, h))
        v = 1 - u
        found = (1 + 2 * u) * v * v * x + (3 - 2 * u) * u * u * y
        found = found + k * u * v * (v * dx - u * dy)
        return found[0] if single else found

    q = cubic(qa, qb, slopes[0][0], slopes[1][0])
    p = cubic(pa, pb, slopes[0][1], slopes[1][1])
    return Trajectory(t[0] if single else t, q, p)
