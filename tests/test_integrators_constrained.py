"""Motion on a surface: closed forms on the sphere, pendulums and chains, derivatives."""

import math

import pytest
import torch
from integrator_cases import F64, OSCILLATOR
from torch import nn

from darboux._autodiff import jacobian
from darboux._checks import ConvergenceError
from darboux.integrators import METHODS, Constrained, Hamiltonian, Separable, integrate, rods

RATTLES = ["rattle", "rattle4", "rattle6", "rattle8"]


def sphere(q):
    return (q.square().sum(-1, keepdim=True) - 1) / 2


def height(q):
    return q[..., -1]


FREE = Constrained(Separable(lambda q: 0 * q[..., 0], force=torch.zeros_like), sphere)
PENDULUM = Constrained(
    Separable(height, force=lambda q: torch.tensor([0.0, 0.0, -1.0]).to(q).expand_as(q)),
    sphere,
    jacobian=lambda q: q[..., None, :],
)
MASS = torch.tensor([1.0, 1.0, 2.0, 2.0], dtype=F64)
DOUBLE = Constrained(Separable(lambda q: q[..., 1] + 2 * q[..., 3], mass=MASS), rods([1.0, 0.7]))
CHAIN = Constrained(Separable(lambda q: q[..., 1::2].sum(-1)), rods([1.0] * 5))
SYSTEMS = {"free": FREE, "pendulum": PENDULUM, "double": DOUBLE, "chain": CHAIN}


def state(name, *batch, dtype=F64):
    """Return generic states of a system, on its constraint."""
    generator = torch.Generator().manual_seed(3)
    d = {"free": 3, "pendulum": 3, "double": 4, "chain": 10}[name]
    shift = {"free": 1.0, "pendulum": 1.0, "double": 0.4, "chain": 0.4}[name]
    q = torch.arange(1.0, d + 1, dtype=F64) * shift
    if name == "chain":
        q = torch.tensor([0.8, -0.6], dtype=F64).repeat(5).unflatten(0, (5, 2)).cumsum(0).flatten()
    q = q + 0.05 * torch.randn(*batch, d, generator=generator, dtype=F64)
    p = torch.randn(*batch, d, generator=generator, dtype=F64) * 0.7
    system = SYSTEMS[name]
    return tuple(x.to(dtype) for x in system.project(q, p))


def constraints(system, q, p):
    """Return the residuals of both constraints ``(..., 2 m)``."""
    speed = (system.jacobian(q) @ system.free.velocity(p)[..., None])[..., 0]
    return torch.cat([system.constraint(q), speed], -1)


def end(system, state, method, t, steps):
    run = integrate(system, *state, dt=t / steps, steps=steps, method=method, save_every=steps)
    return torch.cat([run.q[-1], run.p[-1]], -1)


# --- Closed forms -------------------------------------------------------------------------------


@pytest.mark.parametrize("h", [0.05, 0.3])
def test_rattle_turns_on_the_sphere_by_the_arc_sine(h):
    q, p = state("free", 3)
    run = integrate(FREE, q, p, dt=h, steps=50)
    speed = p.norm(dim=-1, keepdim=True)
    angle = torch.arange(51, dtype=F64)[:, None, None] * torch.asin(h * speed)
    expected = angle.cos() * q + angle.sin() * p / speed
    assert (run.q - expected).abs().max() < 1e-12
    step = torch.atan2(torch.linalg.cross(q, run.q[1]).norm(dim=-1), (q * run.q[1]).sum(-1))
    torch.testing.assert_close(step, torch.asin(h * speed)[..., 0], rtol=0, atol=1e-13)
    assert (run.q.norm(dim=-1) - 1).abs().max() < 1e-14
    assert ((run.q * run.p).sum(-1)).abs().max() < 1e-14
    out_of_plane = (run.q * torch.linalg.cross(q, p)).sum(-1)
    assert out_of_plane.abs().max() < 1e-13
    torch.testing.assert_close(run.p.norm(dim=-1), speed[..., 0].expand(51, 3), rtol=1e-13, atol=0)


