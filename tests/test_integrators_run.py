"""What a run returns, accepts and refuses."""

import pytest
import torch
from integrator_cases import (
    COUPLED,
    F64,
    GENERAL,
    OSCILLATOR,
    QUADRATIC,
    SPLITTINGS,
    hardest,
    solar_system,
    start,
)
from torch import nn

from darboux._checks import ConvergenceError
from darboux.integrators import (
    METHODS,
    Hamiltonian,
    Separable,
    VectorField,
    audit,
    find_method,
    gauss_legendre,
    integrate,
    solve_stages,
)

ONE_OF_EACH = ["leapfrog", "position_leapfrog", "ruth3", "rk4", "gauss4"]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_states_are_saved_at_the_times_they_say(name):
    q, p = start(3)
    system = hardest(METHODS[name])
    full = integrate(system, q, p, dt=0.1, steps=10, method=name)
    assert full.t.shape == (11,)
    assert full.q.shape == full.p.shape == (11, 3, 2)
    torch.testing.assert_close((full.q[0], full.p[0]), (q, p), rtol=0, atol=0)
    thin = integrate(system, q, p, dt=0.1, steps=10, method=name, save_every=3)
    kept = [0, 3, 6, 9, 10]
    torch.testing.assert_close(thin, type(thin)(*(x[kept] for x in full)), rtol=0, atol=1e-14)
    by_hand = q, p
    for _ in range(10):
        by_hand = METHODS[name].step(system, *by_hand, 0.1)
    torch.testing.assert_close((full.q[-1], full.p[-1]), by_hand, rtol=0, atol=1e-14)


def test_times_are_multiples_not_sums():
    run = integrate(OSCILLATOR, *start(), dt=0.1, steps=1000, save_every=1000)
    assert run.t[-1] == 1000 * 0.1


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_no_steps_and_backward_steps(name):
    q, p = start(2)
    system = hardest(METHODS[name])
    still = integrate(system, q, p, dt=0.1, steps=0, method=name)
    torch.testing.assert_close((still.q, still.p), (q[None], p[None]), rtol=0, atol=0)
    there = integrate(system, q, p, dt=0.01, steps=50, method=name)
    back = integrate(system, there.q[-1], there.p[-1], dt=-0.01, steps=50, method=name)
    torch.testing.assert_close(back.q[-1], q, rtol=0, atol=1e-5)
    assert back.t[-1] == -0.5


