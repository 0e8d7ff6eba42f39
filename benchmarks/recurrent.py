"""Tokens a second of recurrent layers, forward and with the gradient, against LSTM, GRU, attention.

Width 64, batch 8, one core. nn.LSTM is oneDNN's fused kernel on a CPU and the hard one to beat;
nn.GRU runs operator by operator. Contenders take turns, so that a noisy spell falls on all. Run::

    python benchmarks/recurrent.py [--lengths 1024 8192] [--only potential low_rank] [--memory]

Targets: potential, metric, revolution and low-rank heads at least 1.2 times nn.LSTM and 5 times
nn.GRU; the torus, the oscillator and their scans, in torch's own operations, at least 3 times
nn.LSTM. The rows "maps alone" are the two matrix products in and out of a layer by BLAS, on warm
buffers and with nothing between them. ``--memory``: the peak
of a training pass by ``recurrence.fold`` with the reversible engine, at most 1.5 times as high at
65,536 tokens as at 1,024.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import timing

timing.one_thread()

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from darboux.learners.attention import SoftmaxAttention  # noqa: E402
from darboux.learners.recurrence import fold  # noqa: E402
from darboux.learners.symplectic_attention import SymplecticAttention  # noqa: E402

WIDTH, HEADS, BATCH = 64, 4, 8
LSTM, GRU = "nn.LSTM", "nn.GRU"
# name: what is built, times nn.LSTM, times nn.GRU
TARGETS = {
    "potential": (1.2, 5.0),
    "metric": (1.2, 5.0),
    "revolution": (1.2, 5.0),
    "low_rank": (1.2, 5.0),
    "torus": (3.0, None),
    "torus, scan": (3.0, None),
    "oscillator": (3.0, None),
    "oscillator, scan": (3.0, None),
}
# coordinates and features of a layer whose maps are timed alone
MAPS = {"torus": (32, 128), "oscillator": (64, 128)}


class Maps(nn.Module):
    """The linear maps of a layer, and their gradients, without the layer."""

    def __init__(self, tokens: int, coordinates: int, features: int):
        super().__init__()
        self.drive = nn.Linear(WIDTH, coordinates, bias=False)
        self.out = nn.Linear(features, WIDTH)
        shapes = (tokens, coordinates), (tokens, features), (tokens, WIDTH)
        self.f, self.rows, self.y = (torch.ones(shape) for shape in shapes)
        self.x = torch.ones(tokens, WIDTH)
        self.slopes = [torch.empty_like(p) for p in (self.drive.weight, self.out.weight)]

    def forward(self, x: Tensor) -> Tensor:
        """Write to buffers; return the last."""
        torch.mm(x.flatten(0, 1), self.drive.weight.mT, out=self.f)
        return torch.mm(self.rows, self.out.weight.mT, out=self.y)

    def both(self, x: Tensor) -> None:
        """Make all six products of a pass with gradients."""
        y = self(x)
        torch.mm(y, self.out.weight, out=self.rows)
        torch.mm(y.mT, self.rows, out=self.slopes[1])
        torch.mm(self.f, self.drive.weight, out=self.x)
        torch.mm(self.f.mT, self.x, out=self.slopes[0])


def contenders(length: int) -> dict[str, nn.Module]:
    """Return the layers by name."""
    layers: dict[str, nn.Module] = {
        LSTM: nn.LSTM(WIDTH, WIDTH, batch_first=True),
        GRU: nn.GRU(WIDTH, WIDTH, batch_first=True),
        "softmax attention": SoftmaxAttention(WIDTH, HEADS),
    }
    for name in TARGETS:
        manifold, _, engine = name.partition(", ")
        layers[name] = SymplecticAttention(
            WIDTH,
            HEADS,
            manifold=manifold,
            size=4 if manifold == "low_rank" else 8,
            engine=engine or "auto",
        )
    # as many numbers of state as nn.GRU has
    layers["oscillator, dim 8"] = SymplecticAttention(WIDTH, HEADS, manifold="oscillator", dim=8)
    for manifold in ("oscillator", "potential"):
        layers[f"{manifold}, gated"] = SymplecticAttention(
            WIDTH, HEADS, manifold=manifold, size=8, gate="phase"
        )
    for name, sizes in MAPS.items():
        layers[f"{name}, maps alone"] = Maps(BATCH * length, *sizes)
    return layers


def numbers(layer: nn.Module) -> list[object]:
    """Return how many parameters a layer has, and how many numbers its state."""
    state: object = "-"
    if isinstance(layer, SymplecticAttention):
        state = 2 * layer.heads * layer.dim
    elif isinstance(layer, nn.LSTM | nn.GRU):
        state = WIDTH * (2 if isinstance(layer, nn.LSTM) else 1)
    elif isinstance(layer, SoftmaxAttention):
        state = f"{2 * WIDTH} a token"
    return [sum(p.numel() for p in layer.parameters()), state]


def forward(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    """Return a forward pass without a graph."""

    def call() -> None:
        with torch.no_grad():
            layer(x)

    return call


def both(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    """Return a forward and a backward pass."""
    if isinstance(layer, Maps):
        return lambda: torch.no_grad()(layer.both)(x)

    def call() -> None:
        layer.zero_grad()
        layer(x)[0].sum().backward()

    return call


def speed(lengths: list[int], only: list[str], repeat: int) -> bool:
    """Print a table for each length; say whether the targets were met."""
    torch.manual_seed(0)
    good = True
    for length in lengths:
        layers = contenders(length)
        layers = {n: m for n, m in layers.items() if not only or n in (LSTM, GRU, *only)}
        x = torch.randn(BATCH, length, WIDTH)
        rates: dict[str, dict[str, float]] = {}
        for what, make in (("forward", forward), ("forward+backward", both)):
            times = timing.time_together({n: make(m, x) for n, m in layers.items()}, repeat)
            rates[what] = {n: BATCH * length / (t.cpu / 1e3) for n, t in times.items()}
        rows = []
        for name in layers:
            row: list[object] = [name, *numbers(layers[name])]
            met = True
            for rate in rates.values():
                times_lstm, times_gru = rate[name] / rate[LSTM], rate[name] / rate[GRU]
                row += [rate[name] / 1e3, times_lstm, times_gru]
                least, least_gru = TARGETS.get(name, (0.0, None))
                met &= times_lstm >= least and times_gru >= (least_gru or 0.0)
            target = TARGETS.get(name)
            row.append("" if target is None else "met" if met else "missed")
            good &= met
            rows.append(row)
        print(f"\nlength {length}, batch {BATCH}, width {WIDTH}: thousands of tokens a second")
        head = [
            "layer",
            "parameters",
            "state",
            "forward",
            "/LSTM",
            "/GRU",
            "fwd+bwd",
            "/LSTM",
            "/GRU",
            "target",
        ]
        print(timing.table(head, rows))
    return good


def peak(length: int, piece: int = 512) -> int:
    """Return the bytes allocated at the peak of a training pass, above what was held before."""
    torch.manual_seed(0)
    layer = SymplecticAttention(WIDTH, HEADS, manifold="potential", size=8, engine="reversible")

    class Pieces(list):
        """Tokens that are made when asked for."""

        def __len__(self) -> int:
            return length // piece

        def __getitem__(self, n: int) -> Tensor:  # type: ignore[override]
            return torch.randn(1, piece, WIDTH, generator=torch.Generator().manual_seed(n))

    def step(x: Tensor, state: object) -> tuple[Tensor, object]:
        y, state = layer(x, state)
        return y.square().mean(), state

    def go() -> None:
        layer.zero_grad()
        fold(step, Pieces(), None)

    go()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        go()
    profiler: Any = profile.profiler
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def memory() -> bool:
    """Print the peak of training passes; say whether the target was met."""
    short = peak(1024)
    ratio = 1.0
    for length in (1024, 8192, 65_536):
        most = peak(length)
        ratio = most / short
        print(f"length {length}: peak {most / 2**20:.2f} MiB, {ratio:.3f} x length 1024")
    print(f"target at most 1.5: {'met' if ratio <= 1.5 else 'missed'}")
    return ratio <= 1.5


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 8192])
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--memory", action="store_true")
    arguments = parser.parse_args()
    good = speed(arguments.lengths, arguments.only, arguments.repeat)
    if arguments.memory:
        good &= memory()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
