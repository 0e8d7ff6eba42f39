r"""Perturbation theory of :math:`K\varphi = \lambda M\varphi` with both matrices perturbed.

.. math:: K(\epsilon) = K + \epsilon K_1 + \epsilon^2 K_2, \qquad
          M(\epsilon) = M + \epsilon M_1 + \epsilon^2 M_2

One scheme serves simple, degenerate and nearly degenerate eigenvalues. For a block P of states
:math:`\Phi`, the subspace that the perturbed operator keeps is, to first order,

.. math:: X(\epsilon) = \Phi + \epsilon X_1, \qquad
          x_a = \sum_{j\notin P} \varphi_j\,
          \frac{\varphi_j^T(K_1 - \lambda_a M_1)\varphi_a}{\lambda_a - \lambda_j}

and the pencil :math:`(X^TKX, X^TMX)`, made orthonormal by :math:`(X^TMX)^{-1/2}`, is the effective
Hamiltonian :math:`H_0 + \epsilon H_1 + \epsilon^2 H_2` of Schrieffer & Wolff and des Cloizeaux. No
denominator in it is the difference of two states of P. The sum over j runs over all states, by
:mod:`~darboux.manifolds.spectral.resolvent`. Kato (1995), "Perturbation Theory for Linear
Operators", ch. II; Bravyi, DiVincenzo & Loss, Ann. Phys. 326 (2011) 2793.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from darboux import _checks
from darboux.manifolds.spectral import bounds
from darboux.manifolds.spectral.adjoint import Modes
from darboux.manifolds.spectral.eigen import Spectrum
from darboux.manifolds.spectral.operator import Operator, Sparse
from darboux.manifolds.spectral.resolvent import reduced_resolvent

Matrix = Sparse | Tensor
Changes = tuple[Matrix | None, Matrix | None, Matrix | None, Matrix | None]
# Eigenvalues closer than this, relative to their size, are taken for equal.
_EQUAL = 1e-7


class Block(NamedTuple):
    r"""The effective Hamiltonian of the states ``states`` of a spectrum.

    ``hamiltonian (3, m, m)`` holds :math:`H_0, H_1, H_2`; ``frame (2, n, m)`` the functions whose
    combinations at :math:`\epsilon` are ``frame[0] + eps * frame[1]``, M-orthonormal to second
    order; ``level`` is the common eigenvalue of an exactly degenerate block, otherwise ``None``;
    ``admixture (n, m)`` is :math:`X_1`.
    """

    states: slice
    hamiltonian: Tensor
    frame: Tensor
    level: float | None
    admixture: Tensor

    def solve(self, eps: float, order: int = 2) -> tuple[Tensor, Tensor]:
        """Return the eigenvalues ``(m,)`` at ``eps`` and their coordinates ``(m, m)``."""
        h0, h1, h2 = self.hamiltonian
        rest = h1 + eps * h2 if order == 2 else h1
        if self.level is None:
            return torch.linalg.eigh(h0 + eps * rest)
        # of H - H_0, so that the good basis is found also as eps -> 0
        shifts, basis = torch.linalg.eigh(rest)
        return self.level + eps * shifts, basis


@dataclass(frozen=True, eq=False)
class Perturbation:
    r"""The eigenpairs of a perturbed operator as functions of :math:`\epsilon`.

    ``series (order + 1, k)`` are the Taylor coefficients of the eigenvalues at 0, ``modes
    (2, n, k)`` the unperturbed functions in the good basis, to which the perturbed ones tend, and
    their rates. Where degenerate states do not split at first order, the good basis is that of the
    second, and their rates inside the group, which need the third order, are left out: only the
    projector on the group is then of second order. ``coupling (k,)`` is
    :math:`|x_a|_M = (\sum_j V_{aj}^2/(\lambda_a - \lambda_j)^2)^{1/2}` over all states outside the
    block. Nothing here carries a graph.
    """

    series: Tensor
    modes: Tensor
    coupling: Tensor
    blocks: tuple[Block, ...]
    order: int
    base: Operator
    changes: Changes

    def values(self, eps: float = 1.0) -> Tensor:
        """Return the eigenvalues ``(k,)``, with an error of order ``eps ** (order + 1)``.

        Nearly degenerate blocks are diagonalised, all others are polynomials.
        """
        return torch.cat([block.solve(eps, self.order)[0] for block in self.blocks])

    def functions(self, eps: float = 1.0) -> Tensor:
        """Return the eigenfunctions ``(n, k)``, with an error of order ``eps ** 2``."""
        parts = []
        for block in self.blocks:
            parts.append((block.frame[0] + eps * block.frame[1]) @ block.solve(eps)[1])
        return torch.cat(parts, 1)

    def valid(self, eps: float = 1.0, threshold: float = 0.3) -> Tensor:
        """Say ``(k,)`` where the first-order admixture of other blocks is below ``threshold``."""
        return abs(eps) * self.coupling < threshold

    def operator(self, eps: float = 1.0) -> Operator:
        """Return the perturbed operator."""
        k1, m1, k2, m2 = self.changes
        return Operator(
            _sum(self.base.stiffness, (eps, k1), (eps * eps, k2)),
            _sum(self.base.mass, (eps, m1), (eps * eps, m2)),
            self.base.space,
        )

    def bounds(self, eps: float = 1.0) -> tuple[Tensor, Tensor]:
        r"""Return Rayleigh quotients ``(k,)`` of the functions and the radii ``(k,)`` around them.

        Each interval holds an eigenvalue of the perturbed operator: Weyl's bound by the residual.
        """
        perturbed, u = self.operator(eps), self.functions(eps)
        stiffness, mass = perturbed.stiffness @ u, perturbed.mass @ u
        quotients = (u * stiffness).sum(0) / (u * mass).sum(0)
        return quotients, bounds.weyl(perturbed, quotients, u)


def perturb(
    spectrum: Spectrum | _Small,
    d_stiffness: Matrix | None,
    d_mass: Matrix | None,
    *,
    order: int = 2,
    d2_stiffness: Matrix | None = None,
    d2_mass: Matrix | None = None,
    degenerate: str | float | Sequence[slice] = "auto",
    k: int | None = None,
) -> Perturbation:
    r"""Perturb the ``k`` lowest eigenpairs of a spectrum (all that it has, unless told).

    ``d_stiffness, d_mass`` are :math:`K_1, M_1` and ``d2_*`` are :math:`K_2, M_2`, halves of the
    second derivatives, like the operator dense ``(n, n)`` or sparse on its pattern; ``None`` is
    zero. :func:`~darboux.manifolds.spectral.families.derivatives` makes them from a family of
    operators.

    ``order`` is that of the eigenvalues. Functions are of first order; those of degenerate states
    need the second derivatives for it, to mix inside their block.

    ``degenerate`` says which states form a block: "auto" the clusters of equal eigenvalues; a
    number g also neighbours closer than g times the eigenvalue, so that their mixing is not
    expanded; or slices.

    Raises ``GeometryError`` where a block leaves out a state with one of its eigenvalues, such as
    a cluster that was cut at k.

    >>> from darboux.manifolds.spectral.eigen import eigenpairs
    >>> operator = Operator(torch.diag(torch.tensor([0.0, 1.0, 3.0])), torch.eye(3))
    >>> result = perturb(eigenpairs(operator, 2), 0.1 * torch.ones(3, 3), None)
    >>> result.series[:, 0], result.values()[0]
    (tensor([ 0.0000,  0.1000, -0.0133]), tensor(0.0867))
    """
    if order not in (1, 2):
        raise ValueError(f"perturb: order is {order}, expected 1 or 2")
    values = spectrum.values.detach()
    if values.dim() != 1:
        raise ValueError(
            f"perturb: values has shape {tuple(values.shape)}, expected (k,); take one spectrum of "
            "the batch at a time"
        )
    count = len(values) if k is None else k
    if not 1 <= count <= len(values):
        raise ValueError(f"perturb: k is {k}, expected 1 to {len(values)}")
    base = spectrum.operator.map(_detached)
    changes = _changes(base, d_stiffness, d_mass, d2_stiffness, d2_mass)
    blocks = _effective_blocks(spectrum, _blocks(spectrum, degenerate, count), base, changes)
    # The size of the perturbation, against which a splitting of first order is none: H_1 may
    # vanish by symmetry, and H_2 is that size squared over a gap.
    first, second = (max(float(b.hamiltonian[i].abs().max()) for b in blocks) for i in (1, 2))
    size = max(first, (second * float(values.abs().max())) ** 0.5)
    expansions = [_expand(block, base, size) for block in blocks]
    series, modes, coupling = zip(*expansions, strict=True)
    return Perturbation(
        torch.cat(series, 1)[: order + 1],
        torch.cat(modes, 2),
        torch.cat(coupling),
        tuple(blocks),
        order,
        base,
        changes,
    )


def schrieffer_wolff(
    spectrum: Spectrum,
    states: slice,
    d_stiffness: Matrix | None,
    d_mass: Matrix | None,
    d2_stiffness: Matrix | None = None,
    d2_mass: Matrix | None = None,
) -> Block:
    r"""Return the effective Hamiltonian of a block of ``states``, whatever the gaps inside it.

    .. math:: H_1 = k_1 - \tfrac12\{m_1, \Lambda\}, \qquad H_2 = k_2 - \tfrac12\{m_2, \Lambda\}
        + \tfrac38\{m_1^2, \Lambda\} + \tfrac14 m_1\Lambda m_1 - \tfrac12\{m_1, k_1\}

    where :math:`k_r, m_r` are the coefficients of :math:`X^TKX, X^TMX`. Its eigenvalues have an
    error of order :math:`\epsilon^3`. See :func:`perturb` for the arguments.
    """
    count = len(spectrum.values)
    states = slice(*states.indices(count)[:2])
    if states.start >= states.stop:
        raise ValueError(f"schrieffer_wolff: states is empty among the {count} of the spectrum")
    base = spectrum.operator.map(_detached)
    changes = _changes(base, d_stiffness, d_mass, d2_stiffness, d2_mass)
    return _effective_blocks(spectrum, [states], base, changes)[0]


def _effective_blocks(
    spectrum: Spectrum | _Small, blocks: list[slice], base: Operator, changes: Changes
) -> list[Block]:
    values = spectrum.values.detach()
    columns = torch.cat([torch.arange(b.start, b.stop, device=values.device) for b in blocks])
    levels, phi = values[columns], spectrum.functions.detach()[:, columns]
    places, start = [], 0
    for block in blocks:
        place = slice(start, start + block.stop - block.start)
        places.append(place)
        start = place.stop
        if _equal(levels[place], spectrum):
            levels[place] = levels[place].mean()
    k1, m1, k2, m2 = changes
    k1_phi, m1_phi = _apply(k1, phi), _apply(m1, phi)
    admixture = reduced_resolvent(spectrum, blocks, k1_phi - m1_phi * levels)
    image = [k1_phi, m1_phi, _apply(k2, phi), _apply(m2, phi)]
    image += [_apply(k1, admixture), _apply(m1, admixture)]
    image += [base.stiffness @ admixture, base.mass @ admixture]
    return [
        _effective(b, levels[p], phi[:, p], admixture[:, p], [y[:, p] for y in image])
        for b, p in zip(blocks, places, strict=True)
    ]


def _effective(states: slice, levels: Tensor, phi: Tensor, x: Tensor, image: list[Tensor]) -> Block:
    k1_phi, m1_phi, k2_phi, m2_phi, k1_x, m1_x, k_x, m_x = image
    k1, m1 = phi.mT @ k1_phi, phi.mT @ m1_phi
    k2 = phi.mT @ (k2_phi + k1_x) + k1_x.mT @ phi + x.mT @ k_x
    m2 = phi.mT @ (m2_phi + m1_x) + m1_x.mT @ phi + x.mT @ m_x
    h0 = torch.diag(levels)

    def both(a: Tensor, b: Tensor) -> Tensor:
        return a @ b + b @ a

    h1 = k1 - 0.5 * both(m1, h0)
    h2 = k2 - 0.5 * both(m2, h0) + 0.375 * both(m1 @ m1, h0)
    h2 = h2 + 0.25 * m1 @ h0 @ m1 - 0.5 * both(m1, k1)
    hamiltonian = torch.stack([h0, 0.5 * (h1 + h1.mT), 0.5 * (h2 + h2.mT)])
    frame = torch.stack([phi, x - 0.5 * phi @ m1])
    level = float(levels[0]) if bool((levels == levels[0]).all()) else None
    return Block(states, hamiltonian, frame, level, x)


def _expand(block: Block, base: Operator, size: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the Taylor series, the modes with their rates, and the coupling of a block."""
    h0, h1, h2 = block.hamiltonian
    zeroth = h0.diagonal()
    if block.level is None:
        # the small problem, with its own clusters
        identity = torch.eye(len(h0)).to(h0)
        small = _Small(zeroth, identity, Operator(h0, identity), Modes(zeroth, identity, zeroth, 1))
        inner = perturb(small, h1, None, d2_stiffness=h2)
        (basis, mix), series = inner.modes, inner.series
    else:
        first, basis = torch.linalg.eigh(h1)
        equal = max(_EQUAL, 1e3 * torch.finfo(first.dtype).eps)
        groups = _groups(first, torch.full_like(first, equal * size))
        coupled = basis.mT @ h2 @ basis
        for group in groups:
            basis[:, group] = basis[:, group] @ torch.linalg.eigh(coupled[group, group])[1]
            first[group] = first[group].mean()
        coupled = basis.mT @ h2 @ basis
        gaps = first - first[:, None]
        mix = torch.where(gaps == 0, 0.0, coupled / gaps)
        mix = basis @ mix
        series = torch.stack([zeroth, first, coupled.diagonal()])
    modes = torch.stack([block.frame[0] @ basis, block.frame[1] @ basis + block.frame[0] @ mix])
    outside = block.admixture @ basis
    coupling = (outside * (base.mass @ outside)).sum(0).clamp(min=0).sqrt()
    return series, modes, coupling


