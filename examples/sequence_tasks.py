"""
Sequence tasks: geometric layers beside honest baselines
========================================================

Counting, word problems of groups, recall, copying: tasks whose answers are known, and on which
layers differ. Each layer stands in the same two-block model, in recall in one of a single block
too; the MLPs are made as wide as it takes for all models of a depth to have equally many
parameters. What a layer must remember is its *state*: softmax attention's grows with the sequence,
the recurrent ones' does not. So the table shows parameters, bytes of state, the step at which the
training accuracy first stayed above 99 %, and the accuracy at the length of training and at longer
ones, read as a stream::

    python examples/sequence_tasks.py --task parity
    python examples/sequence_tasks.py --task a5 --layers gru "symplectic rotation" --seeds 3
    python examples/sequence_tasks.py --task mqar --seeds 3 --batch 32

Parity says nothing about learned geometry: ``cumulative phase``, a running sum with a cosine after
it, solves it. Non-abelian word problems are what neither it nor any diagonal recurrence can do.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from darboux.flows.kernel_sums import causal_linear_sum
from darboux.learners import baselines, tasks, training
from darboux.learners.attention import SoftmaxAttention, join_heads, split_heads
from darboux.learners.model import Block, SequenceModel, count_parameters, state_bytes
from darboux.learners.momentum_attention import (
    MomentumAttention,
    convolved_keys,
    filter_tokens,
    key_value_shift,
)
from darboux.learners.spectral_attention import SpectralAttention
from darboux.learners.sympformer import SympFormer
from darboux.learners.symplectic_attention import SymplecticAttention
from darboux.learners.tasks import Task

# %%
# The layers
# ----------
# A name and what makes the layers of a model from a width, a depth and the width inside the MLPs.
# A new layer is one line.

Make = Callable[[int, int, int], list[nn.Module]]
HEADS = 4


def blocks(mixer: Callable[[int], nn.Module]) -> Make:
    """Return what makes a stack of pre-norm blocks around a mixer."""
    return lambda width, depth, hidden: [
        Block(width, mixer(width), hidden=hidden) for _ in range(depth)
    ]


def gated(manifold: str, gate: str) -> Make:
    """Return what makes blocks of symplectic heads whose tokens choose what is kept."""
    return blocks(lambda w: SymplecticAttention(w, HEADS, manifold=manifold, gate=gate))


def sympformer(kind: str) -> Make:
    """Return what makes a stack of accelerated attention."""
    return lambda width, depth, hidden: [SympFormer(width, HEADS, depth, kind, hidden=hidden)]


class WideLinear(nn.Module):
    """Linear attention with any number of features a head, and keys that start as the queries.

    The control of spectral memory: as many features and the same start, no torus and no filter.
    """

    def __init__(self, width: int, heads: int, features: int):
        super().__init__()
        self.width, self.heads = width, heads
        self.queries = nn.Linear(width, heads * features, bias=False)
        self.keys = nn.Linear(width, heads * features, bias=False)
        self.values = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        with torch.no_grad():
            self.keys.weight.copy_(self.queries.weight)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return ``(batch, time, width)`` and the moments after it."""
        q, k, v = (split_heads(f(x), self.heads) for f in (self.queries, self.keys, self.values))
        q, k = nn.functional.elu(q) + 1, nn.functional.elu(k) + 1
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)  # the last column sums the weights
        y, state = causal_linear_sum(q, k, v, state, 64)
        return self.out(join_heads(y[..., :-1] / y[..., -1:].clamp_min(1e-19))), state


class Late(nn.Module):
    """A linear map whose numbers from ``start`` to ``stop`` come one token late."""

    def __init__(self, linear: nn.Linear, start: int, stop: int):
        super().__init__()
        self.linear, self.start, self.stop = linear, start, stop
        self.past: Tensor | None = None  # those of the last token; ``Delayed`` sets and takes it

    def forward(self, x: Tensor) -> Tensor:
        """Return the map of ``x``, in part that of the token before."""
        y = self.linear(x)
        taps = y.new_zeros(1), y.new_ones(1)
        late, self.past = filter_tokens(y[..., self.start : self.stop], taps, self.past)
        return torch.cat([y[..., : self.start], late, y[..., self.stop :]], -1)


