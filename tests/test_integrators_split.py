"""Systems of exactly solved parts: rigid bodies, charges, planets, diagonal metrics."""

import math

import integrator_cases
import numpy as np
import pytest
import torch
from integrator_cases import F64, solar_system
from scipy.integrate import solve_ivp
from scipy.special import ellipj

from darboux._autodiff import jacobian
from darboux.integrators import (
    METHODS,
    Hamiltonian,
    Split,
    audit,
    diagonal_metric,
    integrate,
    kepler_flow,
    magnetic,
    planetary,
    quaternion_product,
    rigid_body,
    spinning_top,
)


def rand(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=F64)


def solve(system, q, p, t):
    """Return ``q`` and ``p`` of one copy at time ``t``, by scipy."""
    n = q.shape[-1]

    def field(_, z):
        z = torch.from_numpy(z)
        return torch.cat(system.field(z[:n], z[n:])).numpy()

    run = solve_ivp(field, (0, t), torch.cat([q, p]).numpy(), "DOP853", rtol=3e-14, atol=1e-14)
    z = torch.from_numpy(run.y[:, -1])
    return z[:n], z[n:]


def slope(system, q, p, name, t, steps, exact):
    """Return the order observed between ``steps`` and twice as many."""
    errors = []
    for n in (steps, 2 * steps):
        run = integrate(system, q, p, dt=t / n, steps=n, method=name, save_every=n)
        errors.append(float((torch.cat([run.q[-1], run.p[-1]], -1) - torch.cat(exact, -1)).norm()))
    return math.log2(errors[0] / errors[1])


def step_of(system, name, n, dt):
    """Return one step as a map of packed states whose ``q`` has ``n`` components."""
    return lambda z: torch.cat(METHODS[name].step(system, z[..., :n], z[..., n:], dt), -1)


# --- Rigid bodies -------------------------------------------------------------------------------

INERTIA = torch.tensor([1.0, 2.0, 3.5], dtype=F64)
BODY = rigid_body(INERTIA)


def body_at(t):
    """Return the angular momentum at time ``t`` by elliptic functions, Landau & Lifshitz 37."""
    one, two, three = INERTIA.tolist()
    energy, square = 1.0, 5.5  # between 2 E I_2 and 2 E I_3
    above, below = 2 * energy * three - square, square - 2 * energy * one
    rate = math.sqrt((three - two) * below / (one * two * three))
    sn, cn, dn, _ = ellipj(rate * t, (two - one) * above / ((three - two) * below))
    rows = [
        one * math.sqrt(above / (one * (three - one))) * cn,
        two * math.sqrt(above / (two * (three - two))) * sn,
        three * math.sqrt(below / (three * (three - one))) * dn,
    ]
    return torch.tensor(np.stack(rows, -1), dtype=F64)


def test_closed_form_of_the_rigid_body_obeys_its_equation():
    m, e = body_at(0.7), 1e-5
    rate = (body_at(0.7 + e) - body_at(0.7 - e)) / (2 * e)
    torch.testing.assert_close(BODY.field(m, m[:0])[0], rate, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("name", "steps"), [("leapfrog", 40), ("suzuki4", 20), ("kahan_li6", 20)])
def test_rigid_body_against_elliptic_functions(name, steps):
    m = body_at(0.0)
    order = slope(BODY, m, m[:0], name, 6.0, steps, (body_at(6.0), m[:0]))
    assert order == pytest.approx(METHODS[name].order, abs=0.2)


def test_rigid_body_keeps_its_casimir_and_nearly_its_energy():
    m = torch.stack([body_at(0.0), rand(3)])
    run = integrate(BODY, m, dt=0.3, steps=4000, save_every=2)
    casimir = run.q.square().sum(-1)
    assert (casimir / casimir[0] - 1).abs().max() < 3e-14
    error = (BODY.energy(run.q, run.p) / BODY.energy(m, m[:, :0]) - 1).abs()
    quarters = torch.stack([x.amax(0) for x in error[1:].chunk(4)])
    assert quarters.max() < 3e-2
    assert (quarters.amax(0) < 1.05 * quarters.amin(0)).all()
    fine = integrate(BODY, m, dt=0.15, steps=1000)
    finer = (BODY.energy(fine.q, fine.p) / BODY.energy(m, m[:, :0]) - 1).abs().amax(0)
    torch.testing.assert_close(
        quarters.amax(0) / finer, torch.full((2,), 4.0).to(m), rtol=0.1, atol=0
    )


