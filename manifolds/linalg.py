"""Symmetric systems G v = p whose derivatives are right under every nesting of autodiff.

``torch.linalg.solve``, ``det`` and ``slogdet`` have silently wrong derivatives under vmap and
nested forward mode in torch 2.13; nothing here calls them. Up to three dimensions the
factorisation is written out, which is several times cheaper than a batched LAPACK call.
"""

import torch
from torch import Tensor

_WRITTEN_OUT = 3


def solve(g: Tensor, b: Tensor, positive: bool = True) -> Tensor:
    """Solve ``g x = b`` for symmetric ``g (..., d, d)`` and ``b (..., d, k)``."""
    d = g.shape[-1]
    if positive and d <= _WRITTEN_OUT:
        return torch.stack(_solve_rows(g, [b[..., i, :] for i in range(d)], d), -2)
    if positive:
        return torch.cholesky_solve(b, torch.linalg.cholesky_ex(g)[0])
    return torch.linalg.inv_ex(g)[0] @ b


def solve_vector(g: Tensor, b: Tensor, positive: bool = True) -> Tensor:
    """Solve ``g x = b`` for symmetric ``g (..., d, d)`` and one vector ``b (..., d)``."""
    return solve(g, b.unsqueeze(-1), positive).squeeze(-1)


def _solve_rows(g: Tensor, rows: list[Tensor], d: int) -> list[Tensor]:
    # Gaussian elimination without pivoting: stable for positive definite matrices.
    a = [[g[..., i, j].unsqueeze(-1) for j in range(d)] for i in range(d)]
    for k in range(d - 1):
        for i in range(k + 1, d):
            m = a[i][k] / a[k][k]
            for j in range(k + 1, d):
                a[i][j] = a[i][j] - m * a[k][j]
            rows[i] = rows[i] - m * rows[k]
    x = list(rows)
    for i in reversed(range(d)):
        for j in range(i + 1, d):
            x[i] = x[i] - a[i][j] * x[j]
        x[i] = x[i] / a[i][i]
    return x


def log_det(g: Tensor, positive: bool = True) -> Tensor:
    """Return ``log |det g|`` for symmetric ``g (..., d, d)``."""
    if positive:
        factor = torch.linalg.cholesky_ex(g)[0]
        return 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return torch.linalg.qr(g)[1].diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)


def is_positive(g: Tensor) -> Tensor:
    """Say where ``g (..., d, d)`` is finite and positive definite."""
    d = g.shape[-1]
    if d > _WRITTEN_OUT:
        factor, info = torch.linalg.cholesky_ex(g)
        return (info == 0) & factor.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
    a = [[g[..., i, j] for j in range(d)] for i in range(d)]
    holds = (a[0][0] > 0) & (a[0][0] < torch.inf)
    for k in range(d - 1):
        for i in range(k + 1, d):
            m = a[i][k] / a[k][k]
            a[i][k + 1 :] = [a[i][j] - m * a[k][j] for j in range(k + 1, d)]
        pivot = a[k + 1][k + 1]
        holds = holds & (pivot > 0) & (pivot < torch.inf)
    return holds


def matvec(a: Tensor, v: Tensor) -> Tensor:
    """Return ``a v``; elementwise and a sum, which beats a batched matmul at small sizes."""
    if a.shape[-1] > 8:
        return (a @ v.unsqueeze(-1)).squeeze(-1)
    return _sum_last(a * v.unsqueeze(-2))


def dot(u: Tensor, v: Tensor) -> Tensor:
    """Return the Euclidean inner product over the last dimension."""
    return _sum_last(u * v)


def _sum_last(p: Tensor) -> Tensor:
    # A reduction over two or three neighbours is ten times slower than adding the columns,
    # once there are enough of them to matter.
    if p.shape[-1] in (2, 3) and p.numel() > 4096:
        first, second, *rest = p.unbind(-1)
        return first + second if not rest else first + second + rest[0]
    return p.sum(-1)


def outer(u: Tensor, v: Tensor) -> Tensor:
    """Return ``u v^T``."""
    return u.unsqueeze(-1) * v.unsqueeze(-2)
