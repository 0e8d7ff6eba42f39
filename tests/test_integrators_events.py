"""Crossings and states between the steps, against closed forms."""

import math

import pytest
import torch
from integrator_cases import F64, KEPLER, OSCILLATOR, perihelion
from test_integrators_reversible import HENON_HEILES

from darboux.integrators import Hamiltonian, Separable, crossings, integrate, interpolate


def first(q, p):
    return q[..., 0]


@pytest.mark.parametrize(
    ("name", "error"), [("leapfrog", 4e-4), ("bm6_rkn", 1e-12), ("gauss4", 1e-7), ("tao4", 2e-4)]
)
def test_section_points_of_henon_heiles_are_as_good_as_the_steps(name, error):
    y = torch.linspace(-0.1, 0.3, 5, dtype=F64)
    q = torch.stack([torch.zeros_like(y), y], -1)
    p = torch.zeros_like(q)
    p[:, 0] = (2 * (1 / 8 - HENON_HEILES.energy(q, p))).sqrt()
    found = crossings(
        HENON_HEILES, q, p, dt=0.1, steps=200, section=first, direction=1, method=name
    )
    assert len(found.t) >= 12
    assert float(found.q[:, 0].abs().max()) < 1e-12
    assert float((HENON_HEILES.energy(found.q, found.p) - 1 / 8).abs().max()) < error
    assert bool((found.p[:, 0] > 0).all())
    assert bool((found.copy.diff() >= 0).all())
    assert bool(((found.t.diff() > 0) | (found.copy.diff() > 0)).all())


@pytest.mark.parametrize("dt", [0.1, -0.1])
def test_an_oscillator_crosses_when_it_should(dt):
    q, p = torch.tensor([[1.0], [0.5]], dtype=F64), torch.zeros(2, 1, dtype=F64)
    found = crossings(OSCILLATOR, q, p, dt=dt, steps=100, section=first, method="gauss12")
    expected = (torch.arange(3, dtype=F64) + 0.5) * math.copysign(math.pi, dt)
    torch.testing.assert_close(found.t, expected.repeat(2), rtol=0, atol=1e-13)
    assert found.copy.tolist() == [0, 0, 0, 1, 1, 1]
    down = crossings(OSCILLATOR, q, p, dt=dt, steps=100, section=first, direction=-1)
    assert down.copy.tolist() == [0, 0, 1, 1]


def test_the_period_of_kepler_and_its_derivative():
    # T = 2 pi a^(3/2)
    a = torch.tensor(1.0, dtype=F64, requires_grad=True)
    q, p = perihelion(0.3)
    found = crossings(
        KEPLER,
        a * q,
        p * a**-0.5,
        dt=2 * math.pi / 200,
        steps=210,
        section=lambda q, p: q[..., 1],
        direction=1,
        method="bm6_rkn",
    )
    assert found.q.shape == (1, 2)
    assert float(found.t[0].detach()) == pytest.approx(2 * math.pi, abs=1e-9)
    (rate,) = torch.autograd.grad(found.t[0], a, retain_graph=True)
    assert float(rate) == pytest.approx(3 * math.pi, abs=1e-7)
    (shift,) = torch.autograd.grad(found.q[0, 0], a)
    assert float(shift) == pytest.approx(0.7, abs=1e-7)


def test_parameters_of_each_copy_stay_with_it():
    stiffness = torch.tensor([1.0, 4.0, 9.0], dtype=F64)
    system = Separable(force=lambda q: -stiffness[:, None] * q)
    q, p = torch.ones(3, 1, dtype=F64), torch.zeros(3, 1, dtype=F64)
    found = crossings(system, q, p, dt=0.05, steps=40, section=first, method="kahan_li8")
    expected = math.pi / 2 / stiffness.sqrt()
    torch.testing.assert_close(found.t[found.copy.diff(prepend=-torch.ones(1)) > 0], expected)


def test_clocks_and_no_crossings():
    driven = Separable(force=lambda q, t: -q + 0 * t[..., None], time=True)
    q, p = torch.ones(1, dtype=F64), torch.zeros(1, dtype=F64)
    found = crossings(driven, q, p, dt=0.1, steps=40, section=first, t0=5.0, method="kahan_li8")
    assert found.q.shape == (1, 1)
    assert float(found.t) == pytest.approx(5 + math.pi / 2, abs=1e-8)
    none = crossings(OSCILLATOR, q, p, dt=0.1, steps=40, section=lambda q, p: first(q, p) - 2)
    assert none.t.shape == (0,)
    assert none.q.shape == (0, 1)


def test_states_between_saved_ones():
    q, p = perihelion(0.2)
    fine = integrate(KEPLER, q, p, dt=0.01, steps=200, method="bm6_rkn")
    errors = []
    for every in (4, 8):
        thin = integrate(KEPLER, q, p, dt=0.01, steps=200, method="bm6_rkn", save_every=every)
        between = interpolate(KEPLER, thin, fine.t)
        errors.append(float((between.q - fine.q).abs().max()))
        torch.testing.assert_close(between.t, fine.t)
    assert errors[0] < 2e-7
    assert 12 < errors[1] / errors[0] < 20  # the fourth power
    back = integrate(KEPLER, fine.q[-1], fine.p[-1], dt=-0.01, steps=200, method="bm6_rkn")
    one = interpolate(KEPLER, back, -0.005)
    assert one.q.shape == (2,)
    driven = Separable(lambda q, t: q.square().sum(-1) / 2 + 0 * t, time=True)
    run = integrate(driven, q, p, dt=0.1, steps=9, method="bm6")
    assert interpolate(driven, run, torch.tensor([0.15, 0.8])).p.shape == (2, 2)


def test_refusals():
    q, p = perihelion(0.2)
    run = integrate(KEPLER, q, p, dt=0.1, steps=3)
    with pytest.raises(ValueError, match="outside the trajectory, expected times from 0 to 0.3"):
        interpolate(KEPLER, run, 1.0)
    with pytest.raises(ValueError, match=r"section has shape \(2,\)"):
        crossings(KEPLER, q, p, dt=0.1, steps=3, section=lambda q, p: q)
    with pytest.raises(ValueError, match="direction is 2"):
        crossings(KEPLER, q, p, dt=0.1, steps=3, section=first, direction=2)
    with pytest.raises(ValueError, match="dt is 0"):
        crossings(KEPLER, q, p, dt=0.0, steps=3, section=first)
    coupled = Hamiltonian(lambda q, p: (q * p).square().sum(-1))
    with pytest.raises(ValueError, match="give q and p leading dimensions"):
        torch.func.vmap(
            lambda q: crossings(coupled, q, q, dt=0.1, steps=3, section=first, method="rk4").t
        )(torch.ones(3, 2))
