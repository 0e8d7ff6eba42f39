r"""
Parity and counters on circles, at any length
=============================================

Is the number of ones seen so far even? A head on a flat torus answers with its momentum, an angle
that each token turns by its own impulse (everything in turns):

.. math:: v \leftarrow v + F[u] \mod 1, \qquad x \leftarrow x + v \mod 1

Trained on sequences of 20, it is read after every token of streams a million long. Three things
make it exact, and symplecticity is none of them. The readout is fixed, a cosine around each
landmark :math:`c/C`, so that it keeps pulling the angle. In the last 30 % of the training impulses
are snapped to a grid of 1/60 turn, on which sums are exact (gradients pass straight through). And
there are 32 circles, of which that with the lowest loss on a fresh batch of length 20 is kept: one
circle often ends in the wrong valley. Without any of them most seeds fail. What needs no learned
geometry at all is the task: a prefix sum and a cosine solve it.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from darboux.learners.heads import landmarks
from darboux.learners.symplectic_attention import Phase, SymplecticAttention

CIRCLES = 32


def draw_tokens(batch: int, length: int, generator: torch.Generator | None = None) -> Tensor:
    """Return random bits ``(batch, length)``."""
    return torch.randint(0, 2, (batch, length), generator=generator)


def counter(seed: int) -> SymplecticAttention:
    """Return circles whose impulses are drawn from a whole turn."""
    generator = torch.Generator().manual_seed(seed)
    layer = SymplecticAttention(2, CIRCLES, dim=1, manifold="torus", grid=60, engine="scan")
    with torch.no_grad():
        layer.drive.weight.uniform_(generator=generator)
    return layer


def losses(layer: SymplecticAttention, tokens: Tensor, classes: int) -> Tensor:
    """Return the loss of each circle, which predicts by itself."""
    path, _ = layer.orbit(one_hot(tokens, 2).to(layer.drive.weight))
    logits = landmarks(path.p[..., 0], classes)
    wanted = (tokens.cumsum(1) % classes)[..., None, None].expand(*logits.shape[:-1], 1)
    # log_softmax is slow along so short a dimension
    total = torch.stack([x.exp() for x in logits.unbind(-1)]).sum(0)
    return (total.log() - logits.gather(-1, wanted)[..., 0]).mean((0, 1))


def train(seed: int, classes: int, steps: int = 400, length: int = 20) -> tuple:
    """Return a trained layer and the number of its best circle; sees nothing above ``length``."""
    generator = torch.Generator().manual_seed(1000 + seed)
    layer = counter(seed)
    weights = [layer.drive.weight]
    optimiser = torch.optim.Adam(weights, lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for step in range(steps):
        layer.snapped = step >= 0.7 * steps
        optimiser.zero_grad()
        losses(layer, draw_tokens(64, length, generator), classes).sum().backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        best = int(losses(layer, draw_tokens(512, length, generator), classes).argmin())
    return layer, best


# %%
# Reading a stream
# ----------------
# One circle is kept; the state is two numbers, and the tokens come in pieces.


@torch.no_grad()
def stream(
    layer: SymplecticAttention, circle: int, classes: int, length: int, batch: int = 8
) -> dict[int, float]:
    """Return the accuracy over every prefix, at lengths of powers of ten up to ``length``."""
    kept = SymplecticAttention(2, 1, dim=1, manifold="torus", grid=60, engine="scan")
    kept.snapped = True
    kept.drive.weight.copy_(layer.drive.weight[circle : circle + 1])
    generator = torch.Generator().manual_seed(99)
    state: Phase | None = None
    count, right, found = torch.zeros(batch, 1, dtype=torch.int64), 0, {}
    for begin in range(0, length, 1000):
        tokens = draw_tokens(batch, min(1000, length - begin), generator)
        path, state = kept.orbit(one_hot(tokens, 2).to(kept.drive.weight), state)
        count = count[:, -1:] + tokens.cumsum(1)
        right += int((landmarks(path.p[..., 0, 0], classes).argmax(-1) == count % classes).sum())
        done = begin + tokens.shape[1]
        if done in (1000, 10_000, 100_000, length):
            found[done] = right / (batch * done)
    return found


class Result(NamedTuple):
    """What this example found."""

    exact: dict[int, int]  # seeds without an error up to the longest length, by the modulus
    accuracy: dict[int, list[dict[int, float]]]  # by the modulus, the seed and the length
    seconds: float  # of the longest training
    files: list[Path]


def main(output: str | Path = "output", quick: bool = False, seeds: int | None = None) -> Result:
    """Train counters, stream them, print a table and draw the turning of one."""
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    seeds = seeds or (1 if quick else 10)
    length = 10_000 if quick else 1_000_000
    accuracy: dict[int, list[dict[int, float]]] = {}
    slowest, shown = 0.0, None
    for classes in (2,) if quick else (2, 3, 5):
        accuracy[classes] = []
        for seed in range(seeds):
            begin = time.perf_counter()
            layer, best = train(seed, classes)
            slowest = max(slowest, time.perf_counter() - begin)
            accuracy[classes].append(stream(layer, best, classes, length))
            shown = shown or (layer, best)
            impulses = (layer.drive.weight[best] * 60).round().long() % 60
            row = "  ".join(f"{n}: {100 * a:.4f} %" for n, a in accuracy[classes][-1].items())
            print(f"mod {classes}  seed {seed}  impulses {impulses.tolist()}/60 turn  {row}")
    exact = {c: sum(a[length] == 1 for a in found) for c, found in accuracy.items()}
    for classes, n in exact.items():
        print(f"mod {classes}: {n} of {seeds} seeds exact at every prefix up to {length}")
    print(f"the longest training took {slowest:.0f} s")
    assert shown is not None
    return Result(exact, accuracy, slowest, draw(*shown, output))


def draw(layer: SymplecticAttention, best: int, output: Path) -> list[Path]:
    """Draw two angles as they read: that of the best circle, and that of the worst."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    count = 60
    tokens = draw_tokens(1, count, torch.Generator().manual_seed(3))
    with torch.no_grad():
        path, _ = layer.orbit(one_hot(tokens, 2).to(layer.drive.weight))
        worst = int(
            losses(layer, draw_tokens(512, 20, torch.Generator().manual_seed(0)), 2).argmax()
        )
    colours = ["tab:blue" if u == 0 else "tab:red" for u in tokens[0].tolist()]
    figure, axes = plt.subplots(2, 1, figsize=(9, 4.2), layout="constrained", sharex=True)
    for axis, circle, name in zip(
        axes, (best, worst), ("the circle that is kept", "one in a wrong valley"), strict=True
    ):
        angle = path.p[0, :, circle, 0]
        axis.step(range(count), angle, where="mid", color="0.75", zorder=0)
        axis.scatter(range(count), angle, c=colours, s=18)
        axis.set(ylabel="turns", ylim=(-0.08, 1.0), xlim=(-1, count), title=name)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("token: 0 blue, 1 red")
    file = output / "parity.png"
    figure.savefig(file, dpi=150)
    plt.close(figure)
    return [file]


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description="Count ones modulo 2, 3 and 5 on circles.")
    parser.add_argument("--output", default="output")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    main(arguments.output, arguments.quick, arguments.seeds)
