"""The lowest eigenpairs of surfaces, from vertices and triangles, beside LaPy, libigl and scipy.

Each contender gets the arrays of a mesh and returns k eigenpairs; what it builds on the way is in
its time. Figures are process CPU seconds on one core and one thread in float64, medians, with
the contenders taking turns. Run::

    pip install '.[fast]' -r benchmarks/requirements.txt  # the rows of absent peers are left out
    python benchmarks/spectra.py                          # ten minutes; --large: an hour

LaPy factors with cholespy (``use_cholmod=True``), as darboux does, and solves by ARPACK with the
same linear elements. robust-laplacian and libigl have lumped masses and no solver: their users
call ``scipy.sparse.linalg.eigsh``. The errors are those of the first 49 eigenvalues above zero.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import timing

timing.one_thread()

import numpy as np  # noqa: E402
import scipy.sparse.linalg  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import darboux as dx  # noqa: E402
from darboux.manifolds.mesh import Mesh, icosphere, to_sphere, torus_mesh  # noqa: E402
from darboux.manifolds.spectral import Fourier, exact_spectrum  # noqa: E402

RADII = 2.0, 0.8  # of the torus
COUNTED = 50  # eigenvalues compared with the exact ones, zero included


def surfaces(large: bool) -> list[tuple[str, Mesh]]:
    """Return meshes of the unit sphere and of a torus of revolution."""
    made = [("sphere", icosphere(level)) for level in ((5, 6, 7) if large else (5, 6))]
    for n, m in ((160, 64), (320, 128), (640, 256))[: 3 if large else 2]:
        made.append(("torus", torus_mesh(*RADII, n=n, m=m)))
    return made


def exact(surface: str) -> Tensor:
    """Return the lowest eigenvalues: in closed form, or by Fourier functions to 1e-11."""
    if surface == "sphere":
        return exact_spectrum("sphere", COUNTED)
    fine = dx.laplacian(dx.TorusOfRevolution(*RADII), Fourier(12))
    return dx.eigenpairs(fine, COUNTED).values


def contenders(mesh: Mesh, k: int) -> dict[str, Callable[[], Any]]:
    """Return calls that go from the arrays of a mesh to k eigenvalues."""
    x, cells = mesh.vertices.numpy(), mesh.cells.numpy()
    start = np.random.default_rng(0).uniform(-1, 1, len(x))

    def ours(**options: Any) -> Tensor:
        fresh = Mesh(torch.from_numpy(x), torch.from_numpy(cells))  # nothing symbolic is kept
        return dx.eigenpairs(dx.laplacian(fresh), k, **options).values

    calls: dict[str, Callable[[], Any]] = {
        "darboux": ours,
        "darboux, no certificate": lambda: ours(certify=False),
    }
    try:
        import lapy  # pyright: ignore[reportMissingImports]

        def by_lapy() -> Any:
            solver = lapy.Solver(lapy.TriaMesh(x, cells), use_cholmod=True)
            return solver.eigs(k, v0=start)[0]

        calls["LaPy, cholespy"] = by_lapy
    except ImportError:
        print("LaPy is not installed: its rows are left out", file=sys.stderr)

    def eigsh(stiffness: Any, mass: Any, sigma: float) -> Any:
        return np.sort(
            scipy.sparse.linalg.eigsh(
                stiffness.tocsc(), k, mass.tocsc(), sigma=sigma, v0=start, tol=0
            )[0]
        )

    try:
        import robust_laplacian

        calls["robust-laplacian + eigsh"] = lambda: eigsh(
            *robust_laplacian.mesh_laplacian(x, cells), 1e-8
        )
    except ImportError:
        print("robust-laplacian is not installed: its rows are left out", file=sys.stderr)
    try:
        import igl  # pyright: ignore[reportMissingImports]

        def by_igl() -> Any:
            mass = igl.massmatrix(x, cells, igl.MASSMATRIX_TYPE_VORONOI)
            return eigsh(-igl.cotmatrix(x, cells), mass, -0.01)

        calls["libigl + eigsh"] = by_igl
    except ImportError:
        print("libigl is not installed: its rows are left out", file=sys.stderr)
    return calls


def measure(
    calls: Mapping[str, Callable[[], Any]], repeat: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """Return median CPU seconds and what each call returned; the calls take turns."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    found: dict[str, Any] = {}
    for _ in range(repeat):
        for name, call in calls.items():
            begin = time.process_time()
            found[name] = call()
            taken[name].append(time.process_time() - begin)
    return {name: statistics.median(t) for name, t in taken.items()}, found