class Delayed(nn.Module):
    """Spectral or linear attention that stores a token under the key of the one before it.

    Key and value of MQAR are two tokens, and one layer without this cannot tie them. It is
    ``MomentumAttention(gamma_k=-1)`` for mixers without softmax.
    """

    def __init__(self, mixer: SpectralAttention | WideLinear | baselines.LinearAttention):
        super().__init__()
        inner: Any = mixer  # one of whose linear maps is to be another module
        self.mixer, self.width = inner, mixer.width
        if isinstance(mixer, baselines.LinearAttention):
            self.late = inner.qkv = Late(mixer.qkv, mixer.width, 2 * mixer.width)
        else:
            self.late = inner.keys = Late(mixer.keys, 0, mixer.keys.out_features)

    def forward(
        self, x: Tensor, state: tuple[Tensor, Any] | None = None
    ) -> tuple[Tensor, tuple[Tensor | None, Any]]:
        """Return ``(batch, time, width)`` and the last key with the state of the mixer."""
        self.late.past, before = (None, None) if state is None else state
        y, after = self.mixer(x, before)
        past, self.late.past = self.late.past, None
        return y, (past, after)


def frozen(width: int, heads: int = HEADS, **options: Any) -> SpectralAttention:
    """Return a spectral memory of 27 modes on the flat torus, which no token deforms."""
    return SpectralAttention(width, 27, heads=heads, strength=0.0, **options)


BASELINES: dict[str, Make] = {
    "softmax, rotary": blocks(lambda w: SoftmaxAttention(w, HEADS)),
    "softmax, no positions": blocks(lambda w: SoftmaxAttention(w, HEADS, rotary=False)),
    "linear attention": blocks(lambda w: baselines.LinearAttention(w, HEADS)),
    "gru": blocks(baselines.GRU),
    "lstm": blocks(baselines.LSTM),
    "diagonal, [-1, 1]": blocks(baselines.DiagonalRecurrence),
    "diagonal, [0, 1]": blocks(lambda w: baselines.DiagonalRecurrence(w, negative=False)),
    "cumulative phase": blocks(baselines.CumulativePhase),
}
GEOMETRIC: dict[str, Make] = {
    "symplectic potential": blocks(lambda w: SymplecticAttention(w, HEADS)),
    "symplectic torus": blocks(lambda w: SymplecticAttention(w, HEADS, manifold="torus")),
    "symplectic metric": blocks(lambda w: SymplecticAttention(w, HEADS, manifold="metric")),
    **{
        f"gated {manifold}": gated(manifold, gate)
        for manifold, gate in (
            ("oscillator", "phase"),
            ("potential", "phase"),
            ("metric", "phase"),
            ("revolution", "momenta"),
            ("low_rank", "momenta"),
        )
    },
    "symplectic rotation": blocks(lambda w: SymplecticAttention(w, HEADS, manifold="rotation")),
    "spectral": blocks(lambda w: SpectralAttention(w, 27)),
    "spectral, frozen": blocks(frozen),
    "momentum": blocks(lambda w: MomentumAttention(w, HEADS, learned="k")),
    "momentum, delay": blocks(lambda w: MomentumAttention(w, HEADS, gamma_k=-1.0)),
    "sympformer Y": sympformer("Y"),
    "sympformer H0": sympformer("H0"),
    "sympformer H1": sympformer("H1"),
    "sympformer R2": sympformer("R2"),
}
CONTROLS: dict[str, Make] = {
    "kv shift": blocks(lambda w: key_value_shift(w, HEADS)),
    "short convolution": blocks(lambda w: convolved_keys(w, HEADS, taps=4)),
}
LAYERS = BASELINES | CONTROLS | GEOMETRIC
# For recall alone. One head of linear attention of width 32 has 1056 numbers of state, 27 modes
# 972. Chunks of 16: of a sequence within one chunk the deformed metric is that of the base.
RECALL: dict[str, Make] = {
    "linear, late keys": blocks(lambda w: Delayed(baselines.LinearAttention(w, 1))),
    "linear, 4 heads, late keys": blocks(lambda w: Delayed(baselines.LinearAttention(w, HEADS))),
    "wide linear, late keys": blocks(lambda w: Delayed(WideLinear(w, HEADS, 27))),
    "frozen, late keys": blocks(lambda w: Delayed(frozen(w))),
    "frozen, 1 head, late keys": blocks(lambda w: Delayed(frozen(w, 1))),
    "frozen, f = 1, late keys": blocks(lambda w: Delayed(frozen(w, filter=None))),
    "deformed, 1 head, late keys": blocks(lambda w: Delayed(SpectralAttention(w, 27, chunk=16))),
    "softmax, 1 head": blocks(lambda w: SoftmaxAttention(w, 1)),
    "linear, 1 head": blocks(lambda w: baselines.LinearAttention(w, 1)),
}


