r"""How far computed or perturbed eigenpairs are from true ones: certified intervals and angles.

For a normalised x, a number theta and the residual :math:`r = Kx - \theta Mx` all bounds are in
terms of :math:`\rho = (r^TM^{-1}r)^{1/2}`. Parlett (1998), "The Symmetric Eigenvalue Problem",
ch. 10-11.
"""

from __future__ import annotations

import torch
from torch import Tensor

from darboux._checks import ConvergenceError
from darboux.manifolds.spectral.operator import Operator, Sparse


def weyl(operator: Operator, values: Tensor, functions: Tensor) -> Tensor:
    r"""Return :math:`\rho_i` ``(k,)``: an eigenvalue lies within it of each of ``values (k,)``.

    ``functions (n, k)`` need not be normalised.
    """
    mass_x = operator.mass @ functions
    residual = operator.stiffness @ functions - mass_x * values
    size = (functions * mass_x).sum(0)
    dual = (residual * _solve_mass(operator, residual)).sum(0)
    return (dual.clamp(min=0) / size).sqrt()


def kato_temple(residuals: Tensor, gaps: Tensor) -> Tensor:
    r"""Return :math:`\rho^2/\mathrm{gap}`: how far a Rayleigh quotient is from its eigenvalue.

    ``gaps`` are the distances of the quotients from all other eigenvalues.
    """
    return residuals.square() / gaps


def davis_kahan(residuals: Tensor, gaps: Tensor) -> Tensor:
    r"""Return :math:`\rho/\mathrm{gap}`, at most 1: the sine of the M-angle to the eigenfunction.

    ``gaps`` are the distances of the quotients from all other eigenvalues.
    """
    return (residuals / gaps).clamp(max=1.0)


def form_bounds(
    operator: Operator, d_stiffness: Tensor | None, d_mass: Tensor | None
) -> tuple[Tensor, Tensor]:
    r"""Return the least a, b with :math:`|x^T\delta K x| \le a\,x^TKx`, :math:`|x^T\delta M x| \le
    b\,x^TMx` for all x, of a dense operator.

    a is infinite where the change of K does not vanish on the kernel of K.
    """
    if isinstance(operator.stiffness, Sparse) or isinstance(operator.mass, Sparse):
        raise TypeError("form_bounds: the operator is sparse, expected a dense one")
    sizes = []
    for name, base, change in (
        ("stiffness", operator.stiffness, d_stiffness),
        ("mass", operator.mass, d_mass),
    ):
        if change is None:
            sizes.append(base.new_zeros(()))
            continue
        if change.shape != base.shape:
            raise ValueError(
                f"form_bounds: d_{name} has shape {tuple(change.shape)}, expected "
                f"{tuple(base.shape)}"
            )
        values, axes = torch.linalg.eigh(base.detach())
        tiny = 1e3 * torch.finfo(values.dtype).eps * values[-1]
        inside = values > tiny
        kernel = change.detach() @ axes[:, ~inside]
        if kernel.numel() and bool(kernel.abs().max() > 1e-9 * change.abs().max()):
            sizes.append(values.new_full((), torch.inf))
            continue
        white = axes[:, inside] / values[inside].sqrt()
        sizes.append(torch.linalg.eigvalsh(white.mT @ change.detach() @ white).abs().max())
    return sizes[0], sizes[1]


def enclose(values: Tensor, a: Tensor | float, b: Tensor | float) -> tuple[Tensor, Tensor]:
    r"""Return bounds of the perturbed eigenvalues, each in its place, from those of the forms.

    .. math:: \frac{1 - a}{1 + b}\lambda_k \le \tilde\lambda_k \le \frac{1 + a}{1 - b}\lambda_k

    by the min-max principle; see :func:`form_bounds`. Needs b < 1 and non-negative values.
    """
    if not float(b) < 1:
        raise ValueError(f"enclose: b is {float(b)}, expected less than 1")
    return (1 - a) / (1 + b) * values, (1 + a) / (1 - b) * values


def _solve_mass(operator: Operator, right: Tensor) -> Tensor:
    if isinstance(operator.mass, Tensor):
        return torch.cholesky_solve(right, torch.linalg.cholesky(operator.mass))
    # mass matrices are well conditioned once their diagonal is 1
    mass, diagonal = operator.mass, operator.mass.diagonal()[:, None]
    x = torch.zeros_like(right)
    residual = right.clone()
    z = residual / diagonal
    p, energy = z, (residual * z).sum(0)
    target = 1e-20 * energy
    for _ in range(500):
        if bool((energy <= target).all()):
            return x
        image = mass @ p
        step = torch.where(energy > target, energy / (p * image).sum(0), 0.0)
        x, residual = x + step * p, residual - step * image
        z = residual / diagonal
        fresh = (residual * z).sum(0)
        p, energy = z + torch.where(energy > target, fresh / energy, 0.0) * p, fresh
    raise ConvergenceError(
        "weyl: conjugate gradients for the mass matrix did not converge in 500 steps",
        residual=float(residual.abs().max()),
        iterations=500,
    )
