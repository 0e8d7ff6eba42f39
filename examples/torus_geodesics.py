r"""
Geodesics on a torus
====================

From one point of the outer equator geodesics leave in all directions. Clairaut's relation

.. math:: \varrho \sin\alpha = \text{constant}

(the distance from the axis, and the angle with the meridian) decides what becomes of them. Where
the constant exceeds the radius of the inner equator they are bounded and swing about the outer one;
otherwise they run through the hole and, as a rule, fill the torus densely. In between some close.

The flow is simulated on phase space by Gauss collocation, which is symplectic: over many thousand
steps its energy error stays where it was, while that of the classical Runge-Kutta method grows.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import darboux as dx

INNER, OUTER = 1.0, 3.0  # distances of the two equators from the axis
METHODS = ("gauss6", "gauss4", "implicit_midpoint", "rk4")

# %%
# A closed geodesic
# -----------------
# The exponential map is differentiable, so Newton's method finds the velocity whose geodesic comes
# home after two turns about the axis and three about the outer equator.


def closed_geodesic(torus: dx.TorusOfRevolution) -> Tensor:
    """Return the velocity ``(2,)`` of the geodesic that closes at unit time."""
    start = torch.zeros(2, dtype=torch.float64)
    home = torch.tensor([0.0, 4 * math.pi], dtype=torch.float64)
    velocity = torch.tensor([27.6, 8.0], dtype=torch.float64)
    for _ in range(3):
        slope = torch.autograd.functional.jacobian(lambda v: torus.exp(start, v), velocity)
        miss = torus.exp(start, velocity) - home
        velocity = velocity - torch.linalg.solve(slope, miss)
    return velocity


# %%
# The flow
# --------


def directions(torus: dx.TorusOfRevolution, closing: Tensor) -> tuple[Tensor, Tensor]:
    """Return unit velocities ``(4, 2)`` from the outer equator and their Clairaut constants."""
    sine = float(OUTER * closing[1] / torus.norm(torch.zeros_like(closing), closing))
    sines = torch.tensor([0.0, 0.17, sine, 0.93], dtype=torch.float64)
    return torch.stack([(1 - sines**2).sqrt(), sines / OUTER], -1), OUTER * sines


class Result(NamedTuple):
    """What this example found."""

    energy_error: float  # of the long run, relative
    energy_slope: float  # fitted drift over the long run, relative
    clairaut_error: float
    closing_error: float  # of the closed geodesic, in space
    report: dx.integrators.audit.Report
    files: list[Path]


def main(output: str | Path = "output", quick: bool = False) -> Result:
    """Follow geodesics for a long time, audit the methods, draw a short stretch."""
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    torus = dx.TorusOfRevolution(R=2.0, r=1.0)
    closing = closed_geodesic(torus)
    v, clairaut = directions(torus, closing)
    x = torch.zeros_like(v)
    dt, steps = 0.2, 500 if quick else 20_000

    print(f"Four geodesics of the torus R = 2, r = 1: {steps:,} steps of {dt} by gauss6\n")
    names = ("meridian, closed", "through the hole", "closes after 3:2", "bounded")
    run = dx.geodesic_flow(
        torus, x, v, dt=dt, steps=steps, method="gauss6", save_every=10, progress=True
    )
    system = torus.geodesic_system()
    drift = dx.integrators.audit.energy_drift(system, run)
    for i, name in enumerate(names):
        print(f"{name:<18} Clairaut {float(clairaut[i]):6.4f}  energy error {drift.error[i]:.1e}")
    # The angle does not occur in the energy: its momentum has no force, and stays to the last bit.
    moving = torch.func.jvp(torus.embedding, (run.q,), (torus.sharp(run.q, run.p),))
    point, velocity = moving[0], moving[1]
    turning = point[..., 0] * velocity[..., 1] - point[..., 1] * velocity[..., 0]
    clairaut_error = float((turning - clairaut).abs().max())
    print(f"Clairaut's constant, as angular momentum in space, errs by {clairaut_error:.1e}")

    count = 200 if quick else 2000
    p = torus.flat(x, v)
    rows = []
    for method in METHODS:
        print(f"\rauditing {method:<20}", end="", file=sys.stderr, flush=True)
        rows += dx.integrators.audit.report(system, x, p, dt=dt, steps=count, methods=[method]).rows
    print("\r" + " " * 40 + "\r", end="", file=sys.stderr)
    report = dx.integrators.audit.Report(tuple(rows))
    print(f"\nMethods, {count:,} steps of {dt}; drift is significant where |sigma| is above 6\n")
    print(report)

    ends = torus.embedding(torch.stack([x[0], torus.exp(x[0], closing)]))
    result = Result(
        energy_error=float(drift.error.max()),
        energy_slope=float(drift.slope.abs().max() * run.t[-1]),
        clairaut_error=clairaut_error,
        closing_error=float((ends[1] - ends[0]).norm()),
        report=report,
        files=draw(torus, v, float(torus.norm(x[0], closing)), output),
    )
    print(f"\nThe closed geodesic misses its start by {result.closing_error:.1e}")
    return result


# %%
# The picture
# -----------
# Colour is the Gauss curvature: positive outside, negative inside, where neighbouring geodesics
# part. Arrows are tangent vectors.


def draw(torus: dx.TorusOfRevolution, v: Tensor, period: float, output: Path) -> list[Path]:
    """Draw the closed, a bounded and an unbounded geodesic, and return the files."""
    turn = torch.tensor([0.0, -1.0], dtype=torch.float64)  # start at the front
    lengths = (2 * math.pi, 42.0, period, 30.0)
    colors = ("#1A1A1A", "#6A3D9A", "#E69F00", "#009E73")
    plotter = dx.plotting.surface(torus, resolution=(200, 120))
    for velocity, length, color in zip(v, lengths, colors, strict=True):
        steps = round(length / 0.08)
        run = dx.geodesic_flow(
            torus, turn, velocity, dt=length / steps, steps=steps, method="gauss6"
        )
        dx.plotting.geodesics(
            torus, run.q, color=color, radius=0.022, markers=None, plotter=plotter
        )
        dx.plotting.vectors(
            torus, turn, velocity, color=color, scale=0.9, lift=0.006, plotter=plotter
        )
    plotter.window_size = [1400, 900]
    plotter.camera.zoom(1.1)
    return [dx.plotting.save(plotter, output / f"torus_geodesics.{k}") for k in ("png", "html")]


if __name__ == "__main__":
    main()