def test_spherical_pendulum_keeps_energy_and_angular_momentum():
    q = torch.tensor([1.0, 0.0, 0.0], dtype=F64)
    p = torch.tensor([0.0, 0.5, 0.0], dtype=F64)
    coarse = integrate(PENDULUM, q, p, dt=0.1, steps=400)
    run = integrate(PENDULUM, q, p, dt=0.05, steps=2000)
    energy = PENDULUM.energy(run.q, run.p)
    errors = [float(x.max()) for x in (energy - energy[0]).abs()[1:].chunk(4)]
    assert max(errors) < 1.02 * min(errors) < 1.2e-3
    twice = (PENDULUM.energy(coarse.q, coarse.p) - energy[0]).abs().max()
    assert float(twice) == pytest.approx(4 * max(errors), rel=0.05)
    momentum = run.q[:, 0] * run.p[:, 1] - run.q[:, 1] * run.p[:, 0]
    assert (momentum - 0.5).abs().max() < 1e-13
    assert constraints(PENDULUM, run.q, run.p).abs().max() < 1e-14


@pytest.mark.parametrize(("name", "steps"), [("rattle", 20), ("rattle4", 5), ("rattle6", 10)])
def test_double_pendulum_moves_as_in_its_angles(name, steps):
    def energy(x, y):  # the same pendulum in its two angles
        a, b = x.unbind(-1)
        c = 2 * 0.7 * (a - b).cos()
        mass = torch.stack([torch.full_like(a, 3.0), c, c, torch.full_like(a, 2 * 0.49)], -1)
        inverse = torch.linalg.inv(mass.unflatten(-1, (2, 2)))
        kinetic = (y * (inverse @ y[..., None])[..., 0]).sum(-1) / 2
        return kinetic - 3 * a.cos() - 2 * 0.7 * b.cos()

    def embed(x):
        a, b = x.unbind(-1)
        first = torch.stack([a.sin(), -a.cos()], -1)
        return torch.cat([first, first + 0.7 * torch.stack([b.sin(), -b.cos()], -1)], -1)

    x, y = torch.tensor([1.0, 0.3], dtype=F64), torch.tensor([0.2, -0.5], dtype=F64)
    angles = Hamiltonian(energy)
    velocity = angles.field(x, y)[0]
    q, dq, *_ = torch.func.jvp(embed, (x,), (velocity,))
    assert float(DOUBLE.energy(q, MASS * dq)) == pytest.approx(float(energy(x, y)), rel=1e-14)
    exact = embed(integrate(angles, x, y, dt=0.025, steps=40, method="gauss8").q[-1])
    a, b = (
        float((end(DOUBLE, (q, MASS * dq), name, 1.0, n)[:4] - exact).norm())
        for n in (steps, 2 * steps)
    )
    assert math.log2(a / b) == pytest.approx(METHODS[name].order, abs=0.25)


# --- Structure ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["rattle", "rattle4", "rattle6"])
@pytest.mark.parametrize("name", ["pendulum", "double", "chain"])
def test_rattle_is_symplectic_on_its_surface(name, method):
    system = SYSTEMS[name]
    z = torch.cat(state(name), -1)
    d = len(z) // 2

    def step(z):
        return torch.cat(METHODS[method].step(system, z[..., :d], z[..., d:], 0.1), -1)

    basis = torch.linalg.svd(jacobian(lambda z: constraints(system, z[..., :d], z[..., d:]), z)[1])
    normals = 2 * len(system.constraint(z[:d]))
    tangent = basis.Vh[normals:].T
    omega = torch.zeros(2 * d, 2 * d, dtype=F64)
    omega[:d, d:], omega[d:, :d] = torch.eye(d), -torch.eye(d)
    moved = jacobian(step, z)[1] @ tangent
    assert (moved.T @ omega @ moved - tangent.T @ omega @ tangent).abs().max() < 1e-12


@pytest.mark.parametrize("method", ["rattle", "rattle4"])
@pytest.mark.parametrize("name", ["double", "chain"])
def test_rattle_runs_back_and_stays_on_its_surface(name, method):
    system = SYSTEMS[name]
    q, p = state(name, 3)
    there = integrate(system, q, p, dt=0.03, steps=15, method=method)
    assert constraints(system, there.q, there.p).abs().max() < 1e-13
    back = integrate(system, there.q[-1], there.p[-1], dt=-0.03, steps=15, method=method)
    torch.testing.assert_close((back.q[-1], back.p[-1]), (q, p), rtol=0, atol=1e-11)


