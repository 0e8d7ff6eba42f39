r"""
Metrics that flow
=================

Under Ricci flow, :math:`\partial_t g = -2\,\mathrm{Ric}`, a metric smooths itself as heat does,
and where it cannot, it pinches. Here a dumbbell breaks at its neck; a noisy torus shows what
DeTurck's gauge is for; and a surface of genus 2, made of blocks, takes the curvature -1 that is its
due. First, the flows whose solutions are known.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

import darboux as dx
from darboux.flows import discrete_ricci, ricci_grid, ricci_reduced, ricci_rotational, ricci_warped
from darboux.flows.learned_ricci import TypedSource, learned_flow, source_rate
from darboux.flows.unfolding import develop
from darboux.manifolds.mesh import Mesh, rectangle

F64 = torch.float64

# %%
# Flows that are known
# --------------------
# A round three-sphere shrinks to a point and a cylinder to a line. Nil and Sol, two of Thurston's
# geometries, flatten for ever, one as the cube root of time and one linearly.


def compare() -> dict[str, float]:
    """Print computed against exact figures and return the relative errors."""
    s = (torch.arange(24, dtype=F64) + 0.5) * torch.pi / 24
    sphere = ricci_rotational.rotational_flow(s.sin(), torch.pi, 1.0)
    cylinder = ricci_warped.warped_flow(torch.ones(16, dtype=F64), 6.0, 1.0)
    rows = [
        ("three-sphere: time of extinction", sphere.pinch_time, torch.tensor(1 / 4)),
        ("cylinder S^1 x S^2: time of the pinch", cylinder.pinch_time, torch.tensor(1 / 2)),
    ]
    for name, start in (("Nil", [1.0, 1.5, 0.7]), ("Sol", [0.8, 1.0, 0.8])):
        scales = torch.tensor(start, dtype=F64)
        run = ricci_reduced.homogeneous_flow(scales, name.lower(), dt=0.005, steps=200)
        exact = ricci_reduced.homogeneous_solution(scales, name.lower(), run.t[-1])
        rows.append((f"{name}: second scale at t = 1", run.scales[-1][1], exact[..., 1].squeeze()))
    errors = {}
    print(f"{'':40}{'computed':>14}{'exact':>14}  relative error")
    for name, found, exact in rows:
        errors[name] = abs(float(found) / float(exact) - 1)
        print(f"{name:40}{float(found):14.9f}{float(exact):14.9f}  {errors[name]:.1e}")
    return errors


# %%
# A neck that pinches
# -------------------
# Dumbbells of dimension three, one closed by two caps and one a ring. Where the sphere across is
# small its own curvature wins, and the neck shrinks to a point while the bulges live on. Close to
# the pinch it is a cylinder: the square of its radius falls at the rate -2 (n - 1) = -2, which is
# approached only as slowly as the logarithm of the time that is left.


class Pinch(NamedTuple):
    """A flow up to its pinch: radii over arclength, and the neck."""

    t: Tensor  # (time,)
    psi: Tensor  # (time, N)
    arclength: Tensor  # (time, N)
    neck: Tensor  # (time,), the radius
    time: float
    place: float


def dumbbell(size: int) -> Pinch:
    """Flow a dumbbell, the left bulge a little larger."""
    s = (torch.arange(size, dtype=F64) + 0.5) * torch.pi / size
    psi = s.sin() * (1 - 0.7 * s.sin() ** 4 * (1 + 0.3 * s.cos()))
    run = ricci_rotational.rotational_flow(psi, torch.pi, 1.0, pinched_below=0.15)
    assert run.status == "pinched"
    return Pinch(
        run.t, run.psi, run.arclength, narrowest(run.psi, run.arclength, size // 5),
        float(run.pinch_time), float(run.pinch_place),
    )  # fmt: skip


def ring(size: int) -> Pinch:
    """Flow a ring with one neck."""
    s = torch.arange(size, dtype=F64) * 2 * torch.pi / size
    run = ricci_warped.warped_flow(0.7 + 0.35 * s.cos(), 2 * torch.pi, 1.0, pinched_below=0.15)
    assert run.status == "pinched"
    places = run.length[:, None] * s / (2 * torch.pi)
    return Pinch(
        run.t, run.psi, places, narrowest(run.psi, places, 1), float(run.pinch_time),
        float(run.pinch_place),
    )  # fmt: skip


def narrowest(psi: Tensor, s: Tensor, margin: int) -> Tensor:
    """Return the radius of the neck ``(time,)``, by the parabola through its lowest nodes."""
    i = psi[:, margin:-margin].argmin(1, keepdim=True) + margin
    (a, b, c), (u, v, w) = ([f.gather(1, i + k)[:, 0] for k in (-1, 0, 1)] for f in (psi**2, s))
    left, right = (b - a) / (v - u), (c - b) / (w - v)
    bend = (right - left) / (w - u)
    slope = left + bend * (v - u)  # at the middle node
    return (b - slope**2 / (4 * bend)).sqrt()


def slopes(run: Pinch) -> tuple[Tensor, Tensor]:
    """Return the share of the time that is left, and the rate of the neck's squared radius."""
    t, y = run.t[1::8], run.neck[1::8] ** 2
    return 1 - (t[1:] + t[:-1]) / 2 / run.time, y.diff() / t.diff()