def build(
    name: str, vocabulary: int, classes: int, width: int, depth: int, hidden: int
) -> nn.Module:
    """Return a model of the layers called ``name``."""
    layers = (LAYERS | RECALL)[name](width, depth, hidden)
    return SequenceModel(vocabulary, width, layers, head=classes)


def matched(name: str, vocabulary: int, classes: int, width: int, depth: int) -> nn.Module:
    """Return the model with as many parameters as softmax attention with MLPs of ``4 width``.

    Parameters are linear in the width of the MLPs, so two models tell which it has to be.
    """

    def count(name: str, hidden: int) -> int:
        with torch.random.fork_rng():
            return count_parameters(build(name, vocabulary, classes, width, depth, hidden))

    target = count("softmax, rotary", 4 * width)
    one, two = count(name, 1), count(name, 2)
    hidden = max(1, 1 + round((target - one) / (two - one)))
    return build(name, vocabulary, classes, width, depth, hidden)


def warm_up() -> None:
    """Take one step of an optimiser: torch's first one imports a compiler, for seconds."""
    weight = nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    torch.optim.AdamW([weight]).step()


# %%
# The tasks
# ---------
# Tokens, classes, what makes a batch from a size, a length and a generator, the length of
# training, and the lengths of the test. Word problems are trained on all lengths up to theirs.


class Contender(NamedTuple):
    """A layer, how many of it, its learning rate and steps."""

    layer: str
    depth: int = 2
    lr: float = 3e-3
    steps: int = 1000


class Setting(NamedTuple):
    """One row of the table of tasks."""

    vocabulary: int
    classes: int
    make: Callable[[int, int, torch.Generator], Task]
    length: int
    tests: tuple[int, ...]
    shorter: tuple[int, ...] = ()  # lengths of training besides, any of them equally often
    contenders: tuple[Contender, ...] = ()  # who stands in the table unless asked otherwise


def _digits(batch: int, length: int, generator: torch.Generator) -> Task:
    data = tasks.digits("train" if batch < 360 else "test")
    rows = torch.randint(len(data.tokens), (batch,), generator=generator)
    return data if batch >= 360 else Task(data.tokens[rows], data.targets[rows])


def _counter(modulus: int) -> Setting:
    return Setting(
        2, modulus, lambda b, n, g: tasks.counter(b, n, modulus, generator=g), 20, (20, 100, 10_000)
    )


def _word(group: str) -> Setting:
    g = tasks.group(group)
    return Setting(
        len(g.generators), len(g.elements),
        lambda b, n, r: tasks.word_problem(b, n, group, generator=r), 40, (40, 100, 1000),
    )  # fmt: skip


# One layer: the best of 3e-3, 1e-2 and 3e-2 on seed 0; softmax in two: of the first two; others in
# two: 1e-2, untuned. Two plain layers without positions have nothing to find the token before with.
RECALLING = (
    Contender("linear, late keys", 1, 1e-2, 600),
    Contender("wide linear, late keys", 1, 1e-2, 600),
    Contender("frozen, late keys", 1, 3e-2, 600),
    Contender("gru", 1, 3e-2, 600),
    Contender("momentum, delay", 1, 1e-2, 600),
    Contender("linear, late keys", 2, 1e-2, 600),
    Contender("frozen, late keys", 2, 1e-2, 600),
    Contender("linear, 1 head", 2, 1e-2, 1200),
    Contender("spectral, frozen", 2, 1e-2, 1200),
    Contender("gru", 2, 1e-2, 1200),
    Contender("softmax, 1 head", 2, 3e-3, 1200),
)