@pytest.mark.parametrize("name", ["leapfrog", "suzuki4", "kahan_li8"])
def test_rigid_body_steps_are_poisson_maps(name):
    def structure(m):  # v -> m x v
        eye = torch.eye(3, dtype=F64).expand(*m.shape, 3)
        return torch.linalg.cross(m[..., None, :].expand_as(eye), eye).mT

    m = rand(5, 3)
    step = step_of(BODY, name, 3, 0.2)
    j = jacobian(step, m)[1]
    assert (j @ structure(m) @ j.mT - structure(step(m))).abs().max() < 1e-12


def rotated(x, v):
    """Return ``v (..., 3)`` turned by the quaternion ``x``."""
    pure = torch.cat([torch.zeros_like(v[..., :1]), v], -1)
    conjugate = x * torch.tensor([1.0, -1.0, -1.0, -1.0], dtype=F64)
    return quaternion_product(quaternion_product(x, pure), conjugate)[..., 1:]


def axis_height(x):
    return 1.5 * (x[..., 0] ** 2 - x[..., 1] ** 2 - x[..., 2] ** 2 + x[..., 3] ** 2)


TOP = spinning_top(INERTIA, axis_height)


def attitude(*batch):
    x = rand(*batch, 4, seed=1)
    return x / x.norm(dim=-1, keepdim=True), rand(*batch, 3, seed=2)


def test_free_top_keeps_its_angular_momentum_in_space():
    x, m = attitude(3)
    run = integrate(spinning_top(INERTIA), x, m, dt=0.2, steps=500)
    momentum = rotated(run.q, run.p)
    assert (momentum - momentum[0]).abs().max() < 1e-13
    assert (run.q.norm(dim=-1) - 1).abs().max() < 1e-13
    alone = integrate(BODY, m, dt=0.2, steps=500)
    torch.testing.assert_close(run.p, alone.q, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "steps"), [("leapfrog", 40), ("suzuki4", 20)])
def test_heavy_top(name, steps):
    x, m = attitude()
    run = integrate(TOP, x, m, dt=0.05, steps=200, method=name)
    vertical = rotated(run.q, run.p)[:, 2]
    assert (vertical - vertical[0]).abs().max() < 1e-13
    order = slope(TOP, x, m, name, 1.0, steps, solve(TOP, x, m, 1.0))
    assert order == pytest.approx(METHODS[name].order, abs=0.2)
    assert audit.energy_drift(TOP, run).error < 0.05


# --- Diagonal metrics ---------------------------------------------------------------------------


def torus_metric(q):
    return torch.stack([torch.ones_like(q[..., 0]), (2 + q[..., 0].cos()) ** -2], -1)


def mixed_metric(q):
    x, y, z = q.unbind(-1)
    return torch.stack([1 + y * y, torch.exp(x * z / 2), 2 + torch.sin(x - y)], -1)


TORUS = diagonal_metric(torus_metric, 2)
MIXED = diagonal_metric(mixed_metric, 3, lambda q: q.square().sum(-1) / 2)


@pytest.mark.parametrize(("name", "steps"), [("leapfrog", 40), ("suzuki4", 10), ("kahan_li6", 12)])
@pytest.mark.parametrize("system", [TORUS, MIXED], ids=["torus", "mixed"])
def test_diagonal_metric(system, name, steps):
    q, p = rand(system.dim, scale=0.5), rand(system.dim, seed=1, scale=0.5)
    t = 12.0 if system is TORUS else 2.0
    plain = Hamiltonian(system.energy)
    torch.testing.assert_close(system.field(q, p), plain.field(q, p), rtol=1e-14, atol=1e-14)
    order = slope(system, q, p, name, t, steps, solve(system, q, p, t))
    assert order == pytest.approx(METHODS[name].order, abs=0.25)
    audit.check_symplectic(step_of(system, name, system.dim, 0.1), torch.cat([q, p]), atol=1e-12)


