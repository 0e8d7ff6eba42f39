r"""
The shapes of drums
===================

The eigenvalues of :math:`-\Delta` are the squares of the frequencies at which a surface rings; its
eigenfunctions vanish along the nodal lines. Here they are computed for spaces whose spectrum is
known, for two drums of different shape that sound alike, and for a lobed stone. Then it goes the
other way: the gradient of the eigenvalues finds the torus and the ellipsoid that were heard. From
the sphere to spheroids each eigenvalue is followed through its crossings with others, and compared
with perturbation theory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

import darboux as dx
from darboux.manifolds.mesh import Mesh, bolza, disk, grid, icosphere, to_sphere
from darboux.manifolds.spectral import (
    Fourier,
    Harmonics,
    Operator,
    Spectrum,
    derivatives,
    exact_spectrum,
    kernel,
    track,
)

# %%
# Spectra that are known
# ----------------------
# Finite elements of fourth order. The sphere and the disk are curved cells, the hexagonal torus and
# the Bolza surface (genus 2, the most symmetric one) straight cells with the metric of the chart.

HEXAGON = torch.tensor([[1.0, 0.0], [0.5, math.sqrt(0.75)]], dtype=torch.float64)


def klein(x: Tensor) -> Tensor:
    """Return the hyperbolic metric ``(..., 2, 2)`` in the disk where geodesics are straight."""
    s = 1 / (1 - x.square().sum(-1))[..., None, None]
    return s * torch.eye(2, dtype=x.dtype) + s**2 * x[..., None] * x[..., None, :]


def known(quick: bool) -> dict[str, tuple[Operator, Tensor]]:
    """Return operators and their exact eigenvalues."""
    flat = (HEXAGON @ HEXAGON.mT).expand
    square = grid((6, 6) if quick else (10, 10), periodic=True)
    level = 2 if quick else 3
    return {
        "unit sphere": (
            dx.laplacian(icosphere(level), order=4, project=to_sphere),
            exact_spectrum("sphere", 49),
        ),
        "hexagonal torus": (
            dx.laplacian(lambda x: flat(*x.shape[:-1], 2, 2), square, order=6),
            exact_spectrum("torus", 49, lattice=HEXAGON),
        ),
        "Bolza surface": (
            dx.laplacian(klein, bolza(level), order=4),
            exact_spectrum("bolza", 24),
        ),
        "unit disk, fixed rim": (
            dx.laplacian(disk(level), order=4, project=to_sphere, boundary="dirichlet"),
            exact_spectrum("disk", 49, boundary="dirichlet"),
        ),
    }


def compare(quick: bool) -> dict[str, float]:
    """Print computed against exact spectra and return the largest relative errors."""
    errors = {}
    print(f"{'':22}{'unknowns':>9}{'first':>16}{'exact':>16}{'k':>5}  largest relative error")
    for name, (operator, exact) in known(quick).items():
        spectrum = dx.eigenpairs(operator, len(exact))
        assert spectrum.certified
        rising = exact > 0
        found, meant = spectrum.values[rising], exact[rising]
        errors[name] = float((found / meant - 1).abs().max())
        print(
            f"{name:22}{operator.size:9,}{float(found[0]):16.10f}{float(meant[0]):16.10f}"
            f"{len(exact):5}  {errors[name]:.1e}"
        )
    return errors


# %%
# Two drums that sound alike
# --------------------------
# Gordon, Webb and Wolpert (Invent. Math. 110 (1992) 1) reflected a triangle six times across its
# sides in two ways. The spectra are equal, and since both meshes are made of the same seven pieces,
# the discrete ones are too.

DRUMS = (
    ((0, 0), (1, 1), (1, 2), (3, 0), (4, 1), (5, 2)),
    ((0, 0), (1, 1), (2, 2), (3, 0), (4, 1), (4, 2)),
)


def drum(reflections: tuple[tuple[int, int], ...], level: int) -> Mesh:
    """Return a drum: each new triangle is an old one reflected across one of its sides."""
    corners = [torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]], dtype=torch.float64)]
    for which, side in reflections:
        old = corners[which]
        a, b = old[side - 2], old[side - 1]
        foot = a + (b - a) * ((old[side] - a) @ (b - a)) / (b - a).square().sum()
        new = old.clone()
        new[side] = 2 * foot - old[side]
        corners.append(new)
    piece = Mesh(torch.eye(3, dtype=torch.float64), torch.tensor([[0, 1, 2]]))
    for _ in range(level):
        piece = piece.refine()
    # a point of the triangle by its barycentric coordinates, then of the plane by its place
    places = torch.cat([piece.vertices @ triangle for triangle in corners])
    cells = piece.cells + len(piece.vertices) * torch.arange(7)[:, None, None]
    kept, same = torch.unique((places * 2**level).round(), dim=0, return_inverse=True)
    return Mesh(kept / 2**level, same[cells].reshape(-1, 3))


# %%
# A lobed stone
# -------------


def stone(x: Tensor) -> Tensor:
    """Return the point of the stone above the direction of ``x (..., 3)``."""
    n = to_sphere(x)
    a, b, c = n.unbind(-1)
    lobes = 0.28 * a * (a * a - 3 * b * b) + 0.12 * c * (5 * c * c - 3) + 0.1 * b * c
    return (1 + lobes)[..., None] * n


def nodal_domains(mesh: Mesh, values: Tensor) -> int:
    """Count the connected parts of a surface on which a function ``(n,)`` has one sign."""
    edges = mesh.edges[(values[mesh.edges] > 0).all(1) | (values[mesh.edges] < 0).all(1)]
    n = len(values)
    graph = csr_array((torch.ones(len(edges)).numpy(), edges.T.numpy()), shape=(n, n))
    return int(connected_components(graph, directed=False)[0])


# %%
# Hearing a shape
# ---------------
# Eigenvalues are differentiable, and what is compared are sorted lists, whatever function an
# eigenvalue belongs to. The gradient leads to the shape: two radii from nine eigenvalues, three
# axes from eight.


def torus_spectrum(radii: Tensor, degree: int) -> Operator:
    """Return the operator of the torus with radii ``(R, r)`` in Fourier functions."""

    def metric(x: Tensor) -> Tensor:
        around = radii[0] + radii[1] * x[:, 1].cos()
        return torch.diag_embed(torch.stack([around**2, radii[1].square().expand_as(around)], -1))

    return dx.laplacian(metric, Fourier(degree))


def ellipsoid_spectrum(axes: Tensor, degree: int) -> Operator:
    """Return the operator of the ellipsoid with half-axes ``axes`` in spherical harmonics."""
    return dx.laplacian(lambda x: torch.diag(axes**2).expand(len(x), 3, 3), Harmonics(degree))


def listen(
    spectrum: Callable[[Tensor, int], Operator],
    shape: list[float],
    guess: list[float],
    k: int,
    degree: int,
) -> Tensor:
    """Return what is recovered of ``shape`` from its first ``k`` eigenvalues above zero.

    They are heard at a higher degree than the one that is used to find the shape.
    """
    there = spectrum(torch.tensor(shape, dtype=torch.float64), degree + 4)
    heard = dx.eigenpairs(there, k + 1).values[1:]

    def miss(logs: np.ndarray) -> tuple[float, np.ndarray]:
        parameters = torch.from_numpy(logs).requires_grad_()
        values = dx.eigenpairs(spectrum(parameters.exp(), degree), k + 1).values[1:]
        loss = (values / heard - 1).square().sum()
        return float(loss.detach()), torch.autograd.grad(loss, parameters)[0].numpy()

    found = minimize(miss, np.log(guess), jac=True, method="BFGS", options={"gtol": 1e-12})
    return torch.from_numpy(found.x).exp()


# %%
# From sphere to spheroid
# -----------------------
# With polar half-axis 1 + e the levels l(l + 1) split. The path goes through the sphere, where all
# 2l + 1 branches of a level meet, and on to where levels cross; the series of second order starts
# from the sphere, and its coefficients are rational.


def spheroid(e: Tensor, degree: int = 12) -> Operator:
    """Return the operator of the spheroid with half-axes 1, 1, 1 + e."""
    one = torch.ones_like(e)
    return ellipsoid_spectrum(torch.stack([one, one, 1 + e]), degree)


class Branches(NamedTuple):
    """Eigenvalues from oblate to prolate."""

    ts: Tensor  # (T,)
    values: Tensor  # (T, k), tracked
    level: list[int]  # l of each branch
    near: Tensor  # (S,), where the series is drawn
    series: Tensor  # (S, k)
    coefficients: Tensor  # (3, k), of e^0, e^1, e^2


def branches(k: int, points: int) -> Branches:
    """Follow the k lowest branches by overlap, and by perturbation theory."""
    start = derivatives(spheroid, 0.0)
    moved = dx.perturb(
        dx.eigenpairs(start.operator, k),
        start.d_stiffness,
        start.d_mass,
        d2_stiffness=start.d2_stiffness,
        d2_mass=start.d2_mass,
    )
    near = torch.linspace(-0.3, 0.3, 13, dtype=torch.float64)
    series = near[:, None] ** torch.arange(3) @ moved.series
    ts = torch.linspace(-0.4, 1.6, points, dtype=torch.float64)
    path = track(spheroid, ts, k, extra=2 * k)
    level = [math.isqrt(j) for j in range(k)]  # they do not meet yet where the path starts
    return Branches(ts, path.values, level, near, series, moved.series)


def crossing(paths: Branches) -> float:
    """Return where the lowest branch of l = 3 comes below the highest of l = 2."""
    two, three = paths.values[:, 4:9], paths.values[:, 9:16]
    gap = three[:, three[-1].argmin()] - two[:, two[-1].argmax()]
    i = int((gap < 0).nonzero()[0])
    share = gap[i - 1] / (gap[i - 1] - gap[i])
    return float(paths.ts[i - 1] + share * (paths.ts[i] - paths.ts[i - 1]))


# %%
# All of it
# ---------


class Result(NamedTuple):
    """What this example found."""

    errors: dict[str, float]  # largest relative, by space
    drum_difference: float  # between the spectra of the two drums
    drum_first: float
    domains: list[int]  # nodal domains of the functions of the stone
    torus: Tensor  # recovered (R, r)
    ellipsoid: Tensor  # recovered half-axes, ascending
    coefficients: Tensor  # of the branches of the spheroid
    crossing: float  # where one of l = 3 comes below one of l = 2
    files: list[Path]


def main(output: str | Path = "output", quick: bool = False) -> Result:
    """Compute known spectra, compare two drums, hear two shapes, follow branches, draw."""
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    print("Spectra of -Laplace, computed and exact\n")
    errors = compare(quick)

    sounds = []
    for reflections in DRUMS:
        mesh = drum(reflections, 3 if quick else 5)
        sounds.append(dx.eigenpairs(dx.laplacian(mesh, order=2, boundary="dirichlet"), 30))
    one, two = sounds
    difference = float((one.values - two.values).abs().max())
    first = float(one.values[0])
    print("\nTwo drums of different shape: the first 30 eigenvalues differ by at most")
    print(f"{difference:.1e}; the first is {first:.6f} (2.537944 in the literature)")

    mesh = icosphere(3 if quick else 4)
    mesh = mesh.move(stone(mesh.vertices))
    modes = dx.eigenpairs(dx.laplacian(mesh, order=2, project=stone), 60 if quick else 100)
    nodes = modes.operator.extend(modes.functions)[: len(mesh.vertices)]
    domains = [nodal_domains(mesh, nodes[:, k]) for k in range(1, 13)]
    print("\nNodal domains of the stone's functions 2, 3, ... 13 (Courant: at most as many)")
    print(" ".join(map(str, domains)))

    torus = listen(torus_spectrum, [2.0, 0.8], [1.5, 1.0], 9, 8)
    axes = listen(ellipsoid_spectrum, [1.0, 1.2, 1.5], [1.0, 1.1, 1.3], 8, 12).sort().values
    print("\nHeard from 9 eigenvalues, a torus of radii", *(f"{x:.8f}" for x in torus.tolist()))
    print("and from 8, an ellipsoid of half-axes     ", *(f"{x:.8f}" for x in axes.tolist()))

    paths = branches(25, 11 if quick else 31)
    rates = [f"{x:.9f}" for x in paths.coefficients[1:, 1].tolist()]
    print(f"\nSpheroid, lowest branch: 2 + ({rates[0]}) e + ({rates[1]}) e^2")
    print("exact:                   2 - 12/5 e + 1574/875 e^2")
    meeting = crossing(paths)
    print(f"The lowest branch of l = 3 crosses the highest of l = 2 near e = {meeting:.3f}")

    files = draw(sounds, modes, paths, output, quick)
    for file in files:
        print(f"{file!s:<40}{file.stat().st_size / 1000:10,.0f} kB")
    found = (errors, difference, first, domains, torus, axes, paths.coefficients, meeting)
    return Result(*found, files)


# %%
# The pictures
# ------------
# Heat starts at a point on a lobe of the stone; the frames are the heat kernel of that point.


def draw(
    drums: list[Spectrum], modes: Spectrum, paths: Branches, output: Path, quick: bool
) -> list[Path]:
    """Draw drums, the functions of the stone, branches, and heat that spreads."""
    files = []
    shown = [0, 1, 2, 8]
    plotter = dx.plotting.functions(
        *beside(drums, shown), relief=0.07, labels=[f"{v:.4f}" for v in drums[0].values[shown]]
    )
    files.append(dx.plotting.save(plotter, output / "drums.png"))
    shown = torch.arange(1, 5 if quick else 13)
    plotter = dx.plotting.functions(
        modes.operator,
        modes.functions[:, shown],
        labels=[f"λ = {v:.3f}" for v in modes.values[shown].tolist()],
    )
    files.append(dx.plotting.save(plotter, output / "nodal_lines.png"))
    plotter = dx.plotting.spectrum(
        (paths.ts, paths.values[:, 1:]),
        dots=(paths.near, paths.series[:, 1:]),
        groups=paths.level[1:],
        labels=[f"l = {l}" for l in sorted(set(paths.level[1:]))],
        axes=("e", "eigenvalue"),
        title="Spheroid of half-axes 1, 1, 1 + e; dots: second-order perturbation theory",
    )
    files.append(dx.plotting.save(plotter, output / "spheroid.png"))
    return [*files, spread(modes, output / "heat.gif", 4 if quick else 40)]


def beside(drums: list[Spectrum], shown: list[int]) -> tuple[Mesh, Tensor]:
    """Return both drums as one mesh and their functions, the largest value upward."""
    vertices, cells, values, start = [], [], [], 0
    for place, spectrum in enumerate(drums):
        mesh = spectrum.operator.space.mesh
        vertices.append(mesh.vertices + torch.tensor([-3.2 * place, 3.2 * place]))
        cells.append(mesh.cells + start)
        u = spectrum.operator.extend(spectrum.functions)[: len(mesh.vertices), shown]
        values.append(u * u.gather(0, u.abs().argmax(0, keepdim=True)).sign())
        start += len(mesh.vertices)
    return Mesh(torch.cat(vertices), torch.cat(cells)), torch.cat(values)


def spread(modes: Spectrum, path: Path, frames: int) -> Path:
    """Write a film of heat that spreads over the stone."""
    space = modes.operator.space
    height = space.nodes() @ torch.tensor([1.0, -0.6, 0.3], dtype=torch.float64)
    load = torch.zeros(modes.operator.size, dtype=torch.float64)
    load[space.index[height.argmax()]] = 1.0
    # at the start the functions left out are damped by e^-8
    ts = 8 / modes.values[-1] * torch.logspace(0, 1.6, frames, dtype=torch.float64)
    heat = kernel(modes, lambda values: torch.exp(-ts[:, None] * values), load)
    heat = heat / heat.amax(1, keepdim=True) ** 0.7
    return dx.plotting.heat(modes.operator, heat, path, fps=16, turn=60.0, lines=9)


if __name__ == "__main__":
    main()
