"""The formulas from which ``geoopt_bridge.py`` derives the geometry of each manifold of geoopt.

To add one: subclass :class:`Rule` and give it a line in :data:`RULES`. What is not there is taken
as geoopt has it, by :class:`Foreign`.
"""

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from darboux import _smooth
from darboux._checks import GeometryError
from darboux.manifolds.linalg import dot, is_positive

with warnings.catch_warnings():  # geoopt compiles with torch.jit.script, which is deprecated
    warnings.simplefilter("ignore", DeprecationWarning)
    import geoopt
    from geoopt.manifolds.siegel.vvd_metrics import RiemannianMetric


def constant(owner: torch.nn.Module, name: str) -> Callable[[], Tensor | float]:
    """Return how to read a constant: a float, which takes any dtype, unless it is learnable."""
    # Decided once: inside torch.func, requires_grad does not say what autograd sees outside.
    if any(p.requires_grad for p in owner.parameters()):
        return lambda: getattr(owner, name)
    plain = float(getattr(owner, name))
    return lambda: plain


class Rule:
    """What the bridge must know of a space; points and vectors have shape ``(..., *shape)``.

    ``lower(x, v)`` is the form whose product with u is the metric; ``span(x, v)`` any linear
    projection on the tangent space; ``exp`` the exponential, left out for an open part of an
    affine space, whose ``span`` must then not depend on x; ``log`` a first guess;
    ``mixed(x, u, w)`` is :math:`-\\Gamma(u, w)` where that is known.
    All but ``log``, ``project`` and ``random`` must be smooth under nested autodiff: Cholesky,
    ``matrix_exp`` and elementary functions of squares, no eigenvectors.
    """

    kind = "closed form"  # where there is an exp
    missing: tuple[str, ...] = ()
    rank: int | None = 1  #: number of dimensions of ``shape``; None: any
    #: no point conjugate to x lies on geodesics shorter than this: pi / sqrt(max curvature)
    radius = math.inf

    def __init__(self, base, shape: tuple[int, ...]):
        if self.rank not in (None, len(shape)):
            raise ValueError(
                f"Geoopt: shape is {shape}, expected {self.rank} dimensions for "
                f"{type(base).__name__}"
            )
        self.base, self.shape = base, shape
        if hasattr(base, "k"):  # the curvature, or its negative inverse
            self.k = constant(base, "k")
        self.dim = self.dimension()

    def knows(self, name: str) -> bool:
        """Say whether the rule gives ``exp``, ``log`` or ``mixed``."""
        return getattr(type(self), name) is not getattr(Rule, name)

    @property
    def closed(self) -> bool:
        return self.knows("exp")

    def exp(self, x: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError

    def log(self, x: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError

    def mixed(self, x: Tensor, u: Tensor, w: Tensor) -> Tensor:
        raise NotImplementedError

    def dimension(self) -> int:
        return math.prod(self.shape)

    def lower(self, x: Tensor, v: Tensor) -> Tensor:
        return v

    def span(self, x: Tensor, v: Tensor) -> Tensor:
        return v

    def inside(self, x: Tensor) -> Tensor:
        return x.isfinite().flatten(-len(self.shape)).all(-1)

    def defect(self, x: Tensor) -> Tensor:
        return (x - self.project(x)).abs().flatten(-len(self.shape)).amax(-1)

    def project(self, x: Tensor) -> Tensor:
        return self.base.projx(x)

    def random(self, z: Tensor) -> Tensor:
        return self.project(z)


def _sym(a: Tensor) -> Tensor:
    return 0.5 * (a + a.mT)


def _positive_part(x: Tensor) -> Tensor:
    """Return a positive definite matrix near ``x``: itself where it is one, else |x|."""
    e, q = torch.linalg.eigh(_sym(x))
    floor = torch.finfo(x.dtype).eps ** 0.5 * e.abs().amax(-1, keepdim=True)
    lifted = (q * torch.maximum(e.abs(), floor).unsqueeze(-2)) @ q.mT
    return torch.where((e > 0).all(-1)[..., None, None], _sym(x), _sym(lifted))


def _whiten(low: Tensor, v: Tensor) -> Tensor:
    """Return ``low^{-1} v low^{-T}`` for symmetric ``v``."""
    half = torch.linalg.solve_triangular(low, v, upper=False)
    return _sym(torch.linalg.solve_triangular(low, half.mT, upper=False))


def _congruence(x: Tensor, v: Tensor) -> Tensor:
    """Return ``x^{-1} v x^{-1}`` for symmetric positive ``x``."""
    low = torch.linalg.cholesky_ex(x)[0]
    half = torch.cholesky_solve(v, low)
    return torch.cholesky_solve(half.mT, low).mT


class EuclideanRule(Rule):
    rank = None

    def mixed(self, x: Tensor, u: Tensor, w: Tensor) -> Tensor:
        return torch.zeros_like(w)

    def exp(self, x: Tensor, v: Tensor) -> Tensor:
        return x + v


class SphereRule(Rule):
    """The unit sphere, perhaps of a linear subspace."""

    radius = math.pi

    def dimension(self) -> int:
        projector = self.base.projector
        return (self.shape[0] if projector is None else round(float(projector.trace()))) - 1

    def span(self, x: Tensor, v: Tensor) -> Tensor:
        if self.base.projector is not None:
            v = v @ self.base.projector.to(v)
        return v - dot(x, v)[..., None] * x / dot(x, x)[..., None]

    def exp(self, x: Tensor, v: Tensor) -> Tensor:
        s = dot(v, v)[..., None]
        return _smooth.cosc(s) * x + _smooth.sinc(s) * v

    def mixed(self, x: Tensor, u: Tensor, w: Tensor) -> Tensor:
        return -dot(u, w)[..., None] * x

    def log(self, x: Tensor, y: Tensor) -> Tensor:
        u = self.span(x, y)
        size = u.norm(dim=-1, keepdim=True)
        return torch.atan2(size, dot(x, y)[..., None]) / size.clamp_min(1e-30) * u

    def project(self, x: Tensor) -> Tensor:
        if self.base.projector is not None:
            x = x @ self.base.projector.to(x)
        return x / x.norm(dim=-1, keepdim=True)


class LorentzRule(Rule):
    """The hyperboloid <x, x> = -k of curvature -1/k."""

    def dimension(self) -> int:
        return self.shape[0] - 1

    def lower(self, x: Tensor, v: Tensor) -> Tensor:
        return torch.cat([-v[..., :1], v[..., 1:]], -1)

    def span(self, x: Tensor, v: Tensor) -> Tensor:
        low = self.lower(x, x)
        return v - dot(low, v)[..., None] * x / dot(low, x)[..., None]

    def exp(self, x: Tensor, v: Tensor) -> Tensor:
        s = -(dot(self.lower(x, v), v) / self.k())[..., None]
        return _smooth.cosc(s) * x + _smooth.sinc(s) * v

    def mixed(self, x: Tensor, u: Tensor, w: Tensor) -> Tensor:
        return dot(self.lower(x, u), w)[..., None] / self.k() * x

    def log(self, x: Tensor, y: Tensor) -> Tensor:
        gap = y - x
        q = (dot(self.lower(x, gap), gap) / (4 * self.k())).clamp_min(0)
        distance = 2 * torch.asinh(q.sqrt())
        u = self.span(x, y)
        size = (dot(self.lower(x, u), u) / self.k()).clamp_min(1e-30).sqrt()
        return (distance / size)[..., None] * u

    def project(self, x: Tensor) -> Tensor:
        time = (self.k() + dot(x[..., 1:], x[..., 1:])).sqrt()
        return torch.cat([time[..., None], x[..., 1:]], -1)

    def inside(self, x: Tensor) -> Tensor:
        return super().inside(x) & (x[..., 0] > 0)


class StereographicRule(Rule):
    """The stereographic family with a curvature that is being learned."""

    def lower(self, x: Tensor, v: Tensor) -> Tensor:
        return 4 * v / (1 + self.k() * dot(x, x))[..., None].square()

    def mixed(self, x: Tensor, u: Tensor, w: Tensor) -> Tensor:
        slope = -2 * self.k() * x / (1 + self.k() * dot(x, x))[..., None]
        across = dot(slope, u)[..., None] * w + dot(slope, w)[..., None] * u
        return dot(u, w)[..., None] * slope - across

    def inside(self, x: Tensor) -> Tensor:
        return super().inside(x) & (1 + self.k() * dot(x, x) > 0)

    def defect(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x[..., 0])

    def random(self, z: Tensor) -> Tensor:
        return self.project(0.3 * z)


class StiefelRule(Rule):
    """Orthonormal frames x^T x = I with the canonical metric."""

    rank = 2
    radius = math.pi * 0.8**0.5  # curvature <= 5/4, Rentmeester (2013)

    def dimension(self) -> int:
        n, p = self.shape
        return n * p - p * (p + 1) // 2

    def lower(self, x: Tensor, v: Tensor) -> Tensor:
        return v - 0.5 * x @ (x.mT @ v)

    def span(self, x: Tensor, v: Tensor) -> Tensor:
        return v - x @ _sym(x.mT @ v)

    def exp(self, x: Tensor, v: Tensor) -> Tensor:
        # Edelman, Arias and Smith (1998), section 2.4.2, without the QR decomposition
        turn = v @ x.mT
        return torch.linalg.matrix_exp(turn - turn.mT - x @ (x.mT @ v) @ x.mT) @ x

    def mixed(self, x: Tensor, u: Tensor, w: Tensor) -> Tensor:
        # Edelman, Arias and Smith (1998), equation 2.41
        a, b = x.mT @ u, x.mT @ w
        return -_sym(u @ w.mT) @ x - x @ (_sym(u.mT @ w) + 0.5 * (a @ b + b @ a))

    def project(self, x: Tensor) -> Tensor:
        u, _, vh = torch.linalg.svd(x, full_matrices=False)
        return u @ vh

    def defect(self, x: Tensor) -> Tensor:
        gap = x.mT @ x - torch.eye(self.shape[1], dtype=x.dtype, device=x.device)
        return gap.abs().amax((-1, -2))


class EuclideanStiefelRule(StiefelRule):
    """Orthonormal frames with the metric of R^{n p}."""

    radius = math.pi  # curvature <= 1, Absil and Mataigne (2024)

    def lower(self, x: Tensor, v: Tensor) -> Tensor:
        return v

    def mixed(self, x: Tensor, u: Tensor, w: Tensor) -> Tensor:
        return -x @ _sym(u.mT @ w)

    def exp(self, x: Tensor, v: Tensor) -> Tensor:
        # Edelman, Arias and Smith (1998), equation 2.42
        a, s = x.mT @ v, v.mT @ v
        eye = torch.eye(self.shape[1], dtype=x.dtype, device=x.device).expand_as(a)
        block = torch.cat([torch.cat([a, -s], -1), torch.cat([eye, a], -1)], -2)
        left = torch.cat([x, v], -1) @ torch.linalg.matrix_exp(block)
        return left[..., : self.shape[1]] @ torch.linalg.matrix_exp(-a)


class SPDRule(Rule):
    """Positive definite matrices with the affine-invariant metric."""

    rank = 2

    def __init__(self, base, shape: tuple[int, ...]):
        if base.default_metric.value != "AIM":
            raise GeometryError(
                f"Geoopt: SymmetricPositiveDefinite with {base.default_metric} has no inner "
                "product in geoopt to go with its distance; only 'AIM' is bridged"
            )
        super().__init__(base, shape)

    def dimension(self) -> int:
        n = self.shape[0]
        return n * (n + 1) // 2

    def lower(self, x: Tensor, v: Tensor) -> Tensor:
        return _congruence(x, v)

    def span(self, x: Tensor, v: Tensor) -> Tensor:
        return _sym(v)

    def exp(self, x: Tensor, v: Tensor) -> Tensor:
        low = torch.linalg.cholesky_ex(_sym(x))[0]
        return low @ torch.linalg.matrix_exp(_whiten(low, v)) @ low.mT

    def mixed(self, x: Tensor, u: Tensor, w: Tensor) -> Tensor:
        return _sym(u @ torch.cholesky_solve(w, torch.linalg.cholesky_ex(_sym(x))[0]))

    def log(self, x: Tensor, y: Tensor) -> Tensor:
        low = torch.linalg.cholesky_ex(x)[0]
        e, q = torch.linalg.eigh(_whiten(low, y))
        return low @ (q * e.clamp_min(1e-30).log().unsqueeze(-2)) @ q.mT @ low.mT

    def inside(self, x: Tensor) -> Tensor:
        return is_positive(_sym(x))

    def defect(self, x: Tensor) -> Tensor:
        return (x - x.mT).abs().amax((-1, -2))

    def project(self, x: Tensor) -> Tensor:
        return _positive_part(x)

    def random(self, z: Tensor) -> Tensor:
        return torch.linalg.matrix_exp(0.5 * _sym(z))


class BirkhoffRule(Rule):
    """Doubly stochastic matrices with the Fisher metric."""

    rank = 2

    def dimension(self) -> int:
        return (self.shape[0] - 1) ** 2

    def lower(self, x: Tensor, v: Tensor) -> Tensor:
        return v / (x * self.shape[0])

    def span(self, x: Tensor, v: Tensor) -> Tensor:
        v = v - v.mean(-1, keepdim=True)
        return v - v.mean(-2, keepdim=True)

    def mixed(self, x: Tensor, u: Tensor, w: Tensor) -> Tensor:
        # u w / (2 x) of the positive orthant, projected orthogonally; Douik and Hassibi (2019)
        a = 0.5 * u * w / x
        rows, columns = a.sum(-1, keepdim=True), a.sum(-2).unsqueeze(-1)
        eye = torch.eye(self.shape[0], dtype=x.dtype, device=x.device)
        low = torch.linalg.cholesky_ex(eye - x.mT @ x + 1 / self.shape[0])[0]
        beta = torch.cholesky_solve(columns - x.mT @ rows, low)
        return a - x * (rows - x @ beta + beta.mT)

    def inside(self, x: Tensor) -> Tensor:
        return (x > 0).all(-1).all(-1) & super().inside(x)

    def defect(self, x: Tensor) -> Tensor:
        return torch.maximum((x.sum(-1) - 1).abs().amax(-1), (x.sum(-2) - 1).abs().amax(-1))

    def project(self, x: Tensor) -> Tensor:
        # geoopt's Sinkhorn iteration stops at 1e-5; the rest is linear
        return self.span(x, self.base.projx(x.abs())) + 1 / self.shape[0]

    def random(self, z: Tensor) -> Tensor:
        return self.project(z.abs() + 0.1)


class UpperHalfRule(Rule):
    """Complex symmetric matrices X + iY, Y positive definite (Siegel)."""

    rank = 3

    def __init__(self, base, shape: tuple[int, ...]):
        if not isinstance(base.metric, RiemannianMetric):
            raise GeometryError(
                f"Geoopt: {type(base).__name__} with {type(base.metric).__name__} is Finsler, not "
                "Riemannian; only SiegelMetricType.RIEMANNIAN is bridged"
            )
        super().__init__(base, (2, *shape))

    def dimension(self) -> int:
        n = self.shape[-1]
        return n * (n + 1)

    def lower(self, x: Tensor, v: Tensor) -> Tensor:
        return _congruence(x[..., 1:, :, :].expand_as(v), v)

    def span(self, x: Tensor, v: Tensor) -> Tensor:
        return _sym(v)

    def mixed(self, x: Tensor, u: Tensor, w: Tensor) -> Tensor:
        # Z'' = -i Z' Y^{-1} Z', Siegel (1943)
        low = torch.linalg.cholesky_ex(x[..., 1:, :, :].expand_as(w))[0]
        re, im = _sym(_unblock(_block(u) @ _block(torch.cholesky_solve(w, low)))).unbind(-3)
        return torch.stack([im, -re], -3)

    def inside(self, x: Tensor) -> Tensor:
        return is_positive(_sym(x[..., 1, :, :])) & super().inside(x)

    def defect(self, x: Tensor) -> Tensor:
        return (x - x.mT).abs().amax((-1, -2, -3))

    def project(self, x: Tensor) -> Tensor:
        return torch.stack([_sym(x[..., 0, :, :]), _positive_part(x[..., 1, :, :])], -3)

    def random(self, z: Tensor) -> Tensor:
        re, im = (0.5 * _sym(z)).unbind(-3)
        return torch.stack([re, torch.linalg.matrix_exp(im)], -3)


class BoundedDomainRule(UpperHalfRule):
    """Complex symmetric matrices of spectral norm below 1 (Siegel), isometric to the half-space."""

    def lower(self, x: Tensor, v: Tensor) -> Tensor:
        # 4 Re tr[(I - Z conj(Z))^{-1} U (I - conj(Z) Z)^{-1} conj(V)] in real 2n by 2n blocks,
        # Siegel (1943); geoopt has the two factors exchanged, which is not invariant
        a, b = (torch.linalg.cholesky_ex(self._gap(z))[0] for z in (_conj(x), x))
        half = torch.cholesky_solve(_block(v), a)
        return 4 * _unblock(torch.cholesky_solve(half.mT, b).mT)

    def mixed(self, x: Tensor, u: Tensor, w: Tensor) -> Tensor:
        # Z'' = -2 Z' conj(Z) (I - Z conj(Z))^{-1} Z'
        low = torch.linalg.cholesky_ex(self._gap(_conj(x)))[0]
        right = torch.cholesky_solve(_block(w), low)
        return -2 * _sym(_unblock(_block(u) @ _block(_conj(x)) @ right))

    def _gap(self, x: Tensor) -> Tensor:
        """Return the block form of ``I - conj(Z) Z``, symmetric and positive inside."""
        product = _block(_conj(x)) @ _block(x)
        return torch.eye(product.shape[-1], dtype=x.dtype, device=x.device) - _sym(product)

    def inside(self, x: Tensor) -> Tensor:
        return is_positive(self._gap(_sym(x))) & Rule.inside(self, x)

    def project(self, x: Tensor) -> Tensor:
        z = _sym(x)
        size = torch.linalg.matrix_norm(_block(z), 2)[..., None, None, None]
        return torch.where(size < 1, z, z / (size * (1 + 1e-3)))

    def random(self, z: Tensor) -> Tensor:
        z = 0.5 * _sym(z)
        return z / (1 + z.square().sum((-1, -2, -3), keepdim=True)).sqrt()


def _conj(x: Tensor) -> Tensor:
    return torch.stack([x[..., 0, :, :], -x[..., 1, :, :]], -3)


def _block(x: Tensor) -> Tensor:
    """Return the real form of complex matrices given as ``(..., 2, n, n)``."""
    re, im = x.unbind(-3)
    return torch.cat([torch.cat([re, -im], -1), torch.cat([im, re], -1)], -2)


def _unblock(b: Tensor) -> Tensor:
    n = b.shape[-1] // 2
    return torch.stack([b[..., :n, :n], b[..., n:, :n]], -3)


class Foreign(Rule):
    """A manifold that is not in the table, by its own methods; as smooth as they are."""

    kind = "geoopt"
    missing = ("smoothness of exp and inner is not checked",)
    rank = None

    def dimension(self) -> int:
        n = math.prod(self.shape)
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(*self.shape, dtype=torch.float64, generator=generator)
        x = self.base.projx(z).expand(n, *self.shape)
        rows = self.base.proju(x, torch.eye(n, dtype=z.dtype).unflatten(-1, self.shape))
        return int(torch.linalg.matrix_rank(rows.flatten(1)))

    def lower(self, x: Tensor, v: Tensor) -> Tensor:
        n = math.prod(self.shape)
        eye = torch.eye(n, dtype=x.dtype, device=x.device).unflatten(-1, self.shape)
        eye = eye.reshape(n, *[1] * (x.dim() - len(self.shape)), *self.shape)
        rows = self.base.inner(*torch.broadcast_tensors(x, eye, v))
        return rows.movedim(0, -1).unflatten(-1, self.shape)

    def span(self, x: Tensor, v: Tensor) -> Tensor:
        return self.base.proju(x, v)

    def exp(self, x: Tensor, v: Tensor) -> Tensor:
        return self.base.expmap(x, v)


#: geoopt's types and what is known of them; subclasses inherit
RULES: dict[type, type[Rule]] = {
    geoopt.Euclidean: EuclideanRule,
    geoopt.Sphere: SphereRule,
    geoopt.Stereographic: StereographicRule,
    geoopt.Lorentz: LorentzRule,
    geoopt.CanonicalStiefel: StiefelRule,
    geoopt.EuclideanStiefel: EuclideanStiefelRule,
    geoopt.SymmetricPositiveDefinite: SPDRule,
    geoopt.BirkhoffPolytope: BirkhoffRule,
    geoopt.UpperHalf: UpperHalfRule,
    geoopt.BoundedDomain: BoundedDomainRule,
}