@pytest.mark.parametrize(("method", "steps"), [("rattle", 40), ("rattle4", 10), ("rattle6", 8)])
def test_order_by_slope(method, steps):
    start = state("pendulum", 3)
    exact = end(PENDULUM, start, "rattle8", 2.0, 40)
    a, b = (
        float((end(PENDULUM, start, method, 2.0, n) - exact).norm()) for n in (steps, 2 * steps)
    )
    assert math.log2(a / b) == pytest.approx(METHODS[method].order, abs=0.15)


def test_rattle_solves_the_continuous_equations():
    # The field, moved by a collocation method, which leaves the surface only by its error.
    start = state("double", 2)
    exact = end(DOUBLE, start, "gauss6", 0.5, 20)
    torch.testing.assert_close(end(DOUBLE, start, "rattle6", 0.5, 8), exact, rtol=0, atol=1e-6)


def test_shake_has_the_positions_of_rattle():
    start = state("double", 3)
    rattle = integrate(DOUBLE, *start, dt=0.05, steps=40)
    shake = integrate(DOUBLE, *start, dt=0.05, steps=40, method="shake")
    torch.testing.assert_close(shake.q, rattle.q, rtol=0, atol=1e-12)
    assert constraints(DOUBLE, shake.q, shake.p)[..., 2:].abs().max() > 1e-4
    torch.testing.assert_close(DOUBLE.tangent(shake.q, shake.p), rattle.p, rtol=0, atol=1e-12)


def test_chain_keeps_its_energy():
    run = integrate(CHAIN, *state("chain"), dt=0.02, steps=200)
    energy = CHAIN.energy(run.q, run.p)
    assert (energy - energy[0]).abs().max() < 2e-2
    assert constraints(CHAIN, run.q, run.p).abs().max() < 1e-13


# --- Derivatives --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["rattle", "shake", "rattle4"])
@pytest.mark.parametrize("name", ["pendulum", "double"])
def test_derivatives_of_a_run(name, method):
    system = SYSTEMS[name]
    q, p = state(name, 2)
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.randn(q.shape, generator=generator, dtype=F64) for _ in range(2))
    u, v = torch.func.jvp(system.project, (q, p), (u, v))[1]  # tangent to the surface

    def run(q, p, dt):
        last = integrate(system, q, p, dt=dt, steps=4, method=method)
        return torch.cat([last.q[-1], last.p[-1]], -1)

    dt = torch.tensor(0.1, dtype=F64)
    forward = torch.func.jvp(run, (q, p, dt), (u, v, torch.ones_like(dt)))[1]
    first = []
    for e in (1e-4, 5e-5):  # Richardson, along a curve on the surface
        a, b = (run(*system.project(q + s * u, p + s * v), dt + s) for s in (e, -e))
        first.append((a - b) / (2 * e))
    torch.testing.assert_close(forward, (4 * first[1] - first[0]) / 3, rtol=0, atol=1e-9)
    inputs = [x.clone().requires_grad_() for x in (q, p, dt)]
    grads = torch.autograd.grad(run(*inputs).sum(), inputs)
    paired = sum((g * w).sum() for g, w in zip(grads, (u, v, torch.ones_like(dt)), strict=True))
    torch.testing.assert_close(paired, forward.sum(), rtol=1e-11, atol=1e-11)


def test_second_derivatives_are_exact():
    q, p = state("pendulum")

    def last(s):
        start = PENDULUM.project(q + s * p, p)
        return integrate(PENDULUM, *start, dt=0.1, steps=3).q[-1].sum()

    zero = torch.zeros((), dtype=F64)
    second = torch.func.hessian(last)(zero)
    slope = torch.func.grad(last)
    differences = (slope(zero + 1e-5) - slope(zero - 1e-5)) / 2e-5
    torch.testing.assert_close(second, differences, rtol=1e-8, atol=1e-8)
    reverse = torch.func.jacrev(torch.func.jacrev(last))(zero)
    torch.testing.assert_close(second, reverse, rtol=1e-11, atol=1e-11)


