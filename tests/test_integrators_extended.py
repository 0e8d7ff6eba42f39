"""Doubled phase space: what Tao's method and its projected form keep, and where they fail."""

import math

import pytest
import torch
from integrator_cases import COUPLED, F64, PENDULUM, start
from test_integrators_implicit import SPHERE, great_circle
from torch.func import jacfwd

from darboux.integrators import METHODS, Split, VectorField, audit, integrate, scan_omega, tao


def doubled(method, h):
    """Return a step on ``w = (q, x, p, y)``, in canonical order."""

    def step(w):
        q, x, p, y = w.chunk(4, -1)
        q, p, memory = method.advance(COUPLED, q, p, h, 1, (x, y, COUPLED.field(q, y)))
        return torch.cat([q, memory.x, p, memory.y], -1)

    return step


def apart():
    """Return doubled states ``(5, 8)`` off the diagonal."""
    return torch.cat([*start(2, 5)[0].unbind(0), *start(2, 5)[1].unbind(0)], -1)


@pytest.mark.parametrize("order", [2, 4, 6])
def test_tao_is_symplectic_and_symmetric_in_doubled_space(order):
    method, w = tao(order, omega=7.0), apart()
    assert audit.check_symplectic(doubled(method, 0.1), w, atol=1e-12) <= 1e-12
    assert audit.volume_defect(doubled(method, 0.1), w).max() <= 1e-12
    back = doubled(method, -0.1)(doubled(method, 0.1)(w))
    torch.testing.assert_close(back, w, rtol=0, atol=1e-14)


def test_tao_is_not_symplectic_in_phase_space_and_says_so():
    z = torch.cat(start(5), -1)
    for order in (2, 4, 6):
        method = METHODS[f"tao{order}"]
        assert not method.symplectic
        assert not method.symmetric
        assert audit.symplecticity_defect(audit.step_map(COUPLED, method, 0.1), z).max() > 1e-5
    step = audit.step_map(SPHERE, tao(2, 5.0), 2 * math.pi / 60)
    assert audit.symplecticity_defect(step, torch.cat(great_circle())) > 1e-3


def test_binding_by_overwritten_values_is_not_symplectic():
    # hamiltorch 19b627b, samplers.py, at its default binding 100 and step 0.1.
    c, s = math.cos(20.0), math.sin(20.0)

    def sequential(w):
        q, x, p, y = w.chunk(4, -1)
        q = (q + x + c * (q - x) + s * (p - y)) / 2
        p = (p + y - s * (q - x) + c * (p - y)) / 2
        x = (q + x - c * (q - x) - s * (p - y)) / 2
        y = (p + y + s * (q - x) - c * (p - y)) / 2
        return torch.cat([q, x, p, y], -1)

    w = torch.linspace(-1, 1, 4, dtype=F64)
    assert float(torch.linalg.det(jacfwd(sequential)(w))) == pytest.approx(0.246, abs=1e-3)
    assert audit.symplecticity_defect(sequential, w) > 0.4
    free = tao(2, omega=100.0)
    still = VectorField(lambda z: 0 * z)  # so that a step is the binding alone

    def ours(w):
        q, x, p, y = w.chunk(4, -1)
        q, p, memory = free.advance(still, q, p, 0.1, 1, (x, y, (0 * x, 0 * y)))
        return torch.cat([q, memory.x, p, memory.y], -1)

    jac = jacfwd(ours)(w)
    assert abs(float(torch.linalg.det(jac)) - 1) < 1e-15
    assert audit.symplecticity_defect(ours, w) < 1e-15
    turn = torch.tensor([[c, s], [-s, c]], dtype=F64)  # of the differences (q - x, p - y)
    difference = torch.tensor([[1.0, -1, 0, 0], [0, 0, 1, -1]], dtype=F64)
    torch.testing.assert_close(difference @ jac, turn @ difference, rtol=0, atol=1e-15)


def test_scan_of_omega_finds_the_failures_and_the_aliases():
    h = 2 * math.pi / 60
    scan = scan_omega(SPHERE, *great_circle(), dt=h, steps=600, omegas=[1.0, 5.0, 20.0, 50.0])
    assert float(scan.error[0]) > 0.9
    assert (scan.error[1:] < 0.1).all()
    # Only 2 omega h modulo 2 pi acts.
    assert float(scan.turn[2]) == pytest.approx(float(scan.turn[3]), abs=1e-12)
    assert float(scan.error[2]) == pytest.approx(float(scan.error[3]), rel=1e-6)
    unbound = scan_omega(SPHERE, *great_circle(), dt=h, steps=1200, omegas=[0.0])
    assert float(unbound.error[0]) > 0.5
    # At a multiple of pi / h nothing binds.
    lost = scan_omega(SPHERE, *great_circle(), dt=h, steps=120, omegas=[0.0, math.pi / h])
    assert float(lost.error[1]) == pytest.approx(float(lost.error[0]), rel=1e-6)


def test_scan_keeps_copies_apart():
    q, p = start(3)
    scan = scan_omega(COUPLED, q, p, dt=0.1, steps=5, omegas=[2.0, 9.0], order=4)
    assert scan.error.shape == (2, 3)
    run = integrate(COUPLED, q[1], p[1], dt=0.1, steps=5, method=tao(4, 9.0))
    energy = COUPLED.energy(run.q, run.p)
    expected = (energy / energy[0] - 1).abs().max()
    torch.testing.assert_close(scan.error[1, 1], expected, rtol=1e-9, atol=0)


def test_tao_loses_angular_momentum_and_projection_keeps_it():
    q, p = great_circle()
    deviations = []
    for name in ("tao2", "semiexplicit2"):
        run = integrate(SPHERE, q, p, dt=2 * math.pi / 60, steps=120, method=name)
        momentum = run.q[:, 0] * run.p[:, 1] - run.q[:, 1] * run.p[:, 0]
        deviations.append(float((momentum / momentum[0] - 1).abs().max()))
    assert deviations[0] > 1e-4
    assert deviations[1] < 1e-14


def test_extended_methods_cost_what_they_say():
    count = 0

    def field(q, p):
        nonlocal count
        count += 1
        return p, -torch.sin(q)

    system = type(COUPLED)(PENDULUM.energy, field)
    q, p = start(3)
    with torch.no_grad():
        integrate(system, q, p, dt=0.1, steps=20, method="tao2")
    assert count == 1 + 3 * 20


def test_copies_that_agree_stay_together_where_the_energy_separates():
    # Then each copy makes a leapfrog step, and the projection has nothing to do.
    q, p = start(4)
    leapfrog = METHODS["leapfrog"].step(PENDULUM, q, p, 0.1)
    one = METHODS["semiexplicit2"].step(PENDULUM, q, p, 0.1)
    error = [float((a - b).norm()) for a, b in zip(one, leapfrog, strict=True)]
    assert max(error) < 1e-3


@pytest.mark.parametrize("name", ["tao2", "tao4", "semiexplicit2", "semiexplicit6"])
def test_systems_without_a_hamiltonian_are_refused(name):
    q, p = start()
    field = VectorField(lambda z: -z)
    flows = Split([lambda q, p, h: (q + h * p, p), lambda q, p, h: (q, p - h * q)])
    for system, instead in ((field, "gauss4"), (flows, "leapfrog")):
        with pytest.raises(ValueError, match=f"needs a Hamiltonian.*{instead}"):
            integrate(system, q, p, dt=0.1, steps=1, method=name)
    with pytest.raises(ValueError, match="order is 3"):
        tao(3)
