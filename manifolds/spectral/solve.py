r"""Linear systems :math:`A x = b` with a sparse positive definite matrix, differentiable.

By the implicit function theorem, with :math:`\lambda = A^{-1}\bar x`:
:math:`\bar b = \lambda` and :math:`\bar A = -\lambda x^T` at the places of A. One factorisation
serves all right-hand sides, the backward pass and its own derivatives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import scipy.sparse
import torch
from torch import Tensor

from darboux._checks import GeometryError, check_finite, in_transform
from darboux.manifolds.spectral.factor import Factor, factorise
from darboux.manifolds.spectral.operator import Pattern, Sparse, outer_on


def solver(matrix: Sparse, where: str = "solver", method: str = "auto") -> Callable:
    """Factor ``matrix`` and return the function that takes ``b (n, ...)`` to ``A⁻¹ b``.

    Factors and solves in float64 on the CPU whatever the input, which the result follows.
    Differentiable in the matrix and in b, to any order, by ``torch.autograd``. ``method`` as in
    :func:`darboux.manifolds.spectral.factor.factorise`.

    Raises ``GeometryError`` where the matrix is not positive definite, ``TypeError`` inside
    ``torch.func``, which cannot see through a factorisation.
    """
    if in_transform():
        raise TypeError(
            f"{where}: torch.func transforms and forward mode do not reach sparse solves; use "
            "torch.autograd"
        )
    check_finite(where, matrix=matrix.values)
    nothing = scipy.sparse.csr_array(matrix.shape)
    try:
        factor = factorise(matrix.scipy(), nothing, 0.0, method)
    except GeometryError:
        raise GeometryError(f"{where}: the matrix is not positive definite") from None

    def solve(b: Tensor) -> Tensor:
        return _Solve.apply(matrix.values, b.flatten(1) if b.ndim > 1 else b[:, None],
                            matrix.pattern, factor).reshape(b.shape)  # fmt: skip

    return solve


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, b: Tensor, pattern: Pattern, factor: Factor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        found = factor.solve(b.detach().to("cpu", torch.float64).numpy())
        x = torch.from_numpy(found).to(b)
        ctx.save_for_backward(values, x)
        ctx.pattern, ctx.factor = pattern, factor
        return x

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        values, x = ctx.saved_tensors
        back = _Solve.apply(values, cotangent, ctx.pattern, ctx.factor)
        to_values = -outer_on(ctx.pattern, back, x) if ctx.needs_input_grad[0] else None
        return to_values, back, None, None