@pytest.mark.parametrize("batch", [(), (1,), (20,), (3, 4, 5), (0,)])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_batches_of_any_shape_are_independent_copies(name, batch):
    q, p = start(*batch)
    system = hardest(METHODS[name])
    run = integrate(system, q, p, dt=0.1, steps=3, method=name)
    assert run.q.shape == (4, *batch, 2)
    flat = integrate(system, q.reshape(-1, 2), p.reshape(-1, 2), dt=0.1, steps=3, method=name)
    torch.testing.assert_close(run.q, flat.q.reshape(run.q.shape), rtol=0, atol=1e-15)
    tracked = integrate(system, q.requires_grad_(), p, dt=0.1, steps=3, method=name)
    torch.testing.assert_close(tracked.q, run.q, rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_float32_stays_float32_and_agrees(name):
    # The mass of QUADRATIC is float64, hence another system.
    system = GENERAL if name != "gauss4" else COUPLED
    single = integrate(system, *start(4, dtype=torch.float32), dt=0.05, steps=40, method=name)
    double = integrate(system, *start(4), dt=0.05, steps=40, method=name)
    assert single.t.dtype == single.q.dtype == single.p.dtype == torch.float32
    torch.testing.assert_close(single.q.double(), double.q, rtol=0, atol=2e-5)


def test_bodies_in_space_move_alike_by_splitting_and_gauss():
    system, q, p = solar_system()
    explicit = integrate(system, q, p, dt=20.0, steps=20, method="bm6_rkn")
    implicit = integrate(system, q, p, dt=20.0, steps=20, method="gauss8")
    torch.testing.assert_close(explicit.q, implicit.q, rtol=0, atol=1e-10)
    batch = integrate(system, q.expand(3, 6, 3), p.expand(3, 6, 3), dt=20.0, steps=20)
    one = integrate(system, q, p, dt=20.0, steps=20)
    torch.testing.assert_close(batch.q[:, 1], one.q, rtol=0, atol=1e-13)


def test_a_system_derives_what_is_not_given():
    q, p = start(5)
    mass = torch.tensor([1.0, 2.5], dtype=F64)
    closed = Separable(
        lambda q: q.pow(4).sum(-1) / 4,
        lambda p: (p.square() / mass).sum(-1) / 2,
        force=lambda q: -(q**3),
        velocity=lambda p: p / mass,
    )
    derived = Separable(closed.potential, closed.kinetic)
    massive = Separable(closed.potential, mass=mass)
    whole = Hamiltonian(closed.energy)
    given = Hamiltonian(closed.energy, closed.field)
    for system in (derived, massive, whole, given):
        torch.testing.assert_close(system.field(q, p), closed.field(q, p), rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(system.energy(q, p), closed.energy(q, p), rtol=1e-14, atol=0)


def test_a_module_may_be_a_potential():
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(-2)).double()
    run = integrate(Separable(net), *start(3), dt=0.1, steps=3)
    assert run.q.shape == (4, 3, 2)


def test_a_vector_field_needs_no_momentum():
    decay = VectorField(lambda z: -z)
    run = integrate(decay, torch.ones(3, 1, dtype=F64), dt=0.1, steps=10, method="gauss8")
    assert run.p.shape == (11, 3, 0)
    torch.testing.assert_close(run.q[:, 0, 0], torch.exp(-run.t), rtol=1e-12, atol=0)


def test_a_leapfrog_step_costs_one_force():
    q, p = start()
    assert audit.evaluations(OSCILLATOR, "leapfrog", q, p, dt=0.1, steps=100) == 1.01
    assert audit.evaluations(OSCILLATOR, "position_leapfrog", q, p, dt=0.1, steps=100) == 1
    assert audit.evaluations(OSCILLATOR, "kahan_li8", q, p, dt=0.1, steps=100) == 17.01
    assert audit.evaluations(OSCILLATOR, "rk4", q, p, dt=0.1, steps=100) == 4


def test_saving_often_costs_no_force():
    count = 0

    def force(q):
        nonlocal count
        count += 1
        return -q

    integrate(Separable(force=force), *start(), dt=0.1, steps=50, save_every=1)
    assert count <= 52  # one to see whether a graph is wanted


def test_solve_stages_is_warm_started_and_settles_at_round_off():
    tableau = gauss_legendre(3)
    z = torch.cat(start(4), -1)

    def field(z):
        return torch.cat(COUPLED.field(z[..., :2], z[..., 2:]), -1)

    first = solve_stages(field, z, 0.05, tableau)
    assert first.residual < 1e-15
    warm = solve_stages(field, z + first.increment, 0.05, tableau, guess=first)
    cold = solve_stages(field, z + first.increment, 0.05, tableau)
    assert warm.iterations < cold.iterations
    torch.testing.assert_close(warm.increment, cold.increment, rtol=0, atol=1e-16)
    stage = z + 0.05 * torch.einsum("ij,j...->i...", torch.from_numpy(tableau.A), first.slopes)
    torch.testing.assert_close(field(stage), first.slopes, rtol=0, atol=1e-14)


def test_solve_stages_evaluates_all_stages_at_once():
    shapes = []

    def field(z):
        shapes.append(tuple(z.shape))
        return -z

    with torch.no_grad():
        found = solve_stages(field, torch.ones(5, 2, dtype=F64), 0.1, gauss_legendre(4))
    assert shapes == [(4, 5, 2)] * found.iterations


def test_progress_goes_to_stderr(capsys):
    integrate(OSCILLATOR, *start(), dt=0.1, steps=10, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "10/10" in err


# --- Refusals ---------------------------------------------------------------------------------


def test_splittings_refuse_what_does_not_separate():
    q, p = start()
    for method in SPLITTINGS:
        with pytest.raises(ValueError, match=f"{method.name} needs a separable.*gauss4"):
            integrate(COUPLED, q, p, dt=0.1, steps=1, method=method)
        with pytest.raises(ValueError, match="couple q and p"):
            method.step(COUPLED, q, p, 0.1)


def test_nystrom_rows_refuse_other_kinetic_energies():
    q, p = start()
    for name in ("bm4_rkn", "bm6_rkn", "mclachlan_atela5"):
        integrate(QUADRATIC, q, p, dt=0.1, steps=1, method=name)
        with pytest.raises(ValueError, match=r"kinetic energy.*'bm4'"):
            integrate(GENERAL, q, p, dt=0.1, steps=1, method=name)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"method": "leapforg"}, ValueError, "leapforg.*leapfrog"),
        ({"q": torch.ones(3, 2)}, ValueError, r"p has shape \(2,\), expected .* \(3, 2\)"),
        ({"q": torch.ones(3), "p": torch.ones(2)}, ValueError, r"shape \(2,\).*\(3,\)"),
        ({"q": torch.ones(2, dtype=F64)}, TypeError, r"torch.float32, expected torch.float64"),
        ({"q": torch.ones(2, dtype=torch.int64)}, TypeError, "q has dtype torch.int64"),
        ({"q": [1.0, 2.0]}, TypeError, "q is a list"),
        ({"q": torch.tensor([1.0, float("nan")])}, ValueError, "NaN"),
        ({"p": None}, ValueError, "p is missing"),
        ({"q": torch.tensor(1.0), "p": torch.tensor(1.0)}, ValueError, r"shape \(\)"),
        ({"steps": -1}, ValueError, "steps is -1"),
        ({"steps": 2.0}, TypeError, "steps is a float"),
        ({"save_every": 0}, ValueError, "save_every is 0"),
        ({"dt": "0.1"}, TypeError, "dt is a str"),
        ({"dt": float("inf")}, ValueError, "dt is inf"),
        ({"dt": torch.ones(3)}, ValueError, r"dt has shape \(3,\)"),
    ],
)
def test_wrong_arguments_are_named_at_the_door(change, error, message):
    good = {"q": torch.ones(2), "p": torch.ones(2), "dt": 0.1, "steps": 3, "method": "leapfrog"}
    with pytest.raises(error, match=message):
        integrate(OSCILLATOR, **{**good, **change})


