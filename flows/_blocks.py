r"""Sums over pairs of particles on a CPU, in blocks that fit the cache.

.. math:: s_i = \sum_j e^{-|z_i - z_j|^2/2}\,b_j

The matrix is symmetric, so a block above the diagonal serves its rows and its columns, and no
row needs normalising: this takes two thirds of the time of fused attention, and its backward
pass half. No block is kept, and a derivative is a sum of the same form. The marginals of a
transport plan, one sum over rows and one over columns, share their exponentials as well.
"""

from typing import Any

import torch
from torch import Tensor

_BYTES = 1 << 20  # of one block
_COLUMNS = 32  # values that the backward pass may sum in one go


def self_sum(z: Tensor, b: Tensor) -> Tensor:
    """Return ``s (..., N, c)`` for centred ``z (..., N, d)``, ``b (..., N, c)``; any derivative."""
    lead = torch.broadcast_shapes(z.shape[:-2], b.shape[:-2])
    shape = (*lead, *b.shape[-2:])
    z = z.expand(*lead, *z.shape[-2:]).flatten(0, -3) if lead else z.unsqueeze(0)
    b = b.expand(shape).flatten(0, -3) if lead else b.unsqueeze(0)
    out = _SelfSum.apply(z, b)
    assert isinstance(out, Tensor)
    return out.reshape(shape)


class _SelfSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(z, b)
        return _sum(z, b)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (z, b), g = ctx.saved_tensors, grads[0]
        if not ctx.needs_input_grad[0]:
            return None, self_sum(z, g)
        c, d = b.shape[-1], z.shape[-1]
        if 2 * c * (d + 1) > _COLUMNS:
            if not torch.is_grad_enabled():
                return _derivative(z, b, g)
            leaves = z.view_as(z), b.view_as(b)
            out = _plain(*leaves)
            grads = torch.autograd.grad(out, leaves, g, create_graph=True)
            return grads[0], grads[1]
        # dz_i = sum_j k_ij (g_i . b_j + b_i . g_j)(z_j - z_i), expanded into columns
        both = torch.cat([g, b], -1)
        moments = (both.unsqueeze(-1) * z.unsqueeze(-2)).flatten(-2)
        s = self_sum(z, torch.cat([both, moments], -1))
        plain, moments = s[..., : 2 * c], s[..., 2 * c :].unflatten(-1, (2 * c, d))
        arm = moments - plain.unsqueeze(-1) * z.unsqueeze(-2)
        dz = (torch.cat([b, g], -1).unsqueeze(-1) * arm).sum(-2)
        return dz, plain[..., :c]


def _factors(z: Tensor) -> tuple[Tensor, Tensor]:
    # logits q @ k = z_i . z_j - |z_i|^2/2 - |z_j|^2/2
    a = -z.square().sum(-1, keepdim=True) / 2
    one = torch.ones_like(a)
    return torch.cat([z, one, a], -1), torch.cat([z, a, one], -1).mT.contiguous()


def _kernel(q: Tensor, k: Tensor, store: Tensor) -> Tensor:
    # exp is a hundred times slower where it underflows
    s = _product(q, k, store)
    return s.clamp_(min=-700.0 if q.dtype == torch.float64 else -80.0).exp_()


def _product(q: Tensor, k: Tensor, store: Tensor) -> Tensor:
    shape = (len(q), q.shape[-2], k.shape[-1])
    return torch.bmm(q, k, out=store[: shape[0] * shape[1] * shape[2]].view(shape))


