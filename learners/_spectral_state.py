r"""The memories of spectral attention: what is kept, how it is read, and what a chunk's end does.

Values are kept as moments in the base's functions, :math:`a = \sum_j\varphi(\mu_j)V_j`, and read
through the kernel of the pencil at hand, :math:`y = \varphi(q)^TFa`. Both classes of state have the
same three functions: ``start``, ``read`` and ``turn``.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from darboux._checks import unchecked, values
from darboux.flows.learned_ricci import SourceTerms, learned_flow, learned_grid_flow
from darboux.flows.ricci_grid import PeriodicGrid, periodic_grid
from darboux.learners import _spectral_basis as parts
from darboux.learners._spectral_basis import Bumps
from darboux.manifolds.spectral import Fourier, Operator, galerkin, kernel, periodised


@dataclass(frozen=True)
class Relaxation:
    r"""A flow of the metric itself, on a grid, at the end of every chunk: a torus, exact mode.

    .. math:: \partial_t g = -2\,\mathrm{Ric}(g) + r\,(I + T - g^2)

    in DeTurck's gauge, for the time ``dt * steps``, with T the mean of the chunk's bumps as
    stress-energy and r learned from ``rate`` on. Typed as production and destruction
    (:mod:`darboux.flows.learned_ricci`): g stays positive and bounded for any number of tokens and
    forgets, towards I.
    """

    dt: float = 0.02
    steps: int = 1
    rate: float = 1.0

    def __post_init__(self) -> None:
        if not (self.dt > 0 and self.steps >= 1 and self.rate > 0):
            raise ValueError(f"Relaxation: got {self}, expected positive numbers")


class Setting(NamedTuple):
    """What a read needs besides the state."""

    basis: Any
    levels: Tensor  # (K,), of the base
    respond: Any  # values (..., heads, K) -> weights
    differences: Any  # values -> two divided differences, perturbative mode
    nodes: int | None
    inertia: float
    tolerance: float
    relaxation: Relaxation | None
    rate: Tensor | None
    frozen: bool

    def weight(self, tokens: int) -> float:
        """Return the weight of one token in the mean of so many that makes the metric."""
        return 1 / (self.inertia + tokens)

    def weights(self, tokens: Tensor, like: Tensor) -> Tensor:
        """Return the same for each of several counts."""
        return (1 / (self.inertia + tokens.double())).to(like)


class SpectralMemory(NamedTuple):
    r"""What exact mode remembers, constant in size.

    ``position (batch,)`` counts tokens. ``moments (batch, heads, K, e + 1)`` are of the values and,
    last, of ones. ``stiffness`` and ``mass (batch, heads, K, K)`` are the Galerkin matrices as
    changes by the tokens, summed; ``kernel`` is :math:`f(M^{-1}A)M^{-1}` of the chunk. ``metric``
    and ``stress (batch, heads, nodes, d, d)`` have no nodes unless the metric relaxes, and
    then the two matrices are those of the metric. A frozen base has no matrices.
    """

    position: Tensor
    moments: Tensor
    stiffness: Tensor
    mass: Tensor
    kernel: Tensor
    metric: Tensor
    stress: Tensor


class PerturbedMemory(NamedTuple):
    r"""What perturbative mode remembers, constant in size; all but ``frame`` is in the frame.

    ``frame`` are the eigenfunctions W of the last solve and ``levels (batch, heads, K)`` its
    eigenvalues; ``stiffness`` and ``mass`` the changes by the tokens, summed; ``flat_stiffness``
    and ``flat_mass`` the matrices of the base. ``drift (batch, heads)`` is
    :math:`\|\delta F\|/\|F\|`, the first-order change of the kernel since the solve, whose square
    is about the error, and ``solves`` counts solves.
    """

    position: Tensor
    moments: Tensor
    stiffness: Tensor
    mass: Tensor
    flat_stiffness: Tensor
    flat_mass: Tensor
    frame: Tensor
    levels: Tensor
    drift: Tensor
    solves: Tensor


# -- exact mode ----------------------------------------------------------------------------


def start_exact(setting: Setting, batch: int, heads: int, width: int) -> SpectralMemory:
    """Return the memory before the first token."""
    levels, size = setting.levels, len(setting.levels)
    kept = 0 if setting.frozen else size
    zero = levels.new_zeros(batch, heads, kept, kept)
    kernel_ = (
        zero
        if setting.frozen
        else torch.diag_embed(setting.respond(levels.expand(batch, heads, size)))
    )
    stiffness, mass = zero, zero
    nodes, d = (0, 0) if setting.relaxation is None else setting.basis.points.shape
    metric = torch.eye(d).to(levels).expand(batch, heads, nodes, d, d)
    if nodes:
        stiffness = torch.diag_embed(levels.expand(batch, heads, size))
        mass = torch.eye(size).to(levels).expand_as(zero)
    return SpectralMemory(
        torch.zeros(batch, dtype=torch.int64, device=levels.device),
        levels.new_zeros(batch, heads, size, width + 1),
        stiffness,
        mass,
        kernel_,
        metric,
        torch.zeros_like(metric),
    )


def read_exact(
    setting: Setting, state: SpectralMemory, q: Tensor, k: Tensor, v: Tensor, bumps: Bumps | None
) -> tuple[Tensor, SpectralMemory]:
    """Return ``(batch, heads, n, e + 1)`` of n tokens within one chunk, and the memory after."""
    row = (
        q @ state.kernel
        if state.kernel.numel()
        else q * setting.respond(_flat(setting, q))[:, None]
    )
    y = row @ state.moments + (row @ k.mT).tril() @ v
    state = state._replace(position=state.position + q.shape[2], moments=state.moments + k.mT @ v)
    if bumps is None:
        return y, state
    if setting.relaxation is not None:
        metric = periodised(parts.token_bumps(bumps), setting.basis)(setting.basis.points)
        eye = torch.eye(metric.shape[-1]).to(metric)
        return y, state._replace(stress=state.stress + metric - eye)
    stiffness, mass = parts.changes(setting.basis, bumps, setting.nodes)
    return y, state._replace(stiffness=state.stiffness + stiffness, mass=state.mass + mass)


def read_chunks(
    setting: Setting,
    state: SpectralMemory,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bumps: Bumps | None,
    chunk: int,
) -> tuple[Tensor, SpectralMemory]:
    """Read whole chunks all at once, from the start of a chunk: sums, and one batch of solves."""

    def fold(x: Tensor) -> Tensor:  # (batch, heads, time, ...) -> (chunks, batch, heads, ...)
        return x.unflatten(2, (-1, chunk)).movedim(2, 0)

    def before(start: Tensor, x: Tensor) -> Tensor:  # what is there when each begins, and after
        return torch.cat([start[None], start + x.cumsum(0)])

    time = q.shape[2]
    q, k, v = fold(q), fold(k), fold(v)
    moments = before(state.moments, k.mT @ v)
    if bumps is None:
        row = q * setting.respond(_flat(setting, q))[:, None]
    else:
        centers, directions, masses = (fold(x).flatten(0, 1) for x in bumps[:3])
        together = Bumps(centers, directions, masses, bumps.sigma)
        sums = [
            before(start, x.unflatten(0, (len(q), -1)))
            for start, x in zip(
                (state.stiffness, state.mass),
                parts.changes(setting.basis, together, setting.nodes),
                strict=True,
            )
        ]
        counts = int(state.position[0]) + chunk * torch.arange(len(q), device=q.device)
        weight = setting.weights(counts, q)[:, None, None, None, None]
        eye = torch.eye(len(setting.levels)).to(q)
        kernels = _kernel(
            setting,
            torch.diag(setting.levels) + weight * sums[0][:-1],
            eye + weight * sums[1][:-1],
        )
        row = q @ kernels
        state = state._replace(stiffness=sums[0][-1], mass=sums[1][-1], kernel=kernels[-1])
    y = row @ moments[:-1] + (row @ k.mT).tril() @ v
    state = state._replace(position=state.position + time, moments=moments[-1])
    return y.movedim(0, 2).flatten(2, 3), state


def _kernel(setting: Setting, stiffness: Tensor, mass: Tensor) -> Tensor:
    eye = torch.eye(len(setting.levels)).to(mass).expand_as(mass)
    symmetric = Operator(*(0.5 * (x + x.mT) for x in (stiffness, mass)))
    return kernel(symmetric, setting.respond, eye)


def _flat(setting: Setting, q: Tensor) -> Tensor:
    # the base's levels where q has its functions; the filter wants the heads next to last
    return setting.levels.expand(q.shape[-3], -1)


def turn_exact(setting: Setting, state: SpectralMemory, tokens: int, chunk: int) -> SpectralMemory:
    """Return the memory with the kernel of the metric after ``tokens``."""
    if setting.relaxation is not None:
        metric = _relaxed(setting, state.metric, state.stress / chunk)
        with unchecked():  # the metric is given at the nodes alone
            operator = galerkin(lambda x: metric, setting.basis)
        assert isinstance(operator.stiffness, Tensor)
        assert isinstance(operator.mass, Tensor)
        state = state._replace(metric=metric, stress=torch.zeros_like(metric))
        state = state._replace(stiffness=operator.stiffness, mass=operator.mass)
        stiffness, mass = operator.stiffness, operator.mass
    else:
        stiffness, mass = pencil(setting, state)
    return state._replace(kernel=_kernel(setting, stiffness, mass))


def pencil(setting: Setting, state: SpectralMemory) -> tuple[Tensor, Tensor]:
    """Return stiffness and mass ``(batch, heads, K, K)`` of the metric after the last token."""
    if setting.frozen:
        eye = torch.eye(len(setting.levels)).to(state.moments)
        eye = eye.expand(*state.moments.shape[:2], -1, -1)
        return setting.levels[:, None] * eye, eye
    if setting.relaxation is not None:
        return state.stiffness, state.mass
    weight = setting.weight(int(state.position[0]))
    eye = torch.eye(len(setting.levels)).to(state.mass)
    return torch.diag(setting.levels) + weight * state.stiffness, eye + weight * state.mass


def _relaxed(setting: Setting, metric: Tensor, stress: Tensor) -> Tensor:
    relaxation, basis, rate = setting.relaxation, setting.basis, setting.rate
    assert relaxation is not None
    assert rate is not None
    eye = torch.eye(basis.dim).to(metric)
    rate = rate[:, None, None, None]  # (heads, 1, 1, 1)
    produced = torch.linalg.cholesky_ex(rate * (eye + stress))[0].mT
    destroyed = (rate.sqrt() * eye).expand_as(produced)
    shape = basis.shape

    def field(x: Tensor) -> Tensor:
        return x.unflatten(2, shape)

    def source(x: Tensor, g: Tensor) -> SourceTerms:
        return SourceTerms(production=field(produced), destruction=field(destroyed))

    run = {"dt": relaxation.dt, "steps": relaxation.steps, "save_every": relaxation.steps}
    if basis.dim == 1:  # no curvature
        flowed = learned_flow(field(metric), source, basis.points, **run)
    else:
        flowed = learned_grid_flow(field(metric), grid_of(basis), source, **run)
    return flowed.g[-1].flatten(2, 1 + basis.dim)


def grid_of(basis: Fourier) -> PeriodicGrid:
    """Return the grid of the basis' nodes."""
    periods = basis.lattice.diagonal().abs().tolist()
    like = basis.points
    return periodic_grid(basis.shape, periods, dtype=like.dtype, device=like.device)


