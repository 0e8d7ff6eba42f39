"""Particle flows in one run: SVGD against plain torch, blackjax and KeOps; Sinkhorn, geomloss.

The velocity of N particles towards a standard normal, Gaussian kernel of width h = d, float32.
``dense`` forms the matrix of pairs by one product (the fastest plain form), ``naive`` all
differences ``(N, N, d)``, ``autograd`` takes the derivative of ``torch.cdist``'s kernel as most
tutorials do. ``+ backward`` adds the derivative of the squared velocity in the particles. The
Sinkhorn divergence and its gradient have geomloss's own schedule, blur 0.05, scaling 0.5. Run::

    pip install -r benchmarks/requirements.txt
    python benchmarks/particles.py            # --large adds N = 20000: minutes

Time is process CPU time on one core, medians, taken in turn; contenders that need more than
``--limit`` seconds or 5 GiB are left out ("-"), and so are peers that are not installed. Memory
is the peak of what torch's CPU allocator handed out during one call, above what was held before.
"""

import argparse
import contextlib
import functools
import importlib
import io
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import timing

timing.one_thread()

import torch  # noqa: E402
from acceleration import peak_bytes  # noqa: E402
from torch import Tensor  # noqa: E402

from darboux.flows import energies, kernels, sinkhorn, wasserstein  # noqa: E402

DENSE = {2: 4.0, 50: 1.4}  # times faster than dense, forward, from N = 5000
BACKWARD = 10.0  # the same with the backward pass, d = 2
PEERS = 10.0  # than KeOps on a CPU and blackjax, from N = 5000
TRANSPORT = 4.0  # than geomloss, N = 1000, d = 2
MEMORY = 200.0  # MiB, at N = 20000
ROOM = 5 << 30  # bytes that a contender may take

Velocity = Callable[[Tensor], Tensor]


def peer(name: str) -> Any:
    """Return a module, or ``None`` and say so; silently, as KeOps greets on import."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return importlib.import_module(name)
    except ImportError:
        print(f"{name} is not installed: left out")
        return None


# -- the SVGD step ---------------------------------------------------------------------------


def log_prob(x: Tensor) -> Tensor:
    """Return the log density of the standard normal, up to a constant."""
    return -x.square().sum(-1) / 2


def ours(h: float) -> Velocity:
    """Return the velocity by the public classes."""
    energy, metric = energies.KL(log_prob), wasserstein.Stein(kernels.Gaussian(h))
    return lambda x: metric.velocity(energy, x, x.new_full(x.shape[:-1], 1 / len(x)))


def dense(h: float) -> Velocity:
    """Return the velocity by one matrix of pairs; the score is given."""

    def velocity(x: Tensor) -> Tensor:
        xx = x.square().sum(-1)
        k = torch.exp((x @ x.T - xx[:, None] / 2 - xx / 2) / h)
        return (k @ (-x - x / h) + k.sum(1, keepdim=True) * x / h) / len(x)

    return velocity


def naive(h: float) -> Velocity:
    """Return the velocity by all differences."""

    def velocity(x: Tensor) -> Tensor:
        z = x[:, None] - x
        k = torch.exp(-z.square().sum(-1, keepdim=True) / (2 * h))
        return (k * (z / h - x)).mean(1)

    return velocity


def by_autograd(h: float) -> Velocity:
    """Return the velocity with the kernel's derivative by autograd."""

    def velocity(x: Tensor) -> Tensor:
        y = x.detach().requires_grad_()
        k = torch.exp(-torch.cdist(y, x.detach()).square() / (2 * h))
        (repulsion,) = torch.autograd.grad(-k.sum(), y)
        return (k.detach() @ -x + repulsion) / len(x)

    return velocity


def by_keops(pykeops: Any, h: float) -> Velocity:
    """Return the velocity by lazy tensors."""

    def velocity(x: Tensor) -> Tensor:
        xi, xj = pykeops.LazyTensor(x[:, None].contiguous()), pykeops.LazyTensor(x[None])
        k = (-((xi - xj) ** 2).sum(-1) / (2 * h)).exp()
        return (k * ((xi - xj) / h - xj)).sum(dim=1) / len(x)

    return velocity