@dataclass(frozen=True, eq=False)
class _Small:
    values: Tensor
    functions: Tensor
    operator: Operator
    _modes: Modes


# -- blocks and matrices ------------------------------------------------------------------


def _widths(levels: Tensor, spectrum: Spectrum | _Small) -> Tensor:
    # how far apart equal eigenvalues may lie; those of a kernel by the spacing of the others
    values, every = spectrum.values.detach(), spectrum._modes.values
    spacing = float(values[-1] - values[0]) / max(len(values) - 1, 1)
    rounding = 32 * torch.finfo(levels.dtype).eps * float(every.abs().max())
    return _EQUAL * levels.abs().clamp(min=spacing) + rounding


def _equal(levels: Tensor, spectrum: Spectrum | _Small) -> bool:
    # each step between neighbours may be as wide
    width = len(levels) * float(_widths(levels, spectrum).amax())
    return float(levels.amax() - levels.amin()) <= width


def _groups(values: Tensor, widths: Tensor) -> list[slice]:
    """Cut ascending values wherever the step to the next is larger than ``widths``."""
    ends = torch.nonzero(values.diff() > widths[1:])[:, 0].tolist()
    starts = [0, *[e + 1 for e in ends]]
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(values)], strict=True)]


def _blocks(
    spectrum: Spectrum | _Small, degenerate: str | float | Sequence[slice], count: int
) -> list[slice]:
    values = spectrum.values.detach()
    if isinstance(degenerate, str):
        if degenerate != "auto":
            raise ValueError(
                f"perturb: degenerate is {degenerate!r}, expected 'auto', a number or slices"
            )
        clusters = getattr(spectrum, "clusters", None)
        if clusters is None:
            clusters = _groups(values, _widths(values, spectrum))
    elif isinstance(degenerate, float | int):
        clusters = _groups(values, float(degenerate) * values.abs() + _widths(values, spectrum))
    else:
        taken = [slice(*s.indices(len(values))) for s in degenerate]
        inside = {i for s in taken for i in range(s.start, s.stop)}
        auto = _blocks(spectrum, "auto", len(values))
        rest = [s for s in auto if not inside & set(range(s.start, s.stop))]
        clusters = sorted(taken + rest, key=lambda s: s.start)
    kept = [s for s in clusters if s.start < count]
    covered = [i for s in kept for i in range(s.start, s.stop)]
    if covered != list(range(count)):
        raise ValueError(
            f"perturb: the blocks {[(s.start, s.stop) for s in kept]} do not cut the first {count} "
            "states into whole clusters"
        )
    return kept


