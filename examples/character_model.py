"""
A character model of real text
==============================

Bits per character on the King James Bible, for every layer and baseline in the same model: equally
many parameters, the same batches and the same number of them. Their time is not the same, and
stands beside the bits, as the seconds of a processor in training. With ``--equal time`` each gets
as many steps as fit into the time that softmax attention takes::

    python examples/character_model.py --seeds 3
    python examples/character_model.py --seeds 3 --equal time
    python examples/character_model.py --text my.txt --layers gru momentum

The text is cut by position: the last tenth is for validation. Two figures are given on it: each
window by itself, as in training, and one long stream, in which a layer may remember more than it
was ever trained to, or lose its way.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from sequence_tasks import LAYERS, matched, warm_up
from torch import Tensor, nn

from darboux import ConvergenceError
from darboux.learners import tasks, training
from darboux.learners.model import count_parameters, generate
from darboux.learners.tasks import Task

# %%
# What is measured
# ----------------


class Row(NamedTuple):
    """One training."""

    layer: str
    seed: int
    parameters: int
    train: float  # bits per character over the last tenth of training
    windows: float  # on the validation text, each window by itself
    stream: float  # on the validation text, as one stream
    seconds: float  # of the processor, in training
    steps: int
    tokens: int


def entropy(train: Tensor, valid: Tensor) -> float:
    """Return the bits per character of frequencies alone: what to stay below."""
    count = torch.bincount(train, minlength=int(max(train.max(), valid.max())) + 1) + 1.0
    return float(-(count / count.sum()).log2()[valid].mean())


def consecutive(ids: Tensor, batch: int, length: int) -> Task:
    """Return the first ``batch`` windows of a text, one after the other."""
    batch = min(batch, (len(ids) - 1) // length)
    cut = ids[: batch * length + 1]
    return Task(cut[:-1].view(batch, length), cut[1:].view(batch, length))


def run(
    name: str, corpus: tasks.Corpus, seed: int, steps: int, width: int, depth: int, batch: int,
    length: int, windows: int,
) -> tuple[Row, nn.Module]:  # fmt: skip
    """Train one layer and measure it."""
    torch.manual_seed(seed)
    vocabulary = len(corpus.characters)
    model = matched(name, vocabulary, vocabulary, width, depth)
    begin = time.process_time()
    fitted = training.fit(
        model, lambda step, g: tasks.windows(corpus.train, batch, length, generator=g),
        steps=steps, lr=3e-3, warmup=steps // 20, seed=seed, progress=sys.stderr.isatty(),
    )  # fmt: skip
    seconds = time.process_time() - begin
    apart = training.evaluate(model, consecutive(corpus.valid, windows, length))
    # the same text in eight long pieces
    along = training.evaluate(
        model, consecutive(corpus.valid, 8, windows * length // 8), chunk=length
    )
    last = float(fitted.losses[-max(1, steps // 10) :].mean()) / 0.6931471805599453
    return Row(
        name, seed, count_parameters(model), last, apart.bits, along.bits, seconds,
        steps, steps * batch * length,
    ), model  # fmt: skip


def cost(name: str, corpus: tasks.Corpus, width: int, depth: int, batch: int, length: int) -> float:
    """Return the processor seconds of one step: the median of eight, after two."""
    vocabulary = len(corpus.characters)
    model = matched(name, vocabulary, vocabulary, width, depth)
    marks = []

    def batches(step: int, generator: torch.Generator) -> Task:
        marks.append(time.process_time())
        return tasks.windows(corpus.train, batch, length, generator=generator)

    training.fit(model, batches, steps=11, lr=0.0)
    return statistics.median(b - a for a, b in itertools.pairwise(marks[2:]))


# %%
# The table
# ---------


class Result(NamedTuple):
    """What this example found."""

    rows: list[Row]
    entropy: float  # of the frequencies of characters
    files: list[Path]


def spread(values: list[float]) -> str:
    """Return the mean and, of several, the standard deviation."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def main(
    output: str | Path = "output",
    quick: bool = False,
    text: str = "kjv",
    layers: list[str] | None = None,
    seeds: int = 1,
    steps: int = 1000,
    width: int = 64,
    depth: int = 2,
    batch: int = 32,
    length: int = 128,
    equal: str = "steps",
) -> Result:
    """Train every layer on a text, print the table and a sample, and write the table as CSV."""
    if equal not in ("steps", "time"):
        raise ValueError(f"equal is {equal!r}, expected 'steps' or 'time'")
    windows = 256
    if quick:
        seeds, steps, width, batch, length, windows = 1, 5, 16, 4, 32, 16
    corpus = tasks.text_corpus(text)
    floor = entropy(corpus.train, corpus.valid)
    size = len(corpus.train) + len(corpus.valid)
    print(f"{text}: {size:,} characters, {len(corpus.characters)} different; their frequencies "
          f"alone give {floor:.3f} bits\n{steps} steps of {batch} x {length}"
          f"{', or as many as take that time' if equal == 'time' else ''}, width {width}, "
          f"{depth} layers, {torch.get_num_threads()} thread(s)\n")  # fmt: skip
    print(f"{'':<24}{'parameters':>11}{'steps':>7}{'train':>16}{'windows':>16}{'stream':>16}"
          f"{'seconds':>9}")  # fmt: skip
    warm_up()
    size = width, depth, batch, length
    basis = cost("softmax, rotary", corpus, *size) if equal == "time" else 0.0
    rows, best = [], None
    for name in layers or LAYERS:
        own, count = [], steps
        for seed in range(seeds):
            try:
                if basis and seed == 0 and name != "softmax, rotary":
                    count = max(1, round(steps * basis / cost(name, corpus, *size)))
                row, model = run(name, corpus, seed, count, *size, windows)
            except ConvergenceError as error:  # what forgets nothing may not learn at all
                print(f"{name:<24} seed {seed}: {error}", flush=True)
                continue
            own.append(row)
            if best is None or row.windows < best[0].windows:
                best = row, model
        rows += own
        if not own:
            continue
        bits = "".join(
            f"{spread([getattr(row, part) for row in own]):>16}"
            for part in ("train", "windows", "stream")
        )
        seconds = statistics.median(row.seconds for row in own)
        print(f"{name:<24}{own[0].parameters:>11,}{count:>7}{bits}{seconds:>9.1f}", flush=True)
    if best is None:
        raise SystemExit("no layer was trained to the end")
    prompt = corpus.encode(corpus.decode(corpus.valid[:40]))
    sample = generate(
        best[1], prompt, 200, temperature=0.8, generator=torch.Generator().manual_seed(0)
    )
    print(f"\n{best[0].layer} goes on from {corpus.decode(prompt[0])!r}:")
    print(corpus.decode(sample.tokens[0]))

    path = Path(output) / f"character_model_{equal}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([Row._fields, *rows])
    return Result(rows, floor, [path])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compare sequence layers on a text.")
    parser.add_argument("--output", default="output", help="folder for the table")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--text", default="kjv", help="kjv, python, or the path of a text file")
    parser.add_argument("--equal", default="steps", choices=("steps", "time"), help="what is")
    parser.add_argument("--layers", nargs="+", choices=LAYERS, help="all unless given")
    sizes = {"seeds": 1, "steps": 1000, "width": 64, "depth": 2, "batch": 32, "length": 128}
    for option, value in sizes.items():
        parser.add_argument(f"--{option}", type=int, default=value)
    options = parser.parse_args()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # these tensors are small: more threads wait for each other
    main(**vars(options))
