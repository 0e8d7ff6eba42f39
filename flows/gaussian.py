r"""Gaussian measures: Bures-Wasserstein geometry, and flows of mean and covariance in closed form.

Every flow of measures has a family on which it is an ordinary differential equation of
:math:`(m, S)`, or solved outright. These are the oracles that particles are held against: with
the Gaussian score, or the bilinear Stein kernel, the moments of finitely many particles follow
them exactly. Means are ``(..., d)``, covariances ``(..., d, d)``; the target is
:math:`N(b, Q)`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from darboux import _checks
from darboux._checks import GeometryError
from darboux.flows import _stepping
from darboux.manifolds import linalg
from darboux.manifolds.linalg import matvec, outer


class Moments(NamedTuple):
    """Mean ``(..., d)`` and covariance ``(..., d, d)``."""

    mean: Tensor
    cov: Tensor


def moments(x: Tensor, w: Tensor | None = None) -> Moments:
    r"""Return mean and covariance of particles ``x (..., N, d)``; divides by N, not by N - 1."""
    n = x.shape[-2]
    w = x.new_full((n,), 1.0 / n) if w is None else w
    m = (w.unsqueeze(-1) * x).sum(-2)
    z = x - m.unsqueeze(-2)
    return Moments(m, (w.unsqueeze(-1) * z).mT @ z)


def eye_like(a: Tensor) -> Tensor:
    """Return the identity of the size of ``a``."""
    return torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)


def _sym(a: Tensor) -> Tensor:
    return (a + a.mT) / 2


def inverse(s: Tensor) -> Tensor:
    """Return the inverse of a positive matrix; raises ``GeometryError`` where it is none."""
    _checks.check_that(
        "gaussian", lambda: linalg.is_positive(s), "a covariance is not positive", GeometryError
    )
    return _sym(linalg.solve(s, eye_like(s).expand(s.shape)))


class _Sqrt(torch.autograd.Function):
    # eigh forward only: its own derivative is NaN at repeated eigenvalues
    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(a)
        return vectors * values.clamp_min(0.0).sqrt().unsqueeze(-2) @ vectors.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return lyapunov(ctx.saved_tensors[0], _sym(grads[0]))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return lyapunov(ctx.saved_tensors[0], _sym(tangents[0]))


class _Lyapunov(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, v: Tensor) -> Tensor:
        values, u = torch.linalg.eigh(a)
        total = values.unsqueeze(-1) + values.unsqueeze(-2)
        return u @ (u.mT @ v @ u / total) @ u.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.save_for_forward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        a, y = ctx.saved_tensors
        z = lyapunov(a, grads[0])
        return -_sym(z @ y.mT + z.mT @ y), z

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        a, y = ctx.saved_tensors
        da, dv = tangents
        right = torch.zeros_like(y) if dv is None else dv
        return lyapunov(a, right if da is None else right - da @ y - y @ da)


def sqrtm(a: Tensor) -> Tensor:
    """Return the positive root of a positive matrix; all derivatives, repeated values or not."""
    out = _Sqrt.apply(_sym(a))
    assert isinstance(out, Tensor)
    return out


def lyapunov(a: Tensor, v: Tensor) -> Tensor:
    """Return ``L`` with ``L a + a L = v`` for positive ``a``."""
    lead = torch.broadcast_shapes(a.shape, v.shape)
    out = _Lyapunov.apply(a.expand(lead), v.expand(lead))
    assert isinstance(out, Tensor)
    return out


# -- information ---------------------------------------------------------------------------


def kl(m: Tensor, S: Tensor, b: Tensor, Q: Tensor) -> Tensor:
    r"""Return :math:`\mathrm{KL}(N(m, S)\,|\,N(b, Q))`, shape ``(...)``."""
    P, z = inverse(Q), m - b
    inside = (P * S).sum((-1, -2)) + (matvec(P, z) * z).sum(-1) - m.shape[-1]
    return (inside + linalg.log_det(Q) - linalg.log_det(S)) / 2


def negentropy(S: Tensor) -> Tensor:
    r"""Return :math:`\int\rho\log\rho = -\frac12\log\det S - \frac d2(1 + \log 2\pi)`."""
    return -(linalg.log_det(S) + S.shape[-1] * (1 + math.log(2 * math.pi))) / 2


# -- Bures-Wasserstein geometry ------------------------------------------------------------


def bures_sqdist(m: Tensor, A: Tensor, b: Tensor, B: Tensor) -> Tensor:
    r"""Return :math:`W_2^2 = |m - b|^2 + \operatorname{tr}(A + B - 2(A^{1/2}BA^{1/2})^{1/2})`."""
    root = sqrtm(A)
    cross = sqrtm(root @ B @ root)
    trace = (A + B - 2 * cross).diagonal(dim1=-2, dim2=-1).sum(-1)
    return (m - b).square().sum(-1) + trace.clamp_min(0.0)


def bures_map(A: Tensor, B: Tensor) -> Tensor:
    r"""Return the optimal map :math:`T = A^{-1/2}(A^{1/2}BA^{1/2})^{1/2}A^{-1/2}`: TAT = B."""
    root = sqrtm(A)
    back = inverse(root)
    return _sym(back @ sqrtm(root @ B @ root) @ back)


def bures_exp(A: Tensor, V: Tensor) -> Tensor:
    r"""Return :math:`(I + L)A(I + L)` with ``LA + AL = V``; a geodesic while ``I + L > 0``."""
    T = eye_like(A) + lyapunov(A, V)
    return _sym(T @ A @ T)


def bures_log(A: Tensor, B: Tensor) -> Tensor:
    """Return the symmetric ``V`` with ``bures_exp(A, V) = B``."""
    L = bures_map(A, B) - eye_like(A)
    return _sym(L @ A + A @ L)


def bures_geodesic(A: Tensor, B: Tensor, t: Tensor) -> Tensor:
    r"""Return the displacement interpolation at ``t (time,)``, as ``(time, ..., d, d)``."""
    t = t.reshape(-1, *[1] * A.dim())
    T = (1 - t) * eye_like(A) + t * bures_map(A, B)
    return _sym(T @ A @ T)


# -- flows of KL to N(b, Q) in closed form ---------------------------------------------------


def w2_flow(m: Tensor, S: Tensor, b: Tensor, Q: Tensor, t: float) -> Moments:
    r"""Return the Wasserstein gradient flow (Ornstein-Uhlenbeck) at time ``t``.

    .. math:: m_t = b + P(m - b), \quad S_t = Q + P(S - Q)P, \quad P = e^{-tQ^{-1}}
    """
    P = torch.linalg.matrix_exp(-t * inverse(Q))
    return Moments(b + matvec(P, m - b), Q + P @ (S - Q) @ P)


def kw_flow(m: Tensor, S: Tensor, b: Tensor, Q: Tensor, t: float) -> Moments:
    r"""Return the Kalman-Wasserstein flow (no regularisation) at time ``t``.

    .. math:: S_t^{-1} = Q^{-1} + e^{-2t}(S^{-1} - Q^{-1}), \quad
              m_t = b + (I + (e^{2t} - 1)SQ^{-1})^{-1/2}(m - b)

    The mean holds for matrices that do not commute as well: its equation is linear with the
    matrix :math:`-(I + e^{-2t}(QS^{-1} - I))^{-1}`, all values of which commute.
    """
    P = inverse(Q)
    cov = inverse(P + math.exp(-2 * t) * (inverse(S) - P))
    factor = torch.linalg.cholesky_ex(Q)[0]
    back = torch.linalg.solve_triangular(factor, eye_like(Q).expand(Q.shape), upper=False)
    inner = eye_like(Q) + math.expm1(2 * t) * _sym(back @ S @ back.mT)
    return Moments(b + matvec(factor @ inverse(sqrtm(inner)) @ back, m - b), cov)


def fr_flow(m: Tensor, S: Tensor, b: Tensor, Q: Tensor, t: float) -> Moments:
    r"""Return the Fisher-Rao flow at time ``t``: precisions mix, with weight :math:`e^{-t}`."""
    a = math.exp(-t)
    P0, P1 = inverse(S), inverse(Q)
    cov = inverse(a * P0 + (1 - a) * P1)
    return Moments(matvec(cov, a * matvec(P0, m) + (1 - a) * matvec(P1, b)), cov)


def jko_step(s: Tensor, q: Tensor, tau: float) -> Tensor:
    r"""Return the standard deviation after one proximal step of length ``tau`` in one dimension.

    ``s`` is the one before, ``q`` the variance of the target; the eigenvalues of commuting
    matrices are treated alike. The root of :math:`(1 + \tau/q)\sigma^2 - s\sigma - \tau = 0`.
    """
    a = 1 + tau / q
    return (s + (s * s + 4 * tau * a).sqrt()) / (2 * a)


# -- and as fields for an integrator ---------------------------------------------------------


def w2_field(m: Tensor, S: Tensor, b: Tensor, Q: Tensor) -> Moments:
    """Return the velocity of mean and covariance under the Wasserstein flow of KL."""
    P = inverse(Q)
    return Moments(-matvec(P, m - b), 2 * eye_like(S) - P @ S - S @ P)


def kw_field(m: Tensor, S: Tensor, b: Tensor, Q: Tensor) -> Moments:
    """Return the same under the Kalman-Wasserstein flow."""
    P = inverse(Q)
    return Moments(-matvec(S @ P, m - b), 2 * S - 2 * S @ P @ S)


def fr_field(m: Tensor, S: Tensor, b: Tensor, Q: Tensor) -> Moments:
    """Return the same under the Fisher-Rao flow."""
    P = inverse(Q)
    return Moments(-matvec(S @ P, m - b), S - S @ P @ S)


def svgd_field(m: Tensor, S: Tensor, b: Tensor, Q: Tensor, A: Tensor) -> Moments:
    r"""Return the same under Stein variational flow with the kernel :math:`x^TAy + 1`.

    Exact for finitely many particles of any law: the velocity is the affine map
    :math:`Mx + c`, :math:`M = A - Q^{-1}(S + (m - b)m^T)A`, :math:`c = -Q^{-1}(m - b)`.
    """
    P = inverse(Q)
    M = A - P @ (S + outer(m - b, m)) @ A
    return Moments(matvec(M, m) - matvec(P, m - b), M @ S + S @ M.mT)


class Moving(NamedTuple):
    """A Gaussian in motion: its particles have velocity ``p + A (x - mean)``."""

    mean: Tensor
    cov: Tensor
    p: Tensor
    A: Tensor


def accelerated_field(y: Moving, b: Tensor, Q: Tensor, alpha: float) -> Moving:
    r"""Return the velocity under the accelerated Wasserstein flow of KL with damping ``alpha``.

    .. math:: m' = p,\ p' = -\alpha p - Q^{-1}(m - b),\ S' = AS + SA,\
              A' = -\alpha A - A^2 - Q^{-1} + S^{-1}
    """
    m, S, p, A = y
    P = inverse(Q)
    dA = -alpha * A - A @ A - P + inverse(S)
    return Moving(p, A @ S + S @ A, -alpha * p - matvec(P, m - b), dA)


def attention_field(m: Tensor, S: Tensor, B: Tensor, V: Tensor) -> Moments:
    r"""Return the velocity under softmax attention :math:`x' = V\,E_{y \sim e^{x^TB^Ty}\rho}[y]`.

    The tilted Gaussian has mean :math:`m + SBx`, so that the velocity is affine and
    :math:`m' = V(I + SB)m`, :math:`S' = VSBS + (VSBS)^T`. ``B`` :math:`= K^TQ`.
    """
    M = V @ S @ B
    return Moments(matvec(V, m) + matvec(M, m), M @ S + S @ M.mT)


def linear_attention_flow(M: Tensor, t: float) -> Tensor:
    r"""Return the second moment under :math:`x' = -Mx`: :math:`M_t = (M_0^{-1} + 2t)^{-1}`."""
    return inverse(inverse(M) + 2 * t * eye_like(M))


def solve(
    field: Callable[..., tuple[Tensor, ...]], state: tuple[Tensor, ...], t: float, steps: int
) -> tuple[Tensor, ...]:
    """Integrate ``field(*state)`` to time ``t`` by the classical Runge-Kutta method."""
    table, y = _stepping.TABLEAUS["rk4"], tuple(state)
    for _ in range(steps):
        y = _stepping.step(table, lambda _, y: tuple(field(*y)), 0.0, y, t / steps)[0]
    return y


# -- entropic optimal transport --------------------------------------------------------------


def entropic_cost(m: Tensor, A: Tensor, b: Tensor, B: Tensor, blur: float) -> Tensor:
    r"""Return :math:`\min_\pi\int\frac12|x - y|^2 d\pi + s^2\mathrm{KL}(\pi|\alpha\otimes\beta)`.

    ``s`` is ``blur``. With :math:`D = (4A^{1/2}BA^{1/2} + s^4)^{1/2}`, twice the cost is
    :math:`|m - b|^2 + \operatorname{tr}(A + B - D) + ds^2(1 - \log 2s^2) + s^2\log\det(D + s^2)`.
    Janati et al. (2020), theorem 1.
    """
    s2, d = blur**2, A.shape[-1]
    root, eye = sqrtm(A), eye_like(A)
    D = sqrtm(4 * root @ B @ root + s2**2 * eye)
    trace = (A + B - D).diagonal(dim1=-2, dim2=-1).sum(-1)
    rest = d * s2 * (1 - math.log(2 * s2)) + s2 * linalg.log_det(D + s2 * eye)
    return ((m - b).square().sum(-1) + trace + rest) / 2


def sinkhorn_divergence(m: Tensor, A: Tensor, b: Tensor, B: Tensor, blur: float) -> Tensor:
    """Return the entropic cost less the mean of both costs of a measure to itself."""
    own = entropic_cost(m, A, m, A, blur) + entropic_cost(b, B, b, B, blur)
    return entropic_cost(m, A, b, B, blur) - own / 2
