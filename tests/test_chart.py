"""The generic chart against closed forms, its options, and what it says when it fails."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Anisotropic, Bump
from scipy.integrate import quad
from torch import Tensor
from torch.func import hessian, jacfwd, jacrev, vmap

from darboux import ConvergenceError, GeometryError
from darboux.manifolds import Chart, Conformal, TorusOfRevolution

F64 = torch.float64


class HalfPlane(Chart):
    def metric(self, x: Tensor) -> Tensor:
        return torch.eye(2, dtype=x.dtype) / x[..., 1, None, None] ** 2

    def _is_point(self, x: Tensor, atol: float) -> Tensor:
        return x[..., 1] > 0


class Polar(Chart):
    def metric(self, x: Tensor) -> Tensor:
        one = torch.ones_like(x[..., 0])
        return torch.diag_embed(torch.stack([one, x[..., 0].square()], -1))


class RoundSphere(Chart):
    """The unit sphere in stereographic coordinates, known only by its metric."""

    def metric(self, x: Tensor) -> Tensor:
        factor = 2 / (1 + x.square().sum(-1))
        return torch.eye(2, dtype=x.dtype) * factor[..., None, None].square()


def pairs(n: int, dtype=F64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    z = torch.rand(2, n, 2, generator=g, dtype=dtype)
    x, y = torch.stack([2 * z[..., 0] - 1, 0.5 + 1.5 * z[..., 1]], -1)
    return x, y


def half_plane_distance(x: Tensor, y: Tensor) -> Tensor:
    gap = (x - y).square().sum(-1).sqrt()
    return 2 * torch.asinh(gap / (2 * (x[..., 1] * y[..., 1]).sqrt()))


def test_exp_on_the_half_plane():
    for s in (0.1, 1.3, 4.0):
        end = HalfPlane(2).exp(
            torch.tensor([0.0, 1.0], dtype=F64), torch.tensor([s, 0.0], dtype=F64)
        )
        assert end.tolist() == pytest.approx([math.tanh(s), 1 / math.cosh(s)], abs=1e-12)


def test_distance_on_the_half_plane():
    x, y = pairs(100)
    torch.testing.assert_close(
        HalfPlane(2).dist(x, y), half_plane_distance(x, y), atol=1e-11, rtol=0
    )


def test_far_pairs_on_the_half_plane():
    x = torch.tensor([[0.0, 1.0], [0.0, 0.05]], dtype=F64)
    y = torch.tensor([[20.0, 1.0], [0.0, 20.0]], dtype=F64)
    report = HalfPlane(2).connect(x, y)
    assert bool(report.converged.all())
    torch.testing.assert_close(
        HalfPlane(2).dist(x, y), half_plane_distance(x, y), atol=1e-8, rtol=1e-8
    )


def test_straight_lines_in_polar_coordinates():
    x, v = torch.tensor([2.0, 0.3], dtype=F64), torch.tensor([0.4, 0.5], dtype=F64)
    r, phi = Polar(2).exp(x, v)
    straight = torch.tensor(
        [
            2 * math.cos(0.3) + 0.4 * math.cos(0.3) - math.sin(0.3),
            2 * math.sin(0.3) + 0.4 * math.sin(0.3) + math.cos(0.3),
        ],
        dtype=F64,
    )
    end = torch.stack([r * phi.cos(), r * phi.sin()])
    torch.testing.assert_close(end, straight, atol=1e-12, rtol=0)
    assert float(Polar(2).riemann(x).abs().max()) < 1e-14


@pytest.mark.parametrize("method", ["gauss4", "gauss8", "rk4"])
def test_methods_converge_to_the_automatic_one(method):
    x, v = torch.tensor([0.0, 1.0], dtype=F64), torch.tensor([1.0, 0.3], dtype=F64)
    exact = HalfPlane(2).exp(x, v)
    end = HalfPlane(2, method=method, steps=200).exp(x, v)
    torch.testing.assert_close(end, exact, atol=1e-9, rtol=0)


def test_sphere_conjugate_point_is_reported():
    """A stereographic chart sees both arcs of a great circle; only the short one minimises."""
    sphere = RoundSphere(2)
    x = torch.tensor([-1.0, 0.0], dtype=F64)  # on the equator
    for angle in (2.0, 3.0, 3.3, 4.0):  # beyond pi the geodesic through the origin is long
        y = torch.tensor([math.tan((angle - math.pi / 2) / 2), 0.0], dtype=F64)
        report = sphere.connect(x, y)
        assert bool(report.converged)
        length = float(sphere.norm(x, report.velocity))
        assert length == pytest.approx(angle, abs=1e-9)
        assert bool(report.conjugate) == (angle > math.pi)
        assert bool(report.unique) == (angle < math.pi)
        if angle > math.pi:
            with pytest.raises(GeometryError, match="RoundSphere.dist: .*conjugate point"):
                sphere.dist(x, y)


def test_conjugate_points_do_not_depend_on_the_coordinates():
    """The index form is symmetric only when measured with the metric."""
    linear = torch.tensor([[1.0, 0.9], [0.0, 0.05]], dtype=F64)

    class Sheared(RoundSphere):
        def metric(self, x: Tensor) -> Tensor:
            return linear.mT @ super().metric(x @ linear.mT) @ linear

    angles = torch.tensor([2.0, 3.0, 3.3], dtype=F64)
    ends = torch.tan((angles - math.pi / 2) / 2)[:, None] * torch.tensor([0.6, 0.8], dtype=F64)
    start = -torch.tensor([0.6, 0.8], dtype=F64)  # opposite, on the equator
    inverse = torch.linalg.inv(linear)
    report = Sheared(2).connect((start @ inverse.mT).expand(3, -1), ends @ inverse.mT)
    assert report.converged.tolist() == [True, True, True]
    assert report.conjugate.tolist() == [False, False, True]


def test_log_leaves_a_geodesic_that_does_not_minimise():
    """The outer equator of a torus stops minimising; the two shorter ways round mirror it."""
    torus = TorusOfRevolution(R=2.0, r=1.0)
    x, y = torch.tensor([[0.0, 0.0], [0.0, 2.0]], dtype=F64)
    report = torus.connect(x, y)
    length = float(torus.norm(x, report.velocity))
    assert bool(report.converged)
    assert not bool(report.conjugate)
    assert not bool(report.unique)
    assert length < 2 * 3 - 0.05  # along the equator
    torch.testing.assert_close(torus.exp(x, report.velocity), y, atol=1e-9, rtol=0)
    mirrored = report.velocity * torch.tensor([-1.0, 1.0], dtype=F64)
    torch.testing.assert_close(torus.exp(x, mirrored), y, atol=1e-9, rtol=0)


def test_jacobi_fields_from_derivatives_of_exp():
    """|J(t)| = sin t on the sphere and sinh t on the half-plane, for a unit normal start."""
    for manifold, size in ((RoundSphere(2), math.sin), (HalfPlane(2), math.sinh)):
        x = torch.tensor([0.1, 0.9], dtype=F64)
        v = torch.tensor([0.6, 0.3], dtype=F64)
        v = v / manifold.norm(x, v)
        w = torch.tensor([-v[1], v[0]], dtype=F64)
        w = w / manifold.norm(x, w)
        for t in (0.3, 1.1, 2.0):
            y, j, *_ = torch.func.jvp(lambda u, m=manifold, x=x: m.exp(x, u), (t * v,), (t * w,))
            assert float(manifold.norm(y, j)) == pytest.approx(size(t), abs=1e-10)


def test_holonomy_of_a_latitude_is_the_enclosed_area():
    class Colatitude(Chart):
        def metric(self, x):
            one = torch.ones_like(x[..., 0])
            return torch.diag_embed(torch.stack([one, x[..., 0].sin().square()], -1))

    sphere, polar = Colatitude(2), 0.9

    def loop(t):
        return torch.stack([torch.full_like(t, polar), 2 * math.pi * t], -1)

    w = sphere.transport_curve(loop, torch.tensor([1.0, 0.0], dtype=F64))
    turned = complex(float(w[0]), float(w[1]) * math.sin(polar))
    area = 2 * math.pi * (1 - math.cos(polar))
    assert abs(turned - complex(math.cos(area), math.sin(area))) < 1e-10
    assert abs(turned) == pytest.approx(1.0, abs=1e-13)


def test_holonomy_transports_a_batch_alike():
    half_plane = HalfPlane(2)

    def loop(t):
        point = torch.stack([0.3 * torch.cos(6.28 * t), 1.5 + 0.3 * torch.sin(6.28 * t)], -1)
        return point[:, None].expand(-1, 4, -1)

    v = torch.randn(4, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    together = half_plane.transport_curve(loop, v)
    for one, alone in zip(v, together, strict=True):
        moved = half_plane.transport_curve(lambda t: loop(t)[:, 0], one)
        torch.testing.assert_close(moved, alone, atol=1e-12, rtol=0)


def test_gradients_reach_the_metric():
    class Scaled(Chart):
        def __init__(self):
            super().__init__(2)
            self.log_scale = torch.nn.Parameter(torch.tensor(0.3, dtype=F64))

        def metric(self, x):
            w = torch.exp(-x.square().sum(-1) * self.log_scale.exp())
            return torch.eye(2, dtype=x.dtype) * (1 + w)[..., None, None]

    manifold = Scaled()
    x = torch.tensor([[0.3, 0.2], [-0.5, 0.4]], dtype=F64)
    v = torch.tensor([[0.5, -0.3], [0.9, 0.2]], dtype=F64)
    y = manifold.exp(x, v).detach()
    for f in (
        lambda: manifold.exp(x, v).sum(),
        lambda: manifold.log(x, y).square().sum(),
        lambda: manifold.dist(x, y).sum(),
        lambda: manifold.transport(x, y, v).square().sum(),
        lambda: manifold.scalar_curvature(x).square().sum(),
        lambda: manifold.log_volume(x).square().sum(),
    ):
        (first,) = torch.autograd.grad(f(), manifold.log_scale, create_graph=True)
        (second,) = torch.autograd.grad(first, manifold.log_scale)
        ends = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                manifold.log_scale.add_(step)
            value = f()
            ends.append((value.detach(), torch.autograd.grad(value, manifold.log_scale)[0]))
            with torch.no_grad():
                manifold.log_scale.sub_(step)
        assert float(first.detach()) == pytest.approx(
            float(ends[0][0] - ends[1][0]) / 2e-5, abs=1e-8
        )
        assert float(second) == pytest.approx(float(ends[0][1] - ends[1][1]) / 2e-5, abs=1e-6)


class Schwarzschild(Chart):
    """The vacuum outside a star of mass 1.3: Lorentzian and Ricci-flat."""

    positive = False
    mass = 1.3

    def metric(self, x: Tensor) -> Tensor:
        _, r, theta, _ = x.unbind(-1)
        f = 1 - 2 * self.mass / r
        return torch.diag_embed(torch.stack([-f, 1 / f, r**2, (r * theta.sin()) ** 2], -1))


def test_lorentzian_metrics():
    space, m = Schwarzschild(4), Schwarzschild.mass
    x = torch.tensor([0.0, 7.0, 1.1, 0.4], dtype=F64)
    gamma = space.christoffel(x)
    assert float(gamma[0, 0, 1]) == pytest.approx(m / (7 * (7 - 2 * m)), rel=1e-13)
    assert float(gamma[1, 0, 0]) == pytest.approx(m * (7 - 2 * m) / 343, rel=1e-13)
    assert float(space.ricci(x).abs().max()) < 1e-13
    inverse = torch.linalg.inv(space.metric(x))
    low = torch.einsum("lm,mkij->lkij", space.metric(x), space.riemann(x))
    high = torch.einsum("lkij,la,kb,ic,jd->abcd", low, *[inverse] * 4)
    assert float((low * high).sum()) == pytest.approx(48 * m**2 / 7**6, rel=1e-12)
    # a circular orbit: Kepler's third law holds exactly in coordinate time
    x = torch.tensor([0.0, 9.0, math.pi / 2, 0.0], dtype=F64)
    v = torch.tensor([1.0, 0.0, 0.0, math.sqrt(m / 9**3)], dtype=F64)
    end = space.exp(x, 20 * v)
    torch.testing.assert_close(end, x + 20 * v, atol=1e-10, rtol=0)
    for call in (space.norm, space.log, space.dist, lambda a, b: space.transport(a, a, b)):
        with pytest.raises(GeometryError, match="not positive, expected a Riemannian"):
            call(x, v)


class Stretched(Chart):
    """A conformal chart of any dimension with the factor ``f``."""

    def __init__(self, dim: int, f: Callable[[Tensor], Tensor], **options: Any):
        super().__init__(dim, **options)
        self.f = f

    def metric(self, x: Tensor) -> Tensor:
        return self.f(x)[..., None, None] * torch.eye(self.dim, dtype=x.dtype)


def length_by_quadrature(f: Callable[[Tensor], Tensor], a: float, b: float) -> float:
    return quad(lambda s: float(f(torch.tensor([s], dtype=F64)).sqrt()), a, b, limit=400)[0]


def test_transport_in_a_frame_that_turns_fast():
    """Flat space in twisted coordinates: the geodesic is straight, the frame spins."""
    k = 40.0

    class Twisted(Chart):
        def metric(self, x: Tensor) -> Tensor:
            a, b, one = -k * x[..., 2], k * x[..., 1], torch.ones_like(x[..., 0])
            rows = [[one + a * a + b * b, a, b], [a, one, 0 * one], [b, 0 * one, one]]
            return torch.stack([torch.stack(r, -1) for r in rows], -2)

    x, y, w = torch.eye(3, dtype=F64)[[2, 0, 1]] * torch.tensor([[0.0], [1.0], [1.0]], dtype=F64)
    moved = Twisted(3).transport(x, y, w)
    expected = torch.tensor([0.0, math.cos(k), -math.sin(k)], dtype=F64)
    torch.testing.assert_close(moved, expected, atol=1e-9, rtol=0)


def test_the_long_way_round_may_be_the_short_one():
    turn = 2 * math.pi

    def hill(x: Tensor) -> Tensor:
        away = 2 * torch.sin((x[..., 0] - 0.6) / 2)
        return (1 + 9 * torch.exp(-((away / 0.3) ** 2))).square()

    circle = Stretched(1, hill, periods=[turn])
    x, y = torch.zeros(1, dtype=F64), torch.tensor([1.4], dtype=F64)
    expected = length_by_quadrature(hill, 1.4 - turn, 0.0)
    assert float(circle.dist(x, y)) == pytest.approx(expected, abs=1e-8)


def test_the_shorter_arc_of_a_circle():
    """Arcs are left out unseen only where they cannot be the shorter ones."""
    turn = 2 * math.pi

    def waves(x: Tensor) -> Tensor:
        return torch.exp(torch.sin(x[..., 0]) + 0.5 * torch.cos(3 * x[..., 0]))

    circle = Stretched(1, waves, periods=[turn])
    x = torch.linspace(0, turn, 9, dtype=F64)[:-1, None]
    gap = torch.tensor([0.3, 1.0, 2.0, 3.0, 3.3], dtype=F64)[:, None, None]
    around = length_by_quadrature(waves, 0.0, turn)
    arcs = [[length_by_quadrature(waves, float(a), float(a + s)) for a in x] for s in gap]
    expected = torch.tensor([[min(one, around - one) for one in row] for row in arcs], dtype=F64)
    torch.testing.assert_close(circle.dist(x, x + gap), expected, atol=1e-8, rtol=0)
    x = x.expand(len(gap), -1, -1)
    seen = circle._reach(x, circle.log(x, x + gap)) >= turn - gap
    assert not bool(seen[0].any())  # near pairs cost one solve
    assert bool(seen[3].all())


def test_curves_stay_within_reach():
    turn = 2 * math.pi

    def waves(x: Tensor) -> Tensor:
        return torch.exp(torch.sin(x[..., 0]) + torch.cos(x[..., 1] - 2 * x[..., 0]) / 2)

    g = torch.Generator().manual_seed(0)
    for periods in ([turn, turn], [turn, math.inf]):
        space = Stretched(2, waves, periods=periods)
        x, v = torch.randn(2, 12, 2, dtype=F64, generator=g)
        reach = space._reach(x, v)
        path = space.geodesic(x, v, torch.linspace(0, 1, 9, dtype=F64))
        assert bool(((path - x).abs() <= reach).all())
        assert bool(reach.isfinite().any())


def test_a_metric_without_the_periods_it_claims():
    def tilt(x: Tensor) -> Tensor:
        return 0.1 * x[..., 1].square()

    x = torch.tensor([0.3, 0.2], dtype=F64)
    claimed = Conformal(TorusOfRevolution(), tilt)  # takes the periods of the torus
    with pytest.raises(GeometryError, match="Conformal.connect: .* differs after one turn"):
        claimed.log(x, x + 0.1)
    strip = Conformal(TorusOfRevolution(), tilt, periods=None)
    torch.testing.assert_close(strip.exp(x, strip.log(x, x + 0.1)), x + 0.1, atol=1e-9, rtol=0)


def test_narrow_features_are_not_stepped_over():
    def spike(x: Tensor) -> Tensor:
        return 1 + 25 * torch.exp(-(((x[..., 0] - 0.5) / 0.02) ** 2))

    line = Stretched(1, spike)
    x, y = torch.tensor([[0.0], [1.0]], dtype=F64)
    length = length_by_quadrature(spike, 0.0, 1.0)
    report = line.connect(x, y)
    if bool(report.converged):
        assert float(line.dist(x, y)) == pytest.approx(length, abs=1e-6)
    end = line.exp(x, torch.tensor([length / float(spike(x).sqrt())], dtype=F64))
    torch.testing.assert_close(end, y, atol=1e-6, rtol=0)


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_derivatives_of_exp_of_any_order(order):
    half_plane = HalfPlane(2)
    x, v = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=F64)

    def ours(t: Tensor) -> Tensor:
        return half_plane.exp(x, t * v)[1]

    def closed(t: Tensor) -> Tensor:
        return 1 / torch.cosh(t)

    for _ in range(order):
        ours, closed = jacfwd(ours), jacfwd(closed)
    t = torch.tensor(0.5, dtype=F64)
    torch.testing.assert_close(ours(t), closed(t), atol=1e-8, rtol=0)


def test_geodesic_is_differentiable_in_time():
    half_plane = HalfPlane(2)
    x, v = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=F64)
    for times in ([0.2, -0.5], [0.0]):
        ts = torch.tensor(times, dtype=F64, requires_grad=True)
        path = half_plane.geodesic(x, v, ts)
        (slope,) = torch.autograd.grad(path[:, 0].sum(), ts)
        torch.testing.assert_close(slope, 1 / ts.detach().cosh().square(), atol=1e-9, rtol=0)


def test_a_method_with_steps_is_that_method():
    x, v = torch.tensor([[0.0, 1.0], [1.0, 0.3]], dtype=F64)
    exact = HalfPlane(2).exp(x, v)
    for method, order in (("implicit_midpoint", 2), ("gauss4", 4), ("rk4", 4)):
        errors = [
            float((HalfPlane(2, method=method, steps=n).exp(x, v) - exact).norm()) for n in (10, 20)
        ]
        assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2)
    coarse = HalfPlane(2, method="rk4", steps=4)
    one = torch.ones(1, dtype=F64)
    assert torch.equal(coarse.geodesic(x, v, one)[0], coarse.exp(x, v))


def test_accuracy_does_not_depend_on_units_or_on_the_rest_of_the_batch():
    def waves(x: Tensor) -> Tensor:
        return 1 + 0.9 * torch.sin(7 * x[..., 0]) * torch.sin(9 * x[..., 1])

    x, v = torch.tensor([[0.1, 0.2], [3.0, 2.0]], dtype=F64)
    expected = Stretched(2, waves, steps=256).exp(x, v)
    small = Stretched(2, lambda z: waves(z / 1e-6)).exp(1e-6 * x, 1e-6 * v) / 1e-6
    torch.testing.assert_close(small, expected, atol=1e-9, rtol=0)
    mates = Stretched(2, waves).exp(torch.stack([x, x + 1e6]), torch.stack([v, 0 * v]))
    torch.testing.assert_close(mates[0], expected, atol=1e-9, rtol=0)


def test_third_derivatives_of_log():
    half_plane = HalfPlane(2)
    (x,), (y,) = pairs(1)

    def ours(z):
        return half_plane.sqdist(x, z)

    def closed(z):
        return half_plane_distance(x, z).square()

    for nest in (lambda f: jacfwd(hessian(f)), lambda f: jacrev(hessian(f))):
        torch.testing.assert_close(nest(ours)(y), nest(closed)(y), atol=1e-9, rtol=0)


@pytest.mark.parametrize("shape", [(), (1,), (20,), (3, 4, 5), (0,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batches_and_dtypes(shape, dtype):
    manifold = Anisotropic(2)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(*shape, 2, dtype=dtype, generator=g)
    v = 0.3 * torch.randn(*shape, 2, dtype=dtype, generator=g)
    y = manifold.exp(x, v)
    assert y.shape == x.shape
    assert y.dtype == dtype
    tol = 2e-4 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(manifold.log(x, y), v, atol=tol, rtol=tol)
    assert manifold.dist(x, y).shape == shape
    assert manifold.transport(x, y, v).shape == x.shape
    assert manifold.riemann(x).shape == (*shape, 2, 2, 2, 2)
    assert manifold.sectional(x, v, x.flip(-1)).dtype == dtype


def test_leading_dimensions_broadcast():
    manifold = HalfPlane(2)
    x, y = pairs(4)
    table = manifold.dist(x[:, None], y[None])
    assert table.shape == (4, 4)
    assert float(table[1, 2]) == pytest.approx(float(manifold.dist(x[1], y[2])), abs=1e-12)


def test_vmap_equals_the_batch():
    manifold = HalfPlane(2)
    x, y = pairs(6)
    v = manifold.log(x, y)
    cases: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (manifold.exp, (x, v)),
        (manifold.log, (x, y)),
        (manifold.dist, (x, y)),
        (manifold.transport, (x, y, v)),
        (manifold.christoffel, (x,)),
        (manifold.riemann, (x,)),
        (manifold.sectional, (x, v, x)),
    ]
    for f, args in cases:
        torch.testing.assert_close(vmap(f)(*args), f(*args), atol=1e-11, rtol=0)


class TestDoor:
    x = torch.zeros(5, 2, dtype=F64)

    def test_last_dimension(self):
        with pytest.raises(
            ValueError, match=r"Bump.exp: x has shape \(5, 3\), expected \(..., 2\)"
        ):
            Bump(2).exp(torch.zeros(5, 3), torch.zeros(5, 3))
        message = (
            r"Bump.exp: v has shape \(5, 4\), expected \(..., 2\) to match x of shape \(5, 2\)"
        )
        with pytest.raises(ValueError, match=message):
            Bump(2).exp(self.x, torch.zeros(5, 4, dtype=F64))

    def test_leading_dimensions(self):
        with pytest.raises(ValueError, match="do not broadcast"):
            Bump(2).exp(self.x, torch.zeros(4, 2, dtype=F64))

    def test_dtype_and_type(self):
        with pytest.raises(TypeError, match="v has dtype torch.float32, expected torch.float64"):
            Bump(2).exp(self.x, torch.zeros(5, 2))
        with pytest.raises(TypeError, match="x has dtype torch.int64, expected a real floating"):
            Bump(2).exp(torch.zeros(5, 2, dtype=torch.int64), self.x)
        with pytest.raises(
            TypeError, match=r"Bump.christoffel: x is a list, expected a torch.Tensor"
        ):
            Bump(2).christoffel([0.0, 1.0])  # pyright: ignore[reportArgumentType]

    def test_nan(self):
        with pytest.raises(ValueError, match="x of shape .* has 10 entries that are NaN"):
            Bump(2).christoffel(self.x * math.nan)

    def test_nan_is_seen_inside_transforms(self):
        with pytest.raises(ValueError, match="NaN"):
            vmap(jacrev(Bump(2).scalar_curvature))(self.x * math.nan)

    def test_indefinite_metric(self):
        class Saddle(Chart):
            def metric(self, x):
                return torch.diag_embed(torch.stack([torch.ones_like(x[..., 0]), x[..., 0]], -1))

        x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        with pytest.raises(
            GeometryError, match=r"Saddle.exp: the metric at x is not positive .*1 of 2"
        ):
            Saddle(2).exp(x, x)
        with pytest.raises(GeometryError, match="leaves the chart|could not be followed"):
            Saddle(2).exp(x[0], torch.tensor([-3.0, 0.0]))

    def test_asymmetric_metric(self):
        class Crooked(Chart):
            def metric(self, x):
                return torch.tensor([[1.0, 0.3], [0.0, 1.0]], dtype=x.dtype).expand(*x.shape, 2)

        with pytest.raises(GeometryError, match="not symmetric"):
            Crooked(2).christoffel(self.x)

    def test_metric_of_the_wrong_shape(self):
        class Flat(Chart):
            def metric(self, x):
                return torch.eye(2, dtype=x.dtype)

        message = r"metric\(x\) has shape \(2, 2\), expected \(5, 2, 2\)"
        with pytest.raises(ValueError, match=message):
            Flat(2).exp(self.x, self.x)

    def test_function_of_the_wrong_shape(self):
        with pytest.raises(
            ValueError, match=r"Bump.gradient: the function maps .* expected \(5,\)"
        ):
            Bump(2).gradient(lambda x: x, self.x)

    def test_outside_the_chart(self):
        with pytest.raises(ValueError, match="HalfPlane.exp: x of shape .* not on the manifold"):
            HalfPlane(2).exp(-torch.ones(2), torch.ones(2))

    def test_unreachable(self):
        class Ring(Chart):
            """A plane with a wall: no geodesic joins the two sides of |x| < 1."""

            def metric(self, x):
                return torch.eye(2, dtype=x.dtype).expand(*x.shape, 2)

            def _is_point(self, x, atol):
                return x[..., 0].abs() > 1

        a, b = torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 0.0])
        assert not bool(Ring(2).connect(a, b).converged)
        with pytest.raises(ConvergenceError, match="1 of 1 pairs: a curve .* leaves the chart"):
            Ring(2).log(a, b)

    @pytest.mark.parametrize(
        ("width", "message"), [(0.1, "bends too sharply"), (0.02, "the equation is not solved")]
    )
    def test_unresolved(self, width, message):
        def ridge(x: Tensor) -> Tensor:
            return 1 + 25 * torch.exp(-(((x[..., 0] - 0.5) / width) ** 2))

        x, y = torch.tensor([[0.0], [1.0]], dtype=F64)
        with pytest.raises(ConvergenceError, match=f"1 of 1 pairs: .*{message}"):
            Stretched(1, ridge).log(x, y)

    def test_options(self):
        with pytest.raises(ValueError, match="needs a number of steps"):
            Bump(2, method="rk4")
        with pytest.raises(ValueError, match="steps is 0"):
            Bump(2, steps=0)
        with pytest.raises(ValueError, match="periods has 1 entries, expected 2"):
            Bump(2, periods=[1.0])
        with pytest.raises(ValueError, match="dim is 0"):
            Bump(0)