# -- perturbative mode ---------------------------------------------------------------------


def start_perturbed(setting: Setting, batch: int, heads: int, width: int) -> PerturbedMemory:
    """Return the memory before the first token."""
    size = len(setting.levels)
    levels = setting.levels.expand(batch, heads, size)
    zero = levels.new_zeros(batch, heads, size, size)
    eye = torch.eye(size).to(levels).expand_as(zero)
    count = torch.zeros(batch, dtype=torch.int64, device=levels.device)
    return PerturbedMemory(
        count,
        levels.new_zeros(batch, heads, size, width + 1),
        zero,
        zero,
        torch.diag_embed(levels),
        eye,
        eye,
        levels,
        levels.new_zeros(batch, heads),
        count[:, None].expand(batch, heads),
    )


def read_perturbed(
    setting: Setting, state: PerturbedMemory, q: Tensor, k: Tensor, v: Tensor, bumps: Bumps | None
) -> tuple[Tensor, PerturbedMemory]:
    """Return ``(batch, heads, n, e + 1)`` of n tokens within one chunk, and the memory after.

    Each is read in the metric with itself in it: O(K²) a token.
    """
    assert setting.nodes is not None
    n = q.shape[2]
    q, k = q @ state.frame, k @ state.frame
    position = state.position + n
    stiffness, mass = state.stiffness[:, :, None], state.mass[:, :, None]
    if bumps is not None:
        frame = state.frame[:, :, None]
        across, along, mass_rows = (
            z @ frame for z in parts.factors(setting.basis, bumps, setting.nodes)
        )
        stiffness = stiffness + (across.mT @ across - along.mT @ along).cumsum(2)
        mass = mass + (mass_rows.mT @ mass_rows).cumsum(2)
    counts = state.position[0] + torch.arange(1, n + 1, device=q.device)
    weight = setting.weights(counts, q)[:, None, None]
    change = _first_order(setting, state, weight * stiffness, weight * mass)
    row = q * setting.respond(state.levels)[:, :, None] + (q[..., None, :] @ change).squeeze(-2)
    y = row @ state.moments + (row @ k.mT).tril() @ v
    return y, state._replace(
        position=position,
        moments=state.moments + k.mT @ v,
        stiffness=stiffness[:, :, -1],
        mass=mass[:, :, -1],
    )