def by_blackjax(blackjax: Any, h: float) -> Velocity:
    """Return the velocity as one jitted step of length 1, its width held fixed."""
    jax, optax = (importlib.import_module(name) for name in ("jax", "optax"))
    sampler = blackjax.svgd(
        jax.grad(lambda x: -(x**2).sum() / 2),
        optax.sgd(1.0),
        update_kernel_parameters=lambda state: state,
    )
    step = jax.jit(sampler.step)
    known: list[Any] = [None, None]

    def velocity(x: Tensor) -> Tensor:
        if known[0] is not x:  # the conversion is not theirs to pay
            known[:] = x, sampler.init(jax.numpy.asarray(x.numpy()), {"length_scale": 2 * h})
        moved = jax.block_until_ready(step(known[1]).particles)
        return torch.from_numpy(moved.__array__().copy()) - x

    return velocity


def backward(f: Velocity) -> Velocity:
    """Return the derivative of the squared velocity."""

    def both(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(f(x).square().sum(), x)[0]

    return both


def clock(calls: Mapping[str, Callable[[], object]], repeat: int) -> dict[str, float]:
    """Return CPU milliseconds; one sample, after one call to warm up, of what is slow."""
    slow, quick = {}, {}
    for name, f in calls.items():
        f()
        once = timing.time_it(f, 1, warm=False).cpu
        (slow if once > 2000 else quick)[name] = once
    if quick:
        found = timing.time_together({name: calls[name] for name in quick}, repeat)
        quick = {name: t.cpu for name, t in found.items()}
    return {**slow, **quick}


CONTENDERS = ("dense", "naive", "autograd", "KeOps", "blackjax")


class Steps:
    """The contenders at one dimension; remembers how long each took, to leave out the slow."""

    def __init__(self, d: int, limit: float, keops: Any, blackjax: Any):
        self.d, self.limit = d, limit
        self.forms = {"ours": ours(d), "dense": dense(d), "naive": naive(d)}
        self.forms["autograd"] = by_autograd(d)
        if keops is not None:
            self.forms["KeOps"] = by_keops(keops, d)
        if blackjax is not None:
            self.forms["blackjax"] = by_blackjax(blackjax, d)
        self.seconds: dict[str, tuple[int, float]] = {}

    def affordable(self, name: str, n: int) -> bool:
        """Say whether a contender fits the memory and the time, which grows as N^2."""
        arrays = {"naive": 3 * self.d, "autograd": 5, "dense": 3, "blackjax": 2 + self.d / 8}
        before, seconds = self.seconds.get(name, (n, 0.0))
        room = 4 * n * n * arrays.get(name, 0) <= ROOM
        return room and seconds * (n / before) ** 2 <= self.limit

    def measure(self, n: int, repeat: int) -> tuple[list[float], list[float]]:
        """Return forward times in the order of CONTENDERS, ours first; backward, peak, error."""
        x = torch.randn(n, self.d, generator=torch.Generator().manual_seed(0))
        forms = {name: f for name, f in self.forms.items() if self.affordable(name, n)}
        exact = dense(self.d)(x[:1000].double())
        errors = [(f(x[:1000].clone()) - exact).abs().max() for f in forms.values()]
        worst = float(max(errors) / exact.abs().max())
        if worst > 1e-4:
            raise RuntimeError(f"the contenders disagree by {worst:.1e}")
        times = clock({name: functools.partial(f, x) for name, f in forms.items()}, repeat)
        self.seconds |= {name: (n, t / 1e3) for name, t in times.items()}
        pair = {} if n >= 20000 else {name: forms[name] for name in ("ours", "dense")}
        both = clock({k: functools.partial(backward(f), x) for k, f in pair.items()}, repeat)
        peak = peak_bytes(functools.partial(forms["ours"], x)) / 2**20
        row = [times.get(name, math.nan) for name in ("ours", *CONTENDERS)]
        a, b = both.get("ours", math.nan), both.get("dense", math.nan)
        return row, [a, b / a, peak]


# -- the Sinkhorn divergence -----------------------------------------------------------------


def transport(geomloss: Any, repeat: int) -> tuple[list[tuple], bool]:
    """Return value and gradient of the divergence against geomloss, a line per dtype and d."""
    rows, met = [], True
    loss = geomloss.SamplesLoss("sinkhorn", p=2, blur=0.05, scaling=0.5, backend="tensorized")
    for dtype in (torch.float32, torch.float64):
        for d in (2, 50):
            generator = torch.Generator().manual_seed(0)
            x, y = torch.randn(2, 1000, d, dtype=torch.float64, generator=generator).to(dtype)
            y = y + 1
            energy = sinkhorn.SinkhornDivergence(y, 0.05, tol=None)

            def run(f: Callable[..., Tensor], *rest: Tensor, x: Tensor = x) -> tuple[Tensor, ...]:
                z = x.clone().requires_grad_()
                value = f(z, *rest)
                return value.detach(), torch.autograd.grad(value, z)[0]

            a, b = functools.partial(run, energy.value), functools.partial(run, loss, y)
            gaps = [
                float((p - q).abs().max() / q.abs().max()) for p, q in zip(a(), b(), strict=True)
            ]
            times = clock({"ours": a, "geomloss": b}, repeat)
            gain = times["geomloss"] / times["ours"]
            rows.append((str(dtype)[6:], d, times["ours"], times["geomloss"], gain, *gaps))
            met &= d != 2 or gain >= TRANSPORT
            met &= dtype == torch.float32 or max(gaps) <= 1e-10
    return rows, met


def verdict(words: str, met: bool) -> bool:
    """Print a target and whether it was met."""
    print(f"{words}: {'yes' if met else 'NO'}")
    return met


def main() -> int:
    """Print the tables; the exit status says whether the targets were met."""
    parser = argparse.ArgumentParser(description="particle flows against their peers")
    parser.add_argument("--repeat", type=int, default=3, help="samples per contender")
    parser.add_argument("--limit", type=float, default=20.0, help="seconds for one step")
    parser.add_argument("--large", action="store_true", help="N = 20000 too: 5 GiB, minutes")
    options = parser.parse_args()
    keops, blackjax, geomloss = (peer(p) for p in ("pykeops.torch", "blackjax", "geomloss"))
    rows, gains = [], []
    for d in DENSE:
        steps = Steps(d, options.limit, keops, blackjax)
        for n in (1000, 5000, *([20000] if options.large else [])):
            times, rest = steps.measure(n, options.repeat)
            print(f"N = {n}, d = {d} done", file=sys.stderr)
            ratios = [t / times[0] for t in times[1:]]
            rows.append((n, d, *times, *rest))
            gains.append((n, d, *ratios))
    print("SVGD step, float32, one core: milliseconds")
    header = ("N", "d", "ours", *CONTENDERS)
    print(timing.table((*header, "+ backward", "dense / ours", "peak MiB"), rows))
    print("\ntimes faster, forward")
    print(timing.table(("N", "d", *CONTENDERS), gains))
    print()
    met = True
    for d, least in DENSE.items():
        good = all(g[2] >= least for g in gains if g[0] >= 5000 and g[1] == d)
        met &= verdict(f"target >= {least:g} x dense, N >= 5000, d = {d}", good)
    good = all(r[-2] >= BACKWARD for r in rows if r[0] == 5000 and r[1] == 2)
    met &= verdict(f"target >= {BACKWARD:g} x dense with backward, N = 5000, d = 2", good)
    for i, name in ((5, "KeOps"), (6, "blackjax")):
        seen = [g[i] for g in gains if g[0] >= 5000 and g[i] == g[i]]
        if seen:
            met &= verdict(f"target >= {PEERS:g} x {name}, N >= 5000", min(seen) >= PEERS)
    met &= verdict(f"target < {MEMORY:g} MiB", all(r[-1] < MEMORY for r in rows))
    if geomloss is not None:
        rows, good = transport(geomloss, options.repeat)
        print("\nSinkhorn divergence and its gradient, N = M = 1000: milliseconds")
        header = ("dtype", "d", "ours", "geomloss", "times faster", "gap of value", "of gradient")
        print(timing.table(header, rows))
        words = f"\ntarget >= {TRANSPORT:g} x geomloss at d = 2, equal to 1e-10 in float64"
        met &= verdict(words, good)
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
