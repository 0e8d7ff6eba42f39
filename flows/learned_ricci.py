r"""Ricci-like flows with a learned source, positive definite for any network and any step.

.. math:: \partial_t g = -2\,\mathrm{Ric}(g) + T(x, g), \qquad
          T = gE + E^Tg + \sum_a \xi_a\xi_a^T - g\Bigl(\sum_b v_bv_b^T\Bigr)g

An arbitrary symmetric source drives the *exact* flow out of the cone of positive matrices, so the
source is typed. The congruence part gE + E^Tg keeps the cone; production by covectors
:math:`\xi_a` (the stress-energy of dust) adds what is positive; destruction by vectors
:math:`v_b` is solved implicitly: :math:`\partial_t g = -gQg` is :math:`\partial_t g^{-1} = Q`.
All three are tensors, so that the flow commutes with changes of coordinates.

A step is a Strang splitting. Production and destruction are Patankar steps, exact for frozen
fields. Curvature and congruence move the Cholesky factor with logarithmic diagonal by a
Runge-Kutta method: g = LL^T and :math:`\dot L = L\,\Phi(L^{-1}SL^{-T})` with :math:`\Phi` the
lower triangle, its diagonal halved. No eigenvectors occur, so that gradients are finite at equal
eigenvalues. Lin, SIAM J. Matrix Anal. Appl. 40 (2019) 1353 (the log-Cholesky coordinates);
Burchard, Deleersnijder and Meister (2003) (Patankar).
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from darboux import _checks
from darboux._checks import checks_values, values
from darboux.flows import _metric_march, ricci_grid
from darboux.flows.ricci_grid import PeriodicGrid
from darboux.manifolds.connection import Metric
from darboux.manifolds.curvature import ricci
from darboux.manifolds.linalg import is_positive


class SourceTerms(NamedTuple):
    """The parts of a typed source at points ``(...)``; any of them may be None."""

    generator: Tensor | None = None  # E (..., d, d), mixed: E^k_j
    production: Tensor | None = None  # covectors xi (..., m, d)
    destruction: Tensor | None = None  # vectors v (..., m, d)


Source = Callable[[Tensor, Tensor], SourceTerms]  # x (..., d), g (..., d, d)
Rate = Callable[[Tensor], Tensor]  # g -> dg/dt, symmetric


class LearnedRun(NamedTuple):
    """A learned flow, saved states time first."""

    t: Tensor  # (time,)
    g: Tensor  # (time, ..., d, d)
    status: str  # "done", or "limited" if some step was longer than the flow could follow
    excess: float  # the largest change of log g asked of one step, over what a step may make


def source_rate(terms: SourceTerms, g: Tensor) -> Tensor:
    """Return T ``(..., d, d)`` of the terms of a source at ``g``."""
    rate = torch.zeros_like(g)
    if terms.generator is not None:
        moved = g @ terms.generator
        rate = rate + moved + moved.mT
    if terms.production is not None:
        rate = rate + terms.production.mT @ terms.production
    if terms.destruction is not None:
        lowered = terms.destruction @ g
        rate = rate - lowered.mT @ lowered
    return rate


# -- sources -------------------------------------------------------------------------------


class TypedSource(nn.Module):
    r"""A network for all parts of a typed source, of the point and of the metric there.

    The generator is :math:`E = L^{-T}AL^T` with A symmetric and :math:`\|A\|_F` below ``bound``,
    so that whatever the network says, the congruence part changes log g at most at the rate
    2 ``bound``. Production and destruction have ``production`` and ``destruction`` vectors. The
    metric enters by its log-Cholesky coordinates.
    """

    def __init__(
        self,
        dim: int,
        width: int = 32,
        depth: int = 2,
        *,
        production: int = 1,
        destruction: int = 1,
        bound: float = 1.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        where = "TypedSource"
        for name, value in (("dim", dim), ("width", width), ("depth", depth)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{where}: {name} is {value}, expected a positive integer")
        for name, value in (("production", production), ("destruction", destruction)):
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{where}: {name} is {value}, expected an integer not below 0")
        if not (bound >= 0 and math.isfinite(bound)):
            raise ValueError(f"{where}: bound is {bound}, expected a number not below 0")
        self.dim, self.bound = dim, float(bound)
        self.sizes = (dim * dim, production * dim, destruction * dim)
        sizes = [dim + dim * (dim + 1) // 2, *[width] * depth, sum(self.sizes)]
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(sizes):
            layer = nn.Linear(fan_in, fan_out, dtype=dtype, device=device)
            with torch.no_grad():
                layer.weight.normal_(0, fan_in**-0.5, generator=generator)
                layer.bias.zero_()
            layers += [layer, nn.Tanh()]
        self.network = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor, g: Tensor) -> SourceTerms:
        """Return the terms at ``x (..., d)`` and ``g (..., d, d)``."""
        factor = log_cholesky(g)
        i, j = torch.tril_indices(self.dim, self.dim, device=g.device)
        features = factor[..., i, j]
        batch = torch.broadcast_shapes(x.shape[:-1], features.shape[:-1])
        both = x.expand(*batch, -1), features.expand(*batch, -1)
        out = self.network(torch.cat(both, -1))
        raw, made, lost = out.split(self.sizes, -1)
        raw = raw.unflatten(-1, (self.dim, self.dim))
        raw = (raw + raw.mT) / 2
        size = raw.square().sum((-1, -2), keepdim=True)
        raw = self.bound * raw * (1 + size).rsqrt()
        low = _factor(factor)
        # L^{-T} A L^T, by a triangular solve
        generator = torch.linalg.solve_triangular(low.mT, raw @ low.mT, upper=True)
        return SourceTerms(
            generator,
            made.unflatten(-1, (-1, self.dim)) if self.sizes[1] else None,
            lost.unflatten(-1, (-1, self.dim)) if self.sizes[2] else None,
        )


def token_stress(
    x: Tensor, tokens: Tensor, covectors: Tensor, bandwidth: float | Tensor
) -> SourceTerms:
    r"""Return the stress-energy at ``x (..., d)`` of tokens that carry covectors.

    .. math:: T(x) = \sum_a e^{-|x - x_a|^2/2h^2}\,\xi_a\xi_a^T

    ``tokens`` and ``covectors (m, d)``; weight a token by the length of its covector. Pure
    production: :math:`\xi_a` transforms as a covector.
    """
    where = "token_stress"
    _checks.check_tensor(where, "x", x)
    _checks.check_last(where, "tokens", tokens, x.shape[-1])
    _checks.check_like(where, "covectors", covectors, "tokens", tokens)
    if checks_values() and not bool((values(torch.as_tensor(bandwidth)) > 0).all()):
        raise ValueError(f"{where}: bandwidth is {bandwidth}, expected a positive number")
    squares = (x.unsqueeze(-2) - tokens).square().sum(-1)
    # exp of large negatives is slow, and zero all the same
    weight = torch.exp((-squares / (4 * bandwidth**2)).clamp_min(-80.0))  # a square root
    return SourceTerms(production=weight[..., None] * covectors)


# -- log-Cholesky coordinates --------------------------------------------------------------


def log_cholesky(g: Tensor) -> Tensor:
    """Return the Cholesky factor of ``g (..., d, d)`` with the logarithm of its diagonal."""
    low = _cholesky(g)
    diagonal = low.diagonal(dim1=-2, dim2=-1)
    return low.tril(-1) + torch.diag_embed(diagonal.log())


def from_log_cholesky(y: Tensor) -> Tensor:
    """Return g of its log-Cholesky coordinates ``y (..., d, d)``, lower triangular."""
    low = _factor(y)
    return low @ low.mT


def _factor(y: Tensor) -> Tensor:
    return y.tril(-1) + torch.diag_embed(y.diagonal(dim1=-2, dim2=-1).exp())


def _cholesky(g: Tensor) -> Tensor:
    d = g.shape[-1]
    if d > 3:
        return torch.linalg.cholesky_ex(g)[0]
    # Up to three dimensions written out: several times cheaper than a batched LAPACK call.
    low: list[list[Tensor]] = []
    zero = torch.zeros_like(g[..., 0, 0])
    for i in range(d):
        row: list[Tensor] = []
        for j in range(i + 1):
            rest = g[..., i, j]
            for k in range(j):
                rest = rest - row[k] * (low[j][k] if j < i else row[k])
            row.append(rest / low[j][j] if j < i else rest.sqrt())
        low.append(row)
    return torch.stack([torch.stack(r + [zero] * (d - len(r)), -1) for r in low], -2)


def _slope(y: Tensor, rate: Tensor, h: float, limit: float) -> tuple[Tensor, Tensor]:
    # The rate of the coordinates, and by what it exceeds the limit in a step of h.
    low = _factor(y)
    half = torch.linalg.solve_triangular(low, rate, upper=False)
    w = torch.linalg.solve_triangular(low, half.mT, upper=False)  # L^-1 S L^-T
    # the size of W, whose square root has no derivative at 0: asked only where it is large
    with torch.no_grad():
        excess = h / limit * torch.linalg.matrix_norm(w, keepdim=True)
        large = excess > 1
    size = torch.where(large, w, 1.0).square().sum((-1, -2), keepdim=True).sqrt()
    w = torch.where(large, w * (limit / (h * size)), w)
    diagonal = w.diagonal(dim1=-2, dim2=-1) / 2
    below = low @ (w.tril(-1) + torch.diag_embed(diagonal))
    return below.tril(-1) + torch.diag_embed(diagonal), excess


def _runge_kutta(
    g: Tensor, rate: Rate, h: float, order: int, limit: float
) -> tuple[Tensor, Tensor]:
    y = log_cholesky(g)

    def field(y: Tensor) -> tuple[Tensor, Tensor]:
        return _slope(y, rate(from_log_cholesky(y)), h, limit)

    a, first = field(y)
    if order == 1:
        return from_log_cholesky(y + h * a), first
    b, second = field(y + h / 2 * a)
    if order == 2:
        return from_log_cholesky(y + h * b), torch.maximum(first, second)
    c, third = field(y + h / 2 * b)
    d, fourth = field(y + h * c)
    excess = torch.stack([first, second, third, fourth]).amax(0)
    return from_log_cholesky(y + h / 6 * (a + 2 * (b + c) + d)), excess


# -- Patankar steps ------------------------------------------------------------------------


def _produce(g: Tensor, xi: Tensor, h: float) -> Tensor:
    return g + h * xi.mT @ xi


def _destroy(g: Tensor, v: Tensor, h: float) -> Tensor:
    # (g^-1 + h Q)^-1 = L (1 + h L^T Q L)^-1 L^T, positive without inverting g
    low = _cholesky(g)
    image = v @ low
    eye = torch.eye(g.shape[-1], dtype=g.dtype, device=g.device)
    inner = _cholesky(eye + h * image.mT @ image)
    root = torch.linalg.solve_triangular(inner, low.mT, upper=False)
    return root.mT @ root


def _patankar(g: Tensor, x: Tensor, source: Source, h: float, forward: bool) -> Tensor:
    # Production and destruction for the time h, each with its vectors at a predicted midpoint;
    # the two half steps of the splitting mirror each other.
    terms = source(x, g)
    for part in ("production", "destruction") if forward else ("destruction", "production"):
        step = _produce if part == "production" else _destroy
        vectors = getattr(terms, part)
        if vectors is not None:
            middle = getattr(source(x, step(g, vectors, h / 2)), part)
            g = step(g, middle, h)
            terms = source(x, g)
    return g


# -- the flow ------------------------------------------------------------------------------


def learned_flow(
    g: Tensor,
    source: Source | None = None,
    x: Tensor | None = None,
    *,
    dt: float,
    steps: int,
    rate: Rate | None = None,
    order: int = 4,
    limit: float = 2.0,
    save_every: int = 1,
) -> LearnedRun:
    r"""Flow metrics ``g (..., d, d)`` by ``rate`` and a typed ``source``, each at its own point.

    ``rate(g)`` is the symmetric part that is given, :math:`-2\,\mathrm{Ric}` of some kind; without
    one there is the source alone. ``source(x, g)`` returns :class:`SourceTerms`. The step of
    curvature and congruence is a log-Cholesky Runge-Kutta method of ``order`` 1, 2 or 4, the
    splitting is of second order.

    No step may change log g by more than ``limit`` (in the norm of :math:`L^{-1}\dot gL^{-T}dt`):
    where the rate asks for more, it is shortened there, so that the metric stays finite and
    positive for every network and ``dt``. That is then no longer the flow; the status says
    ``limited``, and ``excess`` how much smaller ``dt`` should be. Raises ``ConvergenceError`` with
    the trajectory so far if the metric is lost to rounding or a source is not finite.

    >>> source = TypedSource(2, generator=torch.Generator().manual_seed(0))
    >>> run = learned_flow(torch.eye(2), source, torch.zeros(2), dt=1.0, steps=3)
    >>> bool((torch.linalg.eigvalsh(run.g) > 0).all())
    True
    """
    where = "learned_flow"
    _checks.check_tensor(where, "g", g)
    if g.dim() < 2 or g.shape[-1] != g.shape[-2]:
        raise ValueError(f"{where}: g has shape {tuple(g.shape)}, expected (..., d, d)")
    if source is not None:
        if x is None:
            raise ValueError(f"{where}: a source was given, expected the points x as well")
        _checks.check_like(where, "x", x, "a row of g", g[..., 0])
        batch = torch.broadcast_shapes(x.shape[:-1], g.shape[:-2])
        g = g.expand(*batch, *g.shape[-2:])
    if order not in (1, 2, 4):
        raise ValueError(f"{where}: order is {order}, expected 1, 2 or 4")
    if not (limit > 0 and math.isfinite(limit)):
        raise ValueError(f"{where}: limit is {limit}, expected a positive number")
    _metric_march.check_run(where, dt, steps, save_every)
    _checks.check_finite(where, g=g)
    _checks.check_that(
        where,
        lambda: is_positive(values(g)),
        "g is not positive definite",
        _checks.GeometryError,
    )

    def congruence(g: Tensor) -> Tensor:
        total = torch.zeros_like(g) if rate is None else rate(g)
        if source is not None and x is not None:
            generator = source(x, g).generator
            if generator is not None:
                total = total + source_rate(SourceTerms(generator), g)
        return total

    worst = 0.0

    def step(g: Tensor) -> Tensor:
        nonlocal worst
        if source is not None and x is not None:
            g = _patankar(g, x, source, dt / 2, True)
        g, excess = _runge_kutta(g, congruence, dt, order, limit)
        if checks_values():
            worst = max(worst, float(values(excess).max()))
        if source is not None and x is not None:
            g = _patankar(g, x, source, dt / 2, False)
        return g

    def verdict(g: Tensor) -> str | None:
        return None if bool(is_positive(g).all()) else "a metric is not positive definite"

    t, saved, word = _metric_march.march(step, g, dt, steps, save_every, verdict)
    run = LearnedRun(t, saved, "limited" if worst > 1 else "done", worst)
    if word is not None:
        raise _metric_march.stopped(where, word, run)
    return run


def learned_grid_flow(
    g: Tensor,
    grid: PeriodicGrid,
    source: Source | None = None,
    *,
    dt: float,
    steps: int,
    gauge: str = "deturck",
    order: int = 4,
    limit: float = 2.0,
    save_every: int = 1,
) -> LearnedRun:
    """Flow a metric field ``(..., *nodes, d, d)`` on a periodic grid with its true curvature.

    :func:`learned_flow` with the rate of ``ricci_grid.ricci_rate``; without a source it is
    ``ricci_grid.grid_flow`` by another method. The metric stays positive for every ``dt``, but
    beyond ``ricci_grid.stable_step`` it is not the flow that it follows.
    """
    ricci_grid._check_metric("learned_grid_flow", g, grid)
    ricci_grid._check_gauge("learned_grid_flow", gauge, None, g, grid)

    def rate(g: Tensor) -> Tensor:
        return ricci_grid._rate(g, grid, gauge, None, False)

    return learned_flow(
        g,
        source,
        grid.nodes(),
        dt=dt,
        steps=steps,
        rate=rate,
        order=order,
        limit=limit,
        save_every=save_every,
    )


def learned_rate(metric: Metric, x: Tensor, source: Source | None = None) -> Tensor:
    r"""Return :math:`-2\,\mathrm{Ric}(g) + T(x, g)` ``(..., d, d)`` of a metric field at ``x``.

    The Ricci tensor is exact, from one 2-jet of ``metric``, which may be a network.
    """
    rate = -2 * ricci(metric, x)
    return rate if source is None else rate + source_rate(source(x, metric(x)), metric(x))


def flowed_metric(
    metric: Metric,
    source: Source | None = None,
    *,
    dt: float,
    steps: int = 1,
    limit: float = 2.0,
) -> Metric:
    r"""Return the metric field after ``steps`` Euler steps of the flow, as a function.

    A field like any other: it has a connection and a curvature of its own, and gradients in the
    parameters of ``metric`` and ``source``. First order in ``dt``, positive for any: steps are
    limited as in :func:`learned_flow`, without notice. Each step takes two derivatives of the one
    before, so the cost grows exponentially; on a torus :func:`learned_grid_flow` does not have
    that.
    """
    where = "flowed_metric"
    _metric_march.check_run(where, dt, steps, 1)

    def advance(before: Metric) -> Metric:
        def after(x: Tensor) -> Tensor:
            g = before(x)
            if source is not None:
                g = _patankar(g, x, source, dt / 2, True)

            def rate(g: Tensor) -> Tensor:
                total = -2 * ricci(before, x)
                if source is not None:
                    terms = SourceTerms(source(x, g).generator)
                    total = total + source_rate(terms, g)
                return total

            g, _ = _runge_kutta(g, rate, dt, 1, limit)
            return g if source is None else _patankar(g, x, source, dt / 2, False)

        return after

    for _ in range(steps):
        metric = advance(metric)
    return metric