def test_splittings_of_two_parts_move_the_torus_and_keep_clairauts_constant():
    q, p = rand(3, 2), rand(3, 2, seed=1)
    run = integrate(TORUS, q, p, dt=0.1, steps=40, method="bm6")
    assert (run.p[..., 1] - p[:, 1]).abs().max() == 0
    assert audit.energy_drift(TORUS, run).error.max() < 1e-6


def test_diagonal_metric_refuses_what_it_cannot_solve():
    half_plane = diagonal_metric(lambda q: q[..., 1:].square().expand_as(q), 2)
    with pytest.raises(ValueError, match="component 1 of inverse_metric depends on component 1"):
        integrate(half_plane, rand(2), rand(2), dt=0.1, steps=1)
    with pytest.raises(ValueError, match=r"expected \(..., 3\) for dim"):
        integrate(MIXED, rand(2), rand(2), dt=0.1, steps=1)
    with pytest.raises(ValueError, match=r"inverse_metric has shape \(\)"):
        integrate(diagonal_metric(lambda q: q[..., 0], 2), rand(2), rand(2), dt=0.1, steps=1)
    with pytest.raises(ValueError, match="dim is 1"):
        diagonal_metric(torus_metric, 1)


# --- Charges ------------------------------------------------------------------------------------

B = torch.tensor([0.3, -0.5, 1.2], dtype=F64)


def trap(q):
    return q[..., 2] ** 2 - q[..., :2].square().sum(-1) / 2 + 0.1 * torch.sin(q[..., 0])


def vector_potential(q):
    x, y, z = q.unbind(-1)
    return torch.stack([-y * (1 + z * z), x * x * z, torch.sin(x * y)], -1)


def curl(q):
    x, y, z = q.unbind(-1)
    c = torch.cos(x * y)
    return torch.stack([x * c - x * x, -2 * y * z - y * c, 2 * x * z + 1 + z * z], -1)


def canonical(step, potential):
    """Return a step in the canonical momenta ``p + A(q)``."""

    def moved(z):
        q, p = z[..., :3], z[..., 3:]
        z = step(torch.cat([q, p - potential(q)], -1))
        return torch.cat([z[..., :3], z[..., 3:] + potential(z[..., :3])], -1)

    return moved


def test_a_uniform_field_alone_is_solved_in_one_step():
    q, p = rand(4, 3), rand(4, 3, seed=1)
    run = integrate(magnetic(B, mass=0.5), q, p, dt=7.0, steps=1)
    matrix = 2 * torch.linalg.cross(torch.eye(3, dtype=F64), B.expand(3, 3)).T  # p' = W p
    block = torch.zeros(6, 6, dtype=F64)
    block[:3, 3:], block[3:, 3:] = 2 * torch.eye(3), matrix
    exact = torch.cat([q, p], -1) @ torch.linalg.matrix_exp(7 * block).T
    torch.testing.assert_close(torch.cat([run.q[-1], run.p[-1]], -1), exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["leapfrog", "bm4", "bm6_rkn"])
def test_a_uniform_field_is_moved_symplectically(name):
    step = canonical(
        step_of(magnetic(B, trap, mass=0.7), name, 3, 0.3),
        lambda q: torch.linalg.cross(B.expand_as(q), q) / 2,
    )
    assert audit.check_symplectic(step, rand(4, 6), atol=1e-12) <= 1e-12


