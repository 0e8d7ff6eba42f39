r"""The parts of spectral attention that know no time: bases, filters, changes by tokens.

A filter is a sum of exponentials, :math:`f(\lambda) = \sum_j c_j e^{-\tau_j\lambda}`, so that its
divided differences are in closed form, smooth where eigenvalues meet:

.. math:: f[a, b] = -\sum_j c_j\tau_j\,e^{-\tau_j\min(a, b)}\,\frac{1 - e^{-z}}{z},
          \quad z = \tau_j|a - b|, \qquad
          (\lambda f)[a, b] = \tfrac12(f(a) + f(b)) + \tfrac12(a + b)\,f[a, b]
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from darboux.manifolds import Euclidean, FlatTorus, Manifold, Sphere, TokenBumps
from darboux.manifolds.spectral import Fourier, Harmonics, bump_elements, low_rank_elements

FILTERS = {"heat": (1.0,), "band": (1.0, -1.0)}


# -- bases ---------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What a base and a number of modes come to: hashable, so that bases can be kept."""

    dim: int
    degree: int
    lattice: tuple[tuple[float, ...], ...] | None  # None on the sphere

    @property
    def coordinates(self) -> int:
        """How many numbers make a point."""
        return 3 if self.lattice is None else self.dim


def plan(where: str, base: Manifold, modes: int) -> Plan:
    """Return the plan, or raise where the base has no basis or not one of that size."""
    if isinstance(base, Sphere):
        if base.dim != 2 or float(base.radius) != 1:
            raise ValueError(
                f"{where}: base is a sphere of dimension {base.dim} and radius "
                f"{float(base.radius)}, expected Sphere(2)"
            )
        side, dim, lattice = math.isqrt(max(modes, 0)), 2, None
        degree, fits = side - 1, modes > 0 and side * side == modes
        sizes = "(L + 1)^2"
    elif isinstance(base, FlatTorus):
        dim = base.dim
        rows = 2 * math.pi * torch.eye(dim, dtype=torch.float64)
        rows = rows if base.lattice is None else base.lattice.detach()
        lattice = tuple(tuple(row) for row in rows.tolist())
        side = round(max(modes, 1) ** (1 / dim))
        degree, fits = (side - 1) // 2, side % 2 == 1 and side**dim == modes
        sizes = f"(2 N + 1)^{dim}"
    else:
        kind = "Euclidean space" if isinstance(base, Euclidean) else type(base).__name__
        raise TypeError(f"{where}: base is {kind}, expected a FlatTorus or Sphere(2)")
    if not fits or degree < 1:
        raise ValueError(f"{where}: modes is {modes}, expected {sizes} with at least one harmonic")
    return Plan(dim, degree, lattice)


@functools.lru_cache(maxsize=32)
def basis_of(plan: Plan, dtype: torch.dtype, device: torch.device) -> Fourier | Harmonics:
    """Return the basis of a plan; an odd number of nodes, for flows on them."""
    if plan.lattice is None:
        return Harmonics(plan.degree, dtype=dtype, device=device)
    lattice = torch.tensor(plan.lattice, dtype=torch.float64)
    nodes = 4 * plan.degree + 1
    return Fourier(plan.degree, lattice=lattice, nodes=nodes, dtype=dtype, device=device)


def flat_levels(basis: Fourier | Harmonics) -> Tensor:
    """Return the eigenvalues ``(K,)`` of the base."""
    if isinstance(basis, Harmonics):
        l = torch.arange(basis.degree + 1, device=basis.points.device)
        return (l * (l + 1)).repeat_interleave(2 * l + 1).to(basis.points.dtype)
    squares = basis.frequencies.square().sum(-1)
    return torch.cat([squares, squares[1:]])


def volume(basis: Fourier | Harmonics) -> float:
    """Return the volume of the base."""
    return 4 * math.pi if isinstance(basis, Harmonics) else basis.volume


# -- filters -------------------------------------------------------------------------------


def respond(kind: str, times: Tensor, values: Tensor) -> Tensor:
    """Return the filter at ``values (..., heads, K)``; ``times (terms, heads)``."""
    terms = zip(FILTERS[kind], _times(kind, times), strict=True)
    return sum((c * torch.exp(-t[:, None] * values) for c, t in terms), torch.zeros_like(values))


