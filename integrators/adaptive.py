r"""Steps that follow the motion, by moving in a fictitious time: splittings keep their structure.

A step size that reacts to the state in the usual way (``dt = tolerance / error``) destroys what a
symplectic or symmetric method is for. Here the *equation* is transformed instead, and moved with a
constant step ``dt`` of the new time :math:`\tau`. Every copy then has a physical time of its own:
``Trajectory.t`` has the shape ``(time, ...)``. States are ``q, p (..., d)``: flatten several bodies
into the last dimension.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from darboux._autodiff import gradient
from darboux._checks import check_that
from darboux.integrators.systems import Pair, Separable, Split


class _OwnTime(Split):
    # Each copy carries its time as the last component of q, and of p one more number of its own.
    def __init__(self, name: str, carried: Callable[[Tensor, Tensor], Tensor], *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.name, self.carried = name, carried

    def lift(self, q: Tensor, p: Tensor, t: float | Tensor) -> Pair:
        if q.shape != p.shape:
            raise ValueError(
                f"{self.name}: p has shape {tuple(p.shape)}, expected {tuple(q.shape)} like q"
            )
        carried = self.carried(q, p)
        if carried.shape != q.shape[:-1]:
            raise ValueError(
                f"{self.name}: a scalar of the state has shape {tuple(carried.shape)} for q of "
                f"shape {tuple(q.shape)}, expected (...) for (..., d)"
            )
        clock = torch.as_tensor(t, dtype=q.dtype, device=q.device).expand(*q.shape[:-1], 1)
        return torch.cat([q, clock], -1), torch.cat([p, carried[..., None]], -1)

    def lower(self, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return q[..., :-1], p[..., :-1], q[..., -1]


class _Logarithmic(_OwnTime):
    default = "position_leapfrog"


def logarithmic(system: Separable) -> Split:
    r"""Return ``system`` in a time that slows down where the potential is deep.

    .. math:: \Gamma = \log(T(p) - E) - \log(-V(q)), \qquad
              \frac{dt}{d\tau} = \frac{1}{T - E} = \frac{1}{-V}

    :math:`E` is the energy at the start of each copy, on which :math:`\Gamma = 0`. Both parts are
    solved exactly, so that every splitting is symplectic for :math:`\Gamma`, with time and
    :math:`-E` as a conjugate pair. ``position_leapfrog``, the method of a run that names none, then
    follows a Kepler orbit of any eccentricity exactly, but for the time. :math:`V` must stay
    negative. A step is about :math:`d\tau/|V|`. Mikkola & Tanikawa, Celest. Mech. 74 (1999) 287;
    Preto & Tremaine, Astron. J. 118 (1999) 2532.
    """
    _check_separable("logarithmic", system)
    potential = system.potential
    if potential is None:
        raise ValueError("logarithmic: the system gives only a force, expected a potential")
    if system.kinetic is None and not system.quadratic:
        raise ValueError("logarithmic: the system gives only a velocity, expected kinetic")

    def kinetic(p: Tensor) -> Tensor:
        return (p * p / system.mass).sum(-1) / 2 if system.kinetic is None else system.kinetic(p)

    def carried(q: Tensor, p: Tensor) -> Tensor:
        v = potential(q)
        check_that("logarithmic", lambda: v < 0, "the potential is not negative at the start")
        return kinetic(p) + v

    def drift(q: Tensor, p: Tensor, h: float | Tensor) -> Pair:
        x, e = p[..., :-1], p[..., -1:]
        t = h / (kinetic(x)[..., None] - e)
        return q + t * torch.cat([system.velocity(x), torch.ones_like(t)], -1), p

    def kick(q: Tensor, p: Tensor, h: float | Tensor) -> Pair:
        x = q[..., :-1]
        t = -h / potential(x)[..., None]
        return q, p + t * torch.cat([system.force(x), torch.zeros_like(t)], -1)

    return _Logarithmic("logarithmic", carried, [drift, kick], energy=system.energy)


def step_controlled(system: Separable, monitor: Callable[[Tensor], Tensor]) -> Split:
    r"""Return ``system`` with steps proportional to ``monitor(q)``, reversibly.

    .. math:: \frac{dt}{d\tau} = \frac1z, \qquad
              \frac{dz}{d\tau} = -\frac{\nabla s(q) \cdot \dot q}{s(q)}, \qquad z_0 = 1/s(q_0)

    ``monitor`` is :math:`s(q) (...) > 0` for ``q (..., d)``: the step is nearly ``dt`` times it.
    The density :math:`z` is integrated with the state, not recomputed from it, which makes the
    whole explicit and symmetric: errors in the energy stay bounded where the motion is reversible.
    The parts are drift, kick and control, moved by ``leapfrog`` and its compositions. Hairer &
    Soderlind, SIAM J. Sci. Comput. 26 (2005) 1838.
    """
    _check_separable("step_controlled", system)

    def carried(q: Tensor, p: Tensor) -> Tensor:
        s = monitor(q)
        check_that("step_controlled", lambda: s > 0, "the monitor is not positive at the start")
        return 1 / s

    def drift(q: Tensor, p: Tensor, h: float | Tensor) -> Pair:
        x, z = p[..., :-1], p[..., -1:]
        return q + h / z * torch.cat([system.velocity(x), torch.ones_like(z)], -1), p

    def kick(q: Tensor, p: Tensor, h: float | Tensor) -> Pair:
        z = p[..., -1:]
        return q, p + h / z * torch.cat([system.force(q[..., :-1]), torch.zeros_like(z)], -1)

    def control(q: Tensor, p: Tensor, h: float | Tensor) -> Pair:
        slope = gradient(lambda x: monitor(x).log(), q[..., :-1])
        change = (slope * system.velocity(p[..., :-1])).sum(-1, keepdim=True)
        return q, torch.cat([p[..., :-1], p[..., -1:] - h * change], -1)

    return _OwnTime("step_controlled", carried, [drift, kick, control], energy=system.energy)


def _check_separable(where: str, system: object) -> None:
    if not isinstance(system, Separable):
        raise TypeError(f"{where}: system is a {type(system).__name__}, expected a Separable")
    if system.time:
        raise ValueError(f"{where}: the system depends on the time, expected one that does not")
