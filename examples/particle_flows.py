r"""
Particles that flow
===================

Particles fall down an energy of measures: toward a density, plainly and with momentum, at the same
cost for each step; then the iterations that both need on Gaussians, where the flow of particles is
exact. Self-attention moves tokens too: on the sphere they gather in clusters. Last, what linear
attention preserves, and how a causal mask breaks it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from scipy.integrate import solve_ivp
from scipy.sparse.csgraph import connected_components
from torch import Tensor

import darboux as dx
from darboux.flows import accelerated, gaussian, interaction
from darboux.flows.energies import KL, Entropy, Potential
from darboux.flows.wasserstein import gradient_flow

F64 = torch.float64

# %%
# A banana
# --------
# Both flows evaluate one force at each iteration: the gradient of log density, and the repulsion of
# the particles, the entropy by blobs. The step of the gradient flow is limited by the narrow
# direction of the target, and along the banana there is little force; momentum builds up there.

TAU = 0.005


def banana(x: Tensor) -> Tensor:
    """Return the log density of a bent Gaussian at ``x (..., 2)``, up to a constant."""
    a, b = x.unbind(-1)
    return -(a**2) / 2 - ((b - 0.7 * a**2 + 1) / 0.4) ** 2 / 2


class Race(NamedTuple):
    """Particles ``(time, N, 2)`` and energies ``(time,)``, plain and accelerated."""

    plain: Tensor
    fast: Tensor
    energies: tuple[Tensor, Tensor]


def race(count: int, steps: int) -> Race:
    """Let particles flow from above to the banana, both ways."""
    generator = torch.Generator().manual_seed(0)
    x = 0.3 * torch.randn(count, 2, dtype=F64, generator=generator)
    x = x + torch.tensor([0.0, 2.5], dtype=F64)
    energy = KL(banana, score="blob", bandwidth=0.02)
    plain = gradient_flow(energy, x, dt=TAU, steps=steps)
    fast = accelerated.accelerated_flow(energy, x, dt=math.sqrt(TAU), steps=steps)
    assert plain.energy is not None
    assert fast.energy is not None
    return Race(plain.x, fast.x, (plain.energy, fast.energy))


# %%
# Iterations
# ----------
# To N(0, Q) from a cloud of mean 0 and covariance 1, with the score of a Gaussian: mean and
# covariance then follow the exact flow, and the recorded energy is the divergence. The precisions
# go from 1 to kappa, and the step is half the inverse of the largest. Damping for the least
# convexity is best on paper and swings for long where the step is not small against the entropy;
# Nesterov's, with restarts where the velocity points uphill, needs no constant.

METHODS = ("gradient flow", "strongly convex", "Nesterov", "Nesterov, restarts")


def iterations(kappa: float, dim: int, limit: int) -> dict[str, int | None]:
    """Return the iterations until KL is below 1e-6, ``None`` where the limit is reached."""
    precision = torch.logspace(0, math.log10(kappa), dim, dtype=F64)
    constant = dim / 2 * math.log(2 * math.pi) - precision.log().sum() / 2

    def potential(x: Tensor) -> Tensor:
        return (precision * x**2).sum(-1) / 2 + constant

    energy = Potential(potential) + Entropy("gaussian")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * dim, dim, dtype=F64, generator=generator)
    mean, cov = gaussian.moments(x)
    x = (x - mean) @ gaussian.inverse(gaussian.sqrtm(cov))
    tau, found = 0.5 / kappa, {}
    for method in METHODS:
        with torch.no_grad():
            if method == "gradient flow":
                run = gradient_flow(energy, x, dt=tau, steps=limit)
            else:
                convex = method == "strongly convex"
                run = accelerated.accelerated_flow(
                    energy, x, dt=math.sqrt(tau), steps=limit,
                    damping=accelerated.StronglyConvex(1.0) if convex else None,
                    restart="gradient" if method.endswith("restarts") else None,
                )  # fmt: skip
        assert run.energy is not None
        below = (run.energy < 1e-6).nonzero()
        found[method] = int(below[0]) if len(below) else None
    return found


# %%
# Attention on the sphere
# -----------------------
# Tokens on the unit sphere move toward those that they attend to. At a high inverse temperature
# they first gather in a few clusters, which meet much later. The exact test: tokens at equal
# angles stay so, and their inner product obeys one ordinary differential equation.


def cluster(count: int, t: float, beta: float, frames: int) -> interaction.Tokens:
    """Move tokens by softmax attention."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, 3, dtype=F64, generator=generator)
    field = interaction.SelfAttention(beta=beta, manifold=dx.Sphere(2))
    x = x / x.norm(dim=-1, keepdim=True)
    every = max(1, round(t / 0.05 / frames))
    return interaction.interact(field, x, dt=t / frames / every, steps=frames * every,
                                save_every=every)  # fmt: skip


def groups(x: Tensor, angle: float = 0.05) -> list[int]:
    """Return the number of the cluster of each token: neighbours are within an angle."""
    near = (x @ x.mT > math.cos(angle)).numpy()
    return connected_components(near, directed=False)[1].tolist()


def equiangular(count: int = 6, rho: float = 0.1, beta: float = 2.0) -> float:
    """Return the error at t = 1 against the equation of the inner product."""
    gram = (1 - rho) * torch.eye(count, dtype=F64) + rho
    x = torch.linalg.cholesky(gram)
    field = interaction.SelfAttention(beta=beta, manifold=dx.Sphere(count - 1))
    end = interaction.interact(field, x, dt=0.01, steps=100).x[-1]

    def rate(_: float, r: float) -> float:
        e = math.exp(beta * (r - 1))  # divided by e^beta
        return 2 * e * (1 - r) * ((count - 1) * r + 1) / (1 + (count - 1) * e)

    exact = solve_ivp(lambda t, y: [rate(t, y[0])], (0, 1), [rho], rtol=1e-12, atol=1e-14).y[0, -1]
    off = (end @ end.mT)[~torch.eye(count, dtype=torch.bool)]
    return float((off - exact).abs().max())