def error(values: Any, reference: Tensor) -> float:
    """Return the largest relative error of the values counted, zero left out."""
    values = torch.as_tensor(np.asarray(values))[1:COUNTED]
    return float((values / reference[1:COUNTED].to(values) - 1).abs().max())


def same_elements(large: bool, repeat: int) -> None:
    """Print the table of assembly and eigenpairs on one mesh."""
    rows = []
    for surface, mesh in surfaces(large):
        reference = exact(surface)
        for k in (50, 100):
            cpu, found = measure(contenders(mesh, k), repeat)
            best = cpu.get("LaPy, cholespy", float("nan"))
            for name, seconds in cpu.items():
                wrong = error(found[name], reference)
                n = mesh.vertices.shape[0]
                rows.append((surface, n, k, name, seconds, seconds / best, f"{wrong:.1e}"))
            print(".", end="", flush=True, file=sys.stderr)
    print(file=sys.stderr)
    header = ("surface", "vertices", "k", "from arrays to eigenpairs", "s", "x LaPy", "error of 49")
    print(timing.table(header, rows))


def equal_accuracy(repeat: int) -> None:
    """Print what the accuracy of linear elements on 40,000 vertices costs otherwise."""
    rows = []
    round_, turned = icosphere(6), torus_mesh(*RADII, n=320, m=128)
    choices: dict[str, tuple[Mesh, dict[str, Callable[[], Any]]]] = {
        "sphere": (
            round_,
            {
                "darboux, P2 on 642 vertices": lambda: (
                    dx.eigenpairs(
                        dx.laplacian(icosphere(3), order=2, project=to_sphere), COUNTED
                    ).values
                ),
                "darboux, P2 on 2,562 vertices": lambda: (
                    dx.eigenpairs(
                        dx.laplacian(icosphere(4), order=2, project=to_sphere), COUNTED
                    ).values
                ),
            },
        ),
        "torus": (
            turned,
            {
                "darboux, 169 Fourier functions": lambda: (
                    dx.eigenpairs(
                        dx.laplacian(dx.TorusOfRevolution(*RADII), Fourier(6)), COUNTED
                    ).values
                ),
                "darboux, 289 Fourier functions": lambda: (
                    dx.eigenpairs(
                        dx.laplacian(dx.TorusOfRevolution(*RADII), Fourier(8)), COUNTED
                    ).values
                ),
            },
        ),
    }
    for surface, (mesh, calls) in choices.items():
        peers = contenders(mesh, COUNTED)
        peers.pop("darboux, no certificate")
        cpu, found = measure({**peers, **calls}, repeat)
        best = cpu.get("LaPy, cholespy", float("nan"))
        for name, seconds in cpu.items():
            wrong = error(found[name], exact(surface))
            rows.append((surface, name, seconds, best / seconds, f"{wrong:.1e}"))
    print(timing.table(("surface", "how", "s", "times faster than LaPy", "error of 49"), rows))


def gradient(repeat: int) -> None:
    """Print the cost of the gradient of eigenvalues by the vertices, and its error."""
    mesh = icosphere(5)

    def loss(x: Tensor) -> Tensor:
        values = dx.eigenpairs(dx.laplacian(mesh.move(x)), 64).values  # whole levels: l < 8
        return values[:49].sum() + values[49:].square().sum() / 50

    x = mesh.vertices.clone().requires_grad_()
    forward, backward, slope = [], [], torch.zeros_like(x)
    for _ in range(repeat):
        begin = time.process_time()
        value = loss(x)
        middle = time.process_time()
        (slope,) = torch.autograd.grad(value, x)
        forward.append(middle - begin)
        backward.append(time.process_time() - middle)
    solve, back = statistics.median(forward), statistics.median(backward)
    plain, step = x.detach(), 1e-4
    along = plain * (1 + torch.sin(2 * plain).roll(1, -1))  # a smooth deformation
    with torch.no_grad():
        one, two = (loss(x + h * along) - loss(x - h * along) for h in (step, 2 * step))
    expected = (8 * one - two) / (12 * step)  # of fourth order
    wrong = float(((slope * along).sum() - expected).abs() / expected.abs())
    print(
        f"gradient of 64 eigenvalues by {len(x):,} vertices: {back:.2f} s, {back / solve:.2f} of "
        f"the {solve:.2f} s of assembly and solution; {wrong:.1e} from differences"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--large", action="store_true", help="160,000 vertices too")
    options = parser.parse_args()
    same_elements(options.large, options.repeat)
    print()
    equal_accuracy(options.repeat)
    print()
    gradient(options.repeat)


if __name__ == "__main__":
    main()
