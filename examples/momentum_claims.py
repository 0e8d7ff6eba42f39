r"""
What momentum helps with, and what it does not
==============================================

Keys that see their predecessor, :math:`\hat k_t = k_t + \gamma (k_t - k_{t-1})`, recall in one
layer of attention (``momentum_recall.py``). The text that names this "momentum attention" (Maitra,
arXiv 2602.04902) says more, and gives neither code nor data. Three of its statements are put to the
test here, each with its controls and several seeds::

    python examples/momentum_claims.py --part tasks
    python examples/momentum_claims.py --part chains
    python examples/momentum_claims.py --part depth --depths 1 2 3 4 5 8

``tasks``: momentum helps where the answer depends on a *change*, and not where it depends on what
has *accumulated*. In the text induction goes from 12.4 to 98.7 %, retrieval by meaning from 76.5 to
76.2 %; sheared after the rotation of positions it gains 52.5 %, before it it loses 4.1 %.

``chains``: the longer the pattern in the context, the more momentum is worth: 52.5 % of the loss
from words of 10 to words of 30 tokens. Beside repeated words stand chains a -> b -> c, whose edges
are given in any order: what lies one to four edges from here?

``depth``: the best gamma of a stack of N layers is :math:`4.17\,N^{-0.74}`.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from momentum_recall import SWEEPS, TOKENS, WIDTH, momentum, recall
from torch import Tensor, nn
from torch.nn.functional import one_hot

import darboux as dx
from darboux.learners import scaling_law, tasks, training
from darboux.learners.attention import SoftmaxAttention
from darboux.learners.model import Block, SequenceModel, count_parameters
from darboux.learners.momentum_attention import convolved_keys
from darboux.learners.tasks import IGNORED, Task

BATCH, LENGTH = 32, 32
Make = Callable[[int, torch.Generator], Task]

# %%
# Changes and sums
# ----------------
# Was the last step up or down, which token came before this one, what followed it when it was here
# last? And: which bit, which of four tokens has been the most frequent so far, how many ones modulo
# three? The sums are asked for in the second half, where there is something to sum.


def walk(batch: int, generator: torch.Generator) -> Task:
    """Return walks on a ring of 16, and whether each step was up: no token tells it alone."""
    start = torch.randint(16, (batch, 1), generator=generator)
    up = torch.randint(2, (batch, LENGTH), generator=generator)
    up[:, 0] = IGNORED
    return Task((start + (2 * (up == 1) - 1).cumsum(1)) % 16, up)


def previous(batch: int, generator: torch.Generator) -> Task:
    """Return random tokens, and the one before each."""
    x = torch.randint(16, (batch, LENGTH + 1), generator=generator)
    targets = x[:, :-1].clone()
    targets[:, 0] = IGNORED
    return Task(x[:, 1:], targets)


def induction(batch: int, generator: torch.Generator) -> Task:
    """Return random tokens with the rule that equal ones are followed by equal ones."""
    return tasks.induction(batch, LENGTH, vocabulary=TOKENS, generator=generator)


def frequent(batch: int, generator: torch.Generator, symbols: int = 4) -> Task:
    """Return random tokens and the most frequent one so far, where there is only one."""
    tokens = torch.randint(symbols, (batch, LENGTH), generator=generator)
    first, second = one_hot(tokens, symbols).cumsum(1).topk(2).values.unbind(-1)
    best = one_hot(tokens, symbols).cumsum(1).argmax(-1)
    return late(Task(tokens, torch.where(first > second, best, IGNORED)))


def majority(batch: int, generator: torch.Generator) -> Task:
    """Return bits and the more frequent one so far."""
    return frequent(batch, generator, 2)


def count(batch: int, generator: torch.Generator) -> Task:
    """Return a few ones among zeros, and their number so far modulo three."""
    return late(tasks.counter(batch, LENGTH, 3, mix="sparse", generator=generator))


def late(task: Task) -> Task:
    """Ask in the second half alone."""
    task.targets[:, : LENGTH // 2] = IGNORED
    return task


CHANGES: dict[str, Make] = {"up or down": walk, "previous": previous, "induction": induction}
SUMS: dict[str, Make] = {"majority": majority, "most frequent": frequent, "count mod 3": count}
KINDS = {"changes": CHANGES, "sums": SUMS}

# %%
# Words and chains
# ----------------
# A word of random tokens stands twice. The tokens are drawn with replacement: in a longer word more
# of them have two successors. The edges of two chains are written ``a b ;`` in random order; then
# come, one by one, the tokens of which it is asked what lies some edges further on.


def repetition(batch: int, generator: torch.Generator, shortest: int, longest: int) -> Task:
    """Return words of some length, again and again; the second time the next token is asked for."""
    period = torch.randint(shortest, longest + 1, (batch, 1), generator=generator)
    word = torch.randint(TOKENS // 2, (batch, longest), generator=generator)
    t = torch.arange(2 * longest)
    asked = (t >= period) & (t < 2 * period - 1)
    following = word.gather(1, (t + 1) % period)
    return Task(word.gather(1, t % period), torch.where(asked, following, IGNORED))


CHAINS, EDGES = 2, 4


def chains(batch: int, generator: torch.Generator, hops: int) -> Task:
    """Return shuffled edges of chains, all tokens that far from an end, and what lies there."""
    stop = 16
    nodes = torch.rand(batch, stop, generator=generator).argsort(-1)[:, : CHAINS * (EDGES + 1)]
    nodes = nodes.view(batch, CHAINS, EDGES + 1)
    edges = shuffled(generator, nodes[..., :-1], nodes[..., 1:])
    asked, answers = shuffled(generator, nodes[..., :-hops], nodes[..., hops:]).unbind(-1)
    told = nn.functional.pad(edges, (0, 1), value=stop).flatten(1)
    tokens = torch.stack([asked, torch.full_like(asked, stop)], -1).flatten(1)
    targets = torch.stack([answers, torch.full_like(asked, IGNORED)], -1).flatten(1)
    return Task(
        torch.cat([told, tokens], 1), torch.cat([torch.full_like(told, IGNORED), targets], 1)
    )


def shuffled(generator: torch.Generator, first: Tensor, second: Tensor) -> Tensor:
    """Return pairs ``(batch, n, 2)`` in random order, another in each row."""
    pairs = torch.stack([first, second], -1).flatten(1, 2)
    order = torch.rand(pairs.shape[:2], generator=generator).argsort(-1)
    return pairs.gather(1, order[..., None].expand_as(pairs))


# %%
# The layers
# ----------
# One head. Sums, and up or down, need an MLP after it, so all models of that part have one; the
# rest have attention alone.

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: SoftmaxAttention(WIDTH, 1),
    "keys, gamma 1": momentum(0, 1),
    "keys, gamma -1": momentum(0, -1),
    "keys, gamma learned from 0.5": momentum(0, 0.5, "k"),
    "both, gamma 1": momentum(1, 1),
    "both before, gamma 1": momentum(1, 1, placement="pre_rope"),
    "convolved keys": lambda: convolved_keys(WIDTH, 1),
}
# name: layer and how many; those without taps learned or on queries also follow chains
STACKS = {
    "plain": ("plain", 1),
    "keys, gamma -1": ("keys, gamma -1", 1),
    "two plain": ("plain", 2),
    "two, keys, gamma -1": ("keys, gamma -1", 2),
    "keys, learned": ("keys, gamma learned from 0.5", 1),
    "both, gamma 1": ("both, gamma 1", 1),
}
CHAINED = tuple(STACKS)[:4]


class Row(NamedTuple):
    """One model on one test. ``size`` is the length, the number of edges or of layers."""

    part: str
    task: str
    variant: str
    gamma: float | None  # where it is swept
    size: int
    seed: int
    accuracy: float
    loss: float  # in nats
    training: float  # its mean over the whole training
    parameters: int


def train(
    layer: Callable[[], nn.Module], make: Make, seed: int, steps: int, layers: int = 1,
    hidden: int = 0,
) -> tuple[SequenceModel, Tensor]:  # fmt: skip
    """Return a trained model, and the loss of each step."""
    torch.manual_seed(seed)
    blocks = [Block(WIDTH, layer(), hidden=hidden, norm=nn.RMSNorm) for _ in range(layers)]
    model = SequenceModel(TOKENS, WIDTH, blocks)
    found = training.fit(
        model, lambda _, generator: make(BATCH, generator), steps=steps, lr=5e-3,
        schedule="one_cycle", seed=seed,
    )  # fmt: skip
    return model, found.losses


def measure(model: SequenceModel, make: Make, losses: Tensor) -> tuple[float, float, float, int]:
    """Return the last columns of a row, on sequences that training never drew."""
    found = training.evaluate(model, make(300, torch.Generator().manual_seed(10_000)))
    return found.accuracy, found.loss, float(losses.mean()), count_parameters(model)


# %%
# Changes against sums
# --------------------
# Where all are right in the end, the mean loss over the whole training says who was so first.


def mean_and_spread(values: list[float]) -> str:
    """Return the mean, and from where to where."""
    return f"{statistics.mean(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def show(rows: list[Row], value: str, columns: Iterable[tuple[str, int]]) -> None:
    """Print mean, least and most over the seeds: a line for each variant."""
    columns = list(columns)
    heads = [f"{task} {size}" if size else task for task, size in columns]
    print(f"{value:30}" + "".join(f"{head:>21}" for head in heads))
    for name in dict.fromkeys(row.variant for row in rows):
        line = f"{name:30}"
        for column in columns:
            own = [r for r in rows if (r.variant, r.task, r.size) == (name, *column)]
            line += f"{mean_and_spread([getattr(r, value) for r in own]):>21}"
        print(line)


def gains(rows: list[Row], variant: str, among: Iterable[str], value: str) -> list[float]:
    """Return a value less that of plain attention, mean over tasks: one for each seed."""
    table = {(r.variant, r.task, r.seed): getattr(r, value) for r in rows}
    among = list(among)
    return [
        statistics.mean(table[variant, t, s] - table["plain", t, s] for t in among)
        for s in sorted({r.seed for r in rows})
    ]


def guess(make: Make) -> float:
    """Return the accuracy of always giving the most frequent answer."""
    targets = make(300, torch.Generator().manual_seed(10_000)).targets
    return float(targets[targets != IGNORED].bincount().max()) / int((targets != IGNORED).sum())


def compare_tasks(quick: bool, seeds: int) -> list[Row]:
    """Train every layer on every task; print accuracies, and gains over plain."""
    steps, names = (45, ["plain", "keys, gamma -1"]) if quick else (300, list(LAYERS))
    kinds = {kind: list(some) for kind, some in KINDS.items()}
    if quick:
        kinds = {"changes": ["induction"], "sums": ["majority"]}
    chosen = {task: (CHANGES | SUMS)[task] for some in kinds.values() for task in some}
    rows = []
    for name in names:
        for task, make in chosen.items():
            for seed in range(seeds):
                model, losses = train(LAYERS[name], make, seed, steps, hidden=2 * WIDTH)
                found = measure(model, make, losses)
                rows.append(Row("tasks", task, name, None, 0, seed, *found))
    print(f"\nchanges and sums: {steps} steps of {BATCH}, {seeds} seeds, one layer with an MLP")
    for value in ("training", "accuracy"):
        show(rows, value, [(task, 0) for task in chosen])
    print(f"{'the most frequent answer':30}" + "".join(
        f"{guess(make):.3f} {'':13}".rjust(21) for make in chosen.values()))  # fmt: skip
    for value in ("accuracy", "training"):
        print(f"\n{f'{value}, less that of plain':30}" + "".join(f"{k:>25}" for k in kinds))
        for name in names[1:]:
            found = [gains(rows, name, some, value) for some in kinds.values()]
            print(f"{name:30}" + "".join(f"{signed(values):>25}" for values in found))
    return rows


def signed(values: list[float]) -> str:
    """Return mean and spread with signs."""
    return f"{statistics.mean(values):+.3f} ({min(values):+.3f} {max(values):+.3f})"


# %%
# The length of chains
# --------------------
# One training for each number of edges, and one for words of 10 to 30 tokens, tested at each
# length.

WORDS = (10, 15, 20, 25, 30)


def stress(quick: bool, seeds: int) -> list[Row]:
    """Train every stack on words and on chains; print losses of words, accuracies of chains."""
    steps, longer = (5, 5) if quick else (300, 700)
    hops, words = ((1, 2), (10, 30)) if quick else (range(1, EDGES + 1), WORDS)
    names = ["plain", "keys, gamma -1", "keys, learned"] if quick else list(STACKS)
    rows = []
    for name in names:
        layer, layers = STACKS[name]
        for seed in range(seeds):
            model, losses = train(
                LAYERS[layer], lambda b, g: repetition(b, g, words[0], words[-1]), seed, steps,
                layers,
            )  # fmt: skip
            for size in words:
                test = lambda b, g, n=size: repetition(b, g, n, n)  # noqa: E731
                found = measure(model, test, losses)
                rows.append(Row("chains", "word", name, None, size, seed, *found))
            for n in hops if name in CHAINED else ():
                make = lambda b, g, n=n: chains(b, g, n)  # noqa: E731
                model, losses = train(LAYERS[layer], make, seed, longer, layers)
                found = measure(model, make, losses)
                rows.append(Row("chains", "chain", name, None, n, seed, *found))
    print(f"\nwords of {words[0]} to {words[-1]} tokens, twice: {steps} steps of {BATCH}, "
          f"{seeds} seeds, no MLP")  # fmt: skip
    for value in ("accuracy", "loss"):
        show([r for r in rows if r.task == "word"], value, [("word", n) for n in words])
    for name in names[1:]:
        ends = [saving(rows, name, n) for n in (words[0], words[-1])]
        text = [f"{statistics.mean(e):.1%} ({min(e):.1%} to {max(e):.1%})" for e in ends]
        print(f"{name:30}loss below plain by {text[0]} at {words[0]}, {text[1]} at {words[-1]}")
    print(f"\nchains of {EDGES} edges, {CHAINS} at a time: {longer} steps; "
          f"one of those shown: {1 / (CHAINS * (EDGES + 1)):.3f}, of those that may be right: "
          + ", ".join(f"{1 / (CHAINS * (EDGES + 1 - n)):.3f}" for n in hops))  # fmt: skip
    show([r for r in rows if r.task == "chain"], "accuracy", [("chain", n) for n in hops])
    return rows


def saving(rows: list[Row], variant: str, size: int) -> list[float]:
    """Return the share of plain attention's loss on words that a variant saves, for each seed."""
    own, plain = (
        [r.loss for r in rows if (r.task, r.variant, r.size) == ("word", name, size)]
        for name in (variant, "plain")
    )
    return [1 - a / b for a, b in zip(own, plain, strict=True)]


