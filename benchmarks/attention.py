"""Whole models with momentum in their attention, against the same model with plain softmax.

Byte-level models of width 256 with four heads: one step of training, forward and backward, in
float32. ``plain`` has blocks of softmax attention and an MLP; ``momentum`` shears its queries and
keys; ``Y``, ``H0``, ``H1`` and ``R2`` are accelerated stacks with the same linear maps, and
``R2 row`` is R2 with ``causality="row_hamiltonian"``. All go through
``scaled_dot_product_attention``, and none holds a matrix of scores. Run::

    python benchmarks/attention.py            # --quick for a look, L = 256

Time is process CPU time on one core, medians, taken in turn. Memory is the peak of what torch's
CPU allocator handed out during one step, above what was held before it. The matrix of pairs of
one head at L = 4096 would be 67 MB.

The connection of R2 needs four averages where attention needs one: with the scores, 5 products of
the width of a head for each pair of tokens instead of 2, and 8 in a kernel whose queries must be
as wide as its values. Where attention is most of the time, 2.5 times plain is the floor. A row
among fixed keys needs two averages, in one pass.
"""

import argparse
import sys
from collections.abc import Callable

import timing

timing.one_thread()

import torch  # noqa: E402
from acceleration import peak_bytes  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402

from darboux.learners.attention import SoftmaxAttention  # noqa: E402
from darboux.learners.model import Block, SequenceModel  # noqa: E402
from darboux.learners.momentum_attention import MomentumAttention  # noqa: E402
from darboux.learners.sympformer import SympFormer  # noqa: E402

WIDTH, HEADS, LAYERS, VOCABULARY = 256, 4, 2, 256
TIMES = {"momentum": 1.15, "Y": 1.2, "H0": 1.2, "H1": None, "R2": 2.0, "R2 row": 2.0}
MEMORY = {"momentum": 1.1}


def models() -> dict[str, nn.Module]:
    """Return the contenders, the plain one first."""

    def blocks(make: Callable[[], nn.Module]) -> nn.Module:
        layers = [Block(WIDTH, make()) for _ in range(LAYERS)]
        return SequenceModel(VOCABULARY, WIDTH, layers)

    torch.manual_seed(0)
    made = {
        "plain": blocks(lambda: SoftmaxAttention(WIDTH, HEADS)),
        "momentum": blocks(lambda: MomentumAttention(WIDTH, HEADS, 1.0, 1.0)),
    }
    for name in ("Y", "H0", "H1", "R2", "R2 row"):
        causality = "row_hamiltonian" if name.endswith("row") else "row_local"
        stack = SympFormer(
            WIDTH, HEADS, LAYERS, name[:2].strip(), causality=causality, initial_velocity="learned"
        )
        made[name] = SequenceModel(VOCABULARY, WIDTH, [stack])
    return made


def training(model: nn.Module, tokens: Tensor) -> Callable[[], None]:
    """Return one step of training, without the optimiser."""

    def run() -> None:
        model.zero_grad()
        logits, _ = model(tokens[:, :-1])
        cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()

    return run


def main() -> int:
    """Print the table; the exit status says whether all targets were met."""
    parser = argparse.ArgumentParser(description="momentum in attention against plain softmax")
    parser.add_argument("--repeat", type=int, default=5, help="samples per contender")
    parser.add_argument("--quick", action="store_true", help="L = 256 only")
    options = parser.parse_args()
    met = True
    for length in (256,) if options.quick else (1024, 4096):
        tokens = torch.randint(VOCABULARY, (1, length + 1))
        made = models()
        both = {name: training(model, tokens) for name, model in made.items()}
        times = timing.time_together(both, options.repeat)
        peaks = {name: peak_bytes(f) / 1e6 for name, f in both.items()}
        rows = []
        for name, model in made.items():
            slower = times[name].cpu / times["plain"].cpu
            larger = peaks[name] / peaks["plain"]
            limit, room = TIMES.get(name), MEMORY.get(name)
            fine = (limit is None or slower <= limit) and (room is None or larger <= room)
            met = met and fine
            target = f"<= {limit:g}" if limit else "-"
            target += f", memory <= {room:g}" if room else ""
            count = sum(p.numel() for p in model.parameters()) / 1e6
            row = (name, count, times[name].cpu, slower, peaks[name], larger, target)
            rows.append((*row, "yes" if fine else "NO"))
        print(f"one step, {LAYERS} layers of width {WIDTH}, {HEADS} heads, L = {length}, float32")
        header = ("model", "M parameters", "ms", "times plain", "peak MB", "times plain")
        print(timing.table((*header, "target", "met"), rows), flush=True)
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