def spindle(psi: Tensor, s: Tensor) -> tuple[Mesh, Tensor]:
    """Return the surface of revolution of a profile, and the scalar curvature at its vertices.

    Radius and length are those of the metric; the sphere across is drawn as a circle.
    """
    # psi is odd at both poles
    gap = s[0], psi[0]
    x = torch.cat([-s[:2].flip(0), s, s[-1] + 2 * gap[0] + torch.stack([0 * gap[0], s[1] - s[0]])])
    y = torch.cat([-psi[:2].flip(0), psi, -psi[-2:].flip(0)])
    slope = torch.gradient(y, spacing=(x,))[0]
    bend = torch.gradient(slope, spacing=(x,))[0]
    slope, bend = slope[2:-2], bend[2:-2]
    scalar = -4 * bend / psi + 2 * (1 - slope**2) / psi**2
    scalar[:3], scalar[-3:] = scalar[3], scalar[-4]  # 0 / 0 at the poles
    # a step along the meridian is dz^2 + dpsi^2 = ds^2
    ends = torch.cat([torch.zeros(1, dtype=F64), psi, torch.zeros(1, dtype=F64)])
    steps = torch.cat([gap[0][None], s.diff(), gap[0][None]])
    z = pad((steps**2 - ends.diff() ** 2).clamp_min(0).sqrt().cumsum(0), (1, 0))
    rows, turns = len(psi), 72
    angle = 2 * torch.pi * torch.arange(turns, dtype=F64) / turns
    circle = torch.stack([angle.cos(), angle.sin(), 0 * angle], -1)
    up = torch.tensor([0.0, 0.0, 1.0], dtype=F64)
    rings = psi[:, None, None] * circle + z[1:-1, None, None] * up
    vertices = torch.cat([rings.reshape(-1, 3), z[0] * up[None], z[-1] * up[None]])
    i, j = torch.meshgrid(torch.arange(rows - 1), torch.arange(turns), indexing="ij")
    a, b = i * turns + j, i * turns + (j + 1) % turns
    j, last = torch.arange(turns), (rows - 1) * turns
    sides = [torch.stack([a, b, b + turns], -1), torch.stack([a, b + turns, a + turns], -1)]
    low = torch.stack([torch.full_like(j, rows * turns), (j + 1) % turns, j], -1)
    high = torch.stack([torch.full_like(j, rows * turns + 1), last + j, last + (j + 1) % turns], -1)
    cells = torch.cat([*(side.reshape(-1, 3) for side in sides), low, high])
    values = torch.cat([scalar[:, None].expand(-1, turns).reshape(-1), scalar[[0, -1]]])
    return Mesh(vertices - z.mean() * up, cells), values


