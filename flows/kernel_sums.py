r"""Sums over pairs of particles in memory linear in their number: the engine below every flow.

A Gaussian kernel is attention. With :math:`q_i = (x_i/h, 1, -|x_i|^2/2h)` and
:math:`k_j = (y_j, -|y_j|^2/2h, 1)` the logits :math:`q_i \cdot k_j = -|x_i - y_j|^2/2h`, so that
kernel means are ``scaled_dot_product_attention``, which never forms the matrix of pairs. One
further key whose logit is known turns the mean back into the sum and its logarithm. Kernels of
another form go through blocks of rows. Particles are ``(..., N, d)``, the values that are summed
``(..., M, c)``, leading dimensions broadcast.

The fused kernel has a first reverse derivative only. A second one falls back, by itself, on the
plain formula, and so does everything under ``torch.func`` and in forward mode: both are exact
and both then hold the matrix of pairs. Nothing here takes ``exp`` of unbounded negatives, which
is a hundred times slower where it underflows.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from darboux import _checks
from darboux.flows._blocks import self_sum

_BLOCK = 1 << 21  # entries of a block of rows: 16 MiB in float64
_ABSENT = -1e9  # the log weight of a particle of weight zero; -inf would give 0 * inf in gradients


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    r"""Return :math:`\sum_j \mathrm{softmax}_j(q_i \cdot k_j)\,v_j`, without a scale.

    ``q (..., N, e)``, ``k (..., M, e)``, ``v (..., M, c)`` give ``(..., N, c)``. ``mask`` is
    boolean, ``(..., N, M)``, true where ``i`` sees ``j``; ``causal`` lets ``i`` see ``j <= i``
    and costs no memory. Every row must see something.
    """
    if causal and mask is not None:
        raise ValueError("attend: got a mask and causal=True, expected one of them")
    lead = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    out = v.shape[-1]
    width = -(-max(q.shape[-1], out) // 8) * 8  # one width, a multiple of 8, for the fused kernel

    def flat(x: Tensor) -> Tensor:
        x = x.expand(*lead, *x.shape[-2:]).reshape(-1, 1, *x.shape[-2:])
        return pad(x, (0, width - x.shape[-1]))

    if mask is not None:
        single = mask.dim() == 2
        mask = mask.expand(*(() if single else lead), *mask.shape[-2:])
        mask = mask.reshape(-1, 1, *mask.shape[-2:])
    result = _attend(flat(q), flat(k), flat(v), mask, causal)
    return result[..., :out].reshape(*lead, q.shape[-2], out)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    fused = q.device.type == "cpu" or q.dtype != torch.float64  # none for float64 elsewhere
    if _checks.in_transform() or not fused:
        return attend_plainly(q, k, v, mask=mask, causal=causal)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        result = _Fused.apply(q, k, v, mask, causal)
        assert isinstance(result, Tensor)
        return result
    return scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=1.0)


class _Fused(torch.autograd.Function):
    """Attention whose second derivative is that of the plain formula."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool):
        ctx.save_for_backward(q, k, v)
        ctx.mask, ctx.causal = mask, causal
        with torch.enable_grad():
            needed = zip((q, k, v), ctx.needs_input_grad, strict=False)
            ctx.leaves = [x.detach().requires_grad_(need) for x, need in needed]
            a, b, c = ctx.leaves
            out = scaled_dot_product_attention(a, b, c, mask, is_causal=causal, scale=1.0)
        ctx.out = out
        return out.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        need = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # somebody differentiates the derivative
            # views, since k may hang on q and each must be differentiated alone
            leaves = [x.view_as(x) for x in ctx.saved_tensors]
            out = attend_plainly(*leaves, mask=ctx.mask, causal=ctx.causal)
        else:
            leaves, out = ctx.leaves, ctx.out
        wanted = [x for x, needed in zip(leaves, need, strict=True) if needed]
        found = iter(
            torch.autograd.grad(
                out, wanted, grads, create_graph=torch.is_grad_enabled(), retain_graph=True
            )
        )
        return *(next(found) if needed else None for needed in need), None, None