def test_systems_refuse_what_contradicts_itself():
    with pytest.raises(ValueError, match="neither potential nor force"):
        Separable()
    with pytest.raises(ValueError, match="mass is part of the kinetic"):
        Separable(torch.sum, torch.sum, mass=2.0)
    q, p = start(3)
    with pytest.raises(ValueError, match="expected a potential"):
        Separable(force=torch.neg).energy(q, p)
    with pytest.raises(ValueError, match="expected kinetic"):
        Separable(lambda q: q.sum(-1), velocity=torch.sinh).energy(q, p)
    with pytest.raises(ValueError, match=r"potential has shape \(3, 2\)"):
        Separable(torch.square).energy(q, p)
    with pytest.raises(ValueError, match="VectorField has no energy"):
        VectorField(torch.neg).energy(q, p)


def test_a_run_that_blows_up_says_when():
    steep = Separable(lambda q: -q.pow(4).sum(-1))
    with pytest.raises(ConvergenceError, match=r"NaN or infinite at step \d+; it was finite at"):
        integrate(steep, *start(3), dt=0.5, steps=2000, save_every=10)


def test_stages_that_do_not_settle_say_so():
    stiff = Hamiltonian(lambda q, p: 1e3 * (q.square() + p.square()).sum(-1))
    with pytest.raises(
        ConvergenceError, match=r"gauss4, between steps 0 and 1: .*smaller dt"
    ) as info:
        integrate(stiff, *start(), dt=0.1, steps=3, method="gauss4")
    assert info.value.iterations > 1
    assert not info.value.residual < 1


def test_one_bad_copy_is_enough_to_raise():
    q, p = start(50)
    q[17] = 1e4
    with pytest.raises(ConvergenceError):
        integrate(COUPLED, q, p, dt=0.1, steps=1, method="gauss4")


def test_a_batch_converges_as_its_members_do():
    # Scales far apart: the large must not end the sweeps of the small.
    q, p = start(6)
    size = torch.logspace(-3, 1, 6, dtype=F64)[:, None]
    method = find_method("gauss6")
    together = method.step(COUPLED, q * size, p * size, 0.02)
    for i in range(6):
        alone = method.step(COUPLED, q[i] * size[i], p[i] * size[i], 0.02)
        for a, b in zip(together, alone, strict=True):
            assert ((a[i] - b).abs() <= 4e-16 * (1e-3 + float(b.abs().max()))).all()


def test_sums_are_compensated_where_that_was_built_and_nowhere_else():
    q, p = start(2)
    with pytest.raises(ValueError, match="rk4 does not compensate its sums"):
        integrate(OSCILLATOR, q, p, dt=0.1, steps=1, method="rk4", compensated=True)
    for name in ("leapfrog", "gauss4"):
        integrate(OSCILLATOR, q, p, dt=0.1, steps=1, method=name, compensated=True)