@pytest.mark.parametrize("name", ["leapfrog", "bm4", "kahan_li6"])
def test_a_varying_field_is_moved_with_its_volume_and_speed(name):
    step = step_of(magnetic(curl, trap, mass=0.7), name, 3, 0.2)
    z = rand(4, 6, scale=0.5)
    assert audit.volume_defect(step, z).max() < 1e-12
    run = integrate(magnetic(curl), z[:, :3], z[:, 3:], dt=0.2, steps=30, method=name)
    speed = run.p.norm(dim=-1)
    assert (speed / speed[0] - 1).abs().max() < 3e-14


def test_boris_is_not_symplectic_in_a_varying_field():
    step = canonical(step_of(magnetic(curl, trap), "leapfrog", 3, 0.2), vector_potential)
    assert audit.symplecticity_defect(step, rand(4, 6, scale=0.5)).min() > 1e-5


@pytest.mark.parametrize(("name", "steps"), [("leapfrog", 40), ("bm4", 10), ("bm6", 12)])
@pytest.mark.parametrize("b", [B, curl], ids=["uniform", "varying"])
def test_order_of_a_charge(b, name, steps):
    system, q, p = magnetic(b, trap), rand(3, scale=0.3), rand(3, seed=1, scale=0.3)
    order = slope(system, q, p, name, 2.0, steps, solve(system, q, p, 2.0))
    assert order == pytest.approx(METHODS[name].order, abs=0.3)


# --- Kepler -------------------------------------------------------------------------------------


def orbit_energy(q, v, mu):
    return v.square().sum(-1) / 2 - mu / q.norm(dim=-1)


def test_kepler_flow_of_every_kind_against_scipy():
    mu = 1.3
    q = torch.tensor([[1.0, 0.2, 0.1]] * 4, dtype=F64)
    r = q[0].norm()
    escape = math.sqrt(2 * mu / r)
    direction = torch.tensor([-0.6, 0.8, 0.0], dtype=F64)
    v = torch.tensor([0.3, 0.8, 1.0, 1.9], dtype=F64)[:, None] * escape * direction
    assert orbit_energy(q[2], v[2], mu).abs() < 1e-15  # a parabola

    def field(_, z):
        return np.concatenate([z[3:], -mu * z[:3] / np.linalg.norm(z[:3]) ** 3])

    for t in (2.5, -1.7):
        x, w = kepler_flow(q, v, t, mu)
        for k in range(4):
            z = torch.cat([q[k], v[k]]).numpy()
            run = solve_ivp(field, (0, t), z, "DOP853", rtol=3e-14, atol=1e-15)
            torch.testing.assert_close(
                torch.cat([x[k], w[k]]).numpy(), run.y[:, -1], rtol=1e-11, atol=1e-11
            )


def test_kepler_flow_of_an_ellipse_is_its_closed_form():
    # Eccentric anomaly u at time u - e sin u, from perihelion.
    for e in (0.0, 0.5, 0.99):
        u = torch.linspace(-9, 9, 61, dtype=F64)
        c = math.sqrt(1 - e * e)
        q = torch.tensor([1 - e, 0.0], dtype=F64)
        v = torch.tensor([0.0, c / (1 - e)], dtype=F64)
        x, w = kepler_flow(q.expand(61, 2), v.expand(61, 2), u - e * u.sin())
        expected = torch.stack([u.cos() - e, c * u.sin()], -1)
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-14 / (1 - e) ** 2)
        speed = torch.stack([-u.sin(), c * u.cos()], -1) / (1 - e * u.cos())[:, None]
        torch.testing.assert_close(w, speed, rtol=0, atol=1e-13 / (1 - e) ** 3)


def test_kepler_flow_is_a_symplectic_group():
    q, v, t = rand(500, 3), rand(500, 3, seed=1, scale=1.2), 3 * rand(500, seed=2)
    x, w = kepler_flow(q, v, t)
    energy = orbit_energy(x, w, 1.0) - orbit_energy(q, v, 1.0)
    size = w.square().sum(-1) + v.square().sum(-1)
    assert (energy / size).abs().max() < 1e-13
    momentum = torch.linalg.cross(x, w) - torch.linalg.cross(q, v)
    assert momentum.abs().max() < 1e-11
    half = kepler_flow(*kepler_flow(q, v, 0.4 * t), 0.6 * t)
    torch.testing.assert_close(half[0], x, rtol=0, atol=1e-10)
    z = torch.cat([q, v], -1)[:20]
    step = audit.check_symplectic(
        lambda z: torch.cat(kepler_flow(z[..., :3], z[..., 3:], 0.3), -1), z, atol=1e-10
    )
    assert step <= 1e-10


