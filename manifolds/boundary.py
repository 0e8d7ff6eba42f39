r"""The geodesic between two points of a chart: a boundary value problem, solved by collocation.

Write the curve by its second derivative :math:`s = \ddot c` on [0, 1],

.. math:: c(t) = x + t\,v_0 + \int_0^t (t-\tau)\,s(\tau)\,d\tau, \qquad
          v_0 = y - x - \int_0^1 (1-\tau)\,s(\tau)\,d\tau,

so that both ends are met by construction, and ask :math:`s = -\Gamma(\dot c, \dot c)` at K Gauss
points. This second-kind equation is well conditioned in any precision (no differentiation
matrix occurs), converges spectrally in K, and its initial velocity superconverges. It is
solved by damped Newton steps for the whole batch at once, from the straight line, or from
shorter geodesics of the same pair where that fails.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.polynomial import legendre
from torch import Tensor

from darboux._autodiff import jacobian
from darboux._checks import corrections, in_transform, values

Acceleration = Callable[[Tensor, Tensor], Tensor]

NODES = (16, 32, 64)
_ITERATIONS = 30
_PATIENCE = 5  # iterations in which a pair must halve its defect to be worth going on
_DAMPINGS = 5
# Expansions whose last coefficients are larger than this are not solutions.
_RESOLVED = 1e-2


class Curve(NamedTuple):
    """A collocated curve: node values lead, ``(K, ..., d)``."""

    velocity: Tensor  # (..., d), initial
    point: Tensor
    tangent: Tensor
    second: Tensor
    residual: Tensor  # (...), defect of the geodesic equation relative to the speed squared
    converged: Tensor  # (...)
    index_free: Tensor  # (...), the second variation is positive: no conjugate point
    unique: Tensor  # (...), index_free, and no other geodesic of the same length was met


@lru_cache
def _nodes(k: int) -> dict[str, np.ndarray]:
    roots, weights = legendre.leggauss(k)
    t, b = (roots + 1) / 2, weights / 2
    # Legendre coefficients of the interpolant: exact because Gauss quadrature is.
    to_coefficients = (2 * np.arange(k) + 1)[:, None] * legendre.legvander(roots, k - 1).T * b
    once, twice = np.zeros((2, k, k))
    for j in range(k):
        unit = np.eye(k)[j]
        # the variable runs over [-1, 1], twice as long as [0, 1]
        once[:, j] = legendre.legval(roots, legendre.legint(unit, 1, lbnd=-1)) / 2
        twice[:, j] = legendre.legval(roots, legendre.legint(unit, 2, lbnd=-1)) / 4
    moment = b * (1 - t)
    integral, double = once @ to_coefficients, twice @ to_coefficients
    return {
        "t": t,
        "b": b,
        "tangent": integral - moment,  # c' = y - x + tangent @ s
        "point": double - t[:, None] * moment,  # c = x + t (y - x) + point @ s
        "moment": moment,
        "tail": to_coefficients[-2:],
    }


class Problem(NamedTuple):
    """What the solver asks of a chart."""

    acceleration: Acceleration  # (x, v) -> -Gamma(v, v)
    metric: Callable[[Tensor], Tensor]
    inside: Callable[[Tensor], Tensor]  # where a point is in the chart
    # (x, y) (n, d) -> a discrete geodesic (time, n, d) to start from where Newton's method from
    # the straight line fails; lengthening shorter geodesics is tried instead where there is none
    path: Callable[[Tensor, Tensor], Tensor] | None = None


def connect(problem: Problem, x: Tensor, y: Tensor, *, persistent: bool = True) -> Curve:
    """Solve for the geodesic from ``x`` to ``y``, both ``(..., d)``.

    Pairs that cannot be solved come back with ``converged`` false; ``persistent=False`` gives up
    on them sooner. Differentiable in ``x``, ``y`` and whatever the acceleration depends on, by
    the implicit function theorem: the solution is found on detached numbers and then corrected
    by chord steps with the Newton matrix there, which is exact for derivatives up to third order,
    and for those of any order that nested ``torch.func`` transforms take.
    """
    batch, d = x.shape[:-1], x.shape[-1]
    x, y = x.reshape(-1, d), y.reshape(-1, d)
    acceleration = problem.acceleration
    with torch.no_grad():
        x0, y0 = x.detach(), y.detach()
        second, converged, k = _solve(problem, x0, y0, persistent)
        matrix, form = _linearise(problem, second, x0, y0, k)
        index_free = _is_positive(form)
        unique = index_free & converged
        if persistent and not in_transform() and (converged & ~index_free).any():
            second, tied = _descend(problem, second, form, converged & ~index_free, x0, y0, k)
            second, converged, k = _resolve(problem, second, converged, x0, y0, k)
            matrix, form = _linearise(problem, second, x0, y0, k)
            index_free = _is_positive(form)
            unique = index_free & converged & ~tied
        p, v, _ = _curve(second, x0, y0, k)
        defect = (acceleration(p, v) - second).abs().amax(-1).amax(0)
        residual = defect / _scale(x0, y0).square()
    point, tangent, velocity = _curve(second, x, y, k)
    step = acceleration(point, tangent) - second
    if in_transform() or step.requires_grad:  # somebody asks for derivatives
        inverse = torch.linalg.inv_ex(matrix)[0]
        for _ in range(corrections()):
            second = second + _apply(inverse, step)
            point, tangent, velocity = _curve(second, x, y, k)
            step = acceleration(point, tangent) - second
    return Curve(
        velocity.reshape(*batch, d),
        *(z.reshape(k, *batch, d) for z in (point, tangent, second)),
        *(z.reshape(batch) for z in (residual, converged, index_free, unique)),
    )


def _constant(k: int, name: str, like: Tensor) -> Tensor:
    return torch.as_tensor(_nodes(k)[name], dtype=like.dtype, device=like.device)


def _mix(matrix: Tensor, nodal: Tensor) -> Tensor:
    # (m, K) times (K, ..., d)
    return (matrix @ nodal.flatten(1)).unflatten(1, nodal.shape[1:])


def _curve(second: Tensor, x: Tensor, y: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    t = _constant(k, "t", x).reshape(k, *[1] * x.dim())
    chord = y - x
    point = x + t * chord + _mix(_constant(k, "point", x), second)
    tangent = chord + _mix(_constant(k, "tangent", x), second)
    velocity = chord - _mix(_constant(k, "moment", x)[None], second)[0]
    return point, tangent, velocity


def _scale(x: Tensor, y: Tensor) -> Tensor:
    gap = (y - x).abs().amax(-1)
    return torch.where(gap > 0, gap, 1.0)


def _jacobians(acceleration: Acceleration, point: Tensor, tangent: Tensor) -> Tensor:
    d = point.shape[-1]
    packed = torch.cat([point, tangent], -1)
    return jacobian(lambda z: acceleration(z[..., :d], z[..., d:]), packed)[1]


def _newton_matrix(jac: Tensor, k: int) -> Tensor:
    # I - A P - B T with A = da/dx, B = da/dv at the nodes: (..., K d, K d)
    d = jac.shape[-2]
    a, b = (jac[..., :d], jac[..., d:])
    point, tangent = _constant(k, "point", jac), _constant(k, "tangent", jac)
    m = torch.einsum("ij,i...kl->...ikjl", point, a) + torch.einsum(
        "ij,i...kl->...ikjl", tangent, b
    )
    m = m.flatten(-4, -3).flatten(-2)
    return torch.eye(k * d, dtype=jac.dtype, device=jac.device) - m


def _apply(inverse: Tensor, nodal: Tensor) -> Tensor:
    # (..., K d, K d) times (K, ..., d)
    k, d = nodal.shape[0], nodal.shape[-1]
    column = nodal.movedim(0, -2).flatten(-2).unsqueeze(-1)
    return (inverse @ column).squeeze(-1).unflatten(-1, (k, d)).movedim(-2, 0)


def _solve(problem: Problem, x: Tensor, y: Tensor, persistent: bool) -> tuple[Tensor, Tensor, int]:
    tol = _tolerance(x)
    newton = partial(_newton, problem.acceleration, problem.inside, tol=tol)
    k = NODES[0]
    second, converged = newton(torch.zeros(k, *x.shape, dtype=x.dtype, device=x.device), x, y, k)
    if problem.path is not None and persistent and not in_transform():
        easy = converged & (_tail(second, x, y, k) <= 10 * tol**0.5)
        easy = easy & _is_positive(_linearise(problem, second, x, y, k)[1])
        if not easy.all():
            second, k = _refine(second, k, NODES[-1]), NODES[-1]
            start = partial(_from_path, problem.path, newton)
            second, converged = _on_rest(start, second, easy, x, y, k)
            second, settled = newton(second, x, y, k)
            converged = settled & (converged | easy)
    elif persistent and not values(converged).all():
        second, converged = _on_rest(partial(_continue, newton), second, converged, x, y, k)
    return _resolve(problem, second, converged, x, y, k)


def _resolve(
    problem: Problem, second: Tensor, converged: Tensor, x: Tensor, y: Tensor, k: int
) -> tuple[Tensor, Tensor, int]:
    """Take more nodes until the expansion of the solution dies out."""
    tol = _tolerance(x)
    # A tail this small leaves v_0 converged to round-off: it is second order.
    smooth = 10 * tol**0.5
    for finer in NODES[NODES.index(k) + 1 :]:
        rough = _roughness(problem, second, x, y, k)
        if not values(converged & (rough > smooth)).any():
            return second, converged, k
        second, k = _refine(second, k, finer), finer
        second, refined = _newton(problem.acceleration, problem.inside, second, x, y, k, tol)
        converged = converged & refined
    # Solved at the nodes is not solved between them.
    rough = _roughness(problem, second, x, y, k)
    return second, converged & (rough <= max(_RESOLVED, smooth)), k


def _roughness(problem: Problem, second: Tensor, x: Tensor, y: Tensor, k: int) -> Tensor:
    """Return what the solution leaves unresolved, relative to the speed squared.

    The last coefficients of its expansion, and the defect at points between the nodes, where a
    narrow feature of the metric may hide.
    """
    between = k + 5
    s = _refine(second, k, between)
    point, tangent, _ = _curve(s, x, y, between)
    defect = (problem.acceleration(point, tangent) - s).abs().amax(-1).amax(0)
    return torch.maximum(_tail(second, x, y, k), defect / _scale(x, y).square() / 10)


def _tolerance(x: Tensor) -> float:
    return max(1e-11, 200 * torch.finfo(x.dtype).eps)


def _tail(second: Tensor, x: Tensor, y: Tensor, k: int) -> Tensor:
    # size of the last coefficients of the expansion, relative to the speed squared
    tail = _mix(_constant(k, "tail", x), second).abs().amax(-1).amax(0)
    return tail / _scale(x, y).square()


def _linearise(
    problem: Problem, second: Tensor, x: Tensor, y: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Return the Newton matrix at a curve and the form of the second variation there."""
    point, tangent, _ = _curve(second, x, y, k)
    matrix = _newton_matrix(_jacobians(problem.acceleration, point, tangent), k)
    return matrix, _second_variation(problem.metric(point), matrix, k)


