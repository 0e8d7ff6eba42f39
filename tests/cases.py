"""The spaces that every law is tested on: to test a new one, add a line."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from darboux import manifolds as m


@dataclass(frozen=True)
class Case:
    """A space, and how far apart the points of a test may be."""

    name: str
    make: Callable[[], m.Manifold]
    reach: float = 0.6  # length of the tangent vectors used, below the injectivity radius
    spread: float = 1.0  # scale of the normal numbers that random points are made of

    @property
    def is_chart(self) -> bool:
        return isinstance(self.make(), m.Chart)


class Bump(m.Chart):
    """The user of the first page: a metric written down, nothing else."""

    def metric(self, x: Tensor) -> Tensor:
        w = torch.exp(-x.square().sum(-1))[..., None, None]
        return torch.eye(self.dim, dtype=x.dtype, device=x.device) * (1 + w)


class Anisotropic(m.Chart):
    """A metric without symmetries, positive definite everywhere, in any dimension."""

    def metric(self, x: Tensor) -> Tensor:
        d = self.dim
        i = torch.arange(d * d, dtype=x.dtype, device=x.device).reshape(d, d)
        a = 0.3 * torch.sin(i + (x @ torch.cos(i))[..., None] * (1 + 0.1 * i))
        eye = torch.eye(d, dtype=x.dtype, device=x.device)
        return eye + a @ a.mT


def bowl(x: Tensor) -> Tensor:
    a, b = x.unbind(-1)
    return torch.stack([a, b, 0.4 * a**2 - 0.3 * a * b + 0.2 * b**3], -1)


def vase(u: Tensor) -> tuple[Tensor, Tensor]:
    return 1.2 + 0.4 * torch.sin(u), u


def tilt(x: Tensor) -> Tensor:
    return 0.3 * torch.sin(x[..., 0]) + 0.1 * x[..., 1].square()


def swell(x: Tensor) -> Tensor:
    return 1.3 + 0.3 * torch.sin(x[..., 0])


def decoder(dim: int) -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(dim, 16), nn.Tanh(), nn.Linear(16, 7))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def bumps() -> m.TokenBumps:
    centers, directions = torch.randn(2, 4, 2, generator=generator(), dtype=F64)
    return m.TokenBumps(centers, directions, torch.tensor([0.5, 1.0, 0.2, 0.8], dtype=F64), 0.9)


def spread() -> m.RBFUncertainty:
    return m.RBFUncertainty(torch.randn(5, 2, generator=generator(), dtype=F64), 1.0, floor=0.5)


F64 = torch.float64
SKEW = torch.tensor([[1.0, 0.0], [0.4, 0.9]], dtype=F64) * 5
MANIFOLDS = [
    Case("euclidean", lambda: m.Euclidean(3)),
    Case("flat_torus", lambda: m.FlatTorus(2)),
    Case("skew_torus", lambda: m.FlatTorus(lattice=SKEW)),
    Case("sphere", lambda: m.Sphere(2)),
    Case("big_sphere", lambda: m.Sphere(3, radius=2.0)),
    Case("stereographic_sphere", lambda: m.Stereographic(3, curvature=1.0)),
    Case("ball", lambda: m.Hyperbolic(2)),
    Case("ball_3", lambda: m.Hyperbolic(3, curvature=-0.5)),
    Case("half_space", lambda: m.HalfSpace(3)),
    Case("torus", lambda: m.TorusOfRevolution(R=2.0, r=1.0)),
    Case("vase", lambda: m.SurfaceOfRevolution(vase)),
    Case("ellipsoid", lambda: m.Ellipsoid(1.0, 1.5, 2.0), reach=0.4),
    Case("fisher", lambda: m.FisherGaussian()),
    Case("fisher_3", lambda: m.FisherGaussian(3)),
    Case("bowl", lambda: m.Pullback(bowl, 2)),
    Case("product", lambda: m.Product(m.Hyperbolic(2), m.TorusOfRevolution())),
    Case("mixed_product", lambda: m.Product(m.Sphere(2), m.HalfSpace(2))),
    Case("conformal", lambda: m.Conformal(m.Euclidean(3), tilt)),
    Case("conformal_torus", lambda: m.Conformal(m.TorusOfRevolution(), tilt)),
    Case("warped", lambda: m.Warped(m.Euclidean(1), m.Stereographic(2, curvature=1.0), swell)),
    Case("cholesky_net", lambda: m.CholeskyNetwork(2, width=16, generator=generator(), dtype=F64)),
    Case(
        "conformal_net", lambda: m.ConformalNetwork(3, width=16, generator=generator(), dtype=F64)
    ),
    Case("diagonal_net", lambda: m.DiagonalNetwork(3, width=16, generator=generator(), dtype=F64)),
    Case(
        "low_rank_net", lambda: m.LowRankNetwork(3, 1, width=16, generator=generator(), dtype=F64)
    ),
    Case("token_bumps", bumps),
    Case("decoder", lambda: m.DecoderPullback(decoder(2).double(), spread(), dim=2)),
    Case("bump", lambda: Bump(2)),
    Case("anisotropic", lambda: Anisotropic(3)),
    Case("anisotropic_4", lambda: Anisotropic(4)),
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
