"""Gamma(v, v) without Gamma: time and memory of the acceleration against forming the symbols.

A neural metric ``g = A A^T + I``, ``A`` the output of a network of width 64, batch 100. The
acceleration needs one jvp and one vjp of the metric and memory O(batch d^2); the Christoffel
symbols alone have batch d^3 entries. Run::

    python benchmarks/acceleration.py

Time is process CPU time on one core, medians, taken in turn. Memory is the peak of the bytes
that torch's CPU allocator handed out during one call, above what was held before it: the
running sum of the allocation and release events that ``torch.profiler`` records, temporaries
inside operators included.
"""

import argparse
import math
import sys
from collections.abc import Callable
from typing import Any

import timing

timing.one_thread()

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import darboux as dx  # noqa: E402

BATCH = 100
DIMS = (16, 32, 64)
WIDTH = 64
TARGET = 5.0  # times faster, at the largest dimension


class NeuralMetric(dx.Chart):
    """A metric ``A(x) A(x)^T + I`` with ``A`` the output of a small network."""

    def __init__(self, dim: int, width: int = WIDTH) -> None:
        super().__init__(dim=dim)
        self.net = nn.Sequential(nn.Linear(dim, width), nn.Tanh(), nn.Linear(width, dim * dim))

    def metric(self, x: Tensor) -> Tensor:
        """Return the metric ``(..., d, d)`` at ``x (..., d)``."""
        a = self.net(x).unflatten(-1, (self.dim, self.dim))
        return a @ a.mT + torch.eye(self.dim, dtype=x.dtype, device=x.device)


def peak_bytes(f: Callable[[], object]) -> int:
    """Return the peak of the memory allocated during a call, above what was held before it."""
    f()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        f()
    profiler: Any = profile.profiler
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def contenders(dim: int) -> dict[str, Callable[[], Tensor]]:
    """Return both ways to -Gamma(v, v) at one random batch."""
    torch.manual_seed(0)
    space = NeuralMetric(dim).double().requires_grad_(False)
    x, v = torch.randn(2, BATCH, dim, dtype=torch.float64)

    def formed() -> Tensor:
        return -torch.einsum("...kij,...i,...j->...k", space.christoffel(x), v, v)

    return {"acceleration": lambda: space.acceleration(x, v), "christoffel": formed}


def main() -> int:
    """Print the table; the exit status says whether the target was met."""
    parser = argparse.ArgumentParser(description="-Gamma(v, v) against forming Gamma")
    parser.add_argument("--repeat", type=int, default=5, help="samples per contender")
    options = parser.parse_args()
    probe = peak_bytes(lambda: torch.zeros(1000, 1000, dtype=torch.float64))
    if not 8_000_000 <= probe < 8_100_000:
        raise RuntimeError(f"the memory probe saw {probe} bytes of a tensor of 8,000,000")
    rows, peaks, ratio = [], [], 0.0
    for dim in DIMS:
        both = contenders(dim)
        a, c = (f() for f in both.values())
        error = float((a - c).abs().max() / c.abs().max())
        times = timing.time_together(both, options.repeat)
        peaks.append([peak_bytes(f) / 1e6 for f in both.values()])
        fast, slow = (times[name].cpu for name in both)
        ratio = slow / fast
        rows.append((dim, fast, slow, ratio, *peaks[-1], peaks[-1][1] / peaks[-1][0], error))
    print(f"-Gamma(v, v) of a neural metric of width {WIDTH}, batch {BATCH}, float64")
    header = ("d", "acceleration ms", "by Gamma ms", "times faster")
    header += ("peak MB", "by Gamma MB", "times less", "difference")
    print(timing.table(header, rows))
    growth = [math.log2(late / early) for early, late in zip(*peaks[-2:], strict=True)]
    print(
        f"\nmemory grows as d^{growth[0]:.2f} and d^{growth[1]:.2f} from d={DIMS[-2]} to "
        f"{DIMS[-1]}; one (batch, d, d) tensor is {8e-6 * BATCH * DIMS[-1] ** 2:.1f} MB at "
        f"d={DIMS[-1]}"
    )
    met = "yes" if ratio >= TARGET else "NO"
    print(f"target >= {TARGET:g} times faster at d={DIMS[-1]}: {met}")
    return int(ratio < TARGET)


if __name__ == "__main__":
    sys.exit(main())
