r"""One problem of discrete uniformisation: what is given, its state at some u, and its door."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from darboux import _checks
from darboux._checks import GeometryError
from darboux.flows import _discrete_conformal as dc
from darboux.manifolds.mesh import Mesh
from darboux.manifolds.spectral.delaunay import Round
from darboux.manifolds.spectral.operator import Sparse
from darboux.manifolds.spectral.solve import solver

_RIDGES = (0.0, 1e-12, 1e-9, 1e-6, 1e-3)


@dataclass(frozen=True, eq=False)
class Problem:
    """What is given; numbers are float64 on the CPU."""

    tri: dc.Triangles
    scheme: dc.Scheme
    hyperbolic: bool
    flips: bool
    turned: int  # flips that were made at the start
    datum: Tensor  # (edges,), with its graph
    start: Tensor  # (points,), with its graph
    goal: Tensor  # (points,), with its graph
    fixed: Tensor  # (points,), whether u stays as it is
    like: Tensor  # whose dtype and device the result follows
    keep: Tensor = field(init=False)  # the unknowns of the linear systems

    def __post_init__(self) -> None:
        keep = torch.nonzero(~self.fixed)[:, 0]
        object.__setattr__(self, "keep", keep[1:] if self.gauge else keep)

    @property
    def gauge(self) -> bool:
        """Whether adding a constant to u changes nothing."""
        return not self.hyperbolic and not bool(self.fixed.any())


class State(NamedTuple):
    """A metric of the class: ``rounds`` of flips lead to it from the triangles of the problem."""

    tri: dc.Triangles
    datum: Tensor
    rounds: list[Round]
    u: Tensor
    lengths: Tensor
    curvature: Tensor


def at(p: Problem, state: State, u: Tensor) -> State:
    """Return the state with another ``u``, flipped from the triangulation that was."""
    tri, datum, rounds = state.tri, state.datum, state.rounds
    if p.flips:
        tri, new = dc.flip(tri, _checks.values(datum), _checks.values(u))
        for step in new:
            datum = dc.ptolemy(datum, step)
        rounds = rounds + new
    lengths = p.scheme.length(datum, *u[tri.ends].unbind(-1))
    return State(tri, datum, rounds, u, lengths, dc.curvature(tri, lengths, p.hyperbolic))


def start_of(p: Problem) -> State:
    u = p.start.detach()
    return at(p, State(p.tri, p.datum.detach(), [], u, u, u), u)


def defect(p: Problem, state: State) -> Tensor:
    return torch.where(p.fixed, 0.0, state.curvature - p.goal.detach())


def residual_of(p: Problem, state: State) -> float:
    return float(defect(p, state).abs().max())


def jacobian(p: Problem, state: State) -> Sparse:
    return dc.jacobian(state.tri, p.scheme, state.datum.detach(), state.u.detach(), p.hyperbolic)


def inverse_of(p: Problem, state: State) -> Callable[[Tensor], Tensor]:
    """Return the solve with dK/du on the vertices that move, of mean zero under a gauge."""
    matrix = jacobian(p, state).restrict(p.keep)
    # broken triangles may leave the matrix singular: a ridge, no larger than needed
    diagonal = matrix.pattern.diagonal
    size = matrix.values[diagonal].abs().amax() + torch.finfo(torch.float64).tiny
    # cholespy prints where the matrix is singular
    method = "superlu" if len(dc.broken(state.tri, state.lengths)) else "auto"
    solve: Callable | None = None
    for ridge in _RIDGES:
        more = matrix.values.new_full((len(diagonal),), float(ridge * size))
        try:
            ridged = Sparse(matrix.pattern, matrix.values.index_add(0, diagonal, more))
            solve = solver(ridged, "uniformize", method)
            break
        except GeometryError:
            continue
    if solve is None:
        raise GeometryError("uniformize: dK/du is not positive definite")
    found = solve

    def inverse(r: Tensor) -> Tensor:
        if not p.gauge:
            return torch.zeros_like(r).index_add(0, p.keep, found(r[p.keep]))
        r = r - r.mean()
        x = torch.zeros_like(r).index_add(0, p.keep, found(r[p.keep]))
        return x - x.mean()

    return inverse


def spectral_radius(matrix: Sparse) -> float:
    """Return the largest eigenvalue, from below and to a few percent."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(matrix.shape[0], generator=generator, dtype=torch.float64)
    size = 0.0
    for _ in range(60):
        x = matrix @ (x / x.norm())
        size = float(x.norm())
        if size == 0.0:
            return 1e-300
    return size


# -- the door ---------------------------------------------------------------------------------


