"""Timing for shared machines: one core, medians, process CPU time, contenders interleaved.

Call :func:`one_thread` before torch or jax is imported: both read their thread settings once.
"""

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

XLA_ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
SHORTEST_SAMPLE = 5.0  # ms: shorter calls are repeated within one sample


class Timing(NamedTuple):
    """Milliseconds of one call: process CPU and wall time, over ``repeat`` samples."""

    cpu: float
    cpu_min: float
    wall: float
    wall_min: float
    repeat: int


def one_thread() -> None:
    """Pin this process to one core and tell torch, BLAS and XLA to use one thread."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = "1"
    flags = os.environ.get("XLA_FLAGS", "")
    if XLA_ONE_THREAD not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {XLA_ONE_THREAD}".strip()
    import torch

    torch.set_num_threads(1)


def time_it(f: Callable[[], object], repeat: int = 7, warm: bool = True) -> Timing:
    """Time one function after a warm-up. With ``warm=False``, time its first call too."""
    return time_together({"": f}, repeat, warm)[""]


def time_together(
    functions: Mapping[str, Callable[[], object]], repeat: int = 7, warm: bool = True
) -> dict[str, Timing]:
    """Time functions in turn, A B A B ..., so that a noisy spell falls on all of them alike."""
    number = dict.fromkeys(functions, 1)
    if warm:
        for name, f in functions.items():
            f()
            f()
            number[name] = max(1, round(SHORTEST_SAMPLE / max(_sample(f, 1)[1], 1e-3)))
    gc.collect()
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for _ in range(repeat):
        for name, f in functions.items():
            samples[name].append(_sample(f, number[name]))
    return {name: _summary(taken) for name, taken in samples.items()}


def _sample(f: Callable[[], object], number: int) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(number):
        f()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return 1e3 * cpu / number, 1e3 * wall / number


def _summary(samples: Sequence[tuple[float, float]]) -> Timing:
    cpu, wall = zip(*samples, strict=True)
    median = statistics.median
    return Timing(median(cpu), min(cpu), median(wall), min(wall), len(samples))


def number(value: float) -> str:
    """Write a figure with three significant digits, and no exponent where it is readable."""
    if value != value:
        return "-"
    if value == 0 or not 1e-3 <= abs(value) < 1e6:
        return f"{value:.1e}"
    digits = 2
    while digits > 0 and abs(value) >= 10 ** (3 - digits):
        digits -= 1
    while abs(value) < 10 ** (2 - digits):
        digits += 1
    return f"{value:,.{digits}f}"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Align a table: text to the left, figures (formatted here) to the right."""
    cells = [[number(c) if isinstance(c, float) else str(c) for c in row] for row in rows]
    right = [
        bool(rows) and all(isinstance(row[i], (int, float)) for row in rows)
        for i in range(len(header))
    ]
    width = [max(len(line[i]) for line in [list(header), *cells]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        pad = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, width, right, strict=True))
        return "  ".join(pad).rstrip()

    return "\n".join([line(header), "  ".join("-" * w for w in width), *map(line, cells)])
