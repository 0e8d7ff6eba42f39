"""The gradient of a long run: time and memory of recording, checkpoints and retracing.

Leapfrog on the Kepler problem with a closed-form force; the gradient of ``sum q_N^2`` with
respect to the initial states and the strength ``mu``. Run::

    python benchmarks/gradient_memory.py            # some three minutes
    python benchmarks/gradient_memory.py --long 0   # without the run of 100,000 steps

Time is process CPU time on one core, medians, taken in turn, after a warm-up. Memory is the peak
of the bytes that torch's CPU allocator handed out during one call, above what was held before it
(``acceleration.peak_bytes``); for the long run, whose events would not fit, it is the growth of
the peak of resident memory, in a process of its own. "torch loop" is what one would write by hand.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable

import timing

timing.one_thread()

import torch  # noqa: E402
from acceleration import peak_bytes  # noqa: E402
from torch import Tensor  # noqa: E402

from darboux.integrators import Separable, integrate  # noqa: E402

SIZES = ((1000, 1000), (10_000, 300))  # batch, steps
DT = 0.01
SLOWER = 2.0  # at most so many times the time of the torch loop
SMALLER = 20.0  # at least so many times less memory
GROWTH = 1.5  # at most so many times the memory of 100 steps

Gradient = Callable[[], tuple[Tensor, ...]]


def force_of(mu: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the Kepler force of strength ``mu``."""
    return lambda q: q * (-mu * q.square().sum(-1, keepdim=True) ** -1.5)


def contenders(batch: int, steps: int) -> dict[str, Gradient]:
    """Return the ways to the gradient, by name."""
    g = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn(2, batch, 2, generator=g, dtype=torch.float64)
    q = (noise[0] + torch.tensor([1.0, 0.0])).requires_grad_()
    p = (noise[1] + torch.tensor([0.0, 1.0])).requires_grad_()
    mu = torch.tensor(1.1, dtype=torch.float64, requires_grad=True)
    force = force_of(mu)
    system = Separable(force=force)

    def loop() -> Tensor:
        x, v, f = q, p, force(q)
        for _ in range(steps):
            v = torch.add(v, f, alpha=DT / 2)
            x = torch.add(x, v, alpha=DT)
            f = force(x)
            v = torch.add(v, f, alpha=DT / 2)
        return x

    def ours(**options) -> Gradient:
        def gradient() -> tuple[Tensor, ...]:
            run = integrate(system, q, p, dt=DT, steps=steps, save_every=steps, **options)
            return torch.autograd.grad(run.q[-1].square().sum(), (q, p, mu))

        return gradient

    return {
        "torch loop": lambda: torch.autograd.grad(loop().square().sum(), (q, p, mu)),
        "autograd": ours(),
        "checkpoint": ours(adjoint="checkpoint"),
        "reversible": ours(adjoint="reversible"),
        "lattice": ours(adjoint="reversible", lattice=True),
    }


def resident_growth(batch: int, steps: int) -> float:
    """Return by how many MB the peak of resident memory grows in one gradient (Linux)."""
    code = (
        "import gradient_memory as g\n"
        f"warm, run = (g.contenders({batch}, n)['reversible'] for n in (100, {steps}))\n"
        "warm()\n"
        "open('/proc/self/clear_refs', 'w').write('5')\n"
        "read = lambda key: next(int(x.split()[1]) for x in open('/proc/self/status')"
        " if x.startswith(key))\n"
        "before = read('VmRSS')\n"
        "run()\n"
        "print((read('VmHWM') - before) / 1e3)\n"
    )
    path = os.pathsep.join([os.path.dirname(os.path.abspath(__file__)), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(done.stdout)


def main() -> int:
    """Print the tables; the exit status says whether the targets were met."""
    parser = argparse.ArgumentParser(description="time and memory of the gradient of a run")
    parser.add_argument("--repeat", type=int, default=5, help="samples per contender")
    parser.add_argument("--long", type=int, default=100_000, help="steps of the long run, or 0")
    options = parser.parse_args()
    met = True
    for batch, steps in SIZES:
        all_of_them = contenders(batch, steps)
        times = timing.time_together(all_of_them, options.repeat, warm=False)
        exact = all_of_them["torch loop"]()
        loop_time, loop_peak, rows = times["torch loop"].cpu, 0.0, []
        for name, f in all_of_them.items():
            peak = peak_bytes(f) / 1e6
            loop_peak = loop_peak or peak
            error = max(
                float((a - b).abs().max() / b.abs().max()) for a, b in zip(f(), exact, strict=True)
            )
            slower, smaller = times[name].cpu / loop_time, loop_peak / peak
            rows.append((name, 1e3 * times[name].cpu / steps, slower, peak, smaller, error))
            if name == "reversible":
                met = met and slower <= SLOWER and smaller >= SMALLER
        print(f"\nKepler, batch {batch}, {steps} steps of leapfrog, float64")
        header = ("gradient", "us/step", "times slower", "peak MB", "times less", "difference")
        print(timing.table(header, rows))
    if options.long:
        short, long = (resident_growth(5000, n) for n in (100, options.long))
        print(f"\nresident memory, batch 5000: {short:.2f} MB for 100 steps, {long:.2f} MB for")
        print(f"{options.long:,} steps, {long / short:.2f} times as much")
        met = met and long <= GROWTH * short
    print(
        f"\ntarget for reversible, <= {SLOWER:g} times the time of the loop, >= {SMALLER:g} times "
        f"less memory, <= {GROWTH:g} times that of 100 steps: {'yes' if met else 'NO'}"
    )
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