# %%
# What DeTurck's gauge is for
# ---------------------------
# Ricci flow does not see coordinates, so nothing damps what a change of coordinates can make. On a
# grid, noise of 2 % in the metric grows until no step is short enough. With DeTurck's vector field
# the same flow, in coordinates that move, is a heat equation in every component.


class Noisy(NamedTuple):
    """A noisy torus, flowed without and with the gauge."""

    grid: ricci_grid.PeriodicGrid
    plain: ricci_grid.GridRun
    deturck: ricci_grid.GridRun
    shares: tuple[Tensor, Tensor]  # of high frequencies, plain and in the gauge
    gauss_bonnet: float  # the integral of curvature at the end, in the gauge; zero on a torus
    stopped: str  # what ended the plain flow


def noisy_torus(size: int) -> Noisy:
    """Flow a torus with 2 % of noise until the plain flow breaks, then in DeTurck's gauge."""
    grid = ricci_grid.periodic_grid((size, size))
    x, generator = grid.nodes(), torch.Generator().manual_seed(1)
    noise = torch.randn(size, size, 2, 2, dtype=F64, generator=generator)
    waves = torch.stack([0.4 * x[..., 1].cos(), 0.4 * x[..., 0].sin()], -1)
    g = torch.diag_embed(waves.exp()) + 0.01 * (noise + noise.mT)
    dt, stopped = 0.5 * ricci_grid.stable_step(g, grid), "the end"
    try:
        plain = ricci_grid.grid_flow(g, grid, dt=dt, steps=400, gauge="none")
    except dx.ConvergenceError as error:
        plain, stopped = error.trajectory, str(error).partition(";")[0]
    steps = len(plain.t) - 1
    deturck = ricci_grid.grid_flow(g, grid, dt=dt, steps=steps)
    shares = [ricci_grid.high_frequency_share(run.g, grid) for run in (plain, deturck)]
    curvature = ricci_grid.grid_scalar(deturck.g[-1], grid) / 2
    total = float(ricci_grid.grid_integral(curvature, deturck.g[-1], grid).abs())
    return Noisy(grid, plain, deturck, (shares[0], shares[1]), total, stopped)


# %%
# Blocks of genus 2
# -----------------
# Fifteen blocks less two, rounded off a little, are a surface with two holes. Its conformal class
# contains one metric of curvature -1, of area 4 pi by Gauss and Bonnet, however far the blocks are
# from it.


def blocks(solid: Tensor, cuts: int, rounds: int) -> Mesh:
    """Return the boundary of blocks ``(a, b, c)``, each cut ``cuts^3`` times, and smoothed."""
    for axis in range(3):
        solid = solid.repeat_interleave(cuts, axis)
    solid = pad(solid, (1,) * 6)
    square, quads = torch.tensor([[0, 0], [1, 0], [1, 1], [0, 1]]), []
    for axis in range(3):
        for side in (1, -1):
            corners = torch.zeros(4, 3, dtype=torch.long)
            corners[:, axis] = int(side > 0)
            around = square if side > 0 else square.flip(0)
            corners[:, (axis + 1) % 3], corners[:, (axis + 2) % 3] = around.unbind(-1)
            quads.append((solid & ~solid.roll(-side, axis)).nonzero()[:, None] + corners)
    x, index = torch.unique(torch.cat(quads).reshape(-1, 3), dim=0, return_inverse=True)
    quad = index.reshape(-1, 4)
    cells, x = torch.cat([quad[:, [0, 1, 2]], quad[:, [0, 2, 3]]]), x.to(F64) / cuts
    corner = quad.reshape(-1)
    for _ in range(rounds):  # to the mean of the faces around, weighted by area
        p, q, r, w = x[quad].unbind(1)
        area = torch.linalg.cross(r - p, w - q).norm(dim=1, keepdim=True)
        middle = torch.cat([area * x[quad].mean(1), area], 1).repeat_interleave(4, 0)
        total = torch.zeros(len(x), 4, dtype=F64).index_add(0, corner, middle)
        x = total[:, :3] / total[:, 3:]
    return Mesh(x - x.mean(0), cells)


