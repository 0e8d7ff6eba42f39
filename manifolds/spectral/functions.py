r"""Functions of the operator, :math:`f(A) = \Phi f(\Lambda) \Phi^T M` with ``A = M⁻¹K``.

These, and not the eigenfunctions, are what can be differentiated at multiple eigenvalues: with
the divided differences ``f[a, b] = (f(a) - f(b)) / (a - b)``, ``f[a, a] = f'(a)`` (Daleckii-Krein),

    d(Φ f(Λ) Φᵀ) = Σᵢⱼ φᵢ ( f[λᵢ, λⱼ] φᵢᵀ dK φⱼ - (λf)[λᵢ, λⱼ] φᵢᵀ dM φⱼ ) φⱼᵀ,

smooth across every crossing. Of a truncated spectrum, f is zero beyond the k-th value, whose
cluster is completed from the guard vectors where k cuts it; the derivative is that of this
truncated function, the states beyond entering through solves.

``f`` takes a tensor of values ``(..., p)`` to one of the same shape elementwise, or to
``(s..., ..., p)`` for several functions at once, such as a heat kernel at many times; tensors
it closes over receive gradients. All functions take a :class:`Spectrum`, or an :class:`Operator`
that is dense (or small), which is then solved completely.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from darboux._checks import GeometryError, checks_values
from darboux.manifolds.spectral.adjoint import (
    Modes,
    beyond,
    detached,
    numbers,
    once,
    place,
    same,
)
from darboux.manifolds.spectral.eigen import Spectrum, _dense, eigenpairs
from darboux.manifolds.spectral.operator import Operator

Function = Callable[[Tensor], Tensor]

# Closer than this power of the precision (relative), a divided difference is the mean of f' by
# Simpson's rule: there the error of the rule is as small as the cancellation of the quotient.
_NEAR = 0.25
_COMPLETE = 2000


def trace(spectrum: Spectrum | Operator, f: Function) -> Tensor:
    r"""Return :math:`\operatorname{tr} f(A) = \sum_i f(\lambda_i)`, ``(s..., ...)``.

    Differentiable twice where eigenvalues are simple, or where the mass does not move.
    """
    spectrum = _spectrum("trace", spectrum)
    kept = _kept(spectrum)
    values = spectrum._values
    return (_evaluate("trace", f, values) * kept).sum(-1)


def diagonal(spectrum: Spectrum | Operator, f: Function) -> Tensor:
    r"""Return the kernel at coinciding nodes, :math:`\sum_i f(\lambda_i) \varphi_i(v)^2`.

    Of shape ``(s..., ..., n)``; for :math:`f = e^{-t\lambda}` the heat kernel signature.
    """
    spectrum = _spectrum("diagonal", spectrum)
    return _kernel("diagonal", spectrum, f, None)


def apply(spectrum: Spectrum | Operator, f: Function, u: Tensor) -> Tensor:
    r"""Return :math:`f(A) u = \Phi f(\Lambda) \Phi^T M u`, of shape ``(s..., *u)``.

    ``u`` is ``(..., n, m)``, or ``(..., n)`` where it has one axis more than the batch.
    """
    spectrum = _spectrum("apply", spectrum)
    operator = spectrum.operator
    vector = _check_load("apply", spectrum, u)
    columns = u[..., None] if vector else u
    found = _kernel("apply", spectrum, f, operator.mass @ columns)
    return found[..., 0] if vector else found


def kernel(spectrum: Spectrum | Operator, f: Function, b: Tensor) -> Tensor:
    r"""Return :math:`\Phi f(\Lambda) \Phi^T b`: a load ``b``, such as point masses, to a function.

    Shapes as in :func:`apply`, which is this at ``b = M u``.
    """
    spectrum = _spectrum("kernel", spectrum)
    vector = _check_load("kernel", spectrum, b)
    found = _kernel("kernel", spectrum, f, b[..., None] if vector else b)
    return found[..., 0] if vector else found


def projector(spectrum: Spectrum | Operator, part: slice, u: Tensor | None = None) -> Tensor:
    r"""Return :math:`P u = \sum_{i \in part} \varphi_i \varphi_i^T M u`.

    Without ``u``, P itself ``(..., n, n)``. Raises :class:`GeometryError` unless ``part`` holds
    whole clusters.
    """
    spectrum = _spectrum("projector", spectrum)
    modes = spectrum._modes
    chosen = torch.zeros(modes.labels.shape[-1], dtype=torch.bool, device=modes.labels.device)
    start, stop, _ = part.indices(spectrum.values.shape[-1])
    chosen[start:stop] = True
    split = same(modes.labels) & (chosen[:, None] != chosen)
    if not chosen.any():
        raise ValueError(f"projector: {part} holds none of {spectrum.values.shape[-1]} eigenvalues")
    if split.any():
        raise GeometryError(
            f"projector: {part} cuts a cluster of equal eigenvalues, whose parts are arbitrary; "
            "see Spectrum.clusters and Spectrum.cut"
        )
    weight = chosen.expand_as(modes.labels).to(modes.values.dtype)
    if u is None:
        u = torch.eye(
            modes.functions.shape[-2], dtype=spectrum.values.dtype, device=spectrum.values.device
        )
        if not spectrum.operator.sparse:
            u = u.expand_as(numbers(spectrum.operator.mass))
        load, vector = spectrum.operator.mass @ u, False
    else:
        vector = _check_load("projector", spectrum, u)
        load = spectrum.operator.mass @ (u[..., None] if vector else u)
    differences = _steps(modes, weight) if _moves(spectrum.operator) else None
    found = _weighted(spectrum, weight, load, differences)
    return found[..., 0] if vector else found


def _spectrum(where: str, given: Spectrum | Operator) -> Spectrum:
    if isinstance(given, Spectrum):
        return given
    if not isinstance(given, Operator):
        raise TypeError(
            f"{where}: got a {type(given).__name__}, expected a Spectrum or an Operator"
        )
    if not given.sparse:
        return eigenpairs(given, given.size)
    if given.size > _COMPLETE:
        raise ValueError(
            f"{where}: a sparse operator with {given.size} unknowns has no complete spectrum "
            "here; give eigenpairs(operator, k)"
        )
    eigenpairs(given, 1, method="dense")  # its checks
    return _dense(given, given.size, 1e-8)


def _check_load(where: str, spectrum: Spectrum, u: Tensor) -> bool:
    """Check the shape of ``u`` and say whether it is a vector."""
    n, batch = spectrum._modes.functions.shape[-2], spectrum.values.dim() - 1
    vector = u.dim() == batch + 1
    if u.dim() not in (batch + 1, batch + 2) or u.shape[-1 if vector else -2] != n:
        raise ValueError(
            f"{where}: u has shape {tuple(u.shape)}, expected {batch} batch axes and then "
            f"({n},) or ({n}, m)"
        )
    if u.dtype != spectrum.values.dtype:
        raise TypeError(f"{where}: u has dtype {u.dtype}, expected {spectrum.values.dtype}")
    return vector


def _kept(spectrum: Spectrum) -> Tensor:
    """Return 1 at the modes in use, the first k and the rest of their last cluster, else 0."""
    labels, k = spectrum._modes.labels, spectrum._modes.wanted
    return (labels <= labels[..., k - 1 : k]).to(spectrum.values.dtype)


def _evaluate(where: str, f: Function, values: Tensor) -> Tensor:
    weights = f(values)
    if not isinstance(weights, Tensor) or weights.shape[-values.dim() :] != values.shape:
        shape = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(
            f"{where}: f gave {shape} for values of shape {tuple(values.shape)}, expected that "
            "shape, with axes in front where there are several functions"
        )
    if checks_values() and not bool(weights.detach().isfinite().all()):
        bad = values.detach().expand_as(weights)[~weights.detach().isfinite()]
        raise ValueError(f"{where}: f is not finite at the eigenvalue {float(bad[0]):.6g}")
    return weights


def _differences(f: Function, modes: Modes, kept: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``f[λᵢ, λⱼ]`` and ``(λf)[λᵢ, λⱼ]`` of f cut off beyond the kept modes."""
    values = modes.values
    a, b = values[..., :, None], values[..., None, :]
    size = torch.maximum(a.abs(), b.abs())
    spacing = (values[..., -1] - values[..., 0]) / values.shape[-1]
    relative = torch.finfo(values.dtype).eps ** _NEAR
    near = (a - b).abs() <= relative * torch.maximum(size, spacing[..., None, None])
    inside = kept.bool()
    near = near & (inside[..., :, None] == inside[..., None, :])
    p = values.shape[-1]

    def quotient(g: Tensor) -> Tensor:
        return (g[..., :, None] - g[..., None, :]) / torch.where(near, 1, a - b)

    def flat(x: Tensor) -> Tensor:
        return x.expand(*values.shape, p).reshape(*values.shape[:-1], p * p)

    def slopes(x: Tensor) -> tuple[Tensor, Tensor]:
        pair = torch.func.jvp(f, (x,), (torch.ones_like(x),))
        value, slope = (y.detach().reshape(*y.shape[:-1], p, p) for y in pair[:2])
        return slope, value + x.reshape(*x.shape[:-1], p, p) * slope

    ends, middles = (slopes(flat(x)) for x in (a, 0.5 * (a + b)))
    both = kept[..., :, None] * kept[..., None, :]
    found = []
    for end, middle, g in zip(ends, middles, (weights, values * weights), strict=True):
        mean = (end + end.mT + 4 * middle) / 6
        found.append(torch.where(near, mean * both, quotient(g)))
    return found[0], found[1]


