"""Steps of leapfrog: darboux eager, compiled and catalogued, beside JAX, diffrax and torchdiffeq.

Figures are process CPU microseconds for one step of the whole batch, medians on one core and one
thread in float64, with the contenders taking turns; compilation is left out. Run::

    pip install . -r benchmarks/requirements.txt  # the rows of absent peers are left out
    python benchmarks/steps_per_second.py         # about four minutes

"user energy" is a potential in plain torch and nothing else, compiled; "own energy" is that of
``darboux.integrators.catalogue``. JAX is a hand-written leapfrog with the closed-form force (one
force a step) in a jitted ``fori_loop``, each component an array of its own where that is faster;
diffrax integrates with ``SemiImplicitEuler``, which is of first order, and ``LeapfrogMidpoint``.
The gradient is that of ``sum |q|^2`` at the end, by the initial state and the strength of the
centre; memory is what the run adds to the process at its peak.
"""

import argparse
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timing

timing.one_thread()

import numpy as np  # noqa: E402
import torch  # noqa: E402

from darboux.integrators import METHODS, Separable, catalogue, engine  # noqa: E402

DT = 1e-3
LEAPFROG = METHODS["leapfrog"]
Call = Callable[[], Any]


class Problem(NamedTuple):
    """One system, with states as arrays ``(batch, ...)``."""

    name: str
    system: str
    q: np.ndarray
    p: np.ndarray
    steps: int  # of a compiled call
    eager_steps: int