def _recall(vocabulary: int) -> Setting:
    # as many pairs as fit, n / 4: the load of the memory is measured, not the reach
    return Setting(
        vocabulary, vocabulary,
        lambda b, n, g: tasks.mqar(b, n, n // 4, vocabulary=vocabulary, generator=g),
        64, (16, 32, 64, 128), (16, 32), RECALLING,
    )  # fmt: skip


TASKS: dict[str, Setting] = {
    "parity": _counter(2),
    "mod3": _counter(3),
    "mod5": _counter(5),
    "s3": _word("S3"),
    "a5": _word("A5"),
    "mqar": _recall(256),
    "induction": Setting(
        512, 512, lambda b, n, g: tasks.induction(b, n, vocabulary=512, generator=g), 64, (64, 256)
    ),
    "copy": Setting(10, 10, lambda b, n, g: tasks.copy(b, n // 2, generator=g), 32, (32, 128)),
    "needles": Setting(
        18, 16, lambda b, n, g: tasks.needles(b, n, generator=g), 64, (64, 256, 4000)
    ),
    "digits": Setting(17, 10, _digits, 64, (64,)),
}
CURRICULUM = ("s3", "a5")

# %%
# One run
# -------


class Row(NamedTuple):
    """One line of the table."""

    layer: str
    depth: int
    lr: float
    steps: int
    seed: int
    parameters: int
    state: tuple[int, ...]  # bytes for one sequence, after each length of the test
    solved: int | None  # the step from which fifty batches in a row had 99 %
    accuracy: tuple[float, ...]  # at each length of the test
    seconds: float


class Solved:
    """Cross-entropy that also watches the accuracy of each batch."""

    def __init__(self) -> None:
        self.accuracies: list[float] = []

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss, as :func:`darboux.learners.training.fit` has it."""
        asked = targets != tasks.IGNORED
        right = logits.detach().argmax(-1)[asked] == targets[asked]
        self.accuracies.append(float(right.float().mean()))
        return nn.functional.cross_entropy(logits[asked], targets[asked])

    def step(self, run: int = 50) -> int | None:
        """Return the first step of the first ``run`` with 99 % throughout."""
        good = 0
        for i, accuracy in enumerate(self.accuracies):
            good = good + 1 if accuracy >= 0.99 else 0
            if good == run:
                return i - run + 1
        return None


def run(
    name: str, task: str, seed: int, steps: int, width: int, depth: int, batch: int, lr: float,
    tests: tuple[int, ...],
) -> Row:  # fmt: skip
    """Train one layer on one task and measure it."""
    setting = TASKS[task]
    torch.manual_seed(seed)
    model = matched(name, setting.vocabulary, setting.classes, width, depth)

    def batches(step: int, generator: torch.Generator) -> Task:
        length = setting.length
        if task in CURRICULUM:  # longer ones as training goes on, then all lengths
            most = max(2, min(length, round(length * step / (0.7 * steps))))
            length = int(torch.randint(2, most + 1, (1,), generator=generator))
        if setting.shorter:
            choice = *setting.shorter, length
            length = choice[int(torch.randint(len(choice), (1,), generator=generator))]
        return setting.make(batch, length, generator)

    watch, begin = Solved(), time.perf_counter()
    training.fit(
        model, batches, steps=steps, lr=lr, schedule="one_cycle", loss=watch, seed=seed,
        progress=sys.stderr.isatty(),
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    accuracy, state = [], []
    for length in tests:
        count = 360 if task == "digits" else max(4, min(256, 40_000 // length))
        test = setting.make(count, length, torch.Generator().manual_seed(10_000 + seed))
        accuracy.append(training.evaluate(model, test, chunk=1024).accuracy)
        after = None
        with torch.no_grad():
            for part in test.tokens[:1].split(1024, 1):
                _, after = model(part, after)
        state.append(state_bytes(after))
    return Row(
        name, depth, lr, steps, seed, count_parameters(model), tuple(state), watch.step(),
        tuple(accuracy), seconds,
    )  # fmt: skip


# %%
# The table
# ---------


class Result(NamedTuple):
    """What this example found."""

    task: str
    rows: list[Row]
    files: list[Path]


def table(tests: tuple[int, ...], rows: list[Row]) -> str:
    """Return the rows as text, over seeds the median and the least accuracy."""
    lines = [
        f"{'':<28}{'layers':>6}{'rate':>7}{'steps':>7}{'parameters':>11}"
        f"{'state, bytes':>22}{'solved at':>11}"
        + "".join(f"{f'{n} tokens':>22}" for n in tests)
        + f"{'seconds':>9}"
    ]
    for key in dict.fromkeys(row[:4] for row in rows):
        own = [row for row in rows if row[:4] == key]
        solved = [row.solved for row in own if row.solved is not None]
        first, last = own[0].state[0], own[0].state[-1]
        when = f"{statistics.median(solved):.0f}" if len(solved) == len(own) else "-"
        if solved and len(solved) < len(own):
            when = f"{len(solved)}/{len(own)}"
        line = f"{key[0]:<28}{key[1]:>6}{key[2]:>7g}{key[3]:>7}{own[0].parameters:>11,}"
        line += f"{f'{first:,}' if first == last else f'{first:,} - {last:,}':>22}{when:>11}"
        for i in range(len(tests)):
            values = [100 * row.accuracy[i] for row in own]
            spread = f" (least {min(values):.1f})" if len(own) > 1 else ""
            line += f"{f'{statistics.median(values):.1f} %{spread}':>22}"
        lines.append(f"{line}{statistics.median(row.seconds for row in own):>9.1f}")
    return "\n".join(lines)


def main(
    output: str | Path = "output",
    quick: bool = False,
    task: str = "parity",
    layers: list[str] | None = None,
    seeds: int = 1,
    steps: int | None = None,
    width: int = 32,
    depth: int | None = None,
    batch: int = 64,
    lr: float | None = None,
) -> Result:
    """Train every layer on a task, print the table and write it as CSV."""
    setting = TASKS[task]
    tests = setting.tests[: 2 if quick else None]
    if quick:
        steps, width, batch, seeds = steps or 10, 16, 8, 1
    warm_up()
    rows = []
    chosen = setting.contenders
    if layers or not chosen:
        known = {c.layer: c for c in reversed(chosen) if depth in (None, c.depth)}
        chosen = tuple(known.get(name, Contender(name)) for name in layers or LAYERS)
    for one in chosen:
        name = one.layer
        for seed in range(seeds):
            row = run(
                name, task, seed, steps or one.steps, width, depth or one.depth, batch,
                lr or one.lr, tests,
            )  # fmt: skip
            print(f"{name}, seed {seed}: {row.seconds:.1f} s", file=sys.stderr, flush=True)
            rows.append(row)
    lengths = " or ".join(map(str, (*setting.shorter, setting.length)))
    print(f"{task}, trained on {lengths} tokens in batches of {batch}\n")
    print(table(tests, rows))
    path = Path(output) / f"sequence_tasks_{task}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["layer", "depth", "rate", "steps", "seed", "parameters", "solved", "seconds"]
            + [f"accuracy_{n}" for n in tests] + [f"state_{n}" for n in tests]
        )  # fmt: skip
        for row in rows:
            head = *row[:5], row.parameters, row.solved, row.seconds
            writer.writerow([*head, *row.accuracy, *row.state])
    return Result(task, rows, [path])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compare sequence layers on a task.")
    parser.add_argument("--output", default="output", help="folder for the table")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--task", choices=TASKS, default="parity")
    parser.add_argument("--layers", nargs="+", choices=LAYERS | RECALL, help="all unless given")
    for option, value in (("seeds", 1), ("width", 32), ("batch", 64)):
        parser.add_argument(f"--{option}", type=int, default=value)
    parser.add_argument("--steps", type=int, help="1000 unless given, in recall 600 or 1200")
    parser.add_argument("--depth", type=int, help="2 unless given, in recall 1 or 2")
    parser.add_argument("--lr", type=float, help="3e-3 unless given, in recall the best found")
    options = parser.parse_args()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # these tensors are small: more threads wait for each other
    main(**vars(options))
