"""Long runs: ``python benchmarks/long_run.py [torus | henon_heiles | kepler | lattice]``.

``torus``: energy and Clairaut's constant of geodesics by Gauss 6 over 100,000 steps, a few
minutes. ``henon_heiles``: energy of 64 orbits at E = 1/8, most of them chaotic, by the compiled
Gauss 6 over a million steps, a minute: steps of 0.1, whose error of the energy is bounded, and of
0.02, where it is round-off; and how the round-off of Gauss 8 grows. ``kepler``: energy and angular
momentum of an orbit of eccentricity 0.6 over 100,000 turns by compiled splittings, a minute; and
how their round-off grows. ``lattice``: a million chaotic steps and back, eight minutes.

Prints the largest relative deviations, quarter by quarter (a drift would grow from one to the
next), and the fitted drift over the whole run with its significance.
"""

import math
import sys

import numpy as np
import torch
from torch import Tensor

import darboux as dx
from darboux.integrators import catalogue
from darboux.integrators.audit import energy_drift


def torus(steps: int = 100_000) -> None:
    surface = dx.TorusOfRevolution(R=2.0, r=1.0)
    g = torch.Generator().manual_seed(0)
    x = torch.rand(8, 2, dtype=torch.float64, generator=g) * 6
    v = surface.random_tangent(x, generator=g)
    v = v / surface.norm(x, v)[..., None]
    run = dx.geodesic_flow(
        surface, x, v, dt=0.05, steps=steps, method="gauss6", save_every=100, progress=True
    )
    system = dx.flows.geodesic_hamiltonian(surface)
    show("energy", system.energy(run.q, run.p))
    show_drift(system, run)
    show("Clairaut", run.p[..., 1])


def stars(energy: float, count: int, size: float) -> tuple[dx.Separable, Tensor, Tensor]:
    """Return the Henon-Heiles system and states of one energy."""
    system = catalogue.henon_heiles()
    g = torch.Generator().manual_seed(0)
    q = 2 * size * torch.rand(count, 2, dtype=torch.float64, generator=g) - size
    p = torch.randn(count, 2, dtype=torch.float64, generator=g)
    rest = energy - system.energy(q, torch.zeros_like(q))
    return system, q, p * (2 * rest).sqrt()[:, None] / p.norm(dim=-1, keepdim=True)


def lattice(steps: int = 1_000_000) -> None:
    system, q, p = stars(0.15, 32, 0.15)
    still = dx.integrate(system, q, p, dt=0.05, steps=0, method="leapfrog", lattice=2.0**-50)
    end = still
    for dt in (0.05, -0.05):
        end = dx.integrate(
            system,
            end.q[-1],
            end.p[-1],
            dt=dt,
            steps=steps,
            save_every=steps,
            method="leapfrog",
            lattice=2.0**-50,
            progress=True,
        )
    same = torch.equal(end.q[-1], still.q[0]) and torch.equal(end.p[-1], still.p[0])
    print(f"{steps:,} steps and back: {'identical bits' if same else 'NOT the same bits'}")


def henon_heiles(steps: int = 1_000_000) -> None:
    system, q, p = stars(1 / 8, 64, 0.3)
    for method, dt in (("gauss6", 0.1), ("gauss6", 0.02), ("gauss8", 0.05)):
        run = dx.integrate(
            system, q, p, dt=dt, steps=steps, method=method, save_every=steps // 5000, compile=True
        )
        print(f"\n{method}, {steps:,} steps of {dt}, {len(q)} orbits")
        energy = system.energy(run.q, run.p)
        show("energy", energy)
        show_mean_drift(run.t, energy)


def kepler(turns: int = 100_000) -> None:
    e, system = 0.6, catalogue.kepler()
    q = torch.tensor([1 - e, 0.0], dtype=torch.float64)
    p = torch.tensor([0.0, math.sqrt((1 + e) / (1 - e))], dtype=torch.float64)
    for method, steps in (("leapfrog", 200), ("bm6_rkn", 60), ("kahan_li8", 80)):
        run = dx.integrate(
            system,
            q,
            p,
            dt=2 * math.pi / steps,
            steps=steps * turns,
            method=method,
            save_every=997,  # no divisor of the turns: all phases are seen
            compensated=True,
            compile=True,
        )
        print(f"\n{method}, {steps} steps a turn, {turns:,} turns")
        show("energy", system.energy(run.q, run.p))
        show_drift(system, run)
        show("momentum", run.q[..., 0] * run.p[..., 1] - run.q[..., 1] * run.p[..., 0])
    print("\nround-off of the angular momentum after n steps, root mean square of 64 orbits")
    for compensated in (False, True):
        growth(compensated)


def growth(compensated: bool, last: int = 1_000_000) -> None:
    """Fit the power of the number of steps with which the round-off grows (Brouwer: 1/2)."""
    system = catalogue.kepler()
    e = torch.linspace(0.1, 0.6, 64, dtype=torch.float64)
    q = torch.stack([1 - e, torch.zeros_like(e)], -1)
    p = torch.stack([torch.zeros_like(e), ((1 + e) / (1 - e)).sqrt()], -1)
    run = dx.integrate(
        system,
        q,
        p,
        dt=2 * math.pi / 200,
        steps=last,
        method="kahan_li8",
        save_every=last // 1000,
        compensated=compensated,
        compile=True,
    )
    momentum = run.q[..., 0] * run.p[..., 1] - run.q[..., 1] * run.p[..., 0]
    error = (momentum / momentum[0] - 1).square().mean(-1).sqrt()[1:]
    steps = np.arange(1, 1001) * (last // 1000)
    power, _ = np.polyfit(np.log(steps), error.log().numpy(), 1)
    name = "compensated" if compensated else "plain"
    print(f"{name:12s} exponent {power:.2f}, {float(error[-1]):.1e} after {last:,} steps")


def show(name: str, series: Tensor) -> None:
    error = (series / series[0] - 1).abs()
    quarters = [f"{float(part.max()):.3e}" for part in error.chunk(4)]
    print(f"{name:10s} max relative deviation by quarter: {'  '.join(quarters)}")


def show_drift(system: dx.integrators.System, run: dx.Trajectory) -> None:
    drift = energy_drift(system, run)
    slope = drift.slope * run.t[-1]
    print(
        f"{'':10s} fitted drift over the run: {float(slope.abs().max()):.1e}, at most "
        f"{float(drift.significance.abs().max()):.1f} standard errors"
    )


def show_mean_drift(t: Tensor, energy: Tensor) -> None:
    """Print the drift and the growth of the error of many orbits ``(time, orbits)``.

    The line fitted to one orbit errs by more than its own standard error where round-off makes a
    random walk; that of independent orbits tells: a drift is a mean that is many standard errors
    from zero, a random walk grows as the square root of time.
    """
    error = energy / energy[0] - 1
    centred = t - t.mean()
    drift = (centred @ error) / centred.square().sum() * (t[-1] - t[0])
    standard = float(drift.std()) / math.sqrt(len(drift))
    rms = error.square().mean(-1).sqrt()[1:]
    power, _ = np.polyfit(np.log(np.arange(1, len(rms) + 1)), rms.log().numpy(), 1)
    print(
        f"{'':10s} fitted drift over the run, mean of the orbits: {float(drift.mean()):+.1e} with "
        f"standard error {standard:.1e}\n{'':10s} root mean square {float(rms[-1]):.1e}, growing "
        f"as the number of steps to the power {power:.2f}"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    runs = {"torus": torus, "henon_heiles": henon_heiles, "kepler": kepler, "lattice": lattice}
    runs[sys.argv[1] if len(sys.argv) > 1 else "torus"]()
