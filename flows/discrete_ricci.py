r"""The Ricci flow of triangle meshes, and the metric it ends in: discrete uniformisation.

.. math:: \dot u_i = \hat K_i - K_i, \qquad K_i = 2\pi - \sum \theta, \qquad
          \frac{\partial K_i}{\partial u_j} = L_{ij}

with one number u at each vertex, from which a scheme makes the edge lengths: vertex scaling
(``luo``), :math:`\ell_{ij} = e^{(u_i + u_j)/2}\ell^0_{ij}`, or circles of radius :math:`e^{u_i}`
(``tangential``, ``thurston``, ``inversive``). The defect is the gradient of a convex energy, so the
flow and Newton's method have one limit. In a hyperbolic background the triangles are hyperbolic.
Luo (2004), Commun. Contemp. Math. 6; Springborn, Schroeder and Pinkall (2008), ACM Trans.
Graph. 27; Chow and Luo (2003), J. Differential Geom. 63; Guo (2011), Trans. AMS 363.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from darboux import _checks
from darboux._checks import ConvergenceError, GeometryError
from darboux.flows import _discrete_conformal as dc, _discrete_problem as dp, _metric_march
from darboux.manifolds.mesh import Mesh

_HALVINGS = 40
_FARTHEST = 4.0  # the largest change of u in one step of Newton's method
_REFRESH = 20  # steps of the flow between two looks at its stability bound


class Uniformization(NamedTuple):
    """A metric of given curvature in the conformal class of a mesh.

    Edges are numbered as in the mesh; flips replace an edge under its number, so the triangles
    come with the result. With a glued mesh, vertices are points of the glued space.
    """

    u: Tensor  # (points,)
    lengths: Tensor  # (edges,)
    curvature: Tensor  # (points,), angle defects
    corners: Tensor  # (m, 3), the vertices of the triangles
    sides: Tensor  # (m, 3), the edge facing each corner
    background: str  # "euclidean" or "hyperbolic"
    residual: float  # the largest defect of curvature at a vertex that may change
    iterations: int
    flips: int
    status: str  # "converged", or "failed" in the state that an error carries


class DiscreteRicciRun(NamedTuple):
    """A Ricci flow of a mesh, saved states time first."""

    t: Tensor  # (time,)
    u: Tensor  # (time, points)
    curvature: Tensor  # (time, points), angle defects
    corners: Tensor  # (m, 3), the triangles at the end
    sides: Tensor  # (m, 3), the edge facing each corner


def uniformize(
    mesh: Mesh,
    target: str | Tensor | None = None,
    *,
    method: str = "newton",
    scheme: str = "luo",
    background: str | None = None,
    lengths: Tensor | None = None,
    flips: bool = True,
    tolerance: float = 1e-10,
    max_iterations: int | None = None,
) -> Uniformization:
    r"""Return the metric in the conformal class of ``mesh`` whose curvature is ``target``.

    ``target`` is ``None`` for the same :math:`2\pi\chi/n` at every vertex; ``"flat"``, zero: on a
    torus, or inside a rim that keeps its u; ``"hyperbolic"``, constant -1 on a closed surface of
    genus above one, by hyperbolic triangles without cone points; or angle defects ``(points,)``.
    The metric is that of the vertices, or given by ``lengths (edges,)`` in the order of
    ``mesh.edges``. In the hyperbolic background, vertex scaling is
    :math:`2\sinh(\ell/2) = e^{(u_i + u_j)/2}\ell^0`; circles have :math:`u = \log\tanh(r/2)` and
    take the lengths as hyperbolic ones.

    ``flips`` makes the triangulation Delaunay, first along geodesics and then, as u changes, by
    Ptolemy's relation, which vertex scaling alone allows: on a closed surface a solution then
    exists for every target below :math:`2\pi` of the right sum. In the Euclidean background the
    mean of u is that of the start, zero for vertex scaling.

    u, lengths and curvature have gradients in vertices or lengths and in a target tensor, of first
    and second order, by the implicit function theorem: sparse solves at the solution, not through
    the iterations; ``torch.func`` does not reach them. Computed in float64 on the CPU whatever the
    input, which the result follows.

    Raises ``ValueError`` for a target that no metric has (Gauss-Bonnet), ``ConvergenceError``
    whose ``trajectory`` is the last good :class:`Uniformization` where there is no solution.

    >>> from darboux.manifolds.mesh import torus_mesh
    >>> found = uniformize(torus_mesh(n=12, m=8), "flat")
    >>> bool(found.curvature.abs().max() < 1e-10), found.status
    (True, 'converged')
    """
    where = "uniformize"
    if method not in ("newton", "flow"):
        raise ValueError(f"{where}: method is {method!r}, expected 'newton' or 'flow'")
    if not tolerance > 0:
        raise ValueError(f"{where}: tolerance is {tolerance}, expected a positive number")
    limit = (100 if method == "newton" else 100_000) if max_iterations is None else max_iterations
    if not isinstance(limit, int) or limit < 1:
        raise ValueError(f"{where}: max_iterations is {limit}, expected a positive integer")
    p = dp.problem(where, mesh, target, scheme, background, lengths, flips)
    with torch.no_grad():
        march = _newton if method == "newton" else _descend
        state, good, iterations, why = march(p, dp.start_of(p), tolerance, limit)
        if why is None and state is not good:
            why = "there is no solution: the least energy is taken at broken triangles"
    if why is None:
        return _attached(p, state, iterations)
    residual = dp.residual_of(p, state)
    error = ConvergenceError(
        f"{where}: {why} after {iterations} iterations; the largest defect of curvature is "
        f"{residual:.2e}, expected {tolerance:.0e}{_blame(state)}; the error's trajectory is the "
        "last state without broken triangles",
        residual,
        iterations,
    )
    error.trajectory = _result(p, good, good.u, good.lengths, good.curvature, iterations, "failed")
    raise error


def discrete_ricci_flow(
    mesh: Mesh,
    target: str | Tensor | None = None,
    *,
    dt: float,
    steps: int,
    scheme: str = "luo",
    background: str | None = None,
    lengths: Tensor | None = None,
    flips: bool = True,
    save_every: int = 1,
) -> DiscreteRicciRun:
    r"""Flow :math:`\dot u = \hat K - K` by classical Runge-Kutta steps; see :func:`uniformize`.

    Differentiable through time in the vertices or lengths and in a target tensor, to any order.
    In the Euclidean background the sum of u and :math:`\sum K = 2\pi\chi` are kept to rounding.
    Raises ``ValueError`` if ``dt`` is unstable at the start, ``ConvergenceError`` with the
    trajectory so far if u ceases to be finite.

    >>> from darboux.manifolds.mesh import torus_mesh
    >>> run = discrete_ricci_flow(torus_mesh(n=12, m=8), "flat", dt=0.2, steps=20)
    >>> bool(run.curvature[-1].abs().max() < 0.1 * run.curvature[0].abs().max())
    True
    """
    where = "discrete_ricci_flow"
    _metric_march.check_run(where, dt, steps, save_every)
    p = dp.problem(where, mesh, target, scheme, background, lengths, flips)
    if _checks.checks_values():
        with torch.no_grad():
            first = dp.start_of(p)
            largest = dp.spectral_radius(dp.jacobian(p, first))
        _metric_march.check_stable(where, dt, _metric_march.RK4_REAL / largest)
    state = dp.State(p.tri, p.datum, [], p.start, p.start, p.start)
    moves = (~p.fixed).to(p.start)

    def slope(u: Tensor) -> Tensor:
        nonlocal state
        state = dp.at(p, state, u)
        return (p.goal - state.curvature) * moves

    def verdict(u: Tensor) -> str | None:
        if not bool(u.isfinite().all()):
            return "u is no longer finite"
        return "a circle became infinite" if p.scheme.negative and float(u.max()) >= 0 else None

    t, u, word = _metric_march.march(
        lambda u: _metric_march.rk4(slope, u, dt), p.start, dt, steps, save_every, verdict
    )
    found = []
    for saved in u.unbind():
        state = dp.at(p, state, saved)
        found.append(state.curvature)
    tri, like = state.tri, p.like
    run = DiscreteRicciRun(
        t.to(like), u.to(like), torch.stack(found).to(like),
        tri.corner.to(like.device), tri.side.to(like.device),
    )  # fmt: skip
    if word is not None:
        raise _metric_march.stopped(where, word, run)
    return run


# -- the two ways to the solution -------------------------------------------------------------


# the last state, the last one without broken triangles, the steps made, and why they ended badly
_Ending = tuple[dp.State, dp.State, int, str | None]


def _better(state: dp.State, good: dp.State) -> dp.State:
    """Return ``state`` unless triangles of it are broken, then ``good``."""
    return good if len(dc.broken(state.tri, state.lengths)) else state


def _newton(p: dp.Problem, state: dp.State, tolerance: float, limit: int) -> _Ending:
    """Minimise the convex energy; a step is shortened until the energy falls along it."""
    good = state
    for k in range(limit):
        r = dp.defect(p, state)
        if float(r.abs().max()) <= tolerance:
            state = _polished(p, state)
            return state, _better(state, good), k, None
        try:
            step = -dp.inverse_of(p, state)(r)
        except GeometryError:
            return state, good, k, "dK/du became singular"
        step = step * min(1.0, _FARTHEST / float(step.abs().max()))
        norm, fraction = float(r.norm()), 1.0
        for _ in range(_HALVINGS):
            u = state.u + fraction * step
            if not (p.scheme.negative and float(u.max()) >= 0):
                trial = dp.at(p, state, u)
                new = dp.defect(p, trial)
                # the defect is the gradient: still downhill at the end of the step, or smaller
                if bool(new.isfinite().all()) and (
                    float(new.norm()) < norm or float(new @ step) <= 0
                ):
                    break
            fraction /= 2
        else:
            return state, good, k, "no step along Newton's direction lowers the energy"
        state, good = trial, _better(trial, good)
    done = dp.residual_of(p, state) <= tolerance
    return state, good, limit, None if done else "no convergence"


def _polished(p: dp.Problem, state: dp.State) -> dp.State:
    """Take one more Newton step, to rounding, unless it makes things worse."""
    trial = dp.at(p, state, state.u - dp.inverse_of(p, state)(dp.defect(p, state)))
    return trial if dp.residual_of(p, trial) < dp.residual_of(p, state) else state


def _descend(p: dp.Problem, state: dp.State, tolerance: float, limit: int) -> _Ending:
    """Follow the flow by Euler steps of nearly the largest stable size."""
    dt, good = 0.0, state
    for k in range(limit):
        r = dp.defect(p, state)
        if float(r.abs().max()) <= tolerance:
            return state, _better(state, good), k, None
        if k % _REFRESH == 0:
            # a little less than the bound 2 / lambda, as lambda may grow until the next look
            dt, good = 1.8 / dp.spectral_radius(dp.jacobian(p, state)), _better(state, good)
        u = state.u - dt * r
        if p.scheme.negative and float(u.max()) >= 0:
            return state, good, k, "a circle became infinite"
        trial = dp.at(p, state, u)
        if not bool(trial.curvature.isfinite().all()):
            return state, good, k, "the curvature is no longer finite"
        state = trial
    done = dp.residual_of(p, state) <= tolerance
    return state, _better(state, good), limit, None if done else "no convergence"


# -- the result -------------------------------------------------------------------------------


def _attached(p: dp.Problem, state: dp.State, iterations: int) -> Uniformization:
    """Return the solution with its derivatives: chord steps from the numbers that solve it."""
    u, lengths, found = state.u, state.lengths, state.curvature
    sources = (p.datum, p.start, p.goal)
    if torch.is_grad_enabled() and any(x.requires_grad for x in sources):
        datum = p.datum
        for step in state.rounds:
            datum = dc.ptolemy(datum, step)
        with torch.no_grad():
            inverse = dp.inverse_of(p, state)
        u = u + torch.where(p.fixed, p.start - p.start.detach(), 0.0)
        # every step makes one more order of derivatives exact
        for _ in range(_checks.corrections()):
            lengths = p.scheme.length(datum, *u[state.tri.ends].unbind(-1))
            found = dc.curvature(state.tri, lengths, p.hyperbolic)
            u = u - inverse(torch.where(p.fixed, 0.0, found - p.goal))
        if p.gauge:
            u = u + p.start.mean() - u.mean()
        lengths = p.scheme.length(datum, *u[state.tri.ends].unbind(-1))
        found = dc.curvature(state.tri, lengths, p.hyperbolic)
    return _result(p, state, u, lengths, found, iterations, "converged")


def _result(
    p: dp.Problem, state: dp.State, u: Tensor, lengths: Tensor, found: Tensor, iterations: int,
    status: str,
) -> Uniformization:  # fmt: skip
    like, device = p.like, p.like.device
    return Uniformization(
        u.to(like), lengths.to(like), found.to(like), state.tri.corner.to(device),
        state.tri.side.to(device), "hyperbolic" if p.hyperbolic else "euclidean",
        dp.residual_of(p, state), iterations,
        p.turned + sum(len(step[0]) for step in state.rounds), status,
    )  # fmt: skip


def _blame(state: dp.State) -> str:
    bad = dc.broken(state.tri, state.lengths).tolist()
    if bad:
        return f"; {len(bad)} triangles break the triangle inequality, among them {bad[:5]}"
    u = state.u
    low = torch.nonzero(u < u.median() - 12)[:, 0].tolist()
    if low:
        return f"; vertices {low[:5]} shrink away: no metric of the class has these angles there"
    return ""