def test_kepler_flow_at_its_limits():
    one = torch.tensor([1.0, 0.0], dtype=F64)
    x, v = kepler_flow(one, one.flip(0), 0.0)
    torch.testing.assert_close((x, v), (one, one.flip(0)), rtol=0, atol=0)
    x, _ = kepler_flow(one, one.flip(0), 2e5 * math.pi)
    torch.testing.assert_close(x, one, rtol=0, atol=1e-10)
    for speed in (-10.0, -1e3):  # through the neighbourhood of the centre and out again
        v = torch.tensor([speed, 0.1], dtype=F64)
        x, w = kepler_flow(one, v, 100.0)
        assert float(orbit_energy(x, w, 1.0)) == pytest.approx(speed**2 / 2 - 0.995, rel=1e-9)
    single = kepler_flow(one.float(), one.flip(0).float(), 1.0)[0]
    torch.testing.assert_close(
        single.double(),
        torch.tensor([1.0, 1.0], dtype=F64).mul(
            torch.tensor([math.cos(1), math.sin(1)], dtype=F64)
        ),
        rtol=0,
        atol=1e-6,
    )


def test_derivatives_of_the_kepler_flow():
    q, v = rand(3, 2), rand(3, 2, seed=1)
    t, mu = torch.tensor(0.7, dtype=F64), torch.tensor(1.2, dtype=F64)
    inputs = tuple(x.requires_grad_() for x in (q, v, t, mu))
    assert torch.autograd.gradcheck(kepler_flow, inputs, check_forward_ad=True)
    # The second derivative in time is the law of gravitation.
    fall = torch.func.jacfwd(torch.func.jacrev(lambda t: kepler_flow(q, v, t, mu)[0]))(t)
    x = kepler_flow(q, v, t, mu)[0]
    expected = -mu * x / x.norm(dim=-1, keepdim=True) ** 3
    torch.testing.assert_close(fall, expected, rtol=1e-10, atol=1e-10)


# --- Planets ------------------------------------------------------------------------------------


def planets():
    system, q, p = solar_system()
    masses = torch.tensor(integrator_cases._MASSES, dtype=F64)
    return system, planetary(masses, integrator_cases._GRAVITY), q, p


def energy_error(system, q, p, name, h, days=2e4):
    run = integrate(system, q, p, dt=h, steps=round(days / h), method=name)
    energy = planets()[0].energy(run.q, run.p)
    return float((energy / energy[0] - 1).abs().max()), run


def test_planets_have_the_energy_and_field_of_gravitation():
    plain, system, q, p = planets()
    torch.testing.assert_close(system.energy(q, p), plain.energy(q, p), rtol=1e-14, atol=0)
    lifted = system.lift(q, p, 0.0)
    torch.testing.assert_close(system.lower(*lifted)[:2], (q, p), rtol=1e-15, atol=1e-15)
    state = torch.stack([*lifted])

    def lower(state):
        return torch.stack(system.lower(*state)[:2])

    moved = torch.func.jvp(lower, (state,), (torch.stack(system.field(*lifted)),))[1]
    torch.testing.assert_close(moved[0], plain.field(q, p)[0], rtol=1e-13, atol=1e-17)
    torch.testing.assert_close(moved[1], plain.field(q, p)[1], rtol=1e-13, atol=1e-22)


