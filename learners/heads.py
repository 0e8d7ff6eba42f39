r"""The motions of one head: what a token does to a phase point, on each manifold.

One token is a contraction, a kick and an exactly solved drift of the time ``h``,

.. math:: (q, p) \to (b\,q, a\,p) = (q_1, p_1), \qquad
          p' = p_1 + h\,(f + F(q_1, p_1) + C(q_1)), \qquad
          (q', p'') = \mathrm{drift}_h(q_1, p'),

with the token's force :math:`f`, that of the head :math:`F` and a coupling of all heads :math:`C`.
Without gates :math:`b = 1` and :math:`a = e^{-\mu h}`, the exact flow of the friction
:math:`\dot p = -\mu p`; gates are factors :math:`a_i, b_i` in (0, 1) that the token chooses. The
contraction comes first, so that :math:`J^T \Omega J` is :math:`\Omega` with the plane of
:math:`(q_i, p_i)` times :math:`a_i b_i`, whatever the forces. States are ``q, p (..., heads,
dim)``. Each function here has the shape that :class:`Kind` tells; a new manifold is a new row of
:data:`KINDS`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from darboux.integrators import quaternion_product
from darboux.learners.recurrence import State, affine_scan, scan

Pair = tuple[Tensor, Tensor]
Force = Callable[[State, Tensor, Tensor], Tensor]
Drift = Callable[[State, Tensor, Tensor, float], Pair]


class Conserves(NamedTuple):
    r"""What one token's map keeps.

    ``symplectic``: :math:`J^T \Omega J = c\,\Omega`; ``volume``: :math:`\det J = c^n` for ``n``
    momenta; ``factor`` is :math:`c`, which friction makes less than 1. With gates the plane of each
    :math:`(q_i, p_i)` has the factor :math:`c\,a_i b_i`.
    """

    symplectic: bool
    volume: bool
    factor: float


@dataclass(frozen=True)
class Kind:
    """A manifold: its forces, its drift, its parameters, the period of its coordinates.

    ``make(heads, dim, size, generator)`` returns the parameters by name; ``tensors(them, h)`` what
    the functions take: ``force`` the first ``forces`` of it, ``drift`` the other ``drifts``.
    """

    make: Callable[..., dict[str, Tensor]]
    tensors: Callable[[Any, float], State]
    force: Force | None = None
    drift: Drift = lambda t, q, p, h: (q + h * p, p)
    forces: int = 0
    drifts: int = 0
    period: float | None = None
    symplectic: bool = True
    volume: bool = True
    velocity: bool = False  # the force depends on p, not on q
    even: bool = False  # dim must be even
    blocks: bool = False


# ---------------------------------------------------------------- forces


def _attract(t: State, q: Tensor, p: Tensor) -> Tensor:
    r""":math:`-K^T\tanh(Kq + b)`, minus the gradient of :math:`\sum\log\cosh(Kq + b)`."""
    k, b = t
    z = torch.matmul(k, q.unsqueeze(-1)).squeeze(-1) + b
    return -torch.matmul(k.mT, z.tanh().unsqueeze(-1)).squeeze(-1)


def _spring(t: State, q: Tensor, p: Tensor) -> Tensor:
    return -t[0] * q


def _swing(t: State, q: Tensor, p: Tensor) -> Tensor:
    return -t[0] * q.sin()


def _bend(t: State, q: Tensor, p: Tensor) -> Tensor:
    r""":math:`-W\varphi(U^T v)`, :math:`\varphi(s) = s^2/(1 + |s|)`."""
    u, w = t
    s = torch.matmul(u.mT, p.unsqueeze(-1)).squeeze(-1)
    phi = s.square() / (1 + torch.linalg.vector_norm(s, dim=-1, keepdim=True))
    return -torch.matmul(w, phi.unsqueeze(-1)).squeeze(-1)


def _low_rank(where: str) -> Callable[..., dict[str, Tensor]]:
    def make(heads: int, dim: int, size: int, generator: torch.Generator | None = None):
        if size >= dim:
            raise ValueError(f"{where}: rank is {size}, expected less than dim {dim}")
        u = torch.randn(heads, dim, size, generator=generator) / math.sqrt(dim)
        w = torch.randn(heads, dim, size, generator=generator) / math.sqrt(size)
        return {"u": u, "w": w}

    return make


def _orthogonal(parameters: Any, h: float) -> State:
    # U^T W = 0: a kick along W does not change what it depends on. Twice, for the round-off.
    u, w = parameters["u"], parameters["w"]
    basis = torch.linalg.qr(u).Q
    for _ in range(2):
        w = w - basis @ (basis.mT @ w)
    return u, w


# ---------------------------------------------------------------- drifts


def _revolve(t: State, q: Tensor, p: Tensor, h: float) -> Pair:
    r"""A(h/2) B(h) A(h/2) on tori of revolution, pairs :math:`(\theta, \varphi)`.

    :math:`H = p_\theta^2/2r^2 + p_\varphi^2/2s^2`, :math:`s = R + r\cos\theta`.
    """
    small, large = t
    x, y = q.unflatten(-1, (-1, 2)).unbind(-1)
    u, v = p.unflatten(-1, (-1, 2)).unbind(-1)
    half = h / 2 / small.square()
    x = x + half * u
    s = large + small * x.cos()
    y = y + h * v / s.square()
    u = u - h * v.square() * small * x.sin() / s**3
    x = x + half * u
    return torch.stack([x, y], -1).flatten(-2), torch.stack([u, v], -1).flatten(-2)


def _curve(t: State, q: Tensor, p: Tensor, h: float) -> Pair:
    r"""A(h/2) B(h) A(h/2) of :math:`H = \sum a_i(y)\,u_i^2/2 + \sum b_j(x)\,v_j^2/2`.

    ``q = (x, y)`` and ``p = (u, v)`` by halves. Each part is solved exactly, since what its
    factors depend on rests.
    """
    x, y = q.chunk(2, -1)
    u, v = p.chunk(2, -1)
    first, second = ([w[:, n] for w in t] for n in (0, 1))
    x, v = _slide(first, x, u, y, v, h / 2)
    y, u = _slide(second, y, v, x, u, h)
    x, v = _slide(first, x, u, y, v, h / 2)
    return torch.cat([x, y], -1), torch.cat([u, v], -1)


def _slide(net: list[Tensor], x: Tensor, u: Tensor, y: Tensor, v: Tensor, h: float) -> Pair:
    # x_i += h a_i(y) u_i ;  v -= h/2 sum_i u_i^2 grad a_i(y), a = exp(W2 tanh(W1 y + b1) + b2)
    w1, b1, w2, b2 = net
    z = (torch.matmul(w1, y.unsqueeze(-1)).squeeze(-1) + b1).tanh()
    a = (torch.matmul(w2, z.unsqueeze(-1)).squeeze(-1) + b2).exp()
    slope = (1 - z * z) * torch.matmul(w2.mT, (a * u * u).unsqueeze(-1)).squeeze(-1)
    return x + h * a * u, v - h / 2 * torch.matmul(w1.mT, slope.unsqueeze(-1)).squeeze(-1)


def inverse_metric(t: State, q: Tensor) -> Tensor:
    """Return the ``a_i`` of the learned metric at ``q (..., heads, dim)``."""
    w1, b1, w2, b2 = t
    x, y = q.chunk(2, -1)
    out = []
    for n, at in enumerate((y, x)):
        z = (torch.matmul(w1[:, n], at.unsqueeze(-1)).squeeze(-1) + b1[:, n]).tanh()
        out.append((torch.matmul(w2[:, n], z.unsqueeze(-1)).squeeze(-1) + b2[:, n]).exp())
    return torch.cat(out, -1)


# ---------------------------------------------------------------- the table


def _none(heads: int, dim: int, size: int, generator: torch.Generator | None = None):
    return {}


def _each(name: str, value: float) -> Callable[..., dict[str, Tensor]]:
    def make(heads: int, dim: int, size: int, generator: torch.Generator | None = None):
        return {name: value + torch.randn(heads, dim, generator=generator)}

    return make


def _make_potential(heads: int, dim: int, size: int, generator: torch.Generator | None = None):
    k = torch.randn(heads, size, dim, generator=generator) / math.sqrt(dim)
    return {"k": k, "b": torch.randn(heads, size, generator=generator)}


def _make_revolution(heads: int, dim: int, size: int, generator: torch.Generator | None = None):
    small = torch.rand(heads, dim // 2, generator=generator) / 2
    return {"log_r": small, "log_gap": torch.zeros_like(small)}


def _make_metric(heads: int, dim: int, size: int, generator: torch.Generator | None = None):
    half = dim // 2
    w1 = torch.randn(heads, 2, size, half, generator=generator) / math.sqrt(half)
    w2 = torch.randn(heads, 2, half, size, generator=generator) / (2 * math.sqrt(size))
    b1 = torch.randn(heads, 2, size, generator=generator)
    return {"w1": w1, "b1": b1, "w2": w2, "b2": torch.zeros(heads, 2, half)}


def _plain(*names: str) -> Callable[[Any, float], State]:
    return lambda parameters, h: tuple(parameters[name] for name in names)


KINDS: dict[str, Kind] = {
    "torus": Kind(_none, _plain(), period=1.0, blocks=True),
    # h^2 A stays below 4, beyond which the step is unstable.
    "oscillator": Kind(
        _each("rate", -3.0),
        lambda t, h: (4 / h**2 * t["rate"].sigmoid(),),
        force=_spring,
        forces=1,
        blocks=True,
    ),
    "pendulum": Kind(
        _each("strength", 0.0),
        _plain("strength"),
        force=_swing,
        forces=1,
        period=2 * math.pi,
        blocks=True,
    ),
    "potential": Kind(_make_potential, _plain("k", "b"), force=_attract, forces=2),
    "revolution": Kind(
        _make_revolution,
        lambda t, h: (t["log_r"].exp(), t["log_r"].exp() + t["log_gap"].exp()),
        drift=_revolve,
        drifts=2,
        period=2 * math.pi,
        even=True,
    ),
    "metric": Kind(_make_metric, _plain("w1", "b1", "w2", "b2"), drift=_curve, drifts=4, even=True),
    "low_rank": Kind(
        _low_rank("low_rank"),
        _orthogonal,
        force=_bend,
        forces=2,
        period=2 * math.pi,
        symplectic=False,
        velocity=True,
    ),
    "low_rank_literal": Kind(
        _low_rank("low_rank_literal"),
        _plain("u", "w"),
        force=_bend,
        forces=2,
        period=2 * math.pi,
        symplectic=False,
        volume=False,
        velocity=True,
    ),
}


# ---------------------------------------------------------------- coupling


def features(q: Tensor, period: float | None) -> Tensor:
    """Return ``q``, or its cosines and sines where it is periodic, all heads in one row."""
    q = q.flatten(-2)
    if period is None:
        return q
    angle = 2 * math.pi / period * q
    return torch.cat([angle.cos(), angle.sin()], -1)


def couple(t: State, q: Tensor, period: float | None) -> Tensor:
    r"""Return the force of the coupling ``(..., heads, dim)``.

    ``(K, b)``: minus the gradient of :math:`\omega^{-2}\sum\log\cosh(K\phi(q) + b)`, with
    :math:`\omega` radians to the unit of ``q``. ``(K, b, W)``: the free projection
    :math:`W\tanh(K\phi(q) + b)`, which is no gradient.
    """
    k, b = t[:2]
    z = torch.nn.functional.linear(features(q, period), k, b).tanh()
    if len(t) == 3:
        force = z @ t[2].mT
    else:
        force = -(z @ k)
        if period is not None:
            w = 2 * math.pi / period
            angle = w * q.flatten(-2)
            of_cos, of_sin = force.chunk(2, -1)
            force = (angle.cos() * of_sin - angle.sin() * of_cos) / w
    return force.unflatten(-1, q.shape[-2:])


# ---------------------------------------------------------------- one token


@dataclass(frozen=True)
class Motion:
    """One token's map on a manifold of the table: the ``step`` of a cell, hashable by value."""

    name: str
    h: float = 1.0
    decay: float = 1.0
    coupled: bool = False
    grid: int | None = None
    gates: int = 0  # 1: of momenta; 2: of positions too

    @property
    def kind(self) -> Kind:
        """Return the row of the table."""
        return KINDS[self.name]

    def split(self, tensors: State) -> tuple[State, State, State]:
        """Return the tensors of the force, the drift and the coupling."""
        n = self.kind.forces
        m = n + self.kind.drifts
        return tensors[:n], tensors[n:m], tensors[m:]

    def parts(self, inputs: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """Return the force and the factors of momenta and of positions.

        Inputs are forces ``(..., heads, dim)``; with gates ``(..., 1 + gates, heads, dim)``.
        """
        if not self.gates:
            return inputs, self.decay, 1.0
        f, a, *b = inputs.unbind(-3)
        return f, self.decay * a, b[0] if b else 1.0

    def __call__(self, tensors: State, f: Tensor, state: State) -> State:
        f, a, b = self.parts(f)
        q, p = b * state[0], a * state[1]
        of_force, of_drift, of_coupling = self.split(tensors)
        kind = self.kind
        if kind.force is not None:
            f = f + kind.force(of_force, q, p)
        if self.coupled:
            f = f + couple(of_coupling, q, kind.period)
        return kind.drift(of_drift, q, p + self.h * f, self.h)

    def inverse(self, tensors: State, f: Tensor, state: State) -> State:
        """Undo one token; not defined for the literal rule."""
        f, a, b = self.parts(f)
        of_force, of_drift, of_coupling = self.split(tensors)
        kind = self.kind
        q, p = kind.drift(of_drift, *state, -self.h)  # type: ignore[misc]
        if self.coupled:
            f = f + couple(of_coupling, q, kind.period)
        p = p - self.h * f
        if kind.force is not None:  # a force of p does not change what it depends on
            p = p - self.h * kind.force(of_force, q, p)
        return q / b, p / a

    def wrap(self, state: State) -> State:
        """Bring angles, and momenta that are angles too, back to one period."""
        q, p = state
        period = self.kind.period
        if period is None:
            return state
        q = _wrap(q, period)
        if self.circular:
            p = _wrap(p, period)
            if self.grid is not None:
                q, p = (_wrap(snap(x, self.grid), period) for x in (q, p))
        return q, p

    @property
    def circular(self) -> bool:
        """Say whether momenta live on the circle: on the flat torus, where a step is a turn."""
        return self.name == "torus" and self.decay == 1 and not (self.coupled or self.gates)

    def scan(self, tensors: State, inputs: Tensor, state: State) -> State:
        """Return all states in parallel: sums on the torus, affine maps of oscillators."""
        q, p = state
        f, a, b = self.parts(inputs)
        one = f.new_ones(1, 1, *f.shape[2:])
        a, b = torch.broadcast_tensors(a * one, b * one)
        if self.name == "oscillator":
            (rate,) = tensors
            h = self.h
            rows = [[b * (1 - h * h * rate), h * a], [-h * rate * b, a]]
            m = torch.stack([torch.stack(row, -1) for row in rows], -2)
            path = affine_scan(m, torch.stack([h * h * f, h * f], -1), torch.stack([q, p], -1))
            return path[..., 0], path[..., 1]
        # Sums in float64: a float32 sum over many turns would forget the angle.
        if self.circular:
            p_path = p.unsqueeze(1) + f.cumsum(1, dtype=torch.float64)
            p_path = p_path - p_path.detach().floor()
        else:
            p_path = affine_scan(a[..., None, None], (self.h * f)[..., None], p[..., None])[..., 0]
        q_path = q.unsqueeze(1) + self.h * p_path.cumsum(1, dtype=torch.float64)
        q_path = q_path - q_path.detach().floor()
        return self.wrap((q_path.to(q.dtype), p_path.to(p.dtype)))

    def conserves(self, free: bool) -> Conserves:
        """Return what is kept, with a ``free`` coupling or one that is a gradient."""
        kind = self.kind
        return Conserves(kind.symplectic and not free, kind.volume, self.decay)


def snap(x: Tensor, grid: int) -> Tensor:
    """Round to multiples of ``1/grid``; the gradient passes straight through."""
    return x + (torch.round(x * grid) / grid - x).detach()


def _wrap(x: Tensor, period: float) -> Tensor:
    return x - period * torch.floor(x.detach() / period)


# ---------------------------------------------------------------- rotations


class Rotation:
    """The step of a head whose state is a unit quaternion: a token turns it.

    An orthogonal map of R^4, so it keeps volumes and lengths; there are no momenta.
    """

    def __call__(self, tensors: State, f: Tensor, state: State) -> State:
        return quaternion_product(f, state[0]), state[1]

    def inverse(self, tensors: State, f: Tensor, state: State) -> State:
        """Undo one token."""
        return quaternion_product(conjugate(f), state[0]), state[1]

    def scan(self, tensors: State, inputs: Tensor, state: State) -> State:
        """Return all states by products of neighbouring tokens."""

        def times(a: State, b: State) -> State:
            return (quaternion_product(a[0], b[0]),)

        path = scan(times, times, (inputs,), (state[0],))[0]
        return path, inputs.new_zeros(*inputs.shape[:-1], 0)


def conjugate(x: Tensor) -> Tensor:
    """Return the inverse of unit quaternions ``(..., 4)``."""
    return torch.cat([x[..., :1], -x[..., 1:]], -1)


def unit(x: Tensor) -> Tensor:
    """Return ``x (..., 4)`` at length one; the identity where it is zero."""
    size = x.square().sum(-1, keepdim=True)
    tiny = torch.finfo(x.dtype).tiny
    one = torch.zeros_like(x)
    one[..., 0] = 1
    return torch.where(size > tiny, x * size.clamp_min(tiny).rsqrt(), one)


def rotation_matrix(x: Tensor) -> Tensor:
    """Return the rotations ``(..., 3, 3)`` of unit quaternions ``(..., 4)``, scalar first."""
    w, a, b, c = x.unbind(-1)
    rows = [
        [1 - 2 * (b * b + c * c), 2 * (a * b - w * c), 2 * (a * c + w * b)],
        [2 * (a * b + w * c), 1 - 2 * (a * a + c * c), 2 * (b * c - w * a)],
        [2 * (a * c - w * b), 2 * (b * c + w * a), 1 - 2 * (a * a + b * b)],
    ]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def landmarks(turns: Tensor, classes: int, kappa: float = 4.0) -> Tensor:
    r"""Return logits :math:`\kappa\cos 2\pi(v - c/C)` ``(..., classes)`` of angles in turns.

    Fixed, not learned: a learned readout saturates and leaves the angle where it is.
    """
    c = torch.arange(classes, dtype=turns.dtype, device=turns.device) / classes
    return kappa * torch.cos(2 * math.pi * (turns.unsqueeze(-1) - c))
