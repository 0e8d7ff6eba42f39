r"""Self-attention as interacting particles: tokens that move each other, in R^d and on manifolds.

.. math:: \dot x_i = P_{x_i}\sum_j A_{ij}\,V x_j, \qquad A_{ij} \sim e^{\beta\,Qx_i \cdot Kx_j}

:func:`attention` is the layer itself, as learners use it; :class:`SelfAttention` the field of
velocities it makes; :func:`interact` moves the tokens along it, with momentum if asked. Tokens are
``(..., N, d)``. Softmax goes through ``scaled_dot_product_attention``, and so do un-normalised and
Sinkhorn attention; linear attention sums keys first. Memory is linear in N, causal or not; a
boolean mask is what it is. Sander et al. (2022), Geshkovski et al. (2025).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from darboux import _checks
from darboux._checks import ConvergenceError
from darboux.flows import _stepping, kernel_sums
from darboux.manifolds import Manifold

NORMS = ("softmax", "sum", "linear", "sinkhorn")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: float | Tensor = 1.0,
    norm: str = "softmax",
    mask: Tensor | None = None,
    causal: bool = False,
    w: Tensor | None = None,
    iterations: int = 20,
) -> Tensor:
    r"""Return attention of ``q (..., N, e)`` to ``k (..., M, e)``, ``v (..., M, c)``.

    With logits :math:`l_{ij} = \beta\,q_i \cdot k_j` and weights ``w (..., M)``, ``1/M`` by
    default,

    - ``"softmax"``: :math:`\sum_j w_je^{l_{ij}}v_j/\sum_j w_je^{l_{ij}}`;
    - ``"sum"``, un-normalised: :math:`\sum_j w_je^{l_{ij}}v_j`;
    - ``"linear"``: :math:`\sum_j w_jl_{ij}v_j`, O(N) without a boolean mask;
    - ``"sinkhorn"``: :math:`\sum_j w_je^{l_{ij} + f_i + g_j}v_j`, rows sum to one exactly and
      columns after enough ``iterations``, which are differentiated through.

    ``mask`` is boolean ``(..., N, M)``, true where ``i`` sees ``j``; ``causal`` stands for
    ``j <= i``. Weights are not renormalised over what a token sees, except by softmax. Sinkhorn
    takes no mask: a triangular doubly stochastic matrix is the identity.
    """
    where = "attention"
    for name, z in (("q", q), ("k", k), ("v", v)):
        _checks.check_tensor(where, name, z)
        if z.dim() < 2 or z.shape[-2] == 0:
            raise ValueError(f"{where}: {name} has shape {tuple(z.shape)}, expected (..., N, c)")
    if q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        raise ValueError(
            f"{where}: q, k and v have shapes {tuple(q.shape)}, {tuple(k.shape)} and "
            f"{tuple(v.shape)}, expected (..., N, e), (..., M, e) and (..., M, c)"
        )
    n, m = q.shape[-2], k.shape[-2]
    if norm not in NORMS:
        raise ValueError(f"{where}: unknown norm {norm!r}, expected one of {NORMS}")
    if norm == "sinkhorn" and (causal or mask is not None):
        raise ValueError(f"{where}: norm 'sinkhorn' takes no mask")
    if causal and (mask is not None or n != m):
        raise ValueError(
            f"{where}: causal=True with {n} queries and {m} keys, expected as many and no mask"
        )
    if mask is not None:
        if mask.dtype != torch.bool or mask.shape[-2:] != (n, m):
            raise ValueError(
                f"{where}: mask is {mask.dtype} of shape {tuple(mask.shape)}, expected torch.bool "
                f"of shape (..., {n}, {m})"
            )
        seen = mask if norm == "softmax" else torch.ones_like(mask)
        _checks.check_that(where, lambda: seen.any(-1), "a row of the mask is empty")
    if w is not None:
        _checks.check_last(where, "w", w, m)
        _checks.check_that(where, (w >= 0).clone, "weights must not be negative")
    q = beta * q
    if norm == "softmax":
        if w is not None:
            q, k = _biased(q, k, kernel_sums.log_weights(w))
        return kernel_sums.attend(q, k, v, mask=mask, causal=causal)
    w = k.new_full((m,), 1.0 / m) if w is None else w
    if norm == "sinkhorn":
        return _sinkhorn(q, k, v, w, iterations)
    v = w.unsqueeze(-1) * v
    if mask is None:
        if norm == "linear":
            return kernel_sums.causal_linear_sum(q, k, v)[0] if causal else q @ (k.mT @ v)
        top = kernel_sums._log_sum_values(q, k, causal)
        return kernel_sums.exp_sum(q, k, v, top, causal) * top.exp().unsqueeze(-1)

    def rows(part: Tensor, start: int) -> Tensor:
        a = part @ k.mT
        a = kernel_sums.safe_exp(a) if norm == "sum" else a
        return torch.where(mask[..., start : start + part.shape[-2], :], a, 0.0) @ v

    return kernel_sums.by_rows(rows, q, m * max(1, q[..., 0, 0].numel()))


def _biased(q: Tensor, k: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    bias = bias.unsqueeze(-1)
    lead = torch.broadcast_shapes(k.shape[:-1], bias.shape[:-1])
    k = torch.cat([k.expand(*lead, k.shape[-1]), bias.expand(*lead, 1)], -1)
    return torch.cat([q, torch.ones_like(q[..., :1])], -1), k


def _sinkhorn(q: Tensor, k: Tensor, v: Tensor, w: Tensor, iterations: int) -> Tensor:
    n = q.shape[-2]
    own = kernel_sums.log_weights(w)
    rows = own if n == k.shape[-2] else q.new_full((n,), -math.log(n))
    g = torch.zeros_like(k[..., 0])
    for _ in range(iterations):
        f = -kernel_sums.log_sum(*_biased(q, k, g + own))
        g = -kernel_sums.log_sum(*_biased(k, q, f + rows))
    return kernel_sums.attend(*_biased(q, k, g + own), v)


def attention_energy(
    x: Tensor, beta: float | Tensor = 1.0, B: Tensor | None = None, w: Tensor | None = None
) -> Tensor:
    r"""Return :math:`\frac1{2\beta}\sum_{ij}w_iw_je^{\beta x_i \cdot Bx_j}`, shape ``(...)``.

    Un-normalised attention with symmetric ``B = V`` climbs it: :math:`\dot E = \sum w_i|\dot
    x_i|^2`; softmax attention too, at :math:`\sum w_iZ_i|\dot x_i|^2`, :math:`Z_i = \sum_j
    w_je^{\beta x_i \cdot Bx_j}`.
    """
    _checks.check_tensor("attention_energy", "x", x)
    w = x.new_full((x.shape[-2],), 1.0 / x.shape[-2]) if w is None else w
    one = torch.ones_like(x[..., :1])
    k = x if B is None else x @ B.mT
    z = attention(x, k, one, beta=beta, norm="sum", w=w).squeeze(-1)
    return (w * z).sum(-1) / (2 * beta)


class SelfAttention(nn.Module):
    """The field of velocities that tokens ``(..., N, d)`` make for each other.

    ``Q, K`` are ``(e, d)`` or ``(heads, e, d)`` and ``V (d, d)`` or ``(heads, d, d)``; heads add.
    ``None`` stands for the identity. On a ``manifold`` in R^d (the sphere) velocities are
    projected on its tangent spaces. The other options are those of :func:`attention`.
    """

    def __init__(
        self,
        Q: Tensor | None = None,
        K: Tensor | None = None,
        V: Tensor | None = None,
        *,
        beta: float | Tensor = 1.0,
        norm: str = "softmax",
        causal: bool = False,
        iterations: int = 20,
        manifold: Manifold | None = None,
    ):
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"SelfAttention: unknown norm {norm!r}, expected one of {NORMS}")
        self.Q, self.K, self.V = Q, K, V
        self.beta, self.norm, self.causal, self.iterations = beta, norm, causal, iterations
        self.manifold = manifold

    def forward(self, x: Tensor, mask: Tensor | None = None, w: Tensor | None = None) -> Tensor:
        """Return the velocities ``(..., N, d)``."""
        matrices = (self.Q, self.K, self.V)
        headed = any(A is not None and A.dim() == 3 for A in matrices)
        y = x.unsqueeze(-3) if headed else x
        q, k, v = (y if A is None else y @ A.mT for A in matrices)
        if headed:
            mask = None if mask is None else mask.unsqueeze(-3)
            w = None if w is None else w.unsqueeze(-2)
        out = attention(
            q,
            k,
            v,
            beta=self.beta,
            norm=self.norm,
            causal=self.causal,
            iterations=self.iterations,
            mask=mask,
            w=w,
        )
        out = out.sum(-3) if headed else out
        return out if self.manifold is None else self.manifold._project_tangent(x, out)


class Tokens(NamedTuple):
    """Times ``t (time,)``, tokens ``x (time, ..., N, d)``, velocities where there is momentum."""

    t: Tensor
    x: Tensor
    v: Tensor | None


def interact(
    field: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    dt: float,
    steps: int,
    v: Tensor | None = None,
    friction: float | None = None,
    manifold: Manifold | None = None,
    method: str = "rk4",
    save_every: int = 1,
) -> Tokens:
    r"""Move tokens along ``field``: :math:`\dot x = F(x)`, or with momentum; differentiable.

    ``v`` or ``friction`` choose the second order, :math:`\dot x = v`, :math:`\dot v = F(x) -
    \gamma v`, the velocity form; on a manifold the derivative of ``v`` is the covariant one.
    ``manifold`` is by default that of the field. ``method`` is ``"euler"``, ``"heun"`` or
    ``"rk4"``; on a manifold in R^d each step ends with a projection, which keeps the order.

    >>> x = torch.eye(3)
    >>> interact(SelfAttention(beta=2.0), x, dt=0.1, steps=5).x.shape
    torch.Size([6, 3, 3])
    """
    where = "interact"
    _checks.check_tensor(where, "x", x)
    _checks.check_finite(where, x=x)
    if method not in ("euler", "heun", "rk4"):
        raise ValueError(f"{where}: unknown method {method!r}, expected 'euler', 'heun' or 'rk4'")
    if not 0 < dt < math.inf or steps < 0 or save_every < 1:
        raise ValueError(
            f"{where}: got dt={dt}, steps={steps}, save_every={save_every}, expected a positive "
            "step, at least 0 and at least 1"
        )
    manifold = getattr(field, "manifold", None) if manifold is None else manifold
    second = v is not None or friction is not None
    gamma = 0.0 if friction is None else friction
    if second:
        v = torch.zeros_like(x) if v is None else v
        _checks.check_like(where, "v", v, "x", x)

    def slope(_: float, y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not second:
            return (field(y[0]),)
        x, v = y
        a = field(x) - gamma * v
        return v, a if manifold is None else a + manifold._acceleration(x, v)

    table = _stepping.TABLEAUS[method]
    y: tuple[Tensor, ...] = (x, v.expand_as(x)) if v is not None else (x,)
    rows: list[tuple[float, tuple[Tensor, ...]]] = [(0.0, y)]
    for k in range(1, steps + 1):
        y = _stepping.step(table, slope, 0.0, y, dt)[0]
        if manifold is not None:
            x = manifold._project(y[0])
            y = (x, manifold._project_tangent(x, y[1])) if second else (x,)
        if _checks.checks_values() and not bool(_checks.values(y[0]).isfinite().all()):
            error = ConvergenceError(
                f"{where}: tokens are not finite after step {k} with dt={dt:g}: attention without "
                "normalisation may blow up in finite time, or the step is too long",
                iterations=k,
            )
            error.trajectory = _tokens(rows)
            raise error
        if k % save_every == 0:
            rows.append((k * dt, y))
    return _tokens(rows)


def _tokens(rows: list[tuple[float, tuple[Tensor, ...]]]) -> Tokens:
    t, states = zip(*rows, strict=True)
    x, *v = (torch.stack(part) for part in zip(*states, strict=True))
    return Tokens(torch.tensor(t, dtype=x.dtype, device=x.device), x, v[0] if v else None)