def _first_order(
    setting: Setting, state: PerturbedMemory, stiffness: Tensor, mass: Tensor
) -> Tensor:
    """Return the change ``(batch, heads, n, K, K)`` of the kernel in the frame, by Daleckii-Krein.

    Divided differences stand where perturbation theory has gaps below: nothing is singular where
    eigenvalues meet.
    """
    plain, weighted = (x[:, :, None] for x in setting.differences(state.levels))
    moved = (state.flat_stiffness - torch.diag_embed(state.levels))[:, :, None] + stiffness
    eye = torch.eye(mass.shape[-1]).to(mass)
    heavier = (state.flat_mass - eye)[:, :, None] + mass
    return plain * moved - weighted * heavier


def turn_perturbed(
    setting: Setting, state: PerturbedMemory, tokens: int, chunk: int
) -> PerturbedMemory:
    """Measure the drift, and solve anew where it is too large. Frames carry no gradient."""
    weight = setting.weight(tokens)
    stiffness, mass = weight * state.stiffness, weight * state.mass
    with torch.no_grad():
        change = _first_order(setting, state, stiffness[:, :, None], mass[:, :, None])
        size = torch.linalg.vector_norm(setting.respond(state.levels), dim=-1)
        drift = torch.linalg.matrix_norm(change.squeeze(2)) / size
        stale = values(drift) > setting.tolerance
        if not bool(stale.any()):
            return state._replace(drift=drift)
        rows = stale.nonzero(as_tuple=True)
        eye = torch.eye(mass.shape[-1]).to(mass)
        a = (state.flat_stiffness + stiffness)[rows]
        m = (state.flat_mass + mass)[rows]
        low = torch.linalg.cholesky(0.5 * (m + m.mT))
        half = torch.linalg.solve_triangular(low, a, upper=False)
        reduced = torch.linalg.solve_triangular(low, half.mT, upper=False)
        levels, vectors = torch.linalg.eigh(0.5 * (reduced + reduced.mT))
        turn = eye.expand_as(state.frame).index_put(
            rows, torch.linalg.solve_triangular(low.mT, vectors, upper=True)
        )
        frame, levels = state.frame @ turn, state.levels.index_put(rows, levels)
    stiffness, mass, flat_stiffness, flat_mass = (
        turn.mT @ x @ turn
        for x in (state.stiffness, state.mass, state.flat_stiffness, state.flat_mass)
    )
    return PerturbedMemory(
        state.position,
        turn.mT @ state.moments,
        stiffness,
        mass,
        flat_stiffness,
        flat_mass,
        frame,
        levels,
        torch.where(stale, 0, drift),
        state.solves + stale,
    )
