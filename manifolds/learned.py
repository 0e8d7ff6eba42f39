r"""Metrics with parameters: charts to be trained, positive definite by construction.

Every class has an attribute ``floor``, a lower bound of the eigenvalues of g(x) that holds at
every point and for all parameters; :class:`ConformalNetwork` has a ``ceiling`` as well. The
networks use tanh, so that metrics are smooth and have curvature. Parameters take part in
autodiff like any input: call ``backward`` on any geometric quantity, or put the manifold in
a module with a ``forward`` and use ``torch.func.functional_call``.

To add one: subclass :class:`LearnedChart` and give ``metric(x)``; override ``_geodesic_field``
and ``_acceleration`` where the structure of g makes them cheaper than one evaluation and
one reverse pass of it.
"""

import math
from collections.abc import Sequence
from typing import TypedDict, Unpack

import torch
from torch import Tensor, nn

from darboux import _autodiff, _checks
from darboux._checks import GeometryError
from darboux._typing import Covector, Point, Scalar, Tangent
from darboux.manifolds._layers import (
    _SOFTPLUS_ONE,
    _eye,
    _gaussian,
    _network,
    _rate,
    _softplus,
)
from darboux.manifolds.chart import Chart
from darboux.manifolds.linalg import dot, log_det, matvec, outer, solve, solve_vector


class ChartOptions(TypedDict, total=False):
    """The keywords that every chart takes; see :class:`darboux.manifolds.Chart`."""

    method: str
    steps: int | None
    periods: Sequence[float] | None
    bounds: Sequence[tuple[float, float]] | None


class LearnedChart(Chart):
    """A chart whose metric has no eigenvalue below ``floor``, whatever its parameters."""

    trusted = True

    def __init__(self, dim: int, floor: float, **options: Unpack[ChartOptions]):
        super().__init__(dim, **options)
        if not (floor > 0 and math.isfinite(floor)):
            raise ValueError(f"{self.name}: floor is {floor}, expected a positive number")
        self.floor = float(floor)

    def _check_is_point(self, where: str, name: str, x: Tensor) -> None:
        super()._check_is_point(where, name, x)
        # the sum of finite numbers is finite, short of an overflow that is worth knowing too
        _checks.check_that(
            where,
            lambda: x.new_tensor(
                [float(_checks.values(p).sum()) for p in self.parameters()]
            ).isfinite(),
            "a parameter holds NaN or infinity; training has diverged",
            GeometryError,
        )


# -- networks -----------------------------------------------------------------------------


class CholeskyNetwork(LearnedChart):
    r"""Any metric field at all, by a network for its Cholesky factor.

    .. math:: g(x) = L(x)\,L(x)^T + \mathrm{floor}\cdot I

    L is lower triangular, its diagonal a softplus of the network's output, near the identity
    at the start.

    >>> generator = torch.Generator().manual_seed(0)
    >>> CholeskyNetwork(3, generator=generator).metric(torch.zeros(5, 3)).shape
    torch.Size([5, 3, 3])
    """

    def __init__(
        self,
        dim: int,
        width: int = 64,
        depth: int = 2,
        floor: float = 1e-3,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
        **options: Unpack[ChartOptions],
    ):
        super().__init__(dim, floor, **options)
        size = dim * (dim + 1) // 2
        self.network = _network(dim, size, width, depth, dtype, device, generator)
        # place in the network's output of entry (i, j): the diagonal first, then what is
        # below it, and a zero for what is above
        place = torch.full((dim, dim), size, dtype=torch.long, device=device)
        i, j = torch.tril_indices(dim, dim, -1, device=device)
        place[i, j] = torch.arange(dim, size, device=device)
        place.diagonal().copy_(torch.arange(dim))
        self.register_buffer("_place", place.flatten(), persistent=False)
        self._place: Tensor

    def factor(self, x: Point) -> Tensor:
        """Return the lower triangular factor ``L (..., d, d)``."""
        out = self.network(x)
        return self._arrange(_softplus(out[..., : self.dim] + _SOFTPLUS_ONE), out)

    def _arrange(self, diagonal: Tensor, out: Tensor) -> Tensor:
        entries = torch.cat([diagonal, out[..., self.dim :], torch.zeros_like(out[..., :1])], -1)
        return entries[..., self._place].unflatten(-1, (self.dim, self.dim))

    def metric(self, x: Point) -> Tensor:
        low = self.factor(x)
        return low @ low.mT + self.floor * _eye(x)

    def _acceleration(self, x: Point, v: Tangent) -> Tangent:
        out, rate = _rate(self.network, x, v)
        d = self.dim
        low = self._arrange(_softplus(out[..., :d] + _SOFTPLUS_ONE), out)
        d_low = self._arrange(torch.sigmoid(out[..., :d] + _SOFTPLUS_ONE) * rate[..., :d], rate)
        w = matvec(low.mT, v)
        _, half_grad = _autodiff.pullback(self.factor, x, lambda _: outer(v, w))
        dg_v = matvec(d_low, w) + matvec(low, matvec(d_low.mT, v))
        return solve_vector(low @ low.mT + self.floor * _eye(x), half_grad - dg_v)