class Uniform(NamedTuple):
    """A mesh and its metric of curvature -1."""

    mesh: Mesh
    before: Tensor  # (n,), curvature of the mesh in space
    found: discrete_ricci.Uniformization
    area: float


def uniform(cuts: int) -> Uniform:
    """Uniformise the blocks."""
    solid = torch.ones(5, 3, 1, dtype=torch.bool)
    solid[1, 1] = solid[3, 1] = False
    mesh = blocks(solid, cuts, cuts * cuts // 2)
    found = discrete_ricci.uniformize(mesh, "hyperbolic")
    a, b, c = (mesh.vertices[mesh.cells[:, k]] for k in range(3))
    corners = ((a, b, c), (b, c, a), (c, a, b))
    angles = torch.stack([_angle(q - p, r - p) for p, q, r in corners], -1)
    area = torch.linalg.cross(b - a, c - a).norm(dim=-1, keepdim=True).expand(-1, 3) / 6
    sums = torch.zeros(2, len(mesh.vertices), dtype=F64)
    for total, part in zip(sums, (angles, area), strict=True):
        total.index_add_(0, mesh.cells.reshape(-1), part.reshape(-1))
    # of a hyperbolic triangle: pi less its angles, by the law of cosines
    a, b, c = found.lengths[found.sides].unbind(-1)
    inner = [
        ((y.cosh() * z.cosh() - x.cosh()) / (y.sinh() * z.sinh())).acos()
        for x, y, z in ((a, b, c), (b, c, a), (c, a, b))
    ]
    whole = (math.pi - torch.stack(inner).sum(0)).sum()
    return Uniform(mesh, (2 * math.pi - sums[0]) / sums[1], found, float(whole))


def _angle(u: Tensor, v: Tensor) -> Tensor:
    return torch.atan2(torch.linalg.cross(u, v).norm(dim=-1), (u * v).sum(-1))


# %%
# Learned sources
# ---------------
# A network may drive the flow, :math:`\partial_t g = -2\,\mathrm{Ric} + T`. Added up as it comes,
# a source soon leaves the cone of positive matrices; split by type, it cannot.


def survivors(count: int, dt: float = 1.0, steps: int = 5) -> tuple[int, int, float]:
    """Return of how many random networks g stays positive, by Euler's steps and by the flow.

    Last comes the least eigenvalue that the flow reaches.
    """
    alive, least = [0, 0], math.inf
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        source = TypedSource(2, production=0, dtype=F64, generator=generator)
        g, x = torch.eye(2, dtype=F64), torch.randn(2, dtype=F64, generator=generator)
        with torch.no_grad():
            values = torch.linalg.eigvalsh(learned_flow(g, source, x, dt=dt, steps=steps).g)
            for _ in range(steps):
                positive = bool((torch.linalg.eigvalsh(g) > 0).all())
                g = g + dt * source_rate(source(x, g), g) if positive else g
        alive[0] += bool((torch.linalg.eigvalsh(g) > 0).all())
        alive[1] += bool((values > 0).all())
        least = min(least, float(values.min()))
    return alive[0], alive[1], least


# %%
# All of it
# ---------


class Result(NamedTuple):
    """What this example found."""

    errors: dict[str, float]  # relative, of flows in closed form
    pinches: dict[str, tuple[float, float]]  # time and place by name
    rates: dict[str, float]  # of the neck's squared radius at the end; -2 in the limit
    shares: tuple[float, float, float]  # of high frequencies: start, plain, DeTurck
    gauss_bonnet: float
    area: float  # of the genus-2 surface; 4 pi
    residual: float  # the largest angle defect left
    before: tuple[float, float]  # extremes of curvature in space
    positive: tuple[int, int]  # networks, by Euler's steps and by the flow
    files: list[Path]


def main(output: str | Path = "output", quick: bool = False) -> Result:
    """Flow what is known, pinch two necks, damp noise, uniformise, learn, draw."""
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    print("Ricci flows, computed and exact\n")
    errors = compare()

    runs = {"dumbbell": dumbbell(32 if quick else 64), "ring": ring(48 if quick else 96)}
    rates = {name: float(slopes(run)[1][-1]) for name, run in runs.items()}
    print("\nNecks: time and place of the pinch, radius when stopped, rate of its square (-> -2)")
    for name, run in runs.items():
        print(f"{name:12}{run.time:12.6f}{run.place:12.6f}", end="")
        print(f"{float(run.neck[-1]):12.4f}{rates[name]:12.4f}")

    noisy = noisy_torus(17 if quick else 33)
    plain, deturck = (share.tolist() for share in noisy.shares)
    print(
        f"\nShare of high frequencies on a torus with 2 % of noise, at t = {noisy.plain.t[-1]:.3f}"
    )
    print(f"start {plain[0]:.1e}   plain {plain[-1]:.1e}   DeTurck {deturck[-1]:.1e}")
    print(f"integral of curvature at the end, with DeTurck: {noisy.gauss_bonnet:.1e}")
    print(f"plain ended by {noisy.stopped}")

    genus2 = uniform(3 if quick else 7)
    before = float(genus2.before.min()), float(genus2.before.max())
    print(
        f"\nGenus 2, {len(genus2.mesh.vertices)} vertices: curvature from {before[0]:.1f} to ",
        end="",
    )
    print(f"{before[1]:.1f}, then -1 with defects below {genus2.found.residual:.0e}")
    print(
        f"after {genus2.found.iterations} steps of Newton and {genus2.found.flips} flips;", end=" "
    )
    print(f"area / 4 pi = {genus2.area / (4 * math.pi):.12f}")

    count = 8 if quick else 200
    euler, flow, least = survivors(count)
    print(f"\nOf {count} networks, dt = 1, the metric stays positive for {euler} by Euler's steps")
    print(f"and for {flow} by the flow (least eigenvalue {least:.1e})")

    files = draw(runs, noisy, genus2, output)
    for file in files:
        print(f"{file!s:<40}{file.stat().st_size / 1000:10,.0f} kB")
    pinches = {name: (run.time, run.place) for name, run in runs.items()}
    return Result(
        errors, pinches, rates, (plain[0], plain[-1], deturck[-1]), noisy.gauss_bonnet,
        genus2.area, genus2.found.residual, before, (euler, flow), files,
    )  # fmt: skip


# %%
# The pictures
# ------------


def draw(runs: dict[str, Pinch], noisy: Noisy, genus2: Uniform, output: Path) -> list[Path]:
    """Draw the dumbbell, its neck, the noise, the blocks and their unfolding."""
    plotters = {
        "flows_neck.png": neck(runs["dumbbell"]),
        "flows_neck_rate.png": rate(runs),
        "flows_deturck.png": gauges(noisy),
        "flows_deturck_share.png": share(noisy),
        "flows_genus2.png": dx.plotting.functions(
            genus2.mesh,
            torch.stack([_signed_log(genus2.before), genus2.found.u - genus2.found.u.mean()], 1),
            labels=[
                f"curvature in space, {genus2.before.min():.0f} to {genus2.before.max():.0f}",
                f"u, {genus2.found.u.min():.2f} to {genus2.found.u.max():.2f}: curvature -1",
            ],
            columns=2,
            direction=(0.4, -1.0, 1.6),
            nodal=False,
        ),
        "flows_disk.png": unfolded(genus2),
    }
    files = [dx.plotting.save(plotter, output / name) for name, plotter in plotters.items()]
    for plotter in plotters.values():
        plotter.close()
    return files


def _signed_log(f: Tensor) -> Tensor:
    return f.sign() * f.abs().log1p() / math.log(10)


def neck(run: Pinch):
    """Draw the dumbbell at five times; colour is the scalar curvature, on a scale with a sign."""
    last = float(run.t[-1])
    shown = [int((run.t - share * last).abs().argmin()) for share in (0, 0.4, 0.75, 0.93, 1)]
    vertices, cells, values, start = [], [], [], 0
    for k, i in enumerate(shown):
        mesh, scalar = spindle(run.psi[i], run.arclength[i])
        vertices.append(mesh.vertices + torch.tensor([1.75 * k, 0.0, 0.0], dtype=F64))
        cells.append(mesh.cells + start)
        values.append(_signed_log(scalar))
        start += len(mesh.vertices)
    times = ",   ".join(f"{float(run.t[i]):.4f}" for i in shown)
    return dx.plotting.functions(
        Mesh(torch.cat(vertices), torch.cat(cells)), torch.cat(values), direction=(0.0, -1.0, 0.12),
        labels=[f"t =  {times};   the neck pinches at t = {run.time:.4f}"],
        title="log R", nodal=False,
    )  # fmt: skip


def rate(runs: dict[str, Pinch]):
    """Draw squared radii of necks against time, and their rates."""
    one = {name: (run.t / run.time, run.neck**2) for name, run in runs.items()}
    two = {name: slopes(run) for name, run in runs.items()}
    left = torch.stack([torch.cat([s for s, _ in two.values()]).min(), torch.tensor(1.0)])
    two["_limit"] = (left, torch.full_like(left, -2.0))
    return dx.plotting.lines(
        [one, two], log=["", "x"], titles=["the neck shrinks", "how fast; dashed: a cylinder, -2"],
        axes=[("time / time of the pinch", "radius squared"),
              ("share of time left", "rate of radius squared")],
    )  # fmt: skip


def gauges(noisy: Noisy):
    """Draw the first component of the metric: start, plain, in the gauge."""
    g = torch.stack([noisy.plain.g[0], noisy.plain.g[-1], noisy.deturck.g[-1]], -1)[:, :, 0, 0]
    wrapped = torch.cat([g, g[:1]], 0)
    wrapped = torch.cat([wrapped, wrapped[:, :1]], 1)
    n, t = g.shape[0], float(noisy.plain.t[-1])
    mesh = rectangle((n, n))
    place = (mesh.vertices * n).round().long()
    return dx.plotting.functions(
        mesh, wrapped[place[:, 0], place[:, 1]], columns=3, nodal=False,
        clim=(float(g.min()), float(g.max())),
        labels=["start, noise of 2 %", f"no gauge, t = {t:.3f}", f"DeTurck, t = {t:.3f}"],
    )  # fmt: skip


def share(noisy: Noisy):
    """Draw the share of high frequencies against time."""
    names = ("no gauge", "DeTurck")
    curves = {name: (noisy.plain.t, s) for name, s in zip(names, noisy.shares, strict=True)}
    return dx.plotting.lines(curves, log="y", axes=("time", "share of high frequencies"))


def unfolded(genus2: Uniform):
    """Draw the triangles laid out in the Poincare disk."""
    u = (genus2.found.u - genus2.found.u.mean())[genus2.found.corners]
    corners = develop(genus2.found, int(u.mean(1).argmax()))
    rounded = (corners.reshape(-1, 2) * 1e8).round()
    _, same = torch.unique(rounded, dim=0, return_inverse=True)
    x = torch.zeros(int(same.max()) + 1, 2, dtype=F64).index_copy(0, same, corners.reshape(-1, 2))
    values = x.new_zeros(len(x)).index_copy(0, same, u.reshape(-1))
    plotter = dx.plotting.functions(
        Mesh(x, same.reshape(-1, 3)), values, title="u - mean", nodal=False
    )
    turn = torch.linspace(0, 2 * torch.pi, 361, dtype=F64)
    circle = torch.stack([turn.cos(), turn.sin(), 0 * turn], -1)
    dx.plotting.curves(circle, radius=0.003, color="#8A8A8A", markers=None, plotter=plotter)
    plotter.window_size = [1300, 1000]
    plotter.camera.focal_point, plotter.camera.position = (0.25, 0.0, 0.0), (0.25, 0.0, 5.0)
    plotter.camera.parallel_scale = 1.03
    return plotter


if __name__ == "__main__":
    main()
