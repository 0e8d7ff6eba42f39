"""darboux and its peers on the half-plane, side by side in one process.

Each side is given ``g(x) = I / y^2`` and nothing else; figures are process CPU milliseconds,
medians on one core and one thread, with the contenders taking turns. Run::

    pip install . -r benchmarks/requirements.txt  # the rows of absent peers are left out
    python benchmarks/half_plane.py               # about a minute and a half

darboux runs eagerly and, in rows of their own, compiled (as JAX always is); no figure holds
compilation. JAX stands in two rows wherever a linear system is solved. "library solve" is what
one writes (``jnp.linalg.solve`` or a Cholesky solve, the faster of the two), which calls LAPACK
once per point; "fastest" is the best of all forms, with the solve written out so that XLA fuses
the whole step into a few kernels.
"""

import argparse
import math
import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple

import timing

timing.one_thread()

import numpy as np  # noqa: E402
import peers  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import darboux as dx  # noqa: E402


class HalfPlane(dx.Chart):
    """The hyperbolic plane as anyone would write it down: the metric and nothing else."""

    def metric(self, x: Tensor) -> Tensor:
        """Return ``I / y^2``."""
        return torch.eye(2, dtype=x.dtype, device=x.device) / x[..., 1, None, None] ** 2


def conformal(steps: int = peers.STEPS, *, compile: bool = False) -> dx.Manifold:
    """Return the same plane as ``exp(2 phi)`` times the flat metric, ``phi = -log y``."""
    return dx.manifolds.Conformal(
        base=dx.manifolds.Euclidean(2),
        log_factor=lambda x: -torch.log(x[..., 1]),
        method="rk4",
        steps=steps,
        compile=compile,
    )


class Target(NamedTuple):
    """An upper bound on the time of darboux over the time of the peer."""

    ratio: float
    words: str


class Row(NamedTuple):
    """One comparison, ready to be printed."""

    what: str
    batch: int
    ours: float
    error: float
    peer: str
    theirs: float
    ratio: float
    target: str
    met: str
    noise: float


Rivals = dict[str, Callable[[], object]]


class Ours(NamedTuple):
    """One way in which darboux does it, and its target against each rival, by name."""

    call: Callable[[], Tensor]
    targets: Mapping[str, Target | None]


class Bench:
    """Collects rows; ``repeat`` samples each."""

    def __init__(self, repeat: int) -> None:
        self.repeat = repeat
        self.rows: list[Row] = []

    def compare(self, batch: int, truth: np.ndarray, ours: dict[str, Ours], rivals: Rivals) -> None:
        """Time everything in turn; add a row for each of ours and each rival it names."""
        errors = {
            what: float(np.abs(way.call().detach().numpy() - truth).max())
            for what, way in ours.items()
        }
        calls = {**{what: way.call for what, way in ours.items()}, **rivals}
        times = timing.time_together(calls, self.repeat)
        for what, way in ours.items():
            for name, target in way.targets.items():
                self.add(what, batch, times[what], errors[what], name, times[name], target)
            if not way.targets:
                self.add(what, batch, times[what], errors[what], "-", None, None)

    def add(
        self,
        what: str,
        batch: int,
        ours: timing.Timing,
        error: float,
        peer: str,
        theirs: timing.Timing | None,
        target: Target | None,
    ) -> None:
        """Add one row."""
        theirs_cpu = theirs.cpu if theirs else math.nan
        ratio = ours.cpu / theirs_cpu
        met = words = ""
        if target:
            words, met = target.words, "yes" if ratio <= target.ratio else "NO"
        noise = max(t.cpu / t.cpu_min for t in (ours, theirs) if t)
        row = Row(what, batch, ours.cpu, error, peer, theirs_cpu, ratio, words, met, noise)
        self.rows.append(row)

    def show(self) -> None:
        """Print the table and count the targets."""
        header = (
            "what", "batch", "darboux ms", "error", "peer", "peer ms", "ratio", "target", "met",
            "noise",
        )  # fmt: skip
        print(timing.table(header, self.rows))
        judged = [row.met for row in self.rows if row.met]
        print(f"\n{judged.count('yes')} of {len(judged)} targets met")
        print("ratio: darboux over the peer; noise: median over minimum, above 1.5 run it again")


def jax_rivals(calls: Rivals) -> Rivals:
    """Time every variant, print them, and keep the fastest overall and of the library solves."""
    times = {name: t.cpu for name, t in timing.time_together(calls, 3).items()}
    print("  JAX, ms:", "; ".join(f"{k} {timing.number(t)}" for k, t in times.items()))
    library = min((k for k in times if not k.endswith("written out")), key=times.__getitem__)
    fastest = min(times, key=times.__getitem__)
    return {
        f"JAX, library solve ({library})": calls[library],
        f"JAX, fastest ({fastest})": calls[fastest],
    }