class ConformalNetwork(LearnedChart):
    r"""A metric that stretches all directions alike, between ``floor`` and ``ceiling``.

    .. math:: g(x) = e^{2\varphi(x)} I, \qquad
        2\varphi = \log\sqrt{\mathrm{floor}\cdot\mathrm{ceiling}}
        + \tfrac12\log(\mathrm{ceiling}/\mathrm{floor})\,\tanh f(x)

    Geodesics need only the gradient of :math:`\varphi`, curvature its Hessian.
    """

    def __init__(
        self,
        dim: int,
        width: int = 64,
        depth: int = 2,
        floor: float = 0.1,
        ceiling: float = 10.0,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
        **options: Unpack[ChartOptions],
    ):
        super().__init__(dim, floor, **options)
        if not (ceiling > floor and math.isfinite(ceiling)):
            raise ValueError(
                f"{self.name}: ceiling is {ceiling}, expected a number above floor = {floor}"
            )
        self.ceiling = float(ceiling)
        self.network = _network(dim, 1, width, depth, dtype, device, generator)

    def potential(self, x: Point) -> Scalar:
        r"""Return :math:`\varphi(x)`, half the log of the stretch."""
        middle = 0.25 * math.log(self.floor * self.ceiling)
        half = 0.25 * math.log(self.ceiling / self.floor)
        return middle + half * torch.tanh(self.network(x)[..., 0])

    def metric(self, x: Point) -> Tensor:
        return torch.exp(2 * self.potential(x))[..., None, None] * _eye(x)

    def _flat(self, x: Point, v: Tangent) -> Covector:
        return torch.exp(2 * self.potential(x))[..., None] * v

    def _sharp(self, x: Point, p: Covector) -> Tangent:
        return torch.exp(-2 * self.potential(x))[..., None] * p

    def _log_volume(self, x: Point) -> Scalar:
        return self.dim * self.potential(x)

    def _geodesic_field(self, x: Point, p: Covector) -> tuple[Tangent, Covector]:
        velocity = x

        def cotangent(phi: Tensor) -> Tensor:
            nonlocal velocity
            velocity = torch.exp(-2 * phi)[..., None] * p
            return dot(p, velocity)

        _, force = _autodiff.pullback(self.potential, x, cotangent)
        return velocity, force

    def _acceleration(self, x: Point, v: Tangent) -> Tangent:
        d_phi = _autodiff.gradient(self.potential, x)
        return dot(v, v)[..., None] * d_phi - 2 * dot(d_phi, v)[..., None] * v

    def _riemann(self, x: Point) -> Tensor:
        # R^l_kij = d_lj T_ki + d_ki T_lj - d_li T_kj - d_kj T_li (Kronecker deltas) with
        # T = Hess phi - dphi dphi^T + |dphi|^2 I / 2; Besse (1987), Theorem 1.159
        _, d_phi, d2_phi = _autodiff.jet(self.potential, x)
        eye = _eye(x)
        t = d2_phi - outer(d_phi, d_phi) + 0.5 * dot(d_phi, d_phi)[..., None, None] * eye
        a = torch.einsum("lj,...ki->...lkij", eye, t) + torch.einsum("ki,...lj->...lkij", eye, t)
        return a - a.transpose(-1, -2)