def orbits(batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Return Kepler orbits of moderate eccentricity in the plane."""
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, 2 * math.pi, batch)
    q = np.stack([np.cos(angle), np.sin(angle)], -1)
    return q, np.stack([-q[:, 1], q[:, 0]], -1) * rng.uniform(0.85, 1.1, (batch, 1))


def problems() -> list[Problem]:
    """Return the systems of the table."""
    rng = np.random.default_rng(1)
    bodies = rng.standard_normal((100, 3)) * 3
    few, many = rng.standard_normal((2, 1000, 1)), rng.standard_normal((2, 100_000, 1))
    ellipses = orbits(1000)
    return [
        Problem("oscillator", "oscillator", few[0], few[1], 20_000, 200),
        Problem("oscillator", "oscillator", many[0], many[1], 200, 10),
        Problem("Kepler", "kepler", ellipses[0], ellipses[1], 2000, 50),
        Problem(
            "gravity, 100 bodies", "gravity", bodies, 0.1 * rng.standard_normal((100, 3)), 200, 20
        ),
    ]


MASSES = np.full(100, 0.01)
SOFTENING = 0.1


# ---------------------------------------------------------------- darboux


def own_energy(system: str) -> Separable:
    """Return the catalogued system."""
    if system == "gravity":
        return catalogue.gravity(torch.from_numpy(MASSES), 1.0, SOFTENING)
    return getattr(catalogue, system)()


def user_energy(system: str) -> Separable:
    """Return the same, as a user would write its energy."""
    if system == "oscillator":
        return Separable(lambda q: (q**2).sum(-1) / 2)
    if system == "kepler":
        return Separable(lambda q: -1 / q.norm(dim=-1))
    m = torch.from_numpy(MASSES)
    i, j = np.triu_indices(100, 1)

    def potential(q: torch.Tensor) -> torch.Tensor:
        r2 = (q[..., i, :] - q[..., j, :]).square().sum(-1) + SOFTENING**2
        return -(m[i] * m[j] / r2.sqrt()).sum(-1)

    return Separable(potential, mass=m[:, None])


def darboux_calls(problem: Problem) -> dict[str, tuple[Call, int]]:
    """Return what is timed, and the steps of one call."""
    q, p = torch.from_numpy(problem.q), torch.from_numpy(problem.p)
    own, user = own_energy(problem.system), user_energy(problem.system)
    for name, system in (("own", own), ("user", user)):
        print(f"  {problem.name}, {name} energy: {engine.engine_of(system, q, p)}")
    few, many = problem.eager_steps, problem.steps
    return {
        "eager": (lambda: LEAPFROG.advance(own, q, p, DT, few, None), few),
        "user energy": (lambda: engine.advance(LEAPFROG, user, q, p, DT, many), many),
        "own energy": (lambda: engine.advance(LEAPFROG, own, q, p, DT, many), many),
    }


# ---------------------------------------------------------------- peers


def jax_force(system: str, aos: bool = True) -> Callable:
    """Return the closed-form force on ``(batch, d)`` or, without ``aos``, ``(d, batch)``."""
    import jax.numpy as jnp  # pyright: ignore[reportMissingImports]

    axis = -1 if aos else 0
    if system == "oscillator":
        return lambda q: -q
    if system == "kepler":

        def central(q: Any) -> Any:
            r2 = (q * q).sum(axis, keepdims=True)
            return -q / (r2 * jnp.sqrt(r2))

        return central
    m = jnp.asarray(MASSES)

    def pairwise(q: Any) -> Any:
        gap = q[None, :, :] - q[:, None, :]
        r2 = (gap * gap).sum(-1) + SOFTENING**2
        weight = m * m[:, None] / (r2 * jnp.sqrt(r2))
        return (weight[..., None] * gap).sum(1)

    return pairwise


def jax_components(system: str) -> Callable | None:
    """Return gravity with each coordinate an array of its own, ``(3, n)``."""
    import jax.numpy as jnp  # pyright: ignore[reportMissingImports]

    if system != "gravity":
        return None
    m = jnp.asarray(MASSES)

    def pairwise(q: Any) -> Any:
        gap = q[:, None, :] - q[:, :, None]
        r2 = (gap * gap).sum(0) + SOFTENING**2
        weight = m * m[:, None] / (r2 * jnp.sqrt(r2))
        return (weight * gap).sum(-1)

    return pairwise


def inverse_mass(problem: Problem, aos: bool = True) -> Any:
    """Return what turns momenta into velocities."""
    if problem.system != "gravity":
        return 1.0
    return 1 / (MASSES[:, None] if aos else MASSES)


def jax_leapfrog(force: Callable, w: Any, q: Any, p: Any, steps: int) -> Call:
    """Return a jitted kick-drift-kick run, the last kick of a step joined to the next."""
    import jax  # pyright: ignore[reportMissingImports]

    def run(q: Any, p: Any) -> Any:
        def step(_: Any, z: Any) -> Any:
            q, p = z
            q = q + DT * p * w
            return q, p + DT * force(q)

        q, p = jax.lax.fori_loop(0, steps, step, (q, p + DT / 2 * force(q)))
        return q, p - DT / 2 * force(q)

    compiled = jax.jit(run)
    q, p = jax.numpy.asarray(q), jax.numpy.asarray(p)
    return lambda: jax.block_until_ready(compiled(q, p))


def jax_calls(problem: Problem) -> dict[str, tuple[Call, int]]:
    """Return the hand-written leapfrog in both layouts."""
    q, p, steps = problem.q, problem.p, problem.steps
    swapped = np.ascontiguousarray(q.T), np.ascontiguousarray(p.T)
    force = jax_components(problem.system) or jax_force(problem.system, aos=False)
    plain = jax_force(problem.system)
    return {
        "JAX": (jax_leapfrog(plain, inverse_mass(problem), q, p, steps), steps),
        "JAX, components": (
            jax_leapfrog(force, inverse_mass(problem, aos=False), *swapped, steps),
            steps,
        ),
    }


def diffrax_calls(problem: Problem) -> dict[str, tuple[Call, int]]:
    """Return both of diffrax's solvers that come near a leapfrog."""
    import diffrax  # pyright: ignore[reportMissingImports]
    import jax  # pyright: ignore[reportMissingImports]
    import jax.numpy as jnp  # pyright: ignore[reportMissingImports]

    force, w = jax_force(problem.system), inverse_mass(problem)
    q, p, steps = jnp.asarray(problem.q), jnp.asarray(problem.p), problem.steps
    split = (
        diffrax.ODETerm(lambda t, p, _: p * w),
        diffrax.ODETerm(lambda t, q, _: force(q)),
    )
    whole = diffrax.ODETerm(lambda t, z, _: (z[1] * w, force(z[0])))
    solvers = {
        "diffrax SemiImplicitEuler": (split, diffrax.SemiImplicitEuler()),
        "diffrax LeapfrogMidpoint": (whole, diffrax.LeapfrogMidpoint()),
    }

    def call(terms: Any, solver: Any) -> Call:
        @jax.jit
        def run(q: Any, p: Any) -> Any:
            return diffrax.diffeqsolve(
                terms, solver, 0.0, steps * DT, DT, (q, p),
                stepsize_controller=diffrax.ConstantStepSize(),
                adjoint=diffrax.ForwardMode(),
                max_steps=steps + 1,
            ).ys  # fmt: skip

        return lambda: jax.block_until_ready(run(q, p))

    return {name: (call(*pair), steps) for name, pair in solvers.items()}


def torchdiffeq_calls(problem: Problem) -> dict[str, tuple[Call, int]]:
    """Return its classical Runge-Kutta method."""
    from torchdiffeq import odeint

    own, few = own_energy(problem.system), problem.eager_steps
    z = (torch.from_numpy(problem.q), torch.from_numpy(problem.p))
    times = torch.tensor([0.0, few * DT], dtype=torch.float64)

    def run() -> Any:
        with torch.no_grad():
            return odeint(
                lambda t, z: own.field(*z), z, times, method="rk4", options={"step_size": DT}
            )

    return {"torchdiffeq rk4": (run, few)}


PEERS = {"jax": jax_calls, "diffrax": diffrax_calls, "torchdiffeq": torchdiffeq_calls}


def missing() -> list[str]:
    """Return the peers that are not installed; turn on double precision in JAX."""
    import importlib.util

    absent = [name for name in PEERS if importlib.util.find_spec(name) is None]
    if "jax" in absent:
        return sorted({*absent, "diffrax"})
    import jax  # pyright: ignore[reportMissingImports]

    jax.config.update("jax_enable_x64", True)
    return absent


# ---------------------------------------------------------------- the two tables


def verdict(ok: bool) -> str:
    """Return the word of the last column."""
    return "yes" if ok else "NO"


def forward_table(absent: list[str], repeat: int) -> bool:
    """Print the time of a step, and whether it is as wanted."""
    rows, met = [], True
    for problem in problems():
        calls = darboux_calls(problem)
        for name, make in PEERS.items():
            if name not in absent:
                calls |= make(problem)
        taken = timing.time_together({k: call for k, (call, _) in calls.items()}, repeat)
        step = {k: 1e3 * t.cpu / calls[k][1] for k, t in taken.items()}
        rivals = {k: t for k, t in step.items() if k.startswith(("JAX", "diffrax"))}
        best = min(rivals, key=rivals.__getitem__, default=None)
        for name, t in step.items():
            ratio = rivals[best] / t if best else math.nan
            least = {"user energy": 0.3, "own energy": 1.0}.get(name) if best else None
            ok = least is None or ratio >= least
            met &= ok
            batch = len(problem.q) if problem.system != "gravity" else 1
            target = f">= {least}" if least else ""
            rows.append(
                (problem.name, batch, name, t, 1e6 / t, ratio, target, least and verdict(ok))
            )
    header = ("system", "batch", "who", "us/step", "steps/s", "x best peer", "target", "met")
    print("\n" + timing.table(header, [[c if c is not None else "" for c in r] for r in rows]))
    print("x best peer: steps per second over those of the fastest of JAX and diffrax\n")
    return met


def gradient_call(who: str, batch: int, steps: int) -> Call:
    """Return forward and backward pass of one contender."""
    q, p = orbits(batch)
    h = 0.01
    if who.startswith("diffrax"):
        return diffrax_gradient(q, p, h, steps)
    mu = torch.ones((), dtype=torch.float64, requires_grad=True)
    x, y = (torch.from_numpy(z).requires_grad_() for z in (q, p))
    own = catalogue.kepler(mu)
    user = Separable(lambda q: -mu / q.norm(dim=-1))

    def run() -> Any:
        if who == "tape":
            end = LEAPFROG.advance(own, x, y, h, steps, None)[0]
        else:
            end = engine.advance(LEAPFROG, own if who.startswith("own") else user, x, y, h, steps)[
                0
            ]
        return [g.numpy() for g in torch.autograd.grad(end.square().sum(), [x, y, mu])]

    return run


def diffrax_gradient(q: np.ndarray, p: np.ndarray, h: float, steps: int) -> Call:
    """Return the gradient through diffrax by recursive checkpointing."""
    import diffrax  # pyright: ignore[reportMissingImports]
    import jax  # pyright: ignore[reportMissingImports]
    import jax.numpy as jnp  # pyright: ignore[reportMissingImports]

    jax.config.update("jax_enable_x64", True)
    terms = (
        diffrax.ODETerm(lambda t, p, mu: p),
        diffrax.ODETerm(lambda t, q, mu: -mu * q * (q * q).sum(-1, keepdims=True) ** -1.5),
    )

    def loss(q: Any, p: Any, mu: Any) -> Any:
        end = diffrax.diffeqsolve(
            terms, diffrax.SemiImplicitEuler(), 0.0, steps * h, h, (q, p), mu,
            adjoint=diffrax.RecursiveCheckpointAdjoint(), max_steps=steps + 1,
        ).ys  # fmt: skip
        return (end[0] ** 2).sum()

    run = jax.jit(jax.grad(loss, (0, 1, 2)))
    args = (jnp.asarray(q), jnp.asarray(p), jnp.asarray(1.0))
    return lambda: jax.block_until_ready(run(*args))


def peak_growth(who: str, batch: int, steps: int) -> float:
    """Return by how many megabytes one run raises the peak of a fresh process."""
    command = [sys.executable, __file__, "--memory", who, str(batch), str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def print_growth(who: str, batch: int, steps: int) -> None:
    """Warm up on one step of a small batch, then run once; for :func:`peak_growth`."""
    for small in (gradient_call(who, 8, 2), gradient_call(who, batch, 2)):
        small()
    run = gradient_call(who, batch, steps)
    before = peak_memory()
    run()
    print(peak_memory() - before)


def peak_memory() -> float:
    """Return the peak of this process in megabytes; ``getrusage`` counts its parent's too."""
    status = Path("/proc/self/status").read_text()
    return float(status.split("VmHWM:")[1].split()[0]) / 1024


def gradient_table(absent: list[str], repeat: int) -> bool:
    """Print time and memory of the gradient, and whether they are as wanted."""
    rows, met = [], True
    for batch, steps in ((1000, 1000), (10_000, 300)):
        who = ["tape", "user energy", "own energy"]
        who += [] if "diffrax" in absent else ["diffrax"]
        calls: Mapping[str, Call] = {w: gradient_call(w, batch, steps) for w in who}
        truth = calls["tape"]()
        errors = {
            w: max(
                float(np.linalg.norm(a - b) / np.linalg.norm(b))
                for a, b in zip(calls[w](), truth, strict=True)
            )
            for w in who[:3]
        }
        taken = timing.time_together(calls, max(3, repeat // 2))
        memory = {w: peak_growth(w, batch, steps) for w in who[:3]}
        for w in who:
            t = 1e3 * taken[w].cpu / steps
            row = [batch, steps, w, t, errors.get(w, math.nan), memory.get(w, math.nan)]
            tape = taken[w].cpu / taken["tape"].cpu
            rival = taken["diffrax"].cpu / taken[w].cpu if "diffrax" in taken else math.nan
            judged = ""
            if w.endswith("energy"):
                ok = tape <= 0.3 and memory[w] <= memory["tape"] / 20
                ok &= not rival < (1.0 if batch == 1000 else 1.5)
                met &= ok
                judged = verdict(ok)
            rows.append([*row, tape, rival, judged])
    header = (
        "batch", "steps", "who", "us/step", "error", "MB", "time / tape", "x diffrax", "met",
    )  # fmt: skip
    print(timing.table(header, rows))
    print(
        "wanted: time <= 0.3 tape, memory <= tape / 20, as fast as diffrax SemiImplicitEuler with\n"
        "recursive checkpoints at batch 1000 and 1.5 times as fast at 10 000; error: against tape"
    )
    return met


def main() -> int:
    """Run both tables; the exit status says whether every target was met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeat", type=int, default=7, help="samples per contender")
    parser.add_argument("--without", nargs="*", default=[], help="peers to leave out")
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        who, batch, steps = options.memory
        print_growth(who, int(batch), int(steps))
        return 0
    absent = sorted({*missing(), *options.without})
    for name in absent:
        print(f"{name}: left out, and its rows with it")
    forward = forward_table(absent, options.repeat)
    backward = gradient_table(absent, options.repeat)
    return int(not (forward and backward))


if __name__ == "__main__":
    sys.exit(main())