def _detached(a: Matrix) -> Matrix:
    return Sparse(a.pattern, a.values.detach()) if isinstance(a, Sparse) else a.detach()


def _changes(base: Operator, *given: Matrix | None) -> Changes:
    names = ("d_stiffness", "d_mass", "d2_stiffness", "d2_mass")
    k1, m1, k2, m2 = (_checked(n, c, base) for n, c in zip(names, given, strict=True))
    return k1, m1, k2, m2


def _checked(name: str, change: Matrix | None, base: Operator) -> Matrix | None:
    if change is None:
        return None
    n = base.size
    if change.shape != (n, n):
        raise ValueError(f"perturb: {name} has shape {tuple(change.shape)}, expected ({n}, {n})")
    if isinstance(change, Sparse) != base.sparse:
        raise TypeError(
            f"perturb: {name} is {'sparse' if isinstance(change, Sparse) else 'dense'}, expected "
            "it to be like the operator"
        )
    if isinstance(change, Sparse):
        assert isinstance(base.stiffness, Sparse)
        _same_pattern(name, change, base.stiffness)
    _checks.check_finite(
        "perturb", **{name: change.values if isinstance(change, Sparse) else change}
    )
    return _detached(change)


def _same_pattern(name: str, a: Sparse, b: Sparse) -> None:
    p, q = a.pattern, b.pattern
    if p is not q and not (torch.equal(p.rows, q.rows) and torch.equal(p.cols, q.cols)):
        raise ValueError(f"perturb: {name} has other places than the operator's stiffness")


