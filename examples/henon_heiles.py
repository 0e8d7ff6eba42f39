r"""
Order and chaos in the Hénon-Heiles system
==========================================

A star in the plane of a galaxy, after Hénon and Heiles (Astron. J. 69 (1964) 73), moves by

.. math:: H = \frac{p_x^2 + p_y^2}{2} + \frac{x^2 + y^2}{2} + x^2 y - \frac{y^3}{3}.

Each orbit is cut where it crosses the plane :math:`x = 0` with :math:`p_x > 0`. Where a second
integral keeps it on a torus, the points lie on a curve; where there is none, they fill an area. At
energy 1/12 nearly all orbits are regular, at 1/8 islands lie in a chaotic sea, and at 1/6, where
orbits begin to escape, little but the sea is left.

The points are those of the flow only if the integrator makes no energy of its own: the energy of
every crossing is compared with that of the start.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import darboux as dx
from darboux.integrators import catalogue, crossings

ENERGIES = {"1/12": 1 / 12, "1/8": 1 / 8, "1/6": 1 / 6}


def start(energy: float, orbits: int) -> tuple[Tensor, Tensor]:
    """Return states ``q, p (orbits, 2)`` on the section, spread over its symmetry axes."""
    system = catalogue.henon_heiles()
    half = orbits // 2
    # Along the axis p_y = 0, and along y = 0, as far as the energy reaches.
    ys = torch.linspace(-1, 1, 4001, dtype=torch.float64)
    at = torch.stack([torch.zeros_like(ys), ys], -1)
    inside = ys[system.energy(at, torch.zeros_like(at)) < energy]
    place = torch.linspace(0.02, 0.98, half, dtype=torch.float64)
    y = torch.cat(
        [inside[0] + place * (inside[-1] - inside[0]), torch.zeros(orbits - half).double()]
    )
    reach = (2 * energy) ** 0.5
    p_y = torch.cat([torch.zeros(half).double(), torch.linspace(0.05, 0.97, orbits - half) * reach])
    q = torch.stack([torch.zeros_like(y), y], -1)
    rest = torch.stack([torch.zeros_like(y), p_y], -1)
    p_x = (2 * (energy - system.energy(q, rest))).clamp_min(0).sqrt()
    return q, torch.stack([p_x, p_y], -1)


class Result(NamedTuple):
    """What this example found."""

    points: dict[str, int]  # on the section, by energy
    off_section: float  # the largest |x| of a point
    energy_error: float  # the largest relative one of a point
    files: list[Path]


# %%
# The section
# -----------
# ``crossings`` finds each by one shorter step of the same method, so that the points keep the
# energy as well as the run does.


def main(output: str | Path = "output", quick: bool = False) -> Result:
    """Cut orbits of three energies, check and draw the sections."""
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    orbits, steps = (8, 400) if quick else (24, 16_000)
    system = catalogue.henon_heiles()
    counts, off, worst, files = {}, 0.0, 0.0, []
    for name, energy in ENERGIES.items():
        q, p = start(energy, orbits)
        found = crossings(
            system,
            q,
            p,
            dt=0.25,
            steps=steps,
            section=lambda q, p: q[..., 0],
            direction=1,
            method="bm6_rkn",
        )
        error = (system.energy(found.q, found.p) / energy - 1).abs().max()
        counts[name] = len(found.t)
        off, worst = max(off, float(found.q[:, 0].abs().max())), max(worst, float(error))
        print(f"H = {name:<6}{counts[name]:8,} points, energy error {float(error):.1e}")
        files += draw(name, found, orbits, output)
    print(f"\nNo point is farther than {off:.1e} from the section")
    return Result(counts, off, worst, files)


def draw(name: str, found: dx.integrators.Crossings, orbits: int, output: Path) -> list[Path]:
    """Draw the section at one energy, an orbit in a colour."""
    plane = torch.stack([found.q[:, 1], found.p[:, 1]], -1)
    plotter = dx.plotting.section(
        [plane[found.copy == i] for i in range(orbits)], axes=("y", "p_y"), title=f"H = {name}"
    )
    return [dx.plotting.save(plotter, output / f"henon_heiles_{name.replace('/', '_')}.png")]


if __name__ == "__main__":
    main()