def differences(kind: str, times: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return :math:`f[\lambda_i, \lambda_j]` and :math:`(\lambda f)[\lambda_i, \lambda_j]`."""
    a, b = values[..., :, None], values[..., None, :]
    low, apart = torch.minimum(a, b), (a - b).abs()
    plain = torch.zeros_like(apart)
    for c, t in zip(FILTERS[kind], _times(kind, times), strict=True):
        t = t[:, None, None]
        z = t * apart
        safe = torch.where(z > 0, z, 1.0)
        ratio = torch.where(z > 0, -torch.expm1(-safe) / safe, 1.0)
        plain = plain - c * t * torch.exp(-t * low) * ratio
    f = respond(kind, times, values)
    mean = 0.5 * (f[..., :, None] + f[..., None, :])
    return plain, mean + 0.5 * (a + b) * plain


def _times(kind: str, times: Tensor) -> Tensor:
    # a band is what diffusion for a short time keeps and for a long time loses
    return times if kind == "heat" else times.cumsum(0)


# -- what a token does to the matrices -----------------------------------------------------


class Bumps(NamedTuple):
    r"""Tokens on the base, as :math:`\delta g = m\,\theta(x)\,vv^T` with :math:`\int\theta = 1`."""

    centers: Tensor  # (batch, heads, time, D)
    directions: Tensor  # the same, of length one
    masses: Tensor  # (batch, heads, time)
    sigma: Tensor  # (heads,), of the Gaussian; of no effect on a point mass

    def part(self, i: int, j: int) -> "Bumps":
        """Return those of the tokens i to j."""
        centers, directions, masses = (x[:, :, i:j] for x in self[:3])
        return Bumps(centers, directions, masses, self.sigma)


def largest_mass(basis: Fourier | Harmonics, sigma: Tensor, nodes: int | None) -> Tensor:
    r"""Return the mass ``(heads,)``, or ``(1,)``, at which one bump may halve the stiffness A.

    Of a bump of mass m, :math:`\delta A \ge -\tfrac12 m\,\|\theta\|\,A`, where
    :math:`\|\theta\|` is at most the sum of the bump's Fourier coefficients that K functions see,
    and :math:`(K - 1)/V` for whatever measure :math:`\theta` is.
    """
    v = volume(basis)
    points = basis.points.new_tensor([basis.size - 1.0])
    if nodes is not None:
        return v / points
    assert isinstance(basis, Fourier)
    table = basis.table_frequencies([4 * int(n) + 1 for n in basis.modes.abs().amax(0)])
    seen = torch.exp(-0.5 * sigma.square()[:, None] * table.square().sum(-1)).sum(-1)
    return v / torch.minimum(seen, points)


def token_bumps(bumps: Bumps) -> TokenBumps:
    """Return tokens on a torus as the metric that they make."""
    sigma = bumps.sigma[:, None].expand_as(bumps.masses)
    dim = bumps.centers.shape[-1]
    heights = bumps.masses / (2 * math.pi * sigma.square()) ** (dim / 2)
    return TokenBumps(bumps.centers, bumps.directions, heights, sigma)


def changes(basis: Fourier | Harmonics, bumps: Bumps, nodes: int | None) -> tuple[Tensor, Tensor]:
    """Return the first-order changes ``(batch, heads, K, K)`` by all tokens together."""
    if nodes is None:
        assert isinstance(basis, Fourier)
        return tuple(bump_elements(basis, token_bumps(bumps)))  # pyright: ignore[reportReturnType]
    across, along, mass = (z.flatten(2, 3) for z in factors(basis, bumps, nodes))
    return across.mT @ across - along.mT @ along, mass.mT @ mass


def factors(basis: Fourier | Harmonics, bumps: Bumps, nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return vectors ``(batch, heads, time, r, K)`` whose squares are the changes of each token.

    ``across`` less ``along`` make the stiffness, the third the mass. On a torus at ``nodes``
    Gauss-Hermite points a dimension (:func:`~darboux.manifolds.spectral.low_rank_elements`), on the
    sphere at the centre alone.
    """
    shape = bumps.masses.shape
    if isinstance(basis, Harmonics):
        gradients = basis.gradient(bumps.centers)  # (..., K, 3)
        along = (gradients @ bumps.directions[..., None]).squeeze(-1)
        root = bumps.masses.sqrt()[..., None, None]
        half = math.sqrt(0.5) * root
        mass = half * basis.evaluate(bumps.centers).unsqueeze(-2)
        return half * gradients.mT, root * along.unsqueeze(-2), mass
    together = token_bumps(bumps)
    n, d = bumps.masses.numel(), basis.dim
    flat = TokenBumps(
        together.centers.reshape(n, d),
        together.directions.reshape(n, d),
        together.amplitudes.reshape(n),
        together.sigma.reshape(n),
    )
    stiffness, mass = low_rank_elements(basis, flat, nodes=nodes)
    r = nodes**d
    across, along = stiffness.factors.split([d * n * r, n * r])
    across = across.unflatten(0, (d, n, r)).movedim(0, 1).flatten(1, 2)  # (n, d r, K)
    along, points = (z.unflatten(0, (n, r)) for z in (along, mass.factors))
    across, along, points = (z.unflatten(0, shape) for z in (across, along, points))
    return across, along, points
