"""One step of Stein variational gradient descent: time and memory against torch done plainly.

The velocity of N particles towards a standard normal, Gaussian kernel of width h = d, float32.
``dense`` forms the matrix of pairs by one product (the fastest plain form), ``autograd`` takes
the derivative of ``torch.cdist``'s kernel as most tutorials do. ``+ backward`` adds the derivative
of the squared velocity in the particles. Run::

    python benchmarks/particles.py            # --large adds N = 20000

Time is process CPU time on one core, medians, taken in turn. Memory is the peak of what torch's
CPU allocator handed out during one call, above what was held before it.
"""

import argparse
import functools
import math
import sys
from collections.abc import Callable

import timing

timing.one_thread()

import torch  # noqa: E402
from acceleration import peak_bytes  # noqa: E402
from torch import Tensor  # noqa: E402

from darboux.flows import energies, kernels, wasserstein  # noqa: E402

TARGETS = {2: 4.0, 50: 1.4}  # times faster than dense, forward, from N = 5000
BACKWARD = 10.0  # the same with the backward pass, d = 2
MEMORY = 200.0  # MiB, at N = 20000


def log_prob(x: Tensor) -> Tensor:
    """Return the log density of the standard normal, up to a constant."""
    return -x.square().sum(-1) / 2


def ours(h: float) -> Callable[[Tensor], Tensor]:
    """Return the velocity by the public classes."""
    energy, metric = energies.KL(log_prob), wasserstein.Stein(kernels.Gaussian(h))
    return lambda x: metric.velocity(energy, x, x.new_full(x.shape[:-1], 1 / len(x)))


def dense(h: float) -> Callable[[Tensor], Tensor]:
    """Return the velocity by one matrix of pairs; the score is given."""

    def velocity(x: Tensor) -> Tensor:
        xx = x.square().sum(-1)
        k = torch.exp((x @ x.T - xx[:, None] / 2 - xx / 2) / h)
        return (k @ (-x - x / h) + k.sum(1, keepdim=True) * x / h) / len(x)

    return velocity


def by_autograd(h: float) -> Callable[[Tensor], Tensor]:
    """Return the velocity with the kernel's derivative by autograd."""

    def velocity(x: Tensor) -> Tensor:
        y = x.detach().requires_grad_()
        k = torch.exp(-torch.cdist(y, x.detach()).square() / (2 * h))
        (repulsion,) = torch.autograd.grad(-k.sum(), y)
        return (k.detach() @ -x + repulsion) / len(x)

    return velocity


def backward(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return the derivative of the squared velocity."""

    def both(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(f(x).square().sum(), x)[0]

    return both


def measure(x: Tensor, repeat: int) -> tuple[float, ...]:
    """Return one line of the table for the particles ``x``; NaN where it would take too long."""
    n, d = x.shape
    forms = {"ours": ours(d), "dense": dense(d)}
    if n < 20000:
        forms["autograd"] = by_autograd(d)
    exact = dense(d)(x.double())
    error = float((forms["ours"](x) - exact).abs().max() / exact.abs().max())
    calls = {name: functools.partial(f, x) for name, f in forms.items()}
    forward = {name: t.cpu for name, t in timing.time_together(calls, repeat).items()}
    both = {"ours": math.nan, "dense": math.nan}
    if n < 20000:
        calls = {name: functools.partial(backward(forms[name]), x) for name in both}
        both = {name: t.cpu for name, t in timing.time_together(calls, repeat).items()}
    peak = peak_bytes(functools.partial(forms["ours"], x)) / 2**20
    slow = forward.get("autograd", math.nan)
    gain, again = forward["dense"] / forward["ours"], both["dense"] / both["ours"]
    return forward["ours"], forward["dense"], slow, gain, both["ours"], again, peak, error


def main() -> int:
    """Print the table; the exit status says whether the targets were met."""
    parser = argparse.ArgumentParser(description="SVGD step against plain torch")
    parser.add_argument("--repeat", type=int, default=3, help="samples per contender")
    parser.add_argument("--large", action="store_true", help="N = 20000 too: 3 GiB, minutes")
    options = parser.parse_args()
    rows, met = [], True
    for n in (1000, 5000, *([20000] if options.large else [])):
        for d in TARGETS:
            x = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
            row = measure(x, options.repeat)
            rows.append((n, d, *row))
            gain, again, peak = row[3], row[5], row[6]
            if n >= 5000:
                met &= gain >= TARGETS[d] and not (d == 2 and again < BACKWARD) and peak < MEMORY
    header = ("N", "d", "ours ms", "dense ms", "autograd ms", "times faster")
    header += ("+ backward ms", "times faster", "peak MiB", "error")
    print("SVGD step, float32, one core")
    print(timing.table(header, rows))
    print(
        f"\ntargets from N = 5000: {TARGETS[2]:g} x dense at d = 2, {TARGETS[50]:g} x at d = 50, "
        f"{BACKWARD:g} x with backward at d = 2, under 200 MiB: {'yes' if met else 'NO'}"
    )
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