@pytest.mark.parametrize(("name", "h", "gain"), [("leapfrog", 200.0, 200), ("aba864", 400.0, 5000)])
def test_wisdom_and_holman_err_by_the_masses_of_the_planets(name, h, gain):
    plain, system, q, p = planets()
    split, run = energy_error(system, q, p, name, h)
    assert split * gain < energy_error(plain, q, p, name, h)[0]
    momentum = torch.linalg.cross(run.q, run.p).sum(-2)
    assert (momentum - momentum[0]).norm(dim=-1).max() / momentum[0].norm() < 1e-14
    assert (run.p.sum(-2) - p.sum(0)).abs().max() < 1e-16


def test_planets_converge_to_their_motion():
    plain, system, q, p = planets()
    exact = integrate(plain, q, p, dt=50.0, steps=80, method="bm6_rkn").q[-1]
    errors = [
        float(
            (integrate(system, q, p, dt=4e3 / n, steps=n, method="leapfrog").q[-1] - exact).norm()
        )
        for n in (10, 20)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.1)
    near = integrate(system, q, p, dt=200.0, steps=20, method="aba864").q[-1]
    torch.testing.assert_close(near, exact, rtol=0, atol=1e-7)


# --- Near-integrable rows -----------------------------------------------------------------------


SHAKEN_AT = (torch.tensor([1.0, 0.2], dtype=F64), torch.tensor([0.1, 0.8], dtype=F64))


def shaking(q):
    return -torch.stack([q[..., 0] ** 3 + q[..., 1], q[..., 0] + q[..., 1] ** 3], -1)


def turn(q, p, h):
    c, s = math.cos(h), math.sin(h)
    return c * q + s * p, c * p - s * q


def shaken(eps):
    """Return oscillators, solved exactly, and a kick of size ``eps``."""
    return Split([turn, lambda q, p, h: (q, p + h * eps * shaking(q))])


# The derivative of that motion by eps at eps = 0, as a second row of the state.
SHAKEN_SLIGHTLY = Split([turn, lambda q, p, h: (q, torch.stack([p[0], p[1] + h * shaking(q[0])]))])


def moved(system, q, p, name, steps):
    return integrate(system, q, p, dt=8 / steps, steps=steps, method=name, save_every=steps).q[-1]


@pytest.mark.parametrize(
    ("name", "order", "coarse", "fine"),
    [("saba2", 4, 32, 64), ("aba864", 8, 16, 24), ("aba1064", 10, 16, 20)],
)
def test_errors_of_near_integrable_rows_scale_with_the_perturbation(name, order, coarse, fine):
    # At a fixed step the error falls as eps; its coefficient, exactly, as the first generalised
    # order of the step.
    errors = []
    for eps in (1e-5, 1e-6):
        q, p = SHAKEN_AT
        exact = moved(shaken(eps), q, p, "kahan_li8", 80)
        errors.append(float((moved(shaken(eps), q, p, name, 4) - exact).norm()))
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.02)

    q, p = (torch.stack([x, 0 * x]) for x in SHAKEN_AT)
    exact = moved(SHAKEN_SLIGHTLY, q, p, "sofroniou_spaletta10", 80)[1]
    first, a, b = (
        float((moved(SHAKEN_SLIGHTLY, q, p, name, n)[1] - exact).norm()) for n in (4, coarse, fine)
    )
    assert first * 1e-6 == pytest.approx(errors[1], rel=0.02)
    assert math.log(a / b) / math.log(fine / coarse) == pytest.approx(order, abs=0.4)


# --- All ----------------------------------------------------------------------------------------

KINDS = {
    "rigid_body": (BODY, lambda *b: (rand(*b, 3), rand(*b, 0))),
    "spinning_top": (TOP, attitude),
    "torus": (TORUS, lambda *b: (rand(*b, 2), rand(*b, 2, seed=1))),
    "mixed": (MIXED, lambda *b: (rand(*b, 3, scale=0.5), rand(*b, 3, seed=1))),
    "uniform": (magnetic(B, trap), lambda *b: (rand(*b, 3), rand(*b, 3, seed=1))),
    "varying": (magnetic(curl, trap), lambda *b: (rand(*b, 3), rand(*b, 3, seed=1))),
    "planets": (
        planetary(torch.tensor([1.0, 1e-3, 2e-3], dtype=F64)),
        lambda *b: (
            torch.tensor([[0.0, 0], [1, 0], [0, 2]], dtype=F64) + rand(*b, 3, 2, scale=0.05),
            torch.tensor([[0.0, 0], [0, 1e-3], [-1.4e-3, 0]], dtype=F64)
            + rand(*b, 3, 2, seed=1, scale=1e-5),
        ),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_given_fields_are_those_of_the_flows(kind):
    system, make = KINDS[kind]
    q, p = system.lift(*make(2), 0.0)
    torch.testing.assert_close(system.field(q, p), Split.field(system, q, p), rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,)])
