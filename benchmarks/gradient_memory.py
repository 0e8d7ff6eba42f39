"""The gradient of a long run: time and memory of recording, checkpoints and retracing.

Leapfrog on the Kepler problem with a closed-form force; the gradient of ``sum q_N^2`` with
respect to the initial states and the strength ``mu``. Run::

    python benchmarks/gradient_memory.py            # some three minutes
    python benchmarks/gradient_memory.py --long 0   # without the run of 100,000 steps

Time is process CPU time on one core, medians, taken in turn, after a warm-up. Memory is the peak
of the bytes that torch's CPU allocator handed out during one call, above what was held before it
(``acceleration.peak_bytes``). "torch loop" is what one would write by hand.

For the long run, whose allocator events would not fit, two other meters. The bytes of all tensors
that are alive at once, at their peak (:class:`LiveBytes`): exact, whatever the allocator keeps for
later, so it is the one that the target is about. And the growth of the peak of resident memory,
in a process of its own, from where the freed heap was given back (``malloc_trim``): without that
the memory that a warm-up left behind hides all but noise.
"""

import argparse
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import timing

timing.one_thread()

import torch  # noqa: E402
from acceleration import peak_bytes  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

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


class LiveBytes(TorchDispatchMode):
    """Follow the tensors that operations make: ``now`` and ``peak`` are the bytes alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the operation and follow the storages of what it returns."""
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, list | tuple) else (out,):
            if isinstance(x, Tensor):
                self.follow(x.untyped_storage())
        return out

    def follow(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it is freed."""
        key, size = storage._cdata, storage.nbytes()

        def gone(_: Any) -> None:
            self.now -= size
            del self.alive[key]

        if key not in self.alive:
            self.alive[key] = weakref.ref(storage, gone)
            self.now += size
            self.peak = max(self.peak, self.now)


def live_bytes(f: Gradient) -> int:
    """Return the peak of the bytes of the tensors that live during a call and are made by it."""
    with LiveBytes() as meter:
        f()
    return meter.peak


def resident_growth(batch: int, steps: int) -> float:
    """Return by how many MB the peak of resident memory grows in one gradient (Linux, glibc)."""
    code = (
        "import ctypes, gc, gradient_memory as g\n"
        f"warm, run = (g.contenders({batch}, n)['reversible'] for n in (100, {steps}))\n"
        "warm()\n"
        "gc.collect()\n"
        "ctypes.CDLL(None).malloc_trim(0)\n"
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


def long_run(batch: int, steps: int) -> bool:
    """Print the memory of the gradient of a long run; say whether it is that of a short one."""
    rows, ratio = [], 0.0
    for n in (100, steps):
        live = live_bytes(contenders(batch, n)["reversible"]) / 1e6
        rows.append((f"{n:,}", live, resident_growth(batch, n)))
    ratio, resident = (rows[1][k] / rows[0][k] for k in (1, 2))
    autograd = [live_bytes(contenders(batch, n)["autograd"]) / 1e6 for n in (20, 100)]
    print(f"\nreversible, batch {batch}; one state is {3.2e-5 * batch:.2f} MB")
    print(timing.table(("steps", "live tensors MB", "resident growth MB"), rows))
    print(f"ratio: {ratio:.3f} of live tensors, {resident:.2f} of resident memory")
    print(f"autograd, for comparison: {autograd[1] / autograd[0]:.2f} from 20 to 100 steps")
    return ratio <= GROWTH


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
        met = long_run(1000, options.long) and met
    print(
        f"\ntarget for reversible, <= {SLOWER:g} times the time of the loop, >= {SMALLER:g} times "
        f"less memory, <= {GROWTH:g} times the live tensors of 100 steps: {'yes' if met else 'NO'}"
    )
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
