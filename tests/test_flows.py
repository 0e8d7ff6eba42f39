"""The flow of a point on T*M: what it conserves, and closed forms with forces and fields."""

import math

import pytest
import torch

from darboux import manifolds
from darboux.flows import geodesic_flow, geodesic_hamiltonian
from darboux.integrators import audit, integrate

F64 = torch.float64


def test_clairaut_and_energy_on_the_torus_over_many_steps():
    torus = manifolds.TorusOfRevolution(R=2.0, r=1.0)
    x = torch.tensor([[0.3, 0.0], [1.0, 2.0], [0.0, 0.0]], dtype=F64)
    v = torch.tensor([[0.5, 0.4], [-0.2, 0.6], [0.7, 0.2]], dtype=F64)
    system = geodesic_hamiltonian(torus)
    options = {"dt": 0.05, "method": "gauss6", "save_every": 100}
    run = integrate(system, x, torus.flat(x, v), steps=100_000, compile=True, **options)
    eager = geodesic_flow(torus, x, v, steps=200, **options)
    torch.testing.assert_close(run.q[:3], eager.q, rtol=0, atol=1e-12)
    energy = system.energy(run.q, run.p)
    assert float((energy / energy[0] - 1).abs().max()) <= 1e-11
    assert float((run.p[..., 1] / run.p[0, ..., 1] - 1).abs().max()) <= 1e-11  # Clairaut
    late = (energy / energy[0] - 1)[len(energy) // 2 :]
    early = (energy / energy[0] - 1)[: len(energy) // 2]
    assert float(late.abs().max()) <= 3 * float(early.abs().max()) + 1e-12  # no growth


@pytest.mark.parametrize("method", ["implicit_midpoint", "gauss4", "gauss6"])
def test_the_flow_is_symplectic_for_a_metric_without_symmetry(method):
    from cases import Anisotropic

    system = geodesic_hamiltonian(
        Anisotropic(2), potential=lambda x: torch.sin(x).sum(-1), magnetic=lambda x: x.flip(-1) ** 2
    )
    g = torch.Generator().manual_seed(0)
    z = 0.5 * torch.randn(5, 4, dtype=F64, generator=g)
    step = audit.step_map(system, method, 0.1)
    assert float(audit.symplecticity_defect(step, z).max()) <= 1e-11
    assert float(audit.volume_defect(step, z).max()) <= 1e-11


def test_flow_follows_exp():
    ball = manifolds.Hyperbolic(2)
    x, v = torch.tensor([0.2, -0.1], dtype=F64), torch.tensor([0.3, 0.4], dtype=F64)
    end = geodesic_flow(ball, x, v, dt=0.05, steps=20, method="gauss8").q[-1]
    torch.testing.assert_close(end, ball.exp(x, v), atol=1e-10, rtol=0)


def test_larmor_circles_in_the_plane():
    """A constant field b turns the velocity at the rate b."""
    b = 1.7

    def one_form(x):
        return 0.5 * b * torch.stack([-x[..., 1], x[..., 0]], -1)

    plane = manifolds.Euclidean(2)
    x, v = torch.tensor([0.3, -0.2], dtype=F64), torch.tensor([1.0, 0.5], dtype=F64)
    turn = 2 * math.pi / b
    run = geodesic_flow(plane, x, v, dt=turn / 40, steps=40, method="gauss8", magnetic=one_form)
    torch.testing.assert_close(run.q[-1], x, atol=1e-10, rtol=0)
    radius = float(v.norm()) / b
    gaps = torch.cdist(run.q, run.q).max()
    assert float(gaps) == pytest.approx(2 * radius, rel=1e-3)
    # half a turn later the particle stands across the circle
    torch.testing.assert_close((run.q[20] - x).norm(), torch.tensor(2 * radius, dtype=F64))


def test_oscillator_on_the_sphere_chart():
    """Height as a potential: the spherical pendulum keeps energy and angular momentum."""
    sphere = manifolds.Stereographic(2, curvature=1.0)

    def height(x):
        s = x.square().sum(-1)
        return (s - 1) / (s + 1)

    x, v = torch.tensor([0.3, 0.1], dtype=F64), torch.tensor([-0.2, 0.5], dtype=F64)
    run = geodesic_flow(sphere, x, v, dt=0.05, steps=2000, method="gauss6", potential=height)
    energy = geodesic_hamiltonian(sphere, potential=height).energy(run.q, run.p)
    spin = run.q[..., 0] * run.p[..., 1] - run.q[..., 1] * run.p[..., 0]
    # x = 0 is the south pole and the bottom of the potential
    assert float((energy - energy[0]).abs().max()) < 1e-9
    assert float((spin - spin[0]).abs().max()) < 1e-12


def test_gradients_flow_through_time():
    torus = manifolds.TorusOfRevolution()
    x = torch.tensor([0.3, 0.0], dtype=F64)
    v = torch.tensor([0.5, 0.4], dtype=F64, requires_grad=True)

    def end(u):
        return geodesic_flow(torus, x, u, dt=0.1, steps=10, method="gauss4").q[-1]

    assert torch.autograd.gradcheck(end, (v,), atol=1e-7)


class TestDoor:
    torus = manifolds.TorusOfRevolution()
    x = torch.zeros(3, 2, dtype=F64)

    def test_manifold(self):
        with pytest.raises(TypeError, match="manifold is a Sphere, expected a Chart"):
            geodesic_flow(manifolds.Sphere(2), self.x, self.x, dt=0.1, steps=1)  # type: ignore[arg-type]

    def test_shapes(self):
        with pytest.raises(ValueError, match="v has shape"):
            geodesic_flow(self.torus, self.x, self.x[:, :1], dt=0.1, steps=1)

    def test_potential(self):
        with pytest.raises(
            ValueError, match=r"potential maps x of shape \(3, 2\) to shape \(3, 2\)"
        ):
            geodesic_flow(self.torus, self.x, self.x, dt=0.1, steps=1, potential=lambda x: x)

    def test_method(self):
        with pytest.raises(ValueError, match="leapfrog"):
            geodesic_flow(self.torus, self.x, self.x, dt=0.1, steps=1, method="leapfrog")
