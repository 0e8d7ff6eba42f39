r"""Systems made of parts that are solved exactly: rigid bodies, charges, planets, diagonal metrics.

Each is a :class:`Split`: with two parts every splitting moves it, with more the compositions of
a symmetric step, ``leapfrog`` first. What a step keeps is what all parts keep.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from darboux._autodiff import gradient
from darboux._checks import check_tensor, check_that, corrections, in_transform, values
from darboux.integrators.systems import Flow, Pair, Split

# --- Rigid bodies -------------------------------------------------------------------------------


def rigid_body(inertia: Tensor) -> Split:
    r"""Return Euler's equations of a free rigid body, for its angular momentum ``m (..., 3)``.

    .. math:: \dot m = m \times I^{-1} m, \qquad H = \sum_i m_i^2/2 I_i

    ``inertia (3,)`` holds the principal moments. The parts are rotations about the body axes,
    Poisson maps all: :math:`|m|^2` is kept to round-off and
    :math:`J B(m) J^T = B(m')` with :math:`B(m) v = m \times v`. ``m`` is the ``q`` of
    ``integrate``, which takes no ``p``. McLachlan, Phys. Rev. Lett. 71 (1993) 3043; Reich,
    Physica D 76 (1994) 375.
    """
    _check_inertia("rigid_body", inertia)

    def about(axis: int) -> Flow:
        def turn(m: Tensor, p: Tensor, h: float | Tensor) -> Pair:
            return _turn(m, axis, -h * m[..., axis] / inertia[axis].to(m)), p

        return turn

    def field(m: Tensor, p: Tensor) -> Pair:
        return torch.linalg.cross(m, m / inertia.to(m)), torch.zeros_like(p)

    def energy(m: Tensor, p: Tensor) -> Tensor:
        return (m * m / inertia.to(m)).sum(-1) / 2

    return Split([about(0), about(1), about(2)], field=field, energy=energy)


def spinning_top(inertia: Tensor, potential: Callable[[Tensor], Tensor] | None = None) -> Split:
    r"""Return a rigid body with its attitude, free or in a potential.

    .. math:: \dot x = \tfrac12\, x\,(0, I^{-1} m), \qquad \dot m = m \times I^{-1} m + \tau(x),
              \qquad \tau_i = -\tfrac12 \nabla V(x) \cdot (x\, e_i)

    ``q = x (..., 4)`` is a unit quaternion, scalar first, that takes body axes to space;
    ``p = m (..., 3)`` is the angular momentum in the body. ``potential(x)`` gives ``(...)``; a
    heavy top has :math:`m g \ell` times the height of its axis. The length of ``x`` and, where
    :math:`V` is absent, the angular momentum in space are kept to round-off.
    """
    _check_inertia("spinning_top", inertia)
    axes = torch.eye(4)[1:]

    def about(axis: int) -> Flow:
        def turn(x: Tensor, m: Tensor, h: float | Tensor) -> Pair:
            angle = h * m[..., axis] / inertia[axis].to(m)
            half = angle[..., None] / 2
            x = half.cos() * x + half.sin() * quaternion_product(x, axes[axis].to(x))
            return x, _turn(m, axis, -angle)

        return turn

    def torque(x: Tensor) -> Tensor:
        if potential is None:
            return torch.zeros_like(x[..., 1:])
        slope = gradient(potential, x)
        along = [quaternion_product(x, e.to(x)) for e in axes]
        return -torch.stack([(slope * a).sum(-1) for a in along], -1) / 2

    def kick(x: Tensor, m: Tensor, h: float | Tensor) -> Pair:
        return x, m + h * torque(x)

    def field(x: Tensor, m: Tensor) -> Pair:
        rate = m / inertia.to(m)
        spin = torch.cat([torch.zeros_like(rate[..., :1]), rate], -1)
        return quaternion_product(x, spin) / 2, torch.linalg.cross(m, rate) + torque(x)

    def energy(x: Tensor, m: Tensor) -> Tensor:
        kinetic = (m * m / inertia.to(m)).sum(-1) / 2
        return kinetic if potential is None else kinetic + potential(x)

    turns = [about(0), about(1), about(2)]
    return Split(turns if potential is None else [*turns, kick], field=field, energy=energy)


def quaternion_product(x: Tensor, y: Tensor) -> Tensor:
    """Return the product of quaternions ``(..., 4)``, scalar first."""
    a, b = x[..., :1], y[..., :1]
    u, v = torch.broadcast_tensors(x[..., 1:], y[..., 1:])
    scalar = a * b - (u * v).sum(-1, keepdim=True)
    return torch.cat([scalar, a * v + b * u + torch.linalg.cross(u, v)], -1)


def _turn(m: Tensor, axis: int, angle: Tensor) -> Tensor:
    j, k = (axis + 1) % 3, (axis + 2) % 3
    c, s = angle.cos(), angle.sin()
    parts = list(m.unbind(-1))
    parts[j], parts[k] = c * m[..., j] - s * m[..., k], s * m[..., j] + c * m[..., k]
    return torch.stack(parts, -1)


def _check_inertia(where: str, inertia: Tensor) -> None:
    check_tensor(where, "inertia", inertia)
    if inertia.shape != (3,):
        raise ValueError(f"{where}: inertia has shape {tuple(inertia.shape)}, expected (3,)")
    check_that(where, lambda: inertia > 0, "inertia is not positive")


# --- Diagonal metrics ---------------------------------------------------------------------------


class _DiagonalMetric(Split):
    def __init__(self, inverse_metric: Callable[[Tensor], Tensor], dim: int, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.inverse_metric, self.dim = inverse_metric, dim

    def lift(self, q: Tensor, p: Tensor, t: float | Tensor) -> Pair:
        where = "diagonal_metric"
        if q.shape[-1] != self.dim:
            raise ValueError(
                f"{where}: q has shape {tuple(q.shape)}, expected (..., {self.dim}) for dim"
            )
        a = self.inverse_metric(q)
        if a.shape != q.shape:
            raise ValueError(
                f"{where}: inverse_metric has shape {tuple(a.shape)} for q of shape "
                f"{tuple(q.shape)}, expected the same"
            )
        for i in range(self.dim):
            slope = gradient(lambda x, i=i: self.inverse_metric(x)[..., i], q)[..., i]
            check_that(
                where,
                lambda a=a[..., i], slope=slope: slope.abs() <= 1e-6 * a.abs(),
                f"component {i} of inverse_metric depends on component {i} of q, expected not: "
                "take a Hamiltonian and 'gauss4'",
            )
        return q, p


def diagonal_metric(
    inverse_metric: Callable[[Tensor], Tensor],
    dim: int,
    potential: Callable[[Tensor], Tensor] | None = None,
) -> Split:
    r"""Return geodesic or natural motion in a diagonal metric, in exactly solved parts.

    .. math:: H = \tfrac12 \sum_i a_i(q)\, p_i^2 + V(q), \qquad \partial a_i/\partial q_i = 0

    ``inverse_metric(q) (..., d) -> (..., d)`` gives the :math:`a_i`. Each may depend on all
    coordinates but its own; the start of a run checks it. The part of :math:`a_i` moves
    :math:`q_i \mathrel{+}= h a_i p_i`, :math:`p_j \mathrel{-}= \tfrac h2 p_i^2\, \partial_j a_i`:
    explicit and symplectic though :math:`H` does not separate. Surfaces of revolution,
    polar and spherical coordinates with their radial part alone fit.
    """
    if dim < 1 or (dim == 1 and potential is None):
        raise ValueError(
            f"diagonal_metric: dim is {dim}, expected at least 2, or 1 and a potential"
        )

    def along(i: int) -> Flow:
        def move(q: Tensor, p: Tensor, h: float | Tensor) -> Pair:
            slope = gradient(lambda x: inverse_metric(x)[..., i], q)
            unit = torch.zeros_like(p)
            unit[..., i] = 1.0
            velocity = inverse_metric(q) * p * unit
            return q + h * velocity, p - h / 2 * p[..., i : i + 1].square() * slope * (1 - unit)

        return move

    def kick(q: Tensor, p: Tensor, h: float | Tensor) -> Pair:
        assert potential is not None
        return q, p - h * gradient(potential, q)

    def energy(q: Tensor, p: Tensor) -> Tensor:
        kinetic = (inverse_metric(q) * p * p).sum(-1) / 2
        return kinetic if potential is None else kinetic + potential(q)

    def field(q: Tensor, p: Tensor) -> Pair:
        return inverse_metric(q) * p, -gradient(lambda x: energy(x, p), q)

    parts = [along(i) for i in range(dim)] + ([] if potential is None else [kick])
    return _DiagonalMetric(inverse_metric, dim, parts, field=field, energy=energy)


# --- Charges ------------------------------------------------------------------------------------


def magnetic(
    b: Tensor | Callable[[Tensor], Tensor],
    potential: Callable[[Tensor], Tensor] | None = None,
    *,
    mass: float = 1.0,
) -> Split:
    r"""Return a charged particle in space, for its position and kinetic momentum ``(..., 3)``.

    .. math:: \dot q = p/m, \qquad \dot p = p \times b(q)/m - \nabla V(q), \qquad
              H = |p|^2/2m + V(q)

    ``b`` is charge times magnetic field, ``V`` charge times electric potential.

    *Uniform* ``b (3,)``: the drift is the exact helix and the kick is that of :math:`V`, both
    flows of the form :math:`dq \wedge dp + b`-term: every splitting, the Nystrom rows too, is
    symplectic for it (and in canonical momenta :math:`p + A(q)`). Spreiter & Walter, J. Comput.
    Phys. 152 (1999) 102.

    *Varying* ``b(q) (..., 3)``: the drift is straight and the kick solves
    :math:`\dot p = p \times b/m - \nabla V` at frozen ``q``, a rotation: Boris' method with the
    exact angle. It preserves volume, and :math:`|p|` where :math:`V = 0`, but no symplectic
    form: Ellison et al., J. Comput. Phys. 301 (2015) 489.
    """
    if isinstance(b, Tensor) and b.shape != (3,):
        raise ValueError(f"magnetic: b has shape {tuple(b.shape)}, expected (3,) or a function")
    if not isinstance(b, Tensor) and not callable(b):
        raise TypeError(f"magnetic: b is a {type(b).__name__}, expected a tensor or a function")
    if not mass > 0:
        raise ValueError(f"magnetic: mass is {mass}, expected a positive number")

    def force(q: Tensor) -> Tensor:
        return torch.zeros_like(q) if potential is None else -gradient(potential, q)

    def strength(q: Tensor) -> Tensor:
        return (b.to(q) if isinstance(b, Tensor) else b(q)) / mass

    def helix(q: Tensor, p: Tensor, h: float | Tensor) -> Pair:
        p, travelled = _gyrate(p, torch.zeros_like(p), strength(q), h)
        return q + travelled / mass, p

    def push(q: Tensor, p: Tensor, h: float | Tensor) -> Pair:
        return q, p + h * force(q)

    def drift(q: Tensor, p: Tensor, h: float | Tensor) -> Pair:
        return q + h * p / mass, p

    def turn(q: Tensor, p: Tensor, h: float | Tensor) -> Pair:
        return q, _gyrate(p, force(q), strength(q), h)[0]

    def field(q: Tensor, p: Tensor) -> Pair:
        bent = torch.linalg.cross(p, strength(q).expand_as(p))
        return p / mass, bent + force(q)

    def energy(q: Tensor, p: Tensor) -> Tensor:
        kinetic = p.square().sum(-1) / (2 * mass)
        return kinetic if potential is None else kinetic + potential(q)

    uniform = isinstance(b, Tensor)
    flows = [helix, push] if uniform else [drift, turn]
    return Split(flows, field=field, energy=energy, quadratic=uniform)


def _gyrate(p: Tensor, f: Tensor, w: Tensor, h: float | Tensor) -> Pair:
    # p' = p x w + f over the time h, and the integral of p where f = 0 (Rodrigues)
    w = w.expand_as(p)
    s = (h * h) * (w * w).sum(-1, keepdim=True)
    c2, c3 = _c2_c3(s)
    c1 = 1 - s * c3

    def integral(u: Tensor) -> Tensor:
        bent = torch.linalg.cross(u, w)
        return h * (u + h * c2 * bent + h * h * c3 * torch.linalg.cross(bent, w))

    bent = torch.linalg.cross(p, w)
    turned = p + h * c1 * bent + h * h * c2 * torch.linalg.cross(bent, w)
    return turned + integral(f), integral(p)


# --- Planets ------------------------------------------------------------------------------------

_MAX_NEWTON = 60


def kepler_flow(q: Tensor, v: Tensor, t: float | Tensor, mu: float | Tensor = 1.0) -> Pair:
    r"""Return the Kepler motion of position and velocity ``q, v (..., d)`` after the time ``t``.

    .. math:: \ddot q = -\mu\, q/|q|^3

    One formula for ellipses, parabolas and hyperbolas, forwards and backwards: with
    :math:`\beta = 2\mu/r_0 - v^2`, :math:`\eta = q \cdot v` and
    :math:`G_k = s^k c_k(\beta s^2)` it solves :math:`r_0 G_1 + \eta G_2 + \mu G_3 = t` for the
    universal anomaly ``s`` by a safeguarded Newton iteration, to round-off. ``mu`` and ``t``
    broadcast to ``(...)``. Differentiable in all of them. Collisions are not regularised. Battin,
    An Introduction to the Mathematics and Methods of Astrodynamics (1999), 4.5; Wisdom & Hernandez,
    Mon. Not. R. Astron. Soc. 453 (2015) 3015.
    """
    r0 = q.square().sum(-1).sqrt()
    eta = (q * v).sum(-1)
    mu, t = (torch.as_tensor(x, dtype=q.dtype, device=q.device) for x in (mu, t))
    beta = 2 * mu / r0 - v.square().sum(-1)
    # Whole turns of an ellipse change nothing.
    bound = beta > 0
    period = 2 * math.pi * mu * torch.where(bound, beta, 1.0) ** -1.5
    t = t - torch.where(bound, period * (t / period).round(), 0.0)

    with torch.no_grad():
        s = _universal_anomaly(*(x.detach() for x in torch.broadcast_tensors(r0, eta, mu, beta, t)))
    # Each Newton step made with a graph doubles the order of derivatives that are exact.
    differentiate = torch.is_grad_enabled() or in_transform()
    for _ in range(corrections().bit_length() if differentiate else 1):
        error, r, *_ = _orbit(s, r0, eta, mu, beta, t)
        s = s - error / r
    _, r, g1, g2, g3 = _orbit(s, r0, eta, mu, beta, t)
    f, g = -mu * g2 / r0, t - mu * g3
    f_dot, g_dot = -mu * g1 / (r * r0), -mu * g2 / r
    return (
        q + (f[..., None] * q + g[..., None] * v),
        v + (f_dot[..., None] * q + g_dot[..., None] * v),
    )


def _orbit(
    s: Tensor, r0: Tensor, eta: Tensor, mu: Tensor, beta: Tensor, t: Tensor
) -> tuple[Tensor, ...]:
    # The error of the equation for s, its derivative, which is the distance, and G_1, G_2, G_3.
    x = beta * s * s
    c2, c3 = _c2_c3(x)
    g1, g2, g3 = s * (1 - x * c3), s * s * c2, s**3 * c3
    return r0 * g1 + eta * g2 + mu * g3 - t, r0 * (1 - x * c2) + eta * g1 + mu * g2, g1, g2, g3


def _universal_anomaly(r0: Tensor, eta: Tensor, mu: Tensor, beta: Tensor, t: Tensor) -> Tensor:
    # The error grows with s at the rate r > 0: a bracket, then Newton that never leaves it.
    # A hyperbola is bracketed before its exponentials overflow.
    unbound = beta < 0
    most = torch.where(unbound, 40 * torch.where(unbound, -beta, 1.0).rsqrt(), math.inf)
    far = (t / r0).clamp(-most, most)
    for _ in range(_MAX_NEWTON):
        short = _orbit(far, r0, eta, mu, beta, t)[0] * t.sign() < 0
        if not values(short).any():
            break
        far = torch.where(short, 2 * far, far)
    low, high = far.clamp(max=0), far.clamp(min=0)
    s = torch.minimum(torch.maximum(t / r0 * (1 - eta * t / (2 * r0 * r0)), low), high)
    for _ in range(_MAX_NEWTON):
        error, r, *_ = _orbit(s, r0, eta, mu, beta, t)
        low, high = torch.where(error < 0, s, low), torch.where(error > 0, s, high)
        new = s - error / r
        new = torch.where((new >= low) & (new <= high), new, (low + high) / 2)
        moving = (new - s).abs() > torch.finfo(s.dtype).eps ** 0.6 * s.abs()
        s = new
        if not values(moving).any():
            break
    return s


_FACTORIALS = [[1.0 / math.factorial(2 * j + k) for k in (2, 3)] for j in range(11)]


def _c2_c3(x: Tensor) -> Tensor:
    # The Stumpff functions c_2 and c_3, stacked in front: by their series where |x| < 1.
    small = x.abs() < 1.0
    near = -torch.where(small, x, 0.0)
    coefficients = torch.tensor(_FACTORIALS, dtype=x.dtype, device=x.device)
    series = torch.zeros_like(x)
    for c in coefficients.reshape(11, 2, *[1] * x.dim()).flip(0):
        series = c + near * series
    outside = torch.where(small, 1.0, x)
    r = outside.abs().sqrt()
    c0 = torch.where(outside > 0, r.cos(), r.cosh())
    c1 = torch.where(outside > 0, r.sin(), r.sinh()) / r
    return torch.where(small, series, (1 - torch.stack([c0, c1])) / outside)


class _Planetary(Split):
    # Inside, body 0 is the centre of mass with the total momentum; the others have their
    # positions from the sun and their momenta in the frame of the centre of mass.
    def __init__(self, masses: Tensor, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.masses = masses

    def lift(self, q: Tensor, p: Tensor, t: float | Tensor) -> Pair:
        n = len(self.masses)
        if q.dim() < 2 or q.shape[-2] != n or q.shape != p.shape:
            raise ValueError(
                f"planetary: q has shape {tuple(q.shape)} and p {tuple(p.shape)}, expected "
                f"(..., {n}, d) for {n} masses"
            )
        share = (self.masses / self.masses.sum()).to(q)[:, None]
        centre, total = (share * q).sum(-2, keepdim=True), p.sum(-2, keepdim=True)
        planets = q[..., 1:, :] - q[..., :1, :], p[..., 1:, :] - share[1:] * total
        return torch.cat([centre, planets[0]], -2), torch.cat([total, planets[1]], -2)

    def lower(self, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        share = (self.masses / self.masses.sum()).to(q)[:, None]
        total = p[..., :1, :]
        sun = q[..., :1, :] - (share[1:] * q[..., 1:, :]).sum(-2, keepdim=True)
        planets = p[..., 1:, :] + share[1:] * total
        p = torch.cat([total - planets.sum(-2, keepdim=True), planets], -2)
        return torch.cat([sun, sun + q[..., 1:, :]], -2), p, None


def planetary(masses: Tensor, gravity: float | Tensor = 1.0) -> Split:
    r"""Return gravitating bodies, the first much the heaviest, as Wisdom & Holman move them.

    .. math:: H = \underbrace{\sum_i \frac{P_i^2}{2 m_i} - \frac{G m_0 m_i}{|Q_i|}}_{\text{Kepler}}
              + \underbrace{\frac{|\sum_i P_i|^2}{2 m_0}
              - \sum_{i<j} \frac{G m_i m_j}{|Q_i - Q_j|}}_{\text{small}}

    States ``q, p (..., n, d)`` are ordinary positions and momenta in an inertial frame, ``masses``
    is ``(n,)``; inside, ``Q`` counts from body 0 and ``P`` from the centre of mass (democratic
    heliocentric coordinates). The drift is the Kepler motion, exact at any step; the two terms of
    the kick commute, so that it is exact too, and every splitting applies but the Nystrom rows.
    Errors are as small as the planets are light: ``saba2``, ``aba864`` and ``aba1064`` are made for
    this. Total momentum and angular momentum are kept to round-off. Close encounters between
    planets, or with the sun within a step, are not resolved. Wisdom & Holman, Astron. J. 102 (1991)
    1528; Duncan, Levison & Lee, Astron. J. 116 (1998) 2067.
    """
    check_tensor("planetary", "masses", masses)
    if masses.dim() != 1 or len(masses) < 2:
        raise ValueError(
            f"planetary: masses has shape {tuple(masses.shape)}, expected (n,) with n at least 2"
        )
    check_that("planetary", lambda: masses > 0, "masses are not positive")
    n = len(masses)
    first, second = torch.triu_indices(n, n, 1)
    i, j = torch.triu_indices(n - 1, n - 1, 1)

    def kepler(q: Tensor, p: Tensor, h: float | Tensor) -> Pair:
        m = masses.to(q)[:, None]
        light = m[1:]
        centre = q[..., :1, :] + h * p[..., :1, :] / m.sum()
        x, v = kepler_flow(q[..., 1:, :], p[..., 1:, :] / light, h, gravity * m[0])
        return torch.cat([centre, x], -2), torch.cat([p[..., :1, :], light * v], -2)

    def perturb(q: Tensor, p: Tensor, h: float | Tensor) -> Pair:
        sun, force = small(q, p)
        return (
            torch.cat([q[..., :1, :], q[..., 1:, :] + h * sun], -2),
            torch.cat([p[..., :1, :], p[..., 1:, :] + h * force], -2),
        )

    def small(q: Tensor, p: Tensor) -> Pair:
        m, x = masses.to(q), q[..., 1:, :]
        gap = x[..., j, :] - x[..., i, :]
        weight = gravity * (m[1:][i] * m[1:][j])[:, None]
        pull = weight * gap * gap.square().sum(-1, keepdim=True) ** -1.5
        force = torch.zeros_like(x).index_add(-2, i, pull).index_add(-2, j, -pull)
        return p[..., 1:, :].sum(-2, keepdim=True) / m[0], force

    def field(q: Tensor, p: Tensor) -> Pair:
        m, x = masses.to(q)[:, None], q[..., 1:, :]
        sun, force = small(q, p)
        fall = -gravity * m[0] * m[1:] * x * x.square().sum(-1, keepdim=True) ** -1.5
        slope = torch.cat([p[..., :1, :] / m.sum(), p[..., 1:, :] / m[1:] + sun], -2)
        return slope, torch.cat([torch.zeros_like(p[..., :1, :]), force + fall], -2)

    def energy(q: Tensor, p: Tensor) -> Tensor:
        m = masses.to(q)
        distance = (q[..., first, :] - q[..., second, :]).square().sum(-1).sqrt()
        kinetic = (p * p / m[:, None]).sum((-2, -1)) / 2
        return kinetic - (gravity * m[first] * m[second] / distance).sum(-1)

    return _Planetary(masses, [kepler, perturb], field=field, energy=energy)