# %%
# Is there a scaling law?
# -----------------------
# Recall of eight pairs. The best gamma is that of the least loss after few steps, or of the least
# mean loss over them, between the values tried by a parabola: where several gammas have solved the
# task, the first is left to chance and the second says which was faster. Through its logarithm at
# each depth and seed goes a straight line; the interval of its slope comes from drawing the seeds
# of each depth anew, with replacement. It is no wider than the seeds tell, and with three of them
# too narrow. A best gamma at an end of the sweep is counted: it may lie beyond.

GAMMAS = (0.25, 0.5, 1.0, 1.7, 3.0, 5.0, 8.0)


class Law(NamedTuple):
    """Best gammas ``(depths, seeds)``, and the law ``factor * depth ** exponent`` through them."""

    variant: str  # and of which loss
    depths: tuple[int, ...]
    best: Tensor
    factor: float
    exponent: float
    interval: tuple[float, float]  # of the exponent, 95 %
    determined: float  # R^2
    edges: int  # how many are the least or the largest gamma tried


def best_gamma(gammas: Iterable[float], losses: Iterable[float]) -> float:
    """Return where the parabola through the least loss and its neighbours is least, in logs."""
    x, y = ([math.log(v) for v in values] for values in (gammas, losses))
    i = min(range(len(y)), key=lambda i: y[i])
    if i in (0, len(y) - 1):
        return math.exp(x[i])
    a, b = x[i] - x[i - 1], x[i] - x[i + 1]
    top = a * a * (y[i] - y[i + 1]) - b * b * (y[i] - y[i - 1])
    bottom = a * (y[i] - y[i + 1]) - b * (y[i] - y[i - 1])
    return math.exp(x[i] - top / bottom / 2 if bottom else x[i])