def _descend(
    problem: Problem, second: Tensor, form: Tensor, saddle: Tensor, x: Tensor, y: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Leave geodesics past a conjugate point, in the direction that shortens them most.

    Returns the curves, and where another geodesic of the same length was met on the way.
    """
    rest = saddle.nonzero().squeeze(-1)
    x, y, here = x[rest], y[rest], second[:, rest]
    mode = torch.linalg.eigh(form[rest])[1][..., 0].unflatten(-1, (k, -1)).movedim(-2, 0)
    reach = _mix(_constant(k, "point", x), mode).abs().amax((0, -1))
    mode = mode * (_scale(x, y) / reach)[..., None]
    g = problem.metric(x)

    def square(s: Tensor) -> Tensor:
        v = _curve(s, x, y, k)[2]
        return torch.einsum("...i,...ij,...j->...", v, g, v)

    best, shortest = here, torch.full_like(x[:, 0], torch.inf)
    tied = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    tol = _tolerance(x)
    for push in (0.3, -0.3, 0.8, -0.8):
        trial, ok = _newton(problem.acceleration, problem.inside, here + push * mode, x, y, k, tol)
        ok = ok & _is_positive(_linearise(problem, trial, x, y, k)[1])
        ok = ok & (_tail(trial, x, y, k) <= _RESOLVED)
        length = torch.where(ok, square(trial), torch.inf)
        apart = (trial - best).abs().amax((0, -1)) > 1e-6 * _scale(x, y).square()
        equal = ok & shortest.isfinite() & ((length - shortest).abs() <= 1e-8 * length)
        shorter = length < shortest * (1 - 1e-8)
        tied = (tied & ~shorter) | (equal & apart)
        best = torch.where(shorter[:, None], trial, best)
        shortest = torch.where(shorter, length, shortest)
    every = torch.zeros_like(saddle).index_copy(0, rest, tied)
    return second.index_copy(1, rest, best), every


def _from_path(
    path: Callable[[Tensor, Tensor], Tensor],
    newton: Callable[..., tuple[Tensor, Tensor]],
    second: Tensor,
    x: Tensor,
    y: Tensor,
    k: int,
) -> tuple[Tensor, Tensor]:
    return newton(_fit(path(x, y), k), x, y, k)


def _fit(path: Tensor, k: int, degree: int = 24) -> Tensor:
    """Fit a polynomial to a path ``(time, ..., d)``; return its second derivative at k nodes."""
    t = np.linspace(0, 1, len(path))
    columns = []
    for unit in np.eye(degree):  # integrated twice, and made to vanish at both ends
        twice = legendre.legint(unit, 2, lbnd=-1)
        columns.append((legendre.legval(2 * t - 1, twice) - t * legendre.legval(1.0, twice)) / 4)
    to_nodes = legendre.legvander(legendre.leggauss(k)[0], degree - 1)
    fit = to_nodes @ np.linalg.pinv(np.stack(columns, 1))
    straight = torch.linspace(0, 1, len(path), dtype=path.dtype, device=path.device)
    chord = straight.reshape(-1, *[1] * (path.dim() - 1)) * (path[-1] - path[0])
    fit = torch.as_tensor(fit, dtype=path.dtype, device=path.device)
    return torch.tensordot(fit, path - path[0] - chord, 1)


def _on_rest(
    solver: Callable[..., tuple[Tensor, Tensor]],
    second: Tensor,
    converged: Tensor,
    x: Tensor,
    y: Tensor,
    k: int,
) -> tuple[Tensor, Tensor]:
    """Apply ``solver(second, x, y, k)`` to the pairs that have not converged."""
    if in_transform():  # which ones cannot be picked out there: solve all again
        other, reached = solver(second, x, y, k)
        return torch.where(converged[:, None], second, other), converged | reached
    rest = (~converged).nonzero().squeeze(-1)
    other, reached = solver(second[:, rest], x[rest], y[rest], k)
    return second.index_copy(1, rest, other), converged.index_copy(0, rest, reached)


def _refine(second: Tensor, k: int, finer: int) -> Tensor:
    roots = 2 * _nodes(k)["t"] - 1
    fine = 2 * _nodes(finer)["t"] - 1
    matrix = legendre.legvander(fine, k - 1) @ np.linalg.inv(legendre.legvander(roots, k - 1))
    return _mix(torch.as_tensor(matrix, dtype=second.dtype, device=second.device), second)


def _newton(
    acceleration: Acceleration,
    inside: Callable[[Tensor], Tensor],
    second: Tensor,
    x: Tensor,
    y: Tensor,
    k: int,
    tol: float,
    iterations: int = _ITERATIONS,
) -> tuple[Tensor, Tensor]:
    scale = _scale(x, y).square()

    def defect(s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        point, tangent, _ = _curve(s, x, y, k)
        r = acceleration(point, tangent) - s
        size = r.abs().amax(-1).amax(0) / scale
        ok = size.isfinite() & inside(point).all(0)
        return r, torch.where(ok, size, torch.inf), point, tangent

    r, size, point, tangent = defect(second)
    inverse, rate, before = second, 1.0, size
    for i in range(iterations):
        if not values(size > tol).any():
            break
        if i % _PATIENCE == _PATIENCE - 1:
            moving = (size > tol) & (size < 0.5 * before)
            if not values(moving).any():
                break
            before = size
            if not in_transform() and float((size > tol).float().mean()) < 0.5:
                # the few that are left go on alone
                rest = partial(_newton, acceleration, inside, tol=tol, iterations=iterations - i)
                return _on_rest(rest, second, size <= tol, x, y, k)
        fresh = rate > 0.1  # a matrix that still contracts fast is kept
        if fresh:
            jac = _jacobians(acceleration, point, tangent)
            inverse = torch.linalg.inv_ex(_newton_matrix(jac, k))[0].nan_to_num()
        step = _apply(inverse, r)
        damping = torch.ones_like(size)
        trial, new = second, (r, size, point, tangent)
        for _ in range(_DAMPINGS):
            trial = second + damping[..., None] * step
            new = defect(trial)
            # At round-off level a good step need not decrease any more.
            worse = ~(new[1] < (1 - 0.25 * damping) * size) & ~(new[1] <= tol)
            if not values(worse).any():
                break
            damping = torch.where(worse, damping / 4, damping)
        keep = new[1].isfinite() & ((new[1] <= size) | (new[1] <= tol))
        ratio = torch.where(keep, torch.where(size > tol, new[1] / size, 0.0), 1.0)
        rate = float(values(ratio).max()) if ratio.numel() else 0.0
        m = keep[..., None]
        second, r = torch.where(m, trial, second), torch.where(m, new[0], r)
        point, tangent = torch.where(m, new[2], point), torch.where(m, new[3], tangent)
        size = torch.where(keep, new[1], size)
        if fresh and not values(keep).any():
            break
    return second, size <= tol


def _continue(
    newton: Callable[..., tuple[Tensor, Tensor]],
    second: Tensor,
    x: Tensor,
    y: Tensor,
    k: int,
    stages: int = 8,
) -> tuple[Tensor, Tensor]:
    # Lengthen a short geodesic towards y; a geodesic stretched by r has r^2 times the second
    # derivative.
    s = torch.zeros_like(second)
    converged = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for i in range(1, stages + 1):
        target = x + (i / stages) * (y - x)
        s, converged = newton(s * (i / max(i - 1, 1)) ** 2, x, target, k)
    return s, converged


def _second_variation(g: Tensor, matrix: Tensor, k: int) -> Tensor:
    # The index form of the energy on fields V = P w that vanish at both ends, w the nodal second
    # derivatives: I(V, V) = -int <V, V'' - A V - B V'>. Positive definite iff no conjugate point.
    d = g.shape[-1]
    weighted = g * _constant(k, "b", g).reshape(k, *[1] * (g.dim() - 1))
    operator = matrix.unflatten(-2, (k, d)).unflatten(-1, (k, d))
    form = -torch.einsum("ip,i...km,...imjl->...pkjl", _constant(k, "point", g), weighted, operator)
    form = form.flatten(-4, -3).flatten(-2)
    form = form + form.mT
    return form / form.diagonal(dim1=-2, dim2=-1).abs().amax(-1)[..., None, None]


def _is_positive(form: Tensor) -> Tensor:
    # High modes are integrated twice: their eigenvalues decay, so allow for round-off.
    shift = 100 * torch.finfo(form.dtype).eps
    eye = torch.eye(form.shape[-1], dtype=form.dtype, device=form.device)
    return torch.linalg.cholesky_ex((form + shift * eye).nan_to_num())[1] == 0