def christoffel(bench: Bench, absent: list[str], batch: int = 1000) -> None:
    """Christoffel symbols of a batch."""
    x = peers.problem(batch).x
    at, plane, truth = torch.from_numpy(x), HalfPlane(dim=2), peers.exact_christoffel(x)
    rivals: Rivals = {}
    targets: dict[str, Target | None] = {}
    if "jax" not in absent:
        calls = {name: peers.bound(f, x) for name, f in peers.jax_christoffel().items()}
        rivals = jax_rivals(calls)
        targets.update(dict.fromkeys(rivals, Target(2, "<= 2")))
    if "geomstats" not in absent:
        peer, name = peers.geomstats_half_plane(), "geomstats torch"
        rivals[name] = lambda: peer.christoffel(at)
        targets[name] = Target(1 / 300, "<= 1/300")
    compiled = torch.compile(plane.christoffel, dynamic=False)
    ours = {
        "Christoffel": Ours(lambda: plane.christoffel(at), targets),
        "Christoffel, compiled": Ours(lambda: compiled(at), targets),
    }
    bench.compare(batch, truth, ours, rivals)


def exponential(
    bench: Bench, absent: list[str], batch: int, generic_target: Target, half: Target | None
) -> None:
    """Exponential map by 100 steps of RK4, from the metric alone and as a conformal metric."""
    x, v, _ = peers.problem(batch)
    at, along = torch.from_numpy(x), torch.from_numpy(v)
    generic, structured = HalfPlane(dim=2, method="rk4", steps=peers.STEPS), conformal()
    generic_compiled = HalfPlane(dim=2, method="rk4", steps=peers.STEPS, compile=True)
    structured_compiled = conformal(compile=True)
    rivals: Rivals = {}
    targets: dict[str, Target | None] = {}
    conformal_targets: dict[str, Target | None] = {}
    if "jax" not in absent:
        maps = {f"{form}, {solve}": f for (form, solve), f in peers.jax_exp().items()}
        rivals = jax_rivals({name: peers.bound(f, x, v) for name, f in maps.items()})
        targets.update(dict.fromkeys(rivals, generic_target))
        conformal_targets.update(dict.fromkeys(rivals, half))
        conformal_targets["JAX, conformal too"] = None
        rivals["JAX, conformal too"] = peers.bound(peers.jax_conformal_exp(), x, v)
    ours = {
        "exp, metric alone": Ours(lambda: generic.exp(at, along), targets),
        "exp, metric alone, compiled": Ours(lambda: generic_compiled.exp(at, along), targets),
        "exp, conformal": Ours(lambda: structured.exp(at, along), conformal_targets),
        "exp, conformal, compiled": Ours(
            lambda: structured_compiled.exp(at, along), conformal_targets
        ),
    }
    bench.compare(batch, peers.exact_exp(x, v), ours, rivals)


def logarithm(bench: Bench, absent: list[str], batch: int = 100) -> None:
    """Logarithm of 100 pairs; geomstats' time is that of its cheapest pair times the batch."""
    x, _, y = peers.problem(batch)
    at, to, plane = torch.from_numpy(x), torch.from_numpy(y), HalfPlane(dim=2)
    ours = {"log": Ours(lambda: plane.log(at, to), {})}
    bench.compare(batch, peers.exact_log(x, y), ours, {})
    row = bench.rows.pop()
    peer, total = "-", math.nan
    if "geomstats" not in absent:
        rows = peers.geomstats_log_per_pair(peers.geomstats_half_plane(), x, y)
        print("  geomstats log, ms per pair:", "; ".join(f"{w} {ms:.0f}" for w, ms, _ in rows))
        what, per_pair, error = min(rows, key=lambda row: row[1])
        peer, total = f"geomstats, {what}, extrapolated (error {error:.0e})", per_pair * batch
    fast = row.ours <= 60 or row.ours <= total / 100
    bench.rows.append(
        row._replace(
            peer=peer,
            theirs=total,
            ratio=row.ours / total,
            target="<= 60 ms or <= 1/100, to 1e-8",
            met="yes" if fast and row.error <= 1e-8 else "NO",
        )
    )


def main() -> int:
    """Run all rows; the exit status says whether every target was met."""
    parser = argparse.ArgumentParser(description="darboux and its peers on the half-plane")
    parser.add_argument("--repeat", type=int, default=7, help="samples per contender")
    parser.add_argument("--without", nargs="*", default=[], help="peers to leave out")
    options = parser.parse_args()
    absent = sorted({*peers.missing(), *options.without})
    for name in absent:
        print(f"{name}: left out, and its rows with it ({peers.INSTALL})")
    bench = Bench(options.repeat)
    christoffel(bench, absent)
    exponential(bench, absent, 100, Target(4, "<= 4"), None)
    exponential(bench, absent, 1000, Target(1, "<= 1"), Target(0.5, "<= 1/2"))
    logarithm(bench, absent)
    bench.show()
    return int(any(row.met == "NO" for row in bench.rows))


if __name__ == "__main__":
    sys.exit(main())
