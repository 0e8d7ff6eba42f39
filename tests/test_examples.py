"""Each example runs with small settings, and one number of each is what the literature says."""

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch

from darboux import _plot_scene

EXAMPLES = Path(__file__).parents[1] / "examples"


def _can_draw() -> bool:
    try:
        _plot_scene.load_pyvista()
        importlib.import_module("trame_vtk")
    except (RuntimeError, ImportError):
        return False
    return True


@pytest.fixture
def example(monkeypatch):
    """Import an example as its neighbours do; where nothing can be drawn, let it draw nothing."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    names = ("torus_geodesics", "digits_latent", "outer_solar_system", "henon_heiles", "main_job")
    names += ("drum_shapes", "metric_flows", "particle_flows", "word_problems", "sequence_tasks")
    names += ("spectral_memory", "particle_acceleration", "momentum_recall", "parity")
    names += ("character_model", "phase_portraits", "momentum_claims")

    def load(name):
        module = importlib.import_module(name)
        if not _can_draw():
            monkeypatch.setattr(module, "draw", lambda *args: [], raising=False)
        return module

    yield load
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)


def check_files(files: list[Path], names: set[str]) -> None:
    """Fail unless ``files`` are whole pictures of the given names."""
    if not _can_draw():
        return
    assert {file.name for file in files} == names
    for file in files:
        start = file.read_bytes()[:200]
        assert file.stat().st_size > 20_000
        heads = {".png": b"\x89PNG", ".gif": b"GIF89a"}
        whole = heads.get(file.suffix, b"") == start[: len(heads.get(file.suffix, b""))]
        assert whole if file.suffix in heads else b"<html" in start.lower()


def test_torus_geodesics(example, tmp_path, capsys):
    result = example("torus_geodesics").main(tmp_path / "new", quick=True)
    assert result.energy_error < 1e-8
    assert abs(result.energy_slope) < 1e-10
    assert result.clairaut_error < 1e-12
    assert result.closing_error < 1e-10
    symplectic, rk4 = result.report["gauss4"], result.report["rk4"]
    assert abs(symplectic.sigma) < 6 < abs(rk4.sigma)
    assert symplectic.symplecticity < 1e-13 < rk4.symplecticity
    assert "implicit_midpoint" in capsys.readouterr().out
    check_files(result.files, {"torus_geodesics.png", "torus_geodesics.html"})


def test_outer_solar_system(example, tmp_path):
    result = example("outer_solar_system").main(tmp_path, quick=True)
    # Hairer, Lubich & Wanner (2006), I.2.4, over 200,000 days
    assert result.errors["leapfrog", 200.0] == pytest.approx(1.958e-3, rel=1e-3)
    assert result.errors["symplectic_euler", 100.0] == pytest.approx(2.527e-2, rel=1e-3)
    assert result.errors["euler", 10.0] > 0.5
    assert result.energy_error < 2e-6
    assert result.angular_momentum_error < 1e-12
    assert result.momentum_error < 1e-12
    check_files(result.files, {"orbits.png", "orbits.html"})


def test_digits_latent(example, tmp_path):
    result = example("digits_latent").main(tmp_path, quick=True)
    found = [pair for pair in result.pairs if pair.converged and not pair.conjugate]
    assert len(found) >= 2
    for pair in found:
        assert pair.geodesic < pair.straight
        assert pair.miss < 1e-4
    assert result.misfit < 0.25
    check_files(result.files, {"latent.png", "latent.html", "filmstrip.png"})


def test_henon_heiles(example, tmp_path):
    result = example("henon_heiles").main(tmp_path, quick=True)
    assert min(result.points.values()) > 100
    assert result.off_section < 1e-15
    assert result.energy_error < 1e-9
    check_files(result.files, {f"henon_heiles_1_{n}.png" for n in (12, 8, 6)})


def test_drum_shapes(example, tmp_path):
    result = example("drum_shapes").main(tmp_path, quick=True)
    assert result.errors["unit sphere"] < 1e-5
    assert max(result.errors.values()) < 2e-3
    # Gordon, Webb & Wolpert: equal; Driscoll (1997): 2.53794399980, from above by min-max
    assert result.drum_difference < 1e-10
    assert 2.53794 < result.drum_first < 2.56
    assert all(1 < count <= k + 2 for k, count in enumerate(result.domains))  # Courant
    assert result.torus.tolist() == pytest.approx([2, 0.8], abs=1e-7)
    assert result.ellipsoid.tolist() == pytest.approx([1, 1.2, 1.5], abs=1e-7)
    # Eswarathasan & Kolokolnikov (2021): -12/5, -4/5 (twice) for l = 1
    assert result.coefficients[1, 1:4].tolist() == pytest.approx([-2.4, -0.8, -0.8], abs=1e-9)
    assert result.coefficients[2, 1].item() == pytest.approx(1574 / 875, abs=1e-7)
    assert 0.9 < result.crossing < 1.0  # between l = 2 and l = 3
    check_files(result.files, {"drums.png", "nodal_lines.png", "spheroid.png", "heat.gif"})


def test_metric_flows(example, tmp_path):
    result = example("metric_flows").main(tmp_path, quick=True)
    assert max(result.errors.values()) < 1e-7
    # Angenent & Knopf (2004): close to its pinch a neck is a cylinder, r^2 = 2 (n - 1) (T - t)
    time, place = result.pinches["ring"]
    assert place == pytest.approx(math.pi, abs=1e-6)  # by symmetry
    assert 0.35**2 / 2 < time < 0.35**2 / 2 * 1.25
    assert all(-2 < rate < -1.7 for rate in result.rates.values())
    start, plain, deturck = result.shares
    assert deturck < start / 5 < 2 * start < plain
    assert result.gauss_bonnet < 1e-6
    assert result.area == pytest.approx(4 * math.pi, rel=1e-9)  # Gauss & Bonnet, genus 2
    assert result.residual < 1e-10
    assert result.before[0] < -1 < 1 < result.before[1]
    euler, flow = result.positive
    assert euler < flow == 8
    pictures = ("neck", "neck_rate", "deturck", "deturck_share", "genus2", "disk")
    check_files(result.files, {f"flows_{name}.png" for name in pictures})


def test_particle_flows(example, tmp_path):
    result = example("particle_flows").main(tmp_path, quick=True)
    plain, fast = (result.energies[name] for name in ("plain", "accelerated"))
    assert all(a < b for a, b in zip(fast, plain, strict=True))
    # the slowest mode of KL falls as e^{-4t}, in steps of 1 / 2 kappa
    slow, quick = (result.table[100.0][m] for m in ("gradient flow", "Nesterov, restarts"))
    assert slow >= 2.5 * quick
    assert result.table[10.0]["gradient flow"] < 50
    assert result.clusters[0] > 15
    assert result.clusters[-1] < 10
    assert result.equiangular < 1e-9
    assert result.preserved < 1e-10
    assert result.causal > 0.1
    check_files(
        result.files, {"flows_banana.png", "flows_banana_energy.png", "flows_attention.gif"}
    )


def test_main_job_lists_what_it_wrote(example, tmp_path, capsys, monkeypatch):
    job = example("main_job")
    (tmp_path / "a.png").write_bytes(b"0" * 3000)

    class Result:
        files = (tmp_path / "a.png",)

    monkeypatch.setattr(job, "PARTS", {"One": lambda output, quick: Result})
    assert list(job.main(tmp_path, quick=True)) == ["One"]
    printed = capsys.readouterr().out
    assert "a.png" in printed
    assert "3 kB" in printed
    assert "together" in printed


def test_word_problems(example, tmp_path, capsys):
    words = example("word_problems")
    result = words.main(tmp_path, quick=True)
    # trained on words of up to 6 letters; before it settles the head loses its way
    assert result.accuracy("S3", "rotation, settled", 1000) == [1.0]
    assert result.accuracy("S3", "rotation, as trained", 1000)[0] < 0.9
    trained, settled = result.rows
    assert settled.defect < 1e-12 < 1e-3 < trained.defect
    assert "100.00 (100.00)" in capsys.readouterr().out
    assert result.files[0].read_text().count("\n") == 3
    check_files(result.files[1:], {"word_problems.png"} if _can_draw() else set())


def test_phase_portraits(example, tmp_path, capsys):
    result = example("phase_portraits").main(tmp_path, quick=True)
    # Liouville: areas of clouds under symplectic and shearing maps; the literal rule keeps none
    for rule in ("pendulum", "low_rank"):
        cloud = result.clouds[rule]
        assert max(abs(cloud.least - 1), abs(cloud.most - 1)) < 1e-12
    assert result.clouds["low_rank_literal"].ratios[-1] < 0.01
    for manifold, (symplectic, volume) in result.defects.items():
        assert (volume < 1e-12) == (manifold != "low_rank_literal")
        assert (symplectic < 1e-12) == ("low_rank" not in manifold and manifold != "rotation")
    # each geodesic begins where the one before it ends, on the torus
    paths, torus = result.orbit.paths, result.orbit.torus
    assert (paths[1:, 0] - paths[:-1, -1]).abs().max() < 0.05
    ring = paths[..., :2].norm(dim=-1) - torus.R
    assert (ring.square() + paths[..., 2].square() - torus.r**2).abs().max() < 1e-12
    assert len({*result.memory.state["symplectic torus"]}) == 1
    assert result.memory.state["softmax attention"] == [n * 2 * 32 * 4 for n in (64, 256, 1024)]
    assert "low_rank_literal" in capsys.readouterr().out
    check_files(result.files, {f"phase_{name}.png" for name in ("orbit", "clouds", "memory")})


def test_spectral_memory(example, tmp_path):
    result = example("spectral_memory").main(tmp_path, quick=True)
    best = result.capacity.best[49]
    assert result.capacity.loads[4] == 1
    assert best[4] < 1e-12  # K functions hold K values
    assert best[7] == pytest.approx(0.5, abs=0.02)  # and half of 2 K
    first, last = result.arrival.values[0], result.arrival.values[-1]
    assert (last[1:] < first[1:]).all()  # lengths grow where tokens are
    names = {f"spectral_memory_{name}.png" for name in ("tones", "metric", "capacity")}
    check_files(result.files, names)


def test_particle_acceleration(example, tmp_path):
    result = example("particle_acceleration").main(tmp_path, quick=True)
    assert (result.accelerated < 0.75 * result.gradient).all()
    check_files(result.files, {"particle_acceleration.png"})


def test_parity(example, tmp_path):
    result = example("parity").main(tmp_path, quick=True)
    assert result.exact == {2: 1}
    assert result.accuracy[2][0] == {1000: 1.0, 10_000: 1.0}
    check_files(result.files, {"parity.png"})


def test_momentum_recall(example, tmp_path):
    result = example("momentum_recall").main(tmp_path, quick=True)
    runs = result.runs["recall, 8 pairs"]
    assert runs["keys, gamma 1"][0].accuracy > 0.95
    assert runs["plain"][0].accuracy < 0.25  # one of the eight values at hand, no more
    assert runs["plain"][0].parameters == runs["keys, gamma 1"][0].parameters
    assert result.best_momentum["recall, 8 pairs"][0] == "keys, gamma 1"


def test_sequence_tasks(example, tmp_path, capsys):
    layers = ["softmax, rotary", "gru", "symplectic torus"]
    result = example("sequence_tasks").main(tmp_path, quick=True, layers=layers)
    attention, *recurrent = result.rows
    assert [row.layer for row in result.rows] == layers
    assert attention.state[1] == 5 * attention.state[0]  # 100 tokens against 20
    assert all(row.state[0] == row.state[1] for row in recurrent)
    for row in recurrent:  # as near as the width of an MLP can come
        assert row.parameters == pytest.approx(attention.parameters, rel=0.02)
    assert "100 tokens" in capsys.readouterr().out
    assert result.files[0].read_text().count("\n") == 4


def test_character_model(example, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 300, "utf-8")
    model = example("character_model")
    result = model.main(tmp_path, quick=True, text=str(text), layers=["gru", "momentum"])
    assert 4 < result.entropy < math.log2(28)  # of 26 letters, spaces and line ends
    gru, momentum = result.rows
    assert gru.parameters == pytest.approx(momentum.parameters, rel=0.02)
    assert gru.tokens == momentum.tokens == 5 * 4 * 32
    for row in result.rows:
        # less than a bit from knowing nothing, in whichever way
        assert abs(row.windows - math.log2(28)) < 1
        assert row.stream == pytest.approx(row.windows, abs=0.1)
    assert " goes on from " in capsys.readouterr().out
    assert result.files[0].read_text().count("\n") == 3


def test_momentum_claims(example, tmp_path, capsys):
    claims = example("momentum_claims")
    # a law that holds is found, with its interval; and the least point of a parabola
    depths = torch.tensor([1.0, 2.0, 3.0, 5.0, 8.0], dtype=torch.float64)
    noise = torch.tensor([[-0.1, 0.1]], dtype=torch.float64).exp()
    best = 4.17 * depths.unsqueeze(-1) ** -0.74 * noise
    law = claims.fit_law("both", (1, 2, 3, 5, 8), best, (0.1, 8.0))
    assert law.exponent == pytest.approx(-0.74)
    assert law.factor == pytest.approx(4.17)
    # seeds drawn at five depths: the exponent's standard error is that of the noise, 0.1 / sqrt 2
    x = depths.log() - depths.log().mean()
    error = float(0.1 / (2 * x.square().sum()).sqrt())
    assert law.interval[1] - law.interval[0] == pytest.approx(2 * 1.96 * error, rel=0.15)
    losses = [math.exp((math.log(g) - math.log(2.2)) ** 2) for g in claims.GAMMAS]
    assert claims.best_gamma(claims.GAMMAS, losses) == pytest.approx(2.2)
    # one hop further on, in the edges as they stand
    task = claims.chains(20, torch.Generator().manual_seed(0), 2)
    for tokens, targets in zip(task.tokens.tolist(), task.targets.tolist(), strict=True):
        edges = dict(zip(tokens[0:24:3], tokens[1:24:3], strict=True))
        asked = [(x, y) for x, y in zip(tokens, targets, strict=True) if y != -100]
        assert [edges[edges[x]] for x, _ in asked] == [y for _, y in asked]

    result = claims.main(tmp_path, quick=True)
    found = {(r.task, r.variant): r for r in result.rows if r.part == "tasks"}
    delayed, plain = found["induction", "keys, gamma -1"], found["induction", "plain"]
    assert delayed.accuracy > 0.9 > 0.6 > plain.accuracy
    assert found["majority", "plain"].accuracy > 0.95  # a sum needs no momentum
    assert delayed.parameters == plain.parameters
    assert {(r.part, r.task) for r in result.rows[4:]} == {
        ("chains", "word"), ("chains", "chain"), ("depth", "recall")
    }  # fmt: skip
    assert "in the text 4.17" in capsys.readouterr().out
    assert result.files[0].read_text().count("\n") == 1 + len(result.rows)
    names = {f"momentum_claims_{part}.png" for part in ("tasks", "chains", "depth")}
    check_files(result.files[1:], names)
