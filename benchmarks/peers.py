"""The peers' side of the benchmarks: the half-plane given by its metric matrix alone.

Everyone gets the same thing to start from, ``g(x) = I / y^2`` as a function of the point, and
no closed forms. Run this file to see the peers by themselves::

    python benchmarks/peers.py

The fair opponent for small states is jitted JAX, written by hand here in every way that might
be fast. It comes with three ways to solve ``g a = b``, because at dimension 2 that choice
decides nearly everything: the two library solves call LAPACK once per point, the written-out
one is a handful of scalar operations that XLA fuses with the rest.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

STEPS = 100  # of RK4, for every exponential map
INSTALL = "pip install -r benchmarks/requirements.txt"


def missing() -> list[str]:
    """Name the peers that are not installed."""
    return [name for name in ("geomstats", "jax") if importlib.util.find_spec(name) is None]


# -- the problem and its exact answers ---------------------------------------------------------


class Problem(NamedTuple):
    """Points ``x``, ``y`` and tangents ``v`` at ``x``, each ``(batch, 2)`` in float64."""

    x: np.ndarray
    v: np.ndarray
    y: np.ndarray


def problem(batch: int, seed: int = 0) -> Problem:
    """Draw points with ``|x| < 1`` and ``0.5 < y < 2``, and tangents of length about 0.6."""
    rng = np.random.default_rng(seed)

    def points() -> np.ndarray:
        return np.stack([rng.uniform(-1, 1, batch), rng.uniform(0.5, 2, batch)], -1)

    x, y = points(), points()
    return Problem(x, 0.5 * x[:, 1:] * rng.standard_normal((batch, 2)), y)


def exact_christoffel(x: np.ndarray) -> np.ndarray:
    """Return the symbols ``(batch, k, i, j)`` of the half-plane."""
    gamma = np.zeros((len(x), 2, 2, 2))
    gamma[:, 0, 0, 1] = gamma[:, 0, 1, 0] = gamma[:, 1, 1, 1] = -1 / x[:, 1]
    gamma[:, 1, 0, 0] = 1 / x[:, 1]
    return gamma


def exact_exp(x: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return ``exp_x v``: the geodesic from i straight up, turned and moved by an isometry."""
    w = (v[:, 0] + 1j * v[:, 1]) / x[:, 1]
    turn = (np.angle(w) - np.pi / 2) / 2
    c, s, q = np.cos(turn), np.sin(turn), 1j * np.exp(np.abs(w))
    q = (c * q + s) / (c - s * q)
    return np.stack([q.real * x[:, 1] + x[:, 0], q.imag * x[:, 1]], -1)


