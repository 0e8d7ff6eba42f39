"""The audits find what is true, and find out what is false."""

import dataclasses
import math

import pytest
import torch
from integrator_cases import (
    COUPLED,
    F64,
    GENERAL,
    KEPLER,
    OSCILLATOR,
    QUADRATIC,
    SPLITTINGS,
    perihelion,
    start,
)

from darboux.integrators import METHODS, Separable, VectorField, audit, integrate


def test_symplecticity_and_volume_of_known_maps():
    z = torch.cat(start(4), -1)
    stretch = torch.diag(torch.tensor([2.0, 3.0, 0.5, 1 / 3], dtype=F64))
    assert audit.check_symplectic(lambda z: z @ stretch, z) < 1e-15
    swell = torch.diag(torch.tensor([2.0, 3.0, 1 / 3, 0.5], dtype=F64))  # volume, not symplectic
    assert audit.volume_defect(lambda z: z @ swell, z).max() < 1e-15
    # J^T Omega J pairs q_1 with p_1 by 2/3
    defect = audit.symplecticity_defect(lambda z: z @ swell, z)
    torch.testing.assert_close(defect, torch.full((4,), 0.5, dtype=F64), rtol=1e-14, atol=0)
    with pytest.raises(RuntimeError, match=r"is 0\.5, expected at most 1e-11"):
        audit.check_symplectic(lambda z: z @ swell, z)
    with pytest.raises(ValueError, match=r"z has shape \(4, 3\)"):
        audit.symplecticity_defect(torch.neg, z[:, :3])
    damped = audit.volume_defect(lambda z: 0.9 * z, z)
    torch.testing.assert_close(damped, torch.full((4,), 1 - 0.9**4, dtype=F64), rtol=1e-12, atol=0)


def test_energy_drift_tells_a_line_from_an_oscillation():
    q, p = perihelion(0.3)
    fine = {"dt": 2 * math.pi / 100, "steps": 4000}
    bounded = audit.energy_drift(KEPLER, integrate(KEPLER, q, p, **fine))
    lost = audit.energy_drift(KEPLER, integrate(KEPLER, q, p, **fine, method="rk4"))
    assert abs(bounded.significance) < 4
    assert abs(lost.significance) > 30
    assert lost.slope < 0
    assert lost.error == pytest.approx(float(-lost.slope * 4000 * fine["dt"]), rel=0.1)


def test_energy_drift_of_the_explicit_euler_oscillator_is_exact():
    # |z|^2 grows by 1 + h^2 in each step.
    q, p = torch.ones(1, dtype=F64), torch.zeros(1, dtype=F64)
    run = integrate(OSCILLATOR, q, p, dt=0.01, steps=100, method="euler")
    drift = audit.energy_drift(OSCILLATOR, run)
    assert float(drift.error) == pytest.approx((1 + 1e-4) ** 100 - 1, rel=1e-10)
    assert float(drift.slope) == pytest.approx(1e-2, rel=1e-2)


@pytest.mark.parametrize("name", ["leapfrog", "yoshida6", "gauss4", "rk4"])
def test_observed_order(name):
    q, p = start(3)
    system = COUPLED if name in ("gauss4", "rk4") else GENERAL
    found = audit.observed_order(system, name, q, p, t=1.0)
    assert found.order == pytest.approx(METHODS[name].order, abs=0.1)
    assert len(found.dts) == len(found.errors) >= 2


def test_a_wrong_coefficient_is_found_out():
    good = next(m for m in SPLITTINGS if m.name == "forest_ruth")
    flows = [(kick, c * (1.01 if i in (1, 5) else 1.0)) for i, (kick, c) in enumerate(good.flows)]
    bad = dataclasses.replace(good, flows=tuple(flows))
    found = audit.observed_order(GENERAL, bad, *start(3), t=1.0)
    assert found.order < 1
    # Kicks and drifts stay canonical whatever their length.
    audit.check_symplectic(audit.step_map(GENERAL, bad, 0.1), torch.cat(start(3), -1))


def test_nystrom_row_on_another_kinetic_energy_loses_two_orders():
    row = next(m for m in SPLITTINGS if m.name == "bm6_rkn")
    forced = dataclasses.replace(row, rkn=False)
    found = audit.observed_order(GENERAL, forced, *start(3), t=2.0, steps=8)
    assert found.order == pytest.approx(4, abs=0.2)


def test_report_measures_and_prints():
    names = ["rk4", "symplectic_euler", "leapfrog", "bm4", "bm6_rkn", "gauss6"]
    report = audit.report(QUADRATIC, *start(3), dt=0.1, steps=100, methods=names)
    for row in report.rows:
        symplectic = METHODS[row.method].symplectic
        assert (row.symplecticity < 1e-13) == symplectic
        assert (row.volume < 1e-13) == symplectic
        assert row.observed == pytest.approx(row.order, abs=0.35)
        assert (row.reversal < 1e-14) == METHODS[row.method].symmetric
    assert report["leapfrog"].evals == pytest.approx(1, abs=0.05)
    assert report["gauss6"].energy < report["leapfrog"].energy / 1e4
    lines = str(report).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split()[:3] == ["method", "order", "observed"]
    assert any(line.startswith("bm6_rkn ") for line in lines)


def test_report_survives_what_breaks_down():
    steep = Separable(lambda q: -q.pow(4).sum(-1))
    row = audit.report(steep, *start(), dt=0.5, steps=100, methods=["euler"])["euler"]
    assert row.energy == math.inf
    assert row.volume > 0.01


def test_report_leaves_out_what_does_not_apply():
    rows = {row.method for row in audit.report(COUPLED, *start(), dt=0.02, steps=20).rows}
    assert "leapfrog" not in rows
    assert "gauss4" in rows
    with pytest.raises(ValueError, match="separable"):
        audit.report(COUPLED, *start(), dt=0.1, steps=20, methods=["leapfrog"])


def test_report_of_a_plain_field_has_no_energy_to_show():
    field = VectorField(lambda z: torch.sin(z.roll(1, -1)))
    z = torch.linspace(-1, 1, 3, dtype=F64)
    row = audit.report(field, z, dt=0.1, steps=20, methods=["gauss4"])["gauss4"]
    assert math.isnan(row.energy)
    assert math.isnan(row.symplecticity)
    assert row.observed == pytest.approx(4, abs=0.1)
