r"""
The outer solar system for 200,000 years
========================================

The Sun and five planets attract each other by Newton's law,

.. math:: H(q, p) = \sum_i \frac{|p_i|^2}{2 m_i} - G \sum_{i<j} \frac{m_i m_j}{|q_i - q_j|},

with the initial data of Hairer, Lubich and Wanner, *Geometric Numerical Integration* (2006),
I.2.4. Explicit Euler with a step of 10 days sends the planets outward within 200,000 days.
Symplectic methods keep the energy error bounded with steps 20 to 60 times as long, here over
200,000 years. The force is written out: the gaps between bodies are one matrix product, the
forces another.

Units: astronomical units, days, solar masses.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import darboux as dx

G = 2.95912208286e-4
YEAR = 365.25
NAMES = ("Sun", "Jupiter", "Saturn", "Uranus", "Neptune", "Pluto")
MASSES = (1.00000597682, 0.000954786104043, 0.000285583733151, 0.0000437273164546,
          0.0000517759138449, 1 / 1.3e8)  # fmt: skip
POSITIONS = (
    (0.0, 0.0, 0.0),
    (-3.5023653, -3.8169847, -1.5507963),
    (9.0755314, -3.0458353, -1.6483708),
    (8.3101420, -16.2901086, -7.2521278),
    (11.4707666, -25.7294829, -10.8169456),
    (-15.5387357, -25.2225594, -3.1902382),
)
VELOCITIES = (
    (0.0, 0.0, 0.0),
    (0.00565429, -0.00412490, -0.00190589),
    (0.00168318, 0.00483525, 0.00192462),
    (0.00354178, 0.00137102, 0.00055029),
    (0.00288930, 0.00114527, 0.00039677),
    (0.00276725, -0.00170702, -0.00136504),
)
COLORS = ("#F2A900", "#B5651D", "#009E73", "#56B4E9", "#0072B2", "#CC79A7")
APART = torch.tensor([44.0, 0.0, 0.0], dtype=torch.float64)  # of the two pictures
SIZES = (1.9, 1.6, 1.4, 1.2, 1.2, 0.9)

# %%
# The system
# ----------
# Coordinates are stored as three rows of six bodies, so that one product with a 6 x 15 matrix of
# ones gives all gaps and one with its weighted transpose gathers the forces.


def solar_system() -> tuple[dx.Separable, Tensor, Tensor]:
    """Return the system and its initial state ``q, p (3, 6)``."""
    m = torch.tensor(MASSES, dtype=torch.float64)
    first, second = torch.triu_indices(6, 6, offset=1)
    pairs = torch.arange(len(first))
    gap = torch.zeros(6, len(first), dtype=torch.float64)
    gap[first, pairs], gap[second, pairs] = 1.0, -1.0
    strength = G * m[first] * m[second]
    gather = -strength[:, None] * gap.T

    def potential(q: Tensor) -> Tensor:  # (..., 3, 6) -> (...)
        return -(strength / torch.linalg.vector_norm(q @ gap, dim=-2)).sum(-1)

    def force(q: Tensor) -> Tensor:  # (..., 3, 6) -> (..., 3, 6)
        d = q @ gap
        distance = torch.linalg.vector_norm(d, dim=-2, keepdim=True)
        return (d * distance.pow(-3)) @ gather

    q = torch.tensor(POSITIONS, dtype=torch.float64).T.contiguous()
    v = torch.tensor(VELOCITIES, dtype=torch.float64).T.contiguous()
    return dx.Separable(potential, force=force, mass=m), q, m * v


class Elements(NamedTuple):
    """Size and shape of the osculating ellipses around the Sun, each ``(..., 5)``."""

    semi_axis: Tensor
    eccentricity: Tensor


def orbital_elements(q: Tensor, p: Tensor) -> Elements:
    """Return the elements of the two-body orbits through ``q, p (..., 3, 6)``."""
    m = torch.tensor(MASSES, dtype=q.dtype)
    v = p / m
    q, v = (x[..., 1:] - x[..., :1] for x in (q, v))
    mu = G * (m[0] + m[1:])
    distance = torch.linalg.vector_norm(q, dim=-2)
    semi_axis = 1 / (2 / distance - v.square().sum(-2) / mu)
    h = torch.linalg.cross(q, v, dim=-2)
    slr = h.square().sum(-2) / mu  # semi-latus rectum, a (1 - e^2)
    return Elements(semi_axis, (1 - slr / semi_axis).clamp_min(0).sqrt())


# %%
# Which method?
# -------------
# Cost is counted in evaluations of the force per 1000 days, and the error is the largest relative
# error of the energy over 200,000 days. The rows of order 4 and 6 use that the kinetic energy is
# quadratic (Blanes and Moan, 2002).

CONTEST = (
    ("euler", 10.0),
    ("symplectic_euler", 100.0),
    ("leapfrog", 200.0),
    ("leapfrog", 50.0),
    ("yoshida4", 200.0),
    ("bm4_rkn", 400.0),
    ("bm6_rkn", 600.0),
)


def energy_error(system: dx.Separable, run: dx.Trajectory) -> Tensor:
    """Return the relative error of the energy, ``(time,)``."""
    energy = system.energy(run.q, run.p)
    return (energy - energy[0]) / energy[0].abs()


def contest(days: float) -> dict[tuple[str, float], float]:
    """Print and return the largest energy error of each method over ``days``."""
    system, q, p = solar_system()
    print(f"{'method':<18}{'step, d':>9}{'forces / 1000 d':>17}{'max energy error':>18}")
    errors = {}
    for method, dt in CONTEST:
        run = dx.integrate(system, q, p, dt=dt, steps=round(days / dt), method=method)
        errors[method, dt] = float(energy_error(system, run).abs().max())
        forces = dx.integrators.audit.evaluations(system, method, q, p, dt=dt, steps=100)
        cost = f"{1000 * forces / dt:17.1f}"
        print(f"{method:<18}{dt:9g}{cost}{errors[method, dt]:18.3e}")
    return errors


# %%
# The long run
# ------------


class Result(NamedTuple):
    """What this example found."""

    years: float
    energy_error: float
    quarters: list[float]  # the largest energy error in each quarter of the run
    angular_momentum_error: float
    momentum_error: float
    errors: dict[tuple[str, float], float]  # of the contest, by method and step
    files: list[Path]


def main(
    output: str | Path = "output", quick: bool = False, method: str = "bm6_rkn", dt: float = 600.0
) -> Result:
    """Compare methods, run the best for 200,000 years, audit and draw it."""
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    years = 2_000 if quick else 200_000
    print("Energy error over 200,000 days, from the published initial data\n")
    errors = contest(200_000)

    system, q, p = solar_system()
    steps = round(years * YEAR / dt)
    run = dx.integrate(system, q, p, dt=dt, steps=steps, method=method, save_every=5, progress=True)
    error = energy_error(system, run)
    quarters = [float(part.abs().max()) for part in error.tensor_split(4)]
    spin = torch.linalg.cross(run.q, run.p, dim=-2).sum(-1)
    spin_error = float((spin - spin[0]).norm(dim=-1).max() / spin[0].norm())
    total = run.p.sum(-1)
    momentum_error = float((total - total[0]).norm(dim=-1).max() / run.p.norm(dim=(1, 2)).max())

    print(f"\n{years:,} years with {method}, {steps:,} steps of {dt:g} days\n")
    labels = ("first", "second", "third", "last")
    for label, value in zip(labels, quarters, strict=True):
        print(f"energy error, {label + ' quarter':<22}{value:10.2e}")
    print(f"angular momentum error{spin_error:24.2e}")
    print(f"momentum error{momentum_error:32.2e}\n")
    _print_elements(run)

    result = Result(years, max(quarters), quarters, spin_error, momentum_error, errors, [])
    result.files.extend(draw(run, output, years))
    return result


def _print_elements(run: dx.Trajectory) -> None:
    a, e = orbital_elements(run.q, run.p)
    print(f"{'planet':<10}{'semi-axis, AU':>16}{'range':>18}{'eccentricity':>15}{'range':>18}")
    for i, name in enumerate(NAMES[1:]):
        spans = [f"{float(x[:, i].min()):.3f} to {float(x[:, i].max()):.3f}" for x in (a, e)]
        print(f"{name:<10}{float(a[0, i]):16.3f}{spans[0]:>18}{float(e[0, i]):15.3f}{spans[1]:>18}")


# %%
# The picture
# -----------
# Explicit Euler on the left after 200,000 days, the symplectic method on the right after
# 200,000 years, with the 270 years that follow it.


def around_sun(run: dx.Trajectory) -> Tensor:
    """Return the positions relative to the Sun, ``(time, 6, 3)``."""
    return (run.q - run.q[..., :1]).mT


def draw(run: dx.Trajectory, output: Path, years: float) -> list[Path]:
    """Draw the end of ``run`` beside explicit Euler and return the files."""
    system, q, p = solar_system()
    euler = dx.integrate(system, q, p, dt=10.0, steps=20_000, method="euler", save_every=20)
    last = dx.integrate(system, run.q[-1], run.p[-1], dt=100.0, steps=1000, method="bm6_rkn")
    both = torch.cat([around_sun(euler) - APART, around_sun(last) + APART], 1)
    plotter = dx.plotting.orbits(both, sizes=2 * SIZES, color=2 * COLORS, radius=0.13)
    plotter.window_size = [1400, 640]
    plotter.camera.zoom(1.4)
    for x, title in ((0.16, "explicit Euler, 200,000 days"), (0.6, f"order 6, {years:,} years")):
        plotter.add_text(title, position=(x, 0.02), viewport=True, font_size=12, color="#1A1A1A")
    return [dx.plotting.save(plotter, output / f"orbits.{kind}") for kind in ("png", "html")]


if __name__ == "__main__":
    main()