def problem(
    where: str, mesh: Mesh, target: str | Tensor | None, scheme: str, background: str | None,
    lengths: Tensor | None, flips: bool,
) -> Problem:  # fmt: skip
    if _checks.in_transform():
        raise TypeError(
            f"{where}: torch.func transforms and forward mode do not reach it; use torch.autograd"
        )
    if not isinstance(mesh, Mesh):
        raise TypeError(f"{where}: mesh is a {type(mesh).__name__}, expected a Mesh")
    if mesh.dim != 2:
        raise ValueError(f"{where}: cells of dimension {mesh.dim}, expected triangles")
    if mesh.components != 1:
        raise ValueError(f"{where}: the mesh has {mesh.components} components, expected one")
    if isinstance(target, str) and target not in ("flat", "hyperbolic"):
        raise ValueError(
            f"{where}: target is {target!r}, expected 'flat', 'hyperbolic', None or a tensor"
        )
    if background is None:
        background = "hyperbolic" if target == "hyperbolic" else "euclidean"
    if (scheme, background) not in dc.SCHEMES:
        raise ValueError(
            f"{where}: scheme is {scheme!r} and background {background!r}, expected one of "
            f"{sorted({s for s, _ in dc.SCHEMES})} and of {sorted({b for _, b in dc.SCHEMES})}"
        )
    flips = flips and scheme == "luo"
    if flips and not mesh.orientable:
        raise ValueError(f"{where}: the surface is not orientable; flips need one: flips=False")
    lengths = _lengths(where, mesh, lengths)
    like = lengths
    lengths = lengths.to("cpu", torch.float64)
    tri = dc.triangles_of(mesh.topology)
    short = dc.broken(tri, _checks.values(lengths)).tolist()
    if short:
        raise GeometryError(
            f"{where}: the lengths of {len(short)} triangles break the triangle inequality, among "
            f"them {short[:5]}"
        )
    hyperbolic = background == "hyperbolic"
    goal, fixed = _goal(where, mesh, target, hyperbolic)
    table, turned = dc.SCHEMES[scheme, background], 0
    if flips:
        tri, lengths, turned = dc.straighten(tri, mesh.topology, lengths)
    datum, start = table.data(lengths, tri)
    if table.negative and not float(_checks.values(start).max()) < -1e-12:
        raise ValueError(
            f"{where}: lengths go up to {float(_checks.values(lengths).max()):.6g}: circles in the "
            "hyperbolic plane take them as they are, expected less than about 50; scale them down"
        )
    return Problem(tri, table, hyperbolic, flips, turned, datum, start, goal, fixed, like.detach())


def _lengths(where: str, mesh: Mesh, lengths: Tensor | None) -> Tensor:
    if lengths is None:
        ends = mesh.vertices[mesh.edges]
        across = ends[:, 1] - ends[:, 0]
        return across.square().sum(-1).sqrt()
    _checks.check_tensor(where, "lengths", lengths)
    count = mesh.edges.shape[0]
    if lengths.shape != (count,):
        raise ValueError(f"{where}: lengths has shape {tuple(lengths.shape)}, expected ({count},)")
    _checks.check_finite(where, lengths=lengths)
    _checks.check_that(where, lambda: lengths > 0, "lengths holds numbers that are not positive")
    return lengths


def _goal(
    where: str, mesh: Mesh, target: str | Tensor | None, hyperbolic: bool
) -> tuple[Tensor, Tensor]:
    """Return the angle defects wanted and the vertices whose u is fixed."""
    n, chi = mesh.topology.points, mesh.euler_characteristic
    rim = mesh.topology.boundary.reshape(-1).cpu().unique()
    fixed = torch.zeros(n, dtype=torch.bool)
    total = 2 * math.pi * chi
    if isinstance(target, Tensor):
        _checks.check_tensor(where, "target", target)
        if target.shape != (n,):
            raise ValueError(f"{where}: target has shape {tuple(target.shape)}, expected ({n},)")
        _checks.check_finite(where, target=target)
        goal = target.to("cpu", torch.float64)
        seen = float(_checks.values(goal).sum())
        slack = 4 * torch.finfo(target.dtype).eps * (n + float(_checks.values(goal).abs().sum()))
        if hyperbolic and not seen > total:
            raise ValueError(
                f"{where}: target sums to {seen:.12g}, expected more than 2 pi chi = {total:.12g}: "
                "the area of hyperbolic triangles is the difference"
            )
        if not hyperbolic and abs(seen - total) > slack:
            raise ValueError(
                f"{where}: target sums to {seen:.12g}, expected 2 pi chi = {total:.12g} "
                "(Gauss-Bonnet)"
            )
        top = torch.full((n,), 2 * math.pi, dtype=torch.float64)
        top[rim] = math.pi
        _checks.check_that(
            where, lambda: goal < top, "target holds defects of 2 pi or more (pi on the rim)"
        )
        # what rounding left of the sum would never go away
        return goal if hyperbolic else goal - (goal.sum() - total) / n, fixed
    if rim.numel() and target != "flat":
        raise ValueError(
            f"{where}: the mesh has a boundary of {rim.numel()} vertices, expected a closed one "
            f"for target {target!r}; give 'flat' or a tensor"
        )
    if target == "hyperbolic" and not (hyperbolic and chi < 0):
        raise ValueError(
            f"{where}: target 'hyperbolic' with Euler characteristic {chi} in the "
            f"{'hyperbolic' if hyperbolic else 'euclidean'} background, expected a negative one in "
            "the hyperbolic"
        )
    if target == "flat":
        if hyperbolic or (chi != 0 and not rim.numel()):
            raise ValueError(
                f"{where}: target 'flat' sums to 0, expected 2 pi chi = {total:.12g} in the "
                "Euclidean background (Gauss-Bonnet)"
            )
        fixed[rim] = True
    if target is None and hyperbolic and chi >= 0:
        raise ValueError(
            f"{where}: no target in the hyperbolic background with Euler characteristic {chi}, "
            "expected defects that sum to more than 2 pi chi"
        )
    mean = total / n if target is None and not hyperbolic else 0.0
    return torch.full((n,), mean, dtype=torch.float64), fixed