def _blocks(z: Tensor) -> tuple[int, int]:
    """Return the side of a block and how many problems of the batch go together."""
    entries = _BYTES // z.element_size()
    side = min(z.shape[-2], int(entries**0.5))
    return side, max(1, entries // side**2)


def _sum(z: Tensor, b: Tensor) -> Tensor:
    side, together = _blocks(z)
    if len(z) > together:
        parts = zip(z.split(together), b.split(together), strict=True)
        return torch.cat([_sum(*part) for part in parts])
    q, k = _factors(z)
    out, store = torch.zeros_like(b), z.new_empty(len(z) * side * side)
    for i in range(0, z.shape[-2], side):
        rows = slice(i, i + side)
        for j in range(i, z.shape[-2], side):
            columns = slice(j, j + side)
            s = _kernel(q[:, rows], k[..., columns], store)
            out[:, rows].baddbmm_(s, b[:, columns])
            if j > i:
                out[:, columns].baddbmm_(s.mT, b[:, rows])
    return out


def _derivative(z: Tensor, b: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Return the derivatives in ``z`` and ``b``, for values too wide to expand into columns."""
    side, together = _blocks(z)
    if len(z) > together:
        parts = zip(*(a.split(together) for a in (z, b, g)), strict=True)
        dz, db = zip(*(_derivative(*part) for part in parts), strict=True)
        return torch.cat(dz), torch.cat(db)
    q, k = _factors(z)
    left, right = torch.cat([g, b], -1), torch.cat([b, g], -1).mT.contiguous()
    z1 = torch.cat([z, torch.ones_like(z[..., :1])], -1)
    dz, db = torch.zeros_like(z1), torch.zeros_like(b)
    store = z.new_empty(2, len(z) * side * side)
    for i in range(0, z.shape[-2], side):
        rows = slice(i, i + side)
        for j in range(i, z.shape[-2], side):
            columns = slice(j, j + side)
            s = _kernel(q[:, rows], k[..., columns], store[0])
            db[:, rows].baddbmm_(s, g[:, columns])
            if j > i:
                db[:, columns].baddbmm_(s.mT, g[:, rows])
            s *= _product(left[:, rows], right[..., columns], store[1])
            dz[:, rows].baddbmm_(s, z1[:, columns])
            if j > i:
                dz[:, columns].baddbmm_(s.mT, z1[:, rows])
    return dz[..., :-1] - dz[..., -1:] * z, db


def _plain(z: Tensor, b: Tensor) -> Tensor:
    q, k = _factors(z)
    return (q @ k).clamp(min=-700.0 if z.dtype == torch.float64 else -80.0).exp() @ b


def marginals(q: Tensor, k: Tensor, a: Tensor, b: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    r"""Return :math:`\sum_j e^{q_i \cdot k_j}b_j` and :math:`\sum_i a_ie^{q_i \cdot k_j}`.

    Exponents below -700, in float32 -80, count as that. ``symmetric`` promises that both are the
    same. Shapes ``(..., N, e)``, ``(..., M, e)``, ``(..., N)``, ``(..., M)``; no derivatives.
    """
    lead, (n, m) = q.shape[:-2], (q.shape[-2], k.shape[-2])
    q, k = q.reshape(-1, n, q.shape[-1]), k.reshape(-1, m, k.shape[-1]).mT.contiguous()
    a, b = a.reshape(-1, n, 1), b.reshape(-1, m, 1)
    rows, columns = torch.zeros_like(a), torch.zeros_like(b)
    entries = _BYTES // q.element_size()
    side = min(max(n, m), int(entries**0.5))
    store = q.new_empty(min(len(q), max(1, entries // side**2)) * side * side)
    together = len(store) // side**2
    for p in range(0, len(q), together):
        some = slice(p, p + together)
        for i in range(0, n, side):
            r = slice(i, i + side)
            for j in range(i if symmetric else 0, m, side):
                c = slice(j, j + side)
                s = _kernel(q[some, r], k[some, :, c], store)
                rows[some, r].baddbmm_(s, b[some, c])
                if j > i or not symmetric:
                    (rows if symmetric else columns)[some, c].baddbmm_(s.mT, a[some, r])
    rows = rows.reshape(*lead, n)
    return rows, rows if symmetric else columns.reshape(*lead, m)