def exact_log(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return ``log_x y`` by moving ``x`` to i and from there to the centre of the disc."""
    w = (y[:, 0] - x[:, 0] + 1j * y[:, 1]) / x[:, 1]
    centred = (w - 1j) / (w + 1j)
    v = 2j * np.arctanh(np.abs(centred)) * centred / np.abs(centred) * x[:, 1]
    return np.stack([v.real, v.imag], -1)


# -- geomstats ---------------------------------------------------------------------------------


class Geomstats(NamedTuple):
    """What is timed of geomstats, on torch tensors; points and tangents ``(batch, 2)``."""

    christoffel: Callable
    exp: Callable
    log: Callable


@contextlib.contextmanager
def _double_precision() -> Iterator[None]:
    # geomstats makes float64 torch's default at import, which must not leak to anyone else.
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(before)


def geomstats_half_plane(steps: int = STEPS) -> Geomstats:
    """Build the half-plane in geomstats' torch backend from ``metric_matrix`` alone.

    ``log`` is ``LogShootingSolver`` with its defaults (L-BFGS-B on the end-point error, from a
    straight line), shooting with RK4; a batch is one joint optimisation.
    """
    # The backend is chosen at import, once for the process.
    os.environ["GEOMSTATS_BACKEND"] = "pytorch"
    with _double_precision():
        import torch

        geometry, numerics = "geomstats.geometry", "geomstats.numerics"
        euclidean = importlib.import_module(f"{geometry}.euclidean")
        riemannian = importlib.import_module(f"{geometry}.riemannian_metric")
        geodesic = importlib.import_module(f"{numerics}.geodesic")
        ivp = importlib.import_module(f"{numerics}.ivp")

        class HalfPlaneMetric(riemannian.RiemannianMetric):
            def metric_matrix(self, base_point):
                y = base_point[..., 1, None, None]
                return torch.eye(2, dtype=base_point.dtype) / y**2

        space = euclidean.Euclidean(2, equip=False)
        space.equip_with_metric(HalfPlaneMetric)
        metric = space.metric
        rk4 = ivp.GSIVPIntegrator(n_steps=steps, step_type="rk4")
        metric.exp_solver = geodesic.ExpODESolver(space, integrator=rk4)
        metric.log_solver = geodesic.LogShootingSolver(space)

    def christoffel(x):
        with _double_precision():
            return metric.christoffels(x)

    def exp(x, v):
        with _double_precision():
            return metric.exp(v, x)

    def log(x, y):
        with _double_precision():
            # With a batch of one the solver is slower still, so drop the batch dimension.
            v = metric.log(y.squeeze(0), x.squeeze(0))
            return v.detach().reshape(x.shape)

    return Geomstats(christoffel, exp, log)


# -- JAX ---------------------------------------------------------------------------------------


@functools.cache
def _jax():
    # By name, for type checkers that run where the peers are not installed.
    jax = importlib.import_module("jax")
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_platforms", "cpu")
    return jax


def _metric(x):
    jnp = _jax().numpy
    return jnp.eye(2, dtype=x.dtype) / x[1] ** 2


def _lu(g, b):
    return _jax().numpy.linalg.solve(g, b)


def _cholesky(g, b):
    jax = _jax()
    return jax.scipy.linalg.cho_solve((jax.numpy.linalg.cholesky(g), True), b)


def _written_out(g, b):
    """Cholesky written out at trace time: right for any small dimension, and XLA fuses it."""
    jnp, n = _jax().numpy, g.shape[-1]
    low = [[g[0, 0]] * n for _ in range(n)]
    for i in range(n):
        for j in range(i + 1):
            s = g[i, j] - sum(low[i][k] * low[j][k] for k in range(j))
            low[i][j] = jnp.sqrt(s) if i == j else s / low[j][j]
    z = [b[i] for i in range(n)]
    for i in range(n):
        z[i] = (z[i] - sum(low[i][k] * z[k] for k in range(i))) / low[i][i]
    for i in reversed(range(n)):
        z[i] = (z[i] - sum(low[k][i] * z[k] for k in range(i + 1, n))) / low[i][i]
    return jnp.stack(z)


SOLVES = {"lu": _lu, "cholesky": _cholesky, "written out": _written_out}


def _first_kind(x):
    jax = _jax()
    dg = jax.jacfwd(_metric)(x)  # dg[i, j, k] = d_k g_ij
    transposed = jax.numpy.transpose  # to [l, i, j]
    return 0.5 * (transposed(dg, (1, 2, 0)) + transposed(dg, (1, 0, 2)) - transposed(dg, (2, 0, 1)))


def _gamma(solve: Callable) -> Callable:
    def christoffel(x):
        f = _first_kind(x)
        return solve(_metric(x), f.reshape(f.shape[0], -1)).reshape(f.shape)

    return christoffel


def jax_christoffel() -> dict[str, Callable]:
    """Return jitted ``(batch, 2) -> (batch, 2, 2, 2)``, one for each way to solve."""
    jax = _jax()
    return {name: jax.jit(jax.vmap(_gamma(solve))) for name, solve in SOLVES.items()}


def jax_exp(steps: int = STEPS) -> dict[tuple[str, str], Callable]:
    """Return jitted exponential maps, one for each form of the equation and way to solve.

    Each is RK4 in one ``fori_loop`` in one jit, ``(x, v) -> exp_x v`` on ``(batch, 2)``:

    - ``christoffel``: form the symbols by forward mode and contract them;
    - ``contracted``: contract the first-kind symbols, then solve for one vector;
    - ``jvp + vjp``: the acceleration without the symbols;
    - ``cotangent``: Hamilton's equations, one reverse pass.
    """
    jax = _jax()
    jnp = jax.numpy

    def forms(solve: Callable) -> dict[str, Callable]:
        gamma = _gamma(solve)

        def by_symbols(x, v):
            return v, -jnp.einsum("kij,i,j->k", gamma(x), v, v)

        def contracted(x, v):
            return v, -solve(_metric(x), jnp.einsum("lij,i,j->l", _first_kind(x), v, v))

        def two_products(x, v):
            def lowered(z):
                return _metric(z) @ v

            _, along = jax.jvp(lowered, (x,), (v,))
            _, pull = jax.vjp(lowered, x)
            return v, solve(_metric(x), 0.5 * pull(v)[0] - along)

        def cotangent(x, p):
            v = solve(_metric(x), p)
            return v, 0.5 * jax.grad(lambda z: v @ _metric(z) @ v)(x)

        return {
            "christoffel": by_symbols,
            "contracted": contracted,
            "jvp + vjp": two_products,
            "cotangent": cotangent,
        }

    flat = jax.vmap(lambda x, v: _metric(x) @ v)
    maps = {}
    for solver, solve in SOLVES.items():
        for form, field in forms(solve).items():
            start = flat if form == "cotangent" else None
            maps[form, solver] = jax.jit(_rk4(jax.vmap(field), steps, start))
    return maps


def jax_conformal_exp(steps: int = STEPS) -> Callable:
    """Return the exponential map of ``exp(2 phi) I`` from ``phi = -log y``, RK4 in one jit."""
    jax = _jax()

    def field(x, v):
        d_phi = jax.grad(lambda z: -jax.numpy.log(z[1]))(x)
        return v, (v @ v) * d_phi - 2 * (d_phi @ v) * v

    return jax.jit(_rk4(jax.vmap(field), steps))


def _rk4(field: Callable, steps: int, start: Callable | None = None) -> Callable:
    jax = _jax()
    dt = 1 / steps

    def moved(state, slope, t):
        return tuple(s + t * k for s, k in zip(state, slope, strict=True))

    def step(_, state):
        k1 = field(*state)
        k2 = field(*moved(state, k1, dt / 2))
        k3 = field(*moved(state, k2, dt / 2))
        k4 = field(*moved(state, k3, dt))
        slopes = zip(k1, k2, k3, k4, strict=True)
        return moved(state, tuple(a + 2 * b + 2 * c + d for a, b, c, d in slopes), dt / 6)

    def exp(x, v):
        state = (x, v if start is None else start(x, v))
        return jax.lax.fori_loop(0, steps, step, state)[0]

    return exp


def bound(f: Callable, *arrays: np.ndarray) -> Callable[[], object]:
    """Return ``f`` of these arrays as a function of nothing that waits for its result."""
    placed = [_jax().numpy.asarray(a) for a in arrays]
    return lambda: f(*placed).block_until_ready()


# -- the peers by themselves -------------------------------------------------------------------


def geomstats_log_per_pair(peer: Geomstats, x: np.ndarray, y: np.ndarray, joint: int = 2):
    """Time a few logs of geomstats; return rows ``(what, ms per pair, error)``.

    Singly, and as one joint optimisation of ``joint`` pairs; once each, for it takes seconds.
    """
    import torch
    from timing import time_it

    rows = []
    parts = [("1 pair", slice(0, 1)), ("1 pair", slice(1, 2)), (f"{joint} jointly", slice(joint))]
    for what, part in parts:
        a, b = torch.from_numpy(x[part]), torch.from_numpy(y[part])
        found = []
        t = time_it(lambda a=a, b=b, found=found: found.append(peer.log(a, b)), 1, warm=False)
        error = np.abs(found[0].numpy() - exact_log(x[part], y[part])).max()
        rows.append((what, t.cpu / len(a), float(error)))
    return rows


def main() -> None:
    """Print what the installed peers need on this machine."""
    from timing import one_thread, table, time_it, time_together

    one_thread()
    absent = missing()
    for name in absent:
        print(f"{name} is not installed, its rows are left out; {INSTALL}")
    rows = []
    if "geomstats" not in absent:
        import torch

        peer = geomstats_half_plane()
        x = problem(1000).x
        at = torch.from_numpy(x)
        error = np.abs(peer.christoffel(at[:5]).numpy() - exact_christoffel(x[:5])).max()
        t = time_it(lambda: peer.christoffel(at), 1, warm=False)
        rows.append(("Christoffel", 1000, "geomstats torch", t.cpu, t.wall, float(error)))
        given = problem(100)
        for what, ms, error in geomstats_log_per_pair(peer, given.x, given.y):
            rows.append(("log, per pair", what, "geomstats torch", ms, ms, error))
    if "jax" not in absent:
        x = problem(1000).x
        calls = {name: bound(f, x) for name, f in jax_christoffel().items()}
        for name, t in time_together(calls, 5).items():
            error = np.abs(np.asarray(calls[name]()) - exact_christoffel(x)).max()
            rows.append(("Christoffel", 1000, f"JAX, {name}", t.cpu, t.wall, float(error)))
        for batch in (100, 1000):
            given = problem(batch)
            truth = exact_exp(given.x, given.v)
            maps = {f"{form}, {solve}": f for (form, solve), f in jax_exp().items()}
            maps["conformal"] = jax_conformal_exp()
            calls = {name: bound(f, given.x, given.v) for name, f in maps.items()}
            for name, t in time_together(calls, 5).items():
                error = np.abs(np.asarray(calls[name]()) - truth).max()
                rows.append(("exp", batch, f"JAX, {name}", t.cpu, t.wall, float(error)))
    print(table(("what", "batch", "peer", "CPU ms", "wall ms", "error"), rows))


if __name__ == "__main__":
    main()