def test_a_learned_surface_gets_its_gradient():
    radius = nn.Parameter(torch.tensor(1.3, dtype=F64))

    def last(radius):
        system = Constrained(
            PENDULUM.free, lambda q: (q.square().sum(-1, keepdim=True) - radius**2) / 2
        )
        q, p = system.project(*state("pendulum"))
        return integrate(system, q, p, dt=0.1, steps=3).q[-1].sum()

    (slope,) = torch.autograd.grad(last(radius), radius)
    with torch.no_grad():
        differences = (last(radius + 1e-5) - last(radius - 1e-5)) / 2e-5
    torch.testing.assert_close(slope, differences, rtol=0, atol=1e-8)


# --- Shapes and errors --------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,)])
@pytest.mark.parametrize("name", ["pendulum", "double"])
def test_shapes_and_single_precision(name, batch):
    system, (q, p) = SYSTEMS[name], state(name, *batch)
    run = integrate(system, q, p, dt=0.05, steps=4)
    assert run.q.shape == run.p.shape == (5, *q.shape)
    if batch:
        alone = torch.func.vmap(lambda q, p: integrate(system, q, p, dt=0.05, steps=4).q[-1])
        if 0 not in batch:
            torch.testing.assert_close(alone(q, p), run.q[-1], rtol=0, atol=1e-14)
    if name == "pendulum":  # the masses of the other are float64
        single = integrate(system, *state(name, *batch, dtype=torch.float32), dt=0.05, steps=4)
        assert single.q.dtype == single.p.dtype == torch.float32
        torch.testing.assert_close(single.q.double(), run.q, rtol=0, atol=2e-6)


def test_masses_may_differ_between_copies():
    mass = torch.tensor([[1.0], [3.0]], dtype=F64)
    q, p = state("pendulum", 2)
    both = Constrained(Separable(height, mass=mass), sphere)
    run = integrate(both, q, p, dt=0.05, steps=5)
    for k in range(2):
        one = Constrained(Separable(height, mass=float(mass[k])), sphere)
        alone = integrate(one, q[k], p[k], dt=0.05, steps=5)
        torch.testing.assert_close(run.q[:, k], alone.q, rtol=0, atol=1e-14)


def test_the_door():
    q, p = state("pendulum")
    with pytest.raises(ValueError, match="q is not on the constraint: start from system.project"):
        integrate(PENDULUM, 1.01 * q, p, dt=0.1, steps=1)
    with pytest.raises(ValueError, match="p is not tangent"):
        integrate(PENDULUM, q, p + 0.01 * q, dt=0.1, steps=1)
    with pytest.raises(ValueError, match=r"constraint has shape \(\) for q of shape \(3,\)"):
        integrate(Constrained(PENDULUM.free, lambda q: sphere(q)[..., 0]), q, p, dt=0.1, steps=1)
    with pytest.raises(TypeError, match="free is a Hamiltonian"):
        Constrained(Hamiltonian(lambda q, p: q[..., 0]), sphere)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="kinetic energy"):
        Constrained(Separable(height, height), sphere)
    with pytest.raises(ValueError, match="rattle needs a Constrained system, got a Separable"):
        integrate(OSCILLATOR, q, p, dt=0.1, steps=1, method="rattle")
    with pytest.raises(ValueError, match="leapfrog needs a separable"):
        integrate(PENDULUM, q, p, dt=0.1, steps=1, method="leapfrog")
    with pytest.raises(ValueError, match=r"q has shape \(3,\), expected \(..., 4\)"):
        DOUBLE.constraint(q)


def test_too_long_a_step_says_so():
    q, p = state("free")
    with pytest.raises(ConvergenceError, match="smaller dt") as caught:
        integrate(FREE, q, p, dt=5 / float(p.norm()), steps=1)
    assert caught.value.residual > 0
    with pytest.raises(ConvergenceError, match="project: after 30 steps"):
        Constrained(FREE.free, lambda q: q[..., :1].square() + 1).project(q, p)
