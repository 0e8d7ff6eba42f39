r"""The metric of a decoder's latent space, and the uncertainty that keeps geodesics near the data.

A decoder is any callable, or two. What ``_layers.py`` knows (``nn.Sequential``, ``nn.Linear``,
tanh, sigmoid) and modules with a method ``push(jet)`` of their own are differentiated by hand, the
rest by autodiff.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Unpack

import torch
from torch import Tensor, nn

from darboux import _checks
from darboux._typing import Point, Tangent
from darboux.manifolds import boundary
from darboux.manifolds._layers import Jet, _eye, _gaussian, push
from darboux.manifolds.learned import ChartOptions, LearnedChart
from darboux.manifolds.linalg import dot, matvec, solve_vector


class RBFUncertainty(nn.Module):
    r"""A standard deviation that is small at the data and grows to a constant away from them.

    .. math:: \sigma_a(x)^{-2} = \mathrm{floor} + \sum_i w_{ai}\, e^{-|x - c_i|^2/2h^2},
        \qquad w_{ai} > 0

    Maps ``(..., d)`` to ``(..., outputs)``. The weights start equal, such that the mean
    precision at the centres is ``floor + precision``; ``floor`` is the precision far from
    all centres, ``bandwidth`` is h. Que and Belkin (2016), as used in Arvanitidis, Hansen and
    Hauberg (2018), section 4.
    """

    def __init__(
        self,
        centers: Tensor,
        bandwidth: float,
        outputs: int = 1,
        *,
        precision: float = 1.0,
        floor: float = 1e-2,
    ):
        super().__init__()
        where = "RBFUncertainty"
        _checks.check_tensor(where, "centers", centers)
        if centers.dim() != 2 or 0 in centers.shape:
            raise ValueError(f"{where}: centers has shape {tuple(centers.shape)}, expected (n, d)")
        _checks.check_finite(where, centers=centers)
        for name, value in (("bandwidth", bandwidth), ("precision", precision), ("floor", floor)):
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{where}: {name} is {value}, expected a positive number")
        if outputs < 1:
            raise ValueError(f"{where}: outputs is {outputs}, expected at least 1")
        self.bandwidth = float(bandwidth)
        self.floor = float(floor)
        self.register_buffer("centers", centers.detach().clone())
        self.centers: Tensor
        level = math.log(precision / float(self._kernel(self.centers).sum(-1).mean()))
        self.log_weights = nn.Parameter(centers.new_full((outputs, len(centers)), level))

    def _kernel(self, x: Tensor) -> Tensor:
        offset = (x.unsqueeze(-2) - self.centers) / self.bandwidth
        return _gaussian(dot(offset, offset))

    def forward(self, x: Tensor) -> Tensor:
        """Return the standard deviation ``(..., outputs)`` at ``x (..., d)``."""
        precision = self._kernel(x) @ self.log_weights.exp().mT + self.floor
        return precision.rsqrt()

    def push(self, jet: Jet) -> Jet:
        """Carry derivatives through ``forward``, in closed form."""
        x, first, second = jet
        h = self.bandwidth**-2
        offset = h * (x.unsqueeze(-2) - self.centers)
        kernel, weights = self._kernel(x), self.log_weights.exp().mT
        slope = -matvec(offset, first)  # (m, ..., n), of the exponent
        precision = kernel @ weights + self.floor
        rate = (kernel * slope) @ weights
        sigma = precision.rsqrt()
        cube = -0.5 * sigma / precision
        if second is None:
            return Jet(sigma, cube * rate, None)
        bend = (
            slope[-1].square() - matvec(offset, second) - h * dot(first[-1], first[-1])[..., None]
        )
        change = (kernel * bend) @ weights
        return Jet(sigma, cube * rate, cube * (change - 1.5 * rate[-1].square() / precision))


class DecoderPullback(LearnedChart):
    r"""The metric that a stochastic decoder gives its latent space.

    .. math:: g(x) = J_\mu(x)^T J_\mu(x) + J_\sigma(x)^T J_\sigma(x) + \mathrm{floor}\cdot I

    It is the expected pullback of the Euclidean metric by
    :math:`\mu(x) + \sigma(x)\odot\epsilon`: lengths of latent curves are those of the data
    they decode to, and curves that leave the data pay for the uncertainty they gain.
    Arvanitidis, Hansen and Hauberg (2018), "Latent space oddity", equation 6.

    ``mean`` and ``std`` map ``(..., dim)`` to ``(..., outputs)`` and must be twice
    differentiable (tanh or softplus, not relu); ``std`` may have one output, which then counts
    for all. :class:`RBFUncertainty` is made for it. All Jacobians are ``dim`` forward passes
    in one batch; geodesics need no more than second directional derivatives.
    """

    def __init__(
        self,
        mean: Callable[[Tensor], Tensor],
        std: Callable[[Tensor], Tensor] | None = None,
        *,
        dim: int,
        floor: float = 1e-3,
        **options: Unpack[ChartOptions],
    ):
        super().__init__(dim, floor, **options)
        self.mean = mean
        self.std = std

    def embed(self, x: Point) -> Tensor:
        r"""Return :math:`(\mu, \sigma)(x)`, whose pullback the metric is."""
        parts = [self.mean(x)] if self.std is None else [self.mean(x), self.std(x)]
        return self._join(x, parts)

    def _join(self, x: Point, parts: list[Tensor]) -> Tensor:
        lead, outputs = x.shape[:-1], (parts[0].shape or (0,))[-1]
        allowed = ((*lead, outputs),), ((*lead, outputs), (*lead, 1))
        for name, part, shapes in zip(("mean", "std"), parts, allowed, strict=False):
            if part.shape not in shapes:
                raise ValueError(
                    f"{self.name}: {name}(x) has shape {tuple(part.shape)} for x of shape "
                    f"{tuple(x.shape)}, expected {' or '.join(map(str, shapes))}"
                )
        if len(parts) == 1:
            return parts[0]
        return torch.cat([parts[0], self._weight(parts) * parts[1]], -1)

    @staticmethod
    def _weight(parts: list[Tensor]) -> float:
        # one deviation for all outputs: its squared Jacobian counts once for each of them
        return (parts[0].shape[-1] / parts[1].shape[-1]) ** 0.5

    def _jets(self, x: Point, v: Tangent | None) -> tuple[Tensor, Tensor | None]:
        # J (..., a, d) and D^2 f[v, v] (..., a) of f = (mean, std)
        d = self.dim
        basis = _eye(x).reshape(d, *[1] * (x.dim() - 1), d).expand(d, *x.shape)
        if v is None:
            start = Jet(x, basis, None)
        else:
            start = Jet(x, torch.cat([basis, v.expand(x.shape).unsqueeze(0)]), torch.zeros_like(x))
        jets = [push(f, start) for f in (self.mean, self.std) if f is not None]
        values = [jet.value for jet in jets]
        self._join(x, values)
        if len(jets) == 2:
            w = self._weight(values)
            value, first, second = jets[1]
            jets[1] = Jet(w * value, w * first, None if second is None else w * second)
        jac = torch.cat([jet.first[:d] for jet in jets], -1).movedim(0, -1)
        seconds = [jet.second for jet in jets if jet.second is not None]
        return jac, torch.cat(seconds, -1) if seconds else None

    def metric(self, x: Point) -> Tensor:
        jac, _ = self._jets(x, None)
        return jac.mT @ jac + self.floor * _eye(x)

    def _acceleration(self, x: Point, v: Tangent) -> Tangent:
        # the lowered symbols of a pullback are <d_l f, d_i d_j f>; the floor is constant
        jac, second = self._jets(x, v)
        assert second is not None
        g = jac.mT @ jac + self.floor * _eye(x)
        return -solve_vector(g, (jac * second.unsqueeze(-1)).sum(-2))

    # -- geodesics between points ---------------------------------------------------------
    #
    # Latent metrics of trained decoders are too hilly for Newton's method from the straight
    # line: of 100 random pairs of handwritten digits it connects 70, and 98 from here. A decoder
    # trained with weight decay is smoother: 40 of 40, and the velocities are good to 1e-9
    # instead of 1e-6 in the median.

    def shortest_path(self, x: Point, y: Point, pieces: int = 64, iterations: int = 40) -> Point:
        """Return a discrete geodesic ``(pieces + 1, ..., d)`` from ``x`` to ``y``, no derivatives.

        Minimises the sum of squared distances between successive points in data space, from
        the straight line, by Levenberg and Marquardt's method: each step shortens the curve,
        or is not taken, so that it always ends near a minimum. Second order in ``1 / pieces``.
        """
        x, y = self._door("shortest_path", x, points=("y",), y=y)
        with torch.no_grad():
            return self._straighten(x, y, pieces, iterations)

    def _straighten(self, x: Tensor, y: Tensor, pieces: int, iterations: int) -> Tensor:
        lead, d, inner = x.shape[:-1], self.dim, pieces - 1
        ends = [t.reshape(-1, d) for t in (x, y)]
        t = torch.linspace(0, 1, pieces + 1, dtype=x.dtype, device=x.device)[:, None, None]
        path = ends[0] + t * (ends[1] - ends[0])  # (pieces + 1, batch, d)
        batch, root = path.shape[1], self.floor**0.5
        i = torch.arange(inner, device=x.device)

        def embedded(z: Tensor) -> Tensor:
            return torch.cat([self.embed(z), root * z], -1)

        gaps = embedded(path).diff(dim=0)
        energy = gaps.square().sum((0, -1))
        damping = torch.full_like(energy, 1e-3)
        for _ in range(iterations):
            jac = self._jets(path[1:-1], None)[0]
            jac = torch.cat([jac, (root * _eye(x)).expand(*jac.shape[:-2], d, d)], -2)
            slope = ((gaps[:-1] - gaps[1:]).unsqueeze(-2) @ jac).squeeze(-2)
            # block tridiagonal: 2 J_i^T J_i on the diagonal, -J_i^T J_{i+1} beside it
            matrix = path.new_zeros(batch, inner, d, inner, d)
            matrix[:, i, :, i, :] = 2 * jac.mT @ jac
            beside = -jac[:-1].mT @ jac[1:]
            matrix[:, i[:-1], :, i[1:], :] = beside
            matrix[:, i[1:], :, i[:-1], :] = beside.mT
            matrix = matrix.flatten(3).flatten(1, 2)
            diagonal = matrix.diagonal(dim1=-2, dim2=-1)
            diagonal.mul_(1 + damping[:, None])
            factor = torch.linalg.cholesky_ex(matrix)[0]
            step = torch.cholesky_solve(-slope.movedim(0, 1).reshape(batch, -1, 1), factor)
            trial = path.clone()
            trial[1:-1] += step.reshape(batch, inner, d).movedim(0, 1)
            trial_gaps = embedded(trial).diff(dim=0)
            trial_energy = trial_gaps.square().sum((0, -1))
            better = trial_energy < energy
            gain = torch.where(better, 1 - trial_energy / energy, 0.0)
            path = torch.where(better[:, None], trial, path)
            gaps = torch.where(better[:, None], trial_gaps, gaps)
            energy = torch.where(better, trial_energy, energy)
            damping = torch.where(better, damping / 5, damping * 10).clamp(1e-8, 1e8)
            if not (gain > 1e-5).any() and bool((damping < 1).all() | (energy == 0).all()):
                break
        return path.reshape(pieces + 1, *lead, d)

    def _boundary_problem(self) -> boundary.Problem:
        path = partial(self._straighten, pieces=64, iterations=40)
        return super()._boundary_problem()._replace(path=path)
