"""The spaces that every law is tested on: to test a new one, add a line."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from darboux import manifolds as m

F64 = torch.float64
CENTERS, DIRECTIONS = torch.randn(2, 4, 2, generator=torch.Generator().manual_seed(3), dtype=F64)
AMPLITUDES = torch.tensor([0.5, 1.0, 0.2, 0.8], dtype=F64)
SKEW = torch.tensor([[1.0, 0.0], [0.4, 0.9]], dtype=F64) * 5


@dataclass(frozen=True)
class Case:
    """A space, and how far apart the points of a test may be.

    ``make(k)`` makes the space with its numbers (a radius, the weights of a network) multiplied
    by ``k``, if it has any.
    """

    name: str
    make: Callable[..., m.Manifold]
    reach: float = 0.6  # length of the tangent vectors used, below the injectivity radius

    @property
    def is_chart(self) -> bool:
        return isinstance(self.make(), m.Chart)


class Bump(m.Chart):
    """The user of the first page: a metric written down, nothing else."""

    def __init__(self, dim: int, height: float | Tensor = 1.0, **options: Any):
        super().__init__(dim, **options)
        self.height = height

    def metric(self, x: Tensor) -> Tensor:
        w = self.height * torch.exp(-x.square().sum(-1))[..., None, None]
        return torch.eye(self.dim, dtype=x.dtype, device=x.device) * (1 + w)


class Anisotropic(m.Chart):
    """A metric without symmetries, positive definite everywhere, in any dimension."""

    def __init__(self, dim: int, size: float | Tensor = 0.3, **options: Any):
        super().__init__(dim, **options)
        self.size = size

    def metric(self, x: Tensor) -> Tensor:
        d = self.dim
        i = torch.arange(d * d, dtype=x.dtype, device=x.device).reshape(d, d)
        a = self.size * torch.sin(i + (x @ torch.cos(i))[..., None] * (1 + 0.1 * i))
        eye = torch.eye(d, dtype=x.dtype, device=x.device)
        return eye + a @ a.mT


def bowl(k=1.0) -> m.Pullback:
    def embedding(x: Tensor) -> Tensor:
        a, b = x.unbind(-1)
        return torch.stack([a, b, k * (a * (0.4 * a - 0.3 * b) + 0.2 * b**3)], -1)

    return m.Pullback(embedding, 2)


def vase(k=1.0) -> m.SurfaceOfRevolution:
    return m.SurfaceOfRevolution(lambda u: (1.2 + 0.4 * k * torch.sin(u), u))


def tilted(k=1.0) -> m.Conformal:
    def tilt(x: Tensor) -> Tensor:
        return 0.3 * k * torch.sin(x[..., 0]) + 0.1 * x[..., 1].square()

    return m.Conformal(m.Euclidean(3), tilt)


def conformal_torus(k=1.0) -> m.Conformal:
    def wave(x: Tensor) -> Tensor:  # with the periods of the torus
        return 0.3 * torch.sin(x[..., 0]) + 0.2 * k * torch.cos(x[..., 1] - x[..., 0])

    return m.Conformal(m.TorusOfRevolution(), wave)


def warped(k=1.0) -> m.Warped:
    def swell(x: Tensor) -> Tensor:
        return 1.3 + 0.3 * k * torch.sin(x[..., 0])

    return m.Warped(m.Euclidean(1), m.Stereographic(2, curvature=1.0), swell)


def scalable(make: Callable[[], m.Manifold]) -> Callable[..., m.Manifold]:
    """Let ``make(k)`` multiply every parameter of the space by ``k``."""
    drawn = make()  # at once: nothing random can be drawn under vmap

    def scaled(module: Any, k: Tensor) -> Any:
        twin = copy.copy(module)
        weights = {n: k * p.detach() for n, p in module.named_parameters(recurse=False)}
        twin.__dict__ = module.__dict__ | weights | {"_parameters": {}}
        twin._modules = {n: scaled(child, k) for n, child in module.named_children()}
        return twin

    return lambda k=1.0: scaled(drawn, k) if isinstance(k, Tensor) else make()


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def network(kind: Callable[..., m.Manifold], *sizes: int) -> Callable[..., m.Manifold]:
    return scalable(lambda: kind(*sizes, width=16, generator=generator(), dtype=F64))


def decoder() -> m.DecoderPullback:
    torch.manual_seed(5)
    mean = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 7)).double()
    centers = torch.randn(5, 2, generator=generator(), dtype=F64)
    return m.DecoderPullback(mean, m.RBFUncertainty(centers, 1.0, floor=0.5), dim=2)


def bumps(k=1.0) -> m.TokenBumps:
    return m.TokenBumps(CENTERS, DIRECTIONS, k * AMPLITUDES, 0.9)


MANIFOLDS = [
    Case("euclidean", lambda k=1.0: m.Euclidean(3)),
    Case("flat_torus", lambda k=1.0: m.FlatTorus(2)),
    Case("skew_torus", lambda k=1.0: m.FlatTorus(lattice=SKEW)),
    Case("sphere", lambda k=1.0: m.Sphere(2, radius=k)),
    Case("big_sphere", lambda k=1.0: m.Sphere(3, radius=2.0 * k)),
    Case("stereographic_sphere", lambda k=1.0: m.Stereographic(3, curvature=k)),
    Case("ball", lambda k=1.0: m.Hyperbolic(2, curvature=-k)),
    Case("ball_3", lambda k=1.0: m.Hyperbolic(3, curvature=-0.5 * k)),
    Case("half_space", lambda k=1.0: m.HalfSpace(3, curvature=-k)),
    Case("torus", lambda k=1.0: m.TorusOfRevolution(R=2.0, r=k)),
    Case("vase", vase),
    Case("ellipsoid", lambda k=1.0: m.Ellipsoid(1.0, 1.5 * k, 2.0), reach=0.4),
    Case("fisher", lambda k=1.0: m.FisherGaussian()),
    Case("fisher_3", lambda k=1.0: m.FisherGaussian(3)),
    Case("bowl", bowl),
    Case("product", lambda k=1.0: m.Product(m.Hyperbolic(2), m.TorusOfRevolution(R=2.0 * k))),
    Case("mixed_product", lambda k=1.0: m.Product(m.Sphere(2, radius=k), m.HalfSpace(2))),
    Case("conformal", tilted),
    Case("conformal_torus", conformal_torus),
    Case("warped", warped),
    Case("cholesky_net", network(m.CholeskyNetwork, 2)),
    Case("conformal_net", network(m.ConformalNetwork, 3)),
    Case("diagonal_net", network(m.DiagonalNetwork, 3)),
    Case("low_rank_net", network(m.LowRankNetwork, 3, 1)),
    Case("token_bumps", bumps),
    Case("decoder", scalable(decoder)),
    Case("bump", lambda k=1.0: Bump(2, height=k)),
    Case("anisotropic", lambda k=1.0: Anisotropic(3, size=0.3 * k)),
    Case("anisotropic_4", lambda k=1.0: Anisotropic(4, size=0.3 * k)),
]


def points(
    case: Case, *shape: int, seed: int = 0, dtype=torch.float64
) -> tuple[m.Manifold, Tensor]:
    """Return the case's manifold and random points on it."""
    manifold = case.make().to(dtype).requires_grad_(False)
    g = torch.Generator().manual_seed(seed)
    return manifold, manifold.random_point(*shape, dtype=dtype, generator=g)


def tangents(manifold: m.Manifold, x: Tensor, count: int = 1, seed: int = 1) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [manifold.random_tangent(x, generator=g) for _ in range(count)]


def reachable(case: Case, manifold: m.Manifold, x: Tensor, seed: int = 2) -> tuple[Tensor, Tensor]:
    """Return a vector no longer than the case's reach, and the point it leads to."""
    (v,) = tangents(manifold, x, seed=seed)
    v = case.reach * v / (1 + manifold.norm(x, v))[..., None]
    return v, manifold.exp(x, v)


__all__ = [
    "MANIFOLDS",
    "Case",
    "points",
    "reachable",
    "tangents",
]