def _apply(a: Matrix | None, x: Tensor) -> Tensor:
    return torch.zeros_like(x) if a is None else a @ x


def _sum(base: Matrix, *terms: tuple[float, Matrix | None]) -> Matrix:
    total = base.values if isinstance(base, Sparse) else base
    for factor, change in terms:
        if change is not None:
            part = change.values if isinstance(change, Sparse) else change
            total = total + factor * part
    return Sparse(base.pattern, total) if isinstance(base, Sparse) else total


# -- projection ----------------------------------------------------------------------------


class Ritz(NamedTuple):
    """Ritz pairs: ``values (m,)`` ascending and ``functions (n, m)``, M-orthonormal."""

    values: Tensor
    functions: Tensor


def rayleigh_ritz(operator: Operator, basis: Tensor, k: int | None = None) -> Ritz:
    r"""Return the ``k`` lowest eigenpairs of an operator restricted to a span of ``basis (n, m)``.

    The values are upper bounds, in order, of the operator's own. In the span of unperturbed
    eigenfunctions and their rates, :math:`\{\Phi, \Phi'\}`, the error is of order
    :math:`\epsilon^4`; of :math:`\Phi` alone, :math:`\epsilon^2`. Directions that depend on the
    others to rounding are dropped.
    """
    _checks.check_finite("rayleigh_ritz", basis=basis)
    n = operator.size
    if basis.dim() != 2 or basis.shape[0] != n:
        raise ValueError(f"rayleigh_ritz: basis has shape {tuple(basis.shape)}, expected ({n}, m)")
    basis = basis.detach()
    lengths = (basis * (operator.mass @ basis)).sum(0).clamp(min=0).sqrt()
    kept = lengths > n * torch.finfo(basis.dtype).eps * lengths.amax()
    if not bool(kept.any()):
        raise ValueError("rayleigh_ritz: basis is zero")
    basis = basis[:, kept] / lengths[kept]
    sizes, axes = torch.linalg.eigh(basis.mT @ (operator.mass @ basis))
    kept = sizes > len(sizes) * torch.finfo(sizes.dtype).eps * sizes[-1]
    # directions of small size carry rounding errors of their own: orthonormalise twice
    basis = basis @ (axes[:, kept] / sizes[kept].sqrt())
    low = torch.linalg.cholesky(basis.mT @ (operator.mass @ basis))
    basis = torch.linalg.solve_triangular(low, basis.mT, upper=False).mT
    values, vectors = torch.linalg.eigh(basis.mT @ (operator.stiffness @ basis))
    return Ritz(values[:k], basis @ vectors[:, :k])
