"""Eigenpairs ``K φ = λ M φ``, complete with multiplicities, certified, differentiable.

Small problems are solved densely, batched and on their device; large sparse ones by block
shift-invert Lanczos on the CPU. An inertia count certifies that no copy of a multiple eigenvalue
is missing. Derivatives: :mod:`darboux.manifolds.spectral.adjoint`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from darboux._checks import (
    ConvergenceError,
    GeometryError,
    check_finite,
    check_tensor,
    check_that,
    checks_values,
    in_transform,
)
from darboux.manifolds.spectral import shift_invert
from darboux.manifolds.spectral.adjoint import Modes, attach, numbers
from darboux.manifolds.spectral.factor import FACTORS
from darboux.manifolds.spectral.operator import Operator, Sparse

METHODS = ("auto", "dense", "lanczos", "arpack", "lobpcg")

# Below this many unknowns a dense solution is as quick as a factorisation and Lanczos.
_DENSE = 300
# Values this close (relative) are equal to rounding: turning their functions costs no accuracy.
_EQUAL = 1e-11


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The lowest eigenpairs of an operator.

    ``values (..., k)`` ascend, ``functions (..., n, k)`` are M-orthonormal, ``φᵀ M φ = 1``. Both
    are differentiable in the matrices. ``clusters`` are the groups of equal values (for a batch,
    one tuple of groups for each element in row-major order), and ``cut`` counts the copies of the
    last value that k leaves out. ``residuals (..., k)`` are ``|K φ - λ M φ|`` in the norm of the
    inverse mass, by its diagonal where the operator is sparse: to within the condition of the
    scaled mass (two for linear elements) the distance from ``λ`` to an eigenvalue. ``certified``
    says that a count of inertia found no others. ``components`` is the number of connected
    components of a sparse operator, ``None`` for a dense one.

    Gauge: ``Σ_v w_v φ(v) > 0`` with ``w_v = frac(v g) - ½``, g the golden ratio; where
    values are equal to 1e-11 the basis diagonalises ``Σ_v w_v M_vv φᵢ(v) φⱼ(v)``. No method or
    start changes it.
    """

    values: Tensor
    functions: Tensor
    operator: Operator
    clusters: tuple
    residuals: Tensor
    certified: bool
    cut: int = 0
    components: int | None = None
    _modes: Modes = field(default=None, repr=False)  # pyright: ignore[reportAssignmentType]
    _values: Tensor = field(default=None, repr=False)  # pyright: ignore[reportAssignmentType]


def eigenpairs(
    operator: Operator,
    k: int,
    *,
    method: str = "auto",
    guard: int = 10,
    certify: bool = True,
    factor: str = "auto",
    cluster_gap: float = 1e-8,
) -> Spectrum:
    r"""Return the ``k`` lowest solutions of :math:`K\varphi = \lambda M\varphi`.

    ``method``: ``dense`` (Cholesky of M and a symmetric eigensolver; batched), ``lanczos`` (block
    shift-invert, float64 on the CPU whatever the input), ``arpack``, ``lobpcg``, or ``auto``, which
    takes ``dense`` for dense operators and below 300 unknowns. ``guard`` vectors are computed
    beyond k, for the clusters and the derivatives. Values are equal, one cluster, when neighbours
    differ by less than ``cluster_gap`` times the larger of themselves and the mean spacing; a
    larger gap joins the split levels of a discretised symmetric space, and derivatives of
    functions then leave out what turns a level within itself.

    The certificate factors ``K - μM`` with μ in a gap above the k-th value and counts negative
    pivots; where copies are missing the search goes on.

    Derivatives: values by Hellmann-Feynman, averaged over each cluster (exact for symmetric
    functions of its members, a supergradient otherwise), to second order; functions by adjoint
    solves, once, and :class:`GeometryError` in backward where the loss depends on the basis of a
    cluster. For functions of the operator, such as a heat kernel, use ``trace``, ``diagonal``,
    ``apply`` and ``projector``, exact at every multiplicity.

    Raises ``ValueError`` or ``TypeError`` for bad input, :class:`GeometryError` where the mass is
    not positive definite, :class:`ConvergenceError` where the pairs or the count fail.
    """
    _check(operator, k, method, guard, factor)
    if method == "auto":
        few = operator.size <= max(_DENSE, 4 * (k + guard))
        method = "dense" if few or not operator.sparse else "lanczos"
    if method == "dense":
        return _dense(operator, k, cluster_gap)
    return _sparse(operator, k, method, guard, certify, factor, cluster_gap)