def test_shapes_and_single_precision(kind, batch):
    system, make = KINDS[kind]
    q, p = make(*batch)
    run = integrate(system, q, p, dt=0.1, steps=3)
    assert run.q.shape == (4, *q.shape)
    assert run.p.shape == (4, *p.shape)
    if batch:
        rows = q.flatten(0, len(batch) - 1), p.flatten(0, len(batch) - 1)
        flat = integrate(system, *rows, dt=0.1, steps=3)
        torch.testing.assert_close(flat.q, run.q.flatten(1, len(batch)), rtol=0, atol=1e-15)
    single = integrate(system, q.float(), p.float(), dt=0.1, steps=3)
    assert single.q.dtype == single.p.dtype == torch.float32
    torch.testing.assert_close(single.q.double(), run.q, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_of_a_run(kind):
    system, make = KINDS[kind]
    q, p = make(2)
    u, v, dt = rand(*q.shape, seed=5), 0.1 * rand(*p.shape, seed=6), torch.tensor(0.1, dtype=F64)

    def end(q, p, dt):
        run = integrate(system, q, p, dt=dt, steps=3)
        return torch.cat([run.q[-1], run.p[-1]], -1)

    directions = (u, v * p.abs(), torch.ones_like(dt))
    forward = torch.func.jvp(end, (q, p, dt), directions)[1]
    a, b = (
        end(*(x + e * w for x, w in zip((q, p, dt), directions, strict=True)))
        for e in (1e-6, -1e-6)
    )
    torch.testing.assert_close(forward, (a - b) / 2e-6, rtol=1e-6, atol=1e-7)
    inputs = [x.clone().requires_grad_() for x in (q, p, dt)]
    grads = torch.autograd.grad(end(*inputs).sum(), inputs)
    paired = sum((g * w).sum() for g, w in zip(grads, directions, strict=True))
    torch.testing.assert_close(paired, forward.sum(), rtol=1e-12, atol=1e-12)
    alone = torch.func.vmap(lambda q, p: end(q, p, 0.1))(q, p)
    torch.testing.assert_close(alone, end(q, p, 0.1), rtol=0, atol=1e-14)


def test_constructors_refuse_what_makes_no_sense():
    for make in (rigid_body, spinning_top):
        with pytest.raises(ValueError, match=r"shape \(2,\), expected \(3,\)"):
            make(torch.ones(2))
        with pytest.raises(ValueError, match="inertia is not positive"):
            make(torch.tensor([1.0, 0.0, 1.0]))
    with pytest.raises(ValueError, match=r"b has shape \(2,\)"):
        magnetic(torch.ones(2))
    with pytest.raises(TypeError, match="b is a float"):
        magnetic(1.0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="mass is -1.0"):
        magnetic(B, mass=-1.0)
    with pytest.raises(ValueError, match=r"masses has shape \(1,\)"):
        planetary(torch.ones(1))
    with pytest.raises(ValueError, match="masses are not positive"):
        planetary(torch.tensor([1.0, -1.0]))
    with pytest.raises(ValueError, match=r"expected \(..., 2, d\) for 2 masses"):
        integrate(planetary(torch.ones(2)), torch.ones(3, 3), torch.ones(3, 3), dt=0.1, steps=1)
    with pytest.raises(ValueError, match="alternates two parts"):
        integrate(BODY, rand(3), dt=0.1, steps=1, method="bm4")
