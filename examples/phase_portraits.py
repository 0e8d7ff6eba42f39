r"""
Phase portraits of heads
========================

What a token does to the state of a head of symplectic attention is a map of phase space. On a torus
of revolution it is a kick and then a geodesic for the time of one token, drawn here on the torus in
space, coloured by the token that kicked. Whether such maps keep areas is seen on a cloud of states
that read the same tokens: a pendulum's keeps them and the symplectic form; so does the low-rank
rule :math:`v' = v - hW\varphi(U^Tv)` where :math:`U^TW = 0`; the literal rule, whose W is free,
collapses the cloud onto a line. What is kept is the volume of the *states*; of the tokens that were
read it says nothing.

Last, what a layer has to keep between tokens: the bytes of its state against the tokens read.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import darboux as dx
from darboux.learners import GRU, SoftmaxAttention, SpectralAttention, state_bytes
from darboux.learners.heads import KINDS
from darboux.learners.symplectic_attention import Phase, SymplecticAttention, audit

F64 = torch.float64
TOKENS = 3

# %%
# An orbit on the torus
# ---------------------
# One head with two angles. Friction keeps its speed bounded; three tokens, each a kick of its own.


class Orbit(NamedTuple):
    """Geodesics ``(tokens, points, 3)`` between the kicks, and which token began each."""

    paths: Tensor
    tokens: Tensor
    torus: dx.TorusOfRevolution


def wander(length: int) -> Orbit:
    """Let one head read random tokens."""
    generator = torch.Generator().manual_seed(2)
    layer = SymplecticAttention(
        TOKENS, 1, dim=2, manifold="revolution", friction=0.2, generator=generator
    ).double()
    tokens = torch.randint(TOKENS, (length,), generator=generator)
    with torch.no_grad():
        layer.drive.weight.copy_(torch.tensor([[2.0, -1.6, -0.2], [0.9, -0.3, 0.6]]))
        small, large = KINDS["revolution"].tensors(layer.geometry, layer.step)
        # the layer gives the states after each token; the way there is its own drift, cut short
        start = torch.tensor([[[0.6, -2.2]]], dtype=F64)
        end, _ = layer.orbit(
            nn.functional.one_hot(tokens, TOKENS)[None].to(F64),
            Phase(start, torch.zeros_like(start)),
        )
        shares = torch.linspace(-1, 0, 25, dtype=F64).tolist()
        drift = KINDS["revolution"].drift
        ways = [drift((small, large), end.q[0], end.p[0], layer.step * s)[0] for s in shares]
        torus = dx.TorusOfRevolution(float(large), float(small))
        paths = torus.embedding(torch.stack(ways, 1)[:, :, 0])
    return Orbit(paths, tokens, torus)


# %%
# Clouds
# ------
# A disk of states reads tokens. The ratio of areas is the mean over the disk of the determinant of
# the map's Jacobian, which is a product over the tokens.

RULES = {"pendulum": "symplectic", "low_rank": "volume", "low_rank_literal": "neither"}


class Cloud(NamedTuple):
    """A cloud ``(panels, N, 2)`` around its middle after some tokens, and its ratios of areas."""

    states: Tensor
    ratios: Tensor  # (panels,)
    least: float  # the farthest from one of all states
    most: float


def flow(rule: str, count: int, panels: int, between: int) -> Cloud:
    """Move a disk by ``between`` tokens from panel to panel."""
    generator = torch.Generator().manual_seed(7)
    dim = 1 if rule == "pendulum" else 2
    layer = SymplecticAttention(
        TOKENS, 1, dim=dim, manifold=rule, step=0.5, size=1, generator=generator
    ).double()
    places = torch.Generator().manual_seed(1)
    radius = torch.rand(count, dtype=F64, generator=places).sqrt()
    angle = 2 * math.pi * torch.rand(count, dtype=F64, generator=places)
    disk = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
    tokens = torch.randint(TOKENS, (panels * between,), generator=generator)
    with torch.no_grad():
        if rule == "pendulum":
            layer.geometry["strength"].fill_(1.0)
            layer.drive.weight.mul_(0.5)
            disk = disk + torch.tensor([1.5, 0.0], dtype=F64)
        else:  # forces push along U, where the literal rule pulls back
            layer.geometry["u"].copy_(torch.tensor([[[1.0], [0.0]]]))
            layer.geometry["w"].copy_(torch.tensor([[[0.9], [0.6]]]))
            layer.drive.weight.copy_(torch.tensor([[0.8, 1.4, 1.1], [0.3, -0.3, 0.0]]))
            disk = disk + torch.tensor([2.0, 0.0], dtype=F64)
        cell = layer.cell()
        forces = layer.drive.weight.mT[tokens][:, None]

        def move(z: Tensor, f: Tensor) -> Tensor:
            # the low-rank rules move velocities by themselves: positions only follow
            q, p = (z[None, :1], z[None, 1:]) if dim == 1 else (torch.zeros_like(z)[None], z[None])
            q, p = cell.step(cell.parameters, f, (q, p))
            return torch.cat([q[0], p[0]]) if dim == 1 else p[0]

        step = torch.func.vmap(move, (0, None))
        jacobian: Any = torch.func.vmap(torch.func.jacfwd(move), (0, None))
        z, det = disk, torch.ones(count, dtype=F64)
        states, ratios = [z], [1.0]
        for t, f in enumerate(forces[: (panels - 1) * between]):
            det = det * torch.linalg.det(jacobian(z, f))
            z = step(z, f)
            if (t + 1) % between == 0:
                states.append(z)
                ratios.append(float(det.mean()))
    shown = torch.stack(states)
    return Cloud(
        shown - shown.mean(1, keepdim=True),
        torch.tensor(ratios, dtype=F64),
        float(det.min()),
        float(det.max()),
    )


# %%
# Memory
# ------
# The bytes of a state are counted, for one sequence and one layer of width 32.


class Memory(NamedTuple):
    """Bytes by the name of the layer, at the lengths."""

    lengths: list[int]
    state: dict[str, list[int]]


def measure(lengths: list[int], width: int = 32) -> Memory:
    """Count bytes."""
    torch.manual_seed(0)
    layers: dict[str, nn.Module] = {
        "softmax attention": SoftmaxAttention(width, 2),
        "spectral, K = 27": SpectralAttention(width, 27),
        "gru": GRU(width),
        "symplectic torus": SymplecticAttention(width, 2, manifold="torus", engine="scan"),
    }
    state: dict[str, list[int]] = {name: [] for name in layers}
    with torch.no_grad():
        for name, layer in layers.items():
            for n in lengths:
                state[name].append(state_bytes(layer(torch.randn(1, n, width))[1]))
    return Memory(lengths, state)


# %%
# All of it
# ---------


class Result(NamedTuple):
    """What this example found."""

    orbit: Orbit
    clouds: dict[str, Cloud]
    defects: dict[str, tuple[float, float]]  # of the symplectic form and the volume, by manifold
    memory: Memory
    files: list[Path]


def main(output: str | Path = "output", quick: bool = False) -> Result:
    """Draw an orbit, move clouds, audit every manifold, count bytes."""
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    orbit = wander(20 if quick else 50)
    clouds = {rule: flow(rule, 300 if quick else 1500, 4, 4) for rule in RULES}
    print("area of a cloud over that at the start, after 0, 4, 8, 12 tokens")
    for rule, cloud in clouds.items():
        print(
            f"{rule:<18}", *(f"{x:9.6f}" for x in cloud.ratios.tolist()),
            f"   at single states {cloud.least:.4f} to {cloud.most:.4f}",
        )  # fmt: skip
    print("\naudit of one token's map    |J'OJ - O|   |det - 1|   declared")
    defects = {}
    for manifold in (*KINDS, "rotation"):
        generator = torch.Generator().manual_seed(0)
        layer = SymplecticAttention(16, 2, manifold=manifold, generator=generator).double()
        found = audit(layer, generator=generator)
        defects[manifold] = found.symplectic, found.volume
        named = found.declared
        says = "symplectic" if named.symplectic else "volume" if named.volume else "neither"
        print(f"{manifold:<24}{found.symplectic:14.1e}{found.volume:12.1e}   {says}")
    memory = measure([64, 256, 1024] if quick else [64, 256, 1024, 4096, 16384])
    print("\nbytes of the state after", *(f"{n:>9,}" for n in memory.lengths), " tokens")
    for name, row in memory.state.items():
        print(f"{name:<24}", *(f"{n:>9,}" for n in row))
    files = draw(orbit, clouds, memory, output)
    for file in files:
        print(f"{file!s:<40}{file.stat().st_size / 1000:10,.0f} kB")
    return Result(orbit, clouds, defects, memory, files)


COLORS = ("#E69F00", "#009E73", "#0072B2")
NAMES = {
    "pendulum": "pendulum",
    "low_rank": "low rank, U'W = 0",
    "low_rank_literal": "low rank, literal",
}


def draw(orbit: Orbit, clouds: dict[str, Cloud], memory: Memory, output: Path) -> list[Path]:
    """Draw the orbit, the clouds and the bytes."""
    plotter = dx.plotting.surface(orbit.torus, scalars=None)
    colors = [COLORS[int(t)] for t in orbit.tokens]
    radius = 0.008 * float(orbit.torus.R + orbit.torus.r)
    dx.plotting.curves(list(orbit.paths), color=colors, radius=radius, plotter=plotter)
    files = [dx.plotting.save(plotter, output / "phase_orbit.png")]
    shown = [state for cloud in clouds.values() for state in cloud.states]
    reach = max(float(state.abs().max()) for state in shown) * 1.02
    # quarters of the disk in four colours: every cloud starts from the same disk
    start = shown[0]
    labels = []
    for rule, cloud in clouds.items():
        areas = enumerate(cloud.ratios.tolist())
        labels += [f"area {x:.3f} after {4 * i}" if i else NAMES[rule] for i, x in areas]
    plotter = dx.plotting.particles(
        shown,
        columns=4,
        groups=1 + (start[:, 0] > 0).long() + 2 * (start[:, 1] > 0).long(),
        bounds=((-reach, reach), (-reach, reach)),
        labels=labels,
        size=0.008,
    )
    files.append(dx.plotting.save(plotter, output / "phase_clouds.png"))
    lengths = torch.tensor(memory.lengths, dtype=F64)
    curves = {name: (lengths, torch.tensor(row, dtype=F64)) for name, row in memory.state.items()}
    plotter = dx.plotting.lines(
        curves, axes=("tokens read", "bytes of the state"), log="xy", dots=True
    )
    files.append(dx.plotting.save(plotter, output / "phase_memory.png"))
    return files


if __name__ == "__main__":
    main()