def _check(operator: Operator, k: int, method: str, guard: int, factor: str) -> None:
    where = "eigenpairs"
    if not isinstance(operator, Operator):
        raise TypeError(f"{where}: got a {type(operator).__name__}, expected an Operator")
    for name, value, allowed in (("method", method, METHODS), ("factor", factor, FACTORS)):
        if value not in allowed:
            raise ValueError(f"{where}: {name}={value!r}, expected one of {', '.join(allowed)}")
    if not operator.sparse and method not in ("auto", "dense"):
        raise ValueError(f"{where}: method={method!r} needs a sparse operator, got a dense one")
    stiffness, mass = operator.stiffness, operator.mass
    if isinstance(stiffness, Sparse) != isinstance(mass, Sparse):
        raise TypeError(f"{where}: stiffness and mass must be both sparse or both dense")
    for name, matrix in (("stiffness", stiffness), ("mass", mass)):
        check_tensor(where, name, numbers(matrix))
        if len(matrix.shape) < 2 or matrix.shape[-1] != matrix.shape[-2]:
            raise ValueError(
                f"{where}: {name} has shape {tuple(matrix.shape)}, expected (..., n, n)"
            )
    if stiffness.shape != mass.shape or stiffness.dtype != mass.dtype:
        raise ValueError(
            f"{where}: stiffness is {tuple(stiffness.shape)} {stiffness.dtype} and mass "
            f"{tuple(mass.shape)} {mass.dtype}, expected the same"
        )
    most = operator.size - 1 if operator.sparse else operator.size
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= most:
        raise ValueError(f"{where}: k={k!r}, expected 1 ≤ k ≤ {most} for {operator.size} unknowns")
    if not isinstance(guard, int) or guard < 1:
        raise ValueError(f"{where}: guard={guard!r}, expected a positive integer")
    if in_transform():
        raise TypeError(
            f"{where}: torch.func transforms and forward mode do not reach eigenpairs; batch dense "
            "operators instead of vmap, and use torch.autograd or perturb for derivatives"
        )
    if not checks_values():
        return
    check_finite(where, stiffness=numbers(stiffness), mass=numbers(mass))
    for name, matrix in (("stiffness", stiffness), ("mass", mass)):
        check_that(where, lambda matrix=matrix: _symmetric(matrix), f"{name} must be symmetric")
    diagonal = mass.diagonal() if isinstance(mass, Sparse) else mass.diagonal(dim1=-2, dim2=-1)
    bad = torch.nonzero(~(diagonal.detach() > 0))
    if len(bad):
        raise ValueError(
            f"{where}: the mass has {len(bad)} entries on its diagonal that are not positive, the "
            f"first at {bad[0].tolist()}; it must be positive definite (an unreferenced vertex?)"
        )


def _symmetric(matrix: Sparse | Tensor) -> Tensor:
    entries = numbers(matrix).detach()
    if isinstance(matrix, Sparse):
        p = matrix.pattern
        other, size = entries[torch.argsort(p.cols * p.size + p.rows)], entries.abs().amax()
    else:
        other, size = entries.mT, entries.abs().amax((-1, -2), keepdim=True)
    return (entries - other).abs() <= 64 * torch.finfo(entries.dtype).eps * size


def _labels(values: Tensor, gap: float, rounding: float | Tensor = 0.0) -> Tensor:
    """Number the clusters of ascending ``values`` ``(..., p)``."""
    spacing = (values[..., -1:] - values[..., :1]) / max(values.shape[-1] - 1, 1)
    size = torch.maximum(values.abs(), spacing)
    apart = values.diff(dim=-1) > gap * size[..., 1:] + rounding
    first = torch.zeros_like(values[..., :1], dtype=torch.int64)
    return torch.cat([first, apart.cumsum(-1)], -1)


def _groups(labels: Tensor, k: int) -> tuple[slice, ...]:
    ends = (torch.nonzero(labels[:k].diff())[:, 0] + 1).tolist()
    edges = [0, *ends, k]
    return tuple(slice(a, b) for a, b in pairwise(edges))


def _fix_gauge(functions: Tensor, labels: Tensor, mass: Tensor) -> Tensor:
    """Choose the basis of each cluster and the signs; ``mass (..., n)`` is the diagonal."""
    n = functions.shape[-2]
    index = torch.arange(1, n + 1, device=functions.device, dtype=torch.float64)
    weight = ((index * 0.6180339887498949) % 1.0 - 0.5).to(functions.dtype)
    if bool((labels.diff(dim=-1) == 0).any()):
        form = functions.mT @ ((weight * mass)[..., None] * functions)
        # Clusters far apart on the diagonal: eigh turns within clusters alone, in their order.
        inside = labels[..., :, None] == labels[..., None, :]
        form = torch.where(inside, form, 0)
        far = 4 * form.abs().amax((-1, -2), keepdim=True) * form.shape[-1]
        shifted = form + torch.diag_embed(labels.to(form.dtype) * far[..., 0])
        turn = torch.where(inside, torch.linalg.eigh(shifted)[1], 0)
        functions = functions @ turn
    sign = torch.sign((weight[:, None] * functions).sum(-2, keepdim=True))
    return functions * torch.where(sign == 0, 1, sign)