def line(depths: Tensor, best: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return intercept, slope and R^2 of logs ``best (..., depths, seeds)`` on those of depths."""
    x, y = depths.double().log().unsqueeze(-1).expand_as(best), best.log()
    dx, dy = x - x.mean((-1, -2), True), y - y.mean((-1, -2), True)
    slope = (dx * dy).sum((-1, -2)) / dx.square().sum((-1, -2))
    rest = (dy - slope[..., None, None] * dx).square().sum((-1, -2))
    total = dy.square().sum((-1, -2)).clamp(min=1e-30)  # equal ones are on a line too
    return y.mean((-1, -2)) - slope * x.mean((-1, -2)), slope, 1 - rest / total


def fit_law(
    variant: str, depths: tuple[int, ...], best: Tensor, ends: tuple[float, float],
    draws: int = 2000,
) -> Law:  # fmt: skip
    """Fit the law to best gammas ``(depths, seeds)``, with a bootstrap over the seeds."""
    n = torch.tensor(depths)
    intercept, slope, determined = line(n, best)
    generator = torch.Generator().manual_seed(0)
    again = torch.randint(best.shape[1], (draws, *best.shape), generator=generator)
    slopes = line(n, best.expand(draws, -1, -1).gather(-1, again))[1]
    low, high = slopes.quantile(torch.tensor([0.025, 0.975], dtype=best.dtype)).tolist()
    at_edge = (best <= ends[0] * (1 + 1e-9)) | (best >= ends[1] * (1 - 1e-9))
    return Law(
        variant, depths, best, float(intercept.exp()), float(slope), (low, high),
        float(determined), int(at_edge.sum()),
    )  # fmt: skip


def sweep_depths(
    quick: bool, seeds: int, depths: tuple[int, ...], gammas: tuple[float, ...] = GAMMAS
) -> tuple[list[Row], list[Law]]:
    """Train stacks of each depth with each gamma; print losses and laws."""
    steps = 5 if quick else 120
    if quick:
        depths, gammas = (1, 2), (0.25, 1.0, 4.0)
    if len({*depths}) < 2 or min(depths) < 1:
        raise ValueError(f"depths are {depths}, expected at least two different ones")
    make = lambda b, g: Task(*recall(b, 8, g))  # noqa: E731
    rows, laws = [], []
    for variant, n, gamma, seed in product(("both", "keys"), depths, gammas, range(seeds)):
        layer = lambda g=gamma, v=variant: SWEEPS[v](g)  # noqa: E731
        model, losses = train(layer, make, seed, steps, n)
        found = measure(model, make, losses)
        rows.append(Row("depth", "recall", variant, gamma, n, seed, *found))
    print(f"\nbest gamma: recall of 8 pairs, {steps} steps of {BATCH}, {seeds} seeds, no MLP")
    for variant, value in product(("both", "keys"), ("loss", "training")):
        label = f"{variant}, {value}"
        print(f"\n{label + ', layers':24}" + "".join(f"{g:>8g}" for g in gammas) + "  best")
        best = []
        for n in depths:
            own = {(r.gamma, r.seed): r for r in rows if (r.variant, r.size) == (variant, n)}
            table = [[getattr(own[g, s], value) for g in gammas] for s in range(seeds)]
            best.append([best_gamma(gammas, line) for line in table])
            means = "".join(f"{statistics.mean(c):8.3f}" for c in zip(*table, strict=True))
            found = ", ".join(f"{g:.2f}" for g in best[-1])
            print(f"{n:<24}{means}  {found}; in the text {scaling_law(n):.2f}")
        points = torch.tensor(best, dtype=torch.float64)
        law = fit_law(label, depths, points, (min(gammas), max(gammas)))
        laws.append(law)
        low, high = law.interval
        print(
            f"{law.factor:.2f} N^{law.exponent:.2f}, exponent in ({low:.2f}, {high:.2f}), R^2 "
            f"{law.determined:.2f}; in the text 4.17 N^-0.74\n"
            f"{law.edges} of {points.numel()} best gammas are at an end of the sweep"
        )
    return rows, laws


# %%
# All of it
# ---------
# Bands in the pictures reach from the least to the most of the seeds.

PARTS = ("tasks", "chains", "depth")


class Result(NamedTuple):
    """A row for each model and test, the laws, the table and the pictures."""

    rows: list[Row]
    laws: list[Law]
    files: list[Path]


def curve(rows: list[Row], x: Callable[[Row], float], value: str) -> tuple[Tensor, ...]:
    """Return x, mean, least and most over the seeds."""
    at = sorted({x(r) for r in rows})
    cells = [[getattr(r, value) for r in rows if x(r) == point] for point in at]
    ends = [(point, statistics.mean(c), min(c), max(c)) for point, c in zip(at, cells, strict=True)]
    return torch.tensor(ends, dtype=torch.float64).unbind(-1)


def draw(rows: list[Row], laws: list[Law], output: Path) -> list[Path]:
    """Draw a picture of each part that has rows."""
    plotters = {}
    if own := [r for r in rows if r.part == "tasks"]:
        shift = {"plain": 0.0, "keys, gamma 1": 1.0, "keys, gamma -1": -1.0}
        own = [r for r in own if r.variant in shift]
        panels = [
            {
                task: curve(
                    [r for r in own if r.task == task], lambda r: shift[r.variant], "accuracy"
                )
                for task in kind
                if any(r.task == task for r in own)
            }
            for kind in KINDS.values()
        ]  # fmt: skip
        plotters["tasks"] = dx.plotting.lines(
            panels, axes=("gamma on keys", "accuracy"), titles=list(KINDS), dots=True
        )
    if own := [r for r in rows if r.part == "chains"]:
        panels = []
        for task, value in (("word", "loss"), ("chain", "accuracy")):
            those = [r for r in own if r.task == task]
            groups = {
                name: [r for r in those if r.variant == name]
                for name in dict.fromkeys(r.variant for r in those)
            }
            panels.append({n: curve(rows, lambda r: r.size, value) for n, rows in groups.items()})
        plotters["chains"] = dx.plotting.lines(
            panels, dots=True, titles=("a word twice", "some edges of a chain further on"),
            axes=(("tokens of the word", "loss, nats"), ("edges", "accuracy")),
        )  # fmt: skip
    if laws:
        n = torch.tensor(laws[0].depths, dtype=torch.float64)
        curves = {
            law.variant: (n, law.best.log().mean(1).exp(), law.best.amin(1), law.best.amax(1))
            for law in laws
        }
        text = torch.tensor([scaling_law(n) for n in laws[0].depths], dtype=torch.float64)
        plotters["depth"] = dx.plotting.lines(
            {**curves, "in the text": (n, text)}, axes=("layers", "best gamma"), log="xy",
            dots=True, titles="gamma of least loss, recall of 8 pairs",
        )  # fmt: skip
    return [
        dx.plotting.save(plotter, output / f"momentum_claims_{part}.png")
        for part, plotter in plotters.items()
    ]


def main(
    output: str | Path = "output", quick: bool = False, seeds: int = 3,
    parts: Iterable[str] = PARTS, depths: Iterable[int] = (1, 2, 3, 4),
) -> Result:  # fmt: skip
    """Run the parts, print their tables, write them as CSV and draw a picture of each."""
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    parts, depths, seeds = tuple(parts), tuple(depths), 1 if quick else seeds
    if {*parts} - {*PARTS} or seeds < 1:
        raise ValueError(f"parts {parts} and seeds {seeds}, expected some of {PARTS}, at least 1")
    rows: list[Row] = []
    laws: list[Law] = []
    for part in parts:
        begin = time.process_time()
        if part == "tasks":
            rows += compare_tasks(quick, seeds)
        elif part == "chains":
            rows += stress(quick, seeds)
        else:
            found, laws = sweep_depths(quick, seeds, depths)
            rows += found
        print(f"{time.process_time() - begin:.0f} CPU seconds", file=sys.stderr, flush=True)
    path = output / f"momentum_claims_{'_'.join(parts)}.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        writer.writerows(rows)
    return Result(rows, laws, [path, *draw(rows, laws, output)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Put three claims on momentum to the test.")
    parser.add_argument("--output", default="output", help="folder for table and pictures")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--part", dest="parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 3, 4])
    options = parser.parse_args()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # these tensors are small: more threads wait for each other
    main(**vars(options))
