r"""
A memory that hears its tokens
==============================

Spectral attention keeps a sequence in the eigenfunctions of a torus whose metric the tokens deform:
where they gather, lengths grow and tones fall. Here a stream wanders over the torus while the
spectrum is followed, and the memory is filled until it is full: with K functions it recalls K
independent values exactly and, of N more than that, at best the share K / N.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import darboux as dx
from darboux.learners.spectral_attention import SpectralAttention
from darboux.manifolds.mesh import grid
from darboux.manifolds.spectral import Fourier

F64 = torch.float64
WIDTH = 4
DRAWS = 8

# %%
# The spectrum as tokens arrive
# -----------------------------
# The metric is the mean of the bumps of all tokens, so it settles where the stream does. Levels of
# the flat torus are fourfold or eightfold; the tokens split them.


class Arrival(NamedTuple):
    """What a stream does to the metric."""

    counts: Tensor  # (T,) tokens
    values: Tensor  # (T, k), eigenvalues
    densities: Tensor  # (n, 3) of the volume, after some of the tokens
    shown: list[int]  # which


def wander(tokens: int) -> Tensor:
    """Return a stream ``(1, tokens, WIDTH)`` that drifts from one place to another."""
    g = torch.Generator().manual_seed(1)
    noise = torch.randn(1, tokens, WIDTH, dtype=F64, generator=g)
    turn = torch.linspace(0, math.pi, tokens, dtype=F64)
    drift = torch.stack([turn.cos(), turn.sin(), 0 * turn, 0 * turn], -1)
    return 0.5 * noise + 1.5 * drift


def arrive(tokens: int, modes: int = 49, k: int = 13) -> Arrival:
    """Feed a stream token by token and solve the pencil after each."""
    torch.manual_seed(2)
    layer = SpectralAttention(WIDTH, modes, dx.FlatTorus(2), strength=1.9, inertia=8.0).double()
    assert layer.bumps is not None
    with torch.no_grad():
        layer.bumps.bias[-1] = 3.0  # bumps of nearly full strength
    stream, state, values = wander(tokens), None, []
    mesh, shown, densities = grid((48, 48)), [tokens // 16, tokens // 4, tokens], []
    places = 2 * math.pi * mesh.vertices[:, :2] / mesh.vertices[:, :2].max()
    with torch.no_grad():
        for t in range(tokens):
            _, state = layer(stream[:, t : t + 1], state)
            operator = layer.operator(state)
            stiffness, mass = operator.stiffness, operator.mass
            found = dx.eigenpairs(type(operator)(stiffness[0, 0], mass[0, 0]), k)  # pyright: ignore[reportIndexIssue]
            values.append(found.values)
            if t + 1 in shown:
                # sqrt g in the same functions: the first row of the mass
                basis = layer.basis(stream)
                row = mass[0, 0, 0]  # pyright: ignore[reportIndexIssue]
                densities.append(basis.evaluate(places) @ row * math.sqrt(basis.volume))
    counts = torch.arange(1, tokens + 1, dtype=F64)
    return Arrival(counts, torch.stack(values), torch.stack(densities, -1), shown)


# %%
# How much it holds
# -----------------
# N values at random places, kept as K moments. The best that any linear readout can do with K
# numbers is the projection on the K functions; the heat kernel, which needs no solve and no list of
# places, blurs earlier.


class Capacity(NamedTuple):
    """The mean square missed of unit values, against N / K."""

    loads: Tensor
    best: dict[int, Tensor]  # by K
    heat: dict[int, Tensor]


def fill(degrees: tuple[int, ...], copies: int) -> Capacity:
    """Fill memories of different size with growing numbers of values."""
    g = torch.Generator().manual_seed(0)
    loads = torch.tensor([0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0], dtype=F64)
    best, heat = {}, {}
    for degree in degrees:
        basis = Fourier(degree)
        squares = basis.frequencies.square().sum(-1)
        response = torch.exp(-1.5 / degree**2 * torch.cat([squares, squares[1:]]))
        rows = []
        for load in loads.tolist():
            n = max(1, round(load * basis.size))
            phi = basis.evaluate(2 * math.pi * torch.rand(DRAWS, n, 2, dtype=F64, generator=g))
            values = torch.randn(DRAWS, n, copies, dtype=F64, generator=g)
            projected = phi @ (torch.linalg.pinv(phi) @ values)
            weights = (phi * response) @ phi.mT
            blurred = (weights @ values) / weights.sum(-1, keepdim=True)
            rows.append([float((x - values).square().mean()) for x in (projected, blurred)])
        best[basis.size], heat[basis.size] = torch.tensor(rows, dtype=F64).T
    return Capacity(loads, best, heat)


# %%
# All of it
# ---------


class Result(NamedTuple):
    """What this example found."""

    arrival: Arrival
    capacity: Capacity
    files: list[Path]


def main(output: str | Path = "output", quick: bool = False) -> Result:
    """Follow the spectrum of a stream, fill memories, draw."""
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    arrival = arrive(48 if quick else 192)
    first, last = arrival.values[0], arrival.values[-1]
    print("eigenvalues after   1 token: ", *(f"{x:.3f}" for x in first[1:9].tolist()))
    print(f"eigenvalues after {len(arrival.counts):3} tokens:", end=" ")
    print(*(f"{x:.3f}" for x in last[1:9].tolist()))
    capacity = fill((1, 2, 3) if quick else (1, 2, 3, 5), 50 if quick else 100)
    print("\nmean square missed of N values by K functions, best readout")
    print("   N / K", *(f"{x:7.2f}" for x in capacity.loads.tolist()))
    for size, missed in capacity.best.items():
        print(f"K = {size:4}", *(f"{x:7.3f}" for x in missed.tolist()))
    files = draw(arrival, capacity, output)
    for file in files:
        print(f"{file!s:<40}{file.stat().st_size / 1000:10,.0f} kB")
    return Result(arrival, capacity, files)


def draw(arrival: Arrival, capacity: Capacity, output: Path) -> list[Path]:
    """Draw the spectrum, the density of the metric, and the error against the load."""
    k = arrival.values.shape[1] - 1
    level = [1] * min(4, k) + [2] * min(4, k - 4) + [4] * max(0, k - 8)
    plots: dict[str, Any] = {
        "spectral_memory_tones.png": dx.plotting.spectrum(
            (arrival.counts, arrival.values[:, 1:] / torch.tensor(level, dtype=F64)),
            groups=level,
            labels=[f"flat level {l}" for l in sorted(set(level))],
            axes=("tokens", "eigenvalue / that of the flat torus"),
            title="The spectrum of the metric as tokens arrive",
        ),
        "spectral_memory_metric.png": dx.plotting.functions(
            grid((48, 48)),
            arrival.densities,
            labels=[f"{n} tokens" for n in arrival.shown],
            columns=3,
            nodal=False,
        ),
    }
    curves: dict[str, Any] = {}
    for size, missed in capacity.best.items():
        curves[f"K = {size}"] = (capacity.loads, missed)
    loads = torch.linspace(1, 4, 61, dtype=F64)
    curves["_bound"] = (loads, 1 - 1 / loads)
    blurred = {f"K = {size}": (capacity.loads, x) for size, x in capacity.heat.items()}
    plots["spectral_memory_capacity.png"] = dx.plotting.lines(
        [curves, blurred],
        axes=("values / functions, N / K", "mean square missed"),
        titles=["best readout; grey: 1 - K / N", "heat kernel, normalised"],
        dots=True,
    )
    return [dx.plotting.save(plotter, output / name) for name, plotter in plots.items()]


if __name__ == "__main__":
    main()