def _dense(operator: Operator, k: int, gap: float) -> Spectrum:
    full = operator.map(lambda matrix: matrix.dense() if isinstance(matrix, Sparse) else matrix)
    stiffness, mass = numbers(full.stiffness).detach(), numbers(full.mass).detach()
    lower, info = torch.linalg.cholesky_ex(mass)
    if bool((info != 0).any()):
        raise GeometryError("eigenpairs: the mass matrix is not positive definite")

    def reduce(x: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(lower, x, upper=False)

    standard = reduce(reduce(stiffness).mT)
    values, vectors = torch.linalg.eigh(0.5 * (standard + standard.mT))
    functions = torch.linalg.solve_triangular(lower.mT, vectors, upper=True)
    rounding = 32 * torch.finfo(values.dtype).eps * values.abs().amax(-1, keepdim=True)
    labels = _labels(values, gap, rounding)
    equal = _labels(values, _EQUAL, rounding)
    functions = _fix_gauge(functions, equal, mass.diagonal(dim1=-2, dim2=-1))
    residual = reduce(stiffness @ functions - (mass @ functions) * values[..., None, :])
    modes = Modes(values, functions, labels, k)
    all_values, all_functions = attach(operator, modes)
    rows = labels.flatten(0, -2) if labels.dim() > 1 else labels[None]
    clusters = tuple(_groups(row, k) for row in rows)
    cut = int((rows[:, k:] == rows[:, k - 1 : k]).sum(-1).max())
    return Spectrum(
        all_values[..., :k],
        all_functions[..., :k],
        operator,
        clusters if labels.dim() > 1 else clusters[0],
        residual.norm(dim=-2)[..., :k],
        True,
        cut,
        _components(operator),
        modes,
        all_values,
    )


def _components(operator: Operator) -> int | None:
    if not isinstance(operator.stiffness, Sparse):
        return None
    return int(connected_components(operator.stiffness.scipy(), directed=False)[0])


def _sparse(
    operator: Operator, k: int, method: str, guard: int, certify: bool, factor: str, gap: float
) -> Spectrum:
    assert isinstance(operator.stiffness, Sparse)
    assert isinstance(operator.mass, Sparse)
    stiffness, mass = operator.stiffness.scipy(), operator.mass.scipy()
    pencil = shift_invert.Pencil(stiffness, mass, factor)
    solve = getattr(shift_invert, method)(pencil, k)
    n, found, certified, missing = operator.size, None, False, 0
    values, functions, labels = np.empty(0), np.empty(0), torch.empty(0)
    for _ in range(shift_invert.ROUNDS):
        guard = min(guard, n - 1 - k)
        values, functions = solve(guard, missing)
        labels = _labels(torch.from_numpy(values), gap)
        missing = 0
        if guard < n - 1 - k and bool(labels[k - 1] == labels[-1]):
            guard *= 2  # the cluster of the k-th value goes on beyond the guards
            continue
        if not certify:
            break
        below, found = shift_invert.count(pencil, values, k)
        certified = found == below
        if certified:
            break
        missing = max((found or 0) - below, shift_invert.BLOCK)
    if certify and not certified:
        raise ConvergenceError(
            f"eigenpairs: {method} could not be certified in {shift_invert.ROUNDS} rounds for "
            f"k = {k}: the inertia of K - μM counts {found} eigenvalues below μ (None: no "
            "reliable count)",
            iterations=shift_invert.ROUNDS,
        )
    equal = _labels(torch.from_numpy(values), _EQUAL)
    functions = _fix_gauge(
        torch.from_numpy(functions), equal, torch.from_numpy(mass.diagonal())
    ).numpy()
    scaled = stiffness @ functions - (mass @ functions) * values
    residuals = np.sqrt((scaled**2 / mass.diagonal()[:, None]).sum(0))
    like = operator.stiffness.values
    modes = Modes(
        torch.from_numpy(values).to(like.device),
        torch.from_numpy(functions).to(like.device),
        labels.to(like.device),
        k,
        pencil.factor,
        stiffness,
        mass,
    )
    all_values, all_functions = attach(operator, modes)
    return Spectrum(
        all_values[:k],
        all_functions[:, :k],
        operator,
        _groups(labels, k),
        torch.from_numpy(residuals[:k]).to(like),
        certified,
        int((labels[k:] == labels[k - 1]).sum()),
        int(pencil.components),
        modes,
        all_values,
    )