class DiagonalNetwork(LearnedChart):
    r"""A metric that stretches each coordinate by itself.

    .. math:: g(x) = \operatorname{diag} a_i(x), \qquad
        a = \mathrm{floor} + \operatorname{softplus} f(x)
    """

    def __init__(
        self,
        dim: int,
        width: int = 64,
        depth: int = 2,
        floor: float = 1e-3,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
        **options: Unpack[ChartOptions],
    ):
        super().__init__(dim, floor, **options)
        self.network = _network(dim, dim, width, depth, dtype, device, generator)

    def diagonal(self, x: Point) -> Tensor:
        """Return the diagonal of g, ``(..., d)``."""
        return self.floor + _softplus(self.network(x) + _SOFTPLUS_ONE)

    def metric(self, x: Point) -> Tensor:
        return torch.diag_embed(self.diagonal(x))

    def _flat(self, x: Point, v: Tangent) -> Covector:
        return self.diagonal(x) * v

    def _sharp(self, x: Point, p: Covector) -> Tangent:
        return p / self.diagonal(x)

    def _log_volume(self, x: Point) -> Scalar:
        return 0.5 * self.diagonal(x).log().sum(-1)

    def _geodesic_field(self, x: Point, p: Covector) -> tuple[Tangent, Covector]:
        velocity = x

        def cotangent(a: Tensor) -> Tensor:
            nonlocal velocity
            velocity = p / a
            return 0.5 * velocity.square()

        _, force = _autodiff.pullback(self.diagonal, x, cotangent)
        return velocity, force

    def _acceleration(self, x: Point, v: Tangent) -> Tangent:
        out, rate = _rate(self.network, x, v)
        rate = torch.sigmoid(out + _SOFTPLUS_ONE) * rate
        a, half_grad = _autodiff.pullback(self.diagonal, x, lambda _: 0.5 * v.square())
        return (half_grad - rate * v) / a


class LowRankNetwork(LearnedChart):
    r"""The Euclidean metric and ``rank`` directions along which it is longer.

    .. math:: g(x) = I + U(x)\,U(x)^T, \qquad U: \mathbb{R}^d \to \mathbb{R}^{d\times r}

    The smallest eigenvalue is 1. Systems are solved through the r by r capacitance matrix
    :math:`I + U^TU` (Woodbury), and no d by d matrix is formed along geodesics.
    """

    def __init__(
        self,
        dim: int,
        rank: int = 1,
        width: int = 64,
        depth: int = 2,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
        **options: Unpack[ChartOptions],
    ):
        super().__init__(dim, 1.0, **options)
        if not 1 <= rank <= dim:
            raise ValueError(f"{self.name}: rank is {rank}, expected 1 to dim = {dim}")
        self.rank = rank
        self.network = _network(dim, dim * rank, width, depth, dtype, device, generator)

    def factor(self, x: Point) -> Tensor:
        """Return ``U (..., d, r)``."""
        return self.network(x).unflatten(-1, (self.dim, self.rank))

    def metric(self, x: Point) -> Tensor:
        u = self.factor(x)
        return u @ u.mT + _eye(x)

    def _flat(self, x: Point, v: Tangent) -> Covector:
        u = self.factor(x)
        return v + matvec(u, matvec(u.mT, v))

    def _sharp(self, x: Point, p: Covector) -> Tangent:
        return _woodbury(self.factor(x), p)

    def _log_volume(self, x: Point) -> Scalar:
        return 0.5 * log_det(_capacitance(self.factor(x)))

    def _trace(self, x: Point, form: Tensor) -> Scalar:
        u = self.factor(x)
        inner = solve(_capacitance(u), u.mT @ form @ u).diagonal(dim1=-2, dim2=-1).sum(-1)
        return form.diagonal(dim1=-2, dim2=-1).sum(-1) - inner

    def _geodesic_field(self, x: Point, p: Covector) -> tuple[Tangent, Covector]:
        velocity = x

        def cotangent(u: Tensor) -> Tensor:
            nonlocal velocity
            velocity = _woodbury(u, p)
            return outer(velocity, matvec(u.mT, velocity))

        _, force = _autodiff.pullback(self.factor, x, cotangent)
        return velocity, force

    def _acceleration(self, x: Point, v: Tangent) -> Tangent:
        rate = _rate(self.network, x, v)[1].unflatten(-1, (self.dim, self.rank))
        u, half_grad = _autodiff.pullback(self.factor, x, lambda u: outer(v, matvec(u.mT, v)))
        dg_v = matvec(rate, matvec(u.mT, v)) + matvec(u, matvec(rate.mT, v))
        return _woodbury(u, half_grad - dg_v)


def _capacitance(u: Tensor) -> Tensor:
    inner = u.mT @ u
    return inner + torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)


def _woodbury(u: Tensor, p: Tensor) -> Tensor:
    """Solve ``(I + U U^T) v = p``."""
    return p - matvec(u, solve_vector(_capacitance(u), matvec(u.mT, p)))


# -- bumps --------------------------------------------------------------------------------


