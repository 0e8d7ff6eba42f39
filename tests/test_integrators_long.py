"""Long runs: recorded on disk, interrupted and resumed; round-off; what is left on failure."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from integrator_cases import F64, GENERAL, KEPLER, QUADRATIC, perihelion, start

from darboux._checks import ConvergenceError
from darboux.integrators import (
    Hamiltonian,
    Separable,
    integrate,
    load_trajectory,
    recording,
)

OPTIONS = [
    ("leapfrog", {}),
    ("leapfrog", {"compensated": True}),
    ("leapfrog", {"lattice": True}),
    ("gauss4", {}),
]


@pytest.fixture
def short_chunks(monkeypatch):
    monkeypatch.setattr(recording, "_STEPS", 20)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_a_killed_run_resumes_to_the_same_bytes(name, options, tmp_path, monkeypatch, short_chunks):
    def run(folder):
        q, p = start(3)
        return integrate(
            QUADRATIC,
            q,
            p,
            dt=0.1,
            steps=100,
            save_every=3,
            method=name,
            save_to=tmp_path / folder,
            **options,
        )

    whole = run("whole")
    q, p = start(3)
    plain = integrate(QUADRATIC, q, p, dt=0.1, steps=100, save_every=3, method=name, **options)
    torch.testing.assert_close(whole, plain, rtol=0, atol=1e-13)

    class Killed(BaseException):
        pass

    write = recording._write_manifest

    def killed(folder, manifest):
        # After the data of the third chunk, before they are counted.
        if manifest["done"] > 12:
            raise Killed
        write(folder, manifest)

    monkeypatch.setattr(recording, "_write_manifest", killed)
    with pytest.raises(Killed):
        run("broken")
    done = json.loads((tmp_path / "broken" / "manifest.json").read_text())["done"]
    assert load_trajectory(tmp_path / "broken").q.shape == (done, 3, 2)
    monkeypatch.undo()
    monkeypatch.setattr(recording, "_STEPS", 20)
    run("broken")
    assert files(tmp_path / "broken") == files(tmp_path / "whole")
    before = files(tmp_path / "whole")
    assert torch.equal(run("whole").q, whole.q)  # nothing left to do
    assert files(tmp_path / "whole") == before
    assert np.load(tmp_path / "whole" / "q.npy", mmap_mode="r").shape == (35, 3, 2)


def test_a_recording_is_not_overwritten_by_another_run(tmp_path, short_chunks):
    q, p = start(2)

    def run(system: Any = QUADRATIC, q: Any = q, folder: Any = "run", **options):
        given: dict[str, Any] = {"dt": 0.1, "steps": 30, "method": "leapfrog", **options}
        return integrate(system, q, p, save_to=tmp_path / folder, **given)

    run()
    before = files(tmp_path / "run")
    for change, word in (
        ({"dt": 0.2}, "dt is 0.1, not 0.2"),
        ({"method": "bm4"}, "method is leapfrog, not bm4"),
        ({"steps": 40}, "steps is 30, not 40"),
        ({"q": q + 1e-9}, "start"),
        ({"compensated": True}, "options"),
        ({"system": Separable(GENERAL.potential)}, "speed"),
    ):
        with pytest.raises(ValueError, match=f"holds a run whose {word}"):
            run(**change)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("precious")
    with pytest.raises(ValueError, match="holds no recording and is left alone"):
        run(folder="mine")
    assert files(tmp_path / "mine") == {"notes.txt": b"precious"}
    assert files(tmp_path / "run") == before
    with pytest.raises(ValueError, match="holds no recording"):
        load_trajectory(tmp_path / "nothing")


def test_a_recording_never_holds_more_than_a_chunk(tmp_path, monkeypatch, short_chunks):
    most = 0
    lowered = recording._lowered

    def watched(run, qs, ps):
        nonlocal most
        most = max(most, len(qs))
        return lowered(run, qs, ps)

    monkeypatch.setattr(recording, "_lowered", watched)
    run = integrate(QUADRATIC, *start(), dt=0.1, steps=200, save_to=tmp_path / "run")
    assert most <= 20
    assert run.q.shape == (201, 2)


def test_a_recording_keeps_clocks_and_no_graph(tmp_path):
    system = Separable(lambda q, t: q.square().sum(-1) * (2 + torch.sin(t)) / 2, time=True)
    q, p = start()
    run = integrate(system, q.requires_grad_(), p, dt=0.1, steps=9, t0=3.0, save_to=tmp_path / "a")
    plain = integrate(system, q.detach(), p, dt=0.1, steps=9, t0=3.0)
    torch.testing.assert_close(run, plain, rtol=0, atol=1e-14)
    assert not run.q.requires_grad


# --- What is left on failure --------------------------------------------------------------------


def test_a_failed_run_leaves_its_good_states(tmp_path):
    steep = Separable(lambda q: -q.pow(4).sum(-1))
    q, p = start(3)
    cases: tuple[dict[str, Any], ...] = (
        {},
        {"adjoint": "reversible"},
        {"adjoint": "checkpoint"},
        {"save_to": tmp_path / "a"},
    )
    left: Any = None
    for options in cases:
        x = q.detach().requires_grad_("adjoint" in options)
        with pytest.raises(ConvergenceError, match=r"finite at step (\d+)") as info:
            integrate(steep, x, p, dt=0.5, steps=200, save_every=2, **options)
        left = info.value.trajectory
        assert len(left.t) == len(left.q) == len(left.p) > 1
        assert bool(left.q.isfinite().all())
        assert not left.q.requires_grad
        assert f"finite at step {round(float(left.t[-1]) / 0.5)}:" in str(info.value)
    assert load_trajectory(tmp_path / "a").q.equal(left.q)


def test_an_unsolved_step_is_named():
    # The frequency grows with the energy of the copy and the time.
    system = Hamiltonian(
        lambda q, p, t: torch.exp(t) * (q.square() + p.square()).sum(-1), time=True
    )
    with pytest.raises(ConvergenceError, match=r"gauss4, between steps \d+ and \d+:") as info:
        integrate(system, *start(), dt=0.1, steps=60, method="gauss4", save_every=5)
    left = info.value.trajectory
    step = int(str(info.value).split("steps ")[1].split(" ")[0])
    assert step - 5 < round(float(left.t[-1]) / 0.1) <= step
    whole = integrate(system, *start(), dt=0.1, steps=step, method="gauss4", save_every=step)
    assert bool(whole.q.isfinite().all())


# --- Round-off ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_compensated_round_off_grows_as_a_random_walk():
    # Every splitting keeps the angular momentum exactly, so what it loses is round-off. Brouwer,
    # Astron. J. 46 (1937) 149: its mean square grows as the number of steps.
    g = torch.Generator().manual_seed(0)
    turn = 2 * math.pi * torch.rand(256, generator=g, dtype=F64)
    c, s = turn.cos(), turn.sin()
    matrix = torch.stack([torch.stack([c, -s], -1), torch.stack([s, c], -1)], -2)
    q, p = ((matrix @ x) for x in perihelion(0.4))
    errors = []
    for compensated in (True, False):
        run = integrate(KEPLER, q, p, dt=0.1, steps=4096, save_every=64, compensated=compensated)
        spin = run.q[..., 0] * run.p[..., 1] - run.q[..., 1] * run.p[..., 0]
        errors.append((spin - spin[0]).square().mean(-1).sqrt())
    n = torch.arange(64, dtype=F64)[1:].log()
    for error in errors:
        slope = np.polyfit(n.numpy(), error[1:64].log().numpy(), 1)[0]
        assert slope < 0.6
    assert float(errors[0][-1]) < float(errors[1][-1]) / 3