# %%
# What is preserved
# -----------------
# Linear attention without a mask moves all tokens by one matrix, so that x'M^-1x, M the second
# moment, is a constant of each token: elliptically contoured laws stay what they are. Under a
# causal mask each token has a matrix of its own.


def ellipses(causal: bool, count: int = 300) -> float:
    """Return the largest relative change of x'M^-1x over the tokens, from t = 0 to 1."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(count, 3, dtype=F64, generator=generator)
    V = torch.tensor([[-0.6, 0.3, 0.0], [-0.2, -0.4, 0.1], [0.1, 0.0, -0.5]], dtype=F64)
    field = interaction.SelfAttention(V=V, norm="linear", causal=causal)
    run = interaction.interact(field, x, dt=0.02, steps=50)
    before, after = (
        ((z @ gaussian.inverse(z.mT @ z / count)) * z).sum(-1) for z in (run.x[0], run.x[-1])
    )
    return float((after / before - 1).abs().max())


# %%
# All of it
# ---------


class Result(NamedTuple):
    """What this example found."""

    energies: dict[str, list[float]]  # at the iterations that are drawn
    table: dict[float, dict[str, int | None]]  # iterations by kappa and method
    clusters: list[int]  # at the start, ..., at the end
    equiangular: float
    preserved: float
    causal: float
    files: list[Path]


SHOWN = (5, 20, 80, 320)


def main(output: str | Path = "output", quick: bool = False) -> Result:
    """Race to a banana, count iterations, cluster tokens, check invariants, draw."""
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    shown = SHOWN[:2] if quick else SHOWN
    both = race(60 if quick else 250, max(shown))
    names = ("plain", "accelerated")
    energies = {n: e[list(shown)].tolist() for n, e in zip(names, both.energies, strict=True)}
    print("Energy KL + constant of particles that flow to a banana, by iterations\n")
    print(f"{'':14}" + "".join(f"{k:12}" for k in shown))
    for name, row in energies.items():
        print(f"{name:14}" + "".join(f"{e:12.4f}" for e in row))

    cases = {10.0: 50, 100.0: 300} if quick else {10.0: 500, 100.0: 1500, 1000.0: 5000}
    table = {kappa: iterations(kappa, 6 if quick else 20, cases[kappa]) for kappa in cases}
    print("\nIterations to KL < 1e-6 on Gaussians of condition kappa\n")
    print(f"{'kappa':>8}" + "".join(f"{name:>20}" for name in METHODS))
    for kappa, found in table.items():
        cells = (f"> {cases[kappa]}" if k is None else str(k) for k in found.values())
        print(f"{kappa:8.0f}" + "".join(f"{cell:>20}" for cell in cells))

    tokens = cluster(24 if quick else 64, 10.0 if quick else 16.0, 9.0, 4 if quick else 60)
    counts = [len(set(groups(x))) for x in tokens.x]
    print(f"\n{tokens.x.shape[1]} tokens on the sphere; clusters at t = ", end="")
    some = range(0, len(counts), max(1, len(counts) // 6))
    print(", ".join(f"{float(tokens.t[i]):.0f}: {counts[i]}" for i in some))
    error = equiangular()
    print(f"tokens at equal angles: error of the inner product at t = 1: {error:.1e}")

    kept, broken = ellipses(False), ellipses(True)
    print(f"\nLinear attention: x'M^-1x of a token changes by {kept:.1e} without a mask,")
    print(f"by up to {broken:.2f} of itself under a causal one")

    files = draw(both, shown, tokens, output)
    for file in files:
        print(f"{file!s:<40}{file.stat().st_size / 1000:10,.0f} kB")
    return Result(energies, table, counts, error, kept, broken, files)


# %%
# The pictures
# ------------


def draw(
    both: Race, shown: tuple[int, ...], tokens: interaction.Tokens, output: Path
) -> list[Path]:
    """Draw the race, its energies, and a film of the tokens."""
    rows, labels = [], []
    for name, path in (("plain", both.plain), ("accelerated", both.fast)):
        rows += [path[k] for k in shown]
        labels += [f"{name}, {k}" for k in shown]
    plotter = dx.plotting.particles(
        torch.stack(rows), density=lambda x: banana(x).exp(), columns=len(shown), labels=labels,
        bounds=((-3.0, 3.0), (-2.2, 4.2)),
    )  # fmt: skip
    files = [dx.plotting.save(plotter, output / "flows_banana.png")]
    plotter.close()
    lowest = torch.cat(both.energies).min()
    curves = {}
    for name, e in zip(("plain", "accelerated"), both.energies, strict=True):
        k = torch.arange(len(e))[(e - lowest > 1e-3) & (torch.arange(len(e)) > 0)]
        curves[name] = (k.to(F64), e[k] - lowest)
    plotter = dx.plotting.lines(
        curves, log="xy", axes=("iterations", "energy above the lowest found")
    )
    files.append(dx.plotting.save(plotter, output / "flows_banana_energy.png"))
    plotter.close()
    shades = groups(tokens.x[len(tokens.x) // 3])
    files.append(
        dx.plotting.particle_film(
            tokens.x, output / "flows_attention.gif", groups=shades, trail=6, turn=50.0, fps=12,
            width=420, size=0.02,
        )
    )  # fmt: skip
    return files


if __name__ == "__main__":
    main()