class _Kernel(torch.autograd.Function):
    """``Φ diag(g) Φᵀ`` at its diagonal, or times a load; g ``(s..., ..., p)``, zero if cut off."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        stiffness: Tensor,
        mass: Tensor,
        weights: Tensor,
        load: Tensor | None,
        operator: Operator,
        modes: Modes,
        differences: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        ctx.operator, ctx.modes = operator.map(detached), modes
        ctx.differences, ctx.dtypes = differences, (stiffness.dtype, weights.dtype)
        g = weights.to(modes.values)
        wide = None if load is None else load.to(modes.values)
        ctx.save_for_backward(g, wide)
        phi = modes.functions
        if wide is None:
            found = (phi.square() @ g[..., None])[..., 0]
        else:
            found = phi @ (g[..., None] * (phi.mT @ wide))
        return found.to(stiffness.dtype)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        twice = torch.is_grad_enabled()
        with torch.no_grad():
            parts = _kernel_cotangents(ctx, cotangent.to(ctx.modes.values))
        dtypes = (ctx.dtypes[0], ctx.dtypes[0], ctx.dtypes[1], ctx.dtypes[0])
        out = [None if x is None else x.to(t) for x, t in zip(parts, dtypes, strict=True)]
        return (*(once(x) if twice else x for x in out), None, None, None)


def _kernel_cotangents(ctx: Any, cotangent: Tensor) -> list[Tensor | None]:
    g, load = ctx.saved_tensors
    modes, operator = ctx.modes, ctx.operator
    phi, values = modes.functions, modes.values
    several = tuple(range(g.dim() - values.dim()))  # the axes s

    def total(x: Tensor) -> Tensor:
        return x.sum(several) if several else x

    # Ḡ, the symmetric cotangent of the kernel, enters as C = Φᵀ Ḡ Φ and through Ḡ Φ.
    back, seen, given = None, None, None
    if load is None:
        each = cotangent.reshape(-1, *phi.shape[:-1])  # one at a time: memory stays O(n p)
        c = torch.stack([phi.mT @ (x[..., None] * phi) for x in each])
        c = c.reshape(*g.shape, g.shape[-1])
    else:
        seen, given = phi.mT @ cotangent, phi.mT @ load
        c = seen @ given.mT
        c = 0.5 * (c + c.mT)
        if ctx.needs_input_grad[3]:
            back = total(phi @ (g[..., None] * seen))
    to_weights = c.diagonal(dim1=-2, dim2=-1) if ctx.needs_input_grad[2] else None
    out: list[Tensor | None] = [None, None, to_weights, back]
    if ctx.differences is None:
        return out
    plain, weighted = ctx.differences
    left, mass_left = phi @ total(c * plain), phi @ total(c * weighted)
    if modes.factor is not None:
        weight = g.reshape(-1, g.shape[-1])
        which = torch.nonzero((weight != 0).any(0))[:, 0]
        scale = 2 * weight[:, which]
        if seen is None or given is None or load is None:
            right = (cotangent.reshape(len(weight), -1).mT @ scale) * phi[:, which]
        else:
            each = (
                zip(scale, cotangent.reshape(-1, *load.shape), seen.flatten(0, -3), strict=True)
                if several
                else [(scale[0], cotangent, seen)]
            )
            right = torch.zeros_like(phi[:, which])
            for row, x, y in each:
                right += 0.5 * (x @ given[which].mT + load @ y[which].mT) * row
        z = beyond(modes, which, right)
        left = left.index_add(1, which, z, alpha=-1)
        mass_left = mass_left.index_add(1, which, z * values[which], alpha=-1)
    if ctx.needs_input_grad[0]:
        out[0] = place(operator.stiffness, left, phi)
    if ctx.needs_input_grad[1]:
        out[1] = -place(operator.mass, mass_left, phi)
    return out


def _kernel(where: str, spectrum: Spectrum, f: Function, load: Tensor | None) -> Tensor:
    modes = spectrum._modes
    kept = _kept(spectrum).to(modes.values.dtype)
    weights = _evaluate(where, f, modes.values.to(spectrum.values.dtype)) * kept
    differences = None
    if _moves(spectrum.operator):
        g = weights.detach().to(modes.values.dtype)
        differences = _differences(f, modes, kept, g)
    return _weighted(spectrum, weights, load, differences)


def _moves(operator: Operator) -> bool:
    both = numbers(operator.stiffness), numbers(operator.mass)
    return torch.is_grad_enabled() and any(x.requires_grad for x in both)


def _weighted(
    spectrum: Spectrum,
    weights: Tensor,
    load: Tensor | None,
    differences: tuple[Tensor, Tensor] | None,
) -> Tensor:
    operator = spectrum.operator
    stiffness, mass = numbers(operator.stiffness), numbers(operator.mass)
    return _Kernel.apply(stiffness, mass, weights, load, operator, spectrum._modes, differences)


def _steps(modes: Modes, g: Tensor) -> tuple[Tensor, Tensor]:
    """Return the divided differences of a step function, exact at every gap between clusters."""
    values, pairs = modes.values, same(modes.labels)
    gaps = torch.where(pairs, 1, values[..., :, None] - values[..., None, :])

    def quotient(x: Tensor) -> Tensor:
        return torch.where(pairs, 0, x[..., :, None] - x[..., None, :]) / gaps

    both = torch.where(pairs, g[..., :, None] * g[..., None, :], 0)
    return quotient(g), quotient(values * g) + both