class TokenBumps(LearnedChart):
    r"""The Euclidean metric, lengthened near each of n centres along a direction of its own.

    .. math:: g(x) = I + \sum_i \alpha_i\, e^{-|x - \mu_i|^2/2\sigma_i^2}\, v_i v_i^T,
        \qquad \alpha_i \ge 0

    The smallest eigenvalue is 1. ``centers`` and ``directions`` have shape ``(n, d)``,
    ``amplitudes`` ``(n,)``, ``sigma`` is a number or ``(n,)``. Leading dimensions make one
    metric for each element of a batch: they must match the last leading dimensions of ``x``.

    The tensors may come out of a network, and gradients then flow into it. With ``learnable``
    they are copied into parameters, :math:`\alpha` and :math:`\sigma` as a square root and a
    logarithm, which training cannot make negative.
    """

    centers: Tensor
    directions: Tensor
    _amplitudes: Tensor
    _sigma: Tensor
    _root: Tensor
    _log_sigma: Tensor

    def __init__(
        self,
        centers: Tensor,
        directions: Tensor,
        amplitudes: Tensor,
        sigma: Tensor | float,
        *,
        learnable: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **options: Unpack[ChartOptions],
    ):
        where = "TokenBumps"
        _checks.check_tensor(where, "centers", centers)
        if centers.dim() < 2:
            raise ValueError(
                f"{where}: centers has shape {tuple(centers.shape)}, expected (..., n, d)"
            )
        width = torch.as_tensor(sigma, dtype=centers.dtype, device=centers.device)
        for name, value, shape in (
            ("directions", directions, centers.shape),
            ("amplitudes", amplitudes, centers.shape[:-1]),
            ("sigma", width, centers.shape[:-1] if width.dim() else ()),
        ):
            _checks.check_tensor(where, name, value)
            if value.shape != shape:
                raise ValueError(
                    f"{where}: {name} has shape {tuple(value.shape)}, expected {tuple(shape)} "
                    f"to match centers of shape {tuple(centers.shape)}"
                )
        _checks.check_finite(
            where, centers=centers, directions=directions, amplitudes=amplitudes, sigma=width
        )
        _checks.check_that(where, lambda: amplitudes >= 0, "amplitudes holds negative numbers")
        _checks.check_that(where, lambda: width > 0, "sigma must be positive")
        super().__init__(centers.shape[-1], 1.0, **options)
        given = {
            "centers": centers,
            "directions": directions,
            "_root" if learnable else "_amplitudes": amplitudes.sqrt() if learnable else amplitudes,
            "_log_sigma" if learnable else "_sigma": width.log() if learnable else width,
        }
        for name, value in given.items():
            value = value.to(dtype=dtype or centers.dtype, device=device or centers.device)
            if learnable:
                self.register_parameter(name, nn.Parameter(value.detach().clone()))
            else:
                self.register_buffer(name, value)
        self.learnable = learnable

    @property
    def amplitudes(self) -> Tensor:
        r"""The heights :math:`\alpha_i` of the bumps."""
        return self._root.square() if self.learnable else self._amplitudes

    @property
    def sigma(self) -> Tensor:
        r"""The widths :math:`\sigma_i` of the bumps."""
        return self._log_sigma.exp() if self.learnable else self._sigma

    def _bumps(self, x: Point) -> tuple[Tensor, Tensor]:
        # heights alpha_i exp(..) (..., n) and scaled offsets (x - mu_i) / sigma_i^2 (..., n, d)
        offset = x.unsqueeze(-2) - self.centers
        precision = self.sigma.square().reciprocal()
        scaled = precision[..., None] * offset
        return self.amplitudes * _gaussian(dot(offset, scaled)), scaled

    def _sum(self, heights: Tensor) -> Tensor:
        v = self.directions
        return v.mT @ (heights.unsqueeze(-1) * v)

    def metric(self, x: Point) -> Tensor:
        return self._sum(self._bumps(x)[0]) + _eye(x)

    def _flat(self, x: Point, v: Tangent) -> Covector:
        along = matvec(self.directions, v)
        return v + matvec(self.directions.mT, self._bumps(x)[0] * along)

    def _geodesic_field(self, x: Point, p: Covector) -> tuple[Tangent, Covector]:
        heights, scaled = self._bumps(x)
        velocity = solve_vector(self._sum(heights) + _eye(x), p)
        return velocity, self._half_gradient(heights, scaled, matvec(self.directions, velocity))

    def _half_gradient(self, heights: Tensor, scaled: Tensor, along: Tensor) -> Covector:
        # half the gradient in x of v^T g(x) v, where along = <v_i, v>
        return matvec(scaled.mT, -0.5 * heights * along.square())

    def _acceleration(self, x: Point, v: Tangent) -> Tangent:
        heights, scaled = self._bumps(x)
        along = matvec(self.directions, v)
        rate = -heights * matvec(scaled, v)
        dg_v = matvec(self.directions.mT, rate * along)
        force = self._half_gradient(heights, scaled, along) - dg_v
        return solve_vector(self._sum(heights) + _eye(x), force)
