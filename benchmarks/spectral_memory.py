"""Spectral attention as a stream: ``benchmarks/spectral_memory.py [--tokens N] [--modes K]``.

First a stream of ``--tokens`` (100,000 unless told; a million takes ten times as long) in both
modes, fed in pieces of 1,024: CPU microseconds a token in each quarter, the bytes of the state and
the peak memory of the process, which must not grow; ``--tokens 0`` leaves this out. Then the cost
of one token against K, fed one by one: perturbative mode, O(K²), and exact mode with a solve at
every token, O(K³). Slopes are of the logarithms, over the three largest K.
"""

import argparse
import math
import resource
import time

import timing

timing.one_thread()

import torch  # noqa: E402

from darboux.learners.spectral_attention import SpectralAttention  # noqa: E402
from darboux.manifolds import FlatTorus  # noqa: E402


def peak() -> float:
    """Return the peak memory of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def stream(mode: str, tokens: int, modes: int, width: int = 32, piece: int = 1024) -> None:
    torch.manual_seed(0)
    layer = SpectralAttention(width, modes, FlatTorus(2), mode=mode).eval()
    g = torch.Generator().manual_seed(1)
    state, rows, fed = None, [], 0
    marks = [min(piece, tokens), *[tokens * i // 4 for i in range(1, 5)]]
    start, since = time.process_time(), 0
    with torch.no_grad():
        for mark in marks:
            while fed < mark:
                n = min(piece, mark - fed)
                y, state = layer(torch.randn(1, n, width, generator=g), state)
                fed += n
                assert bool(y.isfinite().all())
            now = time.process_time()
            cost = 1e6 * (now - start) / max(fed - since, 1)
            start, since = now, fed
            assert state is not None
            size = sum(x.numel() * x.element_size() for x in state)
            solves = getattr(state, "solves", None)
            times = fed // layer.chunk if solves is None else int(solves.max())
            rows.append((fed, cost, size, peak(), times))
    print(f"\n{mode} mode, K = {modes}: a stream, float32, batch 1, width {width}")
    print(f"{'tokens':>10}{'CPU us each':>12}{'state, bytes':>14}{'peak, MB':>10}{'solves':>8}")
    for row in rows:
        print("{:>10,}{:>12.1f}{:>14,}{:>10.1f}{:>8,}".format(*row))


def against_modes(sides: tuple[int, ...], repeat: int) -> None:
    print("\ncost of one token, fed one by one (ms of CPU, median)")
    print(f"{'K':>6}{'perturbative':>14}{'exact':>10}")
    sizes, found = [side * side for side in sides], {"perturbative": [], "exact": []}
    for modes in sizes:
        calls = {}
        for mode in found:
            torch.manual_seed(0)
            # one solve a token in exact mode, none in perturbative mode
            layer = SpectralAttention(
                32, modes, FlatTorus(2), mode=mode, nodes=1, chunk=1, tolerance=1e9
            )
            x = torch.randn(1, 1, 32)
            with torch.no_grad():
                state = layer(torch.randn(1, 2, 32))[1]

            def step(layer=layer, x=x, state=state) -> object:
                with torch.no_grad():
                    return layer(x, state)

            calls[mode] = step
        for mode, taken in timing.time_together(calls, repeat).items():
            found[mode].append(taken.cpu)
        print(f"{modes:>6}{found['perturbative'][-1]:>14.2f}{found['exact'][-1]:>10.2f}")
    for mode, times in found.items():
        span = math.log(sizes[-1] / sizes[-3])
        print(f"slope of {mode:>12}: {math.log(times[-1] / times[-3]) / span:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--modes", type=int, default=49)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    for mode in ("perturbative", "exact") if options.tokens else ():
        stream(mode, options.tokens, options.modes)
    against_modes((5, 9, 13, 17, 21, 25, 29), options.repeat)


if __name__ == "__main__":
    main()
