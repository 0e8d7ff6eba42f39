"""
Does momentum help particles that attend to each other?
=======================================================

Softmax attention is a gradient flow in a metric that depends on the particles: in it a potential U
moves them by :math:`\\dot x_i = -B\\nabla U(x_i)/z_i`, with the mean :math:`z_i` of
:math:`e^{x_i \\cdot Ax_j}`. The accelerated flow gives them momentum. Attention's own energy has no
minimum, so that nothing can be said of how fast it is reached; here ``U`` is a quadratic bowl a
hundred times steeper one way than the other, with the damping that its weak side asks for. Both
flows are followed by the same Runge-Kutta method with the same step, until the mean of U stays
below a thousandth of its start.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import darboux as dx
from darboux.flows import accelerated_attention as attention, gaussian

WEAK, STEEP = 0.01, 1.0
BOWL = torch.diag(torch.tensor([WEAK, STEEP], dtype=torch.float64))
DAMPING = 2 * WEAK**0.5
THRESHOLD = 1e-3
SEEDS, PARTICLES = 5, 16


class Curves(NamedTuple):
    """Mean potentials relative to the start: ``t (T,)``, ``values (T, seeds)``."""

    t: Tensor
    values: Tensor


def start() -> Tensor:
    """Return the particles of each seed, spread as the bowl is, ``(seeds, N, 2)``."""
    spread = torch.tensor([0.5, 0.5 * (WEAK / STEEP) ** 0.5], dtype=torch.float64)
    clouds = [
        torch.randn(
            PARTICLES, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
        )
        for seed in range(SEEDS)
    ]
    return spread * torch.stack(clouds)


# %%
# The two flows
# -------------
# One Runge-Kutta step is four evaluations of the field, for either flow.


def follow(field: Callable[..., Any], state: tuple[Tensor, ...], dt: float, end: float) -> Curves:
    """Integrate and record the mean potential."""

    def mean(x: Tensor) -> Tensor:
        return (x @ BOWL * x).sum(-1).mean(-1) / 2

    steps = round(end / dt)
    values = [mean(state[0])]
    for _ in range(steps):
        state = gaussian.solve(field, state, dt, 1)
        values.append(mean(state[0]))
    rows = torch.stack(values)
    return Curves(dt * torch.arange(steps + 1, dtype=torch.float64), rows / rows[0])


def flows(coupling: float, dt: float) -> dict[str, Curves]:
    """Return both flows for ``A = coupling I``, all seeds at once."""
    A, B = coupling * torch.eye(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)

    def gradient(x: Tensor) -> tuple[Tensor]:
        return (-(x @ BOWL) @ B / attention.partition(x, A).unsqueeze(-1),)

    def accelerated(x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        return attention.velocity_field(x, u, A, B, DAMPING, gradient=lambda x: x @ BOWL)

    x = start()
    return {
        "gradient": follow(gradient, (x,), dt, 400.0),
        "accelerated": follow(accelerated, (x, torch.zeros_like(x)), dt, 150.0),
    }


def hits(curves: Curves) -> Tensor:
    """Return the first step from which each seed stays below the threshold."""
    above = curves.values >= THRESHOLD
    if bool(above[-1].any()):
        raise RuntimeError("a run ended above the threshold")
    last = above.long() * torch.arange(len(above)).unsqueeze(-1)
    return last.amax(0) + 1


# %%
# All of it
# ---------


class Result(NamedTuple):
    """Steps to the threshold: ``(couplings, seeds)``, and the pictures."""

    couplings: list[float]
    gradient: Tensor
    accelerated: Tensor
    files: list[Path]


def main(output: str | Path = "output", quick: bool = False) -> Result:
    """Follow both flows from five seeds, print the table, draw the curves."""
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    couplings, dt = ([0.05], 1.0) if quick else ([0.0, 0.05, 0.2], 0.5)
    print(f"Runge-Kutta steps of {dt} until U stays below {THRESHOLD} of its start,")
    print(f"{PARTICLES} particles, bowl diag({WEAK}, {STEEP}), damping {DAMPING:.2f}\n")
    print(f"{'A':>8}{'seed':>6}{'gradient':>10}{'momentum':>10}{'fewer':>8}")
    slow, fast, shown = [], [], {}
    for coupling in couplings:
        shown = flows(coupling, dt)
        slow.append(hits(shown["gradient"]))
        fast.append(hits(shown["accelerated"]))
        pairs = list(zip(slow[-1].tolist(), fast[-1].tolist(), strict=True))
        for seed, (a, b) in enumerate(pairs):
            print(f"{coupling:6.2f} I{seed:6}{a:10}{b:10}{1 - b / a:8.0%}")
        wins = sum(b < a for a, b in pairs)
        fewer = 1 - float(fast[-1].sum() / slow[-1].sum())
        print(f"{'':8}{wins} of {SEEDS} faster, {fewer:.0%} fewer steps in the mean\n")
    files = draw(shown, couplings[-1], output)
    for file in files:
        print(f"{file!s:<40}{file.stat().st_size / 1000:10,.0f} kB")
    return Result(couplings, torch.stack(slow), torch.stack(fast), files)


# %%
# The picture
# -----------
# The mean over the seeds of the logarithm of the potential, and a band from the least to the most.
# Momentum overshoots: what counts is where it stays below.

FLOOR = 1e-5


def draw(shown: dict[str, Curves], coupling: float, output: Path) -> list[Path]:
    """Draw U over time, as far down as FLOOR."""
    curves = {}
    for name, label in (("gradient", "gradient flow"), ("accelerated", "with momentum")):
        t, values = shown[name]
        least, most = values.aminmax(dim=1)
        n = int((most >= FLOOR).sum())
        curves[label] = tuple(x[:n] for x in (t, values.log().mean(1).exp(), least, most))
    t = shown["gradient"].t
    curves["_threshold"] = (t, torch.full_like(t, THRESHOLD))
    plotter = dx.plotting.lines(
        curves,
        axes=("time", "U / U at the start"),
        log="y",
        titles=f"{SEEDS} clouds of {PARTICLES} in the softmax metric, A = {coupling:g} I",
    )
    return [dx.plotting.save(plotter, output / "particle_acceleration.png")]


if __name__ == "__main__":
    main()