def attend_plainly(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Return the same as :func:`attend` by its formula, in blocks of rows; any derivative."""
    if mask is not None:
        mask = mask.expand(*mask.shape[:-2], q.shape[-2], k.shape[-2])

    def rows(part: Tensor, start: int) -> Tensor:
        logits = part @ k.mT
        if mask is not None:
            logits = logits.masked_fill(~mask[..., start : start + part.shape[-2], :], -torch.inf)
        if causal:
            logits = logits.masked_fill(~_before(part, k, start), -torch.inf)
        return logits.softmax(-1) @ v

    return by_rows(rows, q, k.shape[-2] * max(1, k[..., 0, 0].numel()))


def _before(part: Tensor, k: Tensor, start: int) -> Tensor:
    i = torch.arange(start, start + part.shape[-2], device=k.device)
    return torch.arange(k.shape[-2], device=k.device) <= i.unsqueeze(-1)


def by_rows(f: Callable[[Tensor, int], Tensor], x: Tensor, row: int) -> Tensor:
    """Apply ``f(rows, first)`` to blocks of the rows of ``x (..., N, d)`` and join the results.

    A row costs ``row`` numbers. Reverse derivatives recompute each block, except under
    ``torch.func``, where every block is kept.
    """
    size = max(1, _BLOCK // max(1, row))
    n = x.shape[-2]
    if n <= size:
        return f(x, 0)
    keep = _checks.in_transform() or not torch.is_grad_enabled()
    parts = []
    for start in range(0, n, size):
        part = x[..., start : start + size, :]
        if keep:
            parts.append(f(part, start))
        else:
            parts.append(checkpoint(f, part, start, use_reentrant=False))
    return torch.cat(parts, -2)


def causal_linear_sum(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor | None = None, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    r"""Return :math:`\sum_{j \le i}(q_i \cdot k_j)v_j` ``(..., T, c)`` and the matrix at the end.

    ``start (..., e, c)`` is :math:`\sum k_j \otimes v_j` over all that came before. Time and
    memory are linear in ``T``: tokens of one ``chunk`` see each other through a square of scores,
    earlier ones through the matrix.
    """
    n = q.shape[-2]
    size = min(chunk, n)
    q, k, v = (pad(x, (0, 0, 0, -n % size)).unflatten(-2, (-1, size)) for x in (q, k, v))
    own = k.mT @ v
    before = torch.zeros_like(own[..., :1, :, :]) if start is None else start.unsqueeze(-3)
    sums = torch.cat([before, own], -3).cumsum(-3)
    out = (q @ k.mT).tril() @ v + q @ sums[..., :-1, :, :]
    return out.flatten(-3, -2)[..., :n, :], sums[..., -1, :, :]


# -- sums of exponentials ------------------------------------------------------------------


def exp_sum(
    q: Tensor, k: Tensor, v: Tensor, reference: Tensor | None = None, causal: bool = False
) -> Tensor:
    r"""Return :math:`\sum_j e^{q_i \cdot k_j - c_i}\,v_j` with ``c = reference (..., N)``, or 0.

    Accurate to round-off of the largest of 1 and :math:`\sum_j e^{q_i \cdot k_j - c_i}`: the key
    of logit ``c_i`` gives the sum of exponentials, and the mean times it is the sum. ``causal``
    sums over ``j <= i``.
    """
    out, total = _referenced(q, k, v, reference, causal)
    return out / total


def log_sum(q: Tensor, k: Tensor, reference: Tensor | None = None) -> Tensor:
    r"""Return :math:`\log\sum_j e^{q_i \cdot k_j}`, ``(..., N)``.

    ``reference`` is a guess of the result to within 50 in float32, 500 in float64; without one
    it is found by a pass of its own. It is no part of any derivative.
    """
    recorded = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    if reference is None:
        if _has_log_sums(q) and recorded and not k.requires_grad:
            found = _LogSum.apply(q, k)
            assert isinstance(found, Tensor)
            return found
        reference = _log_sum_values(q, k)
        if not recorded and not _checks.in_transform():
            return reference
    out, total = _referenced(q, k, torch.ones_like(k[..., :1]), reference)
    tiny = torch.finfo(q.dtype).tiny
    return (out / total).squeeze(-1).clamp_min(tiny).log() + reference


def _referenced(
    q: Tensor, k: Tensor, v: Tensor, c: Tensor | None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    # v (..., M, c) -> the mean over all keys and the reference key, and the latter's share
    if c is None:
        c = q.new_zeros(())
    extra = c.detach().expand(q.shape[:-1]).unsqueeze(-1)
    q = torch.cat([q, extra], -1)
    where, row = (0, (1, 0)) if causal else (-1, (0, 1))  # the first key, so that all see it
    if causal:
        q = pad(q, (0, 0, 1, 0))
    k = pad(pad(k, (0, 1)), (0, 0, *row))  # a zero key ...
    mark = torch.zeros(k.shape[-2:], dtype=k.dtype, device=k.device)
    mark[where, -1] = 1.0
    k = k + mark  # ... that meets only c
    v = pad(pad(v, (0, 1)), (0, 0, *row))
    flag = torch.zeros(v.shape[-2:], dtype=v.dtype, device=v.device)
    flag[where, -1] = 1.0
    out = attend(q, k, v + flag, causal=causal)
    out = out[..., 1:, :] if causal else out
    return out[..., :-1], out[..., -1:].clamp_min(torch.finfo(q.dtype).tiny)


_FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def _has_log_sums(q: Tensor) -> bool:
    return _FLASH is not None and q.device.type == "cpu" and not _checks.in_transform()


def _flash(q: Tensor, k: Tensor, causal: bool = False) -> tuple[Tensor, Tensor]:
    """Return the mean of the keys and the log sum of exponentials of one pass; no graph."""
    assert _FLASH is not None
    lead = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2])
    e = q.shape[-1]
    width = -(-e // 8) * 8
    q, k = (
        pad(x.detach().expand(*lead, *x.shape[-2:]).reshape(-1, 1, *x.shape[-2:]), (0, width - e))
        for x in (q, k)
    )
    with torch.no_grad():
        mean, found = _FLASH(q, k, k, 0.0, causal, scale=1.0)
    n = q.shape[-2]
    return mean[..., :e].reshape(*lead, n, e), found.to(q.dtype).reshape(*lead, n)


class _LogSum(torch.autograd.Function):
    """The log sum with the mean key, its derivative in ``q``, from the same pass."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor) -> Tensor:
        mean, found = _flash(q, k)
        ctx.save_for_backward(q, k, mean)
        ctx.lead = found.shape[:-1]
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        q, k, mean = ctx.saved_tensors
        if torch.is_grad_enabled():
            mean = attend(q, k, k)
        return (grads[0].unsqueeze(-1) * mean).sum_to_size(q.shape), None


def _log_sum_values(q: Tensor, k: Tensor, causal: bool = False) -> Tensor:
    """Return log sum exp of the logits as plain numbers, cut off from every graph."""
    q, k = q.detach(), k.detach()
    if _has_log_sums(q):
        return _flash(q, k, causal)[1]

    def rows(part: Tensor, start: int) -> Tensor:
        logits = part @ k.mT
        if causal:
            logits = logits.masked_fill(~_before(part, k, start), -torch.inf)
        top = logits.amax(-1, keepdim=True)
        return top + safe_exp(logits - top).sum(-1, keepdim=True).log()

    return by_rows(rows, q, k.shape[-2] * max(1, k[..., 0, 0].numel())).squeeze(-1)


def safe_exp(x: Tensor) -> Tensor:
    """Return ``exp(x)``, no smaller than e^-80 in float32 and e^-700 in float64."""
    return x.clamp_min(-700.0 if x.dtype == torch.float64 else -80.0).exp()


# -- the Gaussian kernel -------------------------------------------------------------------


def gaussian_logits(
    x: Tensor, y: Tensor, h: Tensor, weights: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Return ``q, k`` with :math:`q_i \cdot k_j = -|x_i - y_j|^2/2h + \log w_j + bias_j`.

    Both are centred at the mean of ``y`` first: far from the origin the logits would cancel. A
    particle of weight zero is absent, also from derivatives with respect to its weight.
    """
    centre = y.mean(-2, keepdim=True).detach()
    x, y, h = x - centre, y - centre, h[..., None, None]
    a = -x.square().sum(-1, keepdim=True) / (2 * h)
    b = -y.square().sum(-1, keepdim=True) / (2 * h)
    if weights is not None:
        b = b + log_weights(weights).unsqueeze(-1)
    if bias is not None:
        b = b + bias.unsqueeze(-1)
    one_x, one_y = torch.ones_like(a), torch.ones_like(y[..., :1])
    b = b.expand(torch.broadcast_shapes(b.shape, one_y.shape))
    y = y.expand(*b.shape[:-1], y.shape[-1])
    a = a.expand(*torch.broadcast_shapes(a.shape, (x / h)[..., :1].shape))
    one_x = torch.ones_like(a)
    x = (x / h).expand(*a.shape[:-1], x.shape[-1])
    return torch.cat([x, one_x, a], -1), torch.cat([y, b, torch.ones_like(b)], -1)


def log_weights(w: Tensor) -> Tensor:
    """Return ``log w``, or a large negative number with derivative zero where ``w = 0``."""
    some = w > 0
    return torch.where(some, torch.where(some, w, 1.0).log(), _ABSENT)


def gaussian_sum(x: Tensor, y: Tensor, b: Tensor, h: Tensor) -> Tensor:
    r"""Return :math:`\sum_j e^{-|x_i - y_j|^2/2h}\,b_j`; weights go into ``b``, signs are free.

    Where ``x is y`` on a CPU every pair is met once: faster still.
    """
    if x is y and x.device.type == "cpu" and not _checks.in_transform():
        z = x - x.mean(-2, keepdim=True).detach()  # or logits would cancel far from the origin
        return self_sum(z / h.sqrt()[..., None, None], b)
    return exp_sum(*gaussian_logits(x, y, h), b)


def gaussian_mean(x: Tensor, y: Tensor, b: Tensor, h: Tensor, weights: Tensor | None = None):
    r"""Return :math:`\sum_j w_j k_{ij} b_j / \sum_j w_j k_{ij}`, exact however far ``x`` lies."""
    return attend(*gaussian_logits(x, y, h, weights), b)


def gaussian_log_sum(x: Tensor, y: Tensor, h: Tensor, weights: Tensor | None = None) -> Tensor:
    r"""Return :math:`\log\sum_j w_j e^{-|x_i - y_j|^2/2h}`, finite however far ``x`` lies."""
    return log_sum(*gaussian_logits(x, y, h, weights))


# -- kernels of another form ---------------------------------------------------------------


def square_distances(x: Tensor, y: Tensor) -> Tensor:
    """Return ``|x_i - y_j|^2`` by one product of matrices; not below 0, not exact at 0."""
    centre = y.mean(-2, keepdim=True).detach()
    x, y = x - centre, y - centre
    xx, yy = x.square().sum(-1, keepdim=True), y.square().sum(-1, keepdim=True)
    return (xx + yy.mT - 2 * x @ y.mT).clamp_min(0.0)


def radial_sum(
    profile: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, b: Tensor, smooth: bool = True
) -> Tensor:
    r"""Return :math:`\sum_j f(|x_i - y_j|^2)\,b_j` in blocks of rows.

    ``smooth=False`` forms the differences one by one, for a profile that is not smooth at 0,
    where round-off of the matrix product would be magnified.
    """

    def rows(part: Tensor, start: int) -> Tensor:
        if smooth:
            s = square_distances(part, y)
        else:
            s = (part.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)
        return profile(s) @ b

    row = y.shape[-2] * max(1, y[..., 0, 0].numel()) * (1 if smooth else y.shape[-1])
    return by_rows(rows, x, row)
